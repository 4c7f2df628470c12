// What routing does with the tokens of a block: bitmaps of who goes where, and numbers from them.
#pragma once

#include "topk.cuh"
#include "wait.cuh"

#if QCOMM_INDEX_BYTES == 8
using Index = int64_t;
#else
using Index = int32_t;
#endif

// Loads a token's experts; a token that names one out of range, or one twice, goes nowhere and is reported as
// bad.
__device__ __forceinline__ bool load_experts(const Comm& comm, const Index* topk_idx, int token,
                                             int (&experts)[kNumTopk]) {
    bool bad = false;
#pragma unroll
    for (int j = 0; j < kNumTopk; ++j) {
        const Index id = topk_idx[static_cast<int64_t>(token) * kNumTopk + j];
        bad |= id < -1 || id >= comm.num_experts;
        experts[j] = static_cast<int>(id);
#pragma unroll
        for (int i = 0; i < j; ++i)
            bad |= experts[i] == experts[j] && experts[j] >= 0;
    }
    if (bad) {
#pragma unroll
        for (int j = 0; j < kNumTopk; ++j)
            experts[j] = -1;
    }
    return bad;
}

__device__ __forceinline__ uint32_t ranks_of(const Comm& comm, const int (&experts)[kNumTopk]) {
    uint32_t ranks = 0;
#pragma unroll
    for (int j = 0; j < kNumTopk; ++j) {
        if (experts[j] >= 0) ranks |= 1u << (experts[j] / comm.num_local_experts);
    }
    return ranks;
}

// For every expert and rank, a bitmap of the tokens [begin, end) that go there.
struct RouteMap {
    const Comm& comm;
    uint32_t* bits;  // [num_experts + num_ranks][words]
    int words;
    int begin;

    // Sets the bits of the block's tokens, all zero before, and returns the first bad token of this thread.
    __device__ __forceinline__ int fill(const Index* topk_idx, int end) const {
        int first_bad = kNoBadToken;
        for (int token = begin + threadIdx.x; token < end; token += blockDim.x) {
            int experts[kNumTopk];
            if (load_experts(comm, topk_idx, token, experts)) first_bad = min(first_bad, token);
            const int word = (token - begin) / 32;
            const uint32_t bit = 1u << ((token - begin) % 32);
#pragma unroll
            for (int j = 0; j < kNumTopk; ++j) {
                if (experts[j] >= 0) atomicOr(bits + experts[j] * words + word, bit);
            }
            for (uint32_t ranks = ranks_of(comm, experts); ranks != 0; ranks &= ranks - 1) {
                atomicOr(bits + (comm.num_experts + __ffs(ranks) - 1) * words + word, bit);
            }
        }
        return first_bad;
    }

    __device__ __forceinline__ int count(int key) const {
        int n = 0;
        for (int w = 0; w < words; ++w)
            n += __popc(bits[key * words + w]);
        return n;
    }

    // How many of the tokens before `token` go to a key; -1 if this one does not.
    __device__ __forceinline__ int number(int key, int token) const {
        const int word = (token - begin) / 32, bit = (token - begin) % 32;
        const uint32_t* row = bits + key * words;
        if ((row[word] >> bit & 1) == 0) return -1;
        int n = __popc(row[word] & ((1u << bit) - 1));
        for (int w = 0; w < word; ++w)
            n += __popc(row[w]);
        return n;
    }
};

// Writes this rank's totals to the peers, total(key) for each expert and rank, and raises its route flag
// there. Call from all threads of one block, after what total needs is there.
template <typename Total>
__device__ __forceinline__ void publish_counts(const Comm& comm, uint32_t epoch, int bad_token,
                                               const Total& total) {
    for (int key = threadIdx.x; key < comm.num_experts + comm.num_ranks; key += blockDim.x) {
        const int rank = key < comm.num_experts ? key / comm.num_local_experts : key - comm.num_experts;
        const int word = key < comm.num_experts ? 2 + key % comm.num_local_experts : 1;
        counts_of(comm, rank, epoch, comm.rank)[word] = total(key);
    }
    if (threadIdx.x < comm.num_ranks) {
        counts_of(comm, threadIdx.x, epoch, comm.rank)[0] = bad_token == kNoBadToken ? 0 : bad_token + 1;
    }
    __syncthreads();
    if (threadIdx.x < comm.num_ranks) {
        store_release_sys(region<uint32_t>(comm, threadIdx.x, comm.route_flags) + comm.rank, epoch);
    }
}
