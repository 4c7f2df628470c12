"""Launch routing: number the tokens and tell the peers (route), then give the arriving records rows (place)."""

from __future__ import annotations

import ctypes

import torch

from qcomm.formats import RECV_LAYOUTS
from qcomm.jit import KernelSpec
from qcomm.ops.comm import Comm, Launcher, pointer, spec
from qcomm.records import align

HOST_SEQUENCE, HOST_READY, HOST_BAD_RANK, HOST_BAD_TOKEN, HOST_ROWS, HOST_ROWS_PER_EXPERT, HOST_FIXED = range(7)
"""Words of the host table that `place` fills: sequence number, whether every peer came in time, bad rank and token (-1
for none), rows of the result, rows per expert of the "batched" layout, then `recv_offsets` [num_ranks + 1] and tokens
per local expert [num_local_experts]."""

MAX_CHUNKS = 128
_SMALL_TOPK = 8
_PLACE_THREADS = 256


class RouteParams(ctypes.Structure):
    """See `RouteParams` in kernels/route.cu."""

    _fields_ = (
        ("comm", Comm),
        ("topk_idx", ctypes.c_uint64),
        ("topk_weights", ctypes.c_uint64),
        ("send_slot", ctypes.c_uint64),
        ("num_tokens", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
    )


class PlaceParams(ctypes.Structure):
    """See `PlaceParams` in kernels/route.cu."""

    _fields_ = (
        ("comm", Comm),
        ("recv_offsets", ctypes.c_uint64),
        ("record_src_token", ctypes.c_uint64),
        ("record_topk_idx", ctypes.c_uint64),
        ("record_topk_weights", ctypes.c_uint64),
        ("record_rows", ctypes.c_uint64),
        ("row_record", ctypes.c_uint64),
        ("row_src", ctypes.c_uint64),
        ("row_weights", ctypes.c_uint64),
        ("num_tokens_per_expert", ctypes.c_uint64),
        ("group_offsets", ctypes.c_uint64),
        ("overflows", ctypes.c_uint64),
        ("host", ctypes.c_uint64),
        ("host_sequence", ctypes.c_int32),
        ("capacity", ctypes.c_int32),
        ("rows_per_expert", ctypes.c_int32),
        ("alignment", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("is_static", ctypes.c_int32),
    )


def route_spec(name: str, num_topk: int, index_bytes: int) -> KernelSpec:
    """Build the spec of `route` or `place`."""
    return spec(
        "route",
        name,
        num_topk=num_topk,
        max_registers=32 if num_topk <= _SMALL_TOPK else 56,
        index_bytes=index_bytes,
        host_ready=HOST_READY,
        host_bad_rank=HOST_BAD_RANK,
        host_bad_token=HOST_BAD_TOKEN,
        host_rows=HOST_ROWS,
        host_rows_per_expert=HOST_ROWS_PER_EXPERT,
        host_fixed=HOST_FIXED,
        sizeof_route=ctypes.sizeof(RouteParams),
        sizeof_place=ctypes.sizeof(PlaceParams),
    )


def route_chunk(num_tokens: int) -> int:
    """Return the tokens a block numbers: at most 128 blocks, in whole bitmap words."""
    return max(32, align(-(-num_tokens // MAX_CHUNKS), 32))


def route_threads(num_topk: int) -> int:
    """Return the threads of a `route` block: as many as a waiting receiver of another buffer leaves registers for."""
    return 896 if num_topk <= _SMALL_TOPK else 512


def route_shared_bytes(num_experts: int, num_ranks: int, num_tokens: int) -> int:
    """Return the shared memory of a `route` block: a count and a bitmap of its chunk for every expert and rank."""
    return 4 * (num_experts + num_ranks) * (1 + route_chunk(num_tokens) // 32)


def launch_route(
    launcher: Launcher,
    stream: int,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    send_slot: torch.Tensor,
) -> None:
    """Number this rank's tokens, and write counts and metadata to every peer."""
    comm = launcher.comm
    num_tokens, num_topk = topk_idx.shape
    chunk = route_chunk(num_tokens)
    shared_bytes = route_shared_bytes(comm.num_experts, comm.num_ranks, num_tokens)
    params = RouteParams(comm, topk_idx.data_ptr(), pointer(topk_weights), send_slot.data_ptr(), num_tokens, chunk)
    kernel = launcher.kernels.get(route_spec, "route", num_topk, topk_idx.element_size())
    kernel.launch(max(1, -(-num_tokens // chunk)), route_threads(num_topk), shared_bytes, stream, params)


def launch_place(launcher: Launcher, stream: int, num_topk: int, params: PlaceParams) -> None:
    """Wait for every peer's counts and metadata and give each record its rows."""
    comm = launcher.comm
    shared_bytes = 4 * ((comm.num_ranks + 2) * comm.num_local_experts + comm.num_ranks + 2)
    kernel = launcher.kernels.get(route_spec, "place", num_topk, 8)
    kernel.launch(launcher.num_sms, _PLACE_THREADS, shared_bytes, stream, params)


def layout_number(recv_layout: str) -> int:
    """Return the number the kernels know a layout by."""
    return [*RECV_LAYOUTS].index(recv_layout)  # type: ignore[arg-type]
