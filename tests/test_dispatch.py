"""Dispatch, bit by bit against the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from bit_patterns import equal_bits
from cases import BF16, FP8, MXFP4, ROTATED, ROTATED_STOCHASTIC, STOCHASTIC, WIRES, Case, grid
from ranks import NODES, Target, targets

from qcomm import Buffer, QcommOverflowError, Received
from qcomm.formats import FLOAT_SCALE_LAYOUTS, RECV_DTYPES, RECV_LAYOUTS, ScaleLayout, WireFormat
from qcomm.reference_exchange import Tokens

KIND_WIRES = (BF16, FP8, MXFP4)
SF_LAYOUTS = FLOAT_SCALE_LAYOUTS


def _bits(recv: Received) -> list[torch.Tensor | None]:
    """What a dispatch gives a caller, without the rows that a receive leaves unspecified."""
    return [
        recv.x,
        recv.sf,
        recv.x_columnwise,
        recv.sf_columnwise,
        recv.weights,
        recv.src,
        recv.spread_overflows,
    ]


def _same(a: Received, b: Received) -> bool:
    pairs = zip(_bits(a), _bits(b), strict=True)
    return all((p is None and q is None) or (p is not None and q is not None and _equal(p, q)) for p, q in pairs)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.stride() == b.stride() and equal_bits(a, b)


@targets(2, 3, 4, nodes=NODES)
def test_layouts_dtypes_wires(target: Target) -> None:
    todo = grid(Case(), recv_layout=RECV_LAYOUTS, recv_dtype=RECV_DTYPES, wire=WIRES, static=(False, True))
    cases.no_problems(target.run(cases.run_cases, list(todo)))


@targets(3, nodes=NODES)
def test_inputs(target: Target) -> None:
    mxfp4_wires = (MXFP4, ROTATED, STOCHASTIC, ROTATED_STOCHASTIC)
    todo = [
        *grid(Case(x="bits"), wire=WIRES, recv_dtype=RECV_DTYPES),
        *grid(
            Case(),
            x=("fp8", "fp8_float", "fp8_columns"),
            wire=(FP8, *mxfp4_wires),
            recv_dtype=RECV_DTYPES,
            hidden=(128, 384),
        ),
        *grid(Case(x="mxfp4"), wire=mxfp4_wires, recv_dtype=RECV_DTYPES, recv_layout=RECV_LAYOUTS),
    ]
    cases.no_problems(target.run(cases.run_cases, todo))


@targets(3, nodes=NODES)
def test_sizes(target: Target) -> None:
    todo = [
        *grid(Case(), hidden=(128, 384, 1024), wire=KIND_WIRES, alignment=(1, 32, 128), recv_layout=RECV_LAYOUTS),
        # Teams of several warps, one part a thread and several, and each with many records; and blocks that take tokens
        # before each other.
        *grid(Case(), hidden=(7168, 8192), wire=KIND_WIRES, recv_dtype=RECV_DTYPES, num_sms=(None, 1)),
        *grid(Case(), hidden=(7168, 8192), wire=KIND_WIRES, num_sms=(3,)),
        *grid(Case(), num_topk=(1, 8), num_local_experts=(8,), wire=KIND_WIRES, recv_layout=RECV_LAYOUTS),
        *grid(Case(num_topk=1, num_local_experts=1), wire=KIND_WIRES, recv_layout=RECV_LAYOUTS),
    ]
    cases.no_problems(target.run(cases.run_cases, todo))


@targets(3, nodes=NODES)
def test_columnwise(target: Target) -> None:
    todo = [
        *grid(
            Case(columnwise=True, hidden=256, alignment=128),
            wire=WIRES,
            x=("bf16", "bits"),
            sf_layout=SF_LAYOUTS,
            static=(False, True),
        ),
        *grid(Case(columnwise=True, alignment=128, x="fp8_float"), wire=(FP8, MXFP4, ROTATED), hidden=(128, 384)),
        *grid(Case(columnwise=True, alignment=128, x="mxfp4"), wire=(MXFP4, ROTATED), hidden=(128, 384)),
        # Pieces of 512 columns, whole and not, and several a block.
        *grid(Case(columnwise=True, alignment=128), wire=(MXFP4, FP8), hidden=(640, 1536), num_sms=(None, 1)),
        *grid(
            Case(columnwise=True, alignment=256),
            wire=KIND_WIRES,
            counts=("empty", "zero"),
            static=(False, True),
        ),
    ]
    cases.no_problems(target.run(cases.run_cases, todo))


@targets(3, nodes=NODES)
def test_scale_storage(target: Target) -> None:
    layouts = dataclasses.replace(Case(), sf_layout=ScaleLayout.COLUMN_MAJOR, hidden=384)
    todo = grid(layouts, recv_layout=RECV_LAYOUTS, wire=KIND_WIRES, alignment=(1, 3, 128), static=(False, True))
    cases.no_problems(target.run(cases.run_cases, list(todo)))


@targets(2, 3, nodes=NODES)
def test_growing_and_shrinking(target: Target) -> None:
    counts = ("one", "uneven", "empty", "uneven", "zero", "one", "uneven")
    cases.no_problems(target.run(cases.run_cases, list(grid(Case(), recv_layout=RECV_LAYOUTS, counts=counts))))


@targets(2, 3, 4, nodes=NODES)
def test_routes(target: Target) -> None:
    todo = [
        *grid(
            Case(),
            routes=("random", "some", "none", "one", "half"),
            counts=("uneven", "empty", "zero", "one"),
            recv_layout=RECV_LAYOUTS,
            static=(False, True),
        ),
        *grid(
            Case(alignment=1),
            idx_dtype=(torch.int32, torch.int64),
            has_weights=(False, True),
            recv_layout=RECV_LAYOUTS,
        ),
    ]
    cases.no_problems(target.run(cases.run_cases, todo))


@targets(3, nodes=NODES)
def test_given_capacity(target: Target) -> None:
    most = cases.MAX_TOKENS * target.pool.num_ranks * 3
    todo = [
        *grid(
            Case(static=True, capacity=128),
            wire=KIND_WIRES,
            recv_layout=("batched", "token_major"),
            recv_dtype=RECV_DTYPES,
        ),
        *grid(Case(static=True, capacity=most + 3 * 32), wire=KIND_WIRES, recv_layout=RECV_LAYOUTS),
    ]
    cases.no_problems(target.run(cases.run_cases, todo))


@targets(3, nodes=NODES)
def test_backward_leg(target: Target) -> None:
    todo = grid(Case(backward=True), wire=KIND_WIRES, recv_layout=RECV_LAYOUTS)
    cases.no_problems(target.run(cases.run_cases, list(todo)))


def _seeds(rank: int, num_ranks: int, device: str, backend: str, wire: WireFormat) -> tuple[bool, bool]:
    case = Case(wire=wire, recv_dtype="mxfp4", routes="random", counts="uneven")
    inputs = cases.make_inputs(case, num_ranks)
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        first, again, other = (cases.dispatch(buffer, case, inputs, seed=seed)[0] for seed in (5, 5, 1 << 40))
    return _same(first, again), _same(first, other)


@targets(3, nodes=NODES)
@pytest.mark.parametrize("wire", [STOCHASTIC, ROTATED_STOCHASTIC], ids=["plain", "rotated"])
def test_seed_decides_the_bits(target: Target, wire: WireFormat) -> None:
    assert target.run(_seeds, wire) == [(True, False)] * target.pool.num_ranks


def _replay(rank: int, num_ranks: int, device: str, backend: str, todo: Sequence[Case]) -> list[str]:
    problems = []
    for case in todo:
        # An unrelated wire on the backward leg, along the route of the first dispatch.
        precision = dataclasses.replace(case.shape[3], dispatch_bwd="fp8")
        with cases.make_buffer(case, num_ranks, device, backend, precision=precision) as buffer:
            problems += [f"rank {rank}: {case}: {problem}" for problem in _replay_case(buffer, case)]
    return problems


def _replay_case(buffer: Buffer, case: Case) -> list[str]:
    inputs = cases.make_inputs(case, buffer.num_ranks)
    other = cases.make_inputs(dataclasses.replace(case, seed=case.seed + 1), buffer.num_ranks)
    first, handle = cases.dispatch(buffer, case, inputs)
    problems: list[str] = []

    def replay(xs: list[Tokens], **changes: Any) -> None:
        wanted = dataclasses.replace(case, **changes)
        recv, same = buffer.dispatch(
            cases.to(xs[buffer.rank], buffer.device),
            handle=handle,
            recv_dtype=wanted.recv_dtype,
            columnwise=wanted.columnwise,
            sf_layout=wanted.sf_layout,
            seed=wanted.seed,
            backward=wanted.backward,
        )
        cases.sync(buffer)
        assert same is handle
        want = cases.expect(wanted, dataclasses.replace(inputs, xs=xs), buffer.rank)
        problems.extend(f"replay {changes}: {problem}" for problem in cases.compare(wanted, recv, handle, want))

    replay(inputs.xs)
    replay(other.xs)
    replay(other.xs, columnwise=False)
    for dtype in RECV_DTYPES:
        replay(other.xs, recv_dtype=dtype, columnwise=False)
    if case.x == "bf16":
        replay(other.xs, wire=FP8, backward=True)
    want = cases.expect(case, inputs, buffer.rank)
    return problems + [f"first, after replays: {p}" for p in cases.compare(case, first, handle, want)]


@targets(2, 3, nodes=NODES)
def test_replay(target: Target) -> None:
    todo = [
        *grid(Case(), wire=(*KIND_WIRES, ROTATED_STOCHASTIC), recv_layout=RECV_LAYOUTS, static=(False, True)),
        *grid(Case(counts="empty", routes="half"), recv_layout=RECV_LAYOUTS, static=(False, True)),
        Case(columnwise=True, alignment=128),
        Case(x="fp8_float", wire=FP8, sf_layout=ScaleLayout.COLUMN_MAJOR),
        Case(x="mxfp4", has_weights=False),
    ]
    cases.no_problems(target.run(_replay, todo))


def _overflow(rank: int, num_ranks: int, device: str, backend: str, case: Case) -> list[str]:
    inputs = cases.make_inputs(case, num_ranks)
    rows = cases.expect_rows(case, inputs)[rank]
    problems = []
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        assert case.capacity is not None
        for _ in range(2):
            try:
                cases.dispatch(buffer, case, inputs)
                if rows.needed > case.capacity:
                    problems.append(f"rank {rank}: no overflow, needed {rows.needed}")
            except QcommOverflowError as error:
                if (error.expected, error.seen, error.rank) != (rows.needed, case.capacity, rank):
                    problems.append(f"rank {rank}: {error.expected}, {error.seen}, needed {rows.needed}")
                if str(rows.needed) not in str(error) or str(case.capacity) not in str(error):
                    problems.append(f"rank {rank}: {error}")
            enough = dataclasses.replace(case, capacity=None)
            problems += cases.run_case(buffer, enough)
            problems += cases.run_case(buffer, dataclasses.replace(enough, static=False))
    return problems


@targets(2, 3, nodes=NODES)
@pytest.mark.parametrize("recv_layout", RECV_LAYOUTS)
def test_overflow(target: Target, recv_layout: Any) -> None:
    # Every token goes to the last rank, which alone overflows.
    case = Case(recv_layout=recv_layout, static=True, capacity=32, routes="one", combine_wire=BF16, weighted=False)
    inputs = cases.make_inputs(case, target.pool.num_ranks)
    needed = [rows.needed for rows in cases.expect_rows(case, inputs)]
    if target.pool.num_ranks > 1:
        assert needed[0] <= 32 < needed[-1]
    cases.no_problems(target.run(_overflow, case))


def _spoil(rank: int, num_ranks: int, device: str, backend: str, todo: Sequence[Case]) -> list[str]:
    problems = []
    for case in todo:
        clean = cases.make_inputs(case, num_ranks)
        dirty = cases.make_inputs(case, num_ranks)
        for x in dirty.xs:
            assert isinstance(x, torch.Tensor)
            x[2, 5] = torch.nan
            x[4, 70] = torch.inf
            x[5, :] = -torch.inf
        spoiled = torch.tensor([2, 4, 5])
        with cases.make_buffer(case, num_ranks, device, backend) as buffer:
            left, handle = cases.dispatch(buffer, case, clean)
            right, _ = cases.dispatch(buffer, case, dirty)
            token = left.src[:, 1].cpu()
            whole = ~torch.isin(token, spoiled)
            for name, a, b in (("x", left.x, right.x), ("sf", left.sf, right.sf)):
                if a is not None and b is not None:
                    lead = 2 if case.recv_layout == "batched" else 1
                    a, b = a.cpu().flatten(0, lead - 1), b.cpu().flatten(0, lead - 1)
                    if not equal_bits(a[whole], b[whole]):
                        problems.append(f"rank {rank}: {case}: {name} of a clean token changed")
                    if a[~whole].numel() and equal_bits(a[~whole], b[~whole]):
                        problems.append(f"rank {rank}: {case}: {name} of the spoiled tokens did not change")
            y = torch.ones(*left.x.shape[:-1], case.hidden, dtype=torch.bfloat16)
            flat = y.view(-1, case.hidden)
            flat[~whole] = torch.nan
            out = buffer.combine(y.to(buffer.device), handle, weighted=False).cpu()
            cases.sync(buffer)
            nan = torch.isnan(out).any(1)
            if nan[[t for t in range(len(out)) if t not in spoiled]].any():
                problems.append(f"rank {rank}: {case}: NaN spread in combine")
    return problems


@targets(3, nodes=NODES)
def test_nan_and_inf_stay_in_their_token(target: Target) -> None:
    todo = grid(
        Case(routes="random", combine_wire=MXFP4),
        wire=(*KIND_WIRES, ROTATED),
        recv_layout=RECV_LAYOUTS,
        recv_dtype=RECV_DTYPES,
    )
    cases.no_problems(target.run(_spoil, list(todo)))
