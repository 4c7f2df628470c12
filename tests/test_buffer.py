"""Buffers: life, agreement, arguments. After each failure the buffer must still give right answers."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from bit_patterns import equal_bits
from cases import BF16, MAX_TOKENS, Case
from ranks import DeviceKind, RankPool, Target, need_gpus, targets

from qcomm import (
    Buffer,
    DispatchHandle,
    FP8Tensor,
    MXFP4Tensor,
    QcommConfigError,
    QcommError,
    QcommPeerError,
    QcommRoutingError,
    QcommUnsupportedError,
    Received,
    WireFormat,
    WirePrecision,
    tuning,
    validate,
)
from qcomm import buffer as buffer_module
from qcomm.bootstrap import process_group
from qcomm.transport import streams

CASE = Case(combine_wire=BF16)
SHAPE: dict[str, Any] = {"num_experts": 4, "num_topk": 2, "hidden": 128, "num_max_tokens_per_rank": 4}
Words = tuple[str, ...]


@contextlib.contextmanager
def refuses(kind: type[BaseException], *words: object) -> Iterator[None]:
    """Require an error of exactly this kind whose message holds the words."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind, repr(caught.value)
    missing = [word for word in words if str(word) not in str(caught.value)]
    assert not missing, f"{caught.value!r} lacks {missing}"


def _properties(rank: int, num_ranks: int, device: str, backend: str) -> None:
    with cases.make_buffer(CASE, num_ranks, device, backend) as buffer:
        assert (buffer.rank, buffer.num_ranks, buffer.num_local_experts) == (rank, num_ranks, 3)
        assert buffer.backend == backend
        assert buffer.backend_reason
        assert (buffer.symmetric_bytes > 0) == (backend != "collective")
        assert buffer.device.type == device


@targets(2)
def test_properties(target: Target) -> None:
    target.run(_properties)


def _auto(rank: int, num_ranks: int) -> str:
    with cases.make_buffer(CASE, num_ranks, "cpu", "auto") as buffer:
        cases.works(buffer, CASE)
        return f"{buffer.backend}: {buffer.backend_reason}"


def test_auto_on_the_cpu(pool2: RankPool) -> None:
    assert all("collective" in said and "CPU" in said for said in pool2.run(_auto))


def _subgroup(rank: int, num_ranks: int, device: str, backend: str) -> None:
    group = dist.new_group([1, 2])
    if rank in (1, 2):
        with cases.make_buffer(CASE, 2, device, backend, group=group) as buffer:
            assert buffer.rank == rank - 1
            cases.works(buffer, CASE)
        dist.destroy_process_group(group)


@targets(3, gpu_sizes=(4,))
def test_group_of_some_ranks(target: Target) -> None:
    if target.backend == "nvshmem":
        pytest.skip("the processes of the pool have an NVSHMEM of all four")
    target.run(_subgroup)


def _side_by_side(rank: int, num_ranks: int, device: str, backend: str) -> None:
    half = num_ranks // 2
    groups = [dist.new_group(list(range(first, first + half))) for first in (0, half)]
    with cases.make_buffer(CASE, half, device, backend, group=groups[rank // half], ranks_per_node=1) as buffer:
        assert (buffer.backend, buffer.rank, buffer.num_ranks) == (backend, rank % half, half)
        for seed in range(3 + rank // half):
            cases.works(buffer, dataclasses.replace(CASE, seed=seed))


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "collective"), *(pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("collective", "nvshmem"))],
)
def test_groups_side_by_side(device: DeviceKind, backend: str) -> None:
    """Two groups of half the ranks each at once, not in step; with nvshmem each has an NVSHMEM of its own."""
    if device == "cuda":
        need_gpus(4)
    pool = RankPool(4, device)
    try:
        pool.run(_side_by_side, device, backend)
    finally:
        pool.close()


def _two_buffers(rank: int, num_ranks: int, device: str, backend: str) -> None:
    small = Case(combine_wire=BF16)
    large = Case(wire=BF16, combine_wire=cases.FP8, hidden=384, num_topk=1, num_local_experts=1)
    third = Case(wire=cases.FP8, combine_wire=cases.MXFP4, hidden=256, static=True)
    for last_first in (False, True):
        made = [(cases.make_buffer(case, num_ranks, device, backend), case) for case in (small, large, third)]
        for _ in range(2):
            for buffer, case in made:
                cases.works(buffer, case)
        if last_first:
            made.reverse()
        while made:
            made.pop(0)[0].destroy()
            for buffer, case in made:
                cases.works(buffer, case)


@targets(3)
def test_several_buffers(target: Target) -> None:
    target.run(_two_buffers)


def _interleaved(rank: int, num_ranks: int, device: str, backend: str, decode_tokens: int) -> None:
    """Two buffers on a stream each; where ranks need not call in one order, every other rank takes the other one.

    A call of several kernels that waits for the last rank keeps out no product that the other call waits for.
    """
    todo = [
        dataclasses.replace(CASE, static=True, routes="random", hidden=hidden, recv_dtype="bf16", wire=BF16)
        for hidden in (1024, 384)
    ]
    inputs = [cases.make_inputs(case, num_ranks) for case in todo]
    with tuning.force(decode_tokens=decode_tokens):
        buffers = [cases.make_buffer(case, num_ranks, device, backend) for case in todo]
    on_gpu = buffers[0].device.type == "cuda"
    streams = [torch.cuda.Stream(buffer.device) if on_gpu else None for buffer in buffers]
    given = []
    for buffer, one in zip(buffers, inputs, strict=True):
        x, idx = one.xs[rank], one.topk_idxs[rank]
        assert isinstance(x, torch.Tensor)
        given.append((x.to(buffer.device), idx.to(buffer.device)))

    def step(number: int) -> torch.Tensor:
        received, handle = buffers[number].dispatch(*given[number], static=True, alignment=32, recv_dtype="bf16")
        return buffers[number].combine(received.x, handle)

    factor = torch.zeros(4096 if on_gpu else 16, 4096, dtype=torch.bfloat16, device=buffers[0].device)

    def on_stream(number: int) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(streams[number]) if on_gpu else contextlib.nullcontext()

    want = [step(number) for number in range(2)]
    for number, buffer in enumerate(buffers):
        # A stream's first product allocates and loads, which waits for all kernels, whatever they wait for.
        with on_stream(number):
            torch.mm(factor, factor.T)
        cases.sync(buffer)
    outs: list[list[torch.Tensor]] = [[], []]
    for turn in range(30):
        swap = backend == "nvlink" and (rank + turn // 10) % 2 == 1
        for place, number in enumerate((1, 0) if swap else (0, 1)):
            with on_stream(number):
                if place == 1 and not decode_tokens:
                    torch.mm(factor, factor.T)
                outs[number].append(step(number))
    for number, buffer in enumerate(buffers):
        cases.sync(buffer)
        assert all(equal_bits(out, want[number]) for out in outs[number])
    for buffer in reversed(buffers):
        buffer.destroy()


@targets(2, 3)
@pytest.mark.parametrize("decode_tokens", [0, 256], ids=["many", "few"])
def test_buffers_on_streams_of_their_own(target: Target, decode_tokens: int) -> None:
    target.run(_interleaved, decode_tokens)


def _after_many_calls(rank: int, num_ranks: int, device: str, backend: str, decode_tokens: int) -> None:
    """Slots that no call has used hold 0, which is neither to be taken for a later call's number nor for an earlier."""
    todo = [CASE, dataclasses.replace(CASE, static=True, routes="random")]
    for calls in (2**31 - 2, 2**31 + 5, 2**32 - 3):
        with (
            tuning.force(decode_tokens=decode_tokens),
            cases.make_buffer(CASE, num_ranks, device, backend) as buffer,
        ):
            transport: Any = buffer._transport
            flags = transport._launcher.comm.barrier_flags
            begun = transport._memory.local[flags : flags + 4 * num_ranks]
            for words in (transport._state[:4], begun):
                words.view(torch.int32).fill_(calls if calls < 2**31 else calls - 2**32)
            torch.cuda.synchronize(buffer.device)
            dist.barrier()
            for case in 2 * todo:
                cases.works(buffer, case)


@pytest.mark.parametrize("decode_tokens", [0, 256], ids=["many", "few"])
def test_after_many_calls(gpu_pool: RankPool, decode_tokens: int) -> None:
    gpu_pool.run(_after_many_calls, "cuda", "nvlink", decode_tokens)


def _async(rank: int, num_ranks: int, device: str, backend: str) -> None:
    case = dataclasses.replace(CASE, routes="random")
    inputs = cases.make_inputs(case, num_ranks)
    weights = inputs.topk_weights
    assert weights is not None
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        x, idx, given = (t[rank].to(buffer.device) for t in (inputs.xs, inputs.topk_idxs, weights))  # type: ignore[union-attr]
        for static in (False, True):
            want, kept = buffer.dispatch(x, idx, given, alignment=32, static=static)
            recv, handle, event = buffer.dispatch(x, idx, given, alignment=32, static=static, async_op=True)
            event.wait()
            rows = int(want.group_offsets[-1])  # type: ignore[index]
            assert want.sf is not None
            assert recv.sf is not None
            assert equal_bits(recv.x[:rows], want.x[:rows])
            assert equal_bits(recv.sf[:rows], want.sf[:rows])
            again, _, event = buffer.dispatch(x, handle=handle, async_op=True)
            event.wait()
            assert equal_bits(again.x[:rows], want.x[:rows])
            y = torch.ones(*recv.x.shape, dtype=torch.bfloat16, device=buffer.device)
            out = buffer.combine(y, kept)
            later, event = buffer.combine(y, handle, async_op=True)
            event.wait()
            assert equal_bits(out, later)
            event.synchronize()
            assert event.query()
            cases.sync(buffer)


@targets(3)
def test_async_equals_sync(target: Target) -> None:
    target.run(_async)


def _results_are_the_callers(rank: int, num_ranks: int, device: str, backend: str) -> None:
    other = dataclasses.replace(CASE, seed=9)
    inputs = cases.make_inputs(CASE, num_ranks)
    with cases.make_buffer(CASE, num_ranks, device, backend) as buffer:
        first, handle = cases.dispatch(buffer, CASE, inputs)
        out = buffer.combine(torch.ones(*first.x.shape, dtype=torch.bfloat16, device=buffer.device), handle)
        copy = out.clone()
        for _ in range(3):
            cases.works(buffer, other)
        assert not cases.compare(CASE, first, handle, cases.expect(CASE, inputs, rank))
        assert equal_bits(out, copy)
    assert not cases.compare(CASE, first, handle, cases.expect(CASE, inputs, rank))


@targets(3)
def test_no_later_call_overwrites_a_result(target: Target) -> None:
    target.run(_results_are_the_callers)


def _handles(rank: int, num_ranks: int, device: str, backend: str) -> None:
    inputs = cases.make_inputs(CASE, num_ranks)
    x = cases.to(inputs.xs[rank], torch.device(device))
    with (
        cases.make_buffer(CASE, num_ranks, device, backend) as buffer,
        cases.make_buffer(CASE, num_ranks, device, backend) as other,
    ):
        recv, handle = cases.dispatch(buffer, CASE, inputs)
        y = torch.ones(*recv.x.shape, dtype=torch.bfloat16, device=buffer.device)
        for call in (lambda b: b.combine(y, handle), lambda b: b.dispatch(x, handle=handle)):
            with refuses(ValueError, "handle", "this buffer", "got"):
                call(other)
        cases.works(other, CASE)
        buffer.reset()
        for call in (lambda b: b.combine(y, handle), lambda b: b.dispatch(x, handle=handle)):
            with refuses(ValueError, "handle", "reset", "got"):
                call(buffer)
        cases.works(buffer, CASE)
        with refuses(TypeError, "handle", "DispatchHandle", "str"):
            buffer.combine(y, "handle")  # type: ignore[call-overload]
        recv, handle = cases.dispatch(buffer, CASE, inputs)
        buffer.destroy()
        buffer.destroy()
        for use in (
            lambda: buffer.combine(y, handle),
            lambda: buffer.dispatch(x, handle=handle),
            buffer.check,
            buffer.reset,
            lambda: buffer.symmetric_bytes,
        ):
            with refuses(QcommError, "destroyed"):
                use()
        cases.works(other, CASE)


@targets(2)
def test_foreign_stale_and_dead_handles(target: Target) -> None:
    target.run(_handles)


def _bad_route(rank: int, num_ranks: int, device: str, backend: str, static: bool) -> None:
    experts = 3 * num_ranks
    bad = num_ranks - 1
    with cases.make_buffer(CASE, num_ranks, device, backend) as buffer:
        for ids, words in (
            ([0, experts, 1], ("topk_idx[4]", f"[-1, {experts})", experts)),
            ([0, -2, 1], ("topk_idx[4]", f"[-1, {experts})", -2)),
            ([1, 0, 1], ("topk_idx[4]", "distinct", [1, 0, 1])),
        ):
            inputs = cases.make_inputs(CASE, num_ranks)
            inputs.topk_idxs[bad][4] = torch.tensor(ids)
            if static:
                # The device reports it later, to the rank that gave it.
                with contextlib.suppress(QcommPeerError), contextlib.suppress(QcommRoutingError):
                    cases.dispatch(buffer, CASE, inputs, static=True)
                    assert rank != bad, "the bad rank heard nothing"
            elif rank == bad:
                with refuses(QcommRoutingError, *words):
                    cases.dispatch(buffer, CASE, inputs)
            else:
                with refuses(QcommPeerError, f"rank {bad}", "topk_idx", 4):
                    cases.dispatch(buffer, CASE, inputs)
            cases.works(buffer, CASE)
            cases.works(buffer, dataclasses.replace(CASE, static=True))


@targets(3)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_bad_routes(target: Target, static: bool) -> None:
    target.run(_bad_route, static)


def _disagree(rank: int, num_ranks: int, device: str, backend: str) -> None:
    fp8 = WirePrecision("fp8", "bf16", "bf16", "bf16")
    for field, ours, theirs, shown in (
        ("hidden", {"hidden": 128}, {"hidden": 256}, (128, 256)),
        (
            "num_experts",
            {"num_experts": 3 * num_ranks},
            {"num_experts": 6 * num_ranks},
            (3 * num_ranks, 6 * num_ranks),
        ),
        ("num_topk", {"num_topk": 3}, {"num_topk": 2}, (3, 2)),
        ("num_max_tokens_per_rank", {}, {"num_max_tokens_per_rank": 40}, (MAX_TOKENS, 40)),
        ("precision.dispatch_fwd", {}, {"precision": fp8}, ("mxfp4", "fp8")),
    ):
        mine = theirs if rank == 1 else ours
        values = [shown[1] if r == 1 else shown[0] for r in range(num_ranks)]
        if field.startswith("precision"):
            words: Words = tuple(f"rank {r}: WireFormat(kind='{value}'" for r, value in enumerate(values))
        else:
            words = tuple(f"rank {r}: {value}" for r, value in enumerate(values))
        with refuses(QcommConfigError, field, *words):
            cases.make_buffer(CASE, num_ranks, device, backend, **mine)
    with cases.make_buffer(CASE, num_ranks, device, backend) as buffer:
        cases.works(buffer, CASE)


@targets(3, gpu_sizes=(2, 4))
def test_ranks_that_disagree(target: Target) -> None:
    target.run(_disagree)


def _bad_shapes(rank: int, num_ranks: int, device: str, backend: str) -> None:
    for kind, changes, words in (
        (ValueError, {"hidden": 192}, ("hidden", 128, 192)),
        (ValueError, {"hidden": 0}, ("hidden", "positive", 0)),
        (TypeError, {"hidden": 128.0}, ("hidden", "int", "float")),
        (ValueError, {"num_experts": 3 * num_ranks + 1}, ("num_experts", num_ranks, 3 * num_ranks + 1)),
        (ValueError, {"num_topk": 3 * num_ranks + 1}, ("num_topk", 3 * num_ranks, 3 * num_ranks + 1)),
        (ValueError, {"num_max_tokens_per_rank": -1}, ("num_max_tokens_per_rank", "positive", -1)),
        (ValueError, {"backend": "nccl"}, ("backend", "collective", "nvlink", "nccl")),
        (ValueError, {"provider": "mpi"}, ("provider", "nvshmem", "mpi")),
        (ValueError, {"num_sms": 0}, ("num_sms", "positive", 0)),
        (ValueError, {"deadline_s": 0.0}, ("deadline_s", "positive", 0)),
        (ValueError, {"deadline_s": float("inf")}, ("deadline_s", "at most", "inf")),
        (ValueError, {"deadline_s": float("nan")}, ("deadline_s", "positive", "nan")),
        (TypeError, {"deadline_s": "3"}, ("deadline_s", "number", "str")),
        (TypeError, {"precision": "mxfp4"}, ("precision", "WirePrecision", "str")),
    ):
        if num_ranks > 1 or "num_experts" not in changes:
            with refuses(kind, *words):
                cases.make_buffer(CASE, num_ranks, device, backend, **changes)
    with cases.make_buffer(CASE, num_ranks, device, backend) as buffer:
        cases.works(buffer, CASE)


@targets(2)
def test_shapes_that_no_buffer_has(target: Target) -> None:
    target.run(_bad_shapes)


Refusal = tuple[type[Exception], Callable[[], object], tuple[object, ...]]


def _bad_dispatches(
    b: Any, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, handle: DispatchHandle
) -> list[Refusal]:
    n = len(x)
    many = torch.zeros(MAX_TOKENS + 1, 3, dtype=torch.int64, device=x.device)
    bytes_ = x.view(torch.uint8)
    packed = MXFP4Tensor(bytes_[:, :64].contiguous(), bytes_[:, :4].contiguous())
    rotated = MXFP4Tensor(packed.qdata, packed.sf, hadamard=True)
    short = FP8Tensor(bytes_[:-1, :128].contiguous().view(torch.float8_e4m3fn), torch.ones(n - 1, 1, device=x.device))
    wide = torch.zeros(n, 256, dtype=torch.bfloat16, device=x.device)
    return [
        (TypeError, lambda: b.dispatch(x.half(), idx), ("x", "bfloat16", "float16")),
        (TypeError, lambda: b.dispatch(x.tolist(), idx), ("x", "torch.Tensor", "list")),
        (ValueError, lambda: b.dispatch(x.to("meta"), idx), ("x", b.device, "meta")),
        (ValueError, lambda: b.dispatch(wide[:, ::2], idx), ("x", "contiguous", "strides")),
        (ValueError, lambda: b.dispatch(wide, idx), ("x.shape", 128, (n, 256))),
        (ValueError, lambda: b.dispatch(x[0], idx), ("x.shape", 128, (128,))),
        (ValueError, lambda: b.dispatch(x[None], idx), ("x.shape", 128, (1, n, 128))),
        (ValueError, lambda: b.dispatch(x[1:], idx), ("x.shape", n, (n - 1, 128))),
        (ValueError, lambda: b.dispatch(short, idx), ("x.data.shape", n, (n - 1, 128))),
        (ValueError, lambda: b.dispatch(rotated, idx), ("x.hadamard", False, True)),
        (ValueError, lambda: b.dispatch(packed, idx, backward=True), ("x", "bfloat16", "MXFP4Tensor")),
        (TypeError, lambda: b.dispatch(x, idx.float()), ("topk_idx", "int32", "int64", "float32")),
        (TypeError, lambda: b.dispatch(x, idx.tolist()), ("topk_idx", "torch.Tensor", "list")),
        (ValueError, lambda: b.dispatch(x, idx.to("meta")), ("topk_idx", b.device, "meta")),
        (ValueError, lambda: b.dispatch(x, idx[:, :2].contiguous()), ("topk_idx.shape", 3, (n, 2))),
        (ValueError, lambda: b.dispatch(x, idx[0]), ("topk_idx.shape", 3, (3,))),
        (
            ValueError,
            lambda: b.dispatch(x, idx.t().contiguous().t()),
            ("topk_idx", "contiguous", "strides"),
        ),
        (ValueError, lambda: b.dispatch(x, many), ("topk_idx", MAX_TOKENS, MAX_TOKENS + 1)),
        (ValueError, lambda: b.dispatch(x), ("topk_idx", "handle", None)),
        (TypeError, lambda: b.dispatch(x, idx, w.double()), ("topk_weights", "float32", "float64")),
        (ValueError, lambda: b.dispatch(x, idx, w[1:]), ("topk_weights.shape", n, (n - 1, 3))),
        (ValueError, lambda: b.dispatch(x, idx, w.to("meta")), ("topk_weights", b.device, "meta")),
        (ValueError, lambda: b.dispatch(x, idx, handle=handle), ("topk_idx", "handle", None)),
        (ValueError, lambda: b.dispatch(x, None, w, handle=handle), ("topk_weights", "handle", None)),
        (
            ValueError,
            lambda: b.dispatch(x, handle=handle, recv_layout="batched"),
            ("recv_layout", "expert_major", "batched"),
        ),
        (ValueError, lambda: b.dispatch(x, handle=handle, alignment=64), ("alignment", 32, 64)),
        (ValueError, lambda: b.dispatch(x, handle=handle, static=True), ("static", False, True)),
        (ValueError, lambda: b.dispatch(x[1:], handle=handle), ("x.shape", n, (n - 1, 128))),
        (
            ValueError,
            lambda: b.dispatch(x, idx, recv_layout="rows"),
            ("recv_layout", "token_major", "rows"),
        ),
        (ValueError, lambda: b.dispatch(x, idx, recv_dtype="fp4"), ("recv_dtype", "mxfp4", "'fp4'")),
        (TypeError, lambda: b.dispatch(x, idx, sf_layout="row_major"), ("sf_layout", "ScaleLayout", "str")),
        (ValueError, lambda: b.dispatch(x, idx, alignment=0), ("alignment", "positive", 0)),
        (TypeError, lambda: b.dispatch(x, idx, alignment=1.5), ("alignment", "int", "float")),
        (
            ValueError,
            lambda: b.dispatch(x, idx, num_max_recv_tokens=128),
            ("num_max_recv_tokens", "static", 128),
        ),
        (
            ValueError,
            lambda: b.dispatch(x, idx, static=True, num_max_recv_tokens=100),
            ("num_max_recv_tokens", 128, 100),
        ),
        (ValueError, lambda: b.dispatch(x, idx, columnwise=True, alignment=64), ("alignment", 128, 64)),
        (
            ValueError,
            lambda: b.dispatch(x, idx, columnwise=True, recv_layout="batched"),
            ("columnwise", "expert_major", "batched"),
        ),
        (
            ValueError,
            lambda: b.dispatch(x, idx, columnwise=True, recv_dtype="bf16"),
            ("columnwise", "fp8", "bf16"),
        ),
        (TypeError, lambda: b.dispatch(x, idx, static="no"), ("static", "bool", "str")),
        (TypeError, lambda: b.dispatch(x, idx, backward="no"), ("backward", "bool", "str")),
    ]


def _bad_combines(b: Any, y: torch.Tensor, handle: DispatchHandle) -> list[Refusal]:
    n = len(y)
    by_column = y.t().contiguous().t()
    return [
        (TypeError, lambda: b.combine(y.float(), handle), ("y", "bfloat16", "float32")),
        (ValueError, lambda: b.combine(y[1:], handle), ("y.shape", n, (n - 1, 128))),
        (ValueError, lambda: b.combine(y[None], handle), ("y.shape", n, (1, n, 128))),
        (ValueError, lambda: b.combine(y.to("meta"), handle), ("y", b.device, "meta")),
        (ValueError, lambda: b.combine(by_column, handle), ("y", "contiguous", "strides")),
        (TypeError, lambda: b.combine(y, None), ("handle", "DispatchHandle", "NoneType")),
        (TypeError, lambda: b.combine(y, handle, weighted=None), ("weighted", "bool", "NoneType")),
        (TypeError, lambda: b.combine(y, handle, backward=2), ("backward", "bool", "int")),
        (TypeError, lambda: b.combine(y, handle, async_op="x"), ("async_op", "bool", "str")),
    ]


def _bad_arguments(rank: int, num_ranks: int, device: str, backend: str) -> None:
    case = dataclasses.replace(CASE, routes="random")
    inputs = cases.make_inputs(case, num_ranks)
    weights = inputs.topk_weights
    x = inputs.xs[rank]
    assert weights is not None
    assert isinstance(x, torch.Tensor)
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        recv, handle = cases.dispatch(buffer, case, inputs)
        here = buffer.device
        y = torch.ones(*recv.x.shape, dtype=torch.bfloat16, device=here)
        idx = inputs.topk_idxs[rank].to(here)
        for kind, call, words in (
            *_bad_dispatches(buffer, x.to(here), idx, weights[rank].to(here), handle),
            *_bad_combines(buffer, y, handle),
        ):
            with refuses(kind, *words):
                call()
            cases.works(buffer, case)
        token_major, route = cases.dispatch(buffer, case, inputs, recv_layout="token_major")
        sums = torch.ones(*token_major.x.shape, dtype=torch.bfloat16, device=here)
        with refuses(ValueError, "weighted", False, "token_major", True):
            buffer.combine(sums, route)
        cases.works(buffer, CASE)


@targets(2)
def test_bad_arguments(target: Target) -> None:
    target.run(_bad_arguments)


def _wrong_for_the_wire(rank: int, num_ranks: int, device: str, backend: str) -> None:
    inputs = cases.make_inputs(CASE, num_ranks)
    x = cases.to(inputs.xs[rank], torch.device(device))
    assert isinstance(x, torch.Tensor)
    with cases.make_buffer(CASE, num_ranks, device, backend) as buffer:
        for wire in ("bf16", "fp8"):
            precision = WirePrecision(wire, "bf16", "bf16", "bf16")
            with cases.make_buffer(CASE, num_ranks, device, backend, precision=precision) as other:
                packed = MXFP4Tensor(
                    torch.zeros(13, 64, dtype=torch.uint8, device=buffer.device),
                    torch.zeros(13, 4, dtype=torch.uint8, device=buffer.device),
                )
                idx = torch.zeros(13, 3, dtype=torch.int64, device=buffer.device)
                with refuses(ValueError, "x", wire, "MXFP4Tensor"):
                    other.dispatch(packed, idx)
                cases.works(other, dataclasses.replace(CASE, wire=WireFormat(wire)))


@targets(2)
def test_tokens_that_the_wire_cannot_carry(target: Target) -> None:
    target.run(_wrong_for_the_wire)


def _wrong_gpu_tensors(rank: int, num_ranks: int) -> None:
    inputs = cases.make_inputs(CASE, num_ranks)
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink") as buffer:
        x, idx = inputs.xs[rank], inputs.topk_idxs[rank]
        with refuses(ValueError, "topk_idx", "cuda", "cpu"):
            buffer.dispatch(x, idx)
        with refuses(ValueError, "x", "cuda", "cpu"):
            buffer.dispatch(x, idx.to(buffer.device))
        cases.works(buffer, CASE)


@pytest.mark.gpu
def test_cpu_tensors_on_a_gpu_buffer(gpu_pool: RankPool) -> None:
    gpu_pool.run(_wrong_gpu_tensors)


def _with_another_gpu_current(rank: int, num_ranks: int) -> None:
    other = (rank + 1) % torch.cuda.device_count()
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink") as buffer, torch.cuda.device(other):
        cases.works(buffer, CASE)


@pytest.mark.gpu
def test_another_gpu_may_be_current(gpu_pool: RankPool) -> None:
    gpu_pool.run(_with_another_gpu_current)


def _undestroyed(rank: int, num_ranks: int) -> None:
    buffer = cases.make_buffer(CASE, num_ranks, "cpu", "collective")
    with pytest.warns(ResourceWarning, match="not destroyed"):
        del buffer


def test_a_buffer_that_nobody_destroyed_warns(pool2: RankPool) -> None:
    pool2.run(_undestroyed)


def test_no_group() -> None:
    with refuses(ValueError, "group", "torch.distributed", "bootstrap"):
        Buffer(num_experts=1, num_topk=1, hidden=128, num_max_tokens_per_rank=1)


def test_compute_capability() -> None:
    validate.compute_capability((9, 0))
    validate.compute_capability((10, 3))
    with pytest.raises(QcommUnsupportedError, match=re.escape("8.0")) as caught:
        validate.compute_capability((8, 0))
    assert "9.0" in str(caught.value)
    assert caught.value.seen == (8, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WireFormat("int8"), ("kind", "mxfp4", "int8")),  # type: ignore[arg-type]
        (lambda: WireFormat("fp8", hadamard=True), ("hadamard", "mxfp4", "fp8")),
        (lambda: WirePrecision("fp4"), ("kind", "mxfp4", "fp4")),  # type: ignore[arg-type]
    ],
)
def test_formats_that_do_not_exist(make: Callable[[], object], words: Words) -> None:
    with refuses(ValueError, *words):
        make()


def test_received_as_one_tensor(pool2: RankPool) -> None:
    assert pool2.run(_as_tensors) == [None, None]


def _as_tensors(rank: int, num_ranks: int) -> None:
    for dtype, kind in (("bf16", torch.Tensor), ("fp8", FP8Tensor), ("mxfp4", MXFP4Tensor)):
        for layout in ("expert_major", "batched", "token_major"):
            case = dataclasses.replace(CASE, recv_dtype=dtype, recv_layout=layout)  # type: ignore[arg-type]
            with cases.make_buffer(case, num_ranks, "cpu", "collective") as buffer:
                recv: Received = cases.dispatch(buffer, case, cases.make_inputs(case, num_ranks))[0]
                whole = recv.tensor()
                assert isinstance(whole, kind)
                assert whole.shape == (recv.x.shape[:-1].numel(), 128)


def test_calls_are_ranges_in_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def record(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    monkeypatch.setattr(torch.cuda.nvtx, "range", record)
    with streams.profiled("dispatch", torch.device("cpu")):
        assert entered == []
    with streams.profiled("dispatch", torch.device("cuda", 0)):
        assert entered == ["qcomm.dispatch"]
    monkeypatch.setattr(buffer_module, "profiled", lambda name, device: record(f"{device.type} {name}"))
    with process_group() as launch, Buffer(device=launch.device, **SHAPE) as buffer:
        x, idx = torch.zeros(2, 128, dtype=torch.bfloat16), torch.tensor([[0, 1], [1, -1]])
        received, handle = buffer.dispatch(x, idx)
        buffer.dispatch(x, handle=handle)
        buffer.combine(received.x.to(torch.bfloat16), handle)
    assert entered[1:] == ["cpu dispatch", "cpu replay", "cpu combine"]
