"""What the benchmarked calls must give, bit for bit.

The oracle is never the backend that is measured: `collective` answers for nvlink and nvshmem, on the same GPUs, and the
plain loops of `qcomm.reference_exchange` for `collective`, and for combine by way of nvshmem's relays. The loops run on
the CPU and take minutes at large sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import harness
import torch
from workload import Workload

from qcomm import reference_exchange
from qcomm.buffer import Buffer
from qcomm.exchange import WireInput
from qcomm.formats import RecvDtype, RecvLayout, WireFormat, WireKind, WirePrecision
from qcomm.handle import DispatchHandle, Received
from qcomm.moe.quantize import quantize_rows

Fields = Mapping[str, torch.Tensor | None]
_ALIGNMENT = 128


def fields(received: Received, handle: DispatchHandle) -> Fields:
    """Return what a rank received, valid rows only."""
    counts = received.num_tokens_per_expert
    if handle.recv_layout == "token_major":
        end = int(handle.recv_offsets[-1])
    elif handle.recv_layout == "expert_major":
        assert received.group_offsets is not None
        end = int(received.group_offsets[-1])
    else:
        end = handle.num_rows
    rows = _valid_rows(handle.recv_layout, end, counts.to(torch.int64))

    def valid(t: torch.Tensor | None, dims: int = 2) -> torch.Tensor | None:
        return None if t is None else t.flatten(0, t.dim() - dims)[rows.to(t.device)]

    return {
        "x": _raw(valid(received.x)),
        "sf": _raw(valid(received.sf)),
        "x_columnwise": _raw(received.x_columnwise),
        "sf_columnwise": _raw(received.sf_columnwise),
        "weights": _raw(valid(received.weights, dims=1)),
        "src": valid(received.src),
        "topk_idx": valid(received.topk_idx),
        "topk_weights": _raw(valid(received.topk_weights)),
        "num_tokens_per_expert": counts,
    }


def expected_dispatch(
    backend: str, work: Workload, wire: WireKind, layout: RecvLayout, recv_dtype: RecvDtype, columnwise: bool
) -> Fields:
    """Compute what this rank must receive from a backend. Collective."""
    if backend == "collective":
        return _reference_dispatch(work, wire, layout, recv_dtype, columnwise)
    with work.buffer(WirePrecision(dispatch_fwd=wire), "collective") as buffer:
        received, handle = buffer.dispatch(
            work.given,
            work.topk_idx,
            work.topk_weights,
            recv_layout=layout,
            recv_dtype=recv_dtype,
            columnwise=columnwise,
        )
        return fields(received, handle)


def expected_combine(
    measured: Buffer, work: Workload, y: torch.Tensor, handle: DispatchHandle, wire: WireKind, weighted: bool
) -> torch.Tensor:
    """Compute what a buffer's combine of `y` along a handle's route must give on this rank. Collective."""
    layout, in_loops = handle.recv_layout, measured.backend == "collective"
    if in_loops or handle.relayed:
        # On nvshmem sums are rounded on both hops, which nothing but the loops does.
        each = measured.topology.ranks_per_node if handle.relayed else 1
        return _reference_combine(work, y, wire, layout, weighted, each, rounds_inside=not in_loops)
    with straight(work).buffer(WirePrecision(combine_fwd=wire), "collective") as buffer:
        _, again = buffer.dispatch(work.x, work.topk_idx, work.topk_weights, recv_layout=layout)
        return buffer.combine(y, again, weighted=weighted)


def straight(work: Workload) -> Workload:
    """Return the same work without relays, which the collective backend has between nodes of several ranks."""
    return dataclasses.replace(work, ranks_per_node=1)


def differing(what: str, got: Fields, want: Fields) -> list[str]:
    """Name the fields of `got` that are not the wanted bits; a field that `got` lacks is not compared."""
    problems = []
    for name, value in got.items():
        expected = want[name]
        if value is None:
            continue
        if expected is None or value.shape != expected.shape:
            shape = None if expected is None else tuple(expected.shape)
            problems.append(f"{what}: {name} must be of shape {shape}, got {tuple(value.shape)}")
            continue
        wrong = int((value != expected.to(value.device)).sum())
        if wrong:
            problems.append(f"{what}: {name} has {wrong} wrong entries of {value.numel()}")
    return problems


def bits(x: torch.Tensor) -> torch.Tensor:
    """View a tensor as bytes."""
    # A tensor of no row may have odd strides, through which torch views no other type.
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _raw(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else bits(x)


def _valid_rows(layout: RecvLayout, end: int, counts: torch.Tensor) -> torch.Tensor:
    """List the rows below `end` that hold what dispatch promises; `end` is all rows in the "batched" layout."""
    rows = torch.arange(end, device=counts.device)
    if layout != "batched":
        return rows
    each = end // len(counts)
    return rows[rows % max(each, 1) < counts.repeat_interleave(each)]


def _reference_dispatch(
    work: Workload, wire: WireKind, layout: RecvLayout, recv_dtype: RecvDtype, columnwise: bool
) -> Fields:
    xs, idxs, weights = _everyones_inputs(work)
    (expected,) = reference_exchange.dispatch(
        xs,
        idxs,
        weights,
        num_experts=work.geometry.experts,
        wire=WireFormat(wire),
        recv_layout=layout,
        recv_dtype=recv_dtype,
        alignment=_ALIGNMENT,
        columnwise=columnwise,
        ranks=[work.member.rank],
    )
    counts = torch.tensor(expected.rows.tokens_per_expert, dtype=torch.int32)
    rows = _valid_rows(layout, expected.x.shape[0], counts.to(torch.int64))

    def valid(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t[rows]

    return {
        "x": _raw(valid(expected.x)),
        "sf": _raw(valid(expected.sf)),
        "x_columnwise": _raw(expected.x_columnwise),
        "sf_columnwise": _raw(expected.sf_columnwise),
        "weights": _raw(valid(expected.weights)),
        "src": valid(expected.src),
        "topk_idx": valid(expected.topk_idx),
        "topk_weights": _raw(valid(expected.topk_weights)),
        "num_tokens_per_expert": counts,
    }


def _reference_combine(
    work: Workload,
    y: torch.Tensor,
    wire: WireKind,
    layout: RecvLayout,
    weighted: bool,
    ranks_per_node: int,
    *,
    rounds_inside: bool,
) -> torch.Tensor:
    _, idxs, weights = _everyones_inputs(work)
    ranks = range(work.member.num_ranks)
    arranged = [
        reference_exchange.arrange(
            rank, idxs, weights, num_experts=work.geometry.experts, recv_layout=layout, alignment=_ALIGNMENT
        )
        for rank in ranks
    ]
    ys = harness.gather(work.member, y.flatten(0, -2).cpu())
    counts = [work.geometry.tokens for _ in ranks]
    own = [work.member.rank]
    wire_format = WireFormat(wire)
    (out,) = reference_exchange.combine(
        ys,
        arranged,
        counts,
        wire=wire_format,
        weighted=weighted,
        ranks=own,
        ranks_per_node=ranks_per_node,
        rounds_inside=rounds_inside,
    )
    return out


def _everyones_inputs(work: Workload) -> tuple[list[WireInput], list[torch.Tensor], list[torch.Tensor]]:
    everyone = harness.gather(work.member, (work.x.cpu(), work.topk_idx.cpu(), work.topk_weights.cpu()))
    xs: list[WireInput] = [x if work.input == "bf16" else quantize_rows(x) for x, _, _ in everyone]
    return xs, [idx for _, idx, _ in everyone], [weights for _, _, weights in everyone]
