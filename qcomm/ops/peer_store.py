"""Launch the peer-store kernel: the bandwidth that benchmarks call the ceiling."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from qcomm.jit import KernelLoader, KernelSpec
from qcomm.ops.comm import MAX_RANKS, spec

VEC_BYTES = 16
_THREADS = 512
_BLOCKS_PER_SM = 4


class PeerStoreParams(ctypes.Structure):
    """See `PeerStoreParams` in kernels/peer_store.cu."""

    _fields_ = (
        ("source", ctypes.c_uint64),
        ("peer", ctypes.c_uint64 * MAX_RANKS),
        ("num_vecs", ctypes.c_int64),
        ("num_peers", ctypes.c_int32),
    )


def peer_store_spec() -> KernelSpec:
    """Build the spec of the peer-store kernel."""
    return spec("peer_store", "peer_store", sizeof_peer_store=ctypes.sizeof(PeerStoreParams))


def launch_peer_store(kernels: KernelLoader, stream: int, source: torch.Tensor, peers: Sequence[int]) -> None:
    """Store a tensor to every peer, with all SMs.

    Args:
        kernels: of the source's device.
        stream: handle of the stream to launch on.
        source: contiguous, a multiple of 16 bytes.
        peers: the address at each peer, 16-byte aligned; at most MAX_RANKS.

    Raises:
        ValueError: no peer, too many, or a source of another size.
    """
    if not 0 < len(peers) <= MAX_RANKS:
        raise ValueError(f"peers must be 1 to {MAX_RANKS} addresses, got {len(peers)}")
    if source.nbytes % VEC_BYTES:
        raise ValueError(f"source must be a multiple of {VEC_BYTES} bytes, got {source.nbytes}")
    addresses = (ctypes.c_uint64 * MAX_RANKS)(*peers)
    params = PeerStoreParams(source.data_ptr(), addresses, source.nbytes // VEC_BYTES, len(peers))
    num_sms = torch.cuda.get_device_properties(source.device).multi_processor_count
    kernels.get(peer_store_spec).launch(_BLOCKS_PER_SM * num_sms, _THREADS, 0, stream, params)
