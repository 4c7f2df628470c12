"""Dispatch and combine under torch.compile: the oracle's rows, eager's bits, one graph if static, calls in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
import torch._functorch.config as functorch_config
from bit_patterns import equal_bits
from cases import BF16, FP8, MXFP4, OPTIONS, Case
from fake_cuda import FakeCuda, nvlink_buffer
from ranks import NODES, Target, targets
from torch.utils.checkpoint import checkpoint

import qcomm
from qcomm import Buffer, DispatchHandle, QcommRoutingError, Received, WirePrecision
from qcomm.flattened import cut, facts_of, handle_of, joined, route_of, shapes_of
from qcomm.formats import ScaleLayout
from qcomm.handle import Owner
from qcomm.transport.nvlink import NvlinkTransport

COMPILERS = ("aot_eager", "inductor")
LEGS = WirePrecision(MXFP4, BF16, FP8, BF16)
BASE = Case(recv_dtype="bf16", wire=MXFP4, num_topk=3, static=True)
CASES = (
    BASE,
    dataclasses.replace(BASE, recv_layout="batched", recv_dtype="fp8"),
    dataclasses.replace(BASE, recv_dtype="mxfp4", x="mxfp4", counts="empty"),
    dataclasses.replace(BASE, recv_dtype="fp8", alignment=128, columnwise=True, sf_layout=ScaleLayout.COLUMN_MAJOR),
    dataclasses.replace(BASE, recv_layout="token_major", capacity=150),
    dataclasses.replace(BASE, recv_dtype="fp8", x="fp8", has_weights=False),
)

Layer = Callable[..., tuple[torch.Tensor, Received | None, DispatchHandle | None]]


def make_layer(buffer: Buffer, case: Case) -> Layer:
    """Make a layer of experts whose arithmetic is exact, so that no compiler changes its bits."""

    def layer(
        x: Any, idx: torch.Tensor | None, weights: torch.Tensor | None, seed: int, handle: DispatchHandle | None = None
    ) -> tuple[torch.Tensor, Received, DispatchHandle]:
        recv, handle = qcomm.dispatch(
            x,
            idx,
            weights,
            buffer,
            handle=handle,
            recv_layout=case.recv_layout,
            recv_dtype=case.recv_dtype,
            alignment=case.alignment,
            columnwise=case.columnwise,
            sf_layout=case.sf_layout,
            static=case.static,
            num_max_recv_tokens=case.capacity if handle is None else None,
            seed=seed,
        )
        y = recv.x if recv.grad_carrier is None else recv.grad_carrier
        if recv.topk_weights is not None:
            y = (recv.topk_weights[:, :1] * y).to(torch.bfloat16)
        return qcomm.combine(torch.relu(y) * 2, handle, seed=seed), recv, handle

    return layer


def run(buffer: Buffer, layer: Layer, case: Case, seed: int = 0, **options: Any) -> tuple[list[torch.Tensor], Any, Any]:
    """Run a layer forward and backward; returns output and gradients, what came, and the handle."""
    inputs = cases.make_inputs(dataclasses.replace(case, seed=seed), buffer.num_ranks)
    given = cases.arguments(buffer, case, inputs)
    x, weights = given["x"], given["topk_weights"]
    leaves = [x.requires_grad_()] if isinstance(x, torch.Tensor) else []
    leaves += [] if weights is None else [weights.requires_grad_()]
    idx = None if "handle" in options else given["topk_idx"]
    out, recv, handle = layer(x, idx, weights, seed, **options)
    if out.requires_grad:
        out.backward(torch.ones_like(out))
    cases.sync(buffer)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)], recv, handle


def same(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], loose: bool = False) -> bool:
    """Whether results have the same bits; the last, a gradient of weights, only about the same values if loose."""
    bits = [equal_bits(a, b) for a, b in zip(got, want, strict=True)]
    return all(bits[:-1]) and (bits[-1] or (loose and torch.allclose(got[-1], want[-1], rtol=1e-4, atol=1e-3)))


def _static(rank: int, num_ranks: int, device: str, backend: str, compiler: str, todo: Sequence[Case]) -> list[str]:
    problems = []
    for case in todo:
        torch.compiler.reset()
        with cases.make_buffer(case, num_ranks, device, backend, precision=LEGS) as buffer:
            layer = make_layer(buffer, case)
            compiled = torch.compile(layer, fullgraph=True, backend=compiler)
            want, _, _ = run(buffer, layer, case)
            got, recv, handle = run(buffer, compiled, case)
            expected = cases.expect(case, cases.make_inputs(case, num_ranks), rank)
            problems += [f"{compiler}, {case}: {problem}" for problem in cases.compare(case, recv, handle, expected)]
            # Only token_major experts multiply by weights here, whose gradient is a sum in the compiler's order.
            if len(got) != len(want) or not same(got, want, loose=case.recv_layout == "token_major"):
                problems.append(f"{compiler}, {case}: out or gradients differ")
            # A handle that left a graph is replayed, by eager code and in a graph.
            for again in (layer, compiled):
                replayed, _, _ = run(buffer, again, case, handle=handle)
                if not same(replayed, want, loose=case.recv_layout == "token_major"):
                    problems.append(f"{compiler}, {case}: a replay differs")
    return problems


@targets(2)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_static_calls_are_one_graph_with_eagers_bits(target: Target, compiler: str) -> None:
    todo = CASES if compiler == "aot_eager" else (CASES[0], CASES[1], CASES[4])
    cases.no_problems(target.run(_static, compiler, todo))


# torch 2.11 takes a symbolic size that a graph keeps for a tensor whose memory it could reuse.
@functorch_config.patch(donated_buffer=torch.__version__ >= "2.12")
def _steps(rank: int, num_ranks: int, device: str, backend: str) -> None:
    torch.compiler.reset()
    with cases.make_buffer(BASE, num_ranks, device, backend, precision=LEGS) as buffer:
        layer = make_layer(buffer, BASE)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for step in range(4):
            case = dataclasses.replace(BASE, counts="uneven" if step % 2 else "many")
            # A seed of 0 or 1 would be compiled by itself.
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                got, _, _ = run(buffer, compiled, case, seed=step + 5)
            want, _, _ = run(buffer, layer, case, seed=step + 5)
            assert same(got, want)


@targets(2)
def test_steps_compile_nothing_anew(target: Target) -> None:
    target.run(_steps)


def _order(rank: int, num_ranks: int, device: str, backend: str, compiler: str) -> None:
    torch.compiler.reset()
    with cases.make_buffer(BASE, num_ranks, device, backend, precision=LEGS) as buffer:
        calls: list[tuple[str, int]] = []

        def note(name: str, call: Any) -> Any:
            def noted(*args: Any, **options: Any) -> Any:
                calls.append((name, args[-1] if name == "_return_gradients" else options["seed"]))
                return call(*args, **options)

            return noted

        for name in ("dispatch", "combine", "_return_gradients"):
            setattr(buffer, name, note(name, getattr(buffer, name)))
        layer = make_layer(buffer, BASE)

        def two(x: Any, idx: torch.Tensor, weights: torch.Tensor, seed: int) -> tuple[Any, ...]:
            # Nothing of the first call is used; the other two do not depend on each other.
            layer(x, idx, weights, seed + 1)
            (a, *_), (b, *others) = layer(x, idx, weights, seed + 2), layer(x * 2, idx, weights, seed + 3)
            return a + b, *others

        want, _, _ = run(buffer, two, BASE)
        eager, calls[:] = list(calls), []
        got, _, _ = run(buffer, torch.compile(two, fullgraph=True, backend=compiler), BASE)
        assert calls[:6] == eager[:6]
        assert [name for name, _ in calls[:6]] == ["dispatch", "combine"] * 3
        assert sorted(calls) == sorted(eager)
        assert same(got[:1], want[:1])
        assert all(torch.allclose(a, b, rtol=2**-6, atol=1e-3, equal_nan=True) for a, b in zip(got, want, strict=True))


@targets(2)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_calls_keep_the_programs_order_and_none_is_dropped(target: Target, compiler: str) -> None:
    target.run(_order, compiler)


def _outside(rank: int, num_ranks: int, device: str, backend: str, static: bool) -> None:
    torch.compiler.reset()
    case = dataclasses.replace(BASE, static=static)
    with cases.make_buffer(case, num_ranks, device, backend, precision=LEGS) as buffer:
        layer = make_layer(buffer, case)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="static=True"):
            run(buffer, torch.compile(layer, fullgraph=True, backend="aot_eager"), case)
        compiled = torch.compile(layer, backend="inductor")
        for step in range(6):
            with torch.compiler.set_stance("fail_on_recompile" if step > 2 else "default"):
                got, _, _ = run(buffer, compiled, case, seed=step + 5)
            want, _, _ = run(buffer, layer, case, seed=step + 5)
            assert same(got, want)


@targets(2)
def test_other_calls_break_the_graph_and_are_right(target: Target) -> None:
    target.run(_outside, False)


@targets(gpu_sizes=(), nodes=NODES)
def test_relayed_calls_break_the_graph_and_are_right(target: Target) -> None:
    target.run(_outside, True)


def _recomputed(rank: int, num_ranks: int, device: str, backend: str, replays: bool) -> tuple[int, int]:
    torch.compiler.reset()
    with cases.make_buffer(BASE, num_ranks, device, backend, precision=LEGS) as buffer:
        compiled = torch.compile(make_layer(buffer, BASE), fullgraph=True, backend="aot_eager")
        route = SimpleNamespace(handle=None)

        def kept(x: Any, weights: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
            out, _, handle = compiled(x, None if route.handle is not None else idx, weights, 5, route.handle)
            if replays:
                route.handle = route.handle or handle
            return out

        def recomputing(x: Any, idx: torch.Tensor, weights: torch.Tensor, seed: int) -> tuple[Any, None, None]:
            # Without reentry torch wants the very graph of the forward pass, which one that replays is not.
            return checkpoint(kept, x, weights, idx, use_reentrant=replays), None, None

        want, _, _ = run(buffer, make_layer(buffer, BASE), BASE, seed=5)
        got, _, _ = run(buffer, recomputing, BASE, seed=5)
        assert same(got, want)
        stats = buffer.stats()
        return stats.num_dispatches, stats.num_replays


@targets(2)
@pytest.mark.parametrize("replays", [True, False])
def test_checkpointing_around_a_compiled_layer(target: Target, replays: bool) -> None:
    # As in eager code: two forward passes route; the two gradients of combine replay, and the recomputation if told to.
    assert set(target.run(_recomputed, replays)) == {(2, 3) if replays else (3, 2)}


def _refused(rank: int, num_ranks: int, device: str, backend: str) -> None:
    torch.compiler.reset()
    with cases.make_buffer(BASE, num_ranks, device, backend, precision=LEGS) as buffer:
        compiled = torch.compile(make_layer(buffer, BASE), backend="aot_eager")
        given = cases.arguments(buffer, BASE, cases.make_inputs(BASE, num_ranks))
        x, idx, weights = given["x"].requires_grad_(), given["topk_idx"], given["topk_weights"]
        out, _, handle = compiled(x, idx, weights, 0)
        assert handle is not None
        (grad,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()
        with pytest.raises(ValueError, match="alignment must be the handle's, 32, got 64"):
            torch.compile(lambda: qcomm.dispatch(x, None, None, buffer, handle=handle, alignment=64))()
        bad = torch.full_like(idx, 10**6)
        # Without combine, which raises on a rank that knows by then and keeps one that does not waiting.
        dispatch = torch.compile(
            lambda idx: qcomm.dispatch(x, idx, weights, buffer, static=True, num_max_recv_tokens=BASE.capacity),
            backend="aot_eager",
        )
        with pytest.raises(QcommRoutingError):
            _ = dispatch(bad), cases.sync(buffer)  # type: ignore[func-returns-value]
        buffer.reset()
        with pytest.raises(ValueError, match="handle must be newer than the last reset"):
            torch.compile(qcomm.combine, backend="aot_eager")(
                handle.row_src.new_zeros(handle.num_rows, 128).bfloat16(), handle
            )


@targets(2)
def test_errors(target: Target) -> None:
    target.run(_refused)


@pytest.mark.parametrize("layout", ["expert_major", "token_major"])
def test_a_handle_is_taken_apart_and_put_together(layout: Any) -> None:
    facts = [3, 1, 32, 64, 0, 1]
    shapes = shapes_of(layout, facts, sizes := [2, 3, 4, 10], 5)
    words = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sizes[2] == shapes["record_topk_idx"][1]
    memory = torch.randint(2**31 - 1, (words + 7,), dtype=torch.int32)
    handle = handle_of(layout, facts, cut(memory, shapes))
    assert facts_of(handle) == facts
    assert joined(handle, shapes).data_ptr() == memory.data_ptr()
    apart = dataclasses.replace(
        handle, num_tokens_per_expert=handle.num_tokens_per_expert.clone(), row_src=handle.row_src.clone()
    )
    piece = joined(apart, shapes)
    assert piece.shape == (words,)
    again = handle_of(layout, facts, cut(piece, shapes))
    for a, b in zip(route_of(again), route_of(handle), strict=True):
        assert equal_bits(a, b)


@pytest.mark.parametrize("layout", ["expert_major", "batched", "token_major"])
def test_nvlinks_handle_is_joined_without_a_copy(layout: Any) -> None:
    options = dataclasses.replace(OPTIONS, recv_layout=layout, recv_dtype="bf16", alignment=32, static=True, wire=BF16)
    transport: Any = SimpleNamespace(
        _config=SimpleNamespace(num_max_tokens_per_rank=16, num_topk=4),
        _member=SimpleNamespace(num_ranks=2, device=torch.device("cpu")),
        _layout=SimpleNamespace(num_local_experts=3),
        _forward_nodes=0,
        _forward_shapes=(),
    )
    handle = NvlinkTransport._draft(transport, 5, options).handle(Owner(3, 1), options, has_weights=False)
    shapes = shapes_of(layout, facts_of(handle), [2, 3, 4, 32], 5)
    again = handle_of(layout, facts_of(handle), cut(joined(handle, shapes), shapes))
    for a, b in zip(route_of(again), route_of(handle), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert not a.numel() or a.data_ptr() == b.data_ptr()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_nvlinks_results_share_no_memory(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    """An operator of torch may not return two tensors over one piece of memory."""
    shape: dict[str, Any] = {"num_experts": 2, "num_topk": 2, "hidden": 128, "num_max_tokens_per_rank": 8}
    torch.compiler.reset()
    with nvlink_buffer(monkeypatch, FakeCuda(), **shape) as (buffer, _):
        x, idx = torch.zeros(5, 128, dtype=torch.bfloat16), torch.zeros(5, 2, dtype=torch.int64)
        weights = torch.ones(5, 2)

        def layer(x: torch.Tensor) -> tuple[torch.Tensor, DispatchHandle]:
            received, handle = qcomm.dispatch(x, idx, weights, buffer, static=True, recv_dtype="bf16")
            again, _ = qcomm.dispatch(x, None, None, buffer, handle=handle, recv_dtype="bf16")
            return received.x + again.x, handle

        out, handle = torch.compile(layer, backend=compiler, fullgraph=True)(x)
    assert out.shape == (handle.num_rows, 128)
