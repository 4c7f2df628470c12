"""What goes wrong at run time: peers that do not come, send nothing or die, and providers of symmetric memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import cases
import pytest
import torch
import torch.distributed as dist
from bit_patterns import equal_bits
from cases import BF16, Case, Inputs
from ranks import Pools, RankError, RankPool, Target, need_gpus

from qcomm import (
    Buffer,
    QcommError,
    QcommPeerError,
    QcommTimeoutError,
    QcommUnsupportedError,
    tuning,
)
from qcomm.config import Member
from qcomm.exchange import WireInput
from qcomm.ops.comm import launch_barrier
from qcomm.topology import Topology
from qcomm.transport import select, symmetric

CASE = Case(combine_wire=BF16, routes="random")
DEADLINE_S = 2.0
MARGIN_S = 5.0
Call = Literal["dispatch", "static", "replay", "combine"]


def warm_up(num_ranks: int, backend: str = "nvlink") -> None:
    """Compile and load what later calls need, so that none of it counts against a short deadline."""
    with cases.make_buffer(CASE, num_ranks, "cuda", backend) as buffer:
        cases.works(buffer, CASE)
        cases.works(buffer, dataclasses.replace(CASE, static=True))


def gather(num_ranks: int) -> None:
    """Wait for every rank."""
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == num_ranks


class Calls:
    """The calls of one rank, with what they need made beforehand."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.inputs: Inputs = cases.make_inputs(CASE, buffer.num_ranks)
        self.x: WireInput = cases.to(self.inputs.xs[buffer.rank], buffer.device)
        recv, self.handle = cases.dispatch(buffer, CASE, self.inputs)
        self.y = torch.ones(*recv.x.shape, dtype=torch.bfloat16, device=buffer.device)

    def run(self, call: Call) -> None:
        """Make a call and wait until the device has finished it."""
        if call == "combine":
            self.buffer.combine(self.y, self.handle)
        elif call == "replay":
            self.buffer.dispatch(self.x, handle=self.handle)
        else:
            cases.dispatch(self.buffer, CASE, self.inputs, static=call == "static")
        cases.sync(self.buffer)

    def fails(self, kind: type[QcommError] | tuple[type[QcommError], ...], call: Call, deadline_s: float) -> QcommError:
        """Require a failure in time."""
        start = time.monotonic()
        with pytest.raises(kind) as caught:
            self.run(call)
        took = time.monotonic() - start
        assert took < deadline_s + MARGIN_S, f"{call} took {took:.1f} s to fail: {caught.value}"
        assert caught.value.rank == self.buffer.rank
        return caught.value


def context_works(device: torch.device) -> bool:
    """Tell whether the device still computes."""
    ones = torch.ones(64, 64, device=device)
    return bool((ones @ ones == 64).all())


@contextlib.contextmanager
def own_pool(device: Literal["cpu", "cuda"], num_ranks: int = 2) -> Iterator[RankPool]:
    """Make a pool that a test may break."""
    if device == "cuda":
        need_gpus(2)  # of two nodes, too
    pool = RankPool(num_ranks, device)
    try:
        yield pool
    finally:
        pool.close()


@contextlib.contextmanager
def tells(path: str) -> Iterator[None]:
    """Write to a file what becomes of the body."""
    try:
        yield
    except BaseException:
        Path(path).write_text(traceback.format_exc())
        raise
    Path(path).write_text("fine")


def survive(pool: RankPool, fn: Callable[..., None], told: Path, *args: object) -> None:
    """Run a body that kills rank 1; rank 0 must come through."""
    with pytest.raises(RankError, match="rank 1 of 2 failed: the process ended"):
        pool.run_for(90.0, fn, str(told), *args)
    assert told.exists(), "rank 0 did not get through in time"
    assert told.read_text() == "fine"


# On GPUs: a peer that does not come.


def _absent(rank: int, num_ranks: int, device: str, backend: str, call: Call, phase: str) -> None:
    warm_up(num_ranks, backend)
    with cases.make_buffer(CASE, num_ranks, device, backend, deadline_s=DEADLINE_S) as buffer:
        cases.works(buffer, CASE)
        calls, last = Calls(buffer), num_ranks - 1
        if rank != last:
            start = time.monotonic()
            error = calls.fails(QcommTimeoutError, call, DEADLINE_S)
            assert time.monotonic() - start > DEADLINE_S - 0.1
            assert isinstance(error.expected, int)
            assert isinstance(error.seen, int)
            assert (error.peer, error.phase) == (last, phase)
            assert error.seen < error.expected
            for words in (f"rank {rank}", f"rank {last}", phase, f"{DEADLINE_S} s", "reset()"):
                assert words in str(error)
            assert context_works(buffer.device)
            # Nothing waits any more, and every call says the same until the reset.
            start = time.monotonic()
            again: tuple[Call, ...] = ("dispatch", "static", "replay", "combine")
            for other in again:
                repeated = calls.fails(QcommTimeoutError, other, DEADLINE_S)
                assert str(repeated) == str(error)
            with pytest.raises(QcommTimeoutError, match=f"rank {last}"):
                buffer.check()
            assert time.monotonic() - start < 1.0
        buffer.reset()
        with pytest.raises(ValueError, match="reset"):
            buffer.combine(calls.y, calls.handle)
        for static in (False, True, False):
            cases.works(buffer, dataclasses.replace(CASE, static=static))


ABSENT: tuple[tuple[Call, str], ...] = (
    ("dispatch", "route"),
    ("static", "route"),
    ("replay", "barrier"),
    ("combine", "barrier"),
)


@pytest.mark.gpu
@pytest.mark.parametrize(("call", "phase"), ABSENT)
def test_a_peer_that_does_not_come(call: Call, phase: str) -> None:
    with own_pool("cuda") as pool:
        pool.run(_absent, "cuda", "nvlink", call, phase)


def _absent_on_nodes(rank: int, num_ranks: int, device: str, backend: str) -> None:
    # With relays, which few tokens do without.
    with tuning.force(decode_tokens=0):
        for call, phase in ABSENT:
            _absent(rank, num_ranks, device, backend, call, phase)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks_per_node", [1, 2], ids=["2x1", "2x2"])
def test_a_peer_that_does_not_come_on_nodes(ranks_per_node: int) -> None:
    with own_pool("cuda", 2 * ranks_per_node) as pool:
        Target(pool, "nvshmem", ranks_per_node).run(_absent_on_nodes)


def _silent(rank: int, num_ranks: int, call: Call, phase: str) -> None:
    warm_up(num_ranks)
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink", deadline_s=DEADLINE_S) as buffer:
        cases.works(buffer, CASE)
        calls = Calls(buffer)
        if rank == 0:
            error = calls.fails(QcommTimeoutError, call, DEADLINE_S)
            assert (error.peer, error.phase) == (1, phase)
            assert context_works(buffer.device)
        else:
            # Comes to the barrier and sends nothing.
            transport: Any = buffer._transport
            with transport._calls.begin() as started:
                launch_barrier(transport._launcher, started.stream, None)
            cases.sync(buffer)
        buffer.reset()
        cases.works(buffer, CASE)


@pytest.mark.gpu
@pytest.mark.parametrize(("call", "phase"), [("replay", "dispatch"), ("combine", "combine")])
def test_a_peer_that_comes_and_sends_nothing(call: Call, phase: str) -> None:
    with own_pool("cuda") as pool:
        pool.run(_silent, call, phase)


def _late(rank: int, num_ranks: int) -> None:
    """A rank whose call timed out queues more, the last without tokens; then the peer comes."""
    warm_up(num_ranks)
    with tuning.force(decode_tokens=0):
        warm_up(num_ranks)
        with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink", deadline_s=DEADLINE_S) as buffer:
            cases.works(buffer, CASE)
            calls = Calls(buffer)
            args = cases.arguments(buffer, CASE, calls.inputs)
            x, idx = args["x"], args["topk_idx"]
            if rank == 0:
                buffer.dispatch(x, idx, static=True, alignment=CASE.alignment)
                buffer.combine(calls.y, calls.handle)
                buffer.dispatch(x[:0], idx[:0], static=True, alignment=CASE.alignment)
                gather(num_ranks)
                with pytest.raises(QcommTimeoutError):
                    cases.sync(buffer)
            else:
                time.sleep(DEADLINE_S + 1.0)
                gather(num_ranks)
                assert calls.fails(QcommTimeoutError, "static", DEADLINE_S).peer == 0
            buffer.reset()
            cases.works(buffer, CASE)


@pytest.mark.gpu
def test_a_late_peer_is_told_nothing_newer_than_what_timed_out() -> None:
    with own_pool("cuda") as pool:
        pool.run(_late)


def leaves(buffer: Buffer, error: QcommError) -> None:
    """Require that an error leaves the buffer's block as it is, without waiting for the peers."""
    start = time.monotonic()
    with pytest.raises(type(error)) as caught, buffer:
        raise error
    assert caught.value is error
    assert time.monotonic() - start < 1.0
    with pytest.raises(QcommError, match="destroyed"):
        buffer.check()
    buffer.destroy()


def _left(rank: int, num_ranks: int) -> None:
    warm_up(num_ranks)
    buffer = cases.make_buffer(CASE, num_ranks, "cuda", "nvlink", deadline_s=DEADLINE_S)
    cases.works(buffer, CASE)
    calls = Calls(buffer)
    if rank == 0:
        leaves(buffer, calls.fails(QcommTimeoutError, "dispatch", DEADLINE_S))
    else:
        time.sleep(DEADLINE_S + 2.0)
        leaves(buffer, calls.fails(QcommTimeoutError, "combine", DEADLINE_S))
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink") as another:
        cases.works(another, CASE)


@pytest.mark.gpu
def test_leaving_after_a_timeout_waits_for_nobody() -> None:
    with own_pool("cuda") as pool:
        pool.run(_left)


def _killed(rank: int, num_ranks: int, told: str, call: Call) -> None:
    warm_up(num_ranks)
    buffer = cases.make_buffer(CASE, num_ranks, "cuda", "nvlink", deadline_s=DEADLINE_S)
    cases.works(buffer, CASE)
    calls = Calls(buffer)
    gather(num_ranks)
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    with tells(told):
        error = calls.fails(QcommTimeoutError, call, DEADLINE_S)
        assert error.peer == 1
        assert context_works(buffer.device)
        with pytest.raises(QcommTimeoutError):
            buffer.check()
        leaves(buffer, error)
        assert context_works(buffer.device)


@pytest.mark.gpu
@pytest.mark.parametrize("call", ["dispatch", "combine"])
def test_a_peer_that_is_killed(call: Call, tmp_path: Path) -> None:
    with own_pool("cuda") as pool:
        survive(pool, _killed, tmp_path / "told", call)


# On GPUs: providers of symmetric memory.


def _provided(rank: int, num_ranks: int, provider: str) -> list[torch.Tensor]:
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink", provider=provider) as buffer:
        assert buffer.backend == "nvlink"
        assert buffer.backend_reason == f"asked for; symmetric memory from {provider}"
        cases.works(buffer, CASE)
        cases.works(buffer, dataclasses.replace(CASE, static=True, routes="some"))
        recv, handle = cases.dispatch(buffer, CASE, cases.make_inputs(CASE, num_ranks))
        assert recv.sf is not None
        out = buffer.combine(recv.x.to(torch.bfloat16), handle)
        cases.sync(buffer)
        return [recv.x.view(torch.uint8), recv.sf, out]


def need_provider(provider: str) -> None:
    """Skip the test where a provider is not installed."""
    if provider not in symmetric.available_providers():
        pytest.skip(f"no provider {provider!r}")


@pytest.mark.gpu
@pytest.mark.parametrize("provider", symmetric.PROVIDERS)
def test_the_provider_asked_for(pools: Pools, provider: str) -> None:
    need_provider(provider)
    pools.get(2, "cuda").run(_provided, provider)


@pytest.mark.gpu
def test_providers_give_the_same_bits(pools: Pools) -> None:
    pool = pools.get(2, "cuda")
    need_provider("nvshmem")
    by_provider = [pool.run(_provided, provider) for provider in symmetric.PROVIDERS]
    for one, other in zip(*by_provider, strict=True):
        assert all(equal_bits(a, b) for a, b in zip(one, other, strict=True))


def _part_of_nvshmem(rank: int, num_ranks: int) -> None:
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink", provider="nvshmem") as buffer:
        cases.works(buffer, CASE)
        assert symmetric.running_nvshmem() == (rank, num_ranks)
        group = dist.new_group([0])
        if rank == 0:
            with pytest.raises(QcommUnsupportedError, match="nvshmem") as caught:
                cases.make_buffer(CASE, 1, "cuda", "nvlink", provider="nvshmem", group=group)
            assert caught.value.phase == "buffer.create"
            alone = Member(group, 0, 1, buffer.device, 30.0)
            choice = select.choose(
                dataclasses.replace(buffer._config, num_experts=3, provider="auto"), alone, Topology(1, 1)
            )
            assert (choice.backend, choice.provider) == ("nvlink", "torch")
            with pytest.raises(QcommUnsupportedError, match=f"all {num_ranks} NVSHMEM PEs, got 1 ranks"):
                symmetric.allocate("nvshmem", 1024, alone)
            dist.destroy_process_group(group)
        gather(num_ranks)
        cases.works(buffer, CASE)


@pytest.mark.gpu
def test_nvshmem_serves_no_part_of_its_ranks(pools: Pools) -> None:
    pool = pools.get(2, "cuda")
    need_provider("nvshmem")
    pool.run(_part_of_nvshmem)


# On GPUs: static receives in a graph.


def _killed_on_the_cpu(rank: int, num_ranks: int, told: str, call: Call) -> None:
    buffer = cases.make_buffer(CASE, num_ranks, "cpu", "collective", deadline_s=DEADLINE_S)
    cases.works(buffer, CASE)
    calls = Calls(buffer)
    gather(num_ranks)
    if rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    with tells(told):
        error = calls.fails((QcommPeerError, QcommTimeoutError), call, DEADLINE_S)
        assert error.phase is not None
        assert error.phase.startswith("combine" if call == "combine" else "dispatch")
        assert error.peer == 1
        leaves(buffer, error)


@pytest.mark.parametrize("call", ["dispatch", "static", "replay", "combine"])
def test_a_peer_that_is_killed_on_the_cpu(call: Call, tmp_path: Path) -> None:
    with own_pool("cpu") as pool:
        survive(pool, _killed_on_the_cpu, tmp_path / "told", call)


def _absent_on_the_cpu(rank: int, num_ranks: int, call: Call, phase: str) -> None:
    buffer = cases.make_buffer(CASE, num_ranks, "cpu", "collective", deadline_s=DEADLINE_S)
    calls = Calls(buffer)
    if rank == 0:
        start = time.monotonic()
        error = calls.fails(QcommTimeoutError, call, DEADLINE_S)
        assert time.monotonic() - start > DEADLINE_S - 0.1
        assert (error.peer, error.phase) == (1, phase)
        assert f"rank 0: {phase} with rank 1 failed within {DEADLINE_S} s" in str(error)
    else:
        time.sleep(DEADLINE_S + 1.0)
    buffer.destroy()


@pytest.mark.parametrize(
    ("call", "phase"),
    [("dispatch", "dispatch.counts"), ("replay", "dispatch.records"), ("combine", "combine.records")],
)
def test_a_peer_that_does_not_come_on_the_cpu(call: Call, phase: str) -> None:
    with own_pool("cpu") as pool:
        pool.run(_absent_on_the_cpu, call, phase)


def _absent_relay(rank: int, num_ranks: int, call: Call, blamed: list[tuple[str, int]]) -> None:
    buffer = cases.make_buffer(CASE, num_ranks, "cpu", "collective", deadline_s=DEADLINE_S, ranks_per_node=2)
    assert buffer.topology.relays
    calls = Calls(buffer)
    gather(num_ranks)
    if rank == 3:
        time.sleep(DEADLINE_S + 1.0)
    else:
        error = calls.fails((QcommTimeoutError, QcommPeerError), call, DEADLINE_S)
        assert (error.phase, error.peer) == blamed[rank]
    buffer.abandon()


@pytest.mark.parametrize(
    ("call", "blamed"),
    [
        # Rank 0 waits for its mate, which waits for the missing rank; and in combine for its relay, which does.
        ("replay", [("dispatch.relay", 1), ("dispatch.records", 3), ("dispatch.relay", 3)]),
        ("combine", [("combine.records", 2), ("combine.records", 3), ("combine.relay", 3)]),
    ],
)
def test_a_relay_that_does_not_come(call: Call, blamed: list[tuple[str, int]]) -> None:
    pool = RankPool(4, "cpu")
    try:
        pool.run(_absent_relay, call, blamed)
    finally:
        pool.close()


# On the CPU: which backend, and why not another.
