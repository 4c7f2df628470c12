"""Launch dispatch: encode and send tokens, receive and convert them."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

from qcomm.exchange import Payload, WireInput
from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE, WIRE_KINDS, RecvLayout, ScaleLayout, WireFormat, WireKind
from qcomm.handle import Addresses
from qcomm.jit import Kernel, KernelSpec
from qcomm.ops.comm import (
    Budget,
    Comm,
    Launcher,
    Quantizer,
    Teams,
    decoding,
    encoding,
    pointer,
    recv_teams,
    send_teams,
    spec,
    wire_constants,
)
from qcomm.ops.count import Placement
from qcomm.options import DispatchOptions
from qcomm.records import MetadataLayout, RecordLayout, align
from qcomm.tensors import FP8Tensor, MXFP4Tensor, empty_scales
from qcomm.tuning import Tuning

_COLUMNWISE_THREADS = 256
_TILES = 3
_TILE_ROWS, _TILE_LANE_ROWS = 128, 16
_TILE_REGISTERS = 72
_SENDERS = 2
_LONG_SLOT = 8 * 1024
"""Slots of such records keep the links busy by one sender; two hold up what else an SM writes."""
_SEND = Budget(warps=14, team_warps=14, registers=56, shared_bytes=92 * 1024, stages=12)
_RECV = Budget(warps=24, team_warps=7, registers=48, shared_bytes=110 * 1024, stages=8)
"""Beside a sender, which takes more than half of an SM's shared memory, and what the kernel declares itself."""
_RECV_FLOATS = _RECV._replace(warps=16, registers=72)
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
        ("topk_idx", ctypes.c_uint64),
        ("ordinals", ctypes.c_uint64),
        ("topk_weights", ctypes.c_uint64),
        ("sf_row_stride", ctypes.c_int64),
        ("sf_group_stride", ctypes.c_int64),
        ("quantizer", Quantizer),
        ("num_tokens", ctypes.c_int32),
        ("index_words", ctypes.c_int32),
    )


class DispatchRecvParams(ctypes.Structure):
    """See `DispatchRecvParams` in kernels/dispatch_recv.cuh."""

    _fields_ = (
        ("comm", Comm),
        ("placement", Placement),
        ("x", ctypes.c_uint64),
        ("sf", ctypes.c_uint64),
        ("x_columnwise", ctypes.c_uint64),
        ("sf_columnwise", ctypes.c_uint64),
        ("sf_expert_stride", ctypes.c_int64),
        ("sf_row_stride", ctypes.c_int64),
        ("sf_group_stride", ctypes.c_int64),
        ("quantizer", Quantizer),
        ("rows_per_expert", ctypes.c_int32),
        ("pads", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("sf_together", ctypes.c_int32),
    )


def send_spec(input_kind: str, wire: WireFormat, hidden: int, num_topk: int, tuning: Tuning) -> KernelSpec:
    """Build the spec of `dispatch_send` for an input of kind bf16, fp8 or mxfp4."""
    sharing = _send_teams(wire, hidden, num_topk)
    return spec(
        "dispatch_send",
        "dispatch_send",
        input=[*WIRE_KINDS].index(input_kind),  # type: ignore[arg-type]
        num_topk=num_topk,
        sizeof_dispatch_send=ctypes.sizeof(DispatchSendParams),
        senders=sharing.senders,
        **tuning.constants,
        **sharing.constants(_SEND),
        **wire_constants(wire, hidden, MetadataLayout(num_topk)),
    )


def recv_spec(recv_dtype: WireKind, wire: WireFormat, hidden: int, num_topk: int, places: bool = False) -> KernelSpec:
    """Build the spec of the receive kernel; one that `places` also gives the records their rows."""
    teams = _recv_teams(recv_dtype, wire, hidden)
    return _recv_spec(
        "dispatch_recv",
        recv_dtype,
        wire,
        hidden,
        num_topk,
        places=int(places),
        row_stage_bytes=recv_stage_bytes(recv_dtype, hidden),
        **teams.constants(_recv_budget(recv_dtype, wire)),
    )


def columnwise_spec(wire: WireFormat, hidden: int, num_topk: int) -> KernelSpec:
    """Build the spec of the kernel that writes the column-wise operand of what was received."""
    if not _by_tiles(wire):
        return _recv_spec("dispatch_recv_columnwise", "fp8", wire, hidden, num_topk)
    return _recv_spec(
        "dispatch_recv_columnwise_mxfp4",
        "fp8",
        wire,
        hidden,
        num_topk,
        threads=_COLUMNWISE_THREADS,
        tiles=_TILES,
        tile_shared_bytes=TILE_SHARED_BYTES,
        max_registers=_TILE_REGISTERS,
    )


def _recv_spec(
    name: str, recv_dtype: WireKind, wire: WireFormat, hidden: int, num_topk: int, **constants: int
) -> KernelSpec:
    return spec(
        name,
        name,
        recv=[*WIRE_KINDS].index(recv_dtype),
        num_topk=num_topk,
        sizeof_dispatch_recv=ctypes.sizeof(DispatchRecvParams),
        **constants,
        **wire_constants(wire, hidden, MetadataLayout(num_topk)),
    )


def _by_tiles(wire: WireFormat) -> bool:
    """Whether columns can be aligned without becoming floats, which is done by tiles of 128 rows and 512 columns."""
    return wire.kind == "mxfp4" and not wire.hadamard


@functools.cache
def _send_teams(wire: WireFormat, hidden: int, num_topk: int) -> Teams:
    """Return the teams of a block of `dispatch_send`."""
    slot_bytes = RecordLayout(wire.kind, hidden).slot_bytes(MetadataLayout(num_topk))
    return send_teams(hidden, slot_bytes, _SEND, 1 if slot_bytes > _LONG_SLOT else _SENDERS)


@functools.cache
def _recv_teams(recv_dtype: WireKind, wire: WireFormat, hidden: int) -> Teams:
    """Return the teams of a block of `dispatch_recv`."""
    return recv_teams(hidden, recv_stage_bytes(recv_dtype, hidden), _recv_budget(recv_dtype, wire))


def stays_in_bits(recv_dtype: WireKind, wire: WireFormat) -> bool:
    """Tell whether a receiver needs no floats, which take registers."""
    aligns = wire.kind == "mxfp4" and recv_dtype == "fp8" and not wire.hadamard
    return aligns or wire.kind == recv_dtype


def _recv_budget(recv_dtype: WireKind, wire: WireFormat) -> Budget:
    return _RECV if stays_in_bits(recv_dtype, wire) else _RECV_FLOATS


def recv_stage_bytes(recv_dtype: WireKind, hidden: int) -> int:
    """Return the shared memory that holds one converted row and its scales: what a record of its kind takes."""
    return RecordLayout(recv_dtype, hidden).slot_bytes()


class Routing(NamedTuple):
    """What the sender of a routed dispatch says of its tokens.

    Attributes:
        topk_idx, topk_weights: as given to dispatch.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None


def send_params(
    launcher: Launcher, x: WireInput, parts: Addresses, routing: Routing | None, wire: WireFormat, seed: int
) -> tuple[DispatchSendParams, str]:
    """Return what the sender is given, and the kind of its input."""
    data, sf, kind = x, None, "bf16"
    if isinstance(x, FP8Tensor):
        data, sf, kind = x.data, x.sf, "fp8"
    elif isinstance(x, MXFP4Tensor):
        data, sf, kind = x.qdata, x.sf, "mxfp4"
    assert isinstance(data, torch.Tensor)
    params = DispatchSendParams(
        comm=launcher.comm,
        x=data.data_ptr(),
        sf=pointer(sf),
        send_slot=parts["send_slot"],
        quantizer=Quantizer.of(wire, seed, launcher.comm.rank),
        num_tokens=x.shape[0],
    )
    if sf is not None:
        params.sf_row_stride, params.sf_group_stride = sf.stride()
    if routing is not None:
        params.topk_idx = routing.topk_idx.data_ptr()
        params.index_words = routing.topk_idx.element_size() // 4
        params.ordinals = parts["ordinals"]
        params.topk_weights = pointer(routing.topk_weights)
    return params, kind


def launch_send(
    launcher: Launcher,
    stream: int,
    x: WireInput,
    parts: Addresses,
    routing: Routing | None,
    wire: WireFormat,
    seed: int,
) -> None:
    """Encode every token and copy its record to its ranks, with its metadata unless this is a replay.

    `route`, or in a replay the barrier, is the last thing on the stream.
    """
    hidden = x.shape[1]
    params, kind = send_params(launcher, x, parts, routing, wire, seed)
    sharing = _send_teams(wire, hidden, launcher.num_topk)
    tuning = launcher.tuning("dispatch", wire)
    kernel = launcher.kernels.get(send_spec, kind, encoding(wire, kind), hidden, launcher.num_topk, tuning)
    blocks = launcher.send_blocks("dispatch", wire)
    takes_all = blocks == launcher.num_sms
    if routing is not None and takes_all:
        blocks = max(1, blocks - 1)  # one for count, whose steps take twice as long on an SM that sends
    # Beside route's blocks, a few would come to lie on other SMs than the receive's.
    early = routing is None or takes_all
    # Two blocks on one SM would keep a receiver's from it, which then has to receive its share when all else is done.
    kernel.launch(blocks, sharing.threads, sharing.shared_bytes, stream, params, early=early, alone=True)


class Receive:
    """A receive made ready: launching it takes little more than allocating the result.

    Args:
        launcher: kernels and symmetric memory.
        placement: where records go; may be longer than the result.
        options: the call's options.
        hidden: elements in a token.
        places: whether the receive also fills the handle.
        overflows: `[2]` int64, which the call zeroes on the stream first.
    """

    def __init__(
        self,
        launcher: Launcher,
        placement: Placement,
        options: DispatchOptions,
        hidden: int,
        overflows: torch.Tensor,
        *,
        places: bool,
    ) -> None:
        self._launcher, self._options = launcher, options
        self._hidden, self._overflows, self._places = hidden, overflows, places
        self._params = DispatchRecvParams(
            comm=launcher.comm,
            placement=placement,
            quantizer=Quantizer.of(WireFormat("mxfp4"), 0, 0),
        )

    @property
    def recv_layout(self) -> RecvLayout:
        """Layout of the result."""
        return self._options.recv_layout

    @property
    def can_guess(self) -> bool:
        """Whether a longer result can be cut to the right length: not if its storage depends on the length."""
        options = self._options
        plain = options.sf_layout is ScaleLayout.ROW_MAJOR and not options.columnwise
        return plain and options.recv_layout != "batched"

    def launch_again(self, stream: int, num_rows: int) -> Payload:
        """Launch once more, for a result that turned out longer than what was launched."""
        self._overflows.zero_()
        self._places = False
        return self.launch(stream, num_rows, 0)

    def launch(self, stream: int, num_rows: int, rows_per_expert: int, *, early: bool = False) -> Payload:
        """Allocate the received rows, and fill them as records arrive.

        Args:
            stream: to launch on.
            num_rows: rows of the result.
            rows_per_expert: rows of one expert in the "batched" layout, else 0.
            early: as in `fill`.
        """
        payload, _ = self.prepare(num_rows, rows_per_expert)
        self.fill(stream, early=early)
        return payload

    def load(self) -> tuple[Kernel, Kernel | None]:
        """Return the kernels that fill the result: that of rows, and that of columns if there are any."""
        options, num_topk, kernels = self._options, self._launcher.num_topk, self._launcher.kernels
        wire = decoding(options.wire)
        rows = kernels.get(recv_spec, options.recv_dtype, wire, self._hidden, num_topk, self._places)
        return rows, kernels.get(columnwise_spec, wire, self._hidden, num_topk) if options.columnwise else None

    def fill(self, stream: int, *, early: bool = False) -> None:
        """Fill what `prepare` allocated, as records arrive.

        Args:
            stream: to launch on.
            early: `count`, or in a replay the sender, is the last kernel of the stream, and lets the receive begin.
        """
        wire, blocks = decoding(self._options.wire), self._launcher.blocks("dispatch", self._options.wire)
        sharing = _recv_teams(self._options.recv_dtype, wire, self._hidden)
        rows, columns = self.load()
        rows.launch(blocks, sharing.threads, sharing.shared_bytes, stream, self._params, early=early)
        if columns is not None:
            tiles, shared_bytes = (_TILES, _TILES * TILE_SHARED_BYTES) if _by_tiles(wire) else (1, 0)
            columns.launch(blocks, tiles * _COLUMNWISE_THREADS, shared_bytes, stream, self._params)

    def prepare(self, num_rows: int, rows_per_expert: int) -> tuple[Payload, DispatchRecvParams]:
        """Allocate the received rows; return them, and what the kernel that fills them is given."""
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
        params.pads = int(pads(self._options))
        params.num_rows = num_rows
        return Payload(x, sf, x_columnwise, sf_columnwise, self._overflows), params


def cut(payload: Payload, num_rows: int) -> Payload:
    """Cut a result of `Receive.can_guess` to its first rows."""
    sf = None if payload.sf is None else payload.sf[:num_rows]
    return Payload(payload.x[:num_rows], sf, None, None, payload.spread_overflows)


def pads(options: DispatchOptions) -> bool:
    """Whether the receive kernel zeroes the padding rows of groups."""
    return options.recv_layout == "expert_major" or (options.recv_layout == "batched" and not options.static)
