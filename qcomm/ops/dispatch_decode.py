"""Launch dispatch of few tokens: one kernel routes, sends and receives them."""

from __future__ import annotations

import ctypes
import dataclasses
import functools

from qcomm.exchange import WireInput
from qcomm.formats import WIRE_KINDS, WireFormat, WireKind
from qcomm.handle import Addresses
from qcomm.jit import RESERVED_SHARED_BYTES, KernelSpec
from qcomm.ops import count
from qcomm.ops.comm import (
    MAX_BLOCK_SHARED_BYTES,
    Budget,
    Launcher,
    Teams,
    encoding,
    send_teams,
    spec,
    wire_constants,
)
from qcomm.ops.dispatch import (
    DispatchRecvParams,
    DispatchSendParams,
    Routing,
    recv_stage_bytes,
    send_params,
    stays_in_bits,
)
from qcomm.options import DispatchOptions
from qcomm.records import MetadataLayout, RecordLayout
from qcomm.tuning import Tuning

_SENDERS = 2
_COUNTERS = 4
"""Warps that count what comes; one for each team then tells it of its records, the others fill the handle."""
_BUDGET = Budget(warps=14, team_warps=7, registers=48, shared_bytes=88 * 1024, stages=6)
_STATIC_SHARED_BYTES = 10 * 1024
"""More than the kernel itself declares."""


class DispatchDecodeParams(ctypes.Structure):
    """See `DispatchDecodeParams` in kernels/dispatch_decode.cu."""

    _fields_ = (
        ("send", DispatchSendParams),
        ("recv", DispatchRecvParams),
        ("count_words", ctypes.c_int32),
        ("padding", ctypes.c_int32),
    )


def dispatch_decode_spec(
    input_kind: str,
    recv_dtype: WireKind,
    wire: WireFormat,
    hidden: int,
    num_topk: int,
    index_bytes: int,
    tuning: Tuning,
) -> KernelSpec:
    """Build the spec of `dispatch_decode`."""
    sharing = _teams(recv_dtype, wire, hidden, num_topk)
    return spec(
        "dispatch_decode",
        "dispatch_decode",
        input=[*WIRE_KINDS].index(input_kind),  # type: ignore[arg-type]
        recv=[*WIRE_KINDS].index(recv_dtype),
        places=1,
        num_topk=num_topk,
        index_bytes=index_bytes,
        row_stage_bytes=recv_stage_bytes(recv_dtype, hidden),
        sizeof_dispatch_send=ctypes.sizeof(DispatchSendParams),
        sizeof_dispatch_recv=ctypes.sizeof(DispatchRecvParams),
        sizeof_dispatch_decode=ctypes.sizeof(DispatchDecodeParams),
        **count.host_constants(),
        senders=sharing.senders,
        counters=_COUNTERS,
        **tuning.constants,
        **sharing.constants(_BUDGET),
        **wire_constants(wire, hidden, MetadataLayout(num_topk)),
    )


def suits(launcher: Launcher, options: DispatchOptions, num_tokens: int, hidden: int) -> bool:
    """Tell whether a dispatch can be done by one kernel, and is faster by it.

    Two of them must fit an SM: ranks may begin the calls of two buffers in different orders.
    """
    few = launcher.tuning("dispatch", options.wire).is_few(num_tokens)
    if not few or not options.static or options.columnwise or not stays_in_bits(options.recv_dtype, options.wire):
        return False
    sharing = _teams(options.recv_dtype, WireFormat(options.wire.kind), hidden, launcher.num_topk)
    taken = sharing.shared_bytes + table_bytes(launcher, num_tokens) + _STATIC_SHARED_BYTES + RESERVED_SHARED_BYTES
    return 2 * taken <= MAX_BLOCK_SHARED_BYTES


def launch_decode(
    launcher: Launcher,
    stream: int,
    x: WireInput,
    parts: Addresses,
    routing: Routing,
    recv: DispatchRecvParams,
    options: DispatchOptions,
) -> None:
    """Route, send and receive; `recv` is what `Receive.prepare` returned."""
    num_tokens, hidden = x.shape
    num_topk = launcher.num_topk
    send, kind = send_params(launcher, x, parts, routing, options.wire, options.seed)
    params = DispatchDecodeParams(send, recv, _count_words(launcher))
    wire = encoding(options.wire, kind)
    sharing = _teams(options.recv_dtype, wire, hidden, num_topk)
    kernel = launcher.kernels.get(
        dispatch_decode_spec,
        kind,
        options.recv_dtype,
        wire,
        hidden,
        num_topk,
        routing.topk_idx.element_size(),
        launcher.tuning("dispatch", options.wire),
    )
    shared_bytes = sharing.shared_bytes + table_bytes(launcher, num_tokens)
    kernel.launch(launcher.blocks("dispatch", options.wire), sharing.threads, shared_bytes, stream, params)


def table_bytes(launcher: Launcher, num_tokens: int) -> int:
    """Return the shared memory for tables of counts, and for bitmaps of routing."""
    bitmaps = (launcher.comm.num_experts + launcher.comm.num_ranks) * -(-num_tokens // 32)
    return 4 * (_count_words(launcher) + bitmaps)


def _count_words(launcher: Launcher) -> int:
    ranks, local = launcher.comm.num_ranks, launcher.comm.num_local_experts
    return count.table_bytes(launcher) // 4 + (ranks + 1) + local + ranks * local + local + 1


@functools.cache
def _teams(recv_dtype: WireKind, wire: WireFormat, hidden: int, num_topk: int) -> Teams:
    """Return the teams of a block, one for each sender where there is room; a stage holds a record and their rows."""
    slot_bytes = RecordLayout(wire.kind, hidden).slot_bytes(MetadataLayout(num_topk))
    row_bytes = recv_stage_bytes(recv_dtype, hidden)
    teams = _SENDERS if 2 * (slot_bytes + _SENDERS * row_bytes) <= _BUDGET.shared_bytes else 1
    shape = send_teams(hidden, slot_bytes + teams * row_bytes, _BUDGET, _SENDERS)
    return dataclasses.replace(shape, count=teams, helpers=shape.helpers + _COUNTERS)
