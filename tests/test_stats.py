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
from qcomm.handle import Forward
from qcomm.ops import comm
from qcomm.records import RecordLayout
from qcomm.stats import CallLog, Traffic
from qcomm.topology import Topology

BASE = Case(wire=MXFP4, combine_wire=BF16)


def _traffic(pairs: list[list[int]], case: Case, rank: int, topology: Topology) -> tuple[Traffic, Traffic]:
    """Count what goes straight to every rank: `pairs[r][to]` tokens."""
    assert case.combine_wire is not None
    found = []
    for to, wire in ((pairs[rank], case.wire), ([row[rank] for row in pairs], case.combine_wire)):
        record = RecordLayout(wire.kind, case.hidden).num_bytes
        near = [n for r, n in enumerate(to) if r != rank and topology.same_node(r, rank)]
        far = [n for r, n in enumerate(to) if not topology.same_node(r, rank)]
        logical = 2 * case.hidden
        found.append(Traffic(sum(far) * record, sum(far) * logical, sum(near) * record, sum(near) * logical))
    return found[0], found[1]


def _relayed_traffic(
    case: Case, inputs: Inputs, rank: int, topology: Topology, *, rounds_inside: bool
) -> tuple[Traffic, Traffic]:
    """Count what goes once to each node and on from there, in plain loops over all tokens."""
    assert case.combine_wire is not None
    node, local = topology.node(rank), topology.local_index(rank)
    out = back = passed = returned = 0
    for source, idx in enumerate(inputs.topk_idxs):
        for row in idx.tolist():
            reached = {e // case.num_local_experts for e in row if e >= 0}
            nodes = {topology.node(r) for r in reached}
            # To each node reached but the own.
            out += len(nodes - {node}) * (source == rank)
            if topology.local_index(source) == local:
                # This rank relays for the source; sums of other nodes' tokens go back to them.
                passed += len({r for r in reached if topology.same_node(r, rank)} - {rank})
                back += (node in nodes) * (topology.node(source) != node)
            else:
                returned += rank in reached
    wire, combine = (RecordLayout(each.kind, case.hidden).num_bytes for each in (case.wire, case.combine_wire))
    logical, inside = 2 * case.hidden, combine if rounds_inside else 4 * case.hidden
    return (
        Traffic(out * wire, out * logical, passed * wire, passed * logical),
        Traffic(back * combine, back * logical, returned * inside, returned * logical),
    )


def _expected(case: Case, inputs: Inputs, buffer: Buffer, counts: tuple[int, int, int]) -> BufferStats:
    num_ranks, each, rank, topology = len(inputs.xs), case.num_local_experts, buffer.rank, buffer.topology
    pairs = [
        [sum(any(e >= 0 and e // each == to for e in row) for row in idx.tolist()) for to in range(num_ranks)]
        for idx in inputs.topk_idxs
    ]
    named = [e for idx in inputs.topk_idxs for e in idx.flatten().tolist()]
    sent, received = tuple(pairs[rank]), tuple(row[rank] for row in pairs)
    sums = cases.node_sums(buffer)
    if sums["ranks_per_node"] > 1:
        rounds = sums["rounds_inside"]
        dispatched, combined = _relayed_traffic(case, inputs, rank, topology, rounds_inside=rounds)
    else:
        dispatched, combined = _traffic(pairs, case, rank, topology)
    return BufferStats(
        *counts,
        tokens_per_expert=tuple(named.count(rank * each + e) for e in range(each)),
        tokens_sent=sent,
        tokens_received=received,
        dispatch_bytes=dispatched.num_bytes,
        combine_bytes=combined.num_bytes,
        dispatch_traffic=dispatched,
        combine_traffic=combined,
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
    empty, none = (0,) * num_ranks, Traffic()
    problems = []
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        nothing = BufferStats(0, 0, 0, (0,) * case.num_local_experts, empty, empty, 0, 0, none, none, 0, (0, 0), empty)
        if _found(buffer) != nothing:
            problems.append(f"rank {rank}: {_found(buffer)} before any call")
        recv, handle = cases.dispatch(buffer, case, inputs)
        y = torch.zeros(*recv.x.shape[:-1], case.hidden, dtype=torch.bfloat16, device=buffer.device)
        buffer.combine(y, handle, weighted=case.weighted)
        first = dataclasses.replace(_expected(case, inputs, buffer, (1, 0, 1)), spread_overflows=_pair(recv))
        if _found(buffer) != first:
            problems.append(f"rank {rank}: {_found(buffer)} must be {first}")
        later, _ = cases.dispatch(buffer, case, other)
        changed = dataclasses.replace(
            _expected(case, other, buffer, (2, 0, 1)),
            combine_bytes=first.combine_bytes,
            combine_traffic=first.combine_traffic,
            spread_overflows=_pair(later),
        )
        if _found(buffer) != changed:
            problems.append(f"rank {rank}: {_found(buffer)} must be {changed} after another route")
        x = inputs.xs[rank]
        assert isinstance(x, torch.Tensor)
        buffer.dispatch(x.to(buffer.device), handle=handle)
        again = dataclasses.replace(first, num_dispatches=2, num_replays=1)
        if _found(buffer) != again:
            problems.append(f"rank {rank}: {_found(buffer)} must be {again} after a replay")
    return problems


@targets(2, 3, nodes=((2, 1), (2, 2)))
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("layout", RECV_LAYOUTS)
def test_counts(target: Target, layout: RecvLayout, static: bool) -> None:
    case = dataclasses.replace(BASE, recv_layout=layout, static=static, weighted=layout != "token_major")
    cases.no_problems(target.run(_problems, case))


@targets(2)
def test_bytes_are_those_of_the_wires(target: Target) -> None:
    cases.no_problems(target.run(_problems, dataclasses.replace(BASE, wire=FP8, combine_wire=FP8, hidden=384)))


def _to_every_node(rank: int, num_ranks: int) -> tuple[int, int, int, int]:
    """Send every token to all experts, relayed and straight; return what left the node in dispatch and combine."""
    case = dataclasses.replace(BASE, num_topk=6, num_local_experts=3, counts="one", hidden=384)
    idx = torch.tensor([[0, 3, 4, 6, 9, 11]])
    x = cases.make_inputs(case, num_ranks).xs[rank]
    assert isinstance(x, torch.Tensor)
    found = []
    for ranks_per_node in (2, 1):
        changes = {"ranks_per_node": ranks_per_node}
        with cases.make_buffer(case, num_ranks, "cpu", "collective", **changes) as buffer:
            recv, handle = buffer.dispatch(x, idx)
            buffer.combine(torch.zeros(*recv.x.shape, dtype=torch.bfloat16), handle)
            stats = buffer.stats()
            found += [stats.dispatch_traffic.between_nodes, stats.combine_traffic.between_nodes]
    return found[0], found[1], found[2], found[3]


def test_a_node_gets_one_copy(pool4: RankPool) -> None:
    # Each token reaches all four ranks: one other node, and three other ranks if each counts as a node.
    mxfp4, bf16 = (RecordLayout(kind, 384).num_bytes for kind in ("mxfp4", "bf16"))
    assert pool4.run(_to_every_node) == [(mxfp4, bf16, 3 * mxfp4, 3 * bf16)] * 4


def _forwarded(rank: int, num_ranks: int) -> list[str]:
    """Have the figures of a relayed exchange computed as if kernels had relayed it."""
    inputs = cases.make_inputs(BASE, num_ranks)
    with cases.make_buffer(BASE, num_ranks, "cpu", "collective", ranks_per_node=2) as buffer:
        recv, handle = cases.dispatch(buffer, BASE, inputs)
        topology, relay = buffer.topology, handle.relay
        assert relay is not None
        own = topology.node(rank)
        counts, node_slot = relay.src_offsets.diff().int(), relay.node_slot.clone()
        slots = torch.full((topology.num_nodes, cases.MAX_TOKENS, 3), 7, dtype=torch.int32)
        for node, begin in enumerate(relay.src_offsets[:-1].tolist()):
            slots[node, : counts[node], 1:] = relay.rank_slot[begin : begin + int(counts[node])]
        counts[own], node_slot[:, own] = 0, -1
        forwarded = dataclasses.replace(handle, relay=None, forward=Forward(node_slot, counts, slots))
        log = CallLog(dispatched=(forwarded, recv.spread_overflows, MXFP4), combined=(forwarded, BF16))
        found = log.stats(rank, topology, BASE.num_local_experts, BASE.hidden, [0] * num_ranks)
        want = _relayed_traffic(BASE, inputs, rank, topology, rounds_inside=True)
    got = found.dispatch_traffic, found.combine_traffic
    return [] if got == want else [f"rank {rank}: {got} must be {want}"]


def test_what_kernels_forward(pool4: RankPool) -> None:
    cases.no_problems(pool4.run(_forwarded))


def _overflowing(rank: int, num_ranks: int, device: str, backend: str) -> tuple[int, int, int, bool]:
    case = dataclasses.replace(BASE, routes="one", static=True, alignment=8, capacity=8, counts="uneven")
    inputs = cases.make_inputs(case, num_ranks)
    idx, x = inputs.topk_idxs[rank], inputs.xs[rank]
    assert isinstance(x, torch.Tensor)
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        x, idx = x.to(buffer.device), idx.to(buffer.device)
        buffer.dispatch(x, idx, static=True, num_max_recv_tokens=case.capacity, alignment=case.alignment)
        found, overflowed = buffer.stats(), False
        try:
            buffer.check()
        except QcommOverflowError:
            overflowed = True
    return found.dropped_rows, sum(found.tokens_received), found.tokens_per_expert[-1], overflowed


@targets(2)
def test_dropped_rows(target: Target) -> None:
    *others, (dropped, received, kept, overflowed) = target.run(_overflowing)
    assert received > kept == 8
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
