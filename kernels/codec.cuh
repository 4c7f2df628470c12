// What the kernels of the codec share: which vector a thread takes, division by a constant, and ways to keep
// a warp's accesses to memory whole where its lanes want neighbouring pieces.
#pragma once

#include "align.cuh"
#include "quantize.cuh"

constexpr int kThreads = QCOMM_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kVecsPerThread = QCOMM_VECS_PER_THREAD;

// See `Divisor` in qcomm/ops/codec.py.
struct Divisor {
    uint32_t multiplier;
    uint32_t shift;

    __device__ __forceinline__ uint32_t divide(uint32_t number) const {
        return (__umulhi(number, multiplier) + number) >> shift;
    }
};

// Vector i of this thread: a block takes consecutive vectors, a warp 32 neighbours at a time.
__device__ __forceinline__ int vec_of(int i) {
    return (blockIdx.x * kVecsPerThread + i) * kThreads + threadIdx.x;
}

// Exchanges the halves of two neighbouring lanes' 32 bytes: what two lanes hold as (0, 1) and (2, 3) becomes
// (0, 2) and (1, 3), and back. Each 16-byte access of the warp then covers whole sectors of 32 bytes.
__device__ __forceinline__ void exchange_halves(uint32_t (&words)[8]) {
    const bool odd = threadIdx.x & 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t taken = __shfl_xor_sync(kAllLanes, odd ? words[i] : words[4 + i], 1);
        words[i] = odd ? taken : words[i];
        words[4 + i] = odd ? words[4 + i] : taken;
    }
}

// Where in their 64 bytes two neighbouring lanes read or write, in units of 16 bytes, for vector `vec`: the
// first half here and the second two further on.
__device__ __forceinline__ int64_t pair_offset(int vec) {
    return 2 * static_cast<int64_t>(vec & ~1) + (vec & 1);
}

// A warp's part of shared memory, in which 16-byte pieces change hands: kPieces consecutive ones of each
// lane, or, piece by piece, 32 consecutive ones of the warp. Lanes lie kPieces + 1 apart, which keeps them on
// different banks.
template <int kPieces>
struct WarpStage {
    uint4 pieces[32 * (kPieces + 1)];

    __device__ __forceinline__ uint4& of_lane(int piece) {
        return pieces[threadIdx.x % 32 * (kPieces + 1) + piece];
    }
    __device__ __forceinline__ uint4& of_warp(int piece) {
        const int number = piece * 32 + threadIdx.x % 32;
        return pieces[number / kPieces * (kPieces + 1) + number % kPieces];
    }
};
