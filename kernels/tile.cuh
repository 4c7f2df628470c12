// Tiles of the column-wise conversions: 128 rows by a byte for each of kThreads threads, transposed in
// registers.
//
// A tile lies in shared memory, a warp has 32 bytes of every row. Lane l holds 16 consecutive rows, from
// 16 * (l / 4) on, of the columns of l % 4; so a store of one column from eight lanes covers the 128 bytes
// that its rows fill.
#pragma once

#include "align.cuh"

constexpr int kThreads = QCOMM_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 128;
constexpr int kWarpBytes = 32;  // of a row
constexpr int kTileBytes = kWarpBytes * kWarps;
constexpr int kLaneRows = 16;
constexpr int kLaneColumns = 4;  // lanes side by side
constexpr int kLaneBytes = kWarpBytes / kLaneColumns;
constexpr int kScaleStride = kTileRows + kTileRows / kLaneRows;

// This thread among those of its tile; a block may have several tiles.
__device__ __forceinline__ uint32_t tile_thread() {
    return QCOMM_TILES == 1 ? threadIdx.x : threadIdx.x % kThreads;
}

// A tile and its scales. Parts of 16 rows are swizzled so that those of a warp's lanes lie on different
// banks.
template <int kScaleWords>
struct Stage {
    __align__(128) uint8_t bytes[kTileRows * kTileBytes];
    uint32_t scales[kScaleWords * kScaleStride];

    // Where byte `byte` of row `row`, which is in part `part`, lies; the part's next rows follow kTileBytes
    // apart.
    __device__ __forceinline__ uint8_t* at(int part, int row, int byte) {
        return bytes + row * kTileBytes + (byte ^ part * kWarpBytes % kTileBytes);
    }
    __device__ __forceinline__ uint32_t* scale(int part, int row, int word) {
        return scales + word * kScaleStride + row + part;
    }
};

// This lane's place in a tile.
__device__ __forceinline__ int lane_part() {
    return threadIdx.x % 32 / kLaneColumns;
}

__device__ __forceinline__ int lane_row() {
    return lane_part() * kLaneRows;
}

__device__ __forceinline__ int lane_byte() {
    return tile_thread() / 32 * kWarpBytes + threadIdx.x % kLaneColumns * kLaneBytes;
}

// Row r of this lane's bytes, two of them, and the word of scales for them. The latter are loaded each time
// they are asked for: kept, those of all rows would take too many registers.
template <int kScaleWords>
__device__ __forceinline__ uint2 lane_bytes(Stage<kScaleWords>& stage, int r) {
    return *reinterpret_cast<const uint2*>(stage.at(lane_part(), lane_row(), lane_byte()) + r * kTileBytes);
}

template <int kScaleWords>
__device__ __forceinline__ uint32_t lane_pair(Stage<kScaleWords>& stage, int r, int pair) {
    const uint8_t* row = stage.at(lane_part(), lane_row(), lane_byte()) + r * kTileBytes;
    return reinterpret_cast<const volatile uint16_t*>(row)[pair];
}

template <int kScaleWords>
__device__ __forceinline__ uint32_t lane_scale(Stage<kScaleWords>& stage, int r) {
    const int word = lane_byte() / (kTileBytes / kScaleWords);
    return *static_cast<const volatile uint32_t*>(stage.scale(lane_part(), lane_row(), word) + r);
}

// Transposes four rows of four bytes.
__device__ __forceinline__ void transpose4(uint32_t (&w)[4]) {
    const uint32_t low01 = __byte_perm(w[0], w[1], 0x5140u), low23 = __byte_perm(w[2], w[3], 0x5140u);
    const uint32_t high01 = __byte_perm(w[0], w[1], 0x7362u), high23 = __byte_perm(w[2], w[3], 0x7362u);
    w[0] = __byte_perm(low01, low23, 0x5410u);
    w[1] = __byte_perm(low01, low23, 0x7632u);
    w[2] = __byte_perm(high01, high23, 0x5410u);
    w[3] = __byte_perm(high01, high23, 0x7632u);
}

// Stores four columns: quads[i] holds rows 4i to 4i + 3 of each, transposed. `out` is where the first
// column's rows of this lane go, the next column's lie group_rows bytes on.
__device__ __forceinline__ void store_columns(uint8_t* out, int group_rows,
                                              const uint32_t (&quads)[kLaneRows / 4][4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        *reinterpret_cast<uint4*>(out + static_cast<int64_t>(c) * group_rows) =
            make_uint4(quads[0][c], quads[1][c], quads[2][c], quads[3][c]);
    }
}

// The largest over the lanes that hold the same columns.
__device__ __forceinline__ uint32_t max_over_rows(uint32_t v) {
#pragma unroll
    for (int step = kLaneColumns; step < 32; step *= 2)
        v = max(v, __shfl_xor_sync(kAllLanes, v, step));
    return v;
}
