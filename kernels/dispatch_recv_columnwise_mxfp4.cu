// The receive side of dispatch that also writes the wgrad operand, of MXFP4 records: row-wise and column-wise
// FP8 by exponent alignment, from one read.
#include "align_tile.cuh"
#include "dispatch_recv.cuh"

static_assert(kWire == kMxfp4 && !kHadamard && kRecv == kRecvFp8);
static_assert(kTileVec == kVec, "a row of a tile is one vector for each lane of a warp");

constexpr int kTileColumns = 2 * kTileBytes;
constexpr int kPieces = (kHidden + kTileColumns - 1) / kTileColumns;
constexpr int kWarpRows = kTileRows / kWarps;

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

// Waits for the record of row `row`; returns its slot index, -1 for none.
__device__ __forceinline__ int wait_for_row(const DispatchRecvParams& p, int row) {
    const Comm& comm = p.comm;
    const int record = p.placement.row_record[row];
    if (record < 0) return -1;
    int source = 0;
    while (record >= p.placement.recv_offsets[source + 1])
        ++source;
    const int64_t index = slot_index(comm, source, record - p.placement.recv_offsets[source]);
    const uint32_t* flag = region<uint32_t>(comm, comm.rank, comm.dispatch_flags) + index;
    wait_flag(comm, flag, comm.state->epoch, source, kPhaseDispatch);
    return static_cast<int>(index);
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
    copy_wait();
}

// Writes this warp's rows of the tile as dispatch_recv would.
__device__ __forceinline__ void write_by_row(const DispatchRecvParams& p, TileShared& shared, int first_row,
                                             int first_vec, uint32_t& overflows) {
    const int lane = threadIdx.x % 32, vec = first_vec + lane;
#pragma unroll 2
    for (int r = 0; r < kWarpRows; ++r) {
        const int row = tile_thread() / 32 * kWarpRows + r, part = row / kLaneRows;
        uint32_t codes[kVec / 8];
        unpack(*reinterpret_cast<const uint2*>(shared.stage.at(part, row, lane * kLaneBytes)), codes);
        const uint32_t word = *shared.stage.scale(part, row, lane / kVecsPerGroup);
        const uint32_t sf = __byte_perm(word, 0, 0x4440u + lane / kVecsPerBlock % 4);
        const Fp8Vec<kVec> out = align_group(codes, sf, overflows);
        if (vec >= kNumVecs) continue;
        reinterpret_cast<uint4*>(p.x + static_cast<int64_t>(first_row + row) * kHidden)[vec] =
            pack4(out.data);
        if (lane % kVecsPerGroup == 0) {
            *scale_word(p, first_row + row, vec / kVecsPerGroup) = __float_as_uint(out.scale);
        }
    }
}

// Any grid; blocks of whole multiples of kThreads threads, each of which take tiles of 128 rows, by expert,
// and 512 columns; groups start at multiples of 128, so a tile belongs to one expert. They wait for the flags
// of the tile's records, read it once and write it by row and by column; padding rows hold zeros. Dynamic
// shared memory: one TileShared for each kThreads threads.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_recv_columnwise_mxfp4(const __grid_constant__ DispatchRecvParams p) {
    extern __shared__ __align__(128) uint8_t bytes[];
    const Comm& comm = p.comm;
    if (__syncthreads_or(timed_out(comm))) return;
    const int team = threadIdx.x / kThreads, num_teams = gridDim.x * (blockDim.x / kThreads);
    TileShared& shared = reinterpret_cast<TileShared*>(bytes)[team];
    const int num_jobs = p.placement.group_offsets[comm.num_local_experts] / kTileRows * kPieces;
    uint32_t overflows = 0;
    for (int job = blockIdx.x + gridDim.x * team; job < num_jobs; job += num_teams) {
        const int tile = job / kPieces, first_row = tile * kTileRows;
        const int first_column = job % kPieces * kTileColumns;
        if (tile_thread() < kTileRows) {
            shared.records[tile_thread()] = wait_for_row(p, first_row + tile_thread());
        }
        tile_sync();
        gather_tile(p, shared, first_column / 2);
        tile_sync();
        write_by_row(p, shared, first_row, first_column / kVec, overflows);

        int expert = 0;
        for (int step = 1 << 30; step > 0; step >>= 1) {
            const int next = expert + step;
            if (next < comm.num_local_experts && p.placement.group_offsets[next] <= first_row) expert = next;
        }
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
    add_overflows(p.placement.overflows, overflows);
}
