"""Launch combine: sum and send the experts' rows, receive and add the sums."""

from __future__ import annotations

import ctypes
import functools

import torch

from qcomm.exchange import Sums
from qcomm.formats import Rounding, WireFormat
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
from qcomm.options import CombineOptions
from qcomm.records import RecordLayout, ValuesLayout
from qcomm.tuning import Tuning

_SEND = Budget(warps=14, team_warps=14, registers=64, shared_bytes=172 * 1024, stages=6)
_SEND_STOCHASTIC = Budget(warps=14, team_warps=14, registers=72, shared_bytes=172 * 1024, stages=6)
_DECODE = Budget(warps=14, team_warps=14, registers=56, shared_bytes=96 * 1024, stages=6)
_MAX_CHUNKS = 24
_DECODE_FLAGS = {"in_flight": 8, "flags_together": 4}


class CombineSendParams(ctypes.Structure):
    """See `CombineSendParams` in kernels/combine_send.cuh."""

    _fields_ = (
        ("comm", Comm),
        ("recv_offsets", ctypes.c_uint64),
        ("record_rows", ctypes.c_uint64),
        ("record_weights", ctypes.c_uint64),
        ("record_src_token", ctypes.c_uint64),
        ("row_values", ctypes.c_uint64),
        ("y", ctypes.c_uint64),
        ("quantizer", Quantizer),
        ("width", ctypes.c_int32),
        ("values_width", ctypes.c_int32),
    )


class CombineRecvParams(ctypes.Structure):
    """See `CombineRecvParams` in kernels/combine.cu."""

    _fields_ = (
        ("comm", Comm),
        ("send_slot", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("num_tokens", ctypes.c_int32),
    )


class CombineDecodeParams(ctypes.Structure):
    """See `CombineDecodeParams` in kernels/combine.cu."""

    _fields_ = (("send", CombineSendParams), ("recv", CombineRecvParams))


def combine_spec(name: str, wire: WireFormat, hidden: int, num_topk: int, tuning: Tuning) -> KernelSpec:
    """Build the spec of `combine_send`, `combine_recv` or `combine_decode`."""
    decodes = name == "combine_decode"
    sharing = _send_teams(wire, hidden, num_topk, decodes=decodes)
    budget, _ = _budget(wire, decodes=decodes)
    return spec(
        "combine",
        name,
        num_topk=num_topk,
        takes_values=not decodes,
        sizeof_combine_send=ctypes.sizeof(CombineSendParams),
        sizeof_combine_recv=ctypes.sizeof(CombineRecvParams),
        sizeof_combine_decode=ctypes.sizeof(CombineDecodeParams),
        recv_threads=_recv_threads(wire),
        senders=sharing.senders,
        chunks=sharing.chunks,
        chunk_bytes=sharing.chunk_bytes,
        **(_DECODE_FLAGS if decodes else tuning.constants),
        **sharing.constants(budget),
        **wire_constants(wire, hidden, ValuesLayout(num_topk)),
    )


def _recv_threads(wire: WireFormat) -> int:
    """Return the threads of a block of `combine_recv`; a rotation takes more registers."""
    return 256 if wire.hadamard else 384


def _budget(wire: WireFormat, *, decodes: bool) -> tuple[Budget, int]:
    """Return what a sending kernel may take, and its sending warps; random bits take more registers."""
    if decodes:
        return _DECODE, 1
    return (_SEND_STOCHASTIC, 1) if wire.rounding is Rounding.STOCHASTIC else (_SEND, 2)


@functools.cache
def _send_teams(wire: WireFormat, hidden: int, num_topk: int, *, decodes: bool = False) -> Teams:
    """Return the teams of a block of `combine_send` or `combine_decode`."""
    slot_bytes = RecordLayout(wire.kind, hidden).slot_bytes(ValuesLayout(num_topk))
    budget, senders = _budget(wire, decodes=decodes)
    return send_teams(hidden, slot_bytes, budget, senders, _MAX_CHUNKS)


def allocate(handle: DispatchHandle, hidden: int, has_values: bool) -> Sums:
    """Allocate the result."""
    device, num_topk = handle.send_slot.device, handle.record_topk_idx.shape[1]
    out = torch.empty(handle.num_tokens, hidden, dtype=torch.bfloat16, device=device)
    values = torch.empty(handle.num_tokens, num_topk, dtype=torch.float32, device=device) if has_values else None
    return Sums(out, values)


def launch_send(
    launcher: Launcher,
    stream: int,
    y: torch.Tensor,
    row_values: torch.Tensor | None,
    handle: DispatchHandle,
    options: CombineOptions,
) -> None:
    """Sum each record's rows and send the sum to its token's rank, with the record's values if there are any.

    The barrier is the last thing on the stream.
    """
    params = _send_params(launcher, y, row_values, handle, options)
    _launch_sender("combine_send", launcher, stream, params, options.wire, y.shape[-1])


def launch_recv(
    launcher: Launcher, stream: int, handle: DispatchHandle, wire: WireFormat, sums: Sums, *, early: bool = False
) -> None:
    """Fill the result as sums arrive; it may be early where the sender is the last thing on the stream."""
    if handle.num_tokens:
        tuning = launcher.tuning("combine", wire)
        key = combine_spec, "combine_recv", decoding(wire), sums.out.shape[1], launcher.num_topk, tuning
        params = _recv_params(launcher, handle, sums)
        blocks, threads = launcher.blocks("combine", wire), _recv_threads(wire)
        launcher.kernels.get(*key).launch(blocks, threads, 0, stream, params, early=early)


def is_decode(
    launcher: Launcher, handle: DispatchHandle, wire: WireFormat, row_values: torch.Tensor | None = None
) -> bool:
    """Tell whether one kernel can do it, and is faster than a barrier, a send and a receive: where tokens are few."""
    tuning, num_records = launcher.tuning("combine", wire), handle.record_src_token.shape[0]
    few = tuning.is_few(handle.num_tokens) and num_records <= tuning.decode_tokens * launcher.comm.num_ranks
    return few and row_values is None


def launch_decode(
    launcher: Launcher,
    stream: int,
    y: torch.Tensor,
    handle: DispatchHandle,
    options: CombineOptions,
    sums: Sums,
) -> None:
    """Sum, send, receive and add, by one kernel."""
    params = CombineDecodeParams(_send_params(launcher, y, None, handle, options), _recv_params(launcher, handle, sums))
    _launch_sender("combine_decode", launcher, stream, params, options.wire, y.shape[-1])


def _launch_sender(
    name: str,
    launcher: Launcher,
    stream: int,
    params: CombineSendParams | CombineDecodeParams,
    wire: WireFormat,
    hidden: int,
) -> None:
    num_topk, decodes = launcher.num_topk, name == "combine_decode"
    sharing = _send_teams(encoding(wire, "bf16"), hidden, num_topk, decodes=decodes)
    tuning = launcher.tuning("combine", wire)
    kernel = launcher.kernels.get(combine_spec, name, encoding(wire, "bf16"), hidden, num_topk, tuning)
    grid, shared_bytes, follows = launcher.send_blocks("combine", wire), sharing.shared_bytes, not decodes
    kernel.launch(grid, sharing.threads, shared_bytes, stream, params, early=follows, alone=follows)


def _send_params(
    launcher: Launcher,
    y: torch.Tensor,
    row_values: torch.Tensor | None,
    handle: DispatchHandle,
    options: CombineOptions,
) -> CombineSendParams:
    return CombineSendParams(
        launcher.comm,
        handle.recv_offsets.data_ptr(),
        handle.record_rows.data_ptr(),
        pointer(handle.record_topk_weights if options.weighted and handle.has_weights else None),
        handle.record_src_token.data_ptr(),
        pointer(row_values),
        y.data_ptr(),
        Quantizer.of(options.wire, options.seed, 0),
        handle.record_rows.shape[1],
        1 if row_values is None or row_values.dim() == 1 else row_values.shape[1],
    )


def _recv_params(launcher: Launcher, handle: DispatchHandle, sums: Sums) -> CombineRecvParams:
    return CombineRecvParams(
        launcher.comm, handle.send_slot.data_ptr(), sums.out.data_ptr(), pointer(sums.values), handle.num_tokens
    )
