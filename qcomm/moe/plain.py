"""An MoE layer in plain PyTorch, expert by expert: for demo, examples and tests, and for inference."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from qcomm import reference
from qcomm.buffer import Buffer
from qcomm.handle import Received
from qcomm.moe.config import MoEConfig, expert_weights, generator_of, normal
from qcomm.moe.router import Router
from qcomm.tensors import FP8Tensor, MXFP4Tensor


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
        gate_up, down = expert_weights(config, first, count, seed=seed, device=device)
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)

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
        width, generator = config.shared_intermediate, generator_of(seed, 1, device)
        self.gate_up = nn.Parameter(normal((2 * width, config.hidden), config.hidden, generator, torch.bfloat16))
        self.down = nn.Parameter(normal((config.hidden, width), width, generator, torch.bfloat16))

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
