// The codec. A lane holds kVec = 16 consecutive elements of a token, so two neighbouring lanes share an MX
// block and eight share an FP8 group; every function with a shuffle needs the whole warp. Bits as in
// qcomm/reference.py.
#pragma once

#include "ptx.cuh"

constexpr int kVec = 16;
constexpr int kLanesPerBlock = 2;
constexpr int kLanesPerGroup = 8;
constexpr uint32_t kAllLanes = 0xffffffffu;

constexpr int kE8m0Bias = 127;
constexpr int kE8m0Max = 254;
constexpr uint32_t kE8m0Nan = 255;
constexpr int kAlignExponent = 6;
constexpr int kExactDistance = 14;
constexpr uint32_t kMaxPackedScale = 248;  // the factor of a tenth is still a normal bf16
constexpr int kMinScaleExponent = -126;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kE4m3NanWord = 0x7f7f7f7fu;

struct Mxfp4Vec {
    uint2 codes;  // element i in nibble i
    uint32_t sf;  // E8M0, the same on both lanes of a block
};

struct Fp8Vec {
    uint4 data;   // element i in byte i
    float scale;  // the same on all lanes of a group
};

struct Quantizer {
    uint32_t scale_addend;  // ScaleRule.addend
    uint32_t seed_low;
    uint32_t seed_high;
    uint32_t subsequence;
};

// 2^exponent for exponents of -127 (subnormal) to 127.
__device__ __forceinline__ float pow2(int exponent) {
    return __uint_as_float(exponent < -126 ? 0x00400000u : static_cast<uint32_t>(exponent + 127) << 23);
}

template <int kLanes>
__device__ __forceinline__ uint32_t max_over_lanes(uint32_t v) {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2)
        v = max(v, __shfl_xor_sync(kAllLanes, v, step));
    return v;
}

// Bits of the largest magnitude; as integers, float magnitudes order like their values, and NaN above
// infinity.
__device__ __forceinline__ uint32_t amax_bits(const float (&v)[kVec]) {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
        amax = max(amax, __float_as_uint(v[i]) & 0x7fffffffu);
    return amax;
}

// Decoding to float32.

__device__ __forceinline__ void decode_bf16(const uint4& low, const uint4& high, float (&v)[kVec]) {
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        v[2 * i] = __uint_as_float(words[i] << 16);
        v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void decode_e4m3(const uint4& data, float (&v)[kVec]) {
    const uint32_t words[4] = {data.x, data.y, data.z, data.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 low = from_e4m3x2(words[i] & 0xffffu), high = from_e4m3x2(words[i] >> 16);
        v[4 * i] = low.x;
        v[4 * i + 1] = low.y;
        v[4 * i + 2] = high.x;
        v[4 * i + 3] = high.y;
    }
}

__device__ __forceinline__ void decode_fp8(const uint4& data, float scale, float (&v)[kVec]) {
    decode_e4m3(data, v);
#pragma unroll
    for (int i = 0; i < kVec; ++i)
        v[i] = __fmul_rn(v[i], scale);
}

__device__ __forceinline__ void decode_mxfp4(uint2 codes, uint32_t sf, float (&v)[kVec]) {
    const float scale =
        sf == kE8m0Nan ? __uint_as_float(0x7fffffffu) : pow2(static_cast<int>(sf) - kE8m0Bias);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        const uint32_t code = (i < 8 ? codes.x : codes.y) >> (4 * (i % 8));
        // E2M1 bits at the bottom of a float's exponent: the value times 2^-126.
        const float tiny = __uint_as_float((code & 7) << 22 | (code & 8) << 28);
        v[i] = __fmul_rn(__fmul_rn(tiny, 0x1p126f), scale);
    }
}

// The normalised Hadamard rotation of 32 elements, strides 1 to 16 in order; its own inverse.
__device__ __forceinline__ void hadamard32(float (&v)[kVec]) {
#pragma unroll
    for (int stride = 1; stride < kVec; stride *= 2) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            if ((i & stride) == 0) {
                const float a = v[i], b = v[i + stride];
                v[i] = __fadd_rn(a, b);
                v[i + stride] = __fsub_rn(a, b);
            }
        }
    }
    const bool second = threadIdx.x & 1;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        const float other = __shfl_xor_sync(kAllLanes, v[i], 1);
        v[i] = __fmul_rn(second ? __fsub_rn(other, v[i]) : __fadd_rn(v[i], other), 0x1.6a09e6p-3f);
    }
}

// Encoding from float32.

__device__ __forceinline__ void encode_bf16(const float (&v)[kVec], uint4& low, uint4& high) {
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
        words[i] = to_bf16x2(v[2 * i], v[2 * i + 1]);
    low = make_uint4(words[0], words[1], words[2], words[3]);
    high = make_uint4(words[4], words[5], words[6], words[7]);
}

__device__ __forceinline__ uint4 encode_e4m3(const float (&v)[kVec], float factor) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = to_e4m3x2(__fmul_rn(v[4 * i], factor), __fmul_rn(v[4 * i + 1], factor));
        const uint32_t high = to_e4m3x2(__fmul_rn(v[4 * i + 2], factor), __fmul_rn(v[4 * i + 3], factor));
        words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Exponent of the smallest power of two that brings a magnitude to at most 448; the least for zero and
// non-finite.
__device__ __forceinline__ int fp8_scale_exponent(uint32_t amax) {
    if (amax >= kInfinityBits) return kMinScaleExponent;
    const int exponent =
        static_cast<int>(amax >> 23) - 127 - 8 + ((amax & 0x007fffffu) > 0x00600000u ? 1 : 0);
    return max(exponent, kMinScaleExponent);
}

__device__ __forceinline__ Fp8Vec quantize_fp8(const float (&v)[kVec]) {
    const uint32_t amax = max_over_lanes<kLanesPerGroup>(amax_bits(v));
    const int exponent = fp8_scale_exponent(amax);
    Fp8Vec out;
    out.scale = pow2(exponent);
    out.data = encode_e4m3(v, pow2(-exponent));
    if (amax >= kInfinityBits) out.data = make_uint4(kE4m3NanWord, kE4m3NanWord, kE4m3NanWord, kE4m3NanWord);
    return out;
}

// Philox4x32-10 (Salmon et al., SC 2011).
__device__ __forceinline__ uint4 philox4x32(uint4 c, uint32_t k0, uint32_t k1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xd2511f53u, c.x), low0 = 0xd2511f53u * c.x;
        const uint32_t high1 = __umulhi(0xcd9e8d57u, c.z), low1 = 0xcd9e8d57u * c.z;
        c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c;
}

// Scale byte of a block whose largest magnitude, times 2^-offset, has the given float bits; 255 if not
// finite.
__device__ __forceinline__ uint32_t mxfp4_scale(uint32_t amax, uint32_t addend, int offset) {
    if (amax >= kInfinityBits) return kE8m0Nan;
    const int rounded = static_cast<int>((amax + addend) >> 23) - 2 + offset;
    return amax == 0 ? 0 : static_cast<uint32_t>(min(max(rounded, 0), kE8m0Max));
}

// Codes of v * factor, to the nearest, ties to even.
//
// That is the least of three lines, 2x, x + 2 and x / 10 + 6, each rounded to an integer by an addend whose
// last bit is worth 1; 0x1.999998p-4 is the float below 1/10, so that x = 5, half way, still goes to 4. It
// holds below x = 15, which kSaturate ensures where a clamped scale byte does not.
template <bool kSaturate>
__device__ __forceinline__ uint2 nearest_codes(const float (&v)[kVec], float factor) {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        float x = __fmul_rn(fabsf(v[i]), factor);
        if constexpr (kSaturate) x = fminf(x, 8.0f);
        const float line0 = __fmaf_rn(x, 2.0f, 0x1p23f);
        const float line1 = __fadd_rn(x, 0x1p23f + 2.0f);
        const float line2 = __fmaf_rn(x, 0x1.999998p-4f, 0x1p23f + 6.0f);
        const uint32_t code = __float_as_uint(fminf(fminf(line0, line1), line2)) & 7u;
        words[i / 8] |= (code | (__float_as_uint(v[i]) >> 28 & 8u)) << (4 * (i % 8));
    }
    return make_uint2(words[0], words[1]);
}

// Codes of v * factor, up with a probability equal to the position between neighbours; element 0 of v is
// element `index` of its tensor. The position is the least of 2x, x + 2, x / 2 + 4 and 7, rounded down where
// it rounds, which together with 16 random bits cannot reach the next integer too early.
__device__ __forceinline__ uint2 stochastic_codes(const float (&v)[kVec], float factor,
                                                  const Quantizer& quantizer, uint64_t index) {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint64_t chunk = index / 8 + half;
        const uint4 counter = make_uint4(static_cast<uint32_t>(chunk), static_cast<uint32_t>(chunk >> 32),
                                         quantizer.subsequence, 0);
        const uint4 r = philox4x32(counter, quantizer.seed_low, quantizer.seed_high);
        const uint32_t random[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float value = v[8 * half + i];
            const float x = __fmul_rn(fabsf(value), factor);
            const float u =
                static_cast<float>(i % 2 == 0 ? random[i / 2] & 0xffffu : random[i / 2] >> 16) * 0x1p-16f;
            const float upper = fminf(__fadd_rd(x, 2.0f), __fmaf_rd(x, 0.5f, 4.0f));
            const float position = fminf(fminf(__fadd_rn(x, x), upper), 7.0f);
            const uint32_t code = static_cast<uint32_t>(__float2int_rd(__fadd_rd(position, u)));
            words[half] |= (code | (__float_as_uint(value) >> 28 & 8u)) << (4 * i);
        }
    }
    return make_uint2(words[0], words[1]);
}

// Quantizes v * 2^offset, element 0 of v being element `index` of its tensor (its row times hidden plus its
// column).
template <bool kStochastic, bool kSaturate>
__device__ __forceinline__ Mxfp4Vec quantize_mxfp4(const float (&v)[kVec], int offset,
                                                   const Quantizer& quantizer, uint64_t index) {
    const uint32_t amax = max_over_lanes<kLanesPerBlock>(amax_bits(v));
    Mxfp4Vec out;
    out.sf = mxfp4_scale(amax, quantizer.scale_addend, offset);
    if (out.sf == kE8m0Nan) {
        out.codes = make_uint2(0, 0);
        return out;
    }
    const float factor = pow2(kE8m0Bias - static_cast<int>(out.sf) + (amax == 0 ? 0 : offset));
    if constexpr (kStochastic) {
        out.codes = stochastic_codes(v, factor, quantizer, index);
    } else {
        out.codes = nearest_codes<kSaturate>(v, factor);
    }
    return out;
}

// Quantizes bf16 to the nearest, two elements an instruction: the three lines of nearest_codes as packed
// fused multiply-adds onto 128, whose last bit is worth 1, with the scale in the factor. Scale bytes whose
// factors bf16 cannot hold take the float32 way.
__device__ __forceinline__ Mxfp4Vec quantize_mxfp4(const uint4& low, const uint4& high,
                                                   const Quantizer& quantizer) {
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    uint32_t packed_max = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        packed_max = max_u16x2(packed_max, words[i] & 0x7fff7fffu);
    const uint32_t amax = max_over_lanes<kLanesPerBlock>(max(packed_max << 16, packed_max & 0xffff0000u));
    Mxfp4Vec out;
    out.sf = mxfp4_scale(amax, quantizer.scale_addend, 0);
    if (out.sf == kE8m0Nan) {
        out.codes = make_uint2(0, 0);
        return out;
    }
    if ((out.sf == 0 && amax != 0) || out.sf > kMaxPackedScale) {
        float v[kVec];
        decode_bf16(low, high, v);
        out.codes = nearest_codes<false>(v, pow2(kE8m0Bias - static_cast<int>(out.sf)));
        return out;
    }
    const int shift = (kE8m0Bias - static_cast<int>(max(out.sf, 1u))) * 128;
    const uint32_t by2 = (0x4000 + shift) * 0x10001u, by1 = (0x3f80 + shift) * 0x10001u;
    const uint32_t by_tenth = (0x3dcc + shift) * 0x10001u;
    uint32_t bytes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t x = words[i] & 0x7fff7fffu;
        const uint32_t line0 = fma_bf16x2(x, by2, 0x43004300u), line1 = fma_bf16x2(x, by1, 0x43024302u);
        const uint32_t line2 = fma_bf16x2(x, by_tenth, 0x43064306u);
        const uint32_t codes =
            (min_u16x2(min_u16x2(line0, line1), line2) & 0x00070007u) | (words[i] >> 12 & 0x00080008u);
        bytes[i] = codes | codes >> 12;
    }
    out.codes.x = __byte_perm(__byte_perm(bytes[0], bytes[1], 0x0040u),
                              __byte_perm(bytes[2], bytes[3], 0x0040u), 0x5410u);
    out.codes.y = __byte_perm(__byte_perm(bytes[4], bytes[5], 0x0040u),
                              __byte_perm(bytes[6], bytes[7], 0x0040u), 0x5410u);
    return out;
}

// Splits an FP8 group's scale into a mantissa, with which to multiply the codes, and an exponent; after it, v
// holds data * mantissa rounded to odd, which no later rounding to fewer bits can tell from the exact
// product.
__device__ __forceinline__ int scale_to_odd(float (&v)[kVec], float scale) {
    if (!isfinite(scale) || scale == 0.0f) {
#pragma unroll
        for (int i = 0; i < kVec; ++i)
            v[i] = isfinite(scale) ? __fmul_rn(v[i], scale) : __uint_as_float(0x7fffffffu);
        return 0;
    }
    int exponent = 0;
    if (fabsf(scale) < 0x1p-126f) {
        scale *= 0x1p64f;
        exponent = -64;
    }
    const uint32_t bits = __float_as_uint(scale);
    exponent += static_cast<int>(bits >> 23 & 0xffu) - 127;
    const float mantissa = __uint_as_float((bits & 0x807fffffu) | 0x3f800000u);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        const float product = __fmul_rz(v[i], mantissa);
        const bool inexact = __fmaf_rn(v[i], mantissa, -product) != 0.0f;
        v[i] = __uint_as_float(__float_as_uint(product) | (inexact ? 1u : 0u));
    }
    return exponent;
}

// FP4 to FP8 by exponent alignment.

// E4M3 codes of the magnitudes 0 to 6 times 2^(6 - distance), in subnormal units of 2^-9 with ties to even:
// four of them from code `first` on. For distances of 12 to 18, where the table of normal codes ends; further
// down all are 0.
__host__ __device__ constexpr uint32_t tail_codes(int distance, int first) {
    const int halves[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
        const int shift = kAlignExponent - distance + 8;
        int units = 0;
        if (shift >= 0) {
            units = halves[first + i] << shift;
        } else {
            const int value = halves[first + i], half = 1 << (-shift - 1), floor = value >> -shift;
            const int rest = value - (floor << -shift);
            units = floor + (rest > half || (rest == half && floor % 2 == 1) ? 1 : 0);
        }
        const int code = units < 16 ? units : units < 32 ? 16 + (units - 16) / 2 : 24 + (units - 32) / 4;
        word |= static_cast<uint32_t>(code) << (8 * i);
    }
    return word;
}

constexpr int kFirstTailDistance = 12;
constexpr int kLastTailDistance = 18;

static __constant__ uint32_t kTail[kLastTailDistance - kFirstTailDistance + 2][2] = {
    {tail_codes(12, 0), tail_codes(12, 4)}, {tail_codes(13, 0), tail_codes(13, 4)},
    {tail_codes(14, 0), tail_codes(14, 4)}, {tail_codes(15, 0), tail_codes(15, 4)},
    {tail_codes(16, 0), tail_codes(16, 4)}, {tail_codes(17, 0), tail_codes(17, 4)},
    {tail_codes(18, 0), tail_codes(18, 4)}, {0, 0},
};

__device__ __forceinline__ bool any_nonzero(uint2 codes) {
    return ((codes.x | codes.y) & 0x77777777u) != 0;
}

// Whether a block takes part in an alignment: not if it is all zero or NaN.
__device__ __forceinline__ bool takes_part(uint2 codes, uint32_t sf) {
    return max_over_lanes<kLanesPerBlock>(any_nonzero(codes)) != 0 && sf != kE8m0Nan;
}

// Scale byte that maps to 2^6, given the largest that takes part.
__device__ __forceinline__ uint32_t alignment_top(uint32_t largest) {
    return max(largest, static_cast<uint32_t>(kMinScaleExponent + kAlignExponent + kE8m0Bias));
}

__device__ __forceinline__ float alignment_scale(uint32_t top) {
    return pow2(static_cast<int>(top) - kE8m0Bias - kAlignExponent);
}

// Four E4M3 codes from the low four nibbles of `codes`.
__device__ __forceinline__ uint32_t shift_codes(uint32_t codes, uint32_t low, uint32_t high) {
    const uint32_t magnitudes = __byte_perm(low, high, codes & 0x7777u);
    const uint32_t signs = __byte_perm(codes, codes << 4, 0x1504u);
    return magnitudes | (signs & 0x80808080u);
}

// Sixteen E4M3 codes of a block whose scale byte lies `top - sf` below the byte that maps to 2^6.
__device__ __forceinline__ uint4 align_codes(uint2 codes, uint32_t sf, uint32_t top) {
    if (sf == kE8m0Nan) return make_uint4(kE4m3NanWord, kE4m3NanWord, kE4m3NanWord, kE4m3NanWord);
    const int distance = max(static_cast<int>(top) - static_cast<int>(sf), 0);
    uint32_t low, high;
    if (distance < kFirstTailDistance) {
        const uint32_t shift = static_cast<uint32_t>(kAlignExponent - distance);
        low = 0x3c383000u + shift * 0x08080800u;
        high = 0x4c484440u + shift * 0x08080808u;
    } else {
        const int entry = min(distance, kLastTailDistance + 1) - kFirstTailDistance;
        low = kTail[entry][0];
        high = kTail[entry][1];
    }
    return make_uint4(shift_codes(codes.x, low, high), shift_codes(codes.x >> 16, low, high),
                      shift_codes(codes.y, low, high), shift_codes(codes.y >> 16, low, high));
}

// Converts a group; adds to `overflows`, on the first lane of a block, the blocks too far down to be exact.
__device__ __forceinline__ Fp8Vec mxfp4_to_fp8(uint2 codes, uint32_t sf, uint32_t& overflows) {
    const bool counts = takes_part(codes, sf);
    const uint32_t top = alignment_top(max_over_lanes<kLanesPerGroup>(counts ? sf : 0));
    if (counts && static_cast<int>(top - sf) > kExactDistance && threadIdx.x % kLanesPerBlock == 0)
        ++overflows;
    Fp8Vec out;
    out.data = align_codes(codes, sf, top);
    out.scale = alignment_scale(top);
    return out;
}
