// Converts MXFP4 rows to E4M3 with one scale per 128 elements.
#include "codec.cuh"

struct Mxfp4ToFp8Params {
    const uint2* qdata;       // vectors of 16 elements
    const uint8_t* sf;        // one a pair of vectors
    uint4* data;              // out
    uint8_t* out_sf;          // out: float32, or bytes of words if packed, with the strides below
    uint64_t* overflows;      // in and out, or null
    int64_t sf_row_stride;    // elements of float32 or words
    int64_t sf_group_stride;  // likewise
    int32_t num_vecs;
    int32_t vecs_per_row;
    Divisor by_vecs_per_row;
    uint32_t signs;
    uint32_t padding;
};

static_assert(sizeof(Mxfp4ToFp8Params) == QCOMM_SIZEOF_PARAMS, "qcomm/ops/mxfp4_to_fp8.py holds the same");

constexpr bool kPacked = QCOMM_PACKED;
constexpr bool kHadamard = QCOMM_HADAMARD;
constexpr bool kPrescaled = QCOMM_PRESCALED;
constexpr int kGroupsPerWord = 4;
constexpr int kVec = 16;
constexpr int kVecsPerGroup = kLanesPerGroup<kVec>;

__device__ __forceinline__ void write_scale(const Mxfp4ToFp8Params& p, int vec, float scale) {
    const int row = p.by_vecs_per_row.divide(vec), group = (vec - row * p.vecs_per_row) / kVecsPerGroup;
    if constexpr (kPacked) {
        const int64_t word = row * p.sf_row_stride + group / kGroupsPerWord * p.sf_group_stride;
        uint8_t* bytes = p.out_sf + 4 * word;
        bytes[group % kGroupsPerWord] = static_cast<uint8_t>(__float_as_uint(scale) >> 23);
        if (group == p.vecs_per_row / kVecsPerGroup - 1) {
            for (int i = group % kGroupsPerWord + 1; i < kGroupsPerWord; ++i)
                bytes[i] = 0;
        }
    } else {
        reinterpret_cast<float*>(p.out_sf)[row * p.sf_row_stride + group * p.sf_group_stride] = scale;
    }
}

// Any number of blocks of 256 threads. A thread takes kVecsPerThread vectors, all loaded before the first is
// worked on; reads and writes everything once, and adds to the counter once a warp that has something.
extern "C" __global__ void __launch_bounds__(kThreads)
    mxfp4_to_fp8(const __grid_constant__ Mxfp4ToFp8Params p) {
    uint32_t codes[kVecsPerThread][2], sf[kVecsPerThread];
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
        const int vec = min(vec_of(i), p.num_vecs - 1);
        unpack(load_once(p.qdata + vec), codes[i]);
        sf[i] = load_once(p.sf + vec / kLanesPerBlock<kVec>);
    }
    uint32_t overflows = 0;
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
        const int vec = vec_of(i);
        uint32_t group_overflows = 0;
        Fp8Vec<kVec> out;
        if constexpr (kHadamard || kPrescaled) {
            float v[kVec];
            decode_values<kHadamard, kPrescaled>(codes[i], sf[i], p.signs, v);
            out = quantize_fp8(v);
        } else {
            out = align_group(codes[i], sf[i], group_overflows);
        }
        if (vec >= p.num_vecs) continue;
        overflows += group_overflows;
        p.data[vec] = pack4(out.data);
        if (vec % kVecsPerGroup == 0) write_scale(p, vec, out.scale);
    }
    if (p.overflows != nullptr) add_overflows(p.overflows, overflows);
}
