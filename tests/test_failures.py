"""What goes wrong at run time: peers that do not come or die, machines that cannot run a backend, full receives."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import cases
import pytest
import torch
import torch.distributed as dist
from bit_patterns import equal_bits
from cases import BF16, Case, Inputs
from ranks import Pools, RankError, RankPool, need_gpus

from qcomm import (
    Buffer,
    QcommConfigError,
    QcommError,
    QcommOverflowError,
    QcommPeerError,
    QcommTimeoutError,
    QcommUnsupportedError,
    WirePrecision,
)
from qcomm.config import BufferConfig, Member
from qcomm.exchange import WireInput
from qcomm.ops.comm import launch_barrier
from qcomm.transport import select, symmetric
from qcomm.transport.select import Capability, Choice

CASE = Case(combine_wire=BF16, routes="random")
DEADLINE_S = 2.0
MARGIN_S = 5.0
Call = Literal["dispatch", "static", "replay", "combine"]


def works(buffer: Buffer, case: Case = CASE) -> None:
    """Require right answers."""
    cases.no_problems([cases.run_case(buffer, case)])


def warm_up(num_ranks: int, **changes: Any) -> None:
    """Compile and load what later calls need, so that none of it counts against a short deadline."""
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink", **changes) as buffer:
        works(buffer)
        works(buffer, dataclasses.replace(CASE, static=True))


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
def own_pool(device: Literal["cpu", "cuda"]) -> Iterator[RankPool]:
    """Make a pool that a test may break."""
    if device == "cuda":
        need_gpus(2)
    pool = RankPool(2, device)
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


def _absent(rank: int, num_ranks: int, call: Call, phase: str) -> None:
    warm_up(num_ranks)
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink", deadline_s=DEADLINE_S) as buffer:
        works(buffer)
        calls = Calls(buffer)
        if rank == 0:
            start = time.monotonic()
            error = calls.fails(QcommTimeoutError, call, DEADLINE_S)
            assert time.monotonic() - start > DEADLINE_S - 0.1
            assert isinstance(error.expected, int)
            assert isinstance(error.seen, int)
            assert (error.peer, error.phase) == (1, phase)
            assert error.seen < error.expected
            for words in ("rank 0", "rank 1", phase, f"{DEADLINE_S} s", "reset()"):
                assert words in str(error)
            assert context_works(buffer.device)
            # Nothing waits any more, and every call says the same until the reset.
            start = time.monotonic()
            again: tuple[Call, ...] = ("dispatch", "static", "replay", "combine")
            for other in again:
                repeated = calls.fails(QcommTimeoutError, other, DEADLINE_S)
                assert str(repeated) == str(error)
            with pytest.raises(QcommTimeoutError, match="rank 1"):
                buffer.check()
            assert time.monotonic() - start < 1.0
        buffer.reset()
        with pytest.raises(ValueError, match="reset"):
            buffer.combine(calls.y, calls.handle)
        for static in (False, True, False):
            works(buffer, dataclasses.replace(CASE, static=static))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("call", "phase"), [("dispatch", "route"), ("static", "route"), ("replay", "barrier"), ("combine", "barrier")]
)
def test_a_peer_that_does_not_come(call: Call, phase: str) -> None:
    with own_pool("cuda") as pool:
        pool.run(_absent, call, phase)


def _silent(rank: int, num_ranks: int, call: Call, phase: str) -> None:
    warm_up(num_ranks)
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink", deadline_s=DEADLINE_S) as buffer:
        works(buffer)
        calls = Calls(buffer)
        if rank == 0:
            error = calls.fails(QcommTimeoutError, call, DEADLINE_S)
            assert (error.peer, error.phase) == (1, phase)
            assert context_works(buffer.device)
        else:
            # Comes to the barrier and sends nothing.
            transport: Any = buffer._transport
            with transport._call(False) as started:
                launch_barrier(transport._launcher, started.stream, None)
            cases.sync(buffer)
        buffer.reset()
        works(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize(("call", "phase"), [("replay", "dispatch"), ("combine", "combine")])
def test_a_peer_that_comes_and_sends_nothing(call: Call, phase: str) -> None:
    with own_pool("cuda") as pool:
        pool.run(_silent, call, phase)


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
    works(buffer)
    calls = Calls(buffer)
    if rank == 0:
        leaves(buffer, calls.fails(QcommTimeoutError, "dispatch", DEADLINE_S))
    else:
        time.sleep(DEADLINE_S + 2.0)
        leaves(buffer, calls.fails(QcommTimeoutError, "combine", DEADLINE_S))
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink") as another:
        works(another)


@pytest.mark.gpu
def test_leaving_after_a_timeout_waits_for_nobody() -> None:
    with own_pool("cuda") as pool:
        pool.run(_left)


def _killed(rank: int, num_ranks: int, told: str, call: Call) -> None:
    warm_up(num_ranks)
    buffer = cases.make_buffer(CASE, num_ranks, "cuda", "nvlink", deadline_s=DEADLINE_S)
    works(buffer)
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
        works(buffer)
        works(buffer, dataclasses.replace(CASE, static=True, routes="some"))
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
        works(buffer)
        assert symmetric.running_nvshmem() == (rank, num_ranks)
        group = dist.new_group([0])
        if rank == 0:
            with pytest.raises(QcommUnsupportedError, match="nvshmem") as caught:
                cases.make_buffer(CASE, 1, "cuda", "nvlink", provider="nvshmem", group=group)
            assert caught.value.phase == "buffer.create"
            alone = Member(group, 0, 1, buffer.device, 30.0)
            choice = select.choose(dataclasses.replace(buffer._config, num_experts=3, provider="auto"), alone)
            assert (choice.backend, choice.provider) == ("nvlink", "torch")
            with pytest.raises(QcommUnsupportedError, match=f"all {num_ranks} NVSHMEM PEs, got 1 ranks"):
                symmetric.allocate("nvshmem", 1024, alone)
            dist.destroy_process_group(group)
        gather(num_ranks)
        works(buffer)


@pytest.mark.gpu
def test_nvshmem_serves_no_part_of_its_ranks(pools: Pools) -> None:
    pool = pools.get(2, "cuda")
    need_provider("nvshmem")
    pool.run(_part_of_nvshmem)


# On GPUs: static receives in a graph.

GRAPH_CAPACITY = 256
GRAPH_ROUTES = ("random", "some", "none", "half", "one", "same_rank")


class Step:
    """Dispatch, an expert and combine, on tensors whose contents change."""

    def __init__(self, rank: int, num_ranks: int, device: torch.device) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        given = cases.make_inputs(CASE, num_ranks)
        x = given.xs[rank]
        assert isinstance(x, torch.Tensor)
        assert given.topk_weights is not None
        self._x, self._idx = x.to(device), given.topk_idxs[rank].to(device)
        self._weights = given.topk_weights[rank].to(device)

    def take(self, case: Case) -> None:
        """Change the contents to those of a case."""
        given = cases.make_inputs(case, self._num_ranks)
        x = given.xs[self._rank]
        assert isinstance(x, torch.Tensor)
        assert given.topk_weights is not None
        self._x.copy_(x)
        self._idx.copy_(given.topk_idxs[self._rank])
        self._weights.copy_(given.topk_weights[self._rank])

    def run(self, buffer: Buffer, **options: Any) -> torch.Tensor:
        recv, handle = buffer.dispatch(
            self._x, self._idx, self._weights, recv_dtype="bf16", alignment=CASE.alignment, **options
        )
        return buffer.combine(recv.x * 3.0, handle)

    def capture(self, buffer: Buffer, capacity: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Capture a static step; what it launches must have run before."""
        self.run(buffer, static=True, num_max_recv_tokens=capacity)
        cases.sync(buffer)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may go on calling CUDA.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = self.run(buffer, static=True, num_max_recv_tokens=capacity)
        return graph, out


def _graph(rank: int, num_ranks: int) -> None:
    with (
        cases.make_buffer(CASE, num_ranks, "cuda", "nvlink") as buffer,
        cases.make_buffer(CASE, num_ranks, "cuda", "collective") as other,
    ):
        step = Step(rank, num_ranks, buffer.device)
        graph, out = step.capture(buffer, GRAPH_CAPACITY)
        for turn in range(20):
            routes: Any = GRAPH_ROUTES[turn % len(GRAPH_ROUTES)]
            step.take(dataclasses.replace(CASE, routes=routes, seed=100 + turn))
            out.fill_(torch.nan)
            for _ in range(50):
                graph.replay()
            cases.sync(buffer)
            got = out.clone()
            eager = step.run(buffer)
            cases.sync(buffer)
            want = step.run(other)
            assert equal_bits(got, eager), f"turn {turn}: the graph and an eager call differ"
            assert equal_bits(got, want), f"turn {turn}: the graph and the collective backend differ"
            assert (routes == "none") == (not got.any())
        torch.cuda.synchronize()
        del graph
        works(buffer)


@pytest.mark.gpu
def test_a_static_step_in_a_graph(pools: Pools) -> None:
    pools.get(2, "cuda").run(_graph)


def _graph_overflow(rank: int, num_ranks: int) -> None:
    none, full = (dataclasses.replace(CASE, routes=routes) for routes in ("none", "random"))
    capacity = CASE.alignment
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink") as buffer:
        step = Step(rank, num_ranks, buffer.device)
        step.take(none)
        graph, _ = step.capture(buffer, capacity)
        for _ in range(2):
            step.take(none)
            graph.replay()
            cases.sync(buffer)
            step.take(full)
            graph.replay()
            torch.cuda.synchronize()
            with pytest.raises(QcommOverflowError) as caught:
                buffer.check()
            needed = len(cases.expect_rows(full, cases.make_inputs(full, num_ranks))[rank].token_of_row)
            assert (caught.value.rank, caught.value.expected, caught.value.seen) == (rank, needed, capacity)
            buffer.check()
        del graph
        works(buffer)


@pytest.mark.gpu
def test_an_overflow_in_a_graph_is_heard_of(pools: Pools) -> None:
    pools.get(2, "cuda").run(_graph_overflow)


# On the CPU: peers of the collective backend.


def _killed_on_the_cpu(rank: int, num_ranks: int, told: str, call: Call) -> None:
    buffer = cases.make_buffer(CASE, num_ranks, "cpu", "collective", deadline_s=DEADLINE_S)
    works(buffer)
    calls = Calls(buffer)
    gather(num_ranks)
    if rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    with tells(told):
        error = calls.fails((QcommPeerError, QcommTimeoutError), call, DEADLINE_S)
        assert error.phase is not None
        assert error.phase.startswith("combine" if call == "combine" else "dispatch")
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
        assert error.phase == phase
        assert phase in str(error)
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


# On the CPU: which backend, and why not another.


def _nvlink_on_the_cpu(rank: int, num_ranks: int) -> None:
    with pytest.raises(QcommUnsupportedError, match="'nvlink' cannot run here: tensors are on the CPU") as caught:
        cases.make_buffer(CASE, num_ranks, "cpu", "nvlink")
    assert (caught.value.rank, caught.value.phase) == (rank, "buffer.create")
    with cases.make_buffer(CASE, num_ranks, "cpu", "auto") as buffer:
        assert buffer.backend_reason == "tensors are on the CPU"
        works(buffer)


def test_nvlink_on_the_cpu(pool2: RankPool) -> None:
    pool2.run(_nvlink_on_the_cpu)


def _providers_that_differ(rank: int, num_ranks: int) -> None:
    with pytest.raises(QcommConfigError, match=r"provider must be the same.*rank 0: nvshmem, rank 1: torch"):
        cases.make_buffer(CASE, num_ranks, "cpu", "auto", provider=symmetric.PROVIDERS[rank])
    with pytest.raises(ValueError, match="provider must be one of"):
        cases.make_buffer(CASE, num_ranks, "cpu", "auto", provider="nccl")
    with cases.make_buffer(CASE, num_ranks, "cpu", "auto", provider="torch") as buffer:
        works(buffer)


def test_providers_that_differ(pool2: RankPool) -> None:
    pool2.run(_providers_that_differ)


BOTH = Capability(True, "fine", ("nvshmem", "torch"))
TORCH = Capability(True, "fine", ("torch",))
NO_CUPY = Capability(False, "not installed: cupy-cuda13x", ())


def seats(num_ranks: int = 3, **of_the_last: Any) -> list[select._Seat]:
    """Make ranks that can run the nvlink backend, the last one changed."""
    uuids = tuple(f"GPU-{rank}" for rank in range(num_ranks))
    made = [select._Seat(BOTH, "host", uuid, uuids, None, uuids) for uuid in uuids]
    return [*made[:-1], dataclasses.replace(made[-1], **of_the_last)]


@pytest.mark.parametrize(
    ("found", "want"),
    [
        (seats(), None),
        (seats(1), None),
        (seats(host="other"), "ranks are on several hosts"),
        (seats(device_uuid="GPU-0"), "ranks 0 and 2 share a GPU"),
        (seats(reachable_uuids=("GPU-0", "GPU-2")), "the GPU of rank 2 cannot reach that of rank 1"),
        (seats(reachable_uuids=("GPU-2",), visible_uuids=("GPU-2",)), None),
        (seats(capability=NO_CUPY), "rank 2: not installed: cupy-cuda13x"),
        (seats(1, capability=NO_CUPY), "not installed: cupy-cuda13x"),
        (seats(capability=NO_CUPY, host="other", device_uuid="GPU-0"), "rank 2: not installed: cupy-cuda13x"),
        (seats(host="other", device_uuid="GPU-0"), "ranks are on several hosts"),
    ],
)
def test_obstacles(found: list[select._Seat], want: str | None) -> None:
    assert select._obstacle(found) == want


@pytest.mark.parametrize(
    ("changes", "num_ranks", "want"),
    [
        ({}, 16, None),
        ({}, 17, "ranks of at most 16, got 17"),
        ({"num_topk": 33}, 4, "num_topk of at most 32, got 33"),
        ({"hidden": 41088}, 4, "hidden of at most 40960, got 41088"),
        ({"num_max_tokens_per_rank": 1 << 20}, 4, "num_experts 272 and num_max_tokens_per_rank 1048576 need 283728"),
    ],
)
def test_limits(changes: dict[str, int], num_ranks: int, want: str | None) -> None:
    shape = {"num_experts": 272, "num_topk": 32, "hidden": 40960, "num_max_tokens_per_rank": 4096} | changes
    config = BufferConfig(**shape, precision=WirePrecision(), backend="nvlink", provider="auto", device_type="cuda")
    limit = select._limit(config, num_ranks)
    assert limit is None if want is None else want in str(limit)


def choose(monkeypatch: pytest.MonkeyPatch, found: list[select._Seat], backend: str, provider: str) -> Choice:
    """Choose as rank 0 of ranks that told this."""

    def all_gather_object(into: list[select._Seat], mine: select._Seat, group: object) -> None:
        assert mine is found[0]
        into[:] = found

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(select, "_seat", lambda device: found[0])
    config = BufferConfig(3, 1, 128, 8, WirePrecision(), backend, provider, "cuda")
    group: Any = None
    return select.choose(config, Member(group, 0, len(found), torch.device("cuda", 0), 1.0))


@pytest.mark.parametrize(
    ("found", "backend", "provider", "want"),
    [
        (seats(), "auto", "auto", ("nvlink", "nvshmem", "every rank reaches every GPU")),
        (seats(), "nvlink", "torch", ("nvlink", "torch", "asked for; symmetric memory from torch")),
        (seats(), "collective", "auto", ("collective", None, "asked for")),
        (seats(capability=TORCH), "auto", "auto", ("nvlink", "torch", "from torch")),
        (seats(capability=TORCH), "auto", "nvshmem", ("collective", None, "'nvshmem'")),
        (seats(host="other"), "auto", "auto", ("collective", None, "several hosts")),
        # NVSHMEM runs on some of the ranks only.
        (seats(nvshmem=(0, 1)), "auto", "auto", ("nvlink", "torch", "from torch")),
    ],
)
def test_choices(
    monkeypatch: pytest.MonkeyPatch,
    found: list[select._Seat],
    backend: str,
    provider: str,
    want: tuple[str, str | None, str],
) -> None:
    choice = choose(monkeypatch, found, backend, provider)
    assert (choice.backend, choice.provider) == want[:2]
    assert want[2] in choice.reason


@pytest.mark.parametrize(
    ("found", "provider", "text"),
    [
        (seats(host="other"), "auto", "several hosts"),
        (seats(capability=NO_CUPY), "auto", "rank 2: not installed: cupy-cuda13x"),
        (seats(capability=TORCH), "nvshmem", "provider 'nvshmem'"),
        (seats(nvshmem=(0, 1)), "nvshmem", "provider 'nvshmem'"),
    ],
)
def test_nvlink_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, found: list[select._Seat], provider: str, text: str
) -> None:
    with pytest.raises(QcommUnsupportedError, match=text) as caught:
        choose(monkeypatch, found, "nvlink", provider)
    assert "backend 'nvlink' cannot run here" in str(caught.value)
    assert caught.value.phase == "buffer.create"
    assert caught.value.seen


@pytest.mark.parametrize(
    ("running", "want"),
    [
        ([None, None], True),
        ([(0, 2), (1, 2)], True),
        ([(1, 2), (0, 2)], True),
        ([(0, 2), None], False),
        ([(0, 4), (1, 4)], False),
        ([(0, 1), (0, 1)], False),
        ([(0, 2)], False),
    ],
)
def test_nvshmem_of_one_group(running: list[tuple[int, int] | None], want: bool) -> None:
    assert select._one_nvshmem(running) is want


def test_what_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    capability = (9, 0)
    installed = {"cupy", "cuda.core", "cuda.bindings"}
    providers: tuple[str, ...] = ("torch",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(select, "_importable", lambda module: module in installed)
    monkeypatch.setattr(symmetric, "available_providers", lambda: providers)
    assert select.local_capability(device) == Capability(
        True, "Hopper or newer, symmetric memory from torch", ("torch",)
    )
    providers = ()
    assert "no provider" in select.local_capability(device).reason
    installed = {"cuda.core"}
    assert select.local_capability(device) == Capability(False, "not installed: cupy-cuda13x, cuda-bindings", ())
    capability = (8, 6)
    lacks = select.local_capability(device)
    assert not lacks.supported
    assert "9.0 or newer, this GPU has 8.6" in lacks.reason
    assert select.local_capability(torch.device("cpu")) == Capability(False, "tensors are on the CPU", ())


def test_packages_that_are_missing() -> None:
    assert select._importable("torch.distributed")
    assert not select._importable("torch.no_such_module")
    assert not select._importable("no_such_package.module")


def test_nvshmem_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nvshmem.core", raising=False)
    assert symmetric.running_nvshmem() is None
    # Imported, and started by whoever imported it.
    package, core = ModuleType("nvshmem"), ModuleType("nvshmem.core")
    status = 0
    for name, value in {"init_status": lambda: status, "my_pe": lambda: 3, "n_pes": lambda: 4}.items():
        setattr(core, name, value)
    package.core = core  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvshmem", package)
    monkeypatch.setitem(sys.modules, "nvshmem.core", core)
    assert symmetric.running_nvshmem() is None
    status = 2
    assert symmetric.running_nvshmem() == (3, 4)
