"""Convert MXFP4 rows to E4M3 with 1x128 scales by exponent alignment, one pass."""

from __future__ import annotations

import ctypes

import torch

from qcomm import reference, validate
from qcomm.formats import FP8_GROUP_SIZE, ScaleLayout
from qcomm.jit import KernelSpec
from qcomm.ops import codec
from qcomm.ops.codec import Divisor, pointer
from qcomm.tensors import FP8Tensor, MXFP4Tensor, empty_scales, pack_scales

_LAYOUTS = tuple(ScaleLayout)
_VECS_OF_A_WARP = 32
_WARPS = codec.THREADS // _VECS_OF_A_WARP


def vecs_per_thread(sf_layout: ScaleLayout) -> int:
    """Return the vectors that a thread takes; where they are of adjacent scales, those of a sector of 32 bytes."""
    return 2 if sf_layout is ScaleLayout.ROW_MAJOR else 8


class Mxfp4ToFp8Params(ctypes.Structure):
    """See `Mxfp4ToFp8Params` in kernels/mxfp4_to_fp8.cu."""

    _fields_ = (
        ("qdata", ctypes.c_uint64),
        ("sf", ctypes.c_uint64),
        ("data", ctypes.c_uint64),
        ("out_sf", ctypes.c_uint64),
        ("overflows", ctypes.c_uint64),
        ("sf_group_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
        ("vecs_per_row", ctypes.c_int32),
        ("pieces", ctypes.c_int32),
        ("signs", ctypes.c_uint32),
        ("by_pieces", Divisor),
    )


def mxfp4_to_fp8_spec(sf_layout: ScaleLayout, hadamard: bool, prescaled: bool) -> KernelSpec:
    """Build the spec."""
    return KernelSpec.of(
        "mxfp4_to_fp8",
        "mxfp4_to_fp8",
        layout=_LAYOUTS.index(sf_layout),
        hadamard=hadamard,
        prescaled=prescaled,
        vecs_per_thread=vecs_per_thread(sf_layout),
        threads=codec.THREADS,
        sizeof_params=ctypes.sizeof(Mxfp4ToFp8Params),
    )


def mxfp4_to_fp8(
    x: MXFP4Tensor,
    *,
    sf_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    spread_overflows: torch.Tensor | None = None,
    out: FP8Tensor | None = None,
) -> FP8Tensor:
    """Convert rows to E4M3 with one power-of-two scale per 1x128, in one pass on the current stream.

    Exponent alignment (arXiv 2603.02731, made exact): of the four blocks under one scale the largest non-zero one maps
    to 2^6, the others are shifted down by their exponent distance: exact up to distance 14, past that rounded to
    nearest even into subnormals. A block with scale byte 255 becomes NaN. A rotated or prescaled tensor is decoded and
    quantized instead. CPU tensors run the oracle, with the same bits.

    Args:
        x: of shape `[rows, K]`, K a multiple of 128; parts that are not contiguous are copied first.
        sf_layout: storage of the scales.
        spread_overflows: int64 `[1]` on x's device; the number of blocks at a distance above 14 is added to it.
        out: tensors to write; data contiguous and on a 16-byte boundary, sf as `sf_layout` stores it.

    Returns:
        The FP8Tensor: float32 scales, or packed ones for PACKED_UE8M0.

    Raises:
        TypeError: x is no MXFP4Tensor, or an argument of the wrong type.
        ValueError: K is no multiple of 128, x has not 2 dimensions, or an `out` that does not fit.
    """
    validate.instance("x", x, MXFP4Tensor)
    validate.instance("sf_layout", sf_layout, ScaleLayout)
    if len(x.shape) != 2 or x.shape[1] % FP8_GROUP_SIZE:
        raise ValueError(f"x.shape must be (rows, a multiple of {FP8_GROUP_SIZE}), got {tuple(x.shape)}")
    codec.check_counter(spread_overflows, x.device)
    rows, columns = x.shape
    if out is None:
        data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
        sf = empty_scales(rows, columns // FP8_GROUP_SIZE, sf_layout, x.device)
    else:
        data, sf = out.data, out.sf
        codec.check_out("out.data", data, (rows, columns), torch.float8_e4m3fn, x.device)
        codec.check_scales("out.sf", sf, rows, columns // FP8_GROUP_SIZE, sf_layout, x.device)
    layout = _LAYOUTS.index(sf_layout)
    _mxfp4_to_fp8(x.qdata, x.sf, data, sf, spread_overflows, layout, x.hadamard, x.hadamard_signs, x.prescaled)
    return FP8Tensor(data, sf)


@torch.library.custom_op("qcomm::mxfp4_to_fp8", mutates_args=("data", "out_sf", "overflows"))
def _mxfp4_to_fp8(
    qdata: torch.Tensor,
    sf: torch.Tensor,
    data: torch.Tensor,
    out_sf: torch.Tensor,
    overflows: torch.Tensor | None,
    sf_layout: int,
    hadamard: bool,
    signs: int,
    prescaled: bool,
) -> None:
    layout = _LAYOUTS[sf_layout]
    if qdata.device.type != "cuda":
        fp8, count = reference.mxfp4_to_fp8(MXFP4Tensor(qdata, sf, hadamard, signs, prescaled))
        data.copy_(fp8.data)
        out_sf.copy_(pack_scales(fp8.sf) if layout is ScaleLayout.PACKED_UE8M0 else fp8.sf)
        if overflows is not None:
            overflows += count
        return
    codec.check_flat("out.data", data)
    qdata, sf = codec.flat(qdata), codec.flat(sf)
    rows, vecs_per_row = data.shape[0], data.shape[1] // codec.VEC
    pieces = -(-vecs_per_row // _VECS_OF_A_WARP)
    params = Mxfp4ToFp8Params(
        qdata.data_ptr(),
        sf.data_ptr(),
        data.data_ptr(),
        out_sf.data_ptr(),
        pointer(overflows),
        out_sf.stride(1),
        rows,
        vecs_per_row,
        pieces,
        signs,
        Divisor.of(max(1, pieces)),
    )
    grid = codec.blocks(codec.count_vecs(data), vecs_per_thread(layout))
    if layout is not ScaleLayout.ROW_MAJOR:
        grid = -(-(-(-rows // vecs_per_thread(layout)) * pieces) // _WARPS)
    codec.launch(mxfp4_to_fp8_spec(layout, hadamard, prescaled), data, grid, params)


_mxfp4_to_fp8.register_fake(codec.only_writes)
