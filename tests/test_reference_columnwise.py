"""The oracle of column-wise FP8: alignment, quantization and transposition by groups of rows."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from bit_patterns import equal_bits
from codec_truth import (
    E4M3_MAGNITUDES,
    Array,
    alignment,
    bytes_of,
    decode,
    fp8_of,
    nearest_e4m3_codes,
    random_mxfp4,
    to_e4m3_codes,
)

from qcomm.reference import dequantize_mxfp4, quantize_fp8, quantize_mxfp4
from qcomm.reference_columnwise import fp8_transpose, mxfp4_to_fp8_columnwise, quantize_fp8_columnwise
from qcomm.tensors import FP8Tensor

OFFSETS = [[0], [0, 0], [0, 128], [0, 0, 256, 256, 384], [0, 384, 384], [0, 128, 256, 384, 512]]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize(("low", "high"), [(0, 256), (0, 24), (110, 140)])
def test_columnwise_is_decode_transpose_requantize(offsets: list[int], low: int, high: int) -> None:
    x = random_mxfp4(np.random.default_rng(24), 512, 96, low, high)
    total = offsets[-1]
    data, sf, overflows = mxfp4_to_fp8_columnwise(x, offsets)
    assert (data.shape, sf.shape) == ((total * 96,), (total // 128, 96))
    assert data.dtype == torch.float8_e4m3fn
    assert sf.dtype == torch.float32
    top, distance = alignment(x, axis=0)
    assert overflows.item() == (distance[:total] > 14).sum()
    exponent = np.maximum(top - 133, -126).repeat(32, axis=1)
    np.testing.assert_array_equal(sf.numpy(), np.ldexp(np.float32(1), exponent[:total:128]))
    decoded = decode(x)
    codes = np.where(np.isnan(decoded), 0x7F, to_e4m3_codes(np.ldexp(decoded, -exponent)))
    for start, end in pairwise(offsets):
        block = bytes_of(data)[start * 96 : end * 96].reshape(96, end - start)
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


RAGGED = [[0, 32], [0, 96, 96, 512], [0, 0, 160, 320, 352], [0, 128, 288, 288, 288, 480], [0, 416]]
"""Multiples of 32: tiles of 32, 64, 96 and 128 rows, and groups without rows."""


def _tiles(offsets: list[int]) -> list[tuple[int, int]]:
    """First row of each tile and the row past its last one."""
    return [(a, min(a + 128, end)) for start, end in pairwise(offsets) for a in range(start, end, 128)]


def _assert_blocks(data: torch.Tensor, codes: Array, offsets: list[int]) -> None:
    """Each group's block is its rows' codes, transposed; nothing else is there."""
    K = codes.shape[1]
    assert (data.shape, data.dtype) == ((offsets[-1] * K,), torch.float8_e4m3fn)
    for start, end in pairwise(offsets):
        block = bytes_of(data)[start * K : end * K].reshape(K, end - start)
        np.testing.assert_array_equal(block, codes[start:end].T)


@pytest.mark.parametrize("offsets", RAGGED, ids=str)
@pytest.mark.parametrize(("low", "high"), [(0, 256), (0, 24), (110, 140)])
def test_columnwise_of_partial_tiles(offsets: list[int], low: int, high: int) -> None:
    x = random_mxfp4(np.random.default_rng(37), 512, 96, low, high)
    data, sf, overflows = mxfp4_to_fp8_columnwise(x, offsets)
    tiles = _tiles(offsets)
    assert (sf.shape, sf.dtype) == ((len(tiles), 96), torch.float32)
    decoded = decode(x)
    codes = np.zeros(decoded.shape, dtype=np.uint8)
    blocks = decoded.reshape(512, 3, 32)
    live = (blocks != 0).any(-1) & (x.sf.numpy() != 255)
    spread = 0
    for tile, (a, b) in enumerate(tiles):
        for column in range(3):
            found = x.sf.numpy()[a:b, column].astype(np.int64)[live[a:b, column]]
            exponent = max(found.max(initial=0) - 133, -126)
            part = slice(32 * column, 32 * column + 32)
            assert (sf[tile, part] == 2.0**exponent).all()
            values = decoded[a:b, part]
            codes[a:b, part] = np.where(np.isnan(values), 0x7F, to_e4m3_codes(np.ldexp(values, -exponent)))
            spread += (found.max(initial=0) - found > 14).sum()
    assert overflows.item() == spread
    _assert_blocks(data, codes, offsets)


@pytest.mark.parametrize("offsets", RAGGED, ids=str)
def test_quantize_columnwise_of_partial_tiles(offsets: list[int]) -> None:
    """The scale of a partial tile goes by its own rows: truth is each tile padded with zeros to 128 columns."""
    x = torch.randn(512, 40, generator=torch.Generator().manual_seed(38))
    x[:, ::3] *= torch.logspace(-9, 9, 512)[:, None]
    x[3, 7], x[200, 9] = torch.nan, -torch.inf
    data, sf = quantize_fp8_columnwise(x, offsets)
    codes = np.zeros((512, 40), dtype=np.uint8)
    for tile, (a, b) in enumerate(_tiles(offsets)):
        padded = torch.zeros(40, 128)
        padded[:, : b - a] = x[a:b].t()
        truth = quantize_fp8(padded)
        assert equal_bits(sf[tile], truth.sf[:, 0])
        codes[a:b] = bytes_of(truth.data)[:, : b - a].T
    assert sf.shape[0] == len(_tiles(offsets))
    _assert_blocks(data, codes, offsets)


@pytest.mark.parametrize(
    ("hadamard", "signs", "prescaled"),
    [(False, 0, True), (True, 0, False), (True, 0x0F1E2D3C, False), (True, 0x0F1E2D3C, True)],
)
def test_columnwise_of_tensors_that_are_not_plain(hadamard: bool, signs: int, prescaled: bool) -> None:
    plain = random_mxfp4(np.random.default_rng(39), 224, 64, 100, 140)
    x = dataclasses.replace(plain, hadamard=hadamard, hadamard_signs=signs, prescaled=prescaled)
    data, sf, overflows = mxfp4_to_fp8_columnwise(x, [0, 160, 224])
    truth = quantize_fp8_columnwise(dequantize_mxfp4(x), [0, 160, 224])
    assert equal_bits(data, truth[0])
    assert equal_bits(sf, truth[1])
    assert overflows.item() == 0


def _fraction_e4m3(value: Fraction) -> Fraction:
    """The nearest E4M3 value below 448, by python's own rounding of fractions to even."""
    exponent = -6
    while value >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - 3)
    return round(value / step) * step


def test_nearest_e4m3_codes_agree_with_fractions_and_ml_dtypes() -> None:
    """All codes at all distances that the transposition is tested with."""
    values = E4M3_MAGNITUDES[:, None] * 2.0 ** -np.arange(41)
    codes = nearest_e4m3_codes(values)
    np.testing.assert_array_equal(codes, to_e4m3_codes(values))
    truth = [float(_fraction_e4m3(Fraction(v))) for v in values.ravel().tolist()]
    np.testing.assert_array_equal(E4M3_MAGNITUDES[codes].ravel(), truth)
    np.testing.assert_array_equal(nearest_e4m3_codes(np.array([449.0, 1e300, -np.inf])), [0x7E, 0x7E, 0xFE])


def _assert_transposes(codes: Array, sf: Array, offsets: list[int]) -> None:
    x = FP8Tensor(torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(sf))
    data, out_sf = fp8_transpose(x, offsets)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    truth = np.zeros_like(codes)
    tiles = _tiles(offsets)
    assert (out_sf.shape, out_sf.dtype) == ((len(tiles), codes.shape[1]), torch.float32)
    for tile, (a, b) in enumerate(tiles):
        for group in range(codes.shape[1] // 128):
            part = slice(128 * group, 128 * group + 128)
            scales = sf[a:b, group].astype(np.float64)
            finite = np.isfinite(scales)
            counts = finite & ((codes[a:b, part] & 0x7F) != 0).any(-1)
            largest = scales[counts].max(initial=0)
            exponent = next((e for e in range(-126, 127) if 2.0**e >= largest), 127)
            assert (out_sf[tile, part] == 2.0**exponent).all()
            # Four bits by 24: exact in float64.
            products = values[a:b, part] * np.where(finite, scales, np.nan)[:, None]
            truth[a:b, part] = nearest_e4m3_codes(np.ldexp(products, -exponent))
    _assert_blocks(data, truth, offsets)


@pytest.mark.parametrize("top", [127, 126, 41, 0, -1, -86, -110, -126])
def test_transpose_every_code_at_every_distance(top: int) -> None:
    """Scales from 2^top down to 2^(top - 40) in one tile; beside them zeros under larger ones, which don't count."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (128, 1))
    exponents = top - np.arange(128) % 41
    sf = np.ldexp(np.float32(1), exponents)[:, None].repeat(2, axis=1)
    order = np.random.default_rng(40).permutation(128)
    codes[order[82:]] &= 0x80
    sf[order[82:100]] = 2.0**127
    sf[order[100:110]] = np.inf
    assert sorted(set(exponents[order[:82]].tolist())) == list(range(top - 40, top + 1)) or top < -86
    _assert_transposes(codes, sf, [0, 128])


@pytest.mark.parametrize("offsets", [*OFFSETS, *RAGGED], ids=str)
@pytest.mark.parametrize("spread", [0.5, 12.0, 90.0])
def test_transpose_under_any_scales(offsets: list[int], spread: float) -> None:
    """Random float32 scales, no powers of two; rows of zeros and of NaN; scales 0, subnormal, infinite and NaN."""
    rng = np.random.default_rng(41)
    codes = rng.integers(0, 256, (512, 256), dtype=np.uint8)
    nan = (codes & 0x7F) == 0x7F
    codes[nan & (rng.random(codes.shape) < 0.9)] = 0x38
    with np.errstate(over="ignore", under="ignore"):
        sf = np.exp2(rng.uniform(-spread, spread, (512, 2))).astype(np.float32)
        sf[rng.random(sf.shape) < 0.1] = np.float32(1e-41)
    for value in (0.0, np.inf, np.nan, 3.4e38, 2.0**127):
        sf[rng.random(sf.shape) < 0.01] = value
    codes[rng.random(512) < 0.05] &= 0x80
    codes[rng.random(512) < 0.02] = 0x7F
    _assert_transposes(codes, sf, offsets)


def test_transpose_of_powers_of_two_loses_nothing_while_nothing_falls_off() -> None:
    """Codes of one significant bit from 2^0 up stay E4M3 numbers down to distance 9."""
    rng = np.random.default_rng(42)
    codes = (rng.integers(7, 15, (256, 128)) << 3).astype(np.uint8)
    sf = np.ldexp(np.float32(1), rng.integers(20, 30, (256, 1)))
    x, exact = fp8_of(codes, sf)
    data, out_sf = fp8_transpose(x, [0, 96, 256])
    values = data.double().numpy()
    first, second = values[: 96 * 128].reshape(128, 96).T, values[96 * 128 :].reshape(128, 160).T
    scales = out_sf.double().numpy()
    back = np.concatenate([first * scales[0], second[:128] * scales[1], second[128:] * scales[2]])
    np.testing.assert_array_equal(back, exact.astype(np.float64))


def test_transpose_of_a_tile_without_anything_to_count() -> None:
    codes = np.zeros((128, 128), dtype=np.uint8)
    codes[::2] = 0x80
    codes[5] = 0x30
    sf = np.full((128, 1), 3.0, dtype=np.float32)
    sf[5] = np.nan
    _assert_transposes(codes, sf, [0, 128])
    _assert_transposes(codes, np.zeros_like(sf), [0, 128])


@pytest.mark.parametrize("scale", [1e-9, 3e9])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_rows_of_scales_that_are_not_finite_do_not_count(bad: float, scale: float) -> None:
    codes = np.full((128, 128), 0x3A, dtype=np.uint8)
    sf = np.full((128, 1), scale, dtype=np.float32)
    sf[7] = bad
    _assert_transposes(codes, sf, [0, 128])


@pytest.mark.parametrize("offsets", [[], [128], [0, 16], [0, 64, 32], [0, 160]], ids=str)
def test_bad_group_offsets_of_a_transposition(offsets: list[int]) -> None:
    x, _ = fp8_of(np.zeros((128, 128), dtype=np.uint8), np.ones((128, 1), dtype=np.float32))
    message = re.escape(f"group_offsets must rise from 0 to at most 128 in multiples of 32, got {offsets}")
    with pytest.raises(ValueError, match=message):
        fp8_transpose(x, offsets)
