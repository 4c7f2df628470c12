// The column-wise conversions of a tensor: groups of its rows, cut into tiles (tile.cuh), a block for each.
// Several blocks share an SM: while one loads, others convert and store.
#pragma once

#include "group.cuh"
#include "tile.cuh"

constexpr bool kWholeTiles = QCOMM_WHOLE_TILES;  // whether all groups are of whole tiles
constexpr int kThreadsPerSm = 1280;              // for which registers are kept

// What every such kernel is given.
struct ColumnwiseParams {
    const uint8_t* x;              // [rows, row_bytes]
    const uint8_t* x_sf;           // scales, four bytes at a time: see load_tile
    uint8_t* data;                 // out: per group [columns, rows of the group]
    float* out_sf;                 // out [tiles, columns]
    const int32_t* group_offsets;  // [num_groups + 1]
    uint64_t* overflows;           // in and out, or null
    int64_t sf_row_stride;         // bytes
    int64_t sf_word_stride;        // bytes
    int32_t num_groups;
    int32_t columns;
    int32_t row_bytes;
    int32_t num_tiles;
    uint32_t signs;
    uint32_t padding;
};

static_assert(sizeof(ColumnwiseParams) == QCOMM_SIZEOF_PARAMS, "qcomm/ops/columnwise.py holds the same");

struct Tile {
    int number;      // among those of all groups
    int first_byte;  // of its rows
    int first_row;   // in the tensor
    int num_rows;
    int group_begin;
    int group_rows;
};

// The tile of block `job`, but for its group: pieces side by side, for each tile of the groups in order. Its
// rows are known only if all tiles are whole.
__device__ __forceinline__ Tile first_tile(const ColumnwiseParams& p, int job) {
    Tile tile = {};
    const int pieces = (p.row_bytes + kTileBytes - 1) / kTileBytes;
    tile.number = job / pieces;
    tile.first_byte = job % pieces * kTileBytes;
    tile.first_row = tile.number * kTileRows;
    tile.num_rows = kTileRows;
    return tile;
}

// Finds the group and the rows of a tile; false if there is no such tile. The whole warp calls it.
__device__ __forceinline__ bool find_group(const ColumnwiseParams& p, Tile& tile) {
    const int lane = threadIdx.x % 32;
    int number = tile.number;
    for (int first = 0; first < p.num_groups; first += 32) {
        const int group = first + lane;
        const int begin = group < p.num_groups ? p.group_offsets[group] : 0;
        const int rows = group < p.num_groups ? p.group_offsets[group + 1] - begin : 0;
        const int tiles = (rows + kTileRows - 1) / kTileRows;
        const int end = sum_of_lanes(tiles);
        const uint32_t past = __ballot_sync(kAllLanes, end > number);
        if (past != 0) {
            const int source = __ffs(past) - 1;
            const int index = number - __shfl_sync(kAllLanes, end - tiles, source);
            tile.group_begin = __shfl_sync(kAllLanes, begin, source);
            tile.group_rows = __shfl_sync(kAllLanes, rows, source);
            tile.first_row = tile.group_begin + index * kTileRows;
            tile.num_rows = min(kTileRows, tile.group_rows - index * kTileRows);
            return true;
        }
        number -= __shfl_sync(kAllLanes, end, 31);
    }
    return false;
}

// Starts the copy of a tile; what lies outside it becomes zero. Word w of a row's scales is for its w-th 128
// columns.
template <int kScaleWords>
__device__ __forceinline__ void load_tile(const ColumnwiseParams& p, const Tile& tile,
                                          Stage<kScaleWords>& stage) {
    constexpr int kPieces = kTileBytes / 16, kPieceRows = kThreads / kPieces;
    static_assert(kPieceRows == kLaneRows, "a pass fills one part");
    static_assert(kThreads / kScaleWords % kLaneRows == 0, "a pass fills whole parts");
    const int valid_bytes = min(kTileBytes, p.row_bytes - tile.first_byte);
    const int piece_row = threadIdx.x / kPieces, byte = threadIdx.x % kPieces * 16;
    const uint8_t* from =
        p.x + static_cast<int64_t>(tile.first_row + piece_row) * p.row_bytes + tile.first_byte + byte;
    const int num_rows = byte < valid_bytes ? tile.num_rows - piece_row : 0;
#pragma unroll
    for (int part = 0; part < kTileRows / kPieceRows; ++part) {
        const int row = part * kPieceRows;
        copy_async<16>(stage.at(part, row + piece_row, byte), from, row < num_rows);
        from += static_cast<int64_t>(kPieceRows) * p.row_bytes;
    }
    constexpr int kScaleRows = kThreads / kScaleWords;
    const int scale_row = threadIdx.x / kScaleWords, word = threadIdx.x % kScaleWords;
    const int first_word = tile.first_byte / (kTileBytes / kScaleWords);
    const uint8_t* scale_from =
        p.x_sf + (tile.first_row + scale_row) * p.sf_row_stride + (first_word + word) * p.sf_word_stride;
    const int num_scale_rows =
        word * (kTileBytes / kScaleWords) < valid_bytes ? tile.num_rows - scale_row : 0;
#pragma unroll
    for (int row = 0; row < kTileRows; row += kScaleRows) {
        const int part = row / kLaneRows + scale_row / kLaneRows;
        copy_async<4>(stage.scale(part, row + scale_row, word), scale_from, row < num_scale_rows);
        scale_from += kScaleRows * p.sf_row_stride;
    }
    copy_commit();
}

// Finds tile `job` and waits for it to be in `stage`; false if there is no such tile. Where the rows are
// known, the copy starts before the search for the group.
template <int kScaleWords>
__device__ __forceinline__ bool fetch_tile(const ColumnwiseParams& p, int job, Stage<kScaleWords>& stage,
                                           Tile& tile) {
    tile = first_tile(p, job);
    if constexpr (kWholeTiles) load_tile(p, tile, stage);
    const bool found = find_group(p, tile);
    if (!kWholeTiles && found) load_tile(p, tile, stage);
    copy_wait<0>();
    __syncthreads();
    return found;
}

// Where this lane's rows of a column go.
__device__ __forceinline__ uint8_t* column_of(const ColumnwiseParams& p, const Tile& tile, int column) {
    const int64_t group = static_cast<int64_t>(tile.group_begin) * p.columns;
    const int row = tile.first_row - tile.group_begin + lane_row();
    return p.data + group + static_cast<int64_t>(column) * tile.group_rows + row;
}
