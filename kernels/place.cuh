// Giving a record its rows: by expert, then source rank, then source token.
#pragma once

#include "group.cuh"
#include "topk.cuh"
#include "wait.cuh"

enum RecvLayout {
    kExpertMajor = QCOMM_EXPERT_MAJOR,
    kTokenMajor = QCOMM_TOKEN_MAJOR,
    kBatched = QCOMM_BATCHED
};

// Written by count: the first six. By who receives, for the records that came: the others.
struct Placement {
    int32_t* recv_offsets;           // out [num_ranks + 1]
    int32_t* num_tokens_per_expert;  // out [num_local_experts], those that fit
    int32_t* group_offsets;          // out [num_local_experts + 1], or null by token
    int32_t* source_starts;          // out [num_ranks, num_local_experts]: a source's first row of an expert
    uint64_t* overflows;             // out [2], zeroed
    int32_t* host;                   // out, pinned: see HOST_SEQUENCE in qcomm/ops/count.py; or null
    int32_t* record_src_token;       // out [records]
    int32_t* record_topk_idx;        // out [records, kNumTopk]
    float* record_topk_weights;      // out [records, kNumTopk]
    int32_t* record_rows;            // out [records, kNumTopk], or [records, 1] by token
    int32_t* row_record;             // out [rows]
    int32_t* row_src;                // out [rows, 2]
    float* row_weights;              // out [rows], or null by token
    int32_t host_sequence;
    int32_t capacity;         // rows there are
    int32_t rows_per_expert;  // of the "batched" layout; 0 takes the largest count, aligned
    int32_t alignment;
    int32_t layout;
    int32_t is_static;
};

// What one lane knows of a record: its token, and one of its experts, local or -1.
struct RecordEntry {
    int32_t token;
    int32_t expert;
    int32_t ordinal;
    float weight;
};

__device__ __forceinline__ RecordEntry read_entry(const Comm& comm, const uint8_t* metadata) {
    const int lane = threadIdx.x % 32;
    const volatile int32_t* words = reinterpret_cast<const volatile int32_t*>(metadata);
    RecordEntry entry = {words[0], -1, 0, 0.0f};
    if (lane >= kNumTopk) return entry;
    // Below zero for none, too.
    const int expert = words[1 + lane] - comm.rank * comm.num_local_experts;
    if (expert < 0 || expert >= comm.num_local_experts) return entry;
    entry.expert = expert;
    entry.ordinal = words[1 + kNumTopk + lane];
    entry.weight = __int_as_float(words[1 + 2 * kNumTopk + lane]);
    return entry;
}

// The row of this lane's entry of a record, -1 for none or where there is no room.
__device__ __forceinline__ int row_of(const Comm& comm, const Placement& p, const RecordEntry& entry,
                                      int source, int record) {
    if (p.layout == kTokenMajor) return threadIdx.x % 32 == 0 && record < p.capacity ? record : -1;
    if (entry.expert < 0) return -1;
    const int row = p.source_starts[source * comm.num_local_experts + entry.expert] + entry.ordinal;
    return row < (p.layout == kBatched ? p.group_offsets[entry.expert + 1] : p.capacity) ? row : -1;
}

// Notes where a record is and goes. Call from all lanes of one warp.
__device__ __forceinline__ void note_record(const Placement& p, const RecordEntry& entry, int source,
                                            int record, int row) {
    const int lane = threadIdx.x % 32;
    const int64_t index = static_cast<int64_t>(record) * kNumTopk + lane;
    if (lane < kNumTopk) {
        p.record_topk_idx[index] = entry.expert;
        p.record_topk_weights[index] = entry.weight;
        if (p.layout != kTokenMajor) p.record_rows[index] = row;
    }
    if (lane == 0) {
        p.record_src_token[record] = entry.token;
        if (p.layout == kTokenMajor) p.record_rows[record] = row;
    }
    if (row < 0) return;
    p.row_record[row] = record;
    reinterpret_cast<int2*>(p.row_src)[row] = make_int2(source, entry.token);
    if (p.layout != kTokenMajor) p.row_weights[row] = entry.weight;
}

__device__ __forceinline__ void note_padding(const Placement& p, int row) {
    p.row_record[row] = -1;
    reinterpret_cast<int2*>(p.row_src)[row] = make_int2(-1, -1);
    if (p.row_weights != nullptr) p.row_weights[row] = 0.0f;
}

// Notes which rows of a static result hold nothing because they are past the last group. Call from a
// group of every block.
template <typename Group>
__device__ __forceinline__ void note_rest(const Comm& comm, const Group& group, const Placement& p) {
    if (!p.is_static) return;
    const int end =
        p.layout == kTokenMajor ? p.recv_offsets[comm.num_ranks] : p.group_offsets[comm.num_local_experts];
    for (int row = end + group.thread(); row < p.capacity; row += group.size())
        note_padding(p, row);
}
