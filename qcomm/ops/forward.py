"""Launch the hop between nodes: a rank forwards another node's records within its own, and its node's sums back."""

from __future__ import annotations

import ctypes
import functools

from qcomm.formats import WireFormat
from qcomm.handle import Addresses, DispatchHandle
from qcomm.jit import KernelSpec
from qcomm.ops.comm import Budget, Comm, Launcher, Quantizer, Teams, encoding, send_teams, spec, wire_constants
from qcomm.options import CombineOptions
from qcomm.records import MetadataLayout, RecordLayout, ValuesLayout

_BUDGET = Budget(warps=8, team_warps=1, registers=64, shared_bytes=92 * 1024, stages=16)
_SENDERS = 4
_FLAGS = {"in_flight": 4, "flags_together": 2}
"""The few blocks that forward send nearly as much as the others, so each has more under way."""
_SUM_THREADS = 512
_SUM_REGISTERS = 64
_ROTATED_SUM_THREADS = 256
_ROTATED_SUM_REGISTERS = 128


class DispatchForwardParams(ctypes.Structure):
    """See `DispatchForwardParams` in kernels/dispatch_forward.cu."""

    _fields_ = (
        ("comm", Comm),
        ("counts", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("replays", ctypes.c_int32),
    )


class CombineForwardParams(ctypes.Structure):
    """See `CombineForwardParams` in kernels/combine_forward.cu."""

    _fields_ = (
        ("comm", Comm),
        ("counts", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("quantizer", Quantizer),
        ("has_values", ctypes.c_int32),
    )


def dispatch_forward_spec(wire: WireFormat, hidden: int, num_topk: int) -> KernelSpec:
    """Build the spec of `dispatch_forward`; of the wire only its kind matters."""
    sharing = _teams(wire, hidden, num_topk)
    return spec(
        "dispatch_forward",
        "dispatch_forward",
        num_topk=num_topk,
        sizeof_dispatch_forward=ctypes.sizeof(DispatchForwardParams),
        senders=sharing.senders,
        **_FLAGS,
        **sharing.constants(_BUDGET),
        **wire_constants(wire, hidden, MetadataLayout(num_topk)),
    )


def combine_forward_spec(wire: WireFormat, hidden: int, num_topk: int) -> KernelSpec:
    """Build the spec of `combine_forward`."""
    return spec(
        "combine_forward",
        "combine_forward",
        num_topk=num_topk,
        sizeof_combine_forward=ctypes.sizeof(CombineForwardParams),
        max_registers=_ROTATED_SUM_REGISTERS if wire.hadamard else _SUM_REGISTERS,
        **wire_constants(wire, hidden, ValuesLayout(num_topk)),
    )


def launch_dispatch_forward(
    launcher: Launcher, stream: int, parts: Addresses, wire: WireFormat, hidden: int, *, replays: bool
) -> None:
    """Forward the records of other nodes' ranks.

    Fills `counts` and `slots`; a replay goes by them.
    """
    plain, num_topk = WireFormat(wire.kind), launcher.num_topk
    sharing = _teams(plain, hidden, num_topk)
    params = DispatchForwardParams(launcher.comm, parts["counts"], parts["slots"], replays)
    kernel = launcher.kernels.get(dispatch_forward_spec, plain, hidden, num_topk)
    grid = launcher.forward_blocks("dispatch", wire)
    kernel.launch(grid, sharing.threads, sharing.shared_bytes, stream, params)


def launch_combine_forward(
    launcher: Launcher, stream: int, handle: DispatchHandle, options: CombineOptions, hidden: int, *, has_values: bool
) -> None:
    """Add up this node's sums for other nodes' tokens and put them back, as they arrive."""
    assert handle.forward is not None
    wire = options.wire
    params = CombineForwardParams(
        launcher.comm,
        handle.forward.counts.data_ptr(),
        handle.forward.slots.data_ptr(),
        Quantizer.of(wire, options.seed, 0),
        has_values,
    )
    kernel = launcher.kernels.get(combine_forward_spec, encoding(wire, "bf16"), hidden, launcher.num_topk)
    threads = _ROTATED_SUM_THREADS if wire.hadamard else _SUM_THREADS
    kernel.launch(launcher.forward_blocks("combine", wire), threads, 0, stream, params)


@functools.cache
def _teams(wire: WireFormat, hidden: int, num_topk: int) -> Teams:
    """Return the teams of a block of `dispatch_forward`: a warp loads a record, whatever its length."""
    stage_bytes = RecordLayout(wire.kind, hidden).slot_bytes(MetadataLayout(num_topk))
    return send_teams(hidden, stage_bytes, _BUDGET, _SENDERS)
