"""Launch dispatch: encode and send tokens, receive and convert them."""

from __future__ import annotations

import ctypes
import dataclasses

import torch

from qcomm.exchange import DispatchOptions, Payload, WireInput
from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE, WIRE_KINDS, ScaleLayout, WireFormat
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
from qcomm.records import RECORD_ALIGNMENT, align
from qcomm.tensors import FP8Tensor, MXFP4Tensor, empty_scales

_COLUMNWISE_THREADS = 256
_TILES = 3
_TILE_ROWS, _TILE_LANE_ROWS = 128, 16
_TILE_REGISTERS = 48
_SEND = Budget(warps=14, team_warps=14, registers=56, shared_bytes=92 * 1024, stages=12)
_RECV = Budget(warps=24, team_warps=7, registers=48, shared_bytes=118 * 1024, stages=8)
_RECV_FLOATS = Budget(warps=14, team_warps=7, registers=72, shared_bytes=118 * 1024, stages=8)
"""Where elements must become floats."""


def _tile_shared_bytes() -> int:
    """Return the shared memory of a tile: its bytes and scales, where its scales lie in the table, its records."""
    scales = 4 * _COLUMNWISE_THREADS // 64 * (_TILE_ROWS + _TILE_ROWS // _TILE_LANE_ROWS)
    places = _TILE_LANE_ROWS * _COLUMNWISE_THREADS
    return align(_TILE_ROWS * _COLUMNWISE_THREADS + scales, 128) + align(places + 4 * _TILE_ROWS, 128)


TILE_SHARED_BYTES = _tile_shared_bytes()


class DispatchSendParams(ctypes.Structure):
    """See `DispatchSendParams` in kernels/dispatch_send.cu."""

    _fields_ = (
        ("comm", Comm),
        ("x", ctypes.c_uint64),
        ("sf", ctypes.c_uint64),
        ("send_slot", ctypes.c_uint64),
        ("sf_row_stride", ctypes.c_int64),
        ("sf_group_stride", ctypes.c_int64),
        ("quantizer", Quantizer),
        ("num_tokens", ctypes.c_int32),
        ("after_route", ctypes.c_int32),
    )


class DispatchRecvParams(ctypes.Structure):
    """See `DispatchRecvParams` in kernels/dispatch_recv.cuh."""

    _fields_ = (
        ("comm", Comm),
        ("recv_offsets", ctypes.c_uint64),
        ("record_rows", ctypes.c_uint64),
        ("row_record", ctypes.c_uint64),
        ("group_offsets", ctypes.c_uint64),
        ("x", ctypes.c_uint64),
        ("sf", ctypes.c_uint64),
        ("overflows", ctypes.c_uint64),
        ("x_columnwise", ctypes.c_uint64),
        ("sf_columnwise", ctypes.c_uint64),
        ("sf_expert_stride", ctypes.c_int64),
        ("sf_row_stride", ctypes.c_int64),
        ("sf_group_stride", ctypes.c_int64),
        ("quantizer", Quantizer),
        ("width", ctypes.c_int32),
        ("rows_per_expert", ctypes.c_int32),
        ("padded_rows", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("sf_together", ctypes.c_int32),
        ("padding", ctypes.c_int32),
    )


def send_spec(input_kind: str, wire: WireFormat, hidden: int) -> KernelSpec:
    """Build the spec of `dispatch_send` for an input of kind bf16, fp8 or mxfp4."""
    return spec(
        "dispatch_send",
        "dispatch_send",
        input=[*WIRE_KINDS].index(input_kind),  # type: ignore[arg-type]
        sizeof_dispatch_send=ctypes.sizeof(DispatchSendParams),
        **send_teams(wire, hidden).constants(_SEND),
        **wire_constants(wire, hidden),
    )


def recv_spec(recv_dtype: str, columnwise: bool, wire: WireFormat, hidden: int) -> KernelSpec:
    """Build the spec of the receive kernel."""
    name, sharing = "dispatch_recv", recv_teams(recv_dtype, wire, hidden).constants(_recv_budget(recv_dtype, wire))
    if columnwise:
        name, sharing = "dispatch_recv_columnwise", {}
        if _by_tiles(wire):
            name = "dispatch_recv_columnwise_mxfp4"
            sharing = {
                "threads": _COLUMNWISE_THREADS,
                "tiles": _TILES,
                "tile_shared_bytes": TILE_SHARED_BYTES,
                "max_registers": _TILE_REGISTERS,
            }
    return spec(
        name,
        name,
        recv=[*WIRE_KINDS].index(recv_dtype),  # type: ignore[arg-type]
        sizeof_dispatch_recv=ctypes.sizeof(DispatchRecvParams),
        **sharing,
        **wire_constants(wire, hidden),
    )


def _by_tiles(wire: WireFormat) -> bool:
    """Whether columns can be aligned without becoming floats, which is done by tiles of 128 rows and 512 columns."""
    return wire.kind == "mxfp4" and not wire.hadamard


def send_teams(wire: WireFormat, hidden: int) -> Teams:
    """Return the teams of a block of `dispatch_send`."""
    return teams(hidden, send_stage_bytes(wire, hidden), _SEND)


def recv_teams(recv_dtype: str, wire: WireFormat, hidden: int) -> Teams:
    """Return the teams of a block of `dispatch_recv`."""
    return teams(hidden, recv_stage_bytes(recv_dtype, hidden), _recv_budget(recv_dtype, wire))


def _recv_budget(recv_dtype: str, wire: WireFormat) -> Budget:
    aligns = wire.kind == "mxfp4" and recv_dtype == "fp8" and not wire.hadamard
    return _RECV if aligns or wire.kind == recv_dtype else _RECV_FLOATS


def recv_stage_bytes(recv_dtype: str, hidden: int) -> int:
    """Return the shared memory that holds one converted row and its scales."""
    row_bytes = {"bf16": 2 * hidden, "fp8": hidden, "mxfp4": hidden // 2}[recv_dtype]
    scale_bytes = 0 if recv_dtype == "bf16" else 4 * hidden // FP8_GROUP_SIZE
    return align(row_bytes + scale_bytes, RECORD_ALIGNMENT)


def launch_send(
    launcher: Launcher,
    stream: int,
    x: WireInput,
    send_slot: torch.Tensor,
    wire: WireFormat,
    seed: int,
    after_route: bool,
) -> None:
    """Encode every token and copy its record to its ranks."""
    num_tokens, hidden = x.shape
    if not num_tokens:
        return
    data, sf, kind = x, None, "bf16"
    if isinstance(x, FP8Tensor):
        data, sf, kind = x.data, x.sf, "fp8"
    elif isinstance(x, MXFP4Tensor):
        data, sf, kind = x.qdata, x.sf, "mxfp4"
    assert isinstance(data, torch.Tensor)
    strides = (sf.stride(0), sf.stride(1)) if sf is not None else (0, 0)
    params = DispatchSendParams(
        launcher.comm,
        data.data_ptr(),
        pointer(sf),
        send_slot.data_ptr(),
        *strides,
        Quantizer.of(wire, seed, launcher.comm.rank),
        num_tokens,
        int(after_route),
    )
    sharing = send_teams(wire, hidden)
    kernel = launcher.kernels.get(send_spec, kind, encoding(wire, kind), hidden)
    kernel.launch(launcher.num_sms, sharing.threads, sharing.shared_bytes, stream, params)


class Receive:
    """A receive made ready: launching it takes little more than allocating the result.

    Args:
        launcher: kernels and symmetric memory.
        handle: where records go; may be longer than the result.
        options: the call's options.
        hidden: elements in a token.
        overflows: `[2]` int64, which the call zeroes on the stream first.
    """

    def __init__(
        self,
        launcher: Launcher,
        handle: DispatchHandle,
        options: DispatchOptions,
        hidden: int,
        overflows: torch.Tensor,
    ) -> None:
        self._handle, self._options, self._hidden, self._overflows = handle, options, hidden, overflows
        self._params = DispatchRecvParams(
            comm=launcher.comm,
            recv_offsets=handle.recv_offsets.data_ptr(),
            record_rows=handle.record_rows.data_ptr(),
            row_record=handle.row_record.data_ptr(),
            group_offsets=pointer(handle.group_offsets),
            overflows=overflows.data_ptr(),
            quantizer=Quantizer.of(WireFormat("mxfp4"), 0, 0),
            width=handle.record_rows.shape[1],
        )
        wire = decoding(options.wire)
        self._kernel = launcher.kernels.get(recv_spec, options.recv_dtype, options.columnwise, wire, hidden)
        self._grid, self._threads, self._shared_bytes = launcher.num_sms, _COLUMNWISE_THREADS, 0
        if options.columnwise and _by_tiles(wire):
            self._threads, self._shared_bytes = _TILES * _COLUMNWISE_THREADS, _TILES * TILE_SHARED_BYTES
        elif not options.columnwise:
            sharing = recv_teams(options.recv_dtype, wire, hidden)
            self._threads, self._shared_bytes = sharing.threads, sharing.shared_bytes

    @property
    def can_guess(self) -> bool:
        """Whether a longer result can be cut to the right length: not if its storage depends on the length."""
        options = self._options
        plain = options.sf_layout is ScaleLayout.ROW_MAJOR and not options.columnwise
        return plain and options.recv_layout != "batched"

    def launch_again(self, stream: int, num_rows: int) -> Payload:
        """Launch once more, for a result that turned out longer than what was launched."""
        self._overflows.zero_()
        return self.launch(stream, num_rows, 0)

    def launch(self, stream: int, num_rows: int, rows_per_expert: int) -> Payload:
        """Allocate the received rows, and fill them as records arrive.

        Args:
            stream: to launch on.
            num_rows: rows of the result.
            rows_per_expert: rows of one expert in the "batched" layout, else 0.
        """
        params, hidden, device = self._params, self._hidden, self._overflows.device
        sf: torch.Tensor | None = None
        x_columnwise = sf_columnwise = None
        if self._options.recv_dtype == "bf16":
            x = torch.empty(num_rows, hidden, dtype=torch.bfloat16, device=device)
        elif self._options.recv_dtype == "mxfp4":
            x = torch.empty(num_rows, hidden // 2, dtype=torch.uint8, device=device)
            sf = torch.empty(num_rows, hidden // BLOCK_SIZE, dtype=torch.uint8, device=device)
        else:
            x = torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=device)
            sf = empty_scales(num_rows, hidden // FP8_GROUP_SIZE, self._options.sf_layout, device)
            params.sf_row_stride, params.sf_group_stride = sf.stride()
            params.sf_expert_stride = rows_per_expert * params.sf_row_stride
        if self._options.columnwise:
            x_columnwise = torch.empty(num_rows * hidden, dtype=torch.float8_e4m3fn, device=device)
            sf_columnwise = torch.empty(num_rows // FP8_GROUP_SIZE, hidden, dtype=torch.float32, device=device)
            params.x_columnwise, params.sf_columnwise = x_columnwise.data_ptr(), sf_columnwise.data_ptr()
        params.x, params.sf = x.data_ptr(), pointer(sf)
        params.sf_together = int(sf is not None and sf.is_contiguous() and params.sf_group_stride <= 1)
        params.rows_per_expert = rows_per_expert
        params.padded_rows = padded_rows(self._handle, num_rows)
        params.num_rows = num_rows
        self._kernel.launch(self._grid, self._threads, self._shared_bytes, stream, params)
        return Payload(x, sf, x_columnwise, sf_columnwise, self._overflows)


def cut(payload: Payload, num_rows: int) -> Payload:
    """Cut a result of `Receive.can_guess` to its first rows."""
    sf = None if payload.sf is None else payload.sf[:num_rows]
    return dataclasses.replace(payload, x=payload.x[:num_rows], sf=sf)


def padded_rows(handle: DispatchHandle, num_rows: int) -> int:
    """Return the rows whose padding the receive kernel zeroes: -1 for those below the last group's end."""
    if handle.recv_layout == "expert_major":
        return -1
    return num_rows if handle.recv_layout == "batched" and not handle.static else 0
