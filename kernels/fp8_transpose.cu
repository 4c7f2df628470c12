// Transposes groups of E4M3 rows, one scale per 128 elements of a row, to columns, one scale per 128 rows.
#include "columnwise.cuh"
#include "quantize.cuh"

constexpr int kScaleWords = kTileBytes / kGroupSize;
constexpr int kWarpsPerGroup = kWarps / kScaleWords;
constexpr int kParts = kTileRows / kLaneRows;
static_assert(kThreads == kScaleWords * kTileRows, "a thread has one row of one group");
constexpr uint32_t kLastDistance = 20;  // from 19 on, 448 is less than half of the smallest E4M3
using Fp8Stage = Stage<kScaleWords>;

// Exponent field of the smallest power of two that is not below a scale, from 2^-126 to 2^127.
__device__ __forceinline__ uint32_t ceil_exponent(uint32_t scale) {
    scale &= kNanBits;
    return min(max((scale >> 23) + ((scale & 0x007fffffu) != 0 ? 1u : 0u), 1u), 254u);
}

// FP16 of 2^-distance.
__device__ __forceinline__ uint32_t half_pow2(uint32_t distance) {
    return distance <= 14 ? (15 - distance) << 10 : 0x400u >> (distance - 14);
}

// A word of codes times a power of two (or zero or NaN) that FP16 holds. FP16 holds the product too, but
// where it is far below half of the smallest E4M3.
__device__ __forceinline__ uint32_t shift_word(uint32_t codes, uint32_t factor) {
    const uint32_t low = mul_f16x2(e4m3x2_to_f16x2(codes), factor);
    const uint32_t high = mul_f16x2(e4m3x2_to_f16x2(codes >> 16), factor);
    return f16x2_to_e4m3x2(low) | f16x2_to_e4m3x2(high) << 16;
}

// A word of codes times any scale over 2^top_exponent, rounded once.
__device__ __forceinline__ uint32_t rescale_word(uint32_t codes, float scale, int top_exponent) {
    const uint32_t word[1] = {codes};
    float v[4];
    decode_e4m3(word, v);
    const int exponent = scale_to_odd(v, scale) - top_exponent;
    uint32_t out[1];
    // Above 127 only for zeros.
    encode_e4m3(v, exponent < -126 ? 0.0f : pow2(min(exponent, 127)), out);
    return out[0];
}

// Which of this lane's rows have a code that is not zero among the columns of its warp.
__device__ __forceinline__ uint32_t nonzero_rows(Fp8Stage& stage) {
    uint32_t nonzero = 0;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
        const uint2 codes = lane_bytes(stage, r);
        nonzero |= ((codes.x | codes.y) & kE4m3NanWord) != 0 ? 1u << r : 0;
    }
    nonzero |= __shfl_xor_sync(kAllLanes, nonzero, 1);
    return nonzero | __shfl_xor_sync(kAllLanes, nonzero, 2);
}

// Rescales this lane's rows where they are.
__device__ __forceinline__ void rescale_rows(Fp8Stage& stage, int top_exponent) {
#pragma unroll 1
    for (int r = 0; r < kLaneRows; ++r) {
        uint2* codes =
            reinterpret_cast<uint2*>(stage.at(lane_part(), lane_row(), lane_byte()) + r * kTileBytes);
        const float scale = __uint_as_float(lane_scale(stage, r));
        *codes = make_uint2(rescale_word(codes->x, scale, top_exponent),
                            rescale_word(codes->y, scale, top_exponent));
    }
}

// A block for every tile and piece of its rows, which is whole groups. Reads and writes everything
// once.
extern "C" __global__ void __launch_bounds__(kThreads, kThreadsPerSm / kThreads)
    fp8_transpose(const __grid_constant__ ColumnwiseParams p) {
    __shared__ Fp8Stage stage;
    __shared__ uint32_t nonzero[kWarps][kParts], tops[kWarps], factors[kScaleWords][kScaleStride];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / kWarpsPerGroup;
    Tile tile;
    if (!fetch_tile(p, blockIdx.x, stage, tile)) return;
    const uint32_t rows = nonzero_rows(stage);
    if (lane % kLaneColumns == 0) nonzero[warp][lane_part()] = rows;
    __syncthreads();

    // One row of its warp's group a thread: does it count, and can its codes be shifted?
    const int my_row = threadIdx.x % kTileRows, my_part = my_row / kLaneRows,
              first_warp = group * kWarpsPerGroup;
    uint32_t any = 0;
#pragma unroll
    for (int w = 0; w < kWarpsPerGroup; ++w)
        any |= nonzero[first_warp + w][my_part];
    const uint32_t scale = *stage.scale(my_part, my_row, group);
    const bool counts = (any >> my_row % kLaneRows & 1) != 0, finite = scale < kInfinityBits;
    int exponent;
    const bool shifts = power_of_two(__uint_as_float(scale), exponent) || (!counts && finite);
    const uint32_t mine = __reduce_max_sync(kAllLanes, counts && finite ? ceil_exponent(scale) : 1u);
    if (lane == 0) tops[warp] = mine;
    const bool all_shift = __syncthreads_and(shifts);
    uint32_t top = 0;
#pragma unroll
    for (int w = 0; w < kWarpsPerGroup; ++w)
        top = max(top, tops[first_warp + w]);
    const uint32_t distance = top - min(scale >> 23, top);
    factors[group][my_row + my_part] = half_pow2(all_shift ? min(distance, kLastDistance) : 0) * 0x10001u;
    __syncthreads();

    const int column = tile.first_byte + lane_byte();
    if (column >= p.columns) return;
    if (lane_part() == 0) {
        const float out_scale = __uint_as_float(top << 23);
        float4* out_sf =
            reinterpret_cast<float4*>(p.out_sf + static_cast<int64_t>(tile.number) * p.columns + column);
        out_sf[0] = out_sf[1] = make_float4(out_scale, out_scale, out_scale, out_scale);
    }
    if (lane_row() >= tile.num_rows) return;
    uint8_t* out = column_of(p, tile, column);
    const uint32_t* my_factors = &factors[group][lane_row() + lane_part()];
    if (!all_shift) rescale_rows(stage, static_cast<int>(top) - 127);
    uint32_t quads[kLaneBytes / 4][kLaneRows / 4][4];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
        const uint2 codes = lane_bytes(stage, r);
        quads[0][r / 4][r % 4] = shift_word(codes.x, my_factors[r]);
        quads[1][r / 4][r % 4] = shift_word(codes.y, my_factors[r]);
    }
#pragma unroll
    for (int half = 0; half < kLaneBytes / 4; ++half) {
#pragma unroll
        for (int i = 0; i < kLaneRows / 4; ++i)
            transpose4(quads[half][i]);
        store_columns(out + static_cast<int64_t>(4 * half) * tile.group_rows, tile.group_rows, quads[half]);
    }
}
