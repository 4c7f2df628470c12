"""Dequantize MXFP4 to BF16 or FP32, one pass."""

from __future__ import annotations

import ctypes

import torch

from qcomm import reference, validate
from qcomm.jit import KernelSpec
from qcomm.ops import codec
from qcomm.tensors import MXFP4Tensor

DTYPES = (torch.bfloat16, torch.float32)
"""What the kernel writes; the index is its number there."""
VECS_PER_THREAD = 1


class DequantizeParams(ctypes.Structure):
    """See `DequantizeParams` in kernels/dequantize.cu."""

    _fields_ = (
        ("qdata", ctypes.c_uint64),
        ("sf", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("num_vecs", ctypes.c_int32),
        ("signs", ctypes.c_uint32),
    )


def dequantize_spec(dtype: torch.dtype, hadamard: bool, prescaled: bool) -> KernelSpec:
    """Build the spec."""
    return KernelSpec.of(
        "dequantize",
        "dequantize",
        dtype=DTYPES.index(dtype),
        hadamard=hadamard,
        prescaled=prescaled,
        vecs_per_thread=VECS_PER_THREAD,
        threads=codec.THREADS,
        sizeof_params=ctypes.sizeof(DequantizeParams),
    )


def dequantize(x: MXFP4Tensor, dtype: torch.dtype = torch.bfloat16, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Dequantize to bfloat16 or float32, in one pass on the current stream.

    Rotated back where the tensor was rotated, times 4/3 where it was prescaled. Other values are exact; past the float
    range they become infinite, and a block with scale byte 255 is NaN. CPU tensors run the oracle, with the same bits.

    Args:
        x: of shape `[..., K]`; parts that are not contiguous are copied first.
        dtype: torch.bfloat16 or torch.float32.
        out: tensor to write, `[..., K]` of the dtype, contiguous and on a 16-byte boundary.

    Returns:
        `[..., K]` of the dtype.

    Raises:
        TypeError: x is no MXFP4Tensor, or another dtype.
        ValueError: an `out` that does not fit.
    """
    validate.instance("x", x, MXFP4Tensor)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    else:
        codec.check_out("out", out, tuple(x.shape), dtype, x.device)
    _dequantize(x.qdata, x.sf, out, x.hadamard, x.hadamard_signs, x.prescaled)
    return out


@torch.library.custom_op("qcomm::dequantize", mutates_args=("out",))
def _dequantize(
    qdata: torch.Tensor, sf: torch.Tensor, out: torch.Tensor, hadamard: bool, signs: int, prescaled: bool
) -> None:
    if qdata.device.type != "cuda":
        out.copy_(reference.dequantize_mxfp4(MXFP4Tensor(qdata, sf, hadamard, signs, prescaled), out.dtype))
        return
    codec.check_flat("out", out)
    qdata, sf = codec.flat(qdata), codec.flat(sf)
    num_vecs = codec.count_vecs(out)
    params = DequantizeParams(qdata.data_ptr(), sf.data_ptr(), out.data_ptr(), num_vecs, signs)
    spec = dequantize_spec(out.dtype, hadamard, prescaled)
    codec.launch(spec, out, codec.blocks(num_vecs, VECS_PER_THREAD), params)


_dequantize.register_fake(codec.only_writes)
