// Converts MXFP4 rows to E4M3 with one scale per 128 elements.
#include "codec.cuh"

struct Mxfp4ToFp8Params {
    const uint2* qdata;       // vectors of 16 elements
    const uint8_t* sf;        // one a pair of vectors
    uint4* data;              // out
    uint32_t* out_sf;         // out: float32, or four bytes of exponents a word
    uint64_t* overflows;      // in and out, or null
    int64_t sf_group_stride;  // words from one group, or four, to the next; rows are adjacent
    uint32_t num_rows;
    uint32_t vecs_per_row;
    uint32_t pieces;  // of a row, of 32 vectors
    uint32_t signs;
    Divisor by_pieces;
};

static_assert(sizeof(Mxfp4ToFp8Params) == QCOMM_SIZEOF_PARAMS, "qcomm/ops/mxfp4_to_fp8.py holds the same");

enum Layout { kRowMajor, kColumnMajor, kPackedUe8m0 };

constexpr Layout kLayout = static_cast<Layout>(QCOMM_LAYOUT);
constexpr bool kHadamard = QCOMM_HADAMARD;
constexpr bool kPrescaled = QCOMM_PRESCALED;
constexpr int kVec = 16;
constexpr int kVecsPerGroup = kLanesPerGroup<kVec>;
constexpr int kLoads = 2;  // vectors that are loaded together
constexpr int kMinBlocks = kHadamard || kPrescaled ? 4 : 6;
constexpr uint32_t kWarpVecs = 32;

// The first vector of this thread: its row, or 0 if rows do not matter, and its place there, which may lie
// past the end. With scales in row-major order vectors are taken as they come. Otherwise a warp takes 32
// vectors, which are four groups, of kVecsPerThread consecutive rows, so that the scales it writes fill whole
// sectors.
struct Place {
    uint32_t row;
    uint32_t vec;
};

__device__ __forceinline__ Place first_place(const Mxfp4ToFp8Params& p) {
    if constexpr (kLayout == kRowMajor) {
        return {0, static_cast<uint32_t>(vec_of(0))};
    } else {
        const uint32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpVecs, strip = p.by_pieces.divide(warp);
        const uint32_t piece = warp - strip * p.pieces;
        return {strip * kVecsPerThread, piece * kWarpVecs + threadIdx.x % kWarpVecs};
    }
}

// The number of this thread's vector i in the tensor, if there is such a vector.
__device__ __forceinline__ bool find_vec(const Mxfp4ToFp8Params& p, const Place& place, int i,
                                         uint32_t& number) {
    if constexpr (kLayout == kRowMajor) {
        number = place.vec + i * kThreads;
        return number < static_cast<uint32_t>(p.num_rows) * p.vecs_per_row;
    } else {
        number = (place.row + i) * p.vecs_per_row + place.vec;
        return place.row + i < p.num_rows && place.vec < p.vecs_per_row;
    }
}

// kLoads of this thread's vectors.
struct Vectors {
    uint32_t codes[kLoads][kVec / 8];
    uint32_t sf[kLoads];
};

__device__ __forceinline__ Vectors read(const Mxfp4ToFp8Params& p, const Place& place, int first) {
    Vectors in;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        uint32_t vec;
        vec = find_vec(p, place, first + i, vec) ? vec : 0;
        unpack(load_once(p.qdata + vec), in.codes[i]);
        in.sf[i] = load_once(p.sf + vec / kLanesPerBlock<kVec>);
    }
    return in;
}

// What a warp that takes rows writes of their scales: lane i of a group that of row i; for packed ones, lane
// i of the warp.
__device__ __forceinline__ void write_scale(const Mxfp4ToFp8Params& p, const Place& place, uint32_t scale) {
    const int lane = threadIdx.x % kWarpVecs;
    const int lane_row = kLayout == kPackedUe8m0 ? lane : lane % kVecsPerGroup;
    const int64_t column = place.vec / (kLayout == kPackedUe8m0 ? kWarpVecs : kVecsPerGroup);
    const uint32_t row = place.row + lane_row;
    const bool inside = kLayout == kPackedUe8m0 || place.vec < p.vecs_per_row;
    if (lane_row < kVecsPerThread && row < p.num_rows && inside)
        p.out_sf[column * p.sf_group_stride + row] = scale;
}

// Any number of blocks of kThreads threads. A thread takes kVecsPerThread vectors, and loads the next while
// it works on some; reads and writes everything once, and adds to the counter once a warp that has something.
extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    mxfp4_to_fp8(const __grid_constant__ Mxfp4ToFp8Params p) {
    const Place place = first_place(p);
    const uint32_t lane = threadIdx.x % kWarpVecs, group = lane / kVecsPerGroup;
    const bool first = lane % kVecsPerGroup == 0;
    Vectors next = read(p, place, 0);
    uint32_t overflows = 0, scale = 0;
#pragma unroll 1
    for (int done = 0; done < kVecsPerThread; done += kLoads) {
        const Vectors in = next;
        if (done + kLoads < kVecsPerThread) next = read(p, place, done + kLoads);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            uint32_t group_overflows = 0;
            Fp8Vec<kVec> out;
            if constexpr (kHadamard || kPrescaled) {
                float v[kVec];
                decode_values<kHadamard, kPrescaled>(in.codes[i], in.sf[i], p.signs, v);
                out = quantize_fp8(v);
            } else {
                out = align_group(in.codes[i], in.sf[i], group_overflows);
            }
            uint32_t vec;
            const bool valid = find_vec(p, place, done + i, vec);
            const uint32_t bits = __float_as_uint(out.scale);
            if constexpr (kLayout == kPackedUe8m0) {
                const uint32_t word =
                    __reduce_or_sync(kAllLanes, first && valid ? bits >> 23 << (8 * group) : 0);
                if (lane == done + i) scale = word;
            } else if constexpr (kLayout == kColumnMajor) {
                if (lane % kVecsPerGroup == done + i) scale = bits;
            }
            if (!valid) continue;
            overflows += group_overflows;
            p.data[vec] = pack4(out.data);
            if (kLayout == kRowMajor && first) p.out_sf[vec / kVecsPerGroup] = bits;
        }
    }
    if (p.overflows != nullptr) add_overflows(p.overflows, overflows);
    if constexpr (kLayout != kRowMajor) write_scale(p, place, scale);
}
