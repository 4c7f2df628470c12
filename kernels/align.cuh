// MXFP4 to FP8 by exponent alignment.
#pragma once

#include "mxfp4.cuh"

constexpr int kAlignExponent = 6;
constexpr int kExactDistance = 14;
// E4M3 codes of the magnitudes 0 to 6 times 2^(6 - distance), ties to even: four of them from code `first`
// on. From a distance of 19 on all are 0.
__host__ __device__ constexpr uint32_t aligned_codes(int distance, int first) {
    const int halves[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
        // In subnormal units of 2^-9.
        const int value = halves[first + i], shift = kAlignExponent - distance + 8;
        int units = 0;
        if (shift >= 0) {
            units = value << shift;
        } else {
            const int half = 1 << (-shift - 1), floor = value >> -shift;
            const int rest = value - (floor << -shift);
            units = floor + (rest > half || (rest == half && floor % 2 == 1) ? 1 : 0);
        }
        int exponent = 0;
        for (; units >= 16; units /= 2)
            ++exponent;
        word |= static_cast<uint32_t>(8 * exponent + units) << (8 * i);
    }
    return word;
}

constexpr int kLostDistance = 19;
constexpr int kAlignNan = kLostDistance + 1;
constexpr int kAlignEntries = kAlignNan + 1;

struct __align__(16) AlignEntry {
    uint32_t low;    // codes of 0 to 1.5
    uint32_t high;   // codes of 2 to 6
    uint32_t signs;  // which bits the signs go to: none of NaN
};

__host__ __device__ constexpr AlignEntry align_entry(int distance) {
    return {aligned_codes(distance, 0), aligned_codes(distance, 4), kSignBits};
}

// Entry d is for distance d, the last for NaN.
static __constant__ AlignEntry kAlignTable[kAlignEntries] = {
    align_entry(0),
    align_entry(1),
    align_entry(2),
    align_entry(3),
    align_entry(4),
    align_entry(5),
    align_entry(6),
    align_entry(7),
    align_entry(8),
    align_entry(9),
    align_entry(10),
    align_entry(11),
    align_entry(12),
    align_entry(13),
    align_entry(14),
    align_entry(15),
    align_entry(16),
    align_entry(17),
    align_entry(18),
    align_entry(kLostDistance),
    {kE4m3NanWord, kE4m3NanWord, 0},
};

template <int kWords>
__device__ __forceinline__ bool any_nonzero(const uint32_t (&codes)[kWords]) {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i)
        any |= codes[i];
    return (any & 0x77777777u) != 0;
}

// Scale byte that maps to 2^6, given the largest that takes part.
__device__ __forceinline__ uint32_t alignment_top(uint32_t largest) {
    return max(largest, static_cast<uint32_t>(kMinScaleExponent + kAlignExponent + kE8m0Bias));
}

__device__ __forceinline__ float alignment_scale(uint32_t top) {
    return pow2(static_cast<int>(top) - kE8m0Bias - kAlignExponent);
}

// Place in the table of a block whose scale byte lies `top - sf` below the byte that maps to 2^6.
__device__ __forceinline__ uint32_t align_place(uint32_t sf, uint32_t top) {
    return sf == kE8m0Nan ? kAlignNan : min(top - sf, static_cast<uint32_t>(kLostDistance));
}

// The entry at a place where normal codes end only further on: a step of the exponent is 8. Any place makes
// zeros of zeros, whose scale byte may lie above `top`.
constexpr uint32_t kFirstTailPlace = 12;
__device__ __forceinline__ AlignEntry near_entry(uint32_t place) {
    const uint32_t shift = kAlignExponent - place;
    return {0x3c383000u + shift * 0x08080800u, 0x4c484440u + shift * 0x08080808u, kSignBits};
}

__device__ __forceinline__ bool is_near(uint32_t place, bool nonzero) {
    return place < kFirstTailPlace || (place != kAlignNan && !nonzero);
}

// E4M3 codes of a block.
template <int kWords>
__device__ __forceinline__ void align_codes(const AlignEntry& entry, const uint32_t (&codes)[kWords],
                                            uint32_t (&data)[2 * kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
        look_up(codes[i], entry.low, entry.high, entry.signs, data[2 * i], data[2 * i + 1]);
}

// Converts a group; adds to `overflows`, on the first lane of a block, the blocks too far down to be exact.
template <int kWords>
__device__ __forceinline__ Fp8Vec<8 * kWords> align_group(const uint32_t (&codes)[kWords], uint32_t sf,
                                                          uint32_t& overflows) {
    constexpr int N = 8 * kWords;
    const bool nonzero = any_nonzero(codes), counts = nonzero && sf != kE8m0Nan;
    const uint32_t top = alignment_top(max_over_lanes<kLanesPerGroup<N>>(counts ? sf : 0));
    const uint32_t place = align_place(sf, top);
    AlignEntry entry = near_entry(place);
    if (!__all_sync(kAllLanes, is_near(place, nonzero))) {
        entry = kAlignTable[place];
        const bool block_counts = max_over_lanes<kLanesPerBlock<N>>(counts) != 0;
        if (block_counts && top - sf > kExactDistance && threadIdx.x % kLanesPerBlock<N> == 0) ++overflows;
    }
    Fp8Vec<N> out;
    align_codes(entry, codes, out.data);
    out.scale = alignment_scale(top);
    return out;
}

__device__ __forceinline__ void add_overflows(uint64_t* total, uint32_t overflows) {
    overflows = __reduce_add_sync(kAllLanes, overflows);
    // nvcc's uint64_t is another type of this size.
    using Total = unsigned long long;
    if (threadIdx.x % 32 == 0 && overflows != 0)
        atomicAdd(reinterpret_cast<Total*>(total), static_cast<Total>(overflows));
}
