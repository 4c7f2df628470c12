"""Launch routing: number the tokens and tell the peers how many come."""

from __future__ import annotations

import ctypes

import torch

from qcomm.handle import Addresses
from qcomm.jit import KernelSpec
from qcomm.ops.comm import Comm, Launcher, spec
from qcomm.records import align

MAX_CHUNKS = 64
_KEYS_PER_LOAD = 4
_SMALL_TOPK = 8


class RouteParams(ctypes.Structure):
    """See `RouteParams` in kernels/route.cu."""

    _fields_ = (
        ("comm", Comm),
        ("topk_idx", ctypes.c_uint64),
        ("send_slot", ctypes.c_uint64),
        ("ordinals", ctypes.c_uint64),
        ("num_tokens", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
    )


def route_spec(num_topk: int, index_bytes: int) -> KernelSpec:
    """Build the spec of `route`."""
    return spec(
        "route",
        "route",
        num_topk=num_topk,
        max_registers=32 if num_topk <= _SMALL_TOPK else 72,
        index_bytes=index_bytes,
        sizeof_route=ctypes.sizeof(RouteParams),
    )


def route_chunk(num_tokens: int) -> int:
    """Return the tokens a block numbers: at most MAX_CHUNKS blocks, in whole bitmap words."""
    return max(32, align(-(-num_tokens // MAX_CHUNKS), 32))


def route_threads(num_topk: int) -> int:
    """Return the threads of a `route` block: as many as a waiting receiver of another buffer leaves registers for."""
    return 896 if num_topk <= _SMALL_TOPK else 384


def num_keys(num_experts: int, num_places: int) -> int:
    """Return what a token is numbered within, experts and places (ranks, and nodes that forward), in whole loads."""
    return align(num_experts + num_places, _KEYS_PER_LOAD)


def route_shared_bytes(num_experts: int, num_places: int, num_tokens: int) -> int:
    """Return the shared memory of a `route` block: a count and a bitmap of its chunk for every expert and place."""
    return 4 * num_keys(num_experts, num_places) * (1 + route_chunk(num_tokens) // 32)


def launch_route(launcher: Launcher, stream: int, topk_idx: torch.Tensor, parts: Addresses) -> None:
    """Number this rank's tokens, as `send_slot` and `ordinals`, and write their counts to every peer."""
    comm = launcher.comm
    num_tokens, num_topk = topk_idx.shape
    chunk = route_chunk(num_tokens)
    shared_bytes = route_shared_bytes(comm.num_experts, comm.num_ranks + launcher.forward_nodes, num_tokens)
    params = RouteParams(comm, topk_idx.data_ptr(), parts["send_slot"], parts["ordinals"], num_tokens, chunk)
    kernel = launcher.kernels.get(route_spec, num_topk, topk_idx.element_size())
    kernel.launch(max(1, -(-num_tokens // chunk)), route_threads(num_topk), shared_bytes, stream, params)
