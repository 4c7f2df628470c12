"""Launch combine: sum and send the experts' rows, receive and add the sums."""

from __future__ import annotations

import ctypes

import torch

from qcomm.formats import WireFormat
from qcomm.handle import DispatchHandle
from qcomm.jit import KernelSpec
from qcomm.ops.comm import (
    Budget,
    Comm,
    Launcher,
    Quantizer,
    Teams,
    decoding,
    encoding,
    pointer,
    send_teams,
    spec,
    wire_constants,
)
from qcomm.records import RecordLayout

_SEND = Budget(warps=14, team_warps=14, registers=80, shared_bytes=172 * 1024, stages=6)
_MAX_CHUNKS = 12


class CombineSendParams(ctypes.Structure):
    """See `CombineSendParams` in kernels/combine.cu."""

    _fields_ = (
        ("comm", Comm),
        ("recv_offsets", ctypes.c_uint64),
        ("record_rows", ctypes.c_uint64),
        ("record_weights", ctypes.c_uint64),
        ("record_src_token", ctypes.c_uint64),
        ("y", ctypes.c_uint64),
        ("quantizer", Quantizer),
        ("width", ctypes.c_int32),
    )


class CombineRecvParams(ctypes.Structure):
    """See `CombineRecvParams` in kernels/combine.cu."""

    _fields_ = (
        ("comm", Comm),
        ("send_slot", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("num_tokens", ctypes.c_int32),
    )


def combine_spec(name: str, wire: WireFormat, hidden: int) -> KernelSpec:
    """Build the spec of `combine_send` or `combine_recv`."""
    sharing = _send_teams(wire, hidden)
    return spec(
        "combine",
        name,
        sizeof_combine_send=ctypes.sizeof(CombineSendParams),
        sizeof_combine_recv=ctypes.sizeof(CombineRecvParams),
        recv_threads=_recv_threads(wire),
        chunks=sharing.chunks,
        chunk_bytes=sharing.chunk_bytes,
        **sharing.constants(_SEND),
        **wire_constants(wire, hidden),
    )


def _recv_threads(wire: WireFormat) -> int:
    """Return the threads of a block of `combine_recv`; a rotation takes more registers."""
    return 256 if wire.hadamard else 384


def _send_teams(wire: WireFormat, hidden: int) -> Teams:
    """Return the teams of a block of `combine_send`."""
    return send_teams(hidden, RecordLayout(wire.kind, hidden).slot_bytes(), _SEND, _MAX_CHUNKS)


def launch_send(
    launcher: Launcher,
    stream: int,
    y: torch.Tensor,
    handle: DispatchHandle,
    wire: WireFormat,
    weighted: bool,
    seed: int,
) -> None:
    """Sum each record's rows and send the sum to its token's rank."""
    hidden = y.shape[-1]
    params = CombineSendParams(
        launcher.comm,
        handle.recv_offsets.data_ptr(),
        handle.record_rows.data_ptr(),
        pointer(handle.record_topk_weights if weighted and handle.has_weights else None),
        handle.record_src_token.data_ptr(),
        y.data_ptr(),
        Quantizer.of(wire, seed, 0),
        handle.record_rows.shape[1],
    )
    sharing = _send_teams(wire, hidden)
    kernel = launcher.kernels.get(combine_spec, "combine_send", encoding(wire, "bf16"), hidden)
    kernel.launch(launcher.num_sms, sharing.threads, sharing.shared_bytes, stream, params)


def launch_recv(launcher: Launcher, stream: int, handle: DispatchHandle, wire: WireFormat, hidden: int) -> torch.Tensor:
    """Allocate the result, and fill it as sums arrive."""
    out = torch.empty(handle.num_tokens, hidden, dtype=torch.bfloat16, device=handle.send_slot.device)
    if handle.num_tokens:
        params = CombineRecvParams(launcher.comm, handle.send_slot.data_ptr(), out.data_ptr(), handle.num_tokens)
        kernel = launcher.kernels.get(combine_spec, "combine_recv", decoding(wire), hidden)
        kernel.launch(launcher.num_sms, _recv_threads(wire), 0, stream, params)
    return out
