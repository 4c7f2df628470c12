// Converts MXFP4 rows to E4M3 with one scale per 128 elements.
#include "codec.cuh"

struct Mxfp4ToFp8Params {
    const uint2* qdata;       // vectors of 16 elements
    const uint8_t* sf;        // one a pair of vectors
    uint4* data;              // out
    uint32_t* out_sf;         // out: float32, or four bytes of exponents a word
    uint64_t* overflows;      // in and out, or null
    int64_t sf_group_stride;  // words from one group, or four, to the next; rows are adjacent
    int32_t num_rows;
    int32_t vecs_per_row;
    uint32_t signs;
    uint32_t padding;
};

static_assert(sizeof(Mxfp4ToFp8Params) == QCOMM_SIZEOF_PARAMS, "qcomm/ops/mxfp4_to_fp8.py holds the same");

enum Layout { kRowMajor, kColumnMajor, kPackedUe8m0 };

constexpr Layout kLayout = static_cast<Layout>(QCOMM_LAYOUT);
constexpr bool kHadamard = QCOMM_HADAMARD;
constexpr bool kPrescaled = QCOMM_PRESCALED;
constexpr int kVec = 16;
constexpr int kVecsPerGroup = kLanesPerGroup<kVec>;
constexpr int kWarpGroups = 32 / kVecsPerGroup;
constexpr int kBlockRows = kWarps * kVecsPerThread;

// Vector i of this thread: its row and its place there, which may lie past the end. With scales in row-major
// order vectors are taken as they come. Otherwise a block takes 32 vectors, which are four groups, of
// neighbouring rows, so that it writes neighbouring scales.
struct Place {
    int64_t row;
    int vec;
};

__device__ __forceinline__ Place place_of(const Mxfp4ToFp8Params& p, int i) {
    if constexpr (kLayout == kRowMajor) {
        return {0, vec_of(i)};
    } else {
        const int pieces = (p.vecs_per_row + 31) / 32, warp = threadIdx.x / 32;
        return {static_cast<int64_t>(blockIdx.x / pieces) * kBlockRows + i * kWarps + warp,
                static_cast<int>(blockIdx.x % pieces * 32 + threadIdx.x % 32)};
    }
}

// Writes the scales of a block's rows, [group][row] in `scales`.
__device__ __forceinline__ void write_scales(const Mxfp4ToFp8Params& p,
                                             const uint32_t (&scales)[kWarpGroups][kBlockRows]) {
    const int pieces = (p.vecs_per_row + 31) / 32, groups = p.vecs_per_row / kVecsPerGroup;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x / pieces) * kBlockRows;
    const int first_group = blockIdx.x % pieces * kWarpGroups;
    if constexpr (kLayout == kColumnMajor) {
        const int group = threadIdx.x / kBlockRows, row = threadIdx.x % kBlockRows;
        if (group < kWarpGroups && first_group + group < groups && first_row + row < p.num_rows)
            p.out_sf[(first_group + group) * p.sf_group_stride + first_row + row] = scales[group][row];
    } else if (threadIdx.x < kBlockRows && first_row + threadIdx.x < p.num_rows) {
        uint32_t word = 0;
#pragma unroll
        for (int group = 0; group < kWarpGroups; ++group) {
            if (first_group + group < groups) word |= scales[group][threadIdx.x] >> 23 << (8 * group);
        }
        p.out_sf[first_group / kWarpGroups * p.sf_group_stride + first_row + threadIdx.x] = word;
    }
}

// Any number of blocks of 256 threads. A thread takes kVecsPerThread vectors, all loaded before the first is
// worked on; reads and writes everything once, and adds to the counter once a warp that has something.
extern "C" __global__ void __launch_bounds__(kThreads)
    mxfp4_to_fp8(const __grid_constant__ Mxfp4ToFp8Params p) {
    __shared__ uint32_t scales[kWarpGroups][kBlockRows];
    const int64_t num_vecs = static_cast<int64_t>(p.num_rows) * p.vecs_per_row;
    uint32_t codes[kVecsPerThread][2], sf[kVecsPerThread];
    int64_t vec[kVecsPerThread];
    bool valid[kVecsPerThread];
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
        const Place place = place_of(p, i);
        vec[i] = place.row * p.vecs_per_row + place.vec;
        valid[i] =
            kLayout == kRowMajor ? vec[i] < num_vecs : place.row < p.num_rows && place.vec < p.vecs_per_row;
        const int64_t inside = valid[i] ? vec[i] : 0;
        unpack(load_once(p.qdata + inside), codes[i]);
        sf[i] = load_once(p.sf + inside / kLanesPerBlock<kVec>);
    }
    uint32_t overflows = 0;
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
        uint32_t group_overflows = 0;
        Fp8Vec<kVec> out;
        if constexpr (kHadamard || kPrescaled) {
            float v[kVec];
            decode_values<kHadamard, kPrescaled>(codes[i], sf[i], p.signs, v);
            out = quantize_fp8(v);
        } else {
            out = align_group(codes[i], sf[i], group_overflows);
        }
        const bool first = threadIdx.x % kVecsPerGroup == 0;
        if constexpr (kLayout != kRowMajor) {
            if (first) {
                scales[threadIdx.x % 32 / kVecsPerGroup][i * kWarps + threadIdx.x / 32] =
                    __float_as_uint(out.scale);
            }
        }
        if (!valid[i]) continue;
        overflows += group_overflows;
        p.data[vec[i]] = pack4(out.data);
        if (kLayout == kRowMajor && first) p.out_sf[vec[i] / kVecsPerGroup] = __float_as_uint(out.scale);
    }
    if (p.overflows != nullptr) add_overflows(p.overflows, overflows);
    if constexpr (kLayout != kRowMajor) {
        __syncthreads();
        write_scales(p, scales);
    }
}
