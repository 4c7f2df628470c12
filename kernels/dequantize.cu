// Dequantizes MXFP4 to bf16 or float32.
#include "codec.cuh"

enum Dtype { kBf16, kFp32 };

struct DequantizeParams {
    const uint2* qdata;  // vectors of 16 elements
    const uint8_t* sf;   // one a pair of vectors
    uint4* out;          // out
    int32_t num_vecs;
    uint32_t signs;
};

static_assert(sizeof(DequantizeParams) == QCOMM_SIZEOF_PARAMS, "qcomm/ops/dequantize.py holds the same");

constexpr Dtype kDtype = static_cast<Dtype>(QCOMM_DTYPE);
constexpr bool kHadamard = QCOMM_HADAMARD;
constexpr bool kPrescaled = QCOMM_PRESCALED;
constexpr int kVec = 16;
constexpr int kPieces = kVec / 4;  // of float32

// Any number of blocks of 256 threads. A thread takes kVecsPerThread vectors, all loaded before the first is
// worked on; reads and writes everything once.
extern "C" __global__ void __launch_bounds__(kThreads)
    dequantize(const __grid_constant__ DequantizeParams p) {
    uint32_t codes[kVecsPerThread][2], sf[kVecsPerThread];
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
        const int vec = min(vec_of(i), p.num_vecs - 1);
        unpack(load_once(p.qdata + vec), codes[i]);
        sf[i] = load_once(p.sf + vec / kLanesPerBlock<kVec>);
    }
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
        const int vec = vec_of(i);
        uint32_t words[kVec / 2];
        if constexpr (kDtype == kBf16 && !kHadamard && !kPrescaled) {
            decode_mxfp4_bf16(codes[i], sf[i], words);
        } else {
            float v[kVec];
            decode_values<kHadamard, kPrescaled>(codes[i], sf[i], p.signs, v);
            if constexpr (kDtype == kFp32) {
                __shared__ WarpStage<kPieces> stages[kWarps];
                WarpStage<kPieces>& stage = stages[threadIdx.x / 32];
                __syncwarp();
#pragma unroll
                for (int j = 0; j < kPieces; ++j)
                    stage.of_lane(j) = pack4(reinterpret_cast<const uint32_t*>(v) + 4 * j);
                __syncwarp();
                const int64_t first =
                    static_cast<int64_t>(vec - static_cast<int>(threadIdx.x % 32)) * kPieces;
                const int64_t end = static_cast<int64_t>(p.num_vecs) * kPieces;
#pragma unroll
                for (int j = 0; j < kPieces; ++j) {
                    const int64_t piece = first + j * 32 + threadIdx.x % 32;
                    if (piece < end) p.out[piece] = stage.of_warp(j);
                }
                continue;
            }
            encode_bf16(v, words);
        }
        exchange_halves(words);
        if (vec >= p.num_vecs) continue;
        uint4* pair = p.out + pair_offset(vec);
        pair[0] = pack4(words);
        pair[2] = pack4(words + 4);
    }
}
