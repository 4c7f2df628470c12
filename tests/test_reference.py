"""The oracle of MXFP4 quantization to the nearest code, and of decoding, against independent arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from bit_patterns import all_bf16, equal_bits
from codec_truth import (
    BF16_MAGNITUDES,
    FEW,
    MAGNITUDES,
    SCALE_LIMITS,
    SCALES,
    Array,
    decode,
    float32,
    fp8_of,
    groups_under_maximum,
    nearest_codes,
    non_contiguous,
    pack,
    random_float32,
    scale_bytes,
    strided,
    unpack,
)
from hypothesis import given
from hypothesis import strategies as st

from qcomm.formats import MAXIMUM_RULES, WIRE_ROUNDINGS, Rounding, ScaleRule
from qcomm.reference import dequantize_fp8, dequantize_mxfp4, mxfp4_to_fp8, quantize_fp8, quantize_mxfp4, to_dtype
from qcomm.tensors import FP8Tensor, MXFP4Tensor


def _assert_quantizes_exactly(x: torch.Tensor | FP8Tensor, exact: Array, rule: ScaleRule) -> None:
    """Check finite blocks against the rule and the nearest code of their exact values."""
    blocks = exact.reshape(-1, 32)
    sf = scale_bytes(np.abs(blocks).max(-1), rule)
    qdata = pack(nearest_codes(np.ldexp(blocks, 127 - sf.astype(np.int64)[:, None])))
    q = quantize_mxfp4(x, rule)
    np.testing.assert_array_equal(q.sf.numpy().reshape(-1), sf)
    np.testing.assert_array_equal(q.qdata.numpy().reshape(-1, 16), qdata)


def test_enumerated_truth_agrees_with_ml_dtypes() -> None:
    """Ties to even and saturation, at and around every midpoint, as far as float32 resolves them."""
    middle = ((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2).astype(np.float32)
    near = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(9))]
    values = np.concatenate([*near, MAGNITUDES.astype(np.float32), float32([6.5, 7, 8, 1e30, 1e-45])])
    values = np.concatenate([values, -values])
    np.testing.assert_array_equal(nearest_codes(values), values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
    np.testing.assert_array_equal(nearest_codes(middle), [0, 2, 2, 4, 4, 6, 6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_every_code_under_every_scale(dtype: torch.dtype) -> None:
    codes = np.tile(np.concatenate([np.arange(16), np.arange(16)[::-1]]), (256, 1)).astype(np.uint8)
    x = MXFP4Tensor(torch.from_numpy(pack(codes)), torch.arange(256).to(torch.uint8)[:, None])
    with np.errstate(over="ignore"):
        truth = torch.from_numpy(decode(x).astype(np.float32))
    out = dequantize_mxfp4(x, dtype)
    if dtype == torch.bfloat16:
        truth = torch.from_numpy(truth.numpy().astype(ml_dtypes.bfloat16).view(np.uint16)).view(dtype)
        assert set(out[255].view(torch.int16).tolist()) == {0x7FFF}
    assert out[0, 1] == 2.0**-128
    assert equal_bits(out[:255], truth[:255])
    assert out[255].isnan().all()


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_scale_of_every_bf16_maximum(rule: ScaleRule) -> None:
    maxima = torch.from_numpy(BF16_MAGNITUDES).bfloat16()
    index = torch.arange(len(maxima))
    x = torch.zeros(len(maxima), 32, dtype=torch.bfloat16)
    x[index, index % 32] = torch.where(index % 3 == 0, -maxima, maxima)
    sf = quantize_mxfp4(x, rule).sf[:, 0].numpy()
    np.testing.assert_array_equal(sf, scale_bytes(BF16_MAGNITUDES, rule))


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_scale_at_the_float32_neighbours_of_every_threshold(rule: ScaleRule) -> None:
    limit, _ = SCALE_LIMITS[rule]
    with np.errstate(over="ignore"):
        edges = (limit * SCALES[:253]).astype(np.float32)
        edges = np.stack([np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, np.float32(np.inf))])
    edges = edges[np.isfinite(edges)]
    x = torch.from_numpy(edges)[:, None] * torch.eye(32)[5]
    np.testing.assert_array_equal(quantize_mxfp4(x, rule).sf[:, 0].numpy(), scale_bytes(edges, rule))


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_quantize_every_bf16_value_under_every_scale(rule: ScaleRule) -> None:
    """For each scale byte, the largest maximum that gives it and every value which that maximum admits."""
    sf_of = scale_bytes(BF16_MAGNITUDES, rule)
    reachable = np.unique(sf_of)
    np.testing.assert_array_equal(reachable, np.arange(reachable[-1] + 1))
    assert reachable[-1] == (252 if rule is ScaleRule.FLOOR else 253)
    for sf in reachable.tolist():
        x = groups_under_maximum(int(np.searchsorted(sf_of, sf, side="right")) - 1, size=32, position=sf)
        scaled = (x.double().numpy() * 2.0 ** (127 - sf)).astype(np.float32)
        q = quantize_mxfp4(x, rule)
        assert (q.sf == sf).all()
        np.testing.assert_array_equal(q.qdata.numpy(), pack(scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)))


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_quantize_every_fp16_value(rule: ScaleRule, shuffle: bool) -> None:
    """In blocks of neighbouring values (of both signs), and in blocks of random ones."""
    magnitudes = np.arange(0x7C00, dtype=np.uint16)
    values = np.stack([magnitudes, magnitudes | 0x8000], -1).reshape(-1, 32).view(np.float16)
    if shuffle:
        values = np.random.default_rng(0).permuted(values, axis=None)
    _assert_quantizes_exactly(torch.from_numpy(values), values.astype(np.float64), rule)


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_quantize_fp32(rule: ScaleRule) -> None:
    """Random bits, neighbours of the midpoints, subnormals, and the largest value."""
    rng = np.random.default_rng(1)
    wild = random_float32(rng, (256, 32))
    tame = rng.standard_normal((256, 32), dtype=np.float32)
    middle = ((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2).astype(np.float32)
    edges = np.stack([np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(9))])
    edges = np.concatenate([edges.reshape(-1), float32([6])])
    edges = np.ldexp(rng.choice(np.concatenate([edges, -edges]), (256, 32)), rng.integers(-120, 120, (256, 1)))
    subnormal = (rng.integers(0, 2**23, (64, 32)) >> rng.integers(0, 23, (64, 1))).astype(np.uint32)
    subnormal |= rng.integers(0, 2, (64, 32), dtype=np.uint32) << 31
    largest = wild[:32].copy()
    largest[:, 3] = np.finfo(np.float32).max
    values = np.concatenate([wild, tame, edges.astype(np.float32), subnormal.view(np.float32), largest])
    _assert_quantizes_exactly(torch.from_numpy(values), values.astype(np.float64), rule)


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
@pytest.mark.parametrize("rounding", WIRE_ROUNDINGS)
def test_zero_block_keeps_its_signs(rule: ScaleRule, rounding: Rounding) -> None:
    signs = torch.arange(64).view(2, 32) % 3 == 0
    q = quantize_mxfp4(torch.where(signs, -0.0, 0.0).bfloat16(), rule, rounding, seed=5)
    assert (q.sf == 0).all()
    np.testing.assert_array_equal(unpack(q.qdata), signs.numpy() * 8)
    assert torch.equal(torch.signbit(dequantize_mxfp4(q)), signs)


@pytest.mark.parametrize("rounding", WIRE_ROUNDINGS)
def test_every_nan_and_inf_spoils_its_block_alone(rounding: Rounding) -> None:
    values = all_bf16()
    bad = values[~values.isfinite()]
    x = torch.randn(len(bad), 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.arange(len(bad))
    clean = quantize_mxfp4(x, rounding=rounding)
    x[index, 32 + index % 32] = bad
    q = quantize_mxfp4(x, rounding=rounding)
    assert (q.sf[:, 1] == 255).all()
    assert not q.qdata[:, 16:32].any()
    assert dequantize_mxfp4(q)[:, 32:64].isnan().all()
    assert torch.equal(q.sf[:, [0, 2]], clean.sf[:, [0, 2]])
    assert torch.equal(q.qdata[:, :16], clean.qdata[:, :16])
    assert torch.equal(q.qdata[:, 32:], clean.qdata[:, 32:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_nan_and_inf_of_the_other_dtypes(dtype: torch.dtype, bad: float) -> None:
    q = quantize_mxfp4(torch.ones(32, 32, dtype=dtype).diagonal_scatter(torch.full((32,), bad, dtype=dtype)))
    assert (q.sf == 255).all()
    assert not q.qdata.any()


def test_long_double_holds_the_products() -> None:
    assert np.finfo(np.longdouble).nmant >= 28


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_quantize_every_e4m3_code_under_every_power_of_two(rule: ScaleRule, shuffle: bool) -> None:
    """In blocks of neighbouring values (of both signs), and in blocks of random ones."""
    magnitudes = np.arange(0x80, dtype=np.uint8) % 0x7F
    codes = np.stack([magnitudes, magnitudes | 0x80], -1).reshape(-1)
    sf = np.ldexp(np.float32(1), np.arange(-149, 128))[:, None].repeat(2, axis=1)
    codes = np.tile(codes, (len(sf), 1))
    if shuffle:
        codes = np.random.default_rng(2).permuted(codes, axis=1)
    x, exact = fp8_of(codes, sf)
    assert len(np.unique(codes)) == 254
    _assert_quantizes_exactly(x, exact, rule)


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_quantize_e4m3_under_random_scales(rule: ScaleRule) -> None:
    rng = np.random.default_rng(3)
    codes = (rng.integers(0, 0x7F, (128, 256)) | rng.integers(0, 2, (128, 256)) << 7).astype(np.uint8)
    sf = np.abs(random_float32(rng, (128, 2)))
    sf[:16] = (rng.integers(1, 2**23, (16, 2)) >> rng.integers(0, 23, (16, 2))).astype(np.uint32).view(np.float32)
    _assert_quantizes_exactly(*fp8_of(codes, sf), rule)


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_quantize_e4m3_products_at_and_near_ties(rule: ScaleRule) -> None:
    """Scales at and next to boundary / datum, for the mantissas of every midpoint and every scale limit.

    Some products fall closer to the boundary than float32 resolves: there, quantizing products that were
    rounded to float32 gives other bits.
    """
    boundaries = np.array([1, 1.25, 1.5, 1.75, 1.8125])
    mantissas = np.arange(0x38, 0x40, dtype=np.uint8)
    values = mantissas.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    sf = np.divide.outer(boundaries, values).reshape(-1, 1).astype(np.float32)
    # Each block holds the datum in six binades: alone in one, under a maximum of each mantissa in eight.
    codes = np.zeros((len(sf), 12, 32), dtype=np.uint8)
    codes[:, :9, 4:10] = (np.tile(mantissas, len(boundaries))[:, None] - 8 * np.arange(6))[:, None]
    codes[:, :9, 10:16] = codes[:, :9, 4:10] | 0x80
    codes[:, :8, 20] = mantissas + 8
    sf = np.concatenate([sf, np.nextafter(sf, np.float32(0)), np.nextafter(sf, np.float32(99))])
    x, exact = fp8_of(np.tile(codes.reshape(-1, 384), (3, 1)), sf.repeat(3, axis=1))
    _assert_quantizes_exactly(x, exact, rule)
    assert not torch.equal(quantize_mxfp4(dequantize_fp8(x), rule).qdata, quantize_mxfp4(x, rule).qdata)


@pytest.mark.parametrize(("code", "sf"), [(0x7F, 1.0), (0xFF, 1.0), (0, np.nan), (0x38, np.inf)])
def test_nan_and_inf_of_an_fp8_tensor(code: int, sf: float) -> None:
    codes = np.full((2, 128), 0x38, dtype=np.uint8)
    codes[1, ::32] = code
    x, _ = fp8_of(codes, np.array([[1.0], [sf]], dtype=np.float32))
    q = quantize_mxfp4(x)
    assert (q.sf[0] == 125).all()
    assert (q.sf[1] == 255).all()
    assert not q.qdata[1].any()


def test_products_past_float32_saturate_under_the_last_scale() -> None:
    """448 * 2^127 is finite, though no float32."""
    x, _ = fp8_of(np.full((1, 128), 0x7E, dtype=np.uint8), float32([[2.0**127]]))
    q = quantize_mxfp4(x)
    assert (q.sf == 254).all()
    assert (q.qdata == 0x77).all()
    assert (dequantize_mxfp4(q) == torch.inf).all()


def test_quantize_errors() -> None:
    with pytest.raises(ValueError, match=r"x\.shape\[-1\] must be a multiple of 32, got 48"):
        quantize_mxfp4(torch.zeros(2, 48))
    with pytest.raises(TypeError, match=r"x must be bfloat16, .*, got torch\.float64"):
        quantize_mxfp4(torch.zeros(2, 32, dtype=torch.float64))
    for convert in (quantize_fp8, lambda x: mxfp4_to_fp8(quantize_mxfp4(x))):
        with pytest.raises(ValueError, match=r"x\.shape\[-1\] must be a multiple of 128, got 96"):
            convert(torch.zeros(2, 96))
    with pytest.raises(TypeError, match=r"x must be .*, got torch\.int32"):
        quantize_fp8(torch.zeros(2, 128, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"dtype must be .*, got torch\.float16"):
        dequantize_mxfp4(quantize_mxfp4(torch.zeros(2, 32)), torch.float16)


def test_to_bf16() -> None:
    rng = np.random.default_rng(21)
    ties = (rng.integers(0, 0x7F7F, 4096, dtype=np.uint32) << 16) + 0x8000
    values = np.concatenate([random_float32(rng, (4096,)), ties.view(np.float32), float32([np.inf, -np.inf])])
    with np.errstate(over="ignore"):
        truth = values.astype(ml_dtypes.bfloat16).view(np.int16)
    np.testing.assert_array_equal(to_dtype(torch.from_numpy(values), torch.bfloat16).view(torch.int16), truth)
    nans = torch.tensor([0x7F800001, 0x7FC00000, -1, -0x400000], dtype=torch.int32).view(torch.float32)
    assert set(to_dtype(nans, torch.bfloat16).view(torch.int16).tolist()) == {0x7FFF}
    assert set(to_dtype(nans, torch.float32).view(torch.int32).tolist()) == {0x7FFFFFFF}


@given(strided(32), st.sampled_from(WIRE_ROUNDINGS), st.booleans())
@FEW
def test_mxfp4_of_any_shape_and_strides(x: torch.Tensor, rounding: Rounding, hadamard: bool) -> None:
    q = quantize_mxfp4(x, rounding=rounding, seed=1, hadamard=hadamard)
    assert q.shape == x.shape
    flat = quantize_mxfp4(x.reshape(-1, x.shape[-1]), rounding=rounding, seed=1, hadamard=hadamard)
    assert torch.equal(q.qdata.reshape(flat.qdata.shape), flat.qdata)
    assert torch.equal(q.sf.reshape(flat.sf.shape), flat.sf)
    spread = MXFP4Tensor(non_contiguous(q.qdata), non_contiguous(q.sf), hadamard)
    assert equal_bits(dequantize_mxfp4(spread), dequantize_mxfp4(q))
    assert dequantize_mxfp4(q, torch.bfloat16).shape == x.shape


def test_zero_rows() -> None:
    empty = quantize_mxfp4(torch.zeros(0, 256).bfloat16())
    assert (empty.shape, empty.sf.shape) == ((0, 256), (0, 8))
    out, overflows = mxfp4_to_fp8(empty)
    assert (out.shape, out.sf.shape, overflows.item()) == ((0, 256), (0, 2), 0)
    assert quantize_fp8(torch.zeros(0, 256)).sf.shape == (0, 2)
    assert dequantize_fp8(out).shape == (0, 256)
