"""What a buffer says of its calls, against counts made in plain loops."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from cases import BF16, FP8, MXFP4, Case, Inputs
from fake_cuda import FakeCuda, nvlink_buffer
from ranks import Pools, RankPool, Target, targets

from qcomm import Buffer, BufferStats, QcommOverflowError, Received, tuning
from qcomm.formats import RECV_LAYOUTS, RecvLayout
from qcomm.ops import comm
from qcomm.records import RecordLayout

BASE = Case(wire=MXFP4, combine_wire=BF16)


def _expected(case: Case, inputs: Inputs, rank: int, counts: tuple[int, int, int]) -> BufferStats:
    num_ranks, each = len(inputs.xs), case.num_local_experts
    pairs = [
        [sum(any(e >= 0 and e // each == to for e in row) for row in idx.tolist()) for to in range(num_ranks)]
        for idx in inputs.topk_idxs
    ]
    named = [e for idx in inputs.topk_idxs for e in idx.flatten().tolist()]
    sent, received = tuple(pairs[rank]), tuple(row[rank] for row in pairs)
    assert case.combine_wire is not None
    return BufferStats(
        *counts,
        tokens_per_expert=tuple(named.count(rank * each + e) for e in range(each)),
        tokens_sent=sent,
        tokens_received=received,
        dispatch_bytes=(sum(sent) - sent[rank]) * RecordLayout(case.wire.kind, case.hidden).num_bytes,
        combine_bytes=(sum(received) - received[rank]) * RecordLayout(case.combine_wire.kind, case.hidden).num_bytes,
        dropped_rows=0,
        spread_overflows=(0, 0),
        waited_us=(0.0,) * num_ranks,
    )


def _found(buffer: Buffer) -> BufferStats:
    """Read the figures, without the waits where they are measured, which another test looks at."""
    found = buffer.stats()
    assert len(found.waited_us) == buffer.num_ranks
    assert all(us >= 0 for us in found.waited_us)
    if buffer.backend == "collective":
        return found
    return dataclasses.replace(found, waited_us=(0.0,) * buffer.num_ranks)


def _pair(received: Received) -> tuple[int, int]:
    """Return overflows by row, which another test counts, and by column."""
    rows, columns = received.spread_overflows.tolist()
    return rows, columns


def _problems(rank: int, num_ranks: int, device: str, backend: str, case: Case) -> list[str]:
    inputs, other = (cases.make_inputs(dataclasses.replace(case, seed=seed), num_ranks) for seed in (0, 1))
    empty = (0,) * num_ranks
    problems = []
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        nothing = BufferStats(0, 0, 0, (0,) * case.num_local_experts, empty, empty, 0, 0, 0, (0, 0), empty)
        if _found(buffer) != nothing:
            problems.append(f"rank {rank}: {_found(buffer)} before any call")
        recv, handle = cases.dispatch(buffer, case, inputs)
        y = torch.zeros(*recv.x.shape[:-1], case.hidden, dtype=torch.bfloat16, device=buffer.device)
        buffer.combine(y, handle, weighted=case.weighted)
        first = dataclasses.replace(_expected(case, inputs, rank, (1, 0, 1)), spread_overflows=_pair(recv))
        if _found(buffer) != first:
            problems.append(f"rank {rank}: {_found(buffer)} must be {first}")
        later, _ = cases.dispatch(buffer, case, other)
        changed = _expected(case, other, rank, (2, 0, 1))
        changed = dataclasses.replace(changed, combine_bytes=first.combine_bytes, spread_overflows=_pair(later))
        if _found(buffer) != changed:
            problems.append(f"rank {rank}: {_found(buffer)} must be {changed} after another route")
        x = inputs.xs[rank]
        assert isinstance(x, torch.Tensor)
        buffer.dispatch(x.to(buffer.device), handle=handle)
        again = dataclasses.replace(first, num_dispatches=2, num_replays=1)
        if _found(buffer) != again:
            problems.append(f"rank {rank}: {_found(buffer)} must be {again} after a replay")
    return problems


@targets(2, 3)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("layout", RECV_LAYOUTS)
def test_counts(target: Target, layout: RecvLayout, static: bool) -> None:
    case = dataclasses.replace(BASE, recv_layout=layout, static=static, weighted=layout != "token_major")
    cases.no_problems(target.run(_problems, case))


@targets(2)
def test_bytes_are_those_of_the_wires(target: Target) -> None:
    cases.no_problems(target.run(_problems, dataclasses.replace(BASE, wire=FP8, combine_wire=FP8, hidden=384)))


def _overflowing(rank: int, num_ranks: int, device: str, backend: str) -> tuple[int, int, int, bool]:
    case = dataclasses.replace(BASE, routes="one", static=True, capacity=32, counts="uneven")
    inputs = cases.make_inputs(case, num_ranks)
    idx, x = inputs.topk_idxs[rank], inputs.xs[rank]
    assert isinstance(x, torch.Tensor)
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        x, idx = x.to(buffer.device), idx.to(buffer.device)
        buffer.dispatch(x, idx, static=True, num_max_recv_tokens=32, alignment=case.alignment)
        found, overflowed = buffer.stats(), False
        try:
            buffer.check()
        except QcommOverflowError:
            overflowed = True
    return found.dropped_rows, sum(found.tokens_received), found.tokens_per_expert[-1], overflowed


@targets(2)
def test_dropped_rows(target: Target) -> None:
    *others, (dropped, received, kept, overflowed) = target.run(_overflowing)
    assert received > kept == 32
    assert dropped == received - kept
    assert overflowed
    assert others == [(0, 0, 0, False)] * len(others)


def _spread(rank: int, num_ranks: int, device: str, backend: str) -> tuple[int, int]:
    case = dataclasses.replace(BASE, num_topk=1, counts="one", routes="one")
    inputs = cases.make_inputs(case, num_ranks)
    x = torch.ones(1, case.hidden, dtype=torch.bfloat16)
    x[0, :32] *= 2.0**20
    inputs.xs[rank] = x
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        cases.dispatch(buffer, case, inputs)
        return buffer.stats().spread_overflows


@targets(2)
def test_spread_overflows(target: Target) -> None:
    # Three of a token's four blocks lie 20 below the first.
    *others, last = target.run(_spread)
    assert last == (3 * target.pool.num_ranks, 0)
    assert others == [(0, 0)] * len(others)


def _after_reset(rank: int, num_ranks: int) -> BufferStats:
    inputs = cases.make_inputs(BASE, num_ranks)
    with cases.make_buffer(BASE, num_ranks, "cpu", "collective") as buffer:
        cases.dispatch(buffer, BASE, inputs)
        buffer.reset()
        return buffer.stats()


def test_reset_forgets_the_last_calls(pool2: RankPool) -> None:
    for found in pool2.run(_after_reset):
        assert (found.num_dispatches, found.tokens_received, found.dispatch_bytes) == (1, (0, 0), 0)


LATE_S = 0.05
Waits = dict[str, tuple[float, ...]]


def _waits(rank: int, num_ranks: int, late: int, most: int) -> tuple[Waits, bool]:
    """Measure how much longer a rank waited for each, by the call to which one rank comes late."""
    case = dataclasses.replace(BASE, routes="random")
    with tuning.force(decode_tokens=most), cases.make_buffer(case, num_ranks, "cuda", "nvlink") as buffer:
        given = cases.arguments(buffer, case, cases.make_inputs(case, num_ranks))
        recv, handle = buffer.dispatch(**given)
        y = torch.zeros(*recv.x.shape, dtype=torch.bfloat16, device=buffer.device)
        calls: dict[str, Callable[[], object]] = {
            "dispatch": lambda: buffer.dispatch(**given),
            "static": lambda: buffer.dispatch(**given | {"static": True}),
            "replay": lambda: buffer.dispatch(given["x"], handle=handle),
            "combine": lambda: buffer.combine(y, handle),
        }
        waits: Waits = {}
        for measured in (False, True):
            for name, call in calls.items():
                before = buffer.stats().waited_us
                dist.all_reduce(torch.ones(()))
                if measured and rank == late:
                    time.sleep(LATE_S)
                call()
                cases.sync(buffer)
                waits[name] = tuple(b - a for a, b in zip(before, buffer.stats().waited_us, strict=True))
        buffer.reset()
        return waits, not any(buffer.stats().waited_us)


@pytest.mark.gpu
@pytest.mark.parametrize("most", [0, 256], ids=["many", "few"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_waits_are_for_who_is_late(pools: Pools, num_ranks: int, most: int) -> None:
    late = 1
    for rank, (waits, forgotten) in enumerate(pools.get(num_ranks, "cuda").run(_waits, late, most)):
        for call, waited_us in waits.items():
            for peer, us in enumerate(waited_us):
                where = f"rank {rank} waited {waited_us} us in {call}"
                if peer == late != rank:
                    assert us > 0.8e6 * LATE_S, where
                else:
                    assert us < 0.4e6 * LATE_S, where
        assert forgotten, f"rank {rank} remembers waits from before the reset"


def test_waits_are_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {"num_experts": 4, "num_topk": 2, "hidden": 256, "num_max_tokens_per_rank": 64}
    with nvlink_buffer(monkeypatch, FakeCuda(), **shape) as (buffer, transport):
        assert buffer.stats().waited_us == (0.0,)
        state = comm.State.from_address(transport._state.data_ptr())
        state.waited_ns[0], state.waited_ns[1] = 2500, 7
        assert buffer.stats().waited_us == (2.5,)
        buffer.reset()
        assert buffer.stats().waited_us == (0.0,)
