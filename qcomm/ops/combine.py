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
    send_stage_bytes,
    spec,
    teams,
    wire_constants,
)

_SEND = Budget(warps=12, team_warps=1, registers=80, shared_bytes=172 * 1024, stages=1)
_SEND_FEW = Budget(warps=14, team_warps=14, registers=80, shared_bytes=172 * 1024, stages=3)
"""Where records are few, and what counts is how long one takes."""
_FEW_RECORDS_PER_SM = 8


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


def combine_spec(name: str, wire: WireFormat, hidden: int, few: bool = False) -> KernelSpec:
    """Build the spec of `combine_send`, for few records or many, or of `combine_recv`."""
    budget = _SEND_FEW if few else _SEND
    return spec(
        "combine",
        name,
        sizeof_combine_send=ctypes.sizeof(CombineSendParams),
        sizeof_combine_recv=ctypes.sizeof(CombineRecvParams),
        recv_threads=_recv_threads(wire),
        **send_teams(wire, hidden, few).constants(budget),
        **wire_constants(wire, hidden),
    )


def _recv_threads(wire: WireFormat) -> int:
    """Return the threads of a block of `combine_recv`; a rotation takes more registers."""
    return 256 if wire.hadamard else 384


def send_teams(wire: WireFormat, hidden: int, few: bool) -> Teams:
    """Return the teams of a block of `combine_send`."""
    return teams(hidden, send_stage_bytes(wire, hidden), _SEND_FEW if few else _SEND)


def are_few(num_records: int, num_sms: int) -> bool:
    """Tell whether a team of warps for each record is faster than a warp."""
    return num_records <= _FEW_RECORDS_PER_SM * num_sms


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
    few = are_few(handle.record_src_token.shape[0], launcher.num_sms)
    sharing = send_teams(wire, hidden, few)
    kernel = launcher.kernels.get(combine_spec, "combine_send", encoding(wire, "bf16"), hidden, few)
    kernel.launch(launcher.num_sms, sharing.threads, sharing.shared_bytes, stream, params)


def launch_recv(launcher: Launcher, stream: int, handle: DispatchHandle, wire: WireFormat, hidden: int) -> torch.Tensor:
    """Allocate the result, and fill it as sums arrive."""
    out = torch.empty(handle.num_tokens, hidden, dtype=torch.bfloat16, device=handle.send_slot.device)
    if handle.num_tokens:
        params = CombineRecvParams(launcher.comm, handle.send_slot.data_ptr(), out.data_ptr(), handle.num_tokens)
        kernel = launcher.kernels.get(combine_spec, "combine_recv", decoding(wire), hidden)
        kernel.launch(launcher.num_sms, _recv_threads(wire), 0, stream, params)
    return out
