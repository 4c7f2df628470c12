"""Split calls: what they send and a hook receives is what a plain call gives, and nothing comes between."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cases
import pytest
import torch
from bit_patterns import equal_bits
from cases import BF16, FP8, MAX_TOKENS, MXFP4, STOCHASTIC, Case, Inputs, grid
from fake_cuda import FakeCuda, nvlink_buffer
from ranks import Pools, RankPool, Target, targets

from qcomm import Buffer, DispatchHandle, QcommError, QcommRoutingError, QcommTimeoutError, Received, tuning
from qcomm import hook as hook_module
from qcomm.formats import RECV_DTYPES, RECV_LAYOUTS, ScaleLayout
from qcomm.ops.comm import PHASES, TIMEOUT

Hook = Callable[[], None]
BASE = Case(combine_wire=BF16)


# Results.


def poison(x: torch.Tensor) -> None:
    if x.element_size() == 1:
        x.view(torch.uint8).fill_(0xA5)
    else:
        x.fill_(torch.nan)


def finish(buffer: Buffer, hook: Hook, *results: torch.Tensor | None) -> None:
    """Wait, overwrite the results where the hook has yet to fill them, and call it."""
    if buffer.backend == "nvlink":
        torch.cuda.synchronize(buffer.device)
        for result in results:
            if result is not None:
                poison(result)
    hook()
    cases.sync(buffer)


def other_tokens(case: Case, inputs: Inputs) -> Inputs:
    """Give every token another value on the same route."""
    others = cases.make_inputs(dataclasses.replace(case, seed=case.seed + 1), len(inputs.xs))
    return dataclasses.replace(inputs, xs=others.xs)


def replayed(buffer: Buffer, case: Case, inputs: Inputs, handle: DispatchHandle) -> Received:
    """Replay a dispatch by a split call."""
    given = cases.arguments(buffer, case, inputs)
    options = {name: given[name] for name in ("x", "recv_dtype", "columnwise", "sf_layout", "seed", "backward")}
    recv, again, hook = buffer.dispatch(**options, handle=handle, return_recv_hook=True)
    assert again is handle
    finish(buffer, hook, recv.x, recv.sf, recv.x_columnwise, recv.sf_columnwise)
    return recv


def combined(buffer: Buffer, case: Case, inputs: Inputs, recv: Received, handle: DispatchHandle) -> bool:
    """Tell whether a split combine gives what the oracle does, and what a plain one gives."""
    rows = cases.expect_rows(case, inputs)
    ys = cases.make_ys(case, rows)
    y = cases.place_y(case, ys[buffer.rank], rows[buffer.rank], recv, handle)
    options: dict[str, Any] = {"weighted": case.weighted, "seed": case.seed, "backward": case.backward}
    plain = buffer.combine(y, handle, **options)
    out, hook = buffer.combine(y, handle, **options, return_recv_hook=True)
    finish(buffer, hook, out)
    want = cases.expect_combined(case, ys, rows, inputs, buffer.rank, **cases.node_sums(buffer))
    return equal_bits(out.cpu(), want) and equal_bits(out, plain)


def run_case(buffer: Buffer, case: Case) -> list[str]:
    """Split a dispatch, replays of a static and a dynamic one, and combines; compare all with the oracle."""
    static, dynamic = (dataclasses.replace(case, static=value) for value in (True, False))
    inputs = cases.make_inputs(case, buffer.num_ranks)
    other = other_tokens(case, inputs)
    want, want_other = (cases.expect(case, given, buffer.rank) for given in (inputs, other))
    given = cases.arguments(buffer, static, inputs)
    recv, handle, hook = buffer.dispatch(**given, return_recv_hook=True)
    finish(buffer, hook, recv.x, recv.sf, recv.x_columnwise, recv.sf_columnwise)
    problems = [f"dispatch: {p}" for p in cases.compare(static, recv, handle, want)]
    again = replayed(buffer, static, other, handle)
    problems += [f"replay: {p}" for p in cases.compare(static, again, handle, want_other)]
    if not combined(buffer, static, inputs, recv, handle):
        problems.append("combine")
    if case.capacity is None:
        _, kept = cases.dispatch(buffer, dynamic, inputs)
        again = replayed(buffer, dynamic, other, kept)
        problems += [f"replay of a dynamic dispatch: {p}" for p in cases.compare(dynamic, again, kept, want_other)]
        if not combined(buffer, dynamic, inputs, again, kept):
            problems.append("combine after a dynamic dispatch")
    return [f"rank {buffer.rank}: {case}: {problem}" for problem in problems]


def run_cases(rank: int, num_ranks: int, device: str, backend: str, given: Sequence[Case]) -> list[str]:
    problems = []
    for shape in dict.fromkeys(case.shape for case in given):
        same = [case for case in given if case.shape == shape]
        with cases.make_buffer(same[0], num_ranks, device, backend) as buffer:
            for case in same:
                problems += run_case(buffer, case)
    return problems


def todo() -> Iterator[Case]:
    for layout in RECV_LAYOUTS:
        base = dataclasses.replace(BASE, recv_layout=layout, weighted=layout != "token_major")
        yield from grid(base, recv_dtype=RECV_DTYPES)
        yield from grid(base, wire=(BF16, FP8), combine_wire=(FP8, MXFP4))
        yield dataclasses.replace(base, wire=STOCHASTIC, combine_wire=STOCHASTIC, seed=3)
        yield from grid(base, counts=("empty", "zero"), routes=("some", "none"))
        yield dataclasses.replace(base, hidden=1152, routes="random", backward=True)
        yield dataclasses.replace(base, sf_layout=ScaleLayout.COLUMN_MAJOR)
    yield from grid(BASE, wire=(MXFP4, FP8), columnwise=(True,), alignment=(128,))
    # More rows than records can come.
    yield dataclasses.replace(BASE, recv_layout="token_major", weighted=False, capacity=5 * MAX_TOKENS)


@targets(2)
def test_results_are_those_of_a_plain_call(target: Target) -> None:
    cases.no_problems(target.run(run_cases, list(todo())))


# Rules.


def split_dispatch(buffer: Buffer) -> tuple[Received, DispatchHandle, Hook]:
    inputs = cases.make_inputs(BASE, buffer.num_ranks)
    return buffer.dispatch(**cases.arguments(buffer, BASE, inputs) | {"static": True}, return_recv_hook=True)


def refused(call: Callable[[], object], kind: type[Exception], *words: str) -> None:
    """Require an error of exactly this kind whose message holds the words."""
    with pytest.raises(kind) as caught:
        call()
    assert caught.type is kind, repr(caught.value)
    assert all(word in str(caught.value) for word in words), repr(caught.value)


def _arguments(rank: int, num_ranks: int, device: str, backend: str) -> None:
    with cases.make_buffer(BASE, num_ranks, device, backend) as buffer:
        b: Any = buffer
        inputs = cases.make_inputs(BASE, num_ranks)
        given = cases.arguments(buffer, BASE, inputs)
        recv, handle = cases.dispatch(buffer, BASE, inputs)
        y = torch.ones(*recv.x.shape, dtype=torch.bfloat16, device=buffer.device)
        for static in (None, False):
            refused(
                functools.partial(b.dispatch, **given | {"static": static}, return_recv_hook=True),
                ValueError,
                "return_recv_hook must be False unless static=True or a handle is given",
                f"got True, static={static}",
            )
        calls: list[Callable[..., object]] = [
            lambda **options: b.dispatch(**given | {"static": True}, **options),
            lambda **options: b.dispatch(given["x"], handle=handle, **options),
            lambda **options: b.combine(y, handle, **options),
        ]
        for call in calls:
            both = functools.partial(call, async_op=True, return_recv_hook=True)
            refused(both, ValueError, "async_op must be False with return_recv_hook=True, got True")
            refused(functools.partial(call, return_recv_hook=1), TypeError, "return_recv_hook", "bool", "int")
        # Wrong arguments leave no hook outstanding.
        refused(lambda: b.combine(y[1:], handle, return_recv_hook=True), ValueError, "y.shape")
        cases.works(buffer, BASE)


@targets(2)
def test_arguments(target: Target) -> None:
    target.run(_arguments)


def _one_at_a_time(rank: int, num_ranks: int, device: str, backend: str) -> None:
    inputs = cases.make_inputs(BASE, num_ranks)
    with (
        cases.make_buffer(BASE, num_ranks, device, backend) as buffer,
        cases.make_buffer(BASE, num_ranks, device, backend) as other,
    ):
        given = cases.arguments(buffer, BASE, inputs)
        recv, kept = cases.dispatch(buffer, BASE, inputs)
        y = torch.ones(*recv.x.shape, dtype=torch.bfloat16, device=buffer.device)
        splits: list[tuple[str, Callable[[], Hook]]] = [
            ("dispatch", lambda: split_dispatch(buffer)[2]),
            ("replay", lambda: buffer.dispatch(given["x"], handle=kept, return_recv_hook=True)[2]),
            ("combine", lambda: buffer.combine(y, kept, return_recv_hook=True)[1]),
        ]
        for name, split in splits:
            hook = split()
            for call in (
                lambda: buffer.dispatch(**given),
                lambda: buffer.dispatch(given["x"], handle=kept),
                lambda: buffer.combine(y, kept),
                lambda: buffer.combine(y, kept, return_recv_hook=True),
                buffer.stats,
            ):
                refused(call, QcommError, f"the hook of the last {name} is outstanding", "call the hook first")
            buffer.check()
            cases.works(other, BASE)
            hook()
            refused(hook, QcommError, f"the hook of this {name} was called before")
            cases.works(buffer, BASE)
            refused(hook, QcommError, "called before")
        assert buffer.stats().num_replays == 1


@targets(2)
def test_nothing_comes_between_a_call_and_its_hook(target: Target) -> None:
    target.run(_one_at_a_time)


def _dropped(rank: int, num_ranks: int, device: str, backend: str) -> None:
    buffer = cases.make_buffer(BASE, num_ranks, device, backend)
    called = split_dispatch(buffer)[2]
    called()
    hook = split_dispatch(buffer)[2]
    buffer.reset()
    refused(hook, QcommError, "the hook of this dispatch was dropped by reset()")
    cases.works(buffer, BASE)
    refused(hook, QcommError, "dropped by reset()")
    refused(called, QcommError, "called before")
    hook = split_dispatch(buffer)[2]
    buffer.destroy()
    refused(hook, QcommError, "the hook of this dispatch was dropped by destroy()")
    buffer = cases.make_buffer(BASE, num_ranks, device, backend)
    hook = split_dispatch(buffer)[2]
    buffer.abandon()
    refused(hook, QcommError, "dropped by abandon()")


@targets(2)
def test_reset_and_destroy_drop_a_hook(target: Target) -> None:
    target.run(_dropped)


def _bad_route(rank: int, num_ranks: int) -> None:
    with cases.make_buffer(BASE, num_ranks, "cpu", "collective") as buffer:
        x = torch.zeros(1, BASE.hidden, dtype=torch.bfloat16)
        bad = torch.full((1, BASE.num_topk), 99)
        refused(
            lambda: buffer.dispatch(x, bad, static=True, return_recv_hook=True), QcommRoutingError, "topk_idx[0]", "99"
        )
        cases.works(buffer, BASE)


def test_a_call_that_fails_leaves_no_hook(pool2: RankPool) -> None:
    pool2.run(_bad_route)


# Without a GPU: what the nvlink backend launches when, and behind what.

SHAPE: dict[str, Any] = {"num_experts": 4, "num_topk": 2, "hidden": 256, "num_max_tokens_per_rank": 64}


@dataclasses.dataclass(frozen=True)
class Fake:
    """A buffer of the nvlink backend whose launches are noted."""

    cuda: FakeCuda
    buffer: Buffer
    transport: Any
    x: torch.Tensor
    idx: torch.Tensor

    def dispatch(self, **options: Any) -> tuple[Received, DispatchHandle, Hook]:
        return self.buffer.dispatch(self.x, self.idx, static=True, return_recv_hook=True, **options)

    def launched(self, first: int = 0) -> list[str]:
        """Name what was launched since then."""
        return [launch.kernel for launch in self.cuda.launches[first:]]

    def require_one_after_the_other(self) -> None:
        """Require that every launch begins when all before it have ended, whatever their streams.

        One that is early does not wait for the last.
        """
        for launch in self.cuda.launches:
            before = self.cuda.launches[: launch.number - launch.early]
            missing = [other.kernel for other in before if other.number not in launch.after]
            assert not missing, f"{launch.kernel} does not wait for {missing}"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    cuda = FakeCuda()
    with nvlink_buffer(monkeypatch, cuda, **SHAPE) as (buffer, transport):
        x, idx = torch.zeros(3, SHAPE["hidden"], dtype=torch.bfloat16), torch.tensor([[0, 1], [2, -1], [3, 0]])
        yield Fake(cuda, buffer, transport, x, idx)


@pytest.mark.parametrize("columnwise", [False, True], ids=["rows", "columns"])
def test_a_split_dispatch_sends_and_its_hook_receives(fake: Fake, columnwise: bool) -> None:
    receives = ["count", "dispatch_recv", *["dispatch_recv_columnwise_mxfp4"] * columnwise]
    cuda = fake.cuda
    _, handle, hook = fake.dispatch(columnwise=columnwise)
    assert fake.launched() == ["route", "dispatch_send"]
    route, send = cuda.launches
    assert route.stream is cuda.current is send.stream
    assert [launch.early for launch in cuda.launches] == [False, True]
    # What the caller launches now waits for the sends, which read x, and for nothing else.
    assert cuda.current.before == {route.number, send.number}
    hook()
    assert fake.launched(2) == receives
    # The hook's stream may hold anything of the caller's before them.
    assert [launch.early for launch in cuda.launches[2:4]] == [False, True]
    assert {launch.stream for launch in cuda.launches[2:]} == {cuda.current}
    first = len(cuda.launches)
    hook = fake.buffer.dispatch(fake.x, handle=handle, columnwise=columnwise, return_recv_hook=True)[2]
    assert fake.launched(first) == ["barrier", "dispatch_send"]
    hook()
    assert fake.launched(first + 2) == receives[1:]
    fake.require_one_after_the_other()
    assert not cuda.users


def test_a_split_combine_sends_and_its_hook_receives(fake: Fake) -> None:
    recv, handle, hook = fake.dispatch()
    hook()
    first = len(fake.cuda.launches)
    y = torch.zeros(*recv.x.shape, dtype=torch.bfloat16)
    _, hook = fake.buffer.combine(y, handle, return_recv_hook=True)
    assert fake.launched(first) == ["barrier", "combine_send"]
    hook()
    assert fake.launched(first + 2) == ["combine_recv"]
    assert [launch.early for launch in fake.cuda.launches[first:]] == [False, True, False]
    fake.require_one_after_the_other()


def test_few_tokens_take_one_kernel_unless_split(fake: Fake) -> None:
    recv, handle = fake.buffer.dispatch(fake.x, fake.idx, static=True)
    fake.buffer.combine(torch.zeros(*recv.x.shape, dtype=torch.bfloat16), handle)
    assert all(len(fake.x) <= found.decode_tokens for found in tuning.current().defaults.values())
    assert fake.launched() == ["dispatch_decode", "combine_decode"]


def test_calls_and_hooks_on_streams_of_their_own(fake: Fake) -> None:
    cuda = fake.cuda
    one, other, third = (cuda.make_stream() for _ in range(3))
    with cuda.stream(one):
        recv, handle, hook = fake.dispatch()
    with cuda.stream(other):
        hook()
    assert cuda.users == [other]
    assert {launch.stream for launch in cuda.launches[2:]} == {other}
    # The next call waits for the hook, and not only for the call that left it.
    with cuda.stream(third):
        _, hook = fake.buffer.combine(torch.zeros(*recv.x.shape, dtype=torch.bfloat16), handle, return_recv_hook=True)
    with cuda.stream(one):
        hook()
    assert cuda.users == [other, one]
    with cuda.stream(other):
        fake.buffer.dispatch(fake.x, fake.idx, static=True)
    assert fake.launched()[-2:] == ["combine_recv", "dispatch_decode"]
    fake.require_one_after_the_other()


def test_a_call_and_its_hook_are_captured_together(fake: Fake) -> None:
    cuda = fake.cuda
    side = cuda.make_stream()
    _, handle, hook = fake.dispatch()
    cuda.capturing = True
    refused(hook, QcommError, "capture", "the call is not captured, the hook captured")
    cuda.capturing = False
    assert fake.launched() == ["route", "dispatch_send"]
    hook()

    cuda.capturing = True
    eager = len(cuda.launches)
    cuda.current = cuda.make_stream()
    hook = fake.buffer.dispatch(fake.x, handle=handle, return_recv_hook=True)[2]
    cuda.capturing = False
    refused(hook, QcommError, "capture", "the call is captured, the hook not captured")
    cuda.capturing = True
    with cuda.stream(side):
        hook()
    assert fake.launched(eager) == ["barrier", "dispatch_send", "dispatch_recv"]
    assert set(range(eager, eager + 2)) <= cuda.launches[-1].after


def test_a_timeout_is_raised_by_check_or_a_later_call(fake: Fake) -> None:
    _, _, hook = fake.dispatch()
    report = fake.transport._reports_view.timeout
    report.code, report.peer, report.phase = TIMEOUT, 0, PHASES.index("route")
    with pytest.raises(QcommTimeoutError, match="route"):
        fake.buffer.check()
    refused(fake.dispatch, QcommError, "call the hook first")
    hook()
    with pytest.raises(QcommTimeoutError, match="route"):
        fake.dispatch()
    fake.buffer.reset()
    fake.dispatch()[2]()


def test_a_hook_is_a_range_in_a_profile(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    def profiled(name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
        entered.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(hook_module, "profiled", profiled)
    recv, handle, hook = fake.dispatch()
    hook()
    fake.buffer.dispatch(fake.x, handle=handle, return_recv_hook=True)[2]()
    fake.buffer.combine(torch.zeros(*recv.x.shape, dtype=torch.bfloat16), handle, return_recv_hook=True)[1]()
    assert entered == ["dispatch.recv", "replay.recv", "combine.recv"]


# On GPUs.


def _on_streams(rank: int, num_ranks: int, device: str, backend: str) -> None:
    case = dataclasses.replace(BASE, routes="random", recv_dtype="bf16")
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        given = cases.arguments(buffer, case, cases.make_inputs(case, num_ranks)) | {"static": True}
        recv, handle = buffer.dispatch(**given)
        want = buffer.combine(recv.x, handle)
        cases.sync(buffer)
        one, other = (torch.cuda.Stream(buffer.device) for _ in range(2))
        outs = []
        for _ in range(30):
            with torch.cuda.stream(one):
                recv, handle, hook = buffer.dispatch(**given, return_recv_hook=True)
            with torch.cuda.stream(other):
                hook()
                out, hook = buffer.combine(recv.x.clone(), handle, return_recv_hook=True)
            with torch.cuda.stream(one):
                hook()
                outs.append(out.clone())
        cases.sync(buffer)
        assert all(equal_bits(out, want) for out in outs)


@targets(gpu_sizes=(2, 4))
def test_streams(target: Target) -> None:
    target.run(_on_streams)


def _graph(rank: int, num_ranks: int, forks: bool) -> None:
    case = dataclasses.replace(BASE, recv_dtype="bf16")
    with cases.make_buffer(case, num_ranks, "cuda", "nvlink") as buffer:
        given = cases.arguments(buffer, case, cases.make_inputs(case, num_ranks)) | {"static": True}
        held = ("x", "topk_idx", "topk_weights")
        side = torch.cuda.Stream(buffer.device)

        def receive(hook: Hook) -> None:
            main = torch.cuda.current_stream()
            if forks:
                side.wait_stream(main)
            with torch.cuda.stream(side) if forks else contextlib.nullcontext():
                hook()
            if forks:
                main.wait_stream(side)

        def step() -> torch.Tensor:
            recv, handle, hook = buffer.dispatch(**given, return_recv_hook=True)
            receive(hook)
            out, hook = buffer.combine(recv.x * 3.0, handle, return_recv_hook=True)
            receive(hook)
            return out

        step()
        cases.sync(buffer)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = step()
        for turn, routes in enumerate(("random", "some", "none", "half", "one", "same_rank") * 2):
            changed: Any = {"routes": routes, "seed": 100 + turn}
            now = cases.arguments(buffer, case, cases.make_inputs(dataclasses.replace(case, **changed), num_ranks))
            for name in held:
                given[name].copy_(now[name])
            out.fill_(torch.nan)
            for _ in range(10):
                graph.replay()
            cases.sync(buffer)
            recv, handle = buffer.dispatch(**given)
            want = buffer.combine(recv.x * 3.0, handle)
            cases.sync(buffer)
            assert equal_bits(out, want), f"turn {turn}: the graph and a plain call differ"
            assert (routes == "none") == (not out.any())
        torch.cuda.synchronize()
        del graph
        cases.works(buffer, case)


@pytest.mark.gpu
@pytest.mark.parametrize("forks", [False, True], ids=["one_stream", "two_streams"])
def test_a_split_step_in_a_graph(pools: Pools, forks: bool) -> None:
    pools.get(2, "cuda").run(_graph, forks)


def _absent(rank: int, num_ranks: int) -> None:
    with cases.make_buffer(BASE, num_ranks, "cuda", "nvlink") as buffer:
        problems = run_case(buffer, BASE)
        assert not problems
    with cases.make_buffer(BASE, num_ranks, "cuda", "nvlink", deadline_s=2.0) as buffer:
        cases.works(buffer, BASE)
        if rank == 0:
            _, _, hook = split_dispatch(buffer)
            torch.cuda.synchronize(buffer.device)
            with pytest.raises(QcommTimeoutError) as caught:
                buffer.check()
            assert (caught.value.peer, caught.value.phase) == (1, "route")
            hook()
            torch.cuda.synchronize(buffer.device)
            with pytest.raises(QcommTimeoutError, match="rank 1"):
                split_dispatch(buffer)
        buffer.reset()
        hook = split_dispatch(buffer)[2]
        buffer.reset()
        refused(hook, QcommError, "dropped by reset()")
        cases.works(buffer, BASE)


@pytest.mark.gpu
def test_a_peer_that_does_not_come(pools: Pools) -> None:
    pools.get(2, "cuda").run(_absent)
