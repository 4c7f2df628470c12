// Quantizes a tensor to MXFP4. A thread takes a block of 32 at a time, so nothing is shuffled.
#include "codec.cuh"

enum Source { kBf16, kFp16, kFp32, kFp8 };

struct QuantizeMxfp4Params {
    const uint8_t* x;         // blocks of 32 elements
    const float* x_sf;        // fp8: one scale a row and group of 128, with the strides below
    uint4* qdata;             // out
    uint8_t* sf;              // out
    uint4* clipped;           // out, one byte an element, or null
    int64_t sf_row_stride;    // elements
    int64_t sf_group_stride;  // elements
    int32_t num_vecs;
    int32_t vecs_per_row;
    Divisor by_vecs_per_row;
    Quantizer quantizer;
    uint32_t signs;
    uint32_t padding;
};

static_assert(sizeof(QuantizeMxfp4Params) == QCOMM_SIZEOF_PARAMS,
              "qcomm/ops/quantize_mxfp4.py holds the same");

constexpr Source kSource = static_cast<Source>(QCOMM_SOURCE);
constexpr bool kStochastic = QCOMM_STOCHASTIC;
constexpr bool kUnbiased = QCOMM_UNBIASED;
constexpr bool kHadamard = QCOMM_HADAMARD;
constexpr bool kSigns = QCOMM_SIGNS;
constexpr bool kQuest = QCOMM_QUEST;
constexpr bool kClipMask = QCOMM_CLIP_MASK;
constexpr bool kClamps = QCOMM_CLAMPS;           // whether the rule lets magnitudes past 6
constexpr bool kFlatScales = QCOMM_FLAT_SCALES;  // whether x_sf is contiguous
// Whether the codes come from packed 16-bit arithmetic.
constexpr bool kPacked = (kSource == kBf16 || kSource == kFp8) && !kStochastic && !kHadamard && !kClipMask;
constexpr int kVec = kBlockSize;
constexpr int kChunk = 8;  // elements that are floats at a time, where nothing mixes a whole block
constexpr int kVecsPerGroup = kLanesPerGroup<kVec>;
constexpr int kVecBytes = kVec * (kSource == kFp8 ? 1 : kSource == kFp32 ? 4 : 2);
constexpr int kPieces = kVecBytes / 16;
// Threads of an SM for which registers are kept: as many as can be without a spill, but for a rotation, where
// more blocks under way in a thread are worth more.
constexpr bool kManyRegisters = kSource == kFp32 || (kSource == kFp8 && kHadamard) || kQuest || kClipMask;
constexpr int kThreadsPerSm = kManyRegisters ? kThreads : kHadamard && kVecsPerThread > 1 ? 512 : 1024;

// A thread's block as it comes, and the scale of FP8.
struct Input {
    uint32_t words[kVecBytes / 4];
    float scale;
};

__device__ __forceinline__ Input read(const QuantizeMxfp4Params& p, int vec) {
    Input in;
    const uint4* x = reinterpret_cast<const uint4*>(p.x);
    const int inside = min(vec, p.num_vecs - 1);
    if constexpr (kSource == kFp32) {
        __shared__ WarpStage<kPieces> stages[kWarps];
        WarpStage<kPieces>& stage = stages[threadIdx.x / 32];
        const int64_t first = static_cast<int64_t>(vec - static_cast<int>(threadIdx.x % 32)) * kPieces;
        __syncwarp();
        const int64_t end = static_cast<int64_t>(p.num_vecs) * kPieces;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int64_t piece = first + i * 32 + threadIdx.x % 32;
            if (piece < end) stage.of_warp(i) = load_once(x + piece);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
            unpack(stage.of_lane(i), in.words + 4 * i);
    } else {
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
            unpack(load_once(x + static_cast<int64_t>(inside) * kPieces + i), in.words + 4 * i);
    }
    in.scale = 1.0f;
    if constexpr (kSource == kFp8) {
        int64_t index = inside / kVecsPerGroup;
        if constexpr (!kFlatScales) {
            const int row = p.by_vecs_per_row.divide(inside);
            index =
                row * p.sf_row_stride + (inside - row * p.vecs_per_row) / kVecsPerGroup * p.sf_group_stride;
        }
        in.scale = load_once(p.x_sf + index);
    }
    return in;
}

// Decodes to float32; FP8 to its exact product over 2^(what is returned) if rounding it would be seen.
template <Source kFrom, int N, int kWords>
__device__ __forceinline__ int decode(const uint32_t (&words)[kWords], float scale, float (&v)[N]) {
    if constexpr (kFrom == kBf16) {
        decode_bf16(words, v);
    } else if constexpr (kFrom == kFp16) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const float2 two = from_f16x2(words[i]);
            v[2 * i] = two.x;
            v[2 * i + 1] = two.y;
        }
    } else if constexpr (kFrom == kFp32) {
#pragma unroll
        for (int i = 0; i < kWords; ++i)
            v[i] = __uint_as_float(words[i]);
    } else if constexpr (kHadamard || kUnbiased) {
        decode_fp8(words, scale, v);
    } else {
        decode_e4m3(words, v);
        return scale_to_odd(v, scale);
    }
    return 0;
}

// Float bits of the largest of what `decode` makes, and what it returns.
template <Source kFrom, int kWords>
__device__ __forceinline__ uint32_t amax_of(const uint32_t (&words)[kWords], float scale, int& offset) {
    offset = 0;
    if constexpr (kFrom == kBf16) {
        return amax_of_bf16(words);
    } else if constexpr (kFrom == kFp32) {
        float v[kWords];
        decode<kFrom>(words, scale, v);
        return amax_bits(v);
    } else {
        constexpr int kHalves = kFrom == kFp8 ? 2 * kWords : kWords;
        uint32_t magnitudes[kHalves];
#pragma unroll
        for (int i = 0; i < kHalves; ++i) {
            const uint32_t halves =
                kFrom == kFp8 ? e4m3x2_to_f16x2(words[i / 2] >> (16 * (i % 2))) : words[i % kWords];
            magnitudes[i] = halves & 0x7fff7fffu;
        }
        float largest[1] = {from_f16x2(amax_u16x2(magnitudes)).x};
        if constexpr (kFrom == kFp8 && kUnbiased) {
            largest[0] = __fmul_rn(largest[0], scale);
        } else if constexpr (kFrom == kFp8) {
            offset = scale_to_odd(largest, scale);
        }
        return __float_as_uint(largest[0]) & kNanBits;
    }
}

// Codes of v * 2^exponent, which is element 8 * chunk on of its tensor, and what of it is clipped.
template <bool kSaturate>
__device__ __forceinline__ uint32_t encode(const float (&v)[kChunk], int exponent, const Quantizer& quantizer,
                                           uint64_t chunk, uint32_t* mask) {
    if constexpr (kClipMask) clipped(v, pow2(exponent), mask);
    if constexpr (kStochastic) {
        uint32_t codes[kChunk];
        stochastic_codes<kUnbiased, kClamps>(v, exponent, quantizer, chunk, codes);
        return pack_codes<kStochasticByte>(codes, v);
    } else {
        uint32_t packed[1];
        nearest_codes<kSaturate>(v, pow2(exponent), packed);
        return packed[0];
    }
}

// bf16 as `encode`, with the signs where they are.
__device__ __forceinline__ uint32_t encode_bf16_words(uint32_t (&words)[kChunk / 2], float factor,
                                                      int exponent, const Quantizer& quantizer,
                                                      uint64_t chunk) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i)
        words[i] = mul_bf16x2(words[i], to_bf16x2(factor, factor));
    float v[kChunk];
    decode_bf16(words, v);
    uint32_t codes[kChunk];
    stochastic_codes<kUnbiased, kClamps>(v, exponent, quantizer, chunk, codes);
    return pack_codes<kStochasticByte>(codes, words);
}

// Any source and rounding without a rotation. A chunk is floats only after the last one has been packed, so
// that few registers do.
template <Source kFrom, int kWords>
__device__ __forceinline__ Mxfp4Vec<kVec> quantize_plain(const uint32_t (&words)[kWords], float scale,
                                                         const Quantizer& quantizer, uint64_t first_chunk,
                                                         uint32_t (&mask)[kVec / 4]) {
    constexpr int kChunkWords = kWords / (kVec / kChunk);
    int offset;
    const uint32_t amax = amax_of<kFrom>(words, scale, offset);
    Mxfp4Vec<kVec> out = {};
    out.sf = mxfp4_scale(amax, quantizer.scale_addend, offset);
    if (out.sf == kE8m0Nan) return out;
    int exponent = kE8m0Bias - static_cast<int>(out.sf) + (amax == 0 ? 0 : offset);
    const float factor = kStochastic ? prescale(exponent) : 1.0f;
#pragma unroll
    for (int i = 0; i < kVec / kChunk; ++i) {
        uint32_t chunk[kChunkWords];
#pragma unroll
        for (int j = 0; j < kChunkWords; ++j) {
            chunk[j] = words[kChunkWords * i + j];
            if (i > 0) sequence(out.codes[i - 1], chunk[j]);
        }
        if constexpr (kStochastic && kFrom == kBf16 && !kClipMask) {
            out.codes[i] = encode_bf16_words(chunk, factor, exponent, quantizer, first_chunk + i);
        } else {
            float v[kChunk];
            decode<kFrom>(chunk, scale, v);
            if constexpr (kStochastic) multiply(v, factor);
            out.codes[i] =
                encode<kFrom == kFp8>(v, exponent, quantizer, first_chunk + i, mask + kChunk / 4 * i);
        }
    }
    return out;
}

// Any source and rounding after a rotation.
__device__ __forceinline__ Mxfp4Vec<kVec> quantize_turned(const QuantizeMxfp4Params& p, const Input& in,
                                                          uint64_t first_chunk, uint32_t (&mask)[kVec / 4]) {
    float v[kVec];
    decode<kSource>(in.words, in.scale, v);
    if constexpr (kSigns) {
#pragma unroll
        for (int i = 0; i < kVec; ++i)
            v[i] = __uint_as_float(__float_as_uint(v[i]) ^ sign_of<kVec>(p.signs, i));
    }
    if constexpr (!kStochastic && !kQuest && !kClipMask) {
        return quantize_rotated(v, p.quantizer);
    } else {
        hadamard32(v);
        const uint32_t amax = amax_bits(v);
        Mxfp4Vec<kVec> out = {};
        out.sf = mxfp4_scale(amax, p.quantizer.scale_addend, 0);
        if (out.sf == kE8m0Nan) return out;
        if constexpr (kQuest) {
            if (amax != 0) out.sf = quest_scale(v, amax);
        }
        int exponent = kE8m0Bias - static_cast<int>(out.sf);
        const float factor = kStochastic ? prescale(exponent) : 1.0f;
#pragma unroll
        for (int i = 0; i < kVec / kChunk; ++i) {
            float part[kChunk];
#pragma unroll
            for (int j = 0; j < kChunk; ++j)
                part[j] = __fmul_rn(v[kChunk * i + j], factor);
            out.codes[i] =
                encode<kQuest>(part, exponent, p.quantizer, first_chunk + i, mask + kChunk / 4 * i);
        }
        return out;
    }
}

template <Source kFrom, int kWords>
__device__ __forceinline__ bool quantize_packed(const uint32_t (&words)[kWords], float scale,
                                                const Quantizer& quantizer, Mxfp4Vec<kVec>& out) {
    if constexpr (kPacked && kFrom == kBf16) {
        out = quantize_bf16(words, quantizer);
        return true;
    } else if constexpr (kPacked && kFrom == kFp8) {
        return quantize_e4m3(words, scale, quantizer, out);
    }
    return false;
}

__device__ __forceinline__ void write(const QuantizeMxfp4Params& p, int vec, const Mxfp4Vec<kVec>& out) {
    p.qdata[vec] = pack4(out.codes);
    p.sf[vec] = static_cast<uint8_t>(out.sf);
}

// Any number of blocks of kThreads threads. A thread takes kVecsPerThread blocks of 32, and loads one while
// it works on the one before. Reads x once, but for FP8 whose scales are extreme, and writes every output
// once.
extern "C" __global__ void __launch_bounds__(kThreads, kThreadsPerSm / kThreads)
    quantize_mxfp4(const __grid_constant__ QuantizeMxfp4Params p) {
    Input next = read(p, vec_of(0));
    uint32_t left = 0;
#pragma unroll 1
    for (int i = 0; i < kVecsPerThread; ++i) {
        const int vec = vec_of(i);
        const Input in = next;
        if (i + 1 < kVecsPerThread) next = read(p, vec_of(i + 1));
        if (vec >= p.num_vecs) continue;
        Mxfp4Vec<kVec> out;
        if constexpr (kPacked) {
            if (quantize_packed<kSource>(in.words, in.scale, p.quantizer, out)) {
                write(p, vec, out);
            } else {
                left |= 1u << i;
            }
        } else {
            uint32_t mask[kVec / 4] = {};
            const uint64_t first_chunk = static_cast<uint64_t>(vec) * (kVec / kChunk);
            if constexpr (kHadamard) {
                out = quantize_turned(p, in, first_chunk, mask);
            } else {
                out = quantize_plain<kSource>(in.words, in.scale, p.quantizer, first_chunk, mask);
            }
            write(p, vec, out);
            if constexpr (kClipMask) {
                p.clipped[2 * static_cast<int64_t>(vec)] = pack4(mask);
                p.clipped[2 * static_cast<int64_t>(vec) + 1] = pack4(mask + 4);
            }
        }
    }
    // Read again rather than kept, which would take registers from the fast way.
    if constexpr (kPacked && kSource == kFp8) {
        for (; left != 0; left &= left - 1) {
            const int vec = vec_of(__ffs(left) - 1);
            const Input again = read(p, vec);
            uint32_t mask[kVec / 4];
            write(p, vec, quantize_plain<kSource>(again.words, again.scale, p.quantizer, 0, mask));
        }
    }
}
