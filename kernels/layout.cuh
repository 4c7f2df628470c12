// What host and device agree on: every offset comes from the host (qcomm/records.py,
// qcomm/transport/nvlink.py).
#pragma once

#include "ptx.cuh"

constexpr int kMaxRanks = QCOMM_MAX_RANKS;
constexpr int kNoBadToken = 0x7fffffff;
constexpr int kNodes = QCOMM_NODES;  // 0 where this GPU reaches every rank by NVLink
constexpr int kRanksPerNode = QCOMM_RANKS_PER_NODE;
// Whether tokens for another node go to one rank there, which forwards them, or to each rank by itself.
constexpr bool kForwards = QCOMM_FORWARDS;
constexpr int kForwardNodes = kForwards ? kNodes : 0;
// Between nodes a flag is raised by NVSHMEM, whose signals have 64 bits; the low ones are the flag.
constexpr int kFlagWords = kNodes > 0 ? 2 : 1;

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

// Parts of symmetric memory that there are only with several nodes; offsets as in Comm. An outbox is where
// this rank's puts are copied from.
struct Nodes {
    uint64_t dispatch_outbox;  // [max_tokens] records
    uint64_t combine_outbox;   // forwarding: [kNodes][max_tokens] records, else [num_ranks][max_tokens]
    uint64_t inbox_flags;      // flags [kNodes][max_tokens]
    uint64_t inbox;  // [kNodes][max_tokens] records from the counterpart in each node, to be forwarded
};

// This rank's device memory, not symmetric. `epoch` counts calls and is the value of every flag of a call.
struct State {
    uint32_t epoch;
    uint32_t timed_out;
    int32_t bad_token;
    uint32_t num_claimed;  // tokens of the call that blocks of dispatch_send took: see Claims
    uint32_t counted;      // the last call whose records are counted
    uint32_t padding;
    uint64_t done;  // blocks of the call of one kernel that are, and from kDoneShift on their overflows
    uint64_t waited_ns[kMaxRanks];  // since the buffer was made or reset, for each peer to begin its calls
    Nodes nodes;
};

// One number of a source's counts: its first bad token + 1, or 0; its records; those of each local expert;
// where tokens are forwarded, those that it puts here for this node. Number and call are written together, so
// that none needs a flag.
struct __align__(8) Count {
    int32_t value;
    uint32_t epoch;
};

// Symmetric memory of every rank, and this rank's place. Offsets are in bytes from peer[r], which is null for
// ranks of other nodes. A flag is uint32 [kFlagWords], of which the first counts.
struct Comm {
    uint8_t* peer[kMaxRanks];
    State* state;
    HostReports* reports;
    uint32_t* chunk_flags;   // [kMaxChunks], this rank's own
    uint32_t* chunk_counts;  // [kMaxChunks][num_experts + num_ranks], this rank's own
    uint64_t deadline_ns;
    uint64_t barrier_flags;     // flags [num_ranks]
    uint64_t counts;            // Count [2][num_ranks][counts_width]: see Count
    uint64_t dispatch_flags;    // flags [num_ranks][max_tokens]
    uint64_t combine_flags;     // flags [slots_per_token][max_tokens]
    uint64_t dispatch_records;  // [num_ranks][max_tokens] records, each with its metadata
    uint64_t combine_records;   // [slots_per_token][max_tokens] records: sums of ranks, then of nodes
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
#if QCOMM_DEBUG
    if (kNodes > 0 && rank / kRanksPerNode != comm.rank / kRanksPerNode) __trap();
#endif
    return reinterpret_cast<T*>(comm.peer[rank] + offset);
}

__device__ __forceinline__ int64_t slot_index(const Comm& comm, int source, int slot) {
    return static_cast<int64_t>(source) * comm.max_tokens + slot;
}

// Slots that a rank keeps for each of its tokens: one at every rank, then one at every node that forwards.
__device__ __forceinline__ int slots_per_token(const Comm& comm) {
    return comm.num_ranks + kForwardNodes;
}

// Flag number `index` of those at `offset` of a rank's symmetric memory.
template <typename Number>
__device__ __forceinline__ uint32_t* flag_at(const Comm& comm, int rank, uint64_t offset, Number index) {
    return region<uint32_t>(comm, rank, offset) + index * kFlagWords;
}

// What one rank tells another: see Count.
__device__ __forceinline__ int counts_width(const Comm& comm) {
    return 2 + comm.num_local_experts + (kForwards ? 1 : 0);
}

__device__ __forceinline__ Count* counts_of(const Comm& comm, int rank, uint32_t epoch, int source) {
    const int width = counts_width(comm);
    const int64_t index = static_cast<int64_t>(epoch & 1) * comm.num_ranks + source;
    return region<Count>(comm, rank, comm.counts) + index * width;
}

// Records of the source that has most, of those that begin at recv_offsets[source].
__device__ __forceinline__ int most_records(const Comm& comm, const int32_t* recv_offsets) {
    int most = 0;
#pragma unroll 1
    for (int source = 0; source < comm.num_ranks; ++source)
        most = max(most, recv_offsets[source + 1] - recv_offsets[source]);
    return most;
}
