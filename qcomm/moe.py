"""A Mixture-of-Experts layer around dispatch and combine, in plain PyTorch: router, experts, layer."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from qcomm import reference, validate
from qcomm.buffer import Buffer
from qcomm.formats import FP8_GROUP_SIZE
from qcomm.handle import Received
from qcomm.tensors import FP8Tensor, MXFP4Tensor

_GROUP_SCORE_EXPERTS = 2
_MIN_WEIGHT_SUM = 1e-20


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The shape of an MoE layer.

    Args:
        hidden: elements in a token, a multiple of 128.
        intermediate: width inside an expert.
        num_experts: routed experts in all.
        num_topk: routed experts of a token.
        num_groups: groups the experts are divided into, in order; 1 for no group limit.
        num_topk_groups: groups a token's experts may come from.
        routed_scaling_factor: sum of a token's routing weights.
        shared_intermediate: width of the expert that every token goes through; 0 for none.

    Raises:
        ValueError, TypeError: a shape no layer can have.
    """

    hidden: int
    intermediate: int
    num_experts: int
    num_topk: int
    num_groups: int = 1
    num_topk_groups: int = 1
    routed_scaling_factor: float = 1.0
    shared_intermediate: int = 0

    def __post_init__(self) -> None:
        validate.multiple("hidden", self.hidden, FP8_GROUP_SIZE)
        for name in ("intermediate", "num_experts", "num_topk", "num_groups", "num_topk_groups"):
            validate.positive(name, getattr(self, name))
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts must be a multiple of the {self.num_groups} groups, got {self.num_experts}")
        if self.num_topk_groups > self.num_groups:
            raise ValueError(
                f"num_topk_groups must be at most num_groups = {self.num_groups}, got {self.num_topk_groups}"
            )
        reachable = self.num_experts // self.num_groups * self.num_topk_groups
        if self.num_topk > reachable:
            raise ValueError(
                f"num_topk must be at most the {reachable} experts in num_topk_groups groups, got {self.num_topk}"
            )
        if self.shared_intermediate < 0:
            raise ValueError(f"shared_intermediate must not be negative, got {self.shared_intermediate}")


class Router(nn.Module):
    """Top-k router of DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, balanced without an auxiliary loss.

    A bias per expert is added to the scores to select experts, and only then: the weights of the selected
    experts are their plain scores, normalised over the top-k and multiplied by `routed_scaling_factor`.

    Args:
        config: shape of the layer.
        seed: of the initial weight; every rank needs the same.
        device: where it lives.
    """

    bias: torch.Tensor

    def __init__(self, config: MoEConfig, *, seed: int = 0, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._config = config
        generator = _generator(seed, 0, device)
        self.weight = nn.Parameter(_normal((config.num_experts, config.hidden), config.hidden, generator))
        self.register_buffer("bias", torch.zeros(config.num_experts, device=device))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts and weights in float32.

        Args:
            x: `[num_tokens, hidden]` of any floating dtype.

        Returns:
            `[num_tokens, num_topk]` int64 experts, distinct in a row, and float32 weights.
        """
        scores = torch.sigmoid(F.linear(x.to(torch.float32), self.weight))
        topk_idx = self._select(scores.detach() + self.bias)
        weights = scores.gather(1, topk_idx)
        weights = weights / (weights.sum(1, keepdim=True) + _MIN_WEIGHT_SUM) * self._config.routed_scaling_factor
        return topk_idx, weights

    @torch.no_grad()
    def update_bias(self, tokens_per_expert: torch.Tensor, rate: float = 1e-3) -> None:
        """Move each expert's bias one step against its load.

        Args:
            tokens_per_expert: `[num_experts]` tokens of the last step, summed over all ranks.
            rate: length of the step.
        """
        load = tokens_per_expert.to(self.bias)
        self.bias += rate * torch.sign(load.mean() - load)

    def _select(self, biased: torch.Tensor) -> torch.Tensor:
        config = self._config
        if config.num_topk_groups < config.num_groups:
            by_group = biased.unflatten(1, (config.num_groups, -1))
            best = by_group.topk(min(_GROUP_SCORE_EXPERTS, by_group.shape[2]), dim=2).values.sum(2)
            allowed = torch.zeros_like(best, dtype=torch.bool)
            allowed.scatter_(1, best.topk(config.num_topk_groups, dim=1).indices, True)
            biased = by_group.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)
        return biased.topk(config.num_topk, dim=1).indices


class Experts(nn.Module):
    """SwiGLU experts `[first, first + count)` of a layer, in bfloat16.

    Every expert's weights come from a seed of its own: the same on every rank that holds it, among ranks of
    one device type.

    Args:
        config: shape of the layer.
        first: first expert held.
        count: experts held.
        seed: the layer's seed.
        device: where they live.
    """

    def __init__(
        self,
        config: MoEConfig,
        first: int,
        count: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self._hidden = config.hidden
        gate_up, down = [], []
        for expert in range(first, first + count):
            generator = _generator(seed, 2 + expert, device)
            gate_up.append(_normal((2 * config.intermediate, config.hidden), config.hidden, generator, torch.bfloat16))
            down.append(_normal((config.hidden, config.intermediate), config.intermediate, generator, torch.bfloat16))
        self.gate_up = nn.Parameter(torch.stack(gate_up))
        self.down = nn.Parameter(torch.stack(down))

    def __len__(self) -> int:
        return self.gate_up.shape[0]

    def forward(self, recv: Received) -> torch.Tensor:
        """Run every expert on its group of rows.

        Args:
            recv: of a dispatch with the "expert_major" layout and as many local experts.

        Returns:
            `[rows, hidden]` bfloat16, zero in padding rows.
        """
        if recv.group_offsets is None:
            raise ValueError("recv must have the layout 'expert_major', got 'token_major'")
        x = decode(recv)
        counts = recv.num_tokens_per_expert_list or recv.num_tokens_per_expert.tolist()
        offsets = recv.group_offsets.tolist()
        y = [
            F.pad(self.run_one(expert, x[start : start + count]), (0, 0, 0, end - start - count))
            for expert, (start, end, count) in enumerate(zip(offsets[:-1], offsets[1:], counts, strict=True))
        ]
        unused = x.new_zeros(x.shape[0] - offsets[-1], self._hidden)
        return torch.cat((*y, unused))

    def run_one(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Run one expert, counted from the first one held, on `[rows, hidden]` bfloat16."""
        return swiglu(x, self.gate_up[expert], self.down[expert])


class SharedExpert(nn.Module):
    """The SwiGLU expert that every token goes through, on its own rank and with weight 1."""

    def __init__(self, config: MoEConfig, *, seed: int = 0, device: torch.device | str | None = None) -> None:
        super().__init__()
        width, generator = config.shared_intermediate, _generator(seed, 1, device)
        self.gate_up = nn.Parameter(_normal((2 * width, config.hidden), config.hidden, generator, torch.bfloat16))
        self.down = nn.Parameter(_normal((config.hidden, width), width, generator, torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[num_tokens, hidden]` bfloat16 for `x` of the same shape and dtype."""
        return swiglu(x, self.gate_up, self.down)


class MoELayer(nn.Module):
    """Router, this rank's share of the experts, and the shared expert if there is one.

    Args:
        config: shape of the layer.
        rank: of this process.
        num_ranks: rank r holds experts [r * num_experts / num_ranks, ...), as a Buffer expects; by default one
            rank holds them all.
        seed: of the initial weights; every rank needs the same.
        device: where they live.

    Raises:
        ValueError: the ranks can't hold equally many experts.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if config.num_experts % num_ranks:
            raise ValueError(f"num_experts must be a multiple of the {num_ranks} ranks, got {config.num_experts}")
        self.config = config
        count = config.num_experts // num_ranks
        self.router = Router(config, seed=seed, device=device)
        self.experts = Experts(config, rank * count, count, seed=seed, device=device)
        self.shared = SharedExpert(config, seed=seed, device=device) if config.shared_intermediate else None

    def forward(self, x: torch.Tensor, buffer: Buffer) -> torch.Tensor:
        """Route, dispatch, run the experts, combine. Collective; for inference, under `torch.no_grad()`.

        Args:
            x: `[num_tokens, hidden]` bfloat16.
            buffer: of the layer's shape.

        Returns:
            `[num_tokens, hidden]` bfloat16.
        """
        topk_idx, topk_weights = self.router(x)
        recv, handle = buffer.dispatch(x, topk_idx, topk_weights)
        out = buffer.combine(self.experts(recv), handle)
        return out if self.shared is None else out + self.shared(x)

    def forward_local(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer without communication: what `forward` gives if nothing is lost on the wire.

        Args:
            x: `[num_tokens, hidden]` bfloat16.

        Returns:
            `[num_tokens, hidden]` float32: the weighted sum of the experts' bfloat16 outputs, not rounded.

        Raises:
            ValueError: this layer does not hold all experts; make one with num_ranks = 1 and the same seed.
        """
        if len(self.experts) != self.config.num_experts:
            raise ValueError(
                f"forward_local needs all {self.config.num_experts} experts on this rank (num_ranks = 1), "
                f"got {len(self.experts)}"
            )
        topk_idx, topk_weights = self.router(x)
        out = x.new_zeros(x.shape, dtype=torch.float32)
        for expert in range(len(self.experts)):
            tokens, entry = (topk_idx == expert).nonzero(as_tuple=True)
            y = self.experts.run_one(expert, x[tokens]).to(torch.float32)
            out = out.index_add(0, tokens, topk_weights[tokens, entry, None] * y)
        return out if self.shared is None else out + self.shared(x).to(torch.float32)


def decode(recv: Received) -> torch.Tensor:
    """Return received rows as `[rows, hidden]` bfloat16."""
    x = recv.tensor()
    if isinstance(x, FP8Tensor):
        return reference.dequantize_fp8(x, torch.bfloat16)
    return reference.dequantize_mxfp4(x, torch.bfloat16) if isinstance(x, MXFP4Tensor) else x


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Compute `(silu(x @ gate) * (x @ up)) @ down` in the dtype of x.

    Args:
        x: `[rows, hidden]`.
        gate_up: `[2 * intermediate, hidden]`, gate first.
        down: `[hidden, intermediate]`.

    Returns:
        `[rows, hidden]`.
    """
    gate, up = F.linear(x, gate_up).chunk(2, dim=1)
    return F.linear(F.silu(gate) * up, down)


def _generator(seed: int, part: int, device: torch.device | str | None) -> torch.Generator:
    """Make the random numbers of one part of the layer with this seed; a CPU generator takes 32 bits."""
    return torch.Generator(device or "cpu").manual_seed((seed << 16) + part)


def _normal(
    shape: tuple[int, ...], fan_in: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, device=generator.device)
    return (values * fan_in**-0.5).to(dtype)
