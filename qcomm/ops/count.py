"""Launch counting: what is about to come; and the structure by which records are given their rows."""

from __future__ import annotations

import ctypes

import torch

from qcomm.formats import RECV_LAYOUTS
from qcomm.handle import DispatchHandle
from qcomm.jit import KernelSpec
from qcomm.ops.comm import Comm, Launcher, pointer, spec

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
    def of(cls, handle: DispatchHandle, source_starts: torch.Tensor | None, overflows: torch.Tensor) -> Placement:
        """Build the placement of a handle, without a host table; a replay has no source_starts."""
        return cls(
            recv_offsets=handle.recv_offsets.data_ptr(),
            num_tokens_per_expert=handle.num_tokens_per_expert.data_ptr(),
            group_offsets=pointer(handle.group_offsets),
            source_starts=pointer(source_starts),
            overflows=overflows.data_ptr(),
            record_src_token=handle.record_src_token.data_ptr(),
            record_topk_idx=handle.record_topk_idx.data_ptr(),
            record_topk_weights=handle.record_topk_weights.data_ptr(),
            record_rows=handle.record_rows.data_ptr(),
            row_record=handle.row_record.data_ptr(),
            row_src=handle.row_src.data_ptr(),
            row_weights=pointer(handle.row_weights),
            capacity=handle.num_rows,
            rows_per_expert=handle.rows_per_expert if handle.static else 0,
            alignment=handle.alignment,
            layout=[*RECV_LAYOUTS].index(handle.recv_layout),
            is_static=int(handle.static),
        )


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
    launcher: Launcher, stream: int, num_topk: int, placement: Placement, host: torch.Tensor | None, sequence: int
) -> None:
    """Wait for every peer's counts, and say what comes; with a host table, tell the host under a sequence number."""
    params = CountParams(launcher.comm, placement)
    params.placement.host, params.placement.host_sequence = pointer(host), sequence
    shared_bytes = table_bytes(launcher)
    launcher.kernels.get(count_spec, num_topk).launch(1, _THREADS, shared_bytes, stream, params)


def table_bytes(launcher: Launcher) -> int:
    """Return the shared memory that counting takes: the counts of every rank, and the table of `count_records`."""
    ranks, local = launcher.comm.num_ranks, launcher.comm.num_local_experts
    return 4 * (ranks * (2 + local) + 2 * local + ranks + 2)
