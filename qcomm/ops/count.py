"""Launch counting: what is about to come; and the structure by which records are given their rows."""

from __future__ import annotations

import ctypes

import torch

from qcomm.formats import RECV_LAYOUTS
from qcomm.handle import Addresses
from qcomm.jit import KernelSpec
from qcomm.ops.comm import Comm, Launcher, pointer, spec
from qcomm.options import DispatchOptions

HOST_SEQUENCE, HOST_READY, HOST_BAD_RANK, HOST_BAD_TOKEN, HOST_ROWS, HOST_ROWS_PER_EXPERT, HOST_FIXED = range(7)
"""Words of the host table that `count` fills: sequence number, whether every peer came in time, bad rank and token (-1
for none), rows of the result, rows per expert of the "batched" layout, then `recv_offsets` [num_ranks + 1] and tokens
per local expert [num_local_experts]."""

_THREADS = 256


class Placement(ctypes.Structure):
    """See `Placement` in kernels/place.cuh."""

    _fields_ = (
        ("recv_offsets", ctypes.c_uint64),
        ("num_tokens_per_expert", ctypes.c_uint64),
        ("group_offsets", ctypes.c_uint64),
        ("source_starts", ctypes.c_uint64),
        ("overflows", ctypes.c_uint64),
        ("host", ctypes.c_uint64),
        ("record_src_token", ctypes.c_uint64),
        ("record_topk_idx", ctypes.c_uint64),
        ("record_topk_weights", ctypes.c_uint64),
        ("record_rows", ctypes.c_uint64),
        ("row_record", ctypes.c_uint64),
        ("row_src", ctypes.c_uint64),
        ("row_weights", ctypes.c_uint64),
        ("host_sequence", ctypes.c_int32),
        ("capacity", ctypes.c_int32),
        ("rows_per_expert", ctypes.c_int32),
        ("alignment", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("is_static", ctypes.c_int32),
    )

    @classmethod
    def of(cls, parts: Addresses, options: DispatchOptions, num_rows: int, rows_per_expert: int) -> Placement:
        """Build the placement of a handle of `num_rows`, without a host table; a replay has no `source_starts`."""
        return cls(
            **{name: parts.get(name, 0) for name in _PLACED},
            capacity=num_rows,
            rows_per_expert=rows_per_expert if options.static else 0,
            alignment=options.alignment,
            layout=[*RECV_LAYOUTS].index(options.recv_layout),
            is_static=int(options.static),
        )


_PLACED = tuple(name for name, kind in Placement._fields_ if kind is ctypes.c_uint64 and name != "host")


class CountParams(ctypes.Structure):
    """See `CountParams` in kernels/count.cu."""

    _fields_ = (("comm", Comm), ("placement", Placement))


def host_constants() -> dict[str, int]:
    """Return the constants of kernels that fill the host table."""
    return {
        "host_ready": HOST_READY,
        "host_bad_rank": HOST_BAD_RANK,
        "host_bad_token": HOST_BAD_TOKEN,
        "host_rows": HOST_ROWS,
        "host_rows_per_expert": HOST_ROWS_PER_EXPERT,
        "host_fixed": HOST_FIXED,
    }


def count_spec(num_topk: int) -> KernelSpec:
    """Build the spec of `count`."""
    return spec(
        "count",
        "count",
        num_topk=num_topk,
        sizeof_count=ctypes.sizeof(CountParams),
        **host_constants(),
    )


def launch_count(
    launcher: Launcher,
    stream: int,
    placement: Placement,
    host: torch.Tensor | None,
    sequence: int,
    *,
    early: bool = False,
) -> None:
    """Wait for every peer's counts, and say what comes; with a host table, tell the host under a sequence number.

    It may be early where the sender is the last thing on the stream.
    """
    params = CountParams(launcher.comm, placement)
    params.placement.host, params.placement.host_sequence = pointer(host), sequence
    shared_bytes = table_bytes(launcher)
    launcher.kernels.get(count_spec, launcher.num_topk).launch(1, _THREADS, shared_bytes, stream, params, early=early)


def table_bytes(launcher: Launcher) -> int:
    """Return the shared memory that counting takes: the counts of every rank, and the table of `count_records`."""
    ranks, local = launcher.comm.num_ranks, launcher.comm.num_local_experts
    return 4 * (ranks * (2 + local) + 2 * local + ranks + 2)
