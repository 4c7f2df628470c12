// The wgrad operand of what a dispatch received, of MXFP4 records: column-wise FP8 by exponent alignment.
// Runs after dispatch_recv, whose records it reads again.
#include "align_tile.cuh"
#include "dispatch_recv.cuh"

static_assert(kWire == kMxfp4 && !kHadamard && kRecv == kRecvFp8);
static_assert(kTileVec == kVec, "a row of a tile is one vector for each lane of a warp");

constexpr int kTileColumns = 2 * kTileBytes;
constexpr int kPieces = (kHidden + kTileColumns - 1) / kTileColumns;

// What kThreads threads need for a tile.
struct TileShared {
    MxStage stage;
    Places places;
    int records[kTileRows];  // slot index, -1 for none
};

static_assert(sizeof(TileShared) == QCOMM_TILE_SHARED_BYTES, "qcomm/ops/dispatch.py computes the same");

__device__ __forceinline__ void tile_sync() {
    barrier_sync<kThreads>(1 + threadIdx.x / kThreads);
}

// Copies a piece of the tile's records, from byte first_byte of each, into shared memory; zeros where there
// is none.
__device__ __forceinline__ void gather_tile(const DispatchRecvParams& p, TileShared& shared, int first_byte) {
    constexpr int kRowPieces = kTileBytes / 16, kPassRows = kThreads / kRowPieces;
    static_assert(kPassRows == kLaneRows, "a pass fills one part");
    const uint8_t* records = region<uint8_t>(p.comm, p.comm.rank, p.comm.dispatch_records);
    const int byte = tile_thread() % kRowPieces * 16, pass_row = tile_thread() / kRowPieces;
    const bool inside = first_byte + byte < kHidden / 2;
#pragma unroll
    for (int part = 0; part < kTileRows / kPassRows; ++part) {
        const int row = part * kPassRows + pass_row, index = shared.records[row];
        const uint8_t* from = records + static_cast<int64_t>(max(index, 0)) * kSlotBytes + first_byte + byte;
        copy_async<16>(shared.stage.at(part, row, byte), from, inside && index >= 0);
    }
    constexpr int kScaleRows = kThreads / kScaleWords;
    const int word = tile_thread() % kScaleWords, scale_row = tile_thread() / kScaleWords;
    const int scale_byte = first_byte / (kBlockSize / 2) + 4 * word;
#pragma unroll
    for (int first = 0; first < kTileRows; first += kScaleRows) {
        const int row = first + scale_row, index = shared.records[row];
        const uint8_t* from =
            records + static_cast<int64_t>(max(index, 0)) * kSlotBytes + kScaleOffset + scale_byte;
        copy_async<4>(shared.stage.scale(row / kLaneRows, row, word), from,
                      scale_byte < kHidden / kBlockSize && index >= 0);
    }
    copy_commit();
    copy_wait<0>();
}

// Any grid; blocks of whole multiples of kThreads threads, each of which take tiles of 128 rows, by expert,
// and 512 columns; groups start at multiples of 128, so a tile belongs to one expert. They read the tile's
// records once and write them by column; padding rows hold zeros. Dynamic shared memory: one TileShared for
// each kThreads threads.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_recv_columnwise_mxfp4(const __grid_constant__ DispatchRecvParams p) {
    extern __shared__ __align__(128) uint8_t bytes[];
    const Comm& comm = p.comm;
    if (__syncthreads_or(timed_out(comm))) return;
    const int team = threadIdx.x / kThreads, num_teams = gridDim.x * (blockDim.x / kThreads);
    TileShared& shared = reinterpret_cast<TileShared*>(bytes)[team];
    const int num_jobs = p.placement.group_offsets[comm.num_local_experts] / kTileRows * kPieces;
    for (int job = blockIdx.x + gridDim.x * team; job < num_jobs; job += num_teams) {
        const int tile = job / kPieces, first_row = tile * kTileRows;
        const int first_column = job % kPieces * kTileColumns;
        if (tile_thread() < kTileRows) {
            shared.records[tile_thread()] = static_cast<int>(slot_of_row(p, first_row + tile_thread()));
        }
        tile_sync();
        gather_tile(p, shared, first_column / 2);
        tile_sync();
        const int expert = expert_of_row(p, first_row);
        const int group_begin = p.placement.group_offsets[expert],
                  group_rows = p.placement.group_offsets[expert + 1] - group_begin;
        const int column = first_column + 2 * lane_byte();
        if (column < kHidden) {
            const int64_t group = static_cast<int64_t>(group_begin) * kHidden;
            uint8_t* out = p.x_columnwise + group + static_cast<int64_t>(column) * group_rows + first_row -
                           group_begin + lane_row();
            align_tile(p.placement.overflows + 1, shared.stage, shared.places, true, group_rows,
                       p.sf_columnwise + static_cast<int64_t>(tile) * kHidden + column, out);
        }
        tile_sync();
    }
}
