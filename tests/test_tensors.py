"""The quantized tensor pairs and their storage."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch

from qcomm.formats import ScaleLayout
from qcomm.tensors import FP8Tensor, MXFP4Tensor, empty_scales


def _bytes(*shape: int) -> torch.Tensor:
    return torch.arange(int(np.prod(shape)), dtype=torch.int64).to(torch.uint8).view(shape)


def _e4m3(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3)], ids=str)
def test_mxfp4_tensor_shape_and_bytes(lead: tuple[int, ...]) -> None:
    x = MXFP4Tensor(_bytes(*lead, 48), _bytes(*lead, 3))
    assert x.shape == torch.Size((*lead, 96))
    assert x.num_bytes == int(np.prod(lead)) * 51
    assert x.device == torch.device("cpu")
    assert not x.hadamard


def test_fp8_tensor_shape_and_bytes() -> None:
    x = FP8Tensor(_e4m3(5, 256), torch.ones(5, 2))
    assert x.shape == torch.Size((5, 256))
    assert x.num_bytes == 5 * 256 + 5 * 2 * 4
    assert x.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("qdata", "sf", "message"),
    [
        (_bytes(2, 16).to(torch.int8), _bytes(2, 1), r"qdata must be torch\.uint8, got torch\.int8"),
        (_bytes(2, 16), torch.ones(2, 1), r"sf must be torch\.uint8, got torch\.float32"),
    ],
)
def test_mxfp4_tensor_dtype_errors(qdata: torch.Tensor, sf: torch.Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MXFP4Tensor(qdata, sf)


@pytest.mark.parametrize(
    ("qdata_shape", "sf_shape", "message"),
    [
        ((2, 32), (2, 3), r"sf must be \(2, 2\) for qdata \(2, 32\).*got \(2, 3\)"),
        ((2, 32), (3, 2), r"sf must be \(2, 2\) for qdata \(2, 32\).*got \(3, 2\)"),
        ((2, 32), (2,), r"sf must be \(2, 2\).*got \(2,\)"),
        ((2, 3, 16), (6, 1), r"sf must be \(2, 3, 1\).*got \(6, 1\)"),
        ((2, 24), (2, 1), r"qdata \(2, 24\) with K a multiple of 32.*got \(2, 1\)"),
    ],
)
def test_mxfp4_tensor_shape_errors(qdata_shape: tuple[int, ...], sf_shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MXFP4Tensor(_bytes(*qdata_shape), _bytes(*sf_shape))


@pytest.mark.parametrize(
    ("data", "sf", "message"),
    [
        (torch.zeros(2, 128), torch.ones(2, 1), r"data must be torch\.float8_e4m3fn, got torch\.float32"),
        (_e4m3(2, 128), torch.ones(2, 1).bfloat16(), r"sf must be torch\.float32 or torch\.int32, got torch\.bfloat16"),
    ],
)
def test_fp8_tensor_dtype_errors(data: torch.Tensor, sf: torch.Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FP8Tensor(data, sf)


@pytest.mark.parametrize(
    ("data_shape", "sf_shape", "message"),
    [
        ((2, 256), (2, 1), r"sf must be \(2, 2\) for data \(2, 256\).*got \(2, 1\)"),
        ((2, 256), (1, 2), r"sf must be \(2, 2\) for data \(2, 256\).*got \(1, 2\)"),
        ((2, 192), (2, 1), r"data \(2, 192\) with K a multiple of 128.*got \(2, 1\)"),
        ((128,), (1,), r"data must have 2 dimensions, got shape \(128,\)"),
        ((2, 2, 128), (2, 2, 1), r"data must have 2 dimensions, got shape \(2, 2, 128\)"),
    ],
)
def test_fp8_tensor_shape_errors(data_shape: tuple[int, ...], sf_shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FP8Tensor(_e4m3(*data_shape), torch.ones(sf_shape))


def test_parts_on_two_devices() -> None:
    with pytest.raises(ValueError, match="sf must be on cpu, got meta"):
        MXFP4Tensor(_bytes(2, 16), _bytes(2, 1).to("meta"))
    with pytest.raises(ValueError, match="sf must be on meta, got cpu"):
        FP8Tensor(_e4m3(2, 128).to("meta"), torch.ones(2, 1))


def test_tensors_are_frozen_and_compare_by_identity() -> None:
    x = MXFP4Tensor(_bytes(2, 16), _bytes(2, 1))
    assert x != MXFP4Tensor(x.qdata, x.sf)
    with pytest.raises(dataclasses.FrozenInstanceError):
        x.hadamard = True  # type: ignore[misc]


def test_parts_view_as_the_torch_dtypes_without_a_copy() -> None:
    x = MXFP4Tensor(_bytes(4, 64), _bytes(4, 4))
    packed, scales = x.qdata.view(torch.float4_e2m1fn_x2), x.sf.view(torch.float8_e8m0fnu)
    assert (packed.shape, scales.shape) == (x.qdata.shape, x.sf.shape)
    assert (packed.data_ptr(), scales.data_ptr()) == (x.qdata.data_ptr(), x.sf.data_ptr())
    truth = x.sf.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(scales.to(torch.float32).numpy(), truth)


@pytest.mark.parametrize("rows", [0, 1, 5, 8])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_empty_scales_row_major(rows: int, num_groups: int) -> None:
    sf = empty_scales(rows, num_groups, ScaleLayout.ROW_MAJOR)
    assert (sf.shape, sf.dtype) == ((rows, num_groups), torch.float32)
    assert sf.is_contiguous()


@pytest.mark.parametrize(("rows", "padded"), [(1, 4), (4, 4), (5, 8), (8, 8)])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_empty_scales_column_major(rows: int, padded: int, num_groups: int) -> None:
    sf = empty_scales(rows, num_groups, ScaleLayout.COLUMN_MAJOR)
    assert (sf.shape, sf.dtype, sf.stride()) == ((rows, num_groups), torch.float32, (1, padded))
    assert sf.untyped_storage().nbytes() == num_groups * padded * 4
    assert FP8Tensor(_e4m3(rows, num_groups * 128), sf).sf is sf


def test_empty_scales_column_major_without_rows() -> None:
    assert empty_scales(0, 3, ScaleLayout.COLUMN_MAJOR).shape == (0, 3)


@pytest.mark.parametrize("layout", ScaleLayout)
def test_empty_scales_device(layout: ScaleLayout) -> None:
    assert empty_scales(4, 2, layout, "meta").device == torch.device("meta")
