"""The MoE layer to train: router, differentiable dispatch and combine, and experts that keep MXFP4 for backward."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from qcomm import validate
from qcomm.buffer import Buffer
from qcomm.formats import FP8_GROUP_SIZE, WirePrecision
from qcomm.functional import combine, dispatch
from qcomm.moe.config import MoEConfig, expert_weights
from qcomm.moe.experts import KEEPS, RECOMPUTES, Keep, Recompute, swiglu_experts
from qcomm.moe.plain import SharedExpert
from qcomm.moe.router import Router

WeightsIn = Literal["experts", "combine"]
WEIGHTS_IN: tuple[WeightsIn, ...] = ("experts", "combine")
"""Where routing weights multiply: SwiGLU's output in float32 before it is rounded, or rows in combine's sums."""


class MXFP4MoELayer(nn.Module):
    """A Mixture-of-Experts layer for training over the ranks of a group, by the recipe of arXiv 2603.02731.

    Making it is collective, and so are its forward and backward passes: every rank runs them, in the same order, one
    without tokens included. Parameters: `router.weight`, this rank's experts `w1` (gate, then up) and `w2`, and the
    shared expert's. Experts are different on every rank, so their gradients need no reduction over the group; those of
    the router and of the shared expert do, and that is the caller's.

    Args:
        config: shape of the layer.
        group: process group that the experts are spread over; None for the default group, or with a buffer its own.
        num_max_tokens_per_rank: most tokens of a rank in one call; may be left out with a buffer.
        precision: wire of each leg; default `WirePrecision.paper()`, may be left out with a buffer.
        keep: see `swiglu_experts`, as for the next. Also what tokens arrive as.
        recompute: what backward computes anew.
        static: whether dispatch does not wait for the counts of tokens; rows are then those of the worst case.
        num_max_recv_tokens: rows that a rank can receive in static mode, a multiple of 128; where they do not suffice
            tokens are dropped, and a later call raises.
        weights_in: whether the "experts" or "combine" apply the routing weights; combine keeps the experts' output.
        buffer: exchange through this one, which the caller destroys; layers of one shape can share it. Without it the
            layer makes its own, which `destroy` frees.
        backend: of a buffer that the layer makes.
        seed: of the initial weights; every rank needs the same.
        device: where everything lives; None is the buffer's choice.

    Attributes:
        tokens_per_expert: `[num_experts]` int64: how many of this rank's tokens went to each expert in training since
            the last `update_bias`.

    Raises:
        ValueError, TypeError: arguments that do not fit.
        As `Buffer`.
    """

    tokens_per_expert: torch.Tensor

    def __init__(
        self,
        config: MoEConfig,
        group: dist.ProcessGroup | None = None,
        *,
        num_max_tokens_per_rank: int | None = None,
        precision: WirePrecision | None = None,
        keep: Keep = "mxfp4",
        recompute: Recompute = "none",
        weights_in: WeightsIn = "experts",
        static: bool = False,
        num_max_recv_tokens: int | None = None,
        buffer: Buffer | None = None,
        backend: str = "auto",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("keep", keep, KEEPS),
            ("recompute", recompute, RECOMPUTES),
            ("weights_in", weights_in, WEIGHTS_IN),
        ):
            validate.one_of(name, value, choices)
        if keep != "bf16":
            validate.multiple("intermediate", config.intermediate, FP8_GROUP_SIZE)
        self._owns_buffer = buffer is None
        if buffer is None:
            if num_max_tokens_per_rank is None:
                raise ValueError("num_max_tokens_per_rank must be given unless buffer is, got None")
            buffer = Buffer(
                group,
                num_experts=config.num_experts,
                num_topk=config.num_topk,
                hidden=config.hidden,
                num_max_tokens_per_rank=num_max_tokens_per_rank,
                precision=precision or WirePrecision.paper(),
                backend=backend,
                device=device,
            )
        elif group is not None or precision is not None or num_max_tokens_per_rank is not None:
            raise ValueError("group, precision and num_max_tokens_per_rank must be None with a buffer, which has them")
        elif backend != "auto" or (device is not None and torch.device(device).type != buffer.device.type):
            raise ValueError(
                f"with a buffer backend must be 'auto' and device its own, {buffer.device}, got {backend!r}, {device}"
            )
        for name, size, held in (
            ("num_experts", config.num_experts, buffer.num_local_experts * buffer.num_ranks),
            ("num_topk", config.num_topk, buffer.num_topk),
            ("hidden", config.hidden, buffer.hidden),
        ):
            if size != held:
                raise ValueError(f"buffer must be of {name}={size}, the layer's, got {name}={held}")
        self.config, self.keep, self.recompute, self.weights_in = config, keep, recompute, weights_in
        self.buffer = buffer
        self._static, self._num_max_recv_tokens = static, num_max_recv_tokens
        device = buffer.device
        count = config.num_experts // buffer.num_ranks
        self.router = Router(config, seed=seed, device=device)
        w1, w2 = expert_weights(config, buffer.rank * count, count, seed=seed, device=device)
        self.w1, self.w2 = nn.Parameter(w1), nn.Parameter(w2)
        self.shared = SharedExpert(config, seed=seed, device=device) if config.shared_intermediate else None
        load = torch.zeros(config.num_experts, dtype=torch.int64, device=device)
        self.register_buffer("tokens_per_expert", load, persistent=False)

    def forward(self, x: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
        """Route, dispatch, run the experts, combine. Collective.

        Args:
            x: `[..., hidden]` bfloat16; leading dimensions may differ between ranks, and be 0.
            seed: random bits of wires with stochastic rounding; layers and steps need their own.

        Returns:
            `[..., hidden]` bfloat16.

        Raises:
            As `qcomm.dispatch` and `qcomm.combine`.
        """
        tokens = x.reshape(-1, x.shape[-1])
        topk_idx, topk_weights = self.router(tokens)
        if self.training and torch.is_grad_enabled():
            # Not bincount, which waits for the device on the host.
            chosen = topk_idx.flatten()
            self.tokens_per_expert.scatter_add_(0, chosen, torch.ones_like(chosen))
        in_experts = self.weights_in == "experts"
        recv, handle = dispatch(
            tokens,
            topk_idx,
            topk_weights,
            self.buffer,
            recv_dtype=self.keep,
            alignment=FP8_GROUP_SIZE,
            static=self._static,
            num_max_recv_tokens=self._num_max_recv_tokens,
            seed=seed,
        )
        y = swiglu_experts(
            recv, handle, self.w1, self.w2, keep=self.keep, recompute=self.recompute, weighted=in_experts
        )
        out = combine(y, handle, weighted=not in_experts, seed=seed)
        if self.shared is not None:
            out = out + self.shared(tokens)
        return out.view(x.shape)

    @torch.no_grad()
    def update_bias(self, rate: float = 1e-3) -> None:
        """Move the router's bias one step towards balance, by the tokens of all ranks since the last call. Collective.

        Args:
            rate: length of the step.
        """
        self.router.update_bias(self.tokens_per_expert, rate, group=self.buffer.group)
        self.tokens_per_expert.zero_()

    def destroy(self) -> None:
        """Free the buffer, if it is the layer's own. Collective."""
        if self._owns_buffer:
            self.buffer.destroy()
