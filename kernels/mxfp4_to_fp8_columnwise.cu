// Converts groups of MXFP4 rows to transposed E4M3 with one scale per 128 rows of a column.
#include "align_tile.cuh"
#include "columnwise.cuh"

constexpr bool kHadamard = QCOMM_HADAMARD;
constexpr bool kPrescaled = QCOMM_PRESCALED;
constexpr bool kAligns = !kHadamard && !kPrescaled;
// The same for a rotated or prescaled tensor: each column has a scale of its own. Rows are decoded twice,
// which costs less than keeping them as floats.
__device__ __forceinline__ void requantize_tile(const ColumnwiseParams& p, const Tile& tile, MxStage& stage,
                                                float* out_sf, uint8_t* out) {
    float largest[kTileVec] = {};
#pragma unroll 1
    for (int r = 0; r < kLaneRows; ++r) {
        const Codes codes = read_row(stage, r);
        float v[kTileVec];
        decode_values<kHadamard, kPrescaled>(codes.words, codes.sf, p.signs, v);
#pragma unroll
        for (int c = 0; c < kTileVec; ++c)
            largest[c] = max_abs(largest[c], v[c]);
    }
    float factors[kTileVec];
#pragma unroll
    for (int c = 0; c < kTileVec; ++c) {
        const uint32_t amax = max_over_rows(__float_as_uint(largest[c]) & kNanBits);
        const int exponent = fp8_scale_exponent(amax);
        factors[c] = amax >= kInfinityBits ? __uint_as_float(kNanBits) : pow2(-exponent);
        if (lane_part() == 0) out_sf[c] = pow2(exponent);
    }
    uint32_t quads[kTileVec / 4][kLaneRows / 4][4];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
        const Codes codes = read_row(stage, r);
        float v[kTileVec];
        decode_values<kHadamard, kPrescaled>(codes.words, codes.sf, p.signs, v);
#pragma unroll
        for (int c = 0; c < kTileVec; ++c)
            v[c] = __fmul_rn(v[c], factors[c]);
        uint32_t data[kTileVec / 4];
        encode_e4m3(v, 1.0f, data);
#pragma unroll
        for (int c = 0; c < kTileVec / 4; ++c)
            quads[c][r / 4][r % 4] = data[c];
    }
    if (lane_row() >= tile.num_rows) return;
#pragma unroll
    for (int c = 0; c < kTileVec / 4; ++c) {
#pragma unroll
        for (int i = 0; i < kLaneRows / 4; ++i)
            transpose4(quads[c][i]);
        store_columns(out + static_cast<int64_t>(4 * c) * tile.group_rows, tile.group_rows, quads[c]);
    }
}

// A block for every tile and piece of its rows. Reads and writes everything once.
extern "C" __global__ void __launch_bounds__(kThreads, kAligns ? kThreadsPerSm / kThreads : 1)
    mxfp4_to_fp8_columnwise(const __grid_constant__ ColumnwiseParams p) {
    __shared__ MxStage stage;
    Tile tile;
    if (!fetch_tile(p, blockIdx.x, stage, tile)) return;
    const int column = 2 * (tile.first_byte + lane_byte());
    if (column >= p.columns) return;
    float* out_sf = p.out_sf + static_cast<int64_t>(tile.number) * p.columns + column;
    uint8_t* out = column_of(p, tile, column);
    if constexpr (kAligns) {
        __shared__ Places places;
        align_tile(p.overflows, stage, places, lane_row() < tile.num_rows, tile.group_rows, out_sf, out);
    } else {
        requantize_tile(p, tile, stage, out_sf, out);
    }
}
