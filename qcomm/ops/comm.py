"""The structures and numbers that host and kernels share; their other half is kernels/layout.cuh and wait.cuh."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch

from qcomm.formats import RECV_LAYOUTS, WIRE_KINDS, Rounding, WireFormat
from qcomm.jit import RESERVED_SHARED_BYTES, SM_SHARED_BYTES, KernelLoader, KernelSpec
from qcomm.records import MetadataLayout, RecordLayout, ValuesLayout
from qcomm.tuning import Op, Tuning, Tunings

MAX_RANKS = 16
MAX_TOPK = 32
MAX_BLOCK_SHARED_BYTES = SM_SHARED_BYTES - RESERVED_SHARED_BYTES
MAX_HIDDEN = 40960
"""A stage of the largest record and one of the largest row fit the shared memory of an SM together."""
_WARP_ELEMENTS = 512
_MAX_TEAMS = 15
"""Named barriers of a block, less the one of the whole block."""
ONE_NODE = {"nodes": 0, "ranks_per_node": 0, "forwards": 0, "nvshmem": 0, "debug": 0}
"""Constants of a kernel whose ranks all reach each other by NVLink; see kernels/layout.cuh and nodes.cuh."""
PHASES = ("barrier", "route", "dispatch", "combine")
TIMEOUT, OVERFLOW, BAD_ROUTE = 1, 2, 3


class Report(ctypes.Structure):
    """See `Report` in kernels/layout.cuh."""

    _fields_ = (
        ("code", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("peer", ctypes.c_int32),
        ("phase", ctypes.c_int32),
        ("expected", ctypes.c_int32),
        ("seen", ctypes.c_int32),
    )


class HostReports(ctypes.Structure):
    """See `HostReports` in kernels/layout.cuh."""

    _fields_ = (("timeout", Report), ("notice", Report))


class Nodes(ctypes.Structure):
    """See `Nodes` in kernels/layout.cuh."""

    _fields_ = (
        ("dispatch_outbox", ctypes.c_uint64),
        ("combine_outbox", ctypes.c_uint64),
        ("inbox_flags", ctypes.c_uint64),
        ("inbox", ctypes.c_uint64),
    )


class State(ctypes.Structure):
    """See `State` in kernels/layout.cuh."""

    _fields_ = (
        ("epoch", ctypes.c_uint32),
        ("timed_out", ctypes.c_uint32),
        ("bad_token", ctypes.c_int32),
        ("num_claimed", ctypes.c_uint32),
        ("counted", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("done", ctypes.c_uint64),
        ("waited_ns", ctypes.c_uint64 * MAX_RANKS),
        ("nodes", Nodes),
    )


class Comm(ctypes.Structure):
    """See `Comm` in kernels/layout.cuh."""

    _fields_ = (
        ("peer", ctypes.c_uint64 * MAX_RANKS),
        ("state", ctypes.c_uint64),
        ("reports", ctypes.c_uint64),
        ("chunk_flags", ctypes.c_uint64),
        ("chunk_counts", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("barrier_flags", ctypes.c_uint64),
        ("counts", ctypes.c_uint64),
        ("dispatch_flags", ctypes.c_uint64),
        ("combine_flags", ctypes.c_uint64),
        ("dispatch_records", ctypes.c_uint64),
        ("combine_records", ctypes.c_uint64),
        ("rank", ctypes.c_int32),
        ("num_ranks", ctypes.c_int32),
        ("max_tokens", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("num_local_experts", ctypes.c_int32),
        ("padding", ctypes.c_int32),
    )


class Quantizer(ctypes.Structure):
    """See `Quantizer` in kernels/mxfp4.cuh."""

    _fields_ = (
        ("scale_addend", ctypes.c_uint32),
        ("seed_low", ctypes.c_uint32),
        ("seed_high", ctypes.c_uint32),
        ("subsequence", ctypes.c_uint32),
    )

    @classmethod
    def of(cls, wire: WireFormat, seed: int, subsequence: int) -> Quantizer:
        """Build the quantizer of a wire format."""
        return cls(wire.scale_rule.addend, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, subsequence)


class BarrierParams(ctypes.Structure):
    """See `BarrierParams` in kernels/barrier.cu."""

    _fields_ = (("comm", Comm), ("overflows", ctypes.c_uint64))


_FORWARD_SHARE: Mapping[Op, int] = {"dispatch": 8, "combine": 4}
"""Of so many blocks that send, one forwards instead what other nodes' ranks sent; measured on two nodes of two."""


class Launcher(NamedTuple):
    """What every launcher needs: `num_sms` the device has, `forward_nodes` that tokens are forwarded in, or 0."""

    kernels: KernelLoader
    comm: Comm
    num_topk: int
    num_sms: int
    tunings: Tunings
    forward_nodes: int = 0

    def tuning(self, op: Op, wire: WireFormat) -> Tuning:
        """Return how the kernels of an operation are set."""
        return self.tunings[op, wire.kind]

    def blocks(self, op: Op, wire: WireFormat) -> int:
        """Return the blocks of a kernel, one an SM."""
        return min(self.tuning(op, wire).num_sms or self.num_sms, self.num_sms)

    def forward_blocks(self, op: Op, wire: WireFormat) -> int:
        """Return the blocks of a kernel that forwards; with those that send, one an SM."""
        return max(1, self.blocks(op, wire) // _FORWARD_SHARE[op])

    def send_blocks(self, op: Op, wire: WireFormat) -> int:
        """Return the blocks of a kernel that sends."""
        blocks = self.blocks(op, wire)
        return max(1, blocks - self.forward_blocks(op, wire)) if self.forward_nodes else blocks


def spec(file: str, name: str, **constants: int) -> KernelSpec:
    """Build the spec of a kernel with the constants that every file sees."""
    common = {
        "max_ranks": MAX_RANKS,
        "sizeof_comm": ctypes.sizeof(Comm),
        "timeout": TIMEOUT,
        "overflow": OVERFLOW,
        "bad_route": BAD_ROUTE,
        **ONE_NODE,
    }
    common |= {kind: number for number, kind in enumerate(WIRE_KINDS)}
    common |= {layout: number for number, layout in enumerate(RECV_LAYOUTS)}
    common |= {f"phase_{phase}": number for number, phase in enumerate(PHASES)}
    return KernelSpec.of(file, name, **common, **constants)


def wire_constants(
    wire: WireFormat, hidden: int, behind: MetadataLayout | ValuesLayout | None = None
) -> dict[str, int]:
    """Return the constants of kernels that read or write records, and what may follow a record."""
    layout = RecordLayout(wire.kind, hidden)
    return {
        "hidden": hidden,
        "wire": WIRE_KINDS.index(wire.kind),
        "hadamard": wire.hadamard,
        "stochastic": wire.rounding is Rounding.STOCHASTIC,
        "record_bytes": layout.num_bytes,
        "metadata_bytes": behind.num_bytes if behind else 0,
        "slot_bytes": layout.slot_bytes(behind),
        "scale_offset": layout.data_bytes,
    }


def pointer(x: torch.Tensor | None) -> int:
    """Return a tensor's address, 0 for None."""
    return 0 if x is None else x.data_ptr()


def barrier_spec() -> KernelSpec:
    """Build the spec of the barrier kernel."""
    return spec("barrier", "barrier")


def launch_barrier(launcher: Launcher, stream: int, overflows: torch.Tensor | None) -> None:
    """Start a call that needs no routing; zeroes the overflow counters of the receive that follows."""
    params = BarrierParams(launcher.comm, pointer(overflows))
    launcher.kernels.get(barrier_spec).launch(1, 32, 0, stream, params)


class Budget(NamedTuple):
    """What a kernel may take of an SM: warps, those of one team, registers a thread, shared memory, and stages.

    The budgets of a send and a receive kernel together fit one SM, so that neither can keep the other out. An SM has
    65,536 registers in four parts, over which a block's warps are spread, so 14 warps take as many as 16.
    """

    warps: int
    team_warps: int
    registers: int
    shared_bytes: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Teams:
    """How the warps of a block share its work: `count` teams of `warps`, and what they stage in shared memory.

    A warp holds 512 elements of a record at a time.

    Attributes:
        stages: records staged, of one ring.
        chunks: pieces of rows that a warp loads ahead, of the block.
        senders: warps that send records.
        helpers: warps besides the teams', which load, send or tell of records.
        rings: of stages.
    """

    warps: int
    count: int
    stages: int
    stage_bytes: int
    chunks: int
    senders: int
    helpers: int
    rings: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * (self.warps * self.count + self.helpers)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the BF16 elements that a team holds at a time."""
        return 2 * _WARP_ELEMENTS * self.warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.rings * self.stages * self.stage_bytes + self.chunks * self.chunk_bytes

    def constants(self, budget: Budget) -> dict[str, int]:
        """Return the constants that the kernel sees."""
        return {
            "teams": self.count,
            "team_warps": self.warps,
            "stages": self.stages,
            "max_registers": budget.registers,
        }


def recv_teams(hidden: int, stage_bytes: int, budget: Budget) -> Teams:
    """Divide a receiving block's warps into teams with a warp more each, as many as there is room for.

    Each team has stages of its own.
    """
    warps = _team_warps(hidden, budget)
    most = min(_MAX_TEAMS, budget.warps // (warps + 1))
    count = max(1, min(most, budget.shared_bytes // (min(2, budget.stages) * stage_bytes)))
    stages = max(1, min(budget.stages, budget.shared_bytes // (count * stage_bytes)))
    return Teams(warps, count, stages, stage_bytes, chunks=0, senders=0, helpers=count, rings=count)


def send_teams(hidden: int, stage_bytes: int, budget: Budget, senders: int, max_chunks: int = 0) -> Teams:
    """Divide a sending block's warps into teams that share the stages; `senders` send, one loads chunks, if any.

    Where there are chunks, stages take at most a third of the shared memory. Barriers of stages tell a use from the
    next, not from the next but one. So each stage has one sender; and where teams wait for stages themselves, as no
    warp loads for them, there are so few that none is that far ahead of a sender.
    """
    warps = _team_warps(hidden, budget)
    loads = min(1, max_chunks)
    stages = max(1, min(budget.stages, budget.shared_bytes // (1 + 2 * loads) // stage_bytes))
    senders = min(senders, stages)
    stages -= stages % senders
    count = max(1, min(stages // (1 if loads else senders), budget.warps // warps))
    shape = Teams(warps, count, stages, stage_bytes, chunks=0, senders=senders, helpers=senders + loads, rings=1)
    # One stage there is, however long, and then no room is left.
    chunks = min(max_chunks, max(0, budget.shared_bytes - shape.shared_bytes) // shape.chunk_bytes)
    return dataclasses.replace(shape, chunks=chunks)


def _team_warps(hidden: int, budget: Budget) -> int:
    """Return the warps of a team: as few as the steps that a record takes leave none idle."""
    steps = -(-hidden // _WARP_ELEMENTS)
    return -(-steps // -(-steps // budget.team_warps))


def encoding(wire: WireFormat, input_kind: str) -> WireFormat:
    """Drop the options that do not change the sending kernel; the scale rule is a parameter."""
    if input_kind == "mxfp4" or wire.kind != "mxfp4":
        return WireFormat(wire.kind)
    return WireFormat("mxfp4", rounding=wire.rounding, hadamard=wire.hadamard)


def decoding(wire: WireFormat) -> WireFormat:
    """Drop the options that do not change the receiving kernel."""
    return WireFormat(wire.kind, rounding=Rounding.NEAREST, hadamard=wire.hadamard)
