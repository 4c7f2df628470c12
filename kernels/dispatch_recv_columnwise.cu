// The wgrad operand of what a dispatch received: column-wise FP8, of records whose columns must become
// floats; MXFP4 that need not has a kernel of its own. Runs after dispatch_recv, whose records it reads
// again.
#include "dispatch_recv.cuh"

constexpr int kTile = 128;
constexpr int kThreads = 256;
constexpr int kRowsPerThread = 4;
constexpr int kTileStride = kTile + 4;
constexpr int kStrips = 8;  // pieces of a row of tiles; a block looks for the records of a piece once

// Any grid, 256 threads. A block takes strips of tiles of 128 rows by 128 columns; groups start at multiples
// of 128, so a tile belongs to one expert. Thread t holds 16 columns, from 16 * (t % 8) on, of 4 rows, from 4
// * (t / 8) on; padding rows hold zeros.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    dispatch_recv_columnwise(const __grid_constant__ DispatchRecvParams p) {
    __shared__ __align__(16) uint8_t tile[kTile * kTileStride];
    __shared__ uint32_t warp_max[kThreads / 32][kTile];
    __shared__ int records[kTile];
    const Comm& comm = p.comm;
    if (timed_out(comm)) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = threadIdx.x % kVecsPerGroup * kVec, row = threadIdx.x / kVecsPerGroup * kRowsPerThread;
    const int row_tiles = p.placement.group_offsets[comm.num_local_experts] / kTile;
    constexpr int kColumnTiles = kHidden / kTile;
    constexpr int kStrip = (kColumnTiles + kStrips - 1) / kStrips;

    for (int i = blockIdx.x; i < row_tiles * kStrips; i += gridDim.x) {
        const int first_row = i / kStrips * kTile;
        const int expert = expert_of_row(p, first_row);
        const int group_begin = p.placement.group_offsets[expert],
                  group_rows = p.placement.group_offsets[expert + 1] - group_begin;
        if (threadIdx.x < kTile)
            records[threadIdx.x] = static_cast<int>(slot_of_row(p, first_row + threadIdx.x));
        __syncthreads();

        for (int tile_column = i % kStrips * kStrip;
             tile_column < min((i % kStrips + 1) * kStrip, kColumnTiles); ++tile_column) {
            const int first_column = tile_column * kTile;
            const int vec = (first_column + column) / kVec;
            LaneVec parts[kRowsPerThread];
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                const int64_t index = records[row + r];
                if (index >= 0) {
                    const uint8_t* bytes =
                        region<uint8_t>(comm, comm.rank, comm.dispatch_records) + index * kSlotBytes;
                    parts[r] = read_record(bytes, vec);
                } else {
                    parts[r] = {};
                    parts[r].scale = pow2(kMinScaleExponent);
                }
            }
            uint32_t columns[kRowsPerThread][kVec / 4];  // E4M3 under the columns' scales: row r, 16 columns
            // Rows are decoded twice, which costs less than keeping them as floats.
            uint32_t amax[kVec] = {};
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                float v[kVec];
                decode_wire(parts[r], v);
#pragma unroll
                for (int c = 0; c < kVec; ++c)
                    amax[c] = max(amax[c], __float_as_uint(v[c]) & 0x7fffffffu);
            }
#pragma unroll
            for (int c = 0; c < kVec; ++c) {
                amax[c] = max(amax[c], __shfl_xor_sync(kAllLanes, amax[c], 8));
                amax[c] = max(amax[c], __shfl_xor_sync(kAllLanes, amax[c], 16));
                if (lane < kVecsPerGroup) warp_max[warp][column + c] = amax[c];
            }
            __syncthreads();
            float factors[kVec];
#pragma unroll
            for (int c = 0; c < kVec; ++c) {
#pragma unroll
                for (int w = 0; w < kThreads / 32; ++w)
                    amax[c] = max(amax[c], warp_max[w][column + c]);
                const int exponent = fp8_scale_exponent(amax[c]);
                factors[c] = amax[c] >= kInfinityBits ? __uint_as_float(kNanBits) : pow2(-exponent);
                if (row == 0) {
                    p.sf_columnwise[static_cast<int64_t>(first_row / kTile) * kHidden + first_column +
                                    column + c] = pow2(exponent);
                }
            }
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                float v[kVec];
                decode_wire(parts[r], v);
#pragma unroll
                for (int c = 0; c < kVec; ++c)
                    v[c] = __fmul_rn(v[c], factors[c]);
                encode_e4m3(v, 1.0f, columns[r]);
            }

            // Transpose 4x4 bytes in registers: word c of the tile's column holds this thread's four rows.
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const uint32_t low01 = __byte_perm(columns[0][q], columns[1][q], 0x5140u);
                const uint32_t low23 = __byte_perm(columns[2][q], columns[3][q], 0x5140u);
                const uint32_t high01 = __byte_perm(columns[0][q], columns[1][q], 0x7362u);
                const uint32_t high23 = __byte_perm(columns[2][q], columns[3][q], 0x7362u);
                const uint32_t transposed[4] = {
                    __byte_perm(low01, low23, 0x5410u),
                    __byte_perm(low01, low23, 0x7632u),
                    __byte_perm(high01, high23, 0x5410u),
                    __byte_perm(high01, high23, 0x7632u),
                };
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    *reinterpret_cast<uint32_t*>(tile + (column + 4 * q + c) * kTileStride + row) =
                        transposed[c];
                }
            }
            __syncthreads();
            uint8_t* group = p.x_columnwise + static_cast<int64_t>(group_begin) * kHidden;
            for (int w = threadIdx.x; w < kTile * kTile / 4; w += kThreads) {
                const int c = w / (kTile / 4), r = w % (kTile / 4) * 4;
                const int64_t offset =
                    static_cast<int64_t>(first_column + c) * group_rows + (first_row - group_begin) + r;
                *reinterpret_cast<uint32_t*>(group + offset) =
                    *reinterpret_cast<uint32_t*>(tile + c * kTileStride + r);
            }
            __syncthreads();
        }
    }
}
