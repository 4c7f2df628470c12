// What routing does with the tokens of a block: bitmaps of who goes where, and numbers from them.
#pragma once

#include "group.cuh"
#include "topk.cuh"
#include "wait.cuh"

#if QCOMM_INDEX_BYTES == 8
using Index = int64_t;
#else
using Index = int32_t;
#endif

// More experts than these are read again rather than kept in registers.
constexpr int kUnrolled = kNumTopk <= 8 ? kNumTopk : 1;

// Tells whether a token names an expert out of range, or one twice; such a token goes nowhere.
__device__ __forceinline__ bool is_bad(const Comm& comm, const Index* experts) {
    bool bad = false;
#pragma unroll kUnrolled
    for (int j = 0; j < kNumTopk; ++j) {
        const Index id = experts[j];
        bad |= id < -1 || id >= comm.num_experts;
#pragma unroll kUnrolled
        for (int i = 0; i < j; ++i)
            bad |= experts[i] == id && id >= 0;
    }
    return bad;
}

// What tokens are numbered within: every expert, every rank, and every other node where one rank forwards.
__device__ __forceinline__ int number_of_keys(const Comm& comm) {
    return comm.num_experts + comm.num_ranks + kForwardNodes;
}

// For every key a bitmap of the tokens [begin, end) that go there.
struct RouteMap {
    const Comm& comm;
    uint32_t* bits;  // [number_of_keys][words]
    int words;
    int begin;

    // Sets the bits of the tokens, all zero before, and returns the first bad token of this thread. Call from
    // all threads of a group.
    template <typename Group>
    __device__ __forceinline__ int fill(const Group& group, const Index* topk_idx, int end) const {
        int first_bad = kNoBadToken;
        for (int token = begin + group.thread(); token < end; token += group.size()) {
            const Index* experts = topk_idx + static_cast<int64_t>(token) * kNumTopk;
            if (is_bad(comm, experts)) {
                first_bad = min(first_bad, token);
                continue;
            }
            const int word = (token - begin) / 32;
            const uint32_t bit = 1u << ((token - begin) % 32);
            uint32_t ranks = 0;
#pragma unroll kUnrolled
            for (int j = 0; j < kNumTopk; ++j) {
                const int expert = static_cast<int>(experts[j]);
                if (expert < 0) continue;
                atomicOr(bits + expert * words + word, bit);
                ranks |= 1u << (expert / comm.num_local_experts);
            }
            if constexpr (kForwards) {
                for (uint32_t left = ranks; left != 0; left &= left - 1) {
                    const int rank = __ffs(left) - 1;
                    if (same_node(comm, rank)) continue;
                    atomicOr(bits + (comm.num_experts + comm.num_ranks + node_of(rank)) * words + word, bit);
                }
            }
            for (; ranks != 0; ranks &= ranks - 1)
                atomicOr(bits + (comm.num_experts + __ffs(ranks) - 1) * words + word, bit);
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

// Writes this rank's totals to the peers, total(key) for each key. Call from all threads of a group, after
// what total needs is there.
template <typename Group, typename Total>
__device__ __forceinline__ void publish_counts(const Comm& comm, const Group& group, uint32_t epoch,
                                               int bad_token, const Total& total) {
    const auto write = [&](int rank, int word, int value) {
        const bool near = same_node(comm, rank);
        Count* count = counts_of(comm, near ? rank : comm.rank, epoch, comm.rank) + word;
        const uint64_t both = static_cast<uint64_t>(epoch) << 32 | static_cast<uint32_t>(value);
        if (near) {
            store_relaxed_sys(reinterpret_cast<uint64_t*>(count), both);
        } else {
            put_word(reinterpret_cast<uint64_t*>(count), both, rank);
        }
    };
    for (int key = group.thread(); key < number_of_keys(comm); key += group.size()) {
        const int rank = key < comm.num_experts ? key / comm.num_local_experts : key - comm.num_experts;
        const int word = key < comm.num_experts ? 2 + key % comm.num_local_experts : 1;
        if constexpr (kForwards) {
            const int node = key - comm.num_experts - comm.num_ranks;
            if (node >= 0) {
                write(counterpart(comm, node), 2 + comm.num_local_experts, total(key));
                continue;
            }
        }
        write(rank, word, total(key));
    }
    if (group.thread() < comm.num_ranks) {
        write(group.thread(), 0, bad_token == kNoBadToken ? 0 : bad_token + 1);
    }
}
