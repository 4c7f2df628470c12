"""The oracle of FP8 rows: quantization, decoding, exponent alignment, packed scales."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from bit_patterns import all_e4m3, equal_bits
from codec_truth import (
    BF16_MAGNITUDES,
    FEW,
    Array,
    alignment,
    bytes_of,
    decode,
    fp8_of,
    groups_under_maximum,
    non_contiguous,
    pack,
    random_float32,
    random_mxfp4,
    strided,
    to_e4m3_codes,
)
from hypothesis import given

from qcomm.formats import ScaleLayout
from qcomm.reference import dequantize_fp8, dequantize_mxfp4, mxfp4_to_fp8, quantize_fp8, quantize_mxfp4
from qcomm.tensors import FP8Tensor, MXFP4Tensor, empty_scales, pack_scales


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
        x = groups_under_maximum(last, size=128, position=exponent % 128)
        q = quantize_fp8(x)
        assert (q.sf == 2.0**exponent).all()
        np.testing.assert_array_equal(bytes_of(q.data), to_e4m3_codes(np.ldexp(x.double().numpy(), -exponent)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_fp8_of_the_other_dtypes(dtype: type[np.floating[Any]]) -> None:
    """A quotient has the bits of its dividend, so that ml_dtypes' way over float32 rounds once."""
    rng = np.random.default_rng(19)
    wild = random_float32(rng, (64, 256))
    with np.errstate(over="ignore"):
        tame = (rng.standard_normal((64, 256)) * rng.choice([1e-7, 1.0, 60.0], (64, 1))).astype(dtype)
    values = tame if dtype is np.float16 else np.concatenate([wild, tame])
    groups = values.astype(np.float64).reshape(len(values), 2, 128)
    exponents = _fp8_exponents(np.abs(groups).max(-1))
    q = quantize_fp8(torch.from_numpy(values))
    np.testing.assert_array_equal(q.sf.numpy(), np.ldexp(np.float32(1), exponents))
    truth = to_e4m3_codes(np.ldexp(groups, -exponents[..., None])).reshape(values.shape)
    np.testing.assert_array_equal(bytes_of(q.data), truth)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_fp8_non_finite_group(bad: float) -> None:
    x = torch.ones(128, 256, dtype=torch.bfloat16)
    x[:, 128:].fill_diagonal_(bad)
    q = quantize_fp8(x)
    assert (bytes_of(q.data)[:, 128:] == 0x7F).all()
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
    sf = random_float32(np.random.default_rng(20), (512, 2))
    x, exact = fp8_of(np.tile(bytes_of(all_e4m3()), (512, 1)), sf)
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


def _assert_aligned(x: MXFP4Tensor) -> None:
    out, overflows = mxfp4_to_fp8(x)
    top, distance = alignment(x, axis=1)
    exponent = np.maximum(top - 133, -126)
    np.testing.assert_array_equal(out.sf.numpy(), np.ldexp(np.float32(1), exponent[:, ::4]))
    assert overflows.item() == (distance > 14).sum()
    assert overflows.dtype == torch.int64
    decoded = decode(x)
    is_nan = np.isnan(decoded)
    aligned = np.ldexp(decoded, -exponent.repeat(32, axis=1))
    np.testing.assert_array_equal(bytes_of(out.data), np.where(is_nan, 0x7F, to_e4m3_codes(aligned)))
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
        qdata = pack(codes[:, order].reshape(256, 128))
        _assert_aligned(MXFP4Tensor(torch.from_numpy(qdata), torch.from_numpy(sf[:, order])))


@pytest.mark.parametrize(("low", "high"), [(0, 256), (0, 24), (120, 140), (235, 256)])
def test_align_random_blocks(low: int, high: int) -> None:
    _assert_aligned(random_mxfp4(np.random.default_rng(22), 300, 384, low, high))


def test_align_all_zero_group() -> None:
    x = MXFP4Tensor(torch.full((2, 64), 0x80, dtype=torch.uint8), torch.full((2, 4), 200, dtype=torch.uint8))
    out, overflows = mxfp4_to_fp8(x)
    assert (out.sf == 2.0**-126).all()
    assert bytes_of(out.data).tolist() == [[0, 0x80] * 64] * 2
    assert overflows.item() == 0


def test_align_rotated_tensor() -> None:
    x = quantize_mxfp4(torch.randn(9, 256, generator=torch.Generator().manual_seed(23)), hadamard=True)
    out, overflows = mxfp4_to_fp8(x)
    truth = quantize_fp8(dequantize_mxfp4(x))
    assert equal_bits(out.data, truth.data)
    assert equal_bits(out.sf, truth.sf)
    assert overflows.item() == 0


@given(strided(128, min_dims=1, max_dims=1))
@FEW
def test_fp8_of_any_strides(x: torch.Tensor) -> None:
    q = quantize_fp8(x)
    dense = quantize_fp8(x.contiguous())
    assert equal_bits(q.data, dense.data)
    assert equal_bits(q.sf, dense.sf)
    sf = empty_scales(len(x), x.shape[1] // 128, ScaleLayout.COLUMN_MAJOR).copy_(q.sf)
    spread = FP8Tensor(non_contiguous(q.data.view(torch.uint8)).view(torch.float8_e4m3fn), sf)
    assert equal_bits(dequantize_fp8(spread), dequantize_fp8(q))
    a, b = quantize_mxfp4(spread), quantize_mxfp4(q)
    assert torch.equal(a.qdata, b.qdata)
    aligned, overflows = mxfp4_to_fp8(MXFP4Tensor(non_contiguous(a.qdata), non_contiguous(a.sf)))
    assert equal_bits(aligned.data, mxfp4_to_fp8(b)[0].data)
    assert torch.equal(overflows, mxfp4_to_fp8(b)[1])


@pytest.mark.parametrize("form", ["signs", "prescaled", "rotated and prescaled"])
def test_align_tensors_that_are_not_plain(form: str) -> None:
    """Decoded and quantized; an alignment of the codes would have other bits."""
    plain = random_mxfp4(np.random.default_rng(35), 40, 256, 100, 140)
    options: dict[str, Any] = {
        "signs": {"hadamard": True, "hadamard_signs": 0x12345678},
        "prescaled": {"prescaled": True},
        "rotated and prescaled": {"hadamard": True, "prescaled": True},
    }
    x = dataclasses.replace(plain, **options[form])
    out, overflows = mxfp4_to_fp8(x)
    truth = quantize_fp8(dequantize_mxfp4(x))
    assert equal_bits(out.data, truth.data)
    assert equal_bits(out.sf, truth.sf)
    assert overflows.item() == 0
    assert not equal_bits(out.data, mxfp4_to_fp8(plain)[0].data)


@pytest.mark.parametrize("num_groups", [1, 3, 4, 5, 8, 63])
@pytest.mark.parametrize("layout", [ScaleLayout.ROW_MAJOR, ScaleLayout.COLUMN_MAJOR])
def test_pack_scales(num_groups: int, layout: ScaleLayout) -> None:
    """Byte j of word w, from the low end, is the exponent byte of group 4 w + j; the rest is 0."""
    rng = np.random.default_rng(36)
    exponents = rng.integers(1, 255, (9, num_groups))
    exponents[:2] = [[1], [254]]
    sf = empty_scales(9, num_groups, layout)
    sf.copy_(torch.from_numpy(np.ldexp(np.float32(1), exponents - 127)))
    packed = pack_scales(sf)
    assert (packed.shape, packed.dtype) == ((9, -(-num_groups // 4)), torch.int32)
    for row in range(9):
        for word in range(packed.shape[1]):
            parts = exponents[row, 4 * word : 4 * word + 4].tolist()
            assert int(packed[row, word]) & 0xFFFFFFFF == sum(part << 8 * j for j, part in enumerate(parts))


def test_pack_scales_without_rows() -> None:
    assert pack_scales(torch.zeros(0, 5)).shape == (0, 2)


@pytest.mark.parametrize(("rows", "padded"), [(1, 4), (4, 4), (5, 8)])
@pytest.mark.parametrize(("num_groups", "words"), [(1, 1), (4, 1), (5, 2), (56, 14)])
def test_empty_scales_packed(rows: int, padded: int, num_groups: int, words: int) -> None:
    sf = empty_scales(rows, num_groups, ScaleLayout.PACKED_UE8M0)
    assert (sf.shape, sf.dtype, sf.stride()) == ((rows, words), torch.int32, (1, padded))
    assert sf.untyped_storage().nbytes() == words * padded * 4
    x = FP8Tensor(torch.zeros(rows, num_groups * 128, dtype=torch.float8_e4m3fn), sf)
    assert x.is_packed


def test_packed_scales_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"sf must be \(2, 2\) for data \(2, 640\).*got \(2, 5\)"):
        FP8Tensor(torch.zeros(2, 640, dtype=torch.float8_e4m3fn), torch.zeros(2, 5, dtype=torch.int32))
