"""The experts' Function: bit by bit against the oracles composed by hand, and what it keeps for backward."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from bit_patterns import equal_bits
from moe_truth import quantize_weights
from ranks import Pools

from qcomm import (
    Buffer,
    DispatchHandle,
    FP8Tensor,
    MXFP4Tensor,
    Received,
    WireFormat,
    WirePrecision,
    reference,
    reference_columnwise,
    reference_swiglu,
)
from qcomm.moe import swiglu_experts
from qcomm.moe.experts import KEEPS, RECOMPUTES, Keep, Recompute

HIDDEN, WIDTH, EXPERTS, TOPK = 256, 128, 8, 2


class Setup(NamedTuple):
    recv: Received
    handle: DispatchHandle
    w1: torch.Tensor
    w2: torch.Tensor
    d_y: torch.Tensor


def setup(rank: int, keep: Keep, buffer: Buffer, *, static: bool = False, unused: int = 0) -> Setup:
    """Dispatch 60 tokens a rank to all experts but the first ones; gradients are zeros in padding rows."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(60, HIDDEN, generator=generator).to(torch.bfloat16)
    weights, idx = torch.rand(60, EXPERTS - unused, generator=generator).topk(TOPK)
    recv, handle = buffer.dispatch(
        x, idx + unused, weights, recv_dtype=keep, static=static, num_max_recv_tokens=1024 if static else None
    )
    # Rows past the last group hold anything.
    end = spans_of(handle)[-1]
    assert end < handle.num_rows or not static
    recv.x[end:].view(torch.uint8).fill_(0x7F)
    if recv.sf is not None:
        recv.sf[end:] = 255 if keep == "mxfp4" else float("nan")
    count = EXPERTS // buffer.num_ranks
    w1, w2, d_y = (
        (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)
        for shape, scale in (
            ((count, 2 * WIDTH, HIDDEN), HIDDEN**-0.5),
            ((count, HIDDEN, WIDTH), WIDTH**-0.5),
            ((handle.num_rows, HIDDEN), 1e-3),
        )
    )
    return Setup(recv, handle, w1, w2, d_y * (handle.row_record >= 0)[:, None])


def run(given: Setup, keep: Keep, recompute: Recompute, weighted: bool) -> dict[str, torch.Tensor]:
    """Give the output and every gradient of the Function."""
    leaves = {name: x.clone().requires_grad_() for name, x in (("w1", given.w1), ("w2", given.w2))}
    assert given.recv.weights is not None
    leaves["weights"] = given.recv.weights.clone().requires_grad_()
    leaves["x"] = torch.zeros(given.handle.num_rows, HIDDEN, dtype=torch.bfloat16)
    if keep == "bf16":
        leaves["x"] = given.recv.x.clone()
    leaves["x"].requires_grad_()
    changes: dict[str, Any] = {"weights": leaves["weights"]}
    changes["x" if keep == "bf16" else "grad_carrier"] = leaves["x"]
    recv = dataclasses.replace(given.recv, **changes)
    y = swiglu_experts(
        recv, given.handle, leaves["w1"], leaves["w2"], keep=keep, recompute=recompute, weighted=weighted
    )
    y.backward(given.d_y)
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), **grads}


def spans_of(handle: DispatchHandle) -> list[int]:
    assert handle.group_offsets is not None
    return handle.group_offsets.tolist()


def mm(x: torch.Tensor, w: torch.Tensor, spans: list[int]) -> torch.Tensor:
    out = torch.zeros(len(x), w.shape[1], dtype=torch.bfloat16)
    for expert, (a, b) in enumerate(itertools.pairwise(spans)):
        out[a:b] = (x[a:b].float() @ w[expert].float().t()).to(torch.bfloat16)
    return out


def wgrad(d_y: Any, x: Any, spans: list[int]) -> torch.Tensor:
    """Multiply per expert what the column-wise oracles returned, `[K, rows]` blocks with 128x1 scales."""
    grads, tile = [], 0
    for a, b in itertools.pairwise(spans):
        tiles, sides = (b - a) // 128, []
        for data, sf, *_ in (d_y, x):
            width = sf.shape[1]
            block = data[a * width : b * width].view(width, b - a).float().t()
            sides.append(block * sf[tile : tile + tiles].repeat_interleave(128, 0))
        grads.append(sides[0].t() @ sides[1])
        tile += tiles
    return torch.stack(grads).to(torch.bfloat16)


def by_hand(given: Setup, recompute: Recompute, weighted: bool) -> dict[str, torch.Tensor]:
    """Compose the recipe from the oracles: MXFP4 rows in, MXFP4 kept; or FP8 in both places."""
    rows, weights, spans = given.recv.tensor(), given.recv.weights if weighted else None, spans_of(given.handle)
    if isinstance(rows, MXFP4Tensor):
        forward_rows: Any = reference.mxfp4_to_fp8(rows)[0]
        columns: Any = reference_columnwise.mxfp4_to_fp8_columnwise(rows, spans)
    else:
        assert isinstance(rows, FP8Tensor)
        forward_rows, columns = rows, reference_columnwise.fp8_transpose(rows, spans)

    def weights8(w: torch.Tensor) -> torch.Tensor:
        data, sf = quantize_weights(w)
        return data.float() * sf.repeat_interleave(128, 1).repeat_interleave(128, 2)

    def decoded(x: FP8Tensor) -> torch.Tensor:
        return reference.dequantize_fp8(x)

    w1, w2 = weights8(given.w1), weights8(given.w2)
    gate_up = mm(decoded(forward_rows), w1, spans)
    h, saved = reference_swiglu.swiglu_forward(gate_up, weights)
    if isinstance(rows, MXFP4Tensor):
        kept = reference.dequantize_mxfp4(saved, torch.bfloat16)
    else:
        kept = reference.dequantize_fp8(reference.quantize_fp8(gate_up), torch.bfloat16)
    y = mm(decoded(h), w2, spans)

    d_y = reference.quantize_fp8(given.d_y)
    d_h = mm(decoded(d_y), w2.transpose(1, 2), spans)
    d_gate_up, d_weights = reference_swiglu.gradients(d_h, kept, weights)
    if recompute == "swiglu":
        h = reference.quantize_fp8(reference_swiglu.product(kept, weights))
    rows_of_d = reference.quantize_fp8(d_gate_up)
    out = {
        "y": y,
        "x": mm(decoded(rows_of_d), w1.transpose(1, 2), spans),
        "w1": wgrad(reference_columnwise.fp8_transpose(rows_of_d, spans), columns, spans),
        "w2": wgrad(
            reference_columnwise.fp8_transpose(d_y, spans), reference_columnwise.fp8_transpose(h, spans), spans
        ),
    }
    return out if d_weights is None else {**out, "weights": d_weights}


def _buffer(wire: WireFormat) -> Buffer:
    return Buffer(
        num_experts=EXPERTS,
        num_topk=TOPK,
        hidden=HIDDEN,
        num_max_tokens_per_rank=64,
        precision=WirePrecision(dispatch_fwd=wire),
        device="cpu",
    )


def _against_hand(rank: int, num_ranks: int, keep: Keep, wire: WireFormat, static: bool, unused: int) -> list[str]:
    problems = []
    with _buffer(wire) as buffer:
        given = setup(rank, keep, buffer, static=static, unused=unused)
        end = spans_of(given.handle)[-1]
        for recompute, weighted in itertools.product(RECOMPUTES, (False, True)):
            got, want = run(given, keep, recompute, weighted), by_hand(given, recompute, weighted)
            if set(got) != set(want):
                problems.append(f"{recompute}, {weighted}: {set(got)} instead of {set(want)}")
            for name in want:
                rows = end if name in ("x", "y", "weights") else None
                if not equal_bits(got[name][:rows], want[name][:rows]):
                    problems.append(f"rank {rank}: {recompute}, weighted {weighted}: {name}")
                if not torch.isfinite(got[name][:rows]).all():
                    problems.append(f"rank {rank}: {recompute}, weighted {weighted}: {name} is not finite")
            if not all((got[name] != 0).any() or unused for name in want):
                problems.append(f"rank {rank}: {recompute}, weighted {weighted}: all zeros")
            empty = [e for e in range(len(given.w1)) if given.handle.num_tokens_per_expert[e] == 0]
            if any((got[name][e] != 0).any() for name in ("w1", "w2") for e in empty):
                problems.append(f"rank {rank}: an expert without rows has a gradient")
    return problems


@pytest.mark.parametrize(
    ("keep", "wire"),
    [
        ("mxfp4", WireFormat("mxfp4")),
        ("mxfp4", WireFormat("mxfp4", hadamard=True)),
        ("mxfp4", WireFormat("bf16")),
        ("fp8", WireFormat("fp8")),
    ],
    ids=["mxfp4", "rotated", "quantized-on-arrival", "fp8"],
)
@pytest.mark.parametrize(("static", "unused"), [(False, 0), (True, 0), (False, 5)], ids=["plain", "static", "empty"])
def test_the_recipe_is_the_oracles_composed(
    pools: Pools, keep: Keep, wire: WireFormat, static: bool, unused: int
) -> None:
    # With 5 experts unused, rank 0 of two has no rows at all.
    for problems in pools.get(2).run(_against_hand, keep, wire, static, unused):
        assert not problems


def _bytes_kept(rank: int, num_ranks: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Return bytes of rows and SwiGLU's input, and of its output, over those of BF16, in thousandths."""
    kept: dict[tuple[str, str], tuple[int, int]] = {}
    for keep, recompute in itertools.product(KEEPS, RECOMPUTES):
        wire = WireFormat("bf16" if keep == "bf16" else "mxfp4")
        with _buffer(wire) as buffer:
            given = setup(rank, keep, buffer)
            held: dict[int, int] = {}

            def pack(x: torch.Tensor, held: dict[int, int] = held, given: Setup = given) -> torch.Tensor:
                ours = given.w1.shape, given.w2.shape, (given.handle.num_rows,)
                if x.shape not in ours:
                    held[x.data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                run(given, keep, recompute, weighted=True)
            rows = given.handle.num_rows
            inputs, output = 2 * rows * (HIDDEN + 2 * WIDTH), 2 * rows * WIDTH
            total, of_output = sum(held.values()), 0
            if recompute == "none":
                of_output = rows * (2 * WIDTH if keep == "bf16" else WIDTH + 4)
            kept[keep, recompute] = round(1000 * (total - of_output) / inputs), round(1000 * of_output / output)
    return kept


def test_bytes_kept(pools: Pools) -> None:
    for kept in pools.get(2).run(_bytes_kept):
        assert kept == {
            ("mxfp4", "none"): (266, 516),
            ("mxfp4", "swiglu"): (266, 0),
            ("fp8", "none"): (516, 516),
            ("fp8", "swiglu"): (516, 0),
            ("bf16", "none"): (1000, 1000),
            ("bf16", "swiglu"): (1000, 0),
        }
        assert kept["mxfp4", "none"][0] <= 280


def _frozen(rank: int, num_ranks: int, keep: Keep) -> None:
    with _buffer(WireFormat("mxfp4")) as buffer:
        given = setup(rank, keep, buffer)
        want = run(given, keep, "none", weighted=False)
        for frozen in ("w1", "w2"):
            leaves = {"w1": given.w1.clone(), "w2": given.w2.clone()}
            (other,) = (name for name in leaves if name != frozen)
            leaves[other].requires_grad_()
            widths: list[int] = []

            def pack(x: torch.Tensor, widths: list[int] = widths, rows: int = given.handle.num_rows) -> torch.Tensor:
                if x.dim() == 2 and x.shape[0] == rows:
                    widths.append(x.shape[1])
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                y = swiglu_experts(given.recv, given.handle, leaves["w1"], leaves["w2"], keep=keep)
            y.backward(given.d_y)
            grad = leaves[other].grad
            assert grad is not None
            assert equal_bits(grad, want[other])
            # Rows, or SwiGLU's output, are not there.
            parts = 1 if keep == "bf16" else 2
            assert len(widths) == 2 * parts


@pytest.mark.parametrize("keep", KEEPS)
def test_frozen_weights_keep_nothing(pools: Pools, keep: Keep) -> None:
    pools.get(2).run(_frozen, keep)


def _refused(rank: int, num_ranks: int) -> None:
    with _buffer(WireFormat("mxfp4")) as buffer:
        recv, handle, w1, w2, _ = setup(rank, "mxfp4", buffer)
        kwargs: dict[str, Any]
        for kwargs, message in (
            ({"keep": "fp4"}, "keep must be one of"),
            ({"recompute": "all"}, "recompute must be one of"),
            ({"keep": "fp8"}, "recv must be dispatched with recv_dtype='fp8', what is kept, got 'mxfp4'"),
            ({"w1": w1[:1], "w2": w2[:1]}, "w1 must be of 4 experts, got 1"),
            ({"w2": w2[:, :, :64]}, r"w2.shape must be \(4, 256, 128\), got \(4, 256, 64\)"),
            ({"w1": w1[0]}, r"w1.shape must be \(\*, \*, \*\), got"),
            ({"w1": w1[:, :64]}, "intermediate must be a multiple of 128, got 32"),
            ({"handle": dataclasses.replace(handle, alignment=32)}, "alignment must be a multiple of 128, got 32"),
            (
                {"handle": dataclasses.replace(handle, recv_layout="batched")},
                "recv must have the layout 'expert_major'",
            ),
        ):
            changed: dict[str, Any] = {"recv": recv, "handle": handle, "w1": w1, "w2": w2, **kwargs}
            with pytest.raises(ValueError, match=message):
                swiglu_experts(**changed)


def test_arguments(pools: Pools) -> None:
    pools.get(2).run(_refused)
