"""Convert groups of MXFP4 rows to transposed E4M3 with 128x1 scales by exponent alignment, one pass."""

from __future__ import annotations

import torch

from qcomm import reference_columnwise, validate
from qcomm.formats import BLOCK_SIZE
from qcomm.jit import KernelSpec
from qcomm.ops import codec, columnwise
from qcomm.ops.codec import pointer
from qcomm.ops.columnwise import ColumnwiseParams, GroupOffsets, columnwise_spec
from qcomm.tensors import FP8ColumnwiseTensor, MXFP4Tensor


def mxfp4_to_fp8_columnwise_spec(alignment: int, hadamard: bool, prescaled: bool) -> KernelSpec:
    """Build the spec."""
    return columnwise_spec("mxfp4_to_fp8_columnwise", alignment, hadamard=hadamard, prescaled=prescaled)


def mxfp4_to_fp8_columnwise(
    x: MXFP4Tensor,
    group_offsets: GroupOffsets = None,
    *,
    alignment: int = 128,
    spread_overflows: torch.Tensor | None = None,
    out: FP8ColumnwiseTensor | None = None,
) -> FP8ColumnwiseTensor:
    """Convert groups of rows to transposed E4M3 blocks with one power-of-two scale per 128x1.

    The exponent alignment of `mxfp4_to_fp8`, over the blocks that one column of blocks has in a tile of 128 rows: bit
    for bit what dequantizing, transposing and requantizing with the same scale gives. One pass on the current stream;
    no host synchronisation if `group_offsets` is a tensor. CPU tensors run the oracle, with the same bits.

    Args:
        x: of shape `[rows, K]`, K a multiple of 128; parts that are not contiguous are copied first.
        group_offsets: first row of each group and the end of the last: ints, checked; or int32 `[num_groups + 1]` on
            the device of x, trusted. None is one group of all rows. Groups may be empty. Later rows are left out.
        alignment: what the offsets are multiples of, itself a multiple of 32.
        spread_overflows: int64 `[1]` on x's device; the number of blocks at a distance above 14 is added to it.
        out: tensors to write, contiguous and on 16-byte boundaries; its `group_offsets` is not read.

    Returns:
        The FP8ColumnwiseTensor.

    Raises:
        TypeError: x is no MXFP4Tensor, or an argument of the wrong type.
        ValueError: K is no multiple of 128, x has not 2 dimensions, or groups or an `out` that do not fit.
    """
    validate.instance("x", x, MXFP4Tensor)
    if len(x.shape) != 2:
        raise ValueError(f"x must have 2 dimensions, got shape {tuple(x.shape)}")
    codec.check_counter(spread_overflows, x.device)
    result = columnwise.prepare(x.shape[0], x.shape[1], group_offsets, alignment, x.device, out)
    _mxfp4_to_fp8_columnwise(
        x.qdata,
        x.sf,
        result.data,
        result.sf,
        result.group_offsets,
        alignment,
        spread_overflows,
        x.hadamard,
        x.hadamard_signs,
        x.prescaled,
    )
    return result


@torch.library.custom_op("qcomm::mxfp4_to_fp8_columnwise", mutates_args=("data", "out_sf", "overflows"))
def _mxfp4_to_fp8_columnwise(
    qdata: torch.Tensor,
    sf: torch.Tensor,
    data: torch.Tensor,
    out_sf: torch.Tensor,
    group_offsets: torch.Tensor,
    alignment: int,
    overflows: torch.Tensor | None,
    hadamard: bool,
    signs: int,
    prescaled: bool,
) -> None:
    if qdata.device.type != "cuda":
        x = MXFP4Tensor(qdata, sf, hadamard, signs, prescaled)
        made, scale, count = reference_columnwise.mxfp4_to_fp8_columnwise(x, group_offsets.tolist())
        columnwise.store_oracle(made, scale, data, out_sf)
        if overflows is not None:
            overflows += count
        return
    codec.check_flat("out.data", data)
    codec.check_flat("out.sf", out_sf)
    qdata, sf = codec.flat(qdata), codec.flat(sf)
    num_tiles, columns = out_sf.shape
    params = ColumnwiseParams(
        qdata.data_ptr(),
        sf.data_ptr(),
        data.data_ptr(),
        out_sf.data_ptr(),
        group_offsets.data_ptr(),
        pointer(overflows),
        columns // BLOCK_SIZE,
        4,
        group_offsets.numel() - 1,
        columns,
        columns // 2,
        num_tiles,
        signs,
    )
    columnwise.launch(mxfp4_to_fp8_columnwise_spec(alignment, hadamard, prescaled), data, params)


_mxfp4_to_fp8_columnwise.register_fake(codec.only_writes)
