"""Quantized expert-parallel collectives: MoE dispatch and combine with MXFP4 on the wire.

Importing builds nothing, touches no GPU and changes no environment.
"""

from qcomm.buffer import Buffer
from qcomm.errors import (
    QcommConfigError,
    QcommError,
    QcommOverflowError,
    QcommPeerError,
    QcommRoutingError,
    QcommTimeoutError,
    QcommUnsupportedError,
)
from qcomm.formats import Rounding, ScaleLayout, ScaleRule, WireFormat, WirePrecision
from qcomm.functional import combine, dispatch
from qcomm.handle import DispatchHandle, Received
from qcomm.ops.dequantize import dequantize
from qcomm.ops.fp8_transpose import fp8_transpose
from qcomm.ops.mxfp4_to_fp8 import mxfp4_to_fp8
from qcomm.ops.mxfp4_to_fp8_columnwise import mxfp4_to_fp8_columnwise
from qcomm.ops.quantize_mxfp4 import quantize_mxfp4
from qcomm.ops.swiglu import swiglu_backward, swiglu_forward
from qcomm.stats import BufferStats
from qcomm.tensors import FP8ColumnwiseTensor, FP8Tensor, MXFP4Tensor

__version__ = "0.1.0"

__all__ = [
    "Buffer",
    "BufferStats",
    "DispatchHandle",
    "FP8ColumnwiseTensor",
    "FP8Tensor",
    "MXFP4Tensor",
    "QcommConfigError",
    "QcommError",
    "QcommOverflowError",
    "QcommPeerError",
    "QcommRoutingError",
    "QcommTimeoutError",
    "QcommUnsupportedError",
    "Received",
    "Rounding",
    "ScaleLayout",
    "ScaleRule",
    "WireFormat",
    "WirePrecision",
    "combine",
    "dequantize",
    "dispatch",
    "fp8_transpose",
    "mxfp4_to_fp8",
    "mxfp4_to_fp8_columnwise",
    "quantize_mxfp4",
    "swiglu_backward",
    "swiglu_forward",
]
