"""SwiGLU against the oracle: MXFP4 bit for bit, h and the gradients to the bounds that the functions state.

The kernels run on a GPU, and without one in Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bit_patterns import all_bf16
from codec_cases import (
    DEVICES,
    REARRANGEMENTS,
    Outputs,
    assert_same_bits,
    assert_same_mxfp4,
    big_rows,
    gpu_only,
    misaligned,
    moved,
    slices_of,
    spread_out,
    values_under_maxima,
    wild,
    wild_mxfp4,
)
from triton_cases import compile_for_hopper
from triton_cases import outcomes as interpreted_outcomes

from qcomm import FP8Tensor, MXFP4Tensor, QcommUnsupportedError, Rounding, ScaleRule, quantize_mxfp4, reference
from qcomm import reference_swiglu as oracle
from qcomm.formats import E4M3_NAN, FP8_MIN_SCALE_EXPONENT, MAXIMUM_RULES, ScaleLayout
from qcomm.ops import swiglu, triton_kernels
from qcomm.ops.swiglu import Tile, swiglu_backward, swiglu_forward

REPO = Path(__file__).resolve().parents[1]
RELATIVE_ERROR = 2.0**-16
MAX_INTERPRETED_GROUPS = 512
SHAPES = [(0, 128), (1, 128), (2, 384), (127, 256), (129, 640), (33, 3584)]


class Outcome(NamedTuple):
    """What a call writes: (h, saved), or (grad_x, grad_weights)."""

    forward: tuple[FP8Tensor, MXFP4Tensor] | None
    backward: tuple[torch.Tensor, torch.Tensor | None] | None


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of `swiglu_forward`, or of `swiglu_backward` where there is a `saved`.

    Where it is exact, every 1 / (1 + exp(-gate)) is 0, 1/2 or 1, so that all bits have to be the oracle's.
    """

    x: torch.Tensor
    saved: MXFP4Tensor | None = None
    weights: torch.Tensor | None = None
    scale_rule: ScaleRule = ScaleRule.EVEN
    exact: bool = False

    def to(self, device: str) -> Call:
        saved = None if self.saved is None else moved(self.saved, device)
        weights = None if self.weights is None else self.weights.to(device)
        return dataclasses.replace(self, x=self.x.to(device), saved=saved, weights=weights)

    def outputs(self) -> tuple[Outputs, Outcome]:
        """Allocate poisoned outputs."""
        outputs, (rows, columns) = Outputs(self.x.device), self.x.shape
        if self.saved is None:
            h = outputs.fp8(rows, columns // 2, ScaleLayout.ROW_MAJOR)
            return outputs, Outcome((h, outputs.mxfp4((rows, columns))), None)
        grad_weights = None if self.weights is None else outputs.empty((rows,), torch.float32)
        return outputs, Outcome(None, (outputs.empty((rows, 2 * columns), torch.bfloat16), grad_weights))

    def run(self) -> Outcome:
        """Run the public function."""
        outputs, outcome = self.outputs()
        if self.saved is None:
            swiglu_forward(self.x, weights=self.weights, scale_rule=self.scale_rule, out=outcome.forward)
        else:
            swiglu_backward(self.x, self.saved, weights=self.weights, out=outcome.backward)
        outputs.check()
        return outcome


def run_kernels(call: Call, tile: Tile | None = None) -> Outcome:
    """Launch the kernels by the way that the interpreter can go, on the current device."""
    outputs, outcome = call.outputs()
    if outcome.forward is not None:
        h, q = outcome.forward
        parts = h.data.view(torch.uint8), h.sf, q.qdata, q.sf
        swiglu.launch_forward(call.x, call.weights, *parts, call.scale_rule, native=False, tile=tile)
    else:
        assert call.saved is not None
        assert outcome.backward is not None
        saved = call.saved.qdata, call.saved.sf
        swiglu.launch_backward(call.x, *saved, call.weights, *outcome.backward, native=False, tile=tile)
    outputs.check()
    return outcome


def interpreted_tile(call: Call) -> Tile:
    """Few programs, because each costs the interpreter tens of milliseconds, the last of them mostly not full."""
    num_groups = call.x.numel() // (256 if call.saved is None else 128)
    return Tile(min(MAX_INTERPRETED_GROUPS, 1 << max(0, num_groups.bit_length() - 1)), 1)


def run_interpreted(call: Call) -> Outcome:
    """Launch the kernels in Triton's interpreter."""
    return run_kernels(call, interpreted_tile(call))


def some_weights(rows: int, seed: int) -> torch.Tensor:
    weights = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    special = torch.tensor([0.0, -0.0, 1.0, 1e-30, 3e38, torch.nan, torch.inf])
    weights[1::5] = special.repeat(-(-rows // len(special)))[: len(weights[1::5])]
    return weights


def _rows_of_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks `[..., 32]` as `[rows, 256]`, the last one repeated."""
    missing = -len(blocks) % 8
    return torch.cat((blocks, blocks[-1:].expand(missing, -1))).view(-1, 256)


def _every_gate() -> torch.Tensor:
    """Each BF16 value as gate, sorted by magnitude so that a group's maximum is near, under up of a few magnitudes.

    Then groups of one gate, where silu becomes 0.
    """
    gate = torch.sort(all_bf16().float().abs().nan_to_num(torch.inf), stable=True).indices
    gate = all_bf16()[gate].view(-1, 128)
    scales = torch.tensor([1.0, -1.0, 1e-30, 1e30, 1.1754943508222875e-38, 3e-3])
    pairs = [torch.cat((gate, torch.full_like(gate, float(scale))), 1) for scale in scales]
    last = (
        torch.cat((torch.arange(-90, -85, 0.5), torch.tensor([-104, -256]))).to(torch.bfloat16)[:, None].expand(-1, 128)
    )
    pairs.append(torch.cat((last, wild((len(last), 128), torch.bfloat16, 9).nan_to_num(1, 1, 1)), 1))
    return torch.cat(pairs)


def _every_code() -> MXFP4Tensor:
    """Each E2M1 code under each scale byte, in gate and up, against the other's codes under a byte near 1."""
    codes = torch.arange(16).repeat(16)
    sf = torch.arange(256).repeat_interleave(8).view(256, 8)
    columns = torch.stack((codes, codes.view(16, 16).t().flatten()))
    qdata = columns[:, 0::2] | columns[:, 1::2] << 4
    other = torch.full_like(sf, 126)
    half = torch.arange(8) < 4
    return MXFP4Tensor(
        qdata.repeat_interleave(512, 0).to(torch.uint8),
        torch.cat((torch.where(half, sf, other), torch.where(half, other, sf), sf, 254 - sf)).to(torch.uint8),
    )


def _every_product() -> torch.Tensor:
    """Gate 64, and up such that h meets every FP8 rounding: the values of 19 binades under a maximum, for several."""
    values = torch.arange(109 * 128, 128 * 128)
    values = torch.cat((values, values[::22]))[: 20 * 127]
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))].view(-1, 127)
    # The scale steps after mantissa 96.
    top = 127 * 128 + torch.tensor([0, 1, *range(8, 96, 8), 95, 96, 97, *range(104, 127, 8), 127])[:, None, None]
    up = torch.cat((torch.minimum(values, top), top.expand(-1, len(values), 1)), 2).flatten(0, 1)
    # Around 1, at the clamp of the scale, and at the top of the range.
    up = torch.cat([(up + shift * 128).clamp(min=0) for shift in (0, -120, 115)])
    up = up | torch.randint(2, up.shape, generator=torch.Generator().manual_seed(4)) << 15
    return torch.cat((torch.full_like(up, 64, dtype=torch.bfloat16), up.to(torch.uint16).view(torch.bfloat16)), 1)


def _far_gates(rows: int, columns: int) -> MXFP4Tensor:
    """Gates of 0 and of 128 and more, of both signs, under any up."""
    saved = wild_mxfp4(rows, 2 * columns, 5)
    gate_sf = torch.randint(135, 256, (rows, columns // 32), generator=torch.Generator().manual_seed(6))
    return MXFP4Tensor(saved.qdata, torch.cat((gate_sf.to(torch.uint8), saved.sf[:, columns // 32 :]), 1))


def calls() -> dict[str, Call]:
    """Everything that the interpreter runs too."""
    made: dict[str, Call] = {}
    for rule in MAXIMUM_RULES:
        values = values_under_maxima(rule, torch.bfloat16, "cpu", 127)
        every = 1 if rule is ScaleRule.EVEN else 5
        made[f"values under maxima, {rule.name}"] = Call(_rows_of_blocks(values[::every]), scale_rule=rule)
    made["patterns in order"] = Call(all_bf16().view(-1, 1024))
    made["every gate"] = Call(_every_gate())
    made["every code"] = Call(wild((1024, 128), torch.bfloat16, 1), _every_code(), some_weights(1024, 1))
    products = _every_product()
    made["every product"] = Call(products, exact=True)
    weights = torch.randn(len(products), generator=torch.Generator().manual_seed(2))
    made["every product, weights"] = Call(products, weights=weights, exact=True)
    made["far gates"] = Call(wild((96, 640), torch.bfloat16, 7), _far_gates(96, 640), exact=True)
    made["far gates, weights"] = dataclasses.replace(made["far gates"], weights=some_weights(96, 8))
    for seed, (rows, columns) in enumerate(SHAPES):
        size, both = f"{rows} x {columns}", (None, some_weights(rows, seed))
        x = torch.randn(rows, 2 * columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)).to(torch.bfloat16)
        made[f"forward {size}"] = Call(4 * x, weights=both[seed % 2])
        made[f"backward {size}"] = Call(grad, reference.quantize_mxfp4(4 * x), both[seed % 2])
        wild_x, wild_grad = wild((rows, 2 * columns), torch.bfloat16, seed), wild((rows, columns), torch.bfloat16, seed)
        made[f"wild forward {size}"] = Call(wild_x, weights=both[1 - seed % 2])
        made[f"wild backward {size}"] = Call(wild_grad, wild_mxfp4(rows, 2 * columns, seed), both[1 - seed % 2])
    return made


CALLS = calls()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return interpreted_outcomes("test_swiglu", CALLS, tmp_path_factory.mktemp("swiglu"))


def order(x: torch.Tensor) -> torch.Tensor:
    """Numbers in the order of the values, neighbours apart by 1, both zeros 0, of E4M3 or BF16 values."""
    sign = 0x80 if x.element_size() == 1 else 0x8000
    bits = x.contiguous().view(torch.uint8 if sign == 0x80 else torch.int16).to(torch.int32) & (2 * sign - 1)
    return torch.where(bits >= sign, sign - bits, bits)


def _check_h(h: FP8Tensor, call: Call) -> None:
    """Require neighbouring codes, few of them unequal, under scales that differ only where they step."""
    exact = oracle.product(call.x, call.weights)
    want = reference.quantize_fp8(exact)
    groups = exact.double().unflatten(1, (-1, 128))
    amax = groups.abs().amax(-1)
    finite = torch.isfinite(groups).all(-1)
    near = (amax * (1 + RELATIVE_ERROR), amax * (1 - RELATIVE_ERROR))
    largest = torch.finfo(torch.float32).max
    bounds = [
        reference.quantize_fp8(_maxima(torch.where(finite, m.clamp(max=largest), 0.0))).sf.view(amax.shape)
        for m in near
    ]
    assert ((h.sf <= bounds[0]) & (h.sf >= bounds[1])).all()
    assert (h.sf[~finite] == 2.0**FP8_MIN_SCALE_EXPONENT).all()
    assert (h.data.view(torch.uint8).unflatten(1, (-1, 128))[~finite] == E4M3_NAN).all()
    # Under the kernel's own scale, which a group next to a step may have.
    scaled = torch.where(finite[..., None], groups / h.sf.double()[..., None], 0.0)
    codes = scaled.clamp(-448, 448).float().to(torch.float8_e4m3fn)
    found = torch.where(finite[..., None], h.data.view(torch.uint8).unflatten(1, (-1, 128)), 0)
    distance = (order(found) - order(codes)).abs()
    assert int(distance.max()) <= 1 if distance.numel() else True
    same_sign = (found & 0x80) == (codes.view(torch.uint8) & 0x80)
    assert (same_sign | (scaled == 0)).all()
    assert int((want.data.view(torch.uint8) != h.data.view(torch.uint8)).sum()) <= 1e-3 * exact.numel()


def _maxima(amax: torch.Tensor) -> torch.Tensor:
    """Float32 groups of 128 whose maxima they are, rounded."""
    return torch.nn.functional.pad(amax.float().reshape(-1, 1), (0, 127))


def check_neighbours(found: torch.Tensor, want: torch.Tensor, most: float) -> None:
    """Require the same NaNs, and else neighbouring bfloat16 values, at most this share of them unequal."""
    assert (found.dtype, found.shape) == (torch.bfloat16, want.shape)
    is_nan = torch.isnan(want)
    assert torch.equal(torch.isnan(found), is_nan)
    assert (found.view(torch.int16)[is_nan] == 0x7FFF).all()
    distance = (order(found) - order(want)).abs().masked_fill(is_nan, 0)
    assert int(distance.max()) <= 1 if distance.numel() else True
    assert int((distance > 0).sum()) <= most * distance.numel()


def check_gradients(
    found: tuple[torch.Tensor, torch.Tensor | None],
    grad_h: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor | None,
    most: float,
) -> None:
    """Compare the gradients at x, as it was saved, with the oracle's; `most` as for `check_neighbours`."""
    grad_x, grad_weights = found
    want_x, want_weights = oracle.gradients(grad_h, x, weights)
    check_neighbours(grad_x, want_x, most)
    assert (grad_weights is None) == (want_weights is None)
    if grad_weights is not None and want_weights is not None:
        gate, up = x.double().chunk(2, dim=1)
        magnitudes = (grad_h.double() * gate * torch.sigmoid(gate) * up).abs().sum(1)
        finite = torch.isfinite(want_weights) & (magnitudes < 2.0**127)
        assert ((grad_weights - want_weights).abs() <= RELATIVE_ERROR * magnitudes)[finite].all()
        assert not torch.isfinite(grad_weights[torch.isnan(want_weights)]).any()


def _check(outcome: Outcome, call: Call) -> None:
    if outcome.forward is not None:
        h, q = outcome.forward
        assert_same_mxfp4(q, reference.quantize_mxfp4(call.x, call.scale_rule))
        _check_h(h, call)
        if call.exact:
            want = reference.quantize_fp8(oracle.product(call.x, call.weights))
            assert_same_bits(h.sf, want.sf, "h.sf")
            assert_same_bits(h.data, want.data, "h.data")
    if outcome.backward is not None:
        assert call.saved is not None
        check_gradients(outcome.backward, call.x, reference.dequantize_mxfp4(call.saved), call.weights, 1e-3)
        if call.exact:
            assert_same_bits(outcome.backward[0], oracle.swiglu_backward(call.x, call.saved, call.weights)[0], "grad_x")


@pytest.mark.parametrize("name", CALLS)
def test_kernels_in_the_interpreter(name: str, interpreted: dict[str, Outcome]) -> None:
    _check(interpreted[name], CALLS[name])


@pytest.mark.parametrize("name", CALLS)
@gpu_only
def test_kernels(name: str) -> None:
    """As they are, and by the way of the interpreter."""
    call = CALLS[name].to("cuda")
    _check(call.run(), call)
    _check(run_kernels(call), call)


@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("device", DEVICES)
def test_without_out(device: str, rows: int) -> None:
    """What a call allocates is what `out=` gets."""
    x = wild((rows, 512), torch.bfloat16, 1).to(device)
    weights = some_weights(rows, 1).to(device)
    h, saved = swiglu_forward(x, weights=weights, scale_rule=ScaleRule.RCEIL)
    want = Call(x, weights=weights, scale_rule=ScaleRule.RCEIL).run().forward
    assert want is not None
    assert_same_bits(h.data, want[0].data, "h.data")
    assert_same_bits(h.sf, want[0].sf, "h.sf")
    assert_same_mxfp4(saved, want[1])
    assert_same_mxfp4(saved, quantize_mxfp4(x, scale_rule=ScaleRule.RCEIL))
    grad = wild((rows, 256), torch.bfloat16, 2).to(device)
    found, wanted = swiglu_backward(grad, saved, weights=weights), Call(grad, saved, weights).run().backward
    assert wanted is not None
    for actual, expected in zip(found, wanted, strict=True):
        assert actual is not None
        assert expected is not None
        assert_same_bits(actual, expected, "gradient")
    assert swiglu_backward(grad, saved)[1] is None


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_any_strides(device: str) -> None:
    forward = Call(wild((37, 512), torch.bfloat16, 3), weights=some_weights(37, 3)).to(device)
    backward = Call(wild((37, 256), torch.bfloat16, 4), wild_mxfp4(37, 512, 4), forward.weights).to(device)
    assert backward.saved is not None
    assert forward.weights is not None
    for rearrange in REARRANGEMENTS.values():
        saved = MXFP4Tensor(rearrange(backward.saved.qdata), rearrange(backward.saved.sf))
        weights = (misaligned if rearrange is not spread_out else spread_out)(forward.weights)
        call = dataclasses.replace(forward, x=rearrange(forward.x), weights=weights)
        _check(call.run(), call)
        call = Call(rearrange(backward.x), saved, weights)
        _check(call.run(), call)
    call = dataclasses.replace(forward, weights=forward.weights[:1].expand(37))
    _check(call.run(), call)


def test_oracle() -> None:
    """The product and its gradients are those of float64, but for float32's rounding."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 512, generator=generator) * 6).to(torch.bfloat16)
    weights = torch.randn(64, generator=generator)
    saved = reference.quantize_mxfp4(x)
    grad = torch.randn(64, 256, generator=generator).to(torch.bfloat16)
    exact = reference.dequantize_mxfp4(saved).double().requires_grad_()
    exact_weights = weights.double().requires_grad_()

    def truth(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up * exact_weights[:, None]

    torch.testing.assert_close(oracle.product(x, weights).double(), truth(x.double()), rtol=2e-6, atol=0)
    truth(exact).backward(grad.double())
    grad_x, grad_weights = oracle.swiglu_backward(grad, saved, weights)
    assert exact.grad is not None
    assert exact_weights.grad is not None
    torch.testing.assert_close(grad_x.double(), exact.grad, rtol=2.0**-8 + 1e-5, atol=1e-30)
    assert grad_weights is not None
    torch.testing.assert_close(grad_weights.double(), exact_weights.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [-torch.inf, -3e38, -200.0, -87.5, -87.0, -0.0, 2.0**-126, 88.0, torch.inf, torch.nan])
def test_silu_at_the_ends(gate: float) -> None:
    """As torch's, but that magnitudes below 2^-126, and those of gates below -87, are zeros of their sign."""
    x = torch.tensor([[gate, 1.0]], dtype=torch.bfloat16)
    want = torch.nn.functional.silu(x[:, :1].float())
    if -torch.inf < gate < -87 or abs(want) < 2.0**-126:
        want = torch.copysign(torch.zeros(()), want)
    torch.testing.assert_close(oracle.product(x), want, equal_nan=True, rtol=1e-6, atol=0)
    assert torch.isnan(want) or torch.equal(torch.signbit(oracle.product(x)), torch.signbit(x[:, :1]))


@pytest.mark.parametrize("rows", [0, 1, 129])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str, rows: int) -> None:
    x, weights = wild((rows, 256), torch.bfloat16, 1).to(device), torch.ones(rows, device=device)
    grad = wild((rows, 128), torch.bfloat16, 2).to(device)
    for given in (None, weights):
        _, outcome = Call(x).outputs()
        assert outcome.forward is not None
        h, q = outcome.forward
        parts = h.data.view(torch.uint8), h.sf, q.qdata, q.sf
        torch.library.opcheck(swiglu._swiglu_forward, (x, given, *parts, 1))
        _, outcome = Call(grad, q, given).outputs()
        assert outcome.backward is not None
        torch.library.opcheck(swiglu._swiglu_backward, (grad, q.qdata, q.sf, given, *outcome.backward))


@pytest.mark.parametrize("device", DEVICES)
def test_under_compile(device: str) -> None:
    def both(x: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, saved = swiglu_forward(x * 2, weights=weights)
        grad_x, grad_weights = swiglu_backward(grad, saved, weights=weights)
        return h.data.view(torch.uint8), h.sf, saved.qdata, saved.sf, grad_x * 2, grad_weights

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    x, grad = wild((65, 512), torch.bfloat16, 5).to(device), wild((65, 256), torch.bfloat16, 6).to(device)
    weights = torch.linspace(0.1, 1, 65, device=device)
    for actual, expected in zip(compiled(x, weights, grad), both(x, weights, grad), strict=True):
        assert actual is not None
        assert expected is not None
        assert_same_bits(actual, expected, "compiled")


@pytest.mark.parametrize("device", DEVICES)
def test_results_take_no_gradient(device: str) -> None:
    x = torch.randn(2, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    weights = torch.ones(2, device=device, requires_grad=True)
    h, saved = swiglu_forward(x, weights=weights)
    grads = swiglu_backward(x[:, :128], saved, weights=weights)
    assert not any(part is not None and part.requires_grad for part in (h.sf, saved.sf, *grads))


X = torch.zeros(2, 256, dtype=torch.bfloat16)
GRAD = X[:, :128]
SAVED = reference.quantize_mxfp4(X)


@pytest.mark.parametrize(
    ("x", "options", "kind", "message"),
    [
        (None, {}, TypeError, "x must be a Tensor, got NoneType"),
        (X.float(), {}, TypeError, r"x must be torch\.bfloat16, got torch\.float32"),
        (X[0], {}, ValueError, r"x\.shape must be \(rows, a positive multiple of 256\), got \(256,\)"),
        (X[:, :128], {}, ValueError, r"x\.shape must be \(rows, a positive multiple of 256\), got \(2, 128\)"),
        (X[:, :0], {}, ValueError, r"x\.shape must be \(rows, a positive multiple of 256\), got \(2, 0\)"),
        (X[:1, :1].expand(2**31, 256), {}, ValueError, r"x must have at most 274877906944 elements, got 549755813888"),
        (X, {"weights": [1.0, 1.0]}, TypeError, r"weights must be a torch\.Tensor, got list"),
        (X, {"weights": torch.ones(2).double()}, TypeError, r"weights must be torch\.float32, got torch\.float64"),
        (X, {"weights": torch.ones(3)}, ValueError, r"weights\.shape must be \(2\), got \(3,\)"),
        (X, {"weights": torch.ones(2, device="meta")}, ValueError, "weights must be on cpu, got meta"),
        (X, {"scale_rule": "even"}, TypeError, "scale_rule must be a ScaleRule, got str"),
        (X, {"scale_rule": ScaleRule.QUEST}, ValueError, r"scale_rule must be one of .*, got <ScaleRule\.QUEST"),
    ],
)
def test_forward_argument_errors(x: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        swiglu_forward(x, **options)


@pytest.mark.parametrize(
    ("grad_h", "saved", "options", "kind", "message"),
    [
        (GRAD.float(), SAVED, {}, TypeError, r"grad_h must be torch\.bfloat16, got torch\.float32"),
        (GRAD[:, :64], SAVED, {}, ValueError, r"grad_h\.shape must be \(rows, a positive multiple of 128\), got"),
        (GRAD, [X], {}, TypeError, "saved must be a MXFP4Tensor or Tensor, got list"),
        (GRAD, X.float(), {}, TypeError, r"saved must be torch\.bfloat16, got torch\.float32"),
        (GRAD, GRAD, {}, ValueError, r"saved\.shape must be \(2, 256\), got \(2, 128\)"),
        (X, SAVED, {}, ValueError, r"saved\.qdata\.shape must be \(2, 256\), got \(2, 128\)"),
        (GRAD, moved(SAVED, "meta"), {}, ValueError, r"saved\.qdata must be on cpu, got meta"),
        (
            GRAD,
            quantize_mxfp4(X, hadamard=True),
            {},
            ValueError,
            "saved must be neither rotated nor prescaled, got hadamard=True, prescaled=False",
        ),
        (
            GRAD,
            quantize_mxfp4(X, scale_rule=ScaleRule.FLOOR, rounding=Rounding.UNBIASED),
            {},
            ValueError,
            "saved must be neither rotated nor prescaled, got hadamard=False, prescaled=True",
        ),
        (GRAD, SAVED, {"weights": torch.ones(1)}, ValueError, r"weights\.shape must be \(2\), got \(1,\)"),
        (GRAD, SAVED, {"out": (X, torch.ones(2))}, ValueError, r"out\[1\] must be None without weights, got a tensor"),
        (
            GRAD,
            SAVED,
            {"out": (X, None), "weights": torch.ones(2)},
            ValueError,
            r"out\[1\] must be a tensor, got None",
        ),
        (GRAD, SAVED, {"out": (X.float(), None)}, TypeError, r"out\[0\] must be torch\.bfloat16, got torch\.float32"),
        (
            GRAD,
            SAVED,
            {"out": (X, torch.ones(3)), "weights": torch.ones(2)},
            ValueError,
            r"out\[1\]\.shape must be \(2,\), got \(3,\)",
        ),
    ],
)
def test_backward_argument_errors(
    grad_h: Any, saved: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        swiglu_backward(grad_h, saved, **options)


@pytest.mark.parametrize("part", ["data", "h.sf", "qdata", "sf"])
def test_forward_out_that_does_not_fit(part: str) -> None:
    _, outcome = Call(X).outputs()
    _, larger = Call(X.repeat(1, 2)).outputs()
    assert outcome.forward is not None
    assert larger.forward is not None
    (h, q), (other_h, other_q) = outcome.forward, larger.forward
    out = (other_h if part in ("data", "h.sf") else h, other_q if part in ("qdata", "sf") else q)
    with pytest.raises(ValueError, match=r"out\[[01]\]\.(data|qdata)\.shape must be \(2, 128\), got \(2, 256\)"):
        swiglu_forward(X, out=out)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for loaded in [name for name in sys.modules if name.startswith("qcomm_kernels")]:
        monkeypatch.delitem(sys.modules, loaded)
    for name in ("swiglu", "quantize_fp8"):
        triton_kernels.load.cache_clear()
        triton_kernels._execute.cache_clear()
        with pytest.raises(QcommUnsupportedError, match=f"kernels/{name}.py needs Triton"):
            triton_kernels.load(name)
    assert not any(name.startswith("qcomm_kernels") for name in sys.modules)


@pytest.mark.parametrize("per_warp", [swiglu.WEIGHTED_GROUPS_PER_WARP, swiglu.BACKWARD_GROUPS_PER_WARP])
def test_tiles(per_warp: int) -> None:
    """A warp always takes the same number of groups, and small problems reach as many SMs as they can."""
    for num_groups in (1, 2, 131, 4096, 2**20, swiglu.MAX_GROUPS):
        tile = swiglu.pick_tile(num_groups, per_warp)
        assert tile.groups == tile.num_warps * per_warp
        assert swiglu.MAX_GROUPS + tile.groups < 2**31
        assert tile.num_warps == 1 or num_groups // tile.groups >= 132
    assert swiglu.pick_tile(2**20, per_warp).num_warps > 1


@pytest.mark.parametrize(
    ("groups_per_row", "expected"), [(1, (1024, 1)), (28, (32, 32)), (56, (16, 64)), (2000, (1, 2048))]
)
def test_sum_tiles(groups_per_row: int, expected: tuple[int, int]) -> None:
    assert swiglu.sum_tile(groups_per_row) == expected


POINTERS = {
    "x": "*i32",
    "grad_h": "*i32",
    "grad_x": "*i16",
    "weights": "*fp32",
    "h": "*u8",
    "h_sf": "*fp32",
    "qdata": "*u8",
    "saved": "*u8",
    "sf": "*u8",
    "partials": "*fp32",
}


@pytest.mark.parametrize(
    ("name", "with_weights", "groups_per_warp", "num_warps", "max_instructions", "max_shared_bytes"),
    [
        ("swiglu_forward", False, swiglu.FORWARD_GROUPS_PER_WARP, 4, 48, 128),
        ("swiglu_forward", True, swiglu.WEIGHTED_GROUPS_PER_WARP, 4, 48, 4096),
        ("swiglu_backward", False, swiglu.BACKWARD_GROUPS_PER_WARP, 2, 52, 4096),
        ("swiglu_backward", True, swiglu.BACKWARD_GROUPS_PER_WARP, 2, 52, 4096),
    ],
)
def test_compiled_for_hopper(
    name: str,
    with_weights: bool,
    groups_per_warp: int,
    num_warps: int,
    max_instructions: int,
    max_shared_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Few instructions an element, or memory would wait for them; 16-byte accesses, no spill.

    An H200 starts 31e12 thread instructions a second. At 4.26 TB/s, of which 0.8 is the aim, that is 55 an element of
    h forward, which moves 6.1 bytes, and 64 backward, 7.1 bytes.
    """
    knobs = pytest.importorskip("triton.knobs", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants: dict[str, Any] = {"GROUPS_PER_ROW": 56, "BLOCK_GROUPS": num_warps * groups_per_warp, "NATIVE": True}
    kernel = getattr(swiglu.kernels(), name)
    if not with_weights:
        constants |= {n: None for n in ("weights", "partials") if n in kernel.arg_names}
    compiled = compile_for_hopper(kernel, POINTERS, constants, num_warps)
    ptx: str = compiled.asm["ptx"]
    # A warp's groups are 256 bytes each of gate, of up and of the gradients, 128 of h, 64 of each packed half.
    forward = name == "swiglu_forward"
    assert ptx.count("ld.global.v4.b32") == (groups_per_warp if forward else groups_per_warp // 2)
    assert ptx.count("st.global.v4.b32") == (
        groups_per_warp // 4 + 2 * (groups_per_warp // 8) if forward else groups_per_warp
    )
    assert ".local" not in ptx
    # The scale bytes, scales and sums of a program; the larger tiles also change layout there, and are faster for it.
    assert compiled.metadata.shared <= max_shared_bytes
    needed = {
        "swiglu_forward": ("max.NaN.f32", "cvt.rn.satfinite.e4m3x2.f32", "ex2.approx.ftz.f32", "div.approx.ftz.f32"),
        "swiglu_backward": ("cvt.rn.bf16x2.f32", "ex2.approx.ftz.f32", "div.approx.ftz.f32"),
    }
    assert [word for word in needed[name] if word not in ptx] == []

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    dump = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    listing = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE)
    assert not [i for i in instructions if i.startswith(("LDL", "STL"))]
    count = len([i for i in instructions if i != "NOP"])
    # A warp's groups have 4 elements for each of its lanes.
    assert 20 < count / (4 * groups_per_warp) < max_instructions


@gpu_only
def test_on_another_stream_and_in_a_graph() -> None:
    """The graph is replayed on new values, behind work that is still running."""
    x, grad = wild((129, 1024), torch.bfloat16, 1).cuda(), wild((129, 512), torch.bfloat16, 2).cuda()
    new_x, new_grad = wild((129, 1024), torch.bfloat16, 3).cuda(), wild((129, 512), torch.bfloat16, 4).cuda()
    weights = some_weights(129, 5).cuda()

    def both() -> tuple[Outcome, Outcome]:
        forward = Outcome(swiglu_forward(x, weights=weights), None)
        assert forward.forward is not None
        return forward, Outcome(None, swiglu_backward(grad, forward.forward[1], weights=weights))

    def check(outcomes: tuple[Outcome, Outcome]) -> None:
        forward, backward = outcomes
        assert forward.forward is not None
        _check(forward, Call(x, weights=weights))
        _check(backward, Call(grad, forward.forward[1], weights))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(new_x)
        grad.copy_(new_grad)
        outcomes = both()
    stream.synchronize()
    check(outcomes)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcomes = both()
    for seed in (6, 7):
        torch.cuda._sleep(50_000_000)
        x.copy_(wild((129, 1024), torch.bfloat16, seed))
        grad.copy_(wild((129, 512), torch.bfloat16, seed + 2))
        graph.replay()
        torch.cuda.synchronize()
        check(outcomes)


@gpu_only
def test_a_row_does_not_depend_on_the_others() -> None:
    """Nor do its bits on the tile, nor on the run."""
    rows, columns = 9000, 1408
    x, grad = torch.randn(rows, 2 * columns, device="cuda"), torch.randn(rows, columns, device="cuda")
    x, grad, weights = x.to(torch.bfloat16), grad.to(torch.bfloat16), torch.randn(rows, device="cuda")
    h, saved = swiglu_forward(x, weights=weights)
    grad_x, grad_weights = swiglu_backward(grad, saved, weights=weights)
    assert grad_weights is not None
    groups = rows * columns // 128
    for first, last in ((0, rows), (0, 1), (8999, 9000), (100, 177)):
        part = slice(first, last)
        per_warp = swiglu.WEIGHTED_GROUPS_PER_WARP
        few = swiglu.pick_tile((last - first) * columns // 128, per_warp) != swiglu.pick_tile(groups, per_warp)
        assert few == (last - first < rows)
        part_h, part_saved = swiglu_forward(x[part], weights=weights[part])
        part_x, part_weights = swiglu_backward(grad[part], part_saved, weights=weights[part])
        assert part_weights is not None
        assert_same_mxfp4(part_saved, MXFP4Tensor(saved.qdata[part], saved.sf[part]))
        assert_same_bits(part_h.data, h.data[part], "h.data")
        assert_same_bits(part_h.sf, h.sf[part], "h.sf")
        assert_same_bits(part_x, grad_x[part], "grad_x")
        assert_same_bits(part_weights, grad_weights[part], "grad_weights")


@gpu_only
@pytest.mark.parametrize("rearrange", [misaligned, spread_out])
def test_out_that_a_kernel_cannot_write(rearrange: Any) -> None:
    x, grad = wild((8, 512), torch.bfloat16, 1).cuda(), wild((8, 256), torch.bfloat16, 2).cuda()
    _, outcome = Call(x).outputs()
    assert outcome.forward is not None
    h, q = outcome.forward
    message = "must be contiguous and on a 16-byte boundary, got strides"
    with pytest.raises(ValueError, match=rf"out\[0\]\.sf {message}"):
        swiglu_forward(x, out=(FP8Tensor(h.data, rearrange(h.sf)), q))
    with pytest.raises(ValueError, match=rf"out\[1\]\.qdata {message}"):
        swiglu_forward(x, out=(h, MXFP4Tensor(rearrange(q.qdata), q.sf)))
    with pytest.raises(ValueError, match=rf"out\[0\] {message}"):
        swiglu_backward(grad, reference.quantize_mxfp4(x), out=(rearrange(x), None))


@gpu_only
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    columns = 7168
    rows = big_rows(columns)
    x = torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16, device="cuda").view(torch.bfloat16)
    weights = torch.linspace(-2, 2, rows, device="cuda")
    h, saved = swiglu_forward(x, weights=weights)
    grad = x[:, : columns // 2].contiguous()
    grads = swiglu_backward(grad, saved, weights=weights)
    assert grads[1] is not None
    for part in slices_of(rows, 64):
        of_part = MXFP4Tensor(saved.qdata[part], saved.sf[part])
        forward = Outcome((FP8Tensor(h.data[part], h.sf[part]), of_part), None)
        _check(forward, Call(x[part], weights=weights[part]))
        backward = Outcome(None, (grads[0][part], grads[1][part]))
        _check(backward, Call(grad[part], of_part, weights[part]))
