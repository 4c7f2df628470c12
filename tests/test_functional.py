"""Differentiable dispatch and combine: gradients against finite differences, and bit by bit against the oracle."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from bit_patterns import equal_bits
from cases import BF16, FP8, MXFP4, ROTATED, ROTATED_STOCHASTIC, STOCHASTIC, Case, Inputs, grid
from ranks import NODES, Target, targets
from torch.utils.checkpoint import checkpoint

import qcomm
from qcomm import Buffer, FP8Tensor, Received, WireFormat, WirePrecision, reference, reference_exchange
from qcomm.formats import RecvDtype, RecvLayout, Rounding
from qcomm.gradients import BACKWARD_SEED

BY_EXPERT = ("expert_major", "batched")
BASE = Case(recv_dtype="bf16", wire=BF16, combine_wire=BF16, num_topk=3)


class ExactBuffer:
    """One rank's exchange in float64 that rounds nothing, for finite differences."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        handle: Any = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        if handle is None:
            assert topk_idx is not None
            rows = reference_exchange.arrange(0, [topk_idx], None, num_experts=self._num_experts, alignment=2)
            entries = list(rows.rows_of_token.items())
            row_weights = torch.zeros(len(rows.token_of_row), dtype=torch.float64)
            for (_, token), found in entries:
                experts = [j for j, expert in enumerate(topk_idx[token].tolist()) if expert >= 0]
                for (row, _), j in zip(found, experts, strict=True):
                    row_weights[row] = 1.0 if topk_weights is None else topk_weights[token, j]
            handle = DispatchLike(rows, topk_idx, row_weights, self)
        data = torch.zeros(len(handle.rows.token_of_row), x.shape[1], dtype=torch.float64)
        for row, token in enumerate(handle.rows.token_of_row):
            if token is not None:
                data[row] = x[token[1]]
        return ReceivedLike(data, handle.row_weights), handle

    def combine(self, y: torch.Tensor, handle: Any, *, weighted: bool = True, **options: Any) -> torch.Tensor:
        return self._sum(y, None, handle, weighted)[0]

    def _return_gradients(
        self, rows: torch.Tensor, row_values: torch.Tensor | None, handle: Any, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._sum(rows, row_values, handle, weighted=False)

    def _sum(
        self, y: torch.Tensor, row_values: torch.Tensor | None, handle: Any, weighted: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.zeros(len(handle.topk_idx), y.shape[1], dtype=torch.float64)
        values = torch.zeros(handle.topk_idx.shape, dtype=torch.float64)
        for (_, token), found in handle.rows.rows_of_token.items():
            experts = [j for j, expert in enumerate(handle.topk_idx[token].tolist()) if expert >= 0]
            for (row, _), j in zip(found, experts, strict=True):
                out[token] += (handle.row_weights[row] if weighted else 1.0) * y[row]
                if row_values is not None:
                    values[token, j] = row_values[row]
        return out, values


@dataclasses.dataclass(frozen=True, eq=False)
class DispatchLike:
    """What the functions ask of a handle."""

    rows: reference_exchange.ExpectedRows
    topk_idx: torch.Tensor
    row_weights: torch.Tensor
    buffer: ExactBuffer
    recv_layout: str = "expert_major"
    static: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class ReceivedLike:
    """What the functions ask of what came."""

    x: torch.Tensor
    weights: torch.Tensor
    grad_carrier: torch.Tensor | None = None


@pytest.mark.parametrize("where", ["combine", "experts"])
def test_gradients_are_those_of_finite_differences(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffer, "of", lambda handle: handle.buffer)
    generator = torch.Generator().manual_seed(3)
    idx = torch.tensor([[0, 2, -1], [1, 0, 3], [-1, -1, -1], [3, -1, 2]])
    x = torch.randn(4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    buffer: Any = ExactBuffer(4)

    def layer(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        recv, handle = qcomm.dispatch(x, idx, weights, buffer)
        y = torch.tanh(recv.x) * recv.x
        if where == "combine":
            return qcomm.combine(y, handle)
        assert recv.weights is not None
        return qcomm.combine(recv.weights[:, None] * y, handle, weighted=False)

    assert torch.autograd.gradcheck(layer, (x, weights))
    # Entries that name no expert have no gradient.
    (d_weights,) = torch.autograd.grad(layer(x, weights).sum(), weights)
    assert (d_weights[idx < 0] == 0).all()
    assert (d_weights[idx >= 0] != 0).all()


def test_differentiating_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffer, "of", lambda handle: handle.buffer)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    buffer: Any = ExactBuffer(2)
    recv, handle = qcomm.dispatch(x, torch.tensor([[0], [1]]), None, buffer)
    (grad,) = torch.autograd.grad(qcomm.combine(recv.x.square(), handle).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def _buffer(case: Case, legs: Sequence[WireFormat], num_ranks: int, device: str, backend: str) -> Buffer:
    return cases.make_buffer(case, num_ranks, device, backend, precision=WirePrecision(*legs))


def _leaf(x: Any, device: torch.device) -> torch.Tensor:
    return x.to(device).clone().requires_grad_()


def _gradients(
    case: Case, inputs: Inputs, legs: Sequence[WireFormat], weighted: bool, nodes: dict[str, Any]
) -> list[list[torch.Tensor]]:
    """Ask the oracle for out, d_x and d_topk_weights of every rank, of a layer whose experts do nothing."""
    num_ranks, experts = len(inputs.xs), case.num_local_experts * len(inputs.xs)
    tokens = [len(idx) for idx in inputs.topk_idxs]
    common: dict[str, Any] = {"num_experts": experts, "recv_layout": case.recv_layout, "alignment": case.alignment}
    came = reference_exchange.dispatch(
        inputs.xs, inputs.topk_idxs, inputs.topk_weights, wire=legs[0], recv_dtype="bf16", seed=case.seed, **common
    )
    rows = [each.rows for each in came]
    ys = [each.x for each in came]
    outs = reference_exchange.combine(ys, rows, tokens, wire=legs[1], weighted=weighted, seed=case.seed, **nodes)
    back = case.seed ^ BACKWARD_SEED
    returned = reference_exchange.dispatch(
        _upstream(inputs), inputs.topk_idxs, None, wire=legs[2], recv_dtype="bf16", seed=back, **common
    )
    d_rows, d_weights = [], [torch.zeros(len(idx), case.num_topk) for idx in inputs.topk_idxs]
    for rank, (each, y) in enumerate(zip(returned, ys, strict=True)):
        weights = torch.tensor(rows[rank].weight_of_row)[:, None]
        d_rows.append((weights * each.x).to(torch.bfloat16) if weighted else each.x)
        products = (each.x.float() * y.float()).sum(-1)
        for (source, token), entries in rows[rank].topk_of_token.items():
            places = iter(rows[rank].rows_of_token[source, token])
            for j, (expert, _) in enumerate(entries):
                if expert >= 0 and weighted:
                    d_weights[source][token, j] = products[next(places)[0]]
    d_xs = reference_exchange.combine(d_rows, rows, tokens, wire=legs[3], weighted=False, seed=back, **nodes)
    return [[outs[r], d_xs[r], d_weights[r]] for r in range(num_ranks)]


def _upstream(inputs: Inputs) -> list[torch.Tensor]:
    """Make the gradients of every rank's output."""
    return [
        torch.randn(len(idx), inputs.xs[0].shape[1], generator=torch.Generator().manual_seed(50 + rank)).bfloat16()
        for rank, idx in enumerate(inputs.topk_idxs)
    ]


def _against_the_oracle(
    rank: int, num_ranks: int, device: str, backend: str, todo: Sequence[tuple[Case, tuple[WireFormat, ...], bool]]
) -> list[str]:
    problems = []
    for case, legs, weighted in todo:
        inputs = cases.make_inputs(case, num_ranks)
        with _buffer(case, legs, num_ranks, device, backend) as buffer:
            want = _gradients(case, inputs, legs, weighted, cases.node_sums(buffer))[rank]
            x, idx = _leaf(inputs.xs[rank], buffer.device), inputs.topk_idxs[rank].to(buffer.device)
            assert inputs.topk_weights is not None
            weights = _leaf(inputs.topk_weights[rank], buffer.device)
            recv, handle = qcomm.dispatch(
                x,
                idx,
                weights,
                buffer,
                recv_layout=case.recv_layout,
                recv_dtype="bf16",
                alignment=case.alignment,
                static=case.static,
                seed=case.seed,
            )
            out = qcomm.combine(recv.x, handle, weighted=weighted, seed=case.seed)
            out.backward(_upstream(inputs)[rank].to(buffer.device))
            cases.sync(buffer)
            assert x.grad is not None
            d_weights = weights.grad if weighted else torch.zeros_like(weights)
            assert d_weights is not None
            got = [out.detach(), x.grad, d_weights]
            for name, a, b in zip(("out", "d_x", "d_topk_weights"), got, want, strict=True):
                # The sum of a product over the columns has no stated order.
                same = torch.allclose(a.cpu(), b, rtol=1e-4, atol=1e-3) if name == "d_topk_weights" else False
                if not same and not equal_bits(a.cpu(), b):
                    problems.append(f"rank {rank}: {case}, legs {[leg.kind for leg in legs]}: {name}")
    return problems


@targets(2, 3, nodes=NODES)
def test_gradients_are_the_oracles(target: Target) -> None:
    wires = (BF16, FP8, MXFP4, ROTATED, STOCHASTIC, ROTATED_STOCHASTIC)
    todo: list[tuple[Case, tuple[WireFormat, ...], bool]] = []
    for wire in wires:
        legs = [(wire, BF16, BF16, BF16), (BF16, wire, BF16, BF16), (BF16, BF16, wire, BF16), (BF16, BF16, BF16, wire)]
        todo += [(BASE, each, True) for each in legs]
    presets = (WirePrecision.paper(), WirePrecision.fp8(), WirePrecision.aggressive())
    for preset in presets:
        legs_of = tuple(preset.leg(op, backward) for backward in (False, True) for op in ("dispatch", "combine"))
        for case in grid(BASE, recv_layout=BY_EXPERT, counts=("uneven", "empty")):
            todo += [(case, legs_of, weighted) for weighted in (False, True)]
        todo.append((dataclasses.replace(BASE, recv_layout="token_major"), legs_of, False))
    todo += [(dataclasses.replace(BASE, static=True), (MXFP4, BF16, FP8, BF16), weighted) for weighted in (False, True)]
    todo += [(dataclasses.replace(BASE, counts="zero"), (BF16,) * 4, True)]
    cases.no_problems(target.run(_against_the_oracle, todo))


def _gradients_by_seed(
    rank: int, num_ranks: int, device: str, backend: str, backward: WireFormat, num_seeds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens' gradients `[seeds, tokens, hidden]` with these backward legs, and those of BF16's."""
    case = dataclasses.replace(BASE, routes="random", num_topk=2)
    inputs = cases.make_inputs(case, num_ranks)
    found = []
    for legs, seeds in (((BF16, BF16, backward, backward), range(num_seeds)), ((BF16,) * 4, range(1))):
        with _buffer(case, legs, num_ranks, device, backend) as buffer:
            idx, upstream = inputs.topk_idxs[rank].to(buffer.device), _upstream(inputs)[rank].to(buffer.device)
            x = _leaf(inputs.xs[rank], buffer.device)
            gradients: list[torch.Tensor] = []
            for seed in seeds:
                recv, handle = qcomm.dispatch(x, idx, None, buffer, recv_dtype="bf16", seed=seed)
                out = qcomm.combine(recv.x, handle, seed=seed)
                gradients += torch.autograd.grad(out, x, upstream)
            found.append(torch.stack(gradients).cpu())
    return found[0], found[1][0]


@targets(2, gpu_sizes=(2,))
def test_aggressive_gradients_are_unbiased(target: Target) -> None:
    """Their mean over seeds is BF16's gradient as nearly as their spread lets it be; rounded to nearest it is not."""
    num_seeds = 24
    aggressive = WirePrecision.aggressive().leg("combine", backward=True)
    nearest = dataclasses.replace(aggressive, rounding=MXFP4.rounding)
    errors: dict[Rounding, list[tuple[float, float]]] = {}
    for wire in (aggressive, nearest):
        for sampled, exact in target.run(_gradients_by_seed, wire, num_seeds):
            sampled, exact = sampled.double(), exact.double()
            assert exact.norm() > 0
            off = (sampled.mean(0) - exact).norm() / exact.norm()
            spread = (sampled - sampled.mean(0)).square().sum(0).div(num_seeds - 1).sum().sqrt() / exact.norm()
            errors.setdefault(wire.rounding, []).append((float(off), float(spread) / num_seeds**0.5))
    # Sums are rounded to bfloat16 once more, by 2^-9 at most, whose mean is not nothing.
    assert all(off < 1.1 * standard + 2.0**-9 for off, standard in errors[aggressive.rounding])
    assert all(off > 0.05 and standard == 0 for off, standard in errors[nearest.rounding])
    assert all(standard > 0.01 for _, standard in errors[aggressive.rounding])


class _Dequantize(torch.autograd.Function):
    """An expert that reads FP8 rows: the carrier takes the gradient."""

    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, recv: Received) -> torch.Tensor:
        rows = recv.tensor()
        assert isinstance(rows, FP8Tensor)
        return reference.dequantize_fp8(rows, torch.bfloat16).view(carrier.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def _carried(rank: int, num_ranks: int, device: str, backend: str) -> None:
    case = dataclasses.replace(BASE, recv_dtype="fp8", wire=MXFP4)
    inputs = cases.make_inputs(case, num_ranks)
    with _buffer(case, (MXFP4, BF16, BF16, BF16), num_ranks, device, backend) as buffer:
        idx = inputs.topk_idxs[rank].to(buffer.device)
        assert inputs.topk_weights is not None
        grads = []
        dtypes: tuple[RecvDtype, ...] = ("bf16", "fp8")
        for recv_dtype in dtypes:
            x = _leaf(inputs.xs[rank], buffer.device)
            weights = _leaf(inputs.topk_weights[rank], buffer.device)
            recv, handle = qcomm.dispatch(x, idx, weights, buffer, recv_dtype=recv_dtype, alignment=32)
            y = recv.x
            if recv_dtype == "fp8":
                assert not recv.x.requires_grad
                assert recv.grad_carrier is not None
                assert recv.grad_carrier.shape == recv.x.shape
                assert recv.grad_carrier.untyped_storage().nbytes() == 2
                y = _Dequantize.apply(recv.grad_carrier, recv)
            else:
                assert recv.grad_carrier is None
            qcomm.combine(y, handle).backward(_upstream(inputs)[rank].to(buffer.device))
            assert x.grad is not None
            assert weights.grad is not None
            grads.append((x.grad, weights.grad))
        # MXFP4 is exact in FP8, so both paths see the same rows.
        (d_x, d_weights), (other_x, other_weights) = grads
        assert equal_bits(d_x, other_x)
        assert torch.allclose(d_weights, other_weights, rtol=1e-4, atol=1e-3)


@targets(2)
def test_fp8_rows_have_a_carrier_of_gradients(target: Target) -> None:
    target.run(_carried)


def _rows_are_freed(rank: int, num_ranks: int, device: str, backend: str) -> None:
    case = dataclasses.replace(BASE, recv_dtype="mxfp4", wire=MXFP4)
    inputs = cases.make_inputs(case, num_ranks)
    with _buffer(case, (MXFP4, BF16, BF16, BF16), num_ranks, device, backend) as buffer:
        idx = inputs.topk_idxs[rank].to(buffer.device)
        leaf = _leaf(inputs.xs[rank], buffer.device)
        x = leaf * 1
        recv, handle = qcomm.dispatch(x, idx, None, buffer, recv_dtype="mxfp4")
        assert recv.grad_carrier is not None
        held = weakref.ref(x), weakref.ref(recv.x)
        y = recv.grad_carrier * 2
        del recv, x
        assert [ref() for ref in held] == [None, None]
        qcomm.combine(y, handle).backward(_upstream(inputs)[rank].to(buffer.device))
        assert leaf.grad is not None


@targets(2)
def test_dispatch_keeps_neither_tokens_nor_rows(target: Target) -> None:
    target.run(_rows_are_freed)


def _weights_in_experts(rank: int, num_ranks: int, device: str, backend: str, layout: RecvLayout) -> None:
    case = dataclasses.replace(BASE, recv_layout=layout)
    inputs = cases.make_inputs(case, num_ranks)
    with _buffer(case, (BF16,) * 4, num_ranks, device, backend) as buffer:
        idx = inputs.topk_idxs[rank].to(buffer.device)
        assert inputs.topk_weights is not None
        x, weights = _leaf(inputs.xs[rank], buffer.device), _leaf(inputs.topk_weights[rank], buffer.device)
        recv, handle = qcomm.dispatch(x, idx, weights, buffer, recv_layout=layout, alignment=32)
        if layout == "token_major":
            assert recv.topk_weights is not None
            scale = recv.topk_weights.sum(1, keepdim=True)
        else:
            assert recv.weights is not None
            scale = recv.weights.view(*recv.x.shape[:-1], 1)
        out = qcomm.combine((scale * recv.x).to(torch.bfloat16), handle, weighted=False)
        upstream = _upstream(inputs)[rank].to(buffer.device)
        out.backward(upstream)
        want = (upstream.float() * x.detach().float()).sum(1, keepdim=True) * (idx >= 0)
        assert weights.grad is not None
        assert torch.allclose(weights.grad, want, rtol=2e-2, atol=2e-2 * float(want.abs().max() + 1))


@targets(2)
@pytest.mark.parametrize("layout", ["expert_major", "batched", "token_major"])
def test_weights_that_experts_apply_get_gradients(target: Target, layout: RecvLayout) -> None:
    target.run(_weights_in_experts, layout)


def _recomputed(rank: int, num_ranks: int, device: str, backend: str) -> tuple[int, int]:
    case = BASE
    inputs = cases.make_inputs(case, num_ranks)
    upstream = _upstream(inputs)[rank]
    with _buffer(case, (MXFP4, BF16, BF16, BF16), num_ranks, device, backend) as buffer:
        idx = inputs.topk_idxs[rank].to(buffer.device)
        assert inputs.topk_weights is not None
        grads = []
        for recomputes in (False, True):
            x = _leaf(inputs.xs[rank], buffer.device)
            weights = _leaf(inputs.topk_weights[rank], buffer.device)
            route = SimpleNamespace(handle=None)

            def layer(
                x: torch.Tensor, weights: torch.Tensor, idx: torch.Tensor = idx, route: Any = route
            ) -> torch.Tensor:
                routed = None if route.handle is None else route.handle
                recv, handle = qcomm.dispatch(
                    x, idx if routed is None else None, weights, buffer, handle=routed, recv_dtype="bf16"
                )
                route.handle = handle if routed is None else routed
                return qcomm.combine(torch.tanh(recv.x), handle)

            out = checkpoint(layer, x, weights, use_reentrant=False) if recomputes else layer(x, weights)
            out.backward(upstream.to(buffer.device))
            assert x.grad is not None
            assert weights.grad is not None
            grads.append((x.grad, weights.grad))
        assert equal_bits(grads[0][0], grads[1][0])
        assert equal_bits(grads[0][1], grads[1][1])
        stats = buffer.stats()
        return stats.num_dispatches, stats.num_replays


@targets(2)
def test_checkpointing_replays_the_route(target: Target) -> None:
    # Two forward passes route; the recomputation and the two backward passes replay.
    assert set(target.run(_recomputed)) == {(2, 3)}


def _rows_left(rank: int, num_ranks: int, device: str, backend: str) -> list[str]:
    left = []
    todo: list[tuple[RecvLayout, RecvDtype]] = [
        ("expert_major", "bf16"),
        ("expert_major", "fp8"),
        ("token_major", "bf16"),
    ]
    for layout, recv_dtype in todo:
        case = dataclasses.replace(BASE, recv_layout=layout, recv_dtype=recv_dtype)
        inputs = cases.make_inputs(case, num_ranks)
        with _buffer(case, (BF16,) * 4, num_ranks, device, backend) as buffer:
            for backward in (True, False):
                assert inputs.topk_weights is not None
                weights = _leaf(inputs.topk_weights[rank], buffer.device)
                recv, handle = qcomm.dispatch(
                    _leaf(inputs.xs[rank], buffer.device),
                    inputs.topk_idxs[rank].to(buffer.device),
                    weights,
                    buffer,
                    recv_layout=case.recv_layout,
                    recv_dtype=case.recv_dtype,
                )
                y = recv.x if recv.grad_carrier is None else recv.grad_carrier
                out = qcomm.combine(y * 2, handle)
                if backward:
                    out.sum().backward()
                rows = weakref.ref(recv.x)
                del recv, handle, y, out, weights
                gc.collect()
                if rows() is not None:
                    left.append(f"{layout}, {recv_dtype}, backward={backward}")
    return left


@targets(2)
def test_rows_are_freed_with_the_graph(target: Target) -> None:
    assert target.run(_rows_left) == [[]] * target.pool.num_ranks


def _replayed_between(rank: int, num_ranks: int, device: str, backend: str) -> list[torch.Tensor]:
    """Gradients of a call's weights, without and with a replay between it and its combine; that has none."""
    case = dataclasses.replace(BASE, recv_dtype="bf16")
    found = []
    with _buffer(case, [BF16] * 4, num_ranks, device, backend) as buffer:
        inputs = cases.make_inputs(case, num_ranks)
        x, other = (_leaf(inputs.xs[rank], buffer.device) for _ in range(2))
        assert inputs.topk_weights is not None
        for replays in (False, True):
            weights = _leaf(inputs.topk_weights[rank], buffer.device)
            idx = inputs.topk_idxs[rank].to(buffer.device)
            received, handle = qcomm.dispatch(x, idx, weights, buffer, recv_dtype="bf16", alignment=case.alignment)
            if replays:
                qcomm.dispatch(other, None, None, buffer, handle=handle, recv_dtype="bf16")
            qcomm.combine(received.x, handle).float().sum().backward()
            assert weights.grad is not None
            found.append(weights.grad.cpu())
            assert other.grad is None
    return found


@targets(2)
def test_a_replay_takes_no_gradients_of_the_first_call(target: Target) -> None:
    for alone, replayed in target.run(_replayed_between):
        assert alone.any()
        assert equal_bits(alone, replayed)


def _kept_upstream(rank: int, num_ranks: int, device: str, backend: str, combines: bool) -> bool:
    """Tell whether what is upstream of a dropped result stays alive."""

    class Upstream(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.kept = torch.zeros(1)
            left.append(weakref.ref(ctx.kept))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d_x: torch.Tensor) -> torch.Tensor:
            return d_x

    case = dataclasses.replace(BASE, recv_dtype="bf16")
    left: list[weakref.ref[torch.Tensor]] = []
    with _buffer(case, [BF16] * 4, num_ranks, device, backend) as buffer:
        inputs = cases.make_inputs(case, num_ranks)
        x, idx = _leaf(inputs.xs[rank], buffer.device), inputs.topk_idxs[rank].to(buffer.device)
        assert inputs.topk_weights is not None
        weights = _leaf(inputs.topk_weights[rank], buffer.device)
        received, handle = qcomm.dispatch(
            Upstream.apply(x), idx, Upstream.apply(weights), buffer, recv_dtype="bf16", alignment=case.alignment
        )
        out = qcomm.combine(received.x, handle) if combines else None
        del received, handle, out
        gc.collect()
        return any(each() is not None for each in left)


@pytest.mark.parametrize("combines", [False, True], ids=["dispatch", "combine"])
@targets(2)
def test_a_buffer_does_not_keep_the_graph(target: Target, combines: bool) -> None:
    assert not any(target.run(_kept_upstream, combines))


def _differentiable_weights(rank: int, num_ranks: int, device: str, backend: str) -> list[bool]:
    case = dataclasses.replace(BASE, recv_dtype="bf16")
    found = []
    with _buffer(case, [BF16] * 4, num_ranks, device, backend) as buffer:
        inputs = cases.make_inputs(case, num_ranks)
        x, idx = _leaf(inputs.xs[rank], buffer.device), inputs.topk_idxs[rank].to(buffer.device)
        assert inputs.topk_weights is not None
        weights = inputs.topk_weights[rank].to(buffer.device)
        for given in (None, weights, weights.clone().requires_grad_()):
            received, _ = qcomm.dispatch(x, idx, given, buffer, recv_dtype="bf16", alignment=case.alignment)
            assert received.weights is not None
            found.append(received.weights.requires_grad)
    return found


@targets(1)
def test_weights_have_gradients_if_those_given_have(target: Target) -> None:
    assert target.run(_differentiable_weights) == [[False, False, True]] * target.pool.num_ranks
