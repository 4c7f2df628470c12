// Ranks of other nodes, which NVSHMEM reaches: puts, and the signals that follow them. Where every rank is
// reached by NVLink (kNodes is 0), nothing of this is compiled.
#pragma once

#include "layout.cuh"

// A node's ranks follow one another, and rank r is NVSHMEM's processing element r.
__device__ __forceinline__ int node_of(int rank) {
    return rank / max(1, kRanksPerNode);
}

// Whether this GPU stores to a rank's memory itself.
__device__ __forceinline__ bool same_node(const Comm& comm, int rank) {
    return kNodes == 0 || node_of(rank) == node_of(comm.rank);
}

// The rank of another node that forwards to this rank's node, or back: that of the same place in its node.
__device__ __forceinline__ int counterpart(const Comm& comm, int node) {
    return node * kRanksPerNode + comm.rank % max(1, kRanksPerNode);
}

// What a forwarding rank notes of a record: its token, then its slot at each rank of this node.
constexpr int kEntryWords = 1 + kRanksPerNode;

#if QCOMM_NVSHMEM
// Raises a flag of this rank's memory in that of another. Orders nothing.
__device__ __forceinline__ void raise_far(uint32_t* flag, uint32_t value, int rank) {
    nvshmemx_signal_op(reinterpret_cast<uint64_t*>(flag), value, NVSHMEM_SIGNAL_SET, rank);
}

// Writes a word of this rank's memory in that of another; an aligned word arrives whole. Orders nothing.
__device__ __forceinline__ void put_word(uint64_t* to, uint64_t value, int rank) {
    nvshmem_uint64_p(to, value, rank);
}

// Copies num_bytes of this rank's memory to the place `to` in that of another, then raises a
// flag there: who sees the flag sees the bytes. `from` must stay as it is until then. Call from a whole warp.
__device__ __forceinline__ void put(void* to, const void* from, uint32_t num_bytes, uint32_t* flag,
                                    uint32_t value, int rank) {
    nvshmemx_putmem_signal_nbi_warp(to, from, num_bytes, reinterpret_cast<uint64_t*>(flag), value,
                                    NVSHMEM_SIGNAL_SET, rank);
}
#else
__device__ void raise_far(uint32_t* flag, uint32_t value, int rank);
__device__ void put_word(uint64_t* to, uint64_t value, int rank);
__device__ void put(void* to, const void* from, uint32_t num_bytes, uint32_t* flag, uint32_t value, int rank);
#endif

// Tells a rank that this one has come so far. Orders only what earlier kernels did, whose end is the fence.
__device__ __forceinline__ void raise(const Comm& comm, int rank, uint64_t flags, uint32_t value) {
    if (same_node(comm, rank)) {
        store_relaxed_sys(flag_at(comm, rank, flags, comm.rank), value);
    } else {
        raise_far(flag_at(comm, comm.rank, flags, comm.rank), value, rank);
    }
}
