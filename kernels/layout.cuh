// What host and device agree on: every offset comes from the host (qcomm/records.py,
// qcomm/transport/nvlink.py).
#pragma once

#include "ptx.cuh"

constexpr int kMaxRanks = QCOMM_MAX_RANKS;
constexpr int kNoBadToken = 0x7fffffff;

enum WireKind { kBf16 = QCOMM_BF16, kFp8 = QCOMM_FP8, kMxfp4 = QCOMM_MXFP4 };

// What a host may read at any time, in pinned host memory: the first timeout, and the last notice.
struct Report {
    uint32_t code;
    int32_t rank;
    int32_t peer;
    int32_t phase;
    int32_t expected;
    int32_t seen;
};

struct HostReports {
    Report timeout;
    Report notice;
};

// This rank's device memory, not symmetric. `epoch` counts calls and is the value of every flag of a call.
struct State {
    uint32_t epoch;
    uint32_t timed_out;
    int32_t bad_token;
    uint32_t blocks_done;
    uint64_t waited_ns[kMaxRanks];  // since the buffer was made or reset, for each peer to begin its calls
};

// One number of a source's counts: its first bad token + 1, or 0; its records; those of each local expert.
// Number and call are written together, so that none needs a flag.
struct __align__(8) Count {
    int32_t value;
    uint32_t epoch;
};

// Symmetric memory of every rank, and this rank's place. Offsets are in bytes from peer[r].
struct Comm {
    uint8_t* peer[kMaxRanks];
    State* state;
    HostReports* reports;
    uint32_t* chunk_flags;   // [kMaxChunks], this rank's own
    uint32_t* chunk_counts;  // [kMaxChunks][num_experts + num_ranks], this rank's own
    uint64_t deadline_ns;
    uint64_t barrier_flags;     // uint32 [num_ranks]
    uint64_t counts;            // Count [2][num_ranks][2 + num_local_experts]: see Count
    uint64_t dispatch_flags;    // uint32 [num_ranks][max_tokens]
    uint64_t combine_flags;     // uint32 [num_ranks][max_tokens]
    uint64_t dispatch_records;  // [num_ranks][max_tokens] records, each with its metadata
    uint64_t combine_records;   // [num_ranks][max_tokens] records
    int32_t rank;
    int32_t num_ranks;
    int32_t max_tokens;
    int32_t num_experts;
    int32_t num_local_experts;
    int32_t padding;
};

static_assert(sizeof(Comm) == QCOMM_SIZEOF_COMM, "qcomm/transport/nvlink.py holds the same structure");

// Region [source][slot] of a rank's symmetric memory.
template <typename T>
__device__ __forceinline__ T* region(const Comm& comm, int rank, uint64_t offset) {
    return reinterpret_cast<T*>(comm.peer[rank] + offset);
}

__device__ __forceinline__ int64_t slot_index(const Comm& comm, int source, int slot) {
    return static_cast<int64_t>(source) * comm.max_tokens + slot;
}

__device__ __forceinline__ Count* counts_of(const Comm& comm, int rank, uint32_t epoch, int source) {
    const int width = 2 + comm.num_local_experts;
    const int64_t index = static_cast<int64_t>(epoch & 1) * comm.num_ranks + source;
    return region<Count>(comm, rank, comm.counts) + index * width;
}

// Records of the source that has most, of those that begin at recv_offsets[source].
__device__ __forceinline__ int most_records(const Comm& comm, const int32_t* recv_offsets) {
    int most = 0;
    for (int source = 0; source < comm.num_ranks; ++source)
        most = max(most, recv_offsets[source + 1] - recv_offsets[source]);
    return most;
}
