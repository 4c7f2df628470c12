"""The oracle of the codec against ml_dtypes, exact rational arithmetic and brute enumeration."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from bit_patterns import all_bf16, all_e4m3, equal_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from qcomm.formats import MAXIMUM_RULES, WIRE_ROUNDINGS, Rounding, ScaleLayout, ScaleRule
from qcomm.reference import (
    dequantize_fp8,
    dequantize_mxfp4,
    hadamard32,
    mxfp4_to_fp8,
    philox4x32,
    quantize_fp8,
    quantize_mxfp4,
    random_bits16,
    to_dtype,
)
from qcomm.reference_columnwise import mxfp4_to_fp8_columnwise, quantize_fp8_columnwise
from qcomm.tensors import FP8Tensor, MXFP4Tensor, empty_scales

Array = npt.NDArray[Any]

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
EVEN_CODES_FIRST = np.array([0, 2, 4, 6, 1, 3, 5, 7])
SCALES = np.ldexp(1.0, np.arange(255) - 127)
# The scale is the smallest for which amax / scale stays below ("right") or does not pass ("left") the limit.
SCALE_LIMITS: dict[ScaleRule, tuple[float, Literal["left", "right"]]] = {
    ScaleRule.FLOOR: (8, "right"),
    ScaleRule.EVEN: (7, "right"),
    ScaleRule.NEAR_MSE: (7.25, "right"),
    ScaleRule.RCEIL: (6, "left"),
    ScaleRule.CEIL: (4, "left"),
}
BF16_MAGNITUDES = all_bf16()[:0x7F80].double().numpy()
"""The non-negative finite BF16 values, rising: index is bit pattern."""

FEW = settings(deadline=None, max_examples=25)


def _float32(values: object) -> Array:
    return np.array(values, dtype=np.float32)


def _scale_bytes(amax: Array, rule: ScaleRule) -> Array:
    """Scale byte of each block maximum, by search over all scales."""
    limit, side = SCALE_LIMITS[rule]
    found = np.searchsorted((limit * SCALES).astype(np.longdouble), amax.astype(np.longdouble), side)
    return np.where(amax == 0, 0, found.clip(max=254)).astype(np.uint8)


def _nearest_codes(scaled: Array) -> Array:
    """E2M1 code of each value, by enumeration of the distances; the first smallest is the even code."""
    distance = np.abs(np.abs(scaled).clip(max=8)[..., None] - MAGNITUDES[EVEN_CODES_FIRST])
    return (EVEN_CODES_FIRST[distance.argmin(-1)] | np.signbit(scaled) << 3).astype(np.uint8)


def _pack(codes: Array) -> Array:
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _unpack(qdata: torch.Tensor) -> Array:
    packed = qdata.contiguous().numpy()
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def _decode(x: MXFP4Tensor) -> Array:
    """Exact float64 values of an unrotated tensor, by ml_dtypes."""
    values = _unpack(x.qdata).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = x.sf.contiguous().numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return values * scales.repeat(32, axis=-1)


def _to_e4m3_codes(values: Array) -> Array:
    return values.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _codes(x: torch.Tensor) -> Array:
    return x.contiguous().view(torch.uint8).numpy()


def _assert_quantizes_exactly(x: torch.Tensor | FP8Tensor, exact: Array, rule: ScaleRule) -> None:
    """Check finite blocks against the rule and the nearest code of their exact values."""
    blocks = exact.reshape(-1, 32)
    sf = _scale_bytes(np.abs(blocks).max(-1), rule)
    qdata = _pack(_nearest_codes(np.ldexp(blocks, 127 - sf.astype(np.int64)[:, None])))
    q = quantize_mxfp4(x, rule)
    np.testing.assert_array_equal(q.sf.numpy().reshape(-1), sf)
    np.testing.assert_array_equal(q.qdata.numpy().reshape(-1, 16), qdata)


def _random_float32(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Finite float32 of random bits: every exponent, subnormals included, is equally likely."""
    bits = rng.integers(0, 0xFF << 23, shape, dtype=np.uint32)
    return (bits | rng.integers(0, 2, shape, dtype=np.uint32) << 31).view(np.float32)


def _random_mxfp4(rng: np.random.Generator, rows: int, K: int, low: int = 0, high: int = 256) -> MXFP4Tensor:
    """Random codes, with one block in eight all zero."""
    qdata = rng.integers(0, 256, (rows, K // 32, 16), dtype=np.uint8)
    qdata[rng.random((rows, K // 32)) < 0.125] &= 0x88
    sf = rng.integers(low, high, (rows, K // 32), dtype=np.uint8)
    return MXFP4Tensor(torch.from_numpy(qdata.reshape(rows, K // 2)), torch.from_numpy(sf))


def _groups_under_maximum(index: int, size: int, position: int) -> torch.Tensor:
    """Rows of `size` BF16 values: all values up to the maximum, and in each row the maximum itself."""
    patterns = np.concatenate([np.arange(index + 1), np.arange(index + 1) | 0x8000])
    patterns = np.resize(patterns, (-(-len(patterns) // (size - 1)), size - 1))
    patterns = np.insert(patterns, position % size, index | (position & 1) << 15, axis=1)
    return torch.from_numpy(patterns.astype(np.uint16)).view(torch.bfloat16)


def test_enumerated_truth_agrees_with_ml_dtypes() -> None:
    """Ties to even and saturation, at and around every midpoint, as far as float32 resolves them."""
    middle = ((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2).astype(np.float32)
    near = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(9))]
    values = np.concatenate([*near, MAGNITUDES.astype(np.float32), _float32([6.5, 7, 8, 1e30, 1e-45])])
    values = np.concatenate([values, -values])
    np.testing.assert_array_equal(_nearest_codes(values), values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
    np.testing.assert_array_equal(_nearest_codes(middle), [0, 2, 2, 4, 4, 6, 6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_every_code_under_every_scale(dtype: torch.dtype) -> None:
    codes = np.tile(np.concatenate([np.arange(16), np.arange(16)[::-1]]), (256, 1)).astype(np.uint8)
    x = MXFP4Tensor(torch.from_numpy(_pack(codes)), torch.arange(256).to(torch.uint8)[:, None])
    with np.errstate(over="ignore"):
        truth = torch.from_numpy(_decode(x).astype(np.float32))
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
    np.testing.assert_array_equal(sf, _scale_bytes(BF16_MAGNITUDES, rule))


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_scale_at_the_float32_neighbours_of_every_threshold(rule: ScaleRule) -> None:
    limit, _ = SCALE_LIMITS[rule]
    with np.errstate(over="ignore"):
        edges = (limit * SCALES[:253]).astype(np.float32)
        edges = np.stack([np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, np.float32(np.inf))])
    edges = edges[np.isfinite(edges)]
    x = torch.from_numpy(edges)[:, None] * torch.eye(32)[5]
    np.testing.assert_array_equal(quantize_mxfp4(x, rule).sf[:, 0].numpy(), _scale_bytes(edges, rule))


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_quantize_every_bf16_value_under_every_scale(rule: ScaleRule) -> None:
    """For each scale byte, the largest maximum that gives it and every value which that maximum admits."""
    sf_of = _scale_bytes(BF16_MAGNITUDES, rule)
    reachable = np.unique(sf_of)
    np.testing.assert_array_equal(reachable, np.arange(reachable[-1] + 1))
    assert reachable[-1] == (252 if rule is ScaleRule.FLOOR else 253)
    for sf in reachable.tolist():
        x = _groups_under_maximum(int(np.searchsorted(sf_of, sf, side="right")) - 1, size=32, position=sf)
        scaled = (x.double().numpy() * 2.0 ** (127 - sf)).astype(np.float32)
        q = quantize_mxfp4(x, rule)
        assert (q.sf == sf).all()
        np.testing.assert_array_equal(q.qdata.numpy(), _pack(scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)))


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
    wild = _random_float32(rng, (256, 32))
    tame = rng.standard_normal((256, 32), dtype=np.float32)
    middle = ((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2).astype(np.float32)
    edges = np.stack([np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(9))])
    edges = np.concatenate([edges.reshape(-1), _float32([6])])
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
    np.testing.assert_array_equal(_unpack(q.qdata), signs.numpy() * 8)
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


def _fp8_of(codes: Array, sf: Array) -> tuple[FP8Tensor, Array]:
    """An FP8Tensor and its exact products: 4 by 24 bits, in the 64 bits of a long double."""
    x = FP8Tensor(torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(sf))
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.longdouble)
    return x, values * sf.astype(np.longdouble).repeat(128, axis=-1)


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
    x, exact = _fp8_of(codes, sf)
    assert len(np.unique(codes)) == 254
    _assert_quantizes_exactly(x, exact, rule)


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_quantize_e4m3_under_random_scales(rule: ScaleRule) -> None:
    rng = np.random.default_rng(3)
    codes = (rng.integers(0, 0x7F, (128, 256)) | rng.integers(0, 2, (128, 256)) << 7).astype(np.uint8)
    sf = np.abs(_random_float32(rng, (128, 2)))
    sf[:16] = (rng.integers(1, 2**23, (16, 2)) >> rng.integers(0, 23, (16, 2))).astype(np.uint32).view(np.float32)
    _assert_quantizes_exactly(*_fp8_of(codes, sf), rule)


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
    x, exact = _fp8_of(np.tile(codes.reshape(-1, 384), (3, 1)), sf.repeat(3, axis=1))
    _assert_quantizes_exactly(x, exact, rule)
    assert not torch.equal(quantize_mxfp4(dequantize_fp8(x), rule).qdata, quantize_mxfp4(x, rule).qdata)


@pytest.mark.parametrize(("code", "sf"), [(0x7F, 1.0), (0xFF, 1.0), (0, np.nan), (0x38, np.inf)])
def test_nan_and_inf_of_an_fp8_tensor(code: int, sf: float) -> None:
    codes = np.full((2, 128), 0x38, dtype=np.uint8)
    codes[1, ::32] = code
    x, _ = _fp8_of(codes, np.array([[1.0], [sf]], dtype=np.float32))
    q = quantize_mxfp4(x)
    assert (q.sf[0] == 125).all()
    assert (q.sf[1] == 255).all()
    assert not q.qdata[1].any()


def test_products_past_float32_saturate_under_the_last_scale() -> None:
    """448 * 2^127 is finite, though no float32."""
    x, _ = _fp8_of(np.full((1, 128), 0x7E, dtype=np.uint8), _float32([[2.0**127]]))
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


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """The vectors of Random123's kat_vectors."""
    out = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in out) == words


def test_random_bits_are_the_halves_of_the_words_low_first() -> None:
    bits = random_bits16(torch.tensor([0]), 8, seed=0)
    assert bits.tolist() == [[0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]]


@pytest.mark.parametrize("row", [0, 5, 2**31 + 1, 2**34 + 3])
def test_random_bits_are_those_of_the_documented_counter(row: int) -> None:
    seed, subsequence = 0xFEDCBA9876543210, 0x89ABCDEF
    bits = random_bits16(torch.tensor([row]), 32, seed, subsequence)[0]
    for k in (0, 9, 31):
        chunk, place = divmod(row * 32 + k, 8)
        counter = [torch.tensor([c]) for c in (chunk % 2**32, chunk // 2**32, subsequence, 0)]
        word = int(philox4x32(tuple(counter), (0x76543210, 0xFEDCBA98))[place // 2])
        assert bits[k] == (word & 0xFFFF if place % 2 == 0 else word >> 16)


def _stochastic_code(value: Fraction, bits: int) -> int:
    magnitudes = [Fraction(m) for m in MAGNITUDES.tolist()]
    if value >= 6:
        return 7
    low = max(code for code in range(8) if magnitudes[code] <= value)
    position = (value - magnitudes[low]) / (magnitudes[low + 1] - magnitudes[low])
    return low + (position + Fraction(bits, 65536) >= 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_stochastic_codes_follow_the_random_bits(dtype: torch.dtype) -> None:
    rows, K, seed, subsequence = 12, 128, 2**63 + 11, 3
    dense = torch.randn(rows, K, generator=torch.Generator().manual_seed(6))
    x: torch.Tensor | FP8Tensor = dense.to(dtype)
    exact = dense.to(dtype).double()
    if dtype == torch.float8_e4m3fn:
        x = FP8Tensor(dense.to(dtype), torch.linspace(0.7, 1.9, rows)[:, None])
        exact = exact * x.sf.double()
    for rule in (ScaleRule.FLOOR, ScaleRule.RCEIL):
        q = quantize_mxfp4(x, rule, Rounding.STOCHASTIC, seed=seed, subsequence=subsequence)
        scale = 2.0 ** (q.sf.double() - 127).repeat_interleave(32, dim=-1)
        bits = random_bits16(torch.arange(rows), K, seed, subsequence).flatten().tolist()
        scaled = (exact / scale).flatten().tolist()
        truth = [
            _stochastic_code(abs(Fraction(v)), b) + 8 * (np.copysign(1, v) < 0)
            for v, b in zip(scaled, bits, strict=True)
        ]
        assert _unpack(q.qdata).reshape(-1).tolist() == truth
        assert torch.equal(q.sf, quantize_mxfp4(x, rule).sf)


def test_stochastic_turns_exactly_where_position_and_bits_reach_one() -> None:
    """Values made for the bits they meet: the position is 1 - bits / 65536, or 2^-22 beside it."""
    rows, seed = 96, 77
    bits = random_bits16(torch.arange(rows), 32, seed).numpy()
    rng = np.random.default_rng(5)
    position = (65536 - bits + rng.choice([-1 / 64, 0, 1 / 64], bits.shape)) / 65536
    low = rng.integers(0, 7, bits.shape)
    values = MAGNITUDES[low] + position.clip(0, 1 - 2**-22) * np.diff(MAGNITUDES)[low]
    values[:, 0] = 6
    np.testing.assert_array_equal(values, values.astype(np.float32))
    x = torch.from_numpy(values.astype(np.float32))
    q = quantize_mxfp4(x, ScaleRule.RCEIL, Rounding.STOCHASTIC, seed=seed)
    truth = map(_stochastic_code, map(Fraction, values.flatten().tolist()), bits.flatten().tolist())
    assert _unpack(q.qdata).reshape(-1).tolist() == list(truth)


def _stochastic(x: torch.Tensor, seed: int, **position: Any) -> torch.Tensor:
    return quantize_mxfp4(x, ScaleRule.RCEIL, Rounding.STOCHASTIC, seed=seed, **position).qdata


def test_stochastic_is_a_function_of_seed_and_subsequence() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(7))
    assert torch.equal(_stochastic(x, 1, subsequence=2), _stochastic(x, 1, subsequence=2))
    positions = [(1, 2), (2, 2), (1, 3), (2**32 + 1, 2), (2, 1), (0, 0)]
    results = [_stochastic(x, seed, subsequence=sub) for seed, sub in positions]
    for i, a in enumerate(results):
        assert not any(torch.equal(a, b) for b in results[:i])


def test_stochastic_depends_on_the_row_number_not_on_the_split() -> None:
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(8))
    whole = _stochastic(x, 9).flatten(0, 1)
    flat = x.flatten(0, 1)
    for a, b in [(0, 1), (1, 5), (5, 12)]:
        assert torch.equal(_stochastic(flat[a:b], 9, rows=torch.arange(a, b)), whole[a:b])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(9))
    assert torch.equal(_stochastic(flat[order], 9, rows=order.to(torch.int32)), whole[order])


def test_subsequence_of_each_row() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(10))
    subsequence = torch.tensor([4, 0, 4, 2**32 - 1, 1, 4], dtype=torch.int64)
    together = _stochastic(x, 5, subsequence=subsequence)
    for row, sub in enumerate(subsequence.tolist()):
        assert torch.equal(together[row], _stochastic(x, 5, subsequence=sub)[row])


def test_stochastic_is_unbiased() -> None:
    """The mean of N roundings is within 5 standard deviations, gap * sqrt(p (1 - p) / N) each, of the value.

    Sixteen bits resolve p to 2^-16, which moves the mean by less than gap / 65536 more.
    """
    rows, seeds = 512, 64
    values = torch.linspace(-5.9, 5.9, 32)
    values[0] = -6.0
    magnitude = values.abs().double().numpy()
    low = MAGNITUDES[np.searchsorted(MAGNITUDES, magnitude, side="right") - 1]
    gap = np.select([magnitude < 2, magnitude < 4], [0.5, 1.0], 2.0)
    p = (magnitude - low) / gap
    total = torch.zeros(32, dtype=torch.float64)
    for seed in range(seeds):
        q = quantize_mxfp4(values.expand(rows, 32), ScaleRule.RCEIL, Rounding.STOCHASTIC, seed=seed)
        assert (q.sf == 127).all()
        total += dequantize_mxfp4(q).double().sum(0)
    error = (total / (rows * seeds) - values).abs().numpy()
    assert (error <= gap * (5 * np.sqrt(p * (1 - p) / (rows * seeds)) + 1 / 65536)).all()
    assert error[0] == 0


@pytest.mark.parametrize("sf", [0, 1, 127, 252])
def test_stochastic_never_moves_grid_values(sf: int) -> None:
    codes = np.tile(np.arange(16, dtype=np.uint8), (2000, 4))
    grid = MXFP4Tensor(torch.from_numpy(_pack(codes)), torch.full((2000, 2), sf, dtype=torch.uint8))
    q = quantize_mxfp4(dequantize_mxfp4(grid), ScaleRule.RCEIL, Rounding.STOCHASTIC, seed=12)
    assert torch.equal(q.qdata, grid.qdata)
    assert torch.equal(q.sf, grid.sf)


def test_stochastic_saturates_at_six() -> None:
    x = torch.linspace(6, 7.99, 32).expand(2000, 32)
    q = quantize_mxfp4(x, ScaleRule.FLOOR, Rounding.STOCHASTIC, seed=13)
    assert (q.sf == 127).all()
    assert (q.qdata == 0x77).all()


def _sylvester() -> Array:
    matrix: Array = np.ones((1, 1))
    for _ in range(5):
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix


def test_hadamard_matrix() -> None:
    matrix = hadamard32(torch.eye(32))
    assert torch.equal(matrix, torch.from_numpy(_sylvester()).float() * torch.tensor(32**-0.5))
    assert torch.equal(matrix, matrix.t())
    assert (matrix.double() @ matrix.double().t() - torch.eye(32)).abs().max() < 1e-6


def test_hadamard_against_float64() -> None:
    x = torch.randn(7, 3, 96, generator=torch.Generator().manual_seed(14))
    y = hadamard32(x)
    truth = x.double().unflatten(-1, (3, 32)) @ torch.from_numpy(_sylvester()) / 32**0.5
    assert (y - truth.flatten(-2)).abs().max() < 1e-6
    assert (hadamard32(y) - x).abs().max() < 2e-6


def test_hadamard_order_of_operations() -> None:
    """Bit for bit: five stages over the partner i ^ stride, smallest stride first, then one product."""
    x = np.random.default_rng(15).standard_normal((64, 32), dtype=np.float32)
    y, index = x, np.arange(32)
    for stride in (1, 2, 4, 8, 16):
        partner = y[:, index ^ stride]
        y = np.where(index & stride, partner - y, y + partner)
    truth = torch.from_numpy(y * np.float32(32**-0.5))
    assert equal_bits(hadamard32(torch.from_numpy(x)), truth)


@pytest.mark.parametrize("rounding", WIRE_ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_rotated_quantize_is_rotate_then_quantize(dtype: torch.dtype, rounding: Rounding) -> None:
    dense = torch.randn(16, 128, generator=torch.Generator().manual_seed(16))
    x: torch.Tensor | FP8Tensor = dense.to(dtype)
    values = dense.to(dtype).float()
    if dtype == torch.float8_e4m3fn:
        x = FP8Tensor(dense.to(dtype), torch.linspace(0.7, 1.9, 16)[:, None])
        values = dequantize_fp8(x)
    q = quantize_mxfp4(x, rounding=rounding, seed=3, hadamard=True)
    plain = quantize_mxfp4(hadamard32(values), rounding=rounding, seed=3)
    assert q.hadamard
    assert torch.equal(q.qdata, plain.qdata)
    assert torch.equal(q.sf, plain.sf)
    assert equal_bits(dequantize_mxfp4(q), hadamard32(dequantize_mxfp4(plain)))


def test_rotated_round_trip_error() -> None:
    """Rotation keeps the norm of the error, and no rotated value is off by more than one step."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(17))
    q = quantize_mxfp4(x, ScaleRule.RCEIL, hadamard=True)
    error = (dequantize_mxfp4(q).double() - x).unflatten(-1, (3, 32)).norm(dim=-1)
    step = 2.0 ** (q.sf.double() - 127)
    assert (error <= 32**0.5 * step * (1 + 1e-5)).all()
    rounded = to_dtype(dequantize_mxfp4(q), torch.bfloat16)
    assert equal_bits(dequantize_mxfp4(q, torch.bfloat16), rounded)


def test_rotation_helps_a_block_with_an_outlier() -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(18))
    x[:, 7] = 16.0
    plain, rotated = (dequantize_mxfp4(quantize_mxfp4(x, hadamard=h)) - x for h in (False, True))
    assert rotated.square().mean() < 0.5 * plain.square().mean()


def test_rotated_non_finite_block_is_nan_alone() -> None:
    x = torch.ones(3, 64, dtype=torch.bfloat16)
    x[0, 3], x[1, 40] = torch.inf, torch.nan
    q = quantize_mxfp4(x, hadamard=True)
    assert (q.sf == 255).tolist() == [[True, False], [False, True], [False, False]]
    assert torch.equal(dequantize_mxfp4(q).isnan(), (q.sf == 255).repeat_interleave(32, dim=-1))


def _fp8_exponents(amax: Array) -> Array:
    """Smallest exponent from -126 on with amax <= 448 * 2^e, by search over all."""
    exponents = np.arange(-126, 128)
    return exponents[np.searchsorted(np.ldexp(448.0, exponents), amax, side="left")]


def test_fp8_scale_of_every_bf16_maximum() -> None:
    maxima = torch.from_numpy(BF16_MAGNITUDES).bfloat16()
    index = torch.arange(len(maxima))
    x = torch.zeros(len(maxima), 128, dtype=torch.bfloat16)
    x[index, index % 128] = torch.where(index % 3 == 0, -maxima, maxima)
    sf = quantize_fp8(x).sf[:, 0].numpy()
    truth = np.ldexp(np.float32(1), _fp8_exponents(BF16_MAGNITUDES))
    truth[0] = 2.0**-126
    np.testing.assert_array_equal(sf, truth)


def test_fp8_codes_of_every_bf16_value_under_every_scale() -> None:
    exponents = _fp8_exponents(BF16_MAGNITUDES)
    np.testing.assert_array_equal(np.unique(exponents), np.arange(-126, 121))
    for exponent in range(-126, 121):
        last = int(np.searchsorted(exponents, exponent, side="right")) - 1
        x = _groups_under_maximum(last, size=128, position=exponent % 128)
        q = quantize_fp8(x)
        assert (q.sf == 2.0**exponent).all()
        np.testing.assert_array_equal(_codes(q.data), _to_e4m3_codes(np.ldexp(x.double().numpy(), -exponent)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_fp8_of_the_other_dtypes(dtype: type[np.floating[Any]]) -> None:
    """A quotient has the bits of its dividend, so that ml_dtypes' way over float32 rounds once."""
    rng = np.random.default_rng(19)
    wild = _random_float32(rng, (64, 256))
    with np.errstate(over="ignore"):
        tame = (rng.standard_normal((64, 256)) * rng.choice([1e-7, 1.0, 60.0], (64, 1))).astype(dtype)
    values = tame if dtype is np.float16 else np.concatenate([wild, tame])
    groups = values.astype(np.float64).reshape(len(values), 2, 128)
    exponents = _fp8_exponents(np.abs(groups).max(-1))
    q = quantize_fp8(torch.from_numpy(values))
    np.testing.assert_array_equal(q.sf.numpy(), np.ldexp(np.float32(1), exponents))
    truth = _to_e4m3_codes(np.ldexp(groups, -exponents[..., None])).reshape(values.shape)
    np.testing.assert_array_equal(_codes(q.data), truth)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_fp8_non_finite_group(bad: float) -> None:
    x = torch.ones(128, 256, dtype=torch.bfloat16)
    x[:, 128:].fill_diagonal_(bad)
    q = quantize_fp8(x)
    assert (_codes(q.data)[:, 128:] == 0x7F).all()
    assert (q.sf[:, 1] == 2.0**-126).all()
    assert dequantize_fp8(q)[:, 128:].isnan().all()
    assert torch.equal(dequantize_fp8(q)[:, :128], torch.ones(128, 128))


def test_fp8_zero_group_keeps_its_signs() -> None:
    x = torch.tensor([0.0, -0.0]).repeat(64)[None]
    q = quantize_fp8(x)
    assert q.sf.item() == 2.0**-126
    assert equal_bits(dequantize_fp8(q), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_fp8(dtype: torch.dtype) -> None:
    """The exact product rounded to float32, then to the dtype; all codes under scales of random bits."""
    sf = _random_float32(np.random.default_rng(20), (512, 2))
    x, exact = _fp8_of(np.tile(_codes(all_e4m3()), (512, 1)), sf)
    with np.errstate(over="ignore"):
        truth = torch.from_numpy(exact.astype(np.float32))
        if dtype == torch.bfloat16:
            truth = torch.from_numpy(truth.numpy().astype(ml_dtypes.bfloat16).view(np.uint16)).view(dtype)
    out = dequantize_fp8(x, dtype)
    nan = torch.from_numpy(np.isnan(exact))
    assert torch.equal(out.isnan(), nan)
    assert equal_bits(out[~nan], truth[~nan])
    if dtype == torch.bfloat16:
        assert (out[nan].view(torch.int16) == 0x7FFF).all()


def test_to_bf16() -> None:
    rng = np.random.default_rng(21)
    ties = (rng.integers(0, 0x7F7F, 4096, dtype=np.uint32) << 16) + 0x8000
    values = np.concatenate([_random_float32(rng, (4096,)), ties.view(np.float32), _float32([np.inf, -np.inf])])
    with np.errstate(over="ignore"):
        truth = values.astype(ml_dtypes.bfloat16).view(np.int16)
    np.testing.assert_array_equal(to_dtype(torch.from_numpy(values), torch.bfloat16).view(torch.int16), truth)
    nans = torch.tensor([0x7F800001, 0x7FC00000, -1, -0x400000], dtype=torch.int32).view(torch.float32)
    assert set(to_dtype(nans, torch.bfloat16).view(torch.int16).tolist()) == {0x7FFF}


def _alignment(x: MXFP4Tensor, axis: int) -> tuple[Array, Array]:
    """Top byte over 4 blocks of a row or 128 of a column, and distance to it; both `[rows, K // 32]`."""
    live = (_decode(x).reshape(*x.sf.shape, 32) != 0).any(-1) & (x.sf.numpy() != 255)
    sf = np.where(live, x.sf.numpy().astype(np.int64), -1)
    size = 128 if axis == 0 else 4
    top = np.concatenate(
        [
            np.broadcast_to(part.max(axis, keepdims=True), part.shape)
            for part in np.split(sf, sf.shape[axis] // size, axis)
        ],
        axis,
    )
    return top, np.where(live, top - sf, 0)


def _assert_aligned(x: MXFP4Tensor) -> None:
    out, overflows = mxfp4_to_fp8(x)
    top, distance = _alignment(x, axis=1)
    exponent = np.maximum(top - 133, -126)
    np.testing.assert_array_equal(out.sf.numpy(), np.ldexp(np.float32(1), exponent[:, ::4]))
    assert overflows.item() == (distance > 14).sum()
    assert overflows.dtype == torch.int64
    decoded = _decode(x)
    is_nan = np.isnan(decoded)
    aligned = np.ldexp(decoded, -exponent.repeat(32, axis=1))
    np.testing.assert_array_equal(_codes(out.data), np.where(is_nan, 0x7F, _to_e4m3_codes(aligned)))
    exact = (distance <= 14).repeat(32, axis=1) & ~is_nan
    values = out.data.double().numpy() * out.sf.double().numpy().repeat(128, axis=1)
    np.testing.assert_array_equal(values[exact], decoded[exact])


def test_align_every_code_under_every_pair_of_scales() -> None:
    """Beside the pair, zero blocks with large bytes: they must not count, and keep their signs."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 4, 2))
    codes[:, 2] &= 8
    codes[:, 3] &= 8
    for top in range(256):
        sf = np.stack(np.broadcast_arrays(top, np.arange(256), 254, np.arange(256)), -1).astype(np.uint8)
        order = np.roll(np.arange(4), top)
        qdata = _pack(codes[:, order].reshape(256, 128))
        _assert_aligned(MXFP4Tensor(torch.from_numpy(qdata), torch.from_numpy(sf[:, order])))


@pytest.mark.parametrize(("low", "high"), [(0, 256), (0, 24), (120, 140), (235, 256)])
def test_align_random_blocks(low: int, high: int) -> None:
    _assert_aligned(_random_mxfp4(np.random.default_rng(22), 300, 384, low, high))


def test_align_all_zero_group() -> None:
    x = MXFP4Tensor(torch.full((2, 64), 0x80, dtype=torch.uint8), torch.full((2, 4), 200, dtype=torch.uint8))
    out, overflows = mxfp4_to_fp8(x)
    assert (out.sf == 2.0**-126).all()
    assert _codes(out.data).tolist() == [[0, 0x80] * 64] * 2
    assert overflows.item() == 0


def test_align_rotated_tensor() -> None:
    x = quantize_mxfp4(torch.randn(9, 256, generator=torch.Generator().manual_seed(23)), hadamard=True)
    out, overflows = mxfp4_to_fp8(x)
    truth = quantize_fp8(dequantize_mxfp4(x))
    assert equal_bits(out.data, truth.data)
    assert equal_bits(out.sf, truth.sf)
    assert overflows.item() == 0


OFFSETS = [[0], [0, 0], [0, 128], [0, 0, 256, 256, 384], [0, 384, 384], [0, 128, 256, 384, 512]]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize(("low", "high"), [(0, 256), (0, 24), (110, 140)])
def test_columnwise_is_decode_transpose_requantize(offsets: list[int], low: int, high: int) -> None:
    x = _random_mxfp4(np.random.default_rng(24), 512, 96, low, high)
    total = offsets[-1]
    data, sf, overflows = mxfp4_to_fp8_columnwise(x, offsets)
    assert (data.shape, sf.shape) == ((total * 96,), (total // 128, 96))
    assert data.dtype == torch.float8_e4m3fn
    assert sf.dtype == torch.float32
    top, distance = _alignment(x, axis=0)
    assert overflows.item() == (distance[:total] > 14).sum()
    exponent = np.maximum(top - 133, -126).repeat(32, axis=1)
    np.testing.assert_array_equal(sf.numpy(), np.ldexp(np.float32(1), exponent[:total:128]))
    decoded = _decode(x)
    codes = np.where(np.isnan(decoded), 0x7F, _to_e4m3_codes(np.ldexp(decoded, -exponent)))
    for start, end in pairwise(offsets):
        block = _codes(data)[start * 96 : end * 96].reshape(96, end - start)
        np.testing.assert_array_equal(block, codes[start:end].T)


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_columnwise_is_quantize_of_the_transposed(offsets: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(512, 40, generator=torch.Generator().manual_seed(25)).to(dtype)
    x[3, 7], x[200, 9] = torch.nan, -torch.inf
    x[128:256, 11] = -0.0
    data, sf = quantize_fp8_columnwise(x, offsets)
    assert (data.shape, sf.shape) == ((offsets[-1] * 40,), (offsets[-1] // 128, 40))
    for start, end in pairwise(offsets):
        if start < end:
            truth = quantize_fp8(x[start:end].t())
            assert equal_bits(data[start * 40 : end * 40].view(40, end - start), truth.data)
            assert equal_bits(sf[start // 128 : end // 128].t(), truth.sf)


def test_columnwise_of_a_rotated_tensor() -> None:
    x = quantize_mxfp4(torch.randn(384, 64, generator=torch.Generator().manual_seed(26)), hadamard=True)
    data, sf, overflows = mxfp4_to_fp8_columnwise(x, [0, 128, 256])
    truth = quantize_fp8_columnwise(dequantize_mxfp4(x), [0, 128, 256])
    assert equal_bits(data, truth[0])
    assert equal_bits(sf, truth[1])
    assert overflows.item() == 0


@pytest.mark.parametrize(
    "offsets", [[], [128], [1, 128], [0, 16], [0, 256, 128], [0, 512], [0, -128], [0, 128, 200]], ids=str
)
def test_bad_group_offsets(offsets: list[int]) -> None:
    message = re.escape(f"group_offsets must rise from 0 to at most 384 in multiples of 32, got {offsets}")
    with pytest.raises(ValueError, match=message):
        quantize_fp8_columnwise(torch.zeros(384, 32), offsets)
    with pytest.raises(ValueError, match=message):
        mxfp4_to_fp8_columnwise(quantize_mxfp4(torch.zeros(384, 32)), offsets)


@st.composite
def _strided(draw: st.DrawFn, multiple: int, min_dims: int = 0, max_dims: int = 3) -> torch.Tensor:
    """A float32 view with 1 to 3 multiples of K and no, some or zero-sized leading dimensions."""
    lead = draw(st.lists(st.integers(0, 4), min_size=min_dims, max_size=max_dims))
    shape = (*lead, multiple * draw(st.integers(1, 3)))
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.integers(1, 2))
    start = draw(st.integers(0, step - 1))
    storage = [shape[d] for d in order]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    base = torch.randn(*storage[:-1], storage[-1] * step, generator=generator)[..., start::step]
    return base.permute(*(order.index(d) for d in range(len(shape))))


@given(_strided(32), st.sampled_from(WIRE_ROUNDINGS), st.booleans())
@FEW
def test_mxfp4_of_any_shape_and_strides(x: torch.Tensor, rounding: Rounding, hadamard: bool) -> None:
    q = quantize_mxfp4(x, rounding=rounding, seed=1, hadamard=hadamard)
    assert q.shape == x.shape
    flat = quantize_mxfp4(x.reshape(-1, x.shape[-1]), rounding=rounding, seed=1, hadamard=hadamard)
    assert torch.equal(q.qdata.reshape(flat.qdata.shape), flat.qdata)
    assert torch.equal(q.sf.reshape(flat.sf.shape), flat.sf)
    spread = MXFP4Tensor(_non_contiguous(q.qdata), _non_contiguous(q.sf), hadamard)
    assert equal_bits(dequantize_mxfp4(spread), dequantize_mxfp4(q))
    assert dequantize_mxfp4(q, torch.bfloat16).shape == x.shape


@given(_strided(128, min_dims=1, max_dims=1))
@FEW
def test_fp8_of_any_strides(x: torch.Tensor) -> None:
    q = quantize_fp8(x)
    dense = quantize_fp8(x.contiguous())
    assert equal_bits(q.data, dense.data)
    assert equal_bits(q.sf, dense.sf)
    sf = empty_scales(len(x), x.shape[1] // 128, ScaleLayout.COLUMN_MAJOR).copy_(q.sf)
    spread = FP8Tensor(_non_contiguous(q.data.view(torch.uint8)).view(torch.float8_e4m3fn), sf)
    assert equal_bits(dequantize_fp8(spread), dequantize_fp8(q))
    a, b = quantize_mxfp4(spread), quantize_mxfp4(q)
    assert torch.equal(a.qdata, b.qdata)
    aligned, overflows = mxfp4_to_fp8(MXFP4Tensor(_non_contiguous(a.qdata), _non_contiguous(a.sf)))
    assert equal_bits(aligned.data, mxfp4_to_fp8(b)[0].data)
    assert torch.equal(overflows, mxfp4_to_fp8(b)[1])


def _non_contiguous(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, torch.zeros_like(x)), dim=-1)[..., 0]


def test_zero_rows() -> None:
    empty = quantize_mxfp4(torch.zeros(0, 256).bfloat16())
    assert (empty.shape, empty.sf.shape) == ((0, 256), (0, 8))
    out, overflows = mxfp4_to_fp8(empty)
    assert (out.shape, out.sf.shape, overflows.item()) == ((0, 256), (0, 2), 0)
    assert quantize_fp8(torch.zeros(0, 256)).sf.shape == (0, 2)
    assert dequantize_fp8(out).shape == (0, 256)
