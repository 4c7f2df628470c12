// Exponent alignment of a tile of MXFP4, column-wise: one scale for 128 rows of a column of blocks.
#pragma once

#include "tile.cuh"

constexpr int kTileVec = 2 * kLaneBytes;      // columns of a lane
constexpr int kScaleWords = kTileBytes / 64;  // of 4 blocks each
using MxStage = Stage<kScaleWords>;

__device__ __forceinline__ uint32_t read_scale(MxStage& stage, int r) {
    const int block = 2 * lane_byte() / kBlockSize;
    return __byte_perm(lane_scale(stage, r), 0, 0x4440u + block % 4);
}

// One row of this lane's codes.
struct Codes {
    uint32_t words[kTileVec / 8];
    uint32_t sf;
};

__device__ __forceinline__ Codes read_row(MxStage& stage, int r) {
    Codes codes;
    unpack(lane_bytes(stage, r), codes.words);
    codes.sf = read_scale(stage, r);
    return codes;
}

// Counts the blocks too far below `top` to be exact.
__device__ __forceinline__ void count_overflows(uint64_t* overflows, MxStage& stage, uint32_t top) {
    uint32_t count = 0;
#pragma unroll 1
    for (int r = 0; r < kLaneRows; ++r) {
        const Codes codes = read_row(stage, r);
        const uint32_t nonzero = max_over_lanes<kLanesPerBlock<kTileVec>>(any_nonzero(codes.words));
        count += nonzero != 0 && codes.sf != kE8m0Nan && top - codes.sf > kExactDistance ? 1 : 0;
    }
    add_overflows(overflows, threadIdx.x % kLanesPerBlock<kTileVec> == 0 ? count : 0);
}

// Four rows' places in the table of alignment a word, of each thread.
using Places = uint32_t[kLaneRows / 4][kThreads];

// Converts this lane's rows by `entry(place)`, and stores them. Four columns at a time, for want of
// registers; for the same reason the places are loaded each time, so that the compiler does not keep sixteen
// entries.
template <typename Entry>
__device__ __forceinline__ void store_aligned(int group_rows, MxStage& stage, uint8_t* out,
                                              const volatile Places& places, const Entry& entry) {
#pragma unroll 1
    for (int pair = 0; pair < kLaneBytes / 2; ++pair) {
        uint32_t quads[kLaneRows / 4][4];
#pragma unroll
        for (int i = 0; i < kLaneRows / 4; ++i) {
            const uint32_t four = places[i][tile_thread()];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const AlignEntry e = entry(__byte_perm(four, 0, 0x4440u + r));
                quads[i][r] = look_up4(lane_pair(stage, 4 * i + r, pair), e.low, e.high, e.signs);
            }
            transpose4(quads[i]);
        }
        store_columns(out, group_rows, quads);
        out += static_cast<int64_t>(4) * group_rows;
    }
}

// Writes E4M3 of this lane's rows and columns, if it `has_rows`, and their scale. Alignment: the lanes of a
// block of 32 columns and all rows agree on the scale byte that maps to 2^6. Adds to `overflows`, unless
// null.
__device__ __forceinline__ void align_tile(uint64_t* overflows, MxStage& stage, Places& places, bool has_rows,
                                           int group_rows, float* out_sf, uint8_t* out) {
    uint32_t largest = 0, sfs[kLaneRows / 4], nonzero = 0;
#pragma unroll
    for (int i = 0; i < kLaneRows / 4; ++i) {
        sfs[i] = 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const Codes codes = read_row(stage, 4 * i + r);
            const bool any = any_nonzero(codes.words);
            sfs[i] |= codes.sf << (8 * r);
            nonzero |= any ? 1u << (4 * i + r) : 0;
            largest = max(largest, any && codes.sf != kE8m0Nan ? codes.sf : 0);
        }
    }
    const uint32_t top = alignment_top(max_over_rows(max_over_lanes<kLanesPerBlock<kTileVec>>(largest)));
    if (overflows != nullptr) count_overflows(overflows, stage, top);
    if (lane_part() == 0) {
        const float scale = alignment_scale(top);
#pragma unroll
        for (int c = 0; c < kTileVec / 4; ++c)
            reinterpret_cast<float4*>(out_sf)[c] = make_float4(scale, scale, scale, scale);
    }
    bool near = true;
#pragma unroll
    for (int i = 0; i < kLaneRows / 4; ++i) {
        uint32_t four = 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const uint32_t place = align_place(__byte_perm(sfs[i], 0, 0x4440u + r), top);
            near = near && is_near(place, nonzero >> (4 * i + r) & 1);
            four |= place << (8 * r);
        }
        places[i][tile_thread()] = four;
    }
    near = __all_sync(kAllLanes, near);
    if (!has_rows) return;
    if (near) {
        store_aligned(group_rows, stage, out, places, [](uint32_t place) { return near_entry(place); });
    } else {
        store_aligned(group_rows, stage, out, places, [](uint32_t place) { return kAlignTable[place]; });
    }
}
