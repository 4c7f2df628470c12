"""Transpose groups of E4M3 rows with 1x128 scales to columns with 128x1 scales by exponent alignment, one pass."""

from __future__ import annotations

import torch

from qcomm import reference_columnwise, validate
from qcomm.jit import KernelSpec
from qcomm.ops import codec, columnwise
from qcomm.ops.columnwise import ColumnwiseParams, GroupOffsets, columnwise_spec
from qcomm.tensors import FP8ColumnwiseTensor, FP8Tensor


def fp8_transpose_spec(alignment: int) -> KernelSpec:
    """Build the spec."""
    return columnwise_spec("fp8_transpose", alignment)


def fp8_transpose(
    x: FP8Tensor,
    group_offsets: GroupOffsets = None,
    *,
    alignment: int = 128,
    out: FP8ColumnwiseTensor | None = None,
) -> FP8ColumnwiseTensor:
    """Transpose groups of E4M3 rows with 1x128 scales to blocks with one power-of-two scale per 128x1.

    A tile is 128 rows of a group by the 128 columns under one row scale; its scale is the smallest power of two that is
    not below any of its rows' scales (rows of zeros, and of scales that are not finite, don't count), at least 2^-126.
    Codes are shifted down by the exponent distance, rounded to nearest even once, subnormals included. Scales that are
    no powers of two are taken exactly, at the price of speed. NaN stays NaN. One pass on the current stream; no host
    synchronisation if `group_offsets` is a tensor. CPU tensors run the oracle, with the same bits.

    Args:
        x: of shape `[rows, K]` with float32 scales of any strides, 0 or above; data that is not contiguous is copied.
        group_offsets: first row of each group and the end of the last: ints, checked; or int32 `[num_groups + 1]` on
            the device of x, trusted. None is one group of all rows. Groups may be empty. Later rows are left out.
        alignment: what the offsets are multiples of, itself a multiple of 32.
        out: tensors to write, contiguous and on 16-byte boundaries; its `group_offsets` is not read.

    Returns:
        The FP8ColumnwiseTensor.

    Raises:
        TypeError: x is no FP8Tensor with float32 scales, or an argument of the wrong type.
        ValueError: groups or an `out` that do not fit.
    """
    validate.instance("x", x, FP8Tensor)
    if x.is_packed:
        raise TypeError(f"x.sf must be torch.float32, got {x.sf.dtype}")
    result = columnwise.prepare(x.shape[0], x.shape[1], group_offsets, alignment, x.device, out)
    _fp8_transpose(x.data, x.sf, result.data, result.sf, result.group_offsets, alignment)
    return result


@torch.library.custom_op("qcomm::fp8_transpose", mutates_args=("data", "out_sf"))
def _fp8_transpose(
    x: torch.Tensor,
    x_sf: torch.Tensor,
    data: torch.Tensor,
    out_sf: torch.Tensor,
    group_offsets: torch.Tensor,
    alignment: int,
) -> None:
    if x.device.type != "cuda":
        made, scale = reference_columnwise.fp8_transpose(FP8Tensor(x, x_sf), group_offsets.tolist())
        columnwise.store_oracle(made, scale, data, out_sf)
        return
    codec.check_flat("out.data", data)
    codec.check_flat("out.sf", out_sf)
    x = codec.flat(x)
    num_tiles, columns = out_sf.shape
    row_stride, group_stride = (stride * x_sf.element_size() for stride in x_sf.stride())
    params = ColumnwiseParams(
        x.data_ptr(),
        x_sf.data_ptr(),
        data.data_ptr(),
        out_sf.data_ptr(),
        group_offsets.data_ptr(),
        0,
        row_stride,
        group_stride,
        group_offsets.numel() - 1,
        columns,
        columns,
        num_tiles,
    )
    columnwise.launch(fp8_transpose_spec(alignment), data, params)


_fp8_transpose.register_fake(codec.only_writes)
