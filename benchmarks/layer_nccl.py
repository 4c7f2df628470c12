"""The MoE layer as a training stack has it without qcomm: BF16 rows through `all_to_all_single`.

BASELINE. The router and weights of the qcomm layer, and the same grouped BF16 products (`qcomm.moe.products`). Tokens
are sorted by rank and travel by `all_to_all_single` (NCCL; gloo on the CPU), either once per rank that holds any of
their experts, with the experts' ids and weights beside them ("nccl once"), or once per expert, as most stacks do
("nccl pairs"). The receiver sorts rows by expert, groups padded to multiples of 8, runs the experts, weighs in SwiGLU,
adds up what belongs to one arrived row, and sends back along the same way. One exchange of counts and one wait of the
host for them size everything. Row copies and sums, and SwiGLU with its gradient, are one kernel each, by torch.compile
(CPU and --eager: plain PyTorch). Backward is written out: nothing is routed or sorted again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qcomm.moe import MXFP4MoELayer
from qcomm.moe.products import Groups, grouped_mm, grouped_wgrad

ALIGNMENT = 8

Experts = Callable[[torch.Tensor, torch.Tensor, Groups], torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Copies:
    """Which rows are copies of which.

    Attributes:
        source: `[M]` the row that each copy is of; of padding 0.
        filled: `[M]` float32, 0 for padding and else 1.
        copies: `[N, J]` the copies of each row; where there are fewer than J, 0.
        there: `[N, J]` float32, 1 where there is one and else 0.
    """

    source: torch.Tensor
    filled: torch.Tensor
    copies: torch.Tensor
    there: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """Where one rank's tokens go, and what comes to it."""

    sent: Copies
    send_counts: list[int]
    recv_counts: list[int]
    pair: torch.Tensor
    """`[rows sent, C]`: which of the flat routing weights travel with a row."""
    arrived: Copies
    arrived_pair: torch.Tensor
    """`[experts' rows]`: which of the flat weights that arrived is each row's; 0 for padding."""
    groups: Groups


class NcclLayer:
    """The layer, of the weights of a qcomm layer in BF16. Collective to call and in backward.

    Args:
        layer: whose router and experts it takes.
        once: whether a token travels once per rank, not once per expert.
        eager: do without torch.compile.
    """

    def __init__(self, layer: MXFP4MoELayer, *, once: bool, eager: bool) -> None:
        self._layer, self._once = layer, once
        self._group = layer.buffer.group
        self._num_ranks, self._num_local = layer.buffer.num_ranks, layer.buffer.num_local_experts
        self._kernels = _kernels(not eager and layer.w1.is_cuda)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[num_tokens, hidden]` BF16."""
        topk_idx, weights = self._layer.router(x)
        return self.exchange(x, topk_idx, weights, self.experts)

    def exchange(
        self, x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """Route, send, run these experts, send back and add up."""
        route = self._route(topk_idx)
        rows = self._all_to_all(_Spread.apply(x, route.sent, self._kernels), route.send_counts, route.recv_counts)
        travelling = weights.flatten()[route.pair]
        row_weights = self._all_to_all(travelling, route.send_counts, route.recv_counts).flatten()[route.arrived_pair]
        y = experts(_Spread.apply(rows, route.arrived, self._kernels), row_weights, route.groups)
        back = _AddUp.apply(y, route.arrived, self._kernels)
        back = self._all_to_all(back, route.recv_counts, route.send_counts)
        out: torch.Tensor = _AddUp.apply(back, route.sent, self._kernels)
        return out

    def experts(self, rows: torch.Tensor, row_weights: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Run the experts on their rows."""
        gate_up = _Grouped.apply(rows, self._layer.w1, groups)
        h = _SwiGLU.apply(gate_up, row_weights, self._kernels)
        y: torch.Tensor = _Grouped.apply(h, self._layer.w2, groups)
        return y

    def _all_to_all(self, x: torch.Tensor, send: list[int], recv: list[int]) -> torch.Tensor:
        out: torch.Tensor = _AllToAll.apply(x, send, recv, self._group)
        return out

    @torch.no_grad()
    def _route(self, topk_idx: torch.Tensor) -> Route:
        """Find everything that does not depend on values. Collective; waits on the host once."""
        num_ranks, num_local, device = self._num_ranks, self._num_local, topk_idx.device
        num_tokens, topk = topk_idx.shape
        ranks, local = topk_idx // num_local, topk_idx % num_local
        pairs = torch.arange(num_tokens * topk, device=device).view(num_tokens, topk)
        if self._once:
            to = torch.arange(num_ranks, device=device)
            ids = torch.where(ranks[:, None, :] == to[:, None], local[:, None, :], -1)
            goes, to = (ids >= 0).any(-1), to.expand(num_tokens, -1)
            pairs = pairs[:, None, :].expand(-1, num_ranks, -1)
        else:
            to, ids, goes, pairs = ranks, local[:, :, None], torch.ones_like(ranks, dtype=torch.bool), pairs[:, :, None]
        slots, width = goes.shape[1], ids.shape[2]
        key = torch.where(goes, to, num_ranks).flatten()
        per_expert = torch.zeros(num_ranks * num_local, dtype=torch.int64, device=device)
        per_expert.scatter_add_(0, topk_idx.flatten(), torch.ones_like(topk_idx.flatten()))
        per_rank = (key[:, None] == torch.arange(num_ranks, device=device)).sum(0)
        mine = torch.cat((per_rank[:, None], per_expert.view(num_ranks, num_local)), dim=1)
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self._group)
        sent_table, recv_table = torch.stack((mine, theirs)).tolist()
        send_counts, recv_counts = ([row[0] for row in table] for table in (sent_table, recv_table))
        counts = [sum(row[1 + expert] for row in recv_table) for expert in range(num_local)]

        order = key.argsort(stable=True)[: sum(send_counts)]
        position = torch.zeros_like(key).scatter_(0, order, torch.arange(len(order), device=device))
        sent = Copies(
            order // slots, torch.ones(len(order), device=device), position.view(num_tokens, slots), goes.float()
        )
        pair = pairs.reshape(-1, width)[order]
        came = torch.empty(sum(recv_counts), width, dtype=torch.int64, device=device)
        dist.all_to_all_single(came, ids.reshape(-1, width)[order], recv_counts, send_counts, group=self._group)

        starts, firsts = [0], [0]
        for count in counts:
            starts.append(starts[-1] + -(-count // ALIGNMENT) * ALIGNMENT)
            firsts.append(firsts[-1] + count)
        key = torch.where(came >= 0, came, num_local).flatten()
        order = key.argsort(stable=True)[: firsts[-1]]
        shift = torch.tensor([start - first for start, first in zip(starts, firsts, strict=True)], device=device)
        row = torch.arange(len(order), device=device) + shift[key[order]]
        arrived_pair = torch.zeros(starts[-1], dtype=torch.int64, device=device).scatter_(0, row, order)
        arrived = Copies(
            arrived_pair // width,
            torch.zeros(starts[-1], device=device).index_fill_(0, row, 1.0),
            torch.zeros_like(key).scatter_(0, order, row).view(came.shape),
            (came >= 0).float(),
        )
        groups = Groups(torch.tensor(starts, dtype=torch.int32, device=device), tuple(starts))
        return Route(sent, send_counts, recv_counts, pair, arrived, arrived_pair, groups)


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """What is compiled where that is wanted."""

    spread: Callable[..., torch.Tensor]
    add_up: Callable[..., torch.Tensor]
    swiglu: Callable[..., torch.Tensor]
    swiglu_gradients: Callable[..., tuple[torch.Tensor, torch.Tensor]]


@functools.cache
def _kernels(compiled: bool) -> _Kernels:
    functions: list[Callable[..., Any]] = [_spread, _add_up, _swiglu, _swiglu_gradients]
    return _Kernels(*((torch.compile(each) if compiled else each) for each in functions))


def _spread(x: torch.Tensor, source: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    return (x[source] * filled[:, None]).to(x.dtype)


def _add_up(y: torch.Tensor, copies: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    return (y[copies].float() * there[:, :, None]).sum(1).to(y.dtype)


def _swiglu(gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=1)
    return (F.silu(gate) * up * weights[:, None]).to(gate_up.dtype)


def _swiglu_gradients(
    d_h: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = gate_up.float().chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    silu, grad = gate * sigmoid, d_h.float()
    d_weights = (grad * silu * up).sum(1)
    grad = grad * weights[:, None]
    d_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat((d_gate, grad * silu), dim=1).to(gate_up.dtype), d_weights


class _Spread(torch.autograd.Function):
    """Copy rows; the gradient of a row is the sum of its copies'."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, copies: Copies, kernels: _Kernels) -> torch.Tensor:
        ctx.copies, ctx.kernels = copies, kernels
        return kernels.spread(x, copies.source, copies.filled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.kernels.add_up(grad, ctx.copies.copies, ctx.copies.there), None, None


class _AddUp(torch.autograd.Function):
    """Add up the copies of each row; the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, copies: Copies, kernels: _Kernels) -> torch.Tensor:
        ctx.copies, ctx.kernels = copies, kernels
        return kernels.add_up(y, copies.copies, copies.there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.kernels.spread(grad, ctx.copies.source, ctx.copies.filled), None, None


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks as bytes, which gloo takes too; gradients travel back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.send, ctx.recv, ctx.group = send, recv, group
        return _all_to_all(x, send, recv, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(grad, ctx.recv, ctx.send, ctx.group), None, None, None


def _all_to_all(x: torch.Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    out = torch.empty(sum(recv), x.shape[1], dtype=x.dtype, device=x.device)
    dist.all_to_all_single(out.view(torch.uint8), x.contiguous().view(torch.uint8), recv, send, group=group)
    return out


class _Grouped(torch.autograd.Function):
    """The grouped product and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.groups = groups
        return grouped_mm(x, w, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, w = ctx.saved_tensors
        d_w = grouped_wgrad(grad, x, ctx.groups, tuple(w.shape)).to(w.dtype)
        return grouped_mm(grad, w.transpose(1, 2), ctx.groups), d_w, None


class _SwiGLU(torch.autograd.Function):
    """SwiGLU times the rows' weights."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, weights: torch.Tensor, kernels: _Kernels) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weights)
        ctx.kernels = kernels
        return kernels.swiglu(gate_up, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *ctx.kernels.swiglu_gradients(grad, *ctx.saved_tensors), None
