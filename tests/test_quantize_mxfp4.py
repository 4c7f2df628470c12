"""quantize_mxfp4 against the oracle, bit for bit, on the CPU and on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from bit_patterns import all_e4m3
from codec_cases import (
    DEVICES,
    POISON,
    REARRANGEMENTS,
    Outputs,
    assert_same_bits,
    assert_same_mxfp4,
    big_rows,
    float32_near_thresholds,
    gpu_only,
    misaligned,
    moved,
    poison_allocator,
    slices_of,
    spread_out,
    transposed,
    values_under_maxima,
    wild,
    wild_fp8,
)
from codec_truth import FEW, MAGNITUDES, random_float32, strided
from hypothesis import given
from hypothesis import strategies as st

from qcomm import FP8Tensor, MXFP4Tensor, Rounding, ScaleRule, dequantize, quantize_mxfp4, reference
from qcomm.formats import MAXIMUM_RULES

pytestmark = pytest.mark.filterwarnings("error")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
OPTIONS: dict[str, dict[str, Any]] = {
    **{rule.name: {"scale_rule": rule} for rule in MAXIMUM_RULES},
    "rotated": {"hadamard": True},
    "rotated, signs": {"hadamard": True, "hadamard_seed": 2**64 - 5},
    "stochastic": {"scale_rule": ScaleRule.RCEIL, "rounding": Rounding.STOCHASTIC, "seed": 11},
    "stochastic, signs": {"rounding": Rounding.STOCHASTIC, "seed": 2**63 + 1, "hadamard": True, "hadamard_seed": 0},
    "unbiased": {"scale_rule": ScaleRule.FLOOR, "rounding": Rounding.UNBIASED, "seed": 2**32},
    "unbiased, signs": {
        "scale_rule": ScaleRule.FLOOR,
        "rounding": Rounding.UNBIASED,
        "seed": 3,
        "hadamard": True,
        "hadamard_seed": 4,
    },
    "quest": {"scale_rule": ScaleRule.QUEST, "hadamard": True},
    "quest, signs": {"scale_rule": ScaleRule.QUEST, "hadamard": True, "hadamard_seed": 2**40},
}
SHAPES = [(0, 128), (1, 32), (3, 64), (127, 128), (129, 160), (1000, 384), (33, 2048), (5, 7168)]


def _oracle(x: torch.Tensor | FP8Tensor, **options: Any) -> tuple[MXFP4Tensor, torch.Tensor]:
    seed = options.pop("hadamard_seed", None)
    signs = 0 if seed is None else reference.hadamard_signs(seed)
    return reference.quantize_mxfp4_clip_mask(x, **options, signs=signs)


def _check(x: torch.Tensor | FP8Tensor, *, oracle: str = "cpu", clip_mask: bool = False, **options: Any) -> MXFP4Tensor:
    """Compare on the device of x; "same" lets the oracle run there too, for large inputs."""
    outputs = Outputs(x.device)
    out = outputs.mxfp4(tuple(x.shape))
    if clip_mask:
        poison_allocator(max(1, x.shape.numel()), x.device)
        q, clipped = quantize_mxfp4(x, **options, return_clip_mask=True, out=out)
    else:
        q = quantize_mxfp4(x, **options, out=out)
    expected, mask = _oracle(x if oracle == "same" else moved(x, "cpu"), **options)
    assert (q.qdata.data_ptr(), q.sf.data_ptr()) == (out.qdata.data_ptr(), out.sf.data_ptr())
    assert_same_mxfp4(q, expected)
    outputs.check()
    if clip_mask:
        # As bytes: a bool may hold nothing but 0 and 1.
        assert clipped.dtype == torch.bool
        assert_same_bits(clipped.view(torch.uint8), mask.view(torch.uint8), "clip mask")
    return q


def _source(rows: int, columns: int, dtype: torch.dtype, seed: int, device: str) -> torch.Tensor | FP8Tensor:
    if dtype == torch.float8_e4m3fn:
        return moved(wild_fp8(rows, columns, seed), device)
    return wild((rows, columns), dtype, seed).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_option(device: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    _check(_source(67, 384, dtype, 0, device), **options)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        *(("quest, signs", dtype) for dtype in DTYPES),
        ("FLOOR", torch.bfloat16),
        ("CEIL", torch.float32),
        ("rotated", torch.bfloat16),
        ("stochastic", torch.float32),
        ("unbiased, signs", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_clip_mask(device: str, options: str, dtype: torch.dtype) -> None:
    """Wild values, and values at 6 scales and next to it."""
    _check(_source(131, 384, dtype, 1, device), clip_mask=True, **OPTIONS[options])
    edges = [5.0, float(np.nextafter(np.float32(6), np.float32(0))), 6.0, -6.0, 6.5, -7.5, 4.0, 0.0]
    x = torch.tensor(edges).repeat(16)[None].repeat(3, 1).to(device)
    if dtype != torch.float8_e4m3fn:
        _check(x.to(dtype), clip_mask=True, **OPTIONS[options])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_shape(device: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    if dtype == torch.float8_e4m3fn:
        columns = -(-columns // 128) * 128
    x = _source(rows, columns, dtype, 2, device)
    _check(x)
    _check(x, **OPTIONS["stochastic"])


@gpu_only
@pytest.mark.parametrize("options", ["EVEN", "rotated, signs", "stochastic, signs", "unbiased", "quest"])
def test_large_rows(options: str) -> None:
    _check(_source(1000, 7168, torch.bfloat16, 3, "cuda"), oracle="same", **OPTIONS[options])


@pytest.mark.parametrize("lead", [(), (1,), (4, 3), (2, 0, 5), (2, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions(device: str, lead: tuple[int, ...]) -> None:
    x = wild((*lead, 96), torch.bfloat16, 4).to(device)
    q = _check(x, clip_mask=True, **OPTIONS["stochastic"])
    assert (q.shape, q.sf.shape) == (x.shape, (*lead, 3))


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_16_bit_value_under_every_scale(device: str, dtype: torch.dtype, rule: ScaleRule) -> None:
    """Every value under every scale that the rule can give it, and as a maximum; on the CPU a part of the binades."""
    step = 1 if device == "cuda" else 51
    _check(values_under_maxima(rule, dtype, device, step), oracle="same", scale_rule=rule)


@gpu_only
@pytest.mark.parametrize("options", ["rotated, signs", "quest", "stochastic", "unbiased"])
def test_every_bf16_value_by_the_other_paths(options: str) -> None:
    x = values_under_maxima(ScaleRule.FLOOR, torch.bfloat16, "cuda")
    _check(x, oracle="same", **OPTIONS[options])


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
@pytest.mark.parametrize("device", DEVICES)
def test_float32_near_every_threshold(device: str, rule: ScaleRule) -> None:
    """Neighbours of midpoints and of rules' thresholds under every exponent, then random bits."""
    _check(float32_near_thresholds().to(device), oracle="same", scale_rule=rule)
    rows = 4096 if device == "cuda" else 64
    bits = random_float32(np.random.default_rng(5), (rows, 64))
    _check(torch.from_numpy(bits).to(device), oracle="same", scale_rule=rule)


@pytest.mark.parametrize("options", [*(rule.name for rule in MAXIMUM_RULES), "stochastic", "unbiased"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_e4m3_code_under_every_scale(device: str, options: str) -> None:
    """All powers of two of float32, random scales, 0, subnormals, infinity and NaN.

    And scales next to the quotient of a half-way point between E2M1 numbers and a code, where codes change.
    """
    rng = np.random.default_rng(6)
    codes = torch.cat([all_e4m3().view(torch.uint8)] * 2)
    codes = torch.stack([codes[torch.from_numpy(rng.permutation(512))] for _ in range(2)])
    codes[1] = torch.where(codes[1] & 0x7F == 0x7F, 0, codes[1])
    powers = np.ldexp(np.float32(1), np.arange(-149, 128))
    random = np.abs(random_float32(rng, (299,)))
    special = np.array([0, -0.0, np.inf, np.nan, 1e-45, 1e-41, 3.4e38, 2.0**-126], dtype=np.float32)
    quotients = np.float32(np.divide.outer([4, 5, 6, 7], np.arange(8, 16)).ravel())
    near = np.concatenate([np.nextafter(quotients, np.float32(side)) for side in (0, 9)])
    sf = torch.from_numpy(np.concatenate([powers, random, special, quotients, near]))
    x = FP8Tensor(codes.repeat(len(sf), 1).view(torch.float8_e4m3fn), sf.repeat_interleave(2)[:, None].repeat(1, 4))
    _check(moved(x, device), oracle="same", **OPTIONS[options])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_16_bit_pattern_in_order(device: str, dtype: torch.dtype) -> None:
    """All NaN, infinities, zeros and subnormals, as 16-bit values or as the upper half of a float32."""
    patterns = torch.arange(65536, dtype=torch.int32)
    x = (patterns << 16).view(dtype) if dtype == torch.float32 else patterns.to(torch.int16).view(dtype)
    for options in ("EVEN", "rotated", "stochastic"):
        _check(x.view(16, 4096).to(device), clip_mask=True, **OPTIONS[options])


def _rearranged(x: torch.Tensor | FP8Tensor, name: str) -> torch.Tensor | FP8Tensor:
    rearrange = REARRANGEMENTS[name]
    if isinstance(x, FP8Tensor):
        data = rearrange(x.data.view(torch.uint8)).view(torch.float8_e4m3fn)
        return FP8Tensor(data, rearrange(x.sf))
    return rearrange(x)


@pytest.mark.parametrize("name", REARRANGEMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_any_strides(device: str, dtype: torch.dtype, name: str) -> None:
    x = _rearranged(_source(37, 256, dtype, 7, device), name)
    if not isinstance(x, FP8Tensor):
        assert x.data_ptr() % 16 or not x.is_contiguous()
    _check(x)
    _check(x, **OPTIONS["stochastic, signs"])


@pytest.mark.parametrize("device", DEVICES)
def test_slices_of_a_larger_tensor(device: str) -> None:
    x = wild((9, 5, 256), torch.bfloat16, 8).to(device)
    for part in (x[2:7], x[:, 3], x[..., 32:160], x[::2, 1:4, 64:], x.flip(0), x[0, 0], x[:, :, ::2]):
        _check(part)
    _check(x[:1, :1].expand(4, 5, 256))


@pytest.mark.parametrize("options", ["stochastic", "stochastic, signs", "unbiased"])
@pytest.mark.parametrize("device", DEVICES)
def test_random_bits_go_by_the_position_alone(device: str, options: str) -> None:
    """Not by the number of rows, nor by how the dimensions are cut."""
    x = wild((700, 256), torch.bfloat16, 9).to(device)
    whole = quantize_mxfp4(x, **OPTIONS[options])
    for rows in (1, 2, 33, 512, 699):
        part = quantize_mxfp4(x[:rows], **OPTIONS[options])
        assert_same_bits(part.qdata, whole.qdata[:rows], "qdata")
    for shape in ((100, 7, 256), (1400, 128), (179200,)):
        part = quantize_mxfp4(x.reshape(shape), **OPTIONS[options])
        assert_same_bits(part.qdata.view(700, 128), whole.qdata, "qdata")
    again = quantize_mxfp4(x, **OPTIONS[options])
    assert_same_mxfp4(again, whole)
    other = quantize_mxfp4(x, **{**OPTIONS[options], "seed": OPTIONS[options]["seed"] ^ 1 << 63})
    assert not torch.equal(other.qdata, whole.qdata)


@pytest.mark.parametrize("rounding", [Rounding.STOCHASTIC, Rounding.UNBIASED])
@pytest.mark.parametrize("device", DEVICES)
def test_random_roundings_are_unbiased(device: str, rounding: Rounding) -> None:
    """The mean of N decoded values is within 5 standard deviations, gap * sqrt(p (1 - p) / N) each, of the value.

    UNBIASED rounds 3/4 of the value and decodes 4/3 of that. Sixteen bits and float32(4/3) add less than gap / 32768.
    """
    rule, factor, limit = (
        (ScaleRule.RCEIL, 1.0, 6.0) if rounding is Rounding.STOCHASTIC else (ScaleRule.FLOOR, 0.75, 7.99)
    )
    num_seeds, rows = (64, 8192) if device == "cuda" else (8, 512)
    values = torch.linspace(-limit, limit, 32)
    total = torch.zeros(32, dtype=torch.float64, device=device)
    for seed in range(num_seeds):
        q = quantize_mxfp4(values.to(device).expand(rows, 32), scale_rule=rule, rounding=rounding, seed=seed)
        total += dequantize(q, torch.float32).double().sum(0)
    count = num_seeds * rows
    magnitude = factor * values.abs().double().numpy()
    low = np.searchsorted(MAGNITUDES, magnitude, side="right") - 1
    gap = np.append(np.diff(MAGNITUDES), 2.0)[low]
    p = (magnitude - MAGNITUDES[low]) / gap
    error = (total.cpu() / count - values).abs().numpy()
    assert (error <= gap / factor * (5 * np.sqrt(p * (1 - p) / count) + 1 / 32768)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_result_takes_no_gradient(device: str) -> None:
    x = torch.randn(4, 64, device=device, requires_grad=True)
    q, clipped = quantize_mxfp4(x, return_clip_mask=True)
    assert not any(part.requires_grad for part in (q.qdata, q.sf, clipped))
    assert_same_mxfp4(q, quantize_mxfp4(x.detach()))


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data())
@FEW
def test_any_shape_strides_and_options(device: str, data: st.DataObject) -> None:
    options = OPTIONS[data.draw(st.sampled_from(sorted(OPTIONS)))]
    dtype = data.draw(st.sampled_from(DTYPES[:3]))
    x = data.draw(strided(32)).to(device).to(dtype)
    _check(x, **{**options, "seed": data.draw(st.integers(0, 2**64 - 1))})


@pytest.mark.parametrize(
    ("x", "options", "kind", "message"),
    [
        (None, {}, TypeError, r"x must be a torch\.Tensor or an FP8Tensor, got NoneType"),
        (torch.zeros(2, 32).double(), {}, TypeError, r"x must be bfloat16, .* or an FP8Tensor, got torch\.float64"),
        (torch.zeros(2, 48), {}, ValueError, r"x\.shape\[-1\] must be a multiple of 32, got shape \(2, 48\)"),
        (torch.zeros(()), {}, ValueError, r"x\.shape\[-1\] must be a multiple of 32, got shape \(\)"),
        (torch.zeros(2, 32), {"scale_rule": "even"}, TypeError, "scale_rule must be a ScaleRule, got str"),
        (torch.zeros(2, 32), {"rounding": 1}, TypeError, "rounding must be a Rounding, got int"),
        (torch.zeros(2, 32), {"hadamard": 1}, TypeError, "hadamard must be a bool, got int"),
        (torch.zeros(2, 32), {"seed": 1.0}, TypeError, "seed must be an int, got float"),
        (torch.zeros(2, 32), {"seed": True}, TypeError, "seed must be an int, got bool"),
        (torch.zeros(2, 32), {"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        (torch.zeros(2, 32), {"seed": 2**64}, ValueError, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
        (
            torch.zeros(2, 32),
            {"hadamard": True, "hadamard_seed": -3},
            ValueError,
            r"hadamard_seed must be in \[0, 2\*\*64\), got -3",
        ),
        (
            torch.zeros(2, 32),
            {"hadamard": True, "hadamard_seed": "a"},
            TypeError,
            "hadamard_seed must be an int, got str",
        ),
        (torch.zeros(2, 32), {"hadamard_seed": 7}, ValueError, "hadamard_seed must be None without hadamard, got 7"),
        (
            torch.zeros(2, 32),
            {"scale_rule": ScaleRule.QUEST},
            ValueError,
            "QUEST needs hadamard=True and NEAREST, got hadamard=False and NEAREST",
        ),
        (
            torch.zeros(2, 32),
            {"scale_rule": ScaleRule.QUEST, "hadamard": True, "rounding": Rounding.STOCHASTIC},
            ValueError,
            "QUEST needs hadamard=True and NEAREST, got hadamard=True and STOCHASTIC",
        ),
        (
            torch.zeros(2, 32),
            {"rounding": Rounding.UNBIASED},
            ValueError,
            "UNBIASED needs scale_rule FLOOR, got EVEN",
        ),
        (
            FP8Tensor(torch.zeros(2, 128, dtype=torch.float8_e4m3fn), torch.zeros(2, 1, dtype=torch.int32)),
            {},
            TypeError,
            r"x\.sf must be torch\.float32, got torch\.int32",
        ),
    ],
)
def test_argument_errors(x: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        quantize_mxfp4(x, **options)


@pytest.mark.parametrize(
    ("shape", "device", "message"),
    [
        ((3, 64), "cpu", r"out\.qdata\.shape must be \(2, 32\), got \(3, 32\)"),
        ((2, 128), "cpu", r"out\.qdata\.shape must be \(2, 32\), got \(2, 64\)"),
        ((1, 2, 64), "cpu", r"out\.qdata\.shape must be \(2, 32\), got \(1, 2, 32\)"),
        ((2, 64), "meta", r"out\.qdata must be on cpu, got meta"),
    ],
)
def test_out_that_does_not_fit(shape: tuple[int, ...], device: str, message: str) -> None:
    out = MXFP4Tensor(
        torch.zeros(*shape[:-1], shape[-1] // 2, dtype=torch.uint8, device=device),
        torch.zeros(*shape[:-1], shape[-1] // 32, dtype=torch.uint8, device=device),
    )
    with pytest.raises(ValueError, match=message):
        quantize_mxfp4(torch.zeros(2, 64), out=out)


@gpu_only
@pytest.mark.parametrize("rearrange", [misaligned, spread_out, transposed])
@pytest.mark.parametrize("part", ["qdata", "sf"])
def test_out_that_a_kernel_cannot_write(part: str, rearrange: Any) -> None:
    x = torch.randn(64, 512, device="cuda")
    good = Outputs("cuda").mxfp4((64, 512))
    out = dataclasses.replace(good, **{part: rearrange(getattr(good, part))})
    with pytest.raises(ValueError, match=rf"out\.{part} must be contiguous and on a 16-byte boundary, got strides"):
        quantize_mxfp4(x, out=out)
    assert (good.qdata == POISON).all()


@gpu_only
@pytest.mark.slow
@pytest.mark.parametrize("options", ["EVEN", "stochastic"])
def test_more_than_2_to_the_31_elements(options: str) -> None:
    columns = 7168
    rows = big_rows(columns)
    x = torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16, device="cuda").view(torch.bfloat16)
    q = quantize_mxfp4(x, **OPTIONS[options])
    for part in slices_of(rows, 64):
        numbers = torch.arange(part.start, part.stop, device="cuda")
        expected = reference.quantize_mxfp4(x[part], **OPTIONS[options], rows=numbers)
        assert_same_bits(q.qdata[part], expected.qdata, f"qdata of {part}")
        assert_same_bits(q.sf[part], expected.sf, f"sf of {part}")
