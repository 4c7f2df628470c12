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
from qcomm.handle import DispatchHandle, Received
from qcomm.tensors import FP8Tensor, MXFP4Tensor

__version__ = "0.1.0"

__all__ = [
    "Buffer",
    "DispatchHandle",
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
]
