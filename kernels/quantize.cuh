// The codec's encoder: MXFP4 from floats, bf16 and FP8. Lanes and bits as in mxfp4.cuh.
#pragma once

#include "mxfp4.cuh"
#include "stand_in.cuh"

constexpr uint32_t kMinNormalBits = 1u << 23;
constexpr uint32_t kHalfInfinityBits = 0x7c00u;
constexpr uint32_t kMaxPackedScale = 248;              // the factor of a tenth is still a normal bf16
constexpr uint32_t kSafeLowBits = (127 - 90) << 23;    // 2^-90
constexpr uint32_t kSafeHighBits = (127 + 100) << 23;  // 2^100
constexpr float kQuestSquare = static_cast<float>((2.92247856 / 6.0) * (2.92247856 / 6.0));
constexpr int kQuestMaxBelowFloor = 2;
constexpr float kE2m1Max = 6.0f;
constexpr float kUnbiasedFactor = 0.75f;

struct Quantizer {
    uint32_t scale_addend;  // ScaleRule.addend
    uint32_t seed_low;
    uint32_t seed_high;
    uint32_t subsequence;
};

// Philox4x32-7 (Salmon et al., SC 2011).
__device__ __forceinline__ uint4 philox4x32(uint4 c, uint32_t k0, uint32_t k1) {
#pragma unroll
    for (int round = 0; round < 7; ++round) {
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

// QUEST's scale byte of a block that is finite and not all zero: twice the exponent looked for is that of the
// variance times kQuestSquare. Sums are of neighbours, pairs of neighbours, and so on.
template <int N>
__device__ __forceinline__ uint32_t quest_scale(const float (&v)[N], uint32_t amax) {
    const int exponent = max(static_cast<int>(amax >> 23) - 127, -126);
    const float factor = pow2(-exponent);
    float sums[N], squares[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        sums[i] = __fmul_rn(v[i], factor);
        squares[i] = __fmul_rn(sums[i], sums[i]);
    }
#pragma unroll
    for (int stride = 1; stride < N; stride *= 2) {
#pragma unroll
        for (int i = 0; i < N; i += 2 * stride) {
            sums[i] = __fadd_rn(sums[i], sums[i + stride]);
            squares[i] = __fadd_rn(squares[i], squares[i + stride]);
        }
    }
    float sum = sums[0], square = squares[0];
    if constexpr (kLanesPerBlock<N> == 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, 1));
        square = __fadd_rn(square, __shfl_xor_sync(kAllLanes, square, 1));
    }
    const float mean = __fmul_rn(sum, 1.0f / kBlockSize);
    const float variance = __fsub_rn(__fmul_rn(square, 1.0f / kBlockSize), __fmul_rn(mean, mean));
    const int twice = static_cast<int>(__float_as_uint(__fmul_rn(variance, kQuestSquare)) >> 23) - 127;
    const int quest = exponent + kE8m0Bias + (twice >> 1);
    const int floor = min(max(exponent - 2 + kE8m0Bias, 0), kE8m0Max);
    if (!(variance > 0.0f) || quest < floor - kQuestMaxBelowFloor) return floor;
    return min(max(quest, 0), kE8m0Max);
}

// Packs eight codes, byte kByte of the words `codes`, with signs that are the tops of bytes.
template <int kByte>
__device__ __forceinline__ uint32_t pack_codes(const uint32_t* codes, uint32_t even_signs,
                                               uint32_t odd_signs) {
    constexpr uint32_t kPick = kByte | (4 + kByte) << 4;
    const uint32_t even =
        __byte_perm(__byte_perm(codes[0], codes[2], kPick), __byte_perm(codes[4], codes[6], kPick), 0x5410u);
    const uint32_t odd =
        __byte_perm(__byte_perm(codes[1], codes[3], kPick), __byte_perm(codes[5], codes[7], kPick), 0x5410u);
    return (odd * 16 + even) | (even_signs >> 4 & 0x08080808u) | (odd_signs & 0x80808080u);
}

// The same with the signs of eight floats.
template <int kByte>
__device__ __forceinline__ uint32_t pack_codes(const uint32_t* codes, const float* v) {
    uint32_t tops[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int first = i / 2 * 4 + i % 2;
        tops[i] = __byte_perm(__float_as_uint(v[first]), __float_as_uint(v[first + 2]), 0x0073u);
    }
    return pack_codes<kByte>(codes, __byte_perm(tops[0], tops[2], 0x5410u),
                             __byte_perm(tops[1], tops[3], 0x5410u));
}

// The same with the signs of four words of bf16.
template <int kByte>
__device__ __forceinline__ uint32_t pack_codes(const uint32_t* codes, const uint32_t* bf16) {
    const uint32_t low = __byte_perm(bf16[0], bf16[1], 0x7351u),
                   high = __byte_perm(bf16[2], bf16[3], 0x7351u);
    return pack_codes<kByte>(codes, __byte_perm(low, high, 0x5410u), __byte_perm(low, high, 0x7632u));
}

// Packs the codes of packed 16-bit numbers, each in the low byte of a half of `codes`, with their signs.
template <int kWords>
__device__ __forceinline__ void pack_codes16(const uint32_t (&codes)[4 * kWords],
                                             const uint32_t (&numbers)[4 * kWords],
                                             uint32_t (&packed)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        uint32_t nibbles[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            nibbles[j] = codes[4 * i + j] | (numbers[4 * i + j] >> 12 & 0x00080008u);
        const uint32_t first = __byte_perm(nibbles[0], nibbles[1], 0x6240u);
        const uint32_t second = __byte_perm(nibbles[2], nibbles[3], 0x6240u);
        packed[i] = __byte_perm(first, second, 0x7632u) * 16 + __byte_perm(first, second, 0x5410u);
    }
}

// Codes of v * factor, to the nearest, ties to even.
//
// That is the least of three lines, 2x, x + 2 and x / 10 + 6, each rounded to an integer by an addend whose
// last bit is worth 1; 0x1.999998p-4 is the float below 1/10, so that x = 5, half way, still goes to 4. It
// holds below x = 15, which kSaturate ensures where a clamped scale byte does not. Floats above 0 order like
// their bits, and ptxas takes the least of three integers in one instruction.
template <bool kSaturate, int N>
__device__ __forceinline__ void nearest_codes(const float (&v)[N], float factor, uint32_t (&packed)[N / 8]) {
    uint32_t codes[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float x = __fmul_rn(fabsf(v[i]), factor);
        if constexpr (kSaturate) x = fminf(x, 8.0f);
        const float line0 = __fmaf_rn(x, 2.0f, 0x1p23f);
        const float line1 = __fadd_rn(x, 0x1p23f + 2.0f);
        const float line2 = __fmaf_rn(x, 0x1.999998p-4f, 0x1p23f + 6.0f);
        codes[i] = min(min(__float_as_uint(line0), __float_as_uint(line1)), __float_as_uint(line2));
    }
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
        packed[i] = pack_codes<0>(codes + 8 * i, v + 8 * i);
}

// 2^exponent for exponents of -149 (subnormal) to 127.
__device__ __forceinline__ float tiny_pow2(int exponent) {
    return exponent < -126 ? __uint_as_float(1u << (exponent + 149)) : pow2(exponent);
}

// What to multiply by before stochastic_codes, which takes no exponent below kLeastExponent: a power of two
// that is taken off the exponent. What it makes subnormal is 0 in the end.
constexpr int kLeastExponent = 126 - 149 + 8;
constexpr int kPrescale = 120;
__device__ __forceinline__ float prescale(int& exponent) {
    const bool large = exponent < kLeastExponent;
    exponent += large ? kPrescale : 0;
    return large ? pow2(-kPrescale) : 1.0f;
}

constexpr int kStochasticByte = 3;

// Codes of eight elements, v * 2^exponent, times 3/4 if kUnbiased, in bytes kStochasticByte: up with a
// probability equal to the position between neighbours. Element 0 of v is element 8 * chunk of its tensor.
//
// E2M1 is a float of two exponent bits and one mantissa bit, so the position of x on the axis of codes is the
// bit pattern of x * 2^-126 as a float, over 2^22: its subnormals are E2M1's subnormals. Rounded down to
// 2^-22, which what follows cannot tell from the exact position, and cut at 7 if kClamps, it gets 16 random
// bits added below its point, and the code is what stands above it.
template <bool kUnbiased, bool kClamps>
__device__ __forceinline__ void stochastic_codes(const float (&v)[8], int exponent,
                                                 const Quantizer& quantizer, uint64_t chunk,
                                                 uint32_t (&codes)[8]) {
    constexpr uint32_t kLast = 7u << 22;
    const float factor = __fmul_rn(tiny_pow2(exponent - 126), kUnbiased ? kUnbiasedFactor : 1.0f);
    const uint4 counter = make_uint4(static_cast<uint32_t>(chunk), static_cast<uint32_t>(chunk >> 32),
                                     quantizer.subsequence, 0);
    const uint4 r = philox4x32(counter, quantizer.seed_low, quantizer.seed_high);
    const uint32_t random[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        uint32_t position = __float_as_uint(__fmul_rd(fabsf(v[i]), factor));
        if constexpr (kClamps) position = min(position, kLast);
        codes[i] = position * 4 + __byte_perm(random[i / 2], 0, i % 2 == 0 ? 0x4104u : 0x4324u);
    }
}

// Which of v * factor are at least 6: byte i is 1 or 0.
template <int N>
__device__ __forceinline__ void clipped(const float (&v)[N], float factor, uint32_t* mask) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const uint32_t bit = __fmul_rn(fabsf(v[i]), factor) >= kE2m1Max ? 1u << (8 * (i % 4)) : 0;
        mask[i / 4] = i % 4 == 0 ? bit : mask[i / 4] | bit;
    }
}

// Quantizes v * 2^offset, element 0 of v being element `index` of its tensor (its row times hidden plus its
// column). Changes v.
template <bool kStochastic, bool kSaturate, int N>
__device__ __forceinline__ Mxfp4Vec<N> quantize_mxfp4(float (&v)[N], int offset, const Quantizer& quantizer,
                                                      uint64_t index) {
    const uint32_t amax = max_over_lanes<kLanesPerBlock<N>>(amax_bits(v));
    Mxfp4Vec<N> out = {};
    out.sf = mxfp4_scale(amax, quantizer.scale_addend, offset);
    if (out.sf == kE8m0Nan) return out;
    int exponent = kE8m0Bias - static_cast<int>(out.sf) + (amax == 0 ? 0 : offset);
    if constexpr (kStochastic) {
        const float factor = prescale(exponent);
#pragma unroll
        for (int i = 0; i < N / 8; ++i) {
            float part[8];
            uint32_t codes[8];
#pragma unroll
            for (int j = 0; j < 8; ++j)
                part[j] = __fmul_rn(v[8 * i + j], factor);
            stochastic_codes<false, true>(part, exponent, quantizer, index / 8 + i, codes);
            out.codes[i] = pack_codes<kStochasticByte>(codes, part);
        }
    } else {
        nearest_codes<kSaturate>(v, pow2(exponent), out.codes);
    }
    return out;
}

// Rotates and quantizes to the nearest. The rotation's last multiplication and the scale's are one where
// neither can leave the normal numbers. Changes v.
template <int N>
__device__ __forceinline__ Mxfp4Vec<N> quantize_rotated(float (&v)[N], const Quantizer& quantizer) {
    const uint32_t sums = hadamard32_sums_amax(v);
    const uint32_t amax = __float_as_uint(__fmul_rn(__uint_as_float(sums), kHadamardNorm));
    Mxfp4Vec<N> out = {};
    out.sf = mxfp4_scale(amax, quantizer.scale_addend, 0);
    if (out.sf == kE8m0Nan) return out;
    float factor = pow2(kE8m0Bias - static_cast<int>(out.sf));
    if (amax - kSafeLowBits < kSafeHighBits - kSafeLowBits) {
        factor = __fmul_rn(factor, kHadamardNorm);
    } else {
        multiply(v, kHadamardNorm);
    }
    nearest_codes<false>(v, factor, out.codes);
    return out;
}

// Quantizes bf16 to the nearest, two elements an instruction: the three lines of nearest_codes as packed
// fused multiply-adds onto 128, whose last bit is worth 1, with the scale in the factor. Scale bytes whose
// factors bf16 cannot hold take the float32 way.
template <int kWords>
__device__ __forceinline__ Mxfp4Vec<2 * kWords> quantize_bf16(const uint32_t (&words)[kWords],
                                                              const Quantizer& quantizer) {
    constexpr int N = 2 * kWords;
    uint32_t magnitudes[kWords], codes[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i)
        magnitudes[i] = words[i] & 0x7fff7fffu;
    const uint32_t amax = max_over_lanes<kLanesPerBlock<N>>(amax_u16x2(magnitudes) << 16);
    Mxfp4Vec<N> out = {};
    out.sf = mxfp4_scale(amax, quantizer.scale_addend, 0);
    if (out.sf == kE8m0Nan) return out;
    if ((out.sf == 0 && amax != 0) || out.sf > kMaxPackedScale) {
        float v[N];
        decode_bf16(words, v);
        nearest_codes<false>(v, pow2(kE8m0Bias - static_cast<int>(out.sf)), out.codes);
        return out;
    }
    const int shift = (kE8m0Bias - static_cast<int>(max(out.sf, 1u))) * 128;
    const uint32_t by2 = (0x4000 + shift) * 0x10001u, by1 = (0x3f80 + shift) * 0x10001u;
    const uint32_t by_tenth = (0x3dcc + shift) * 0x10001u;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        const uint32_t x = magnitudes[i];
        const uint32_t line0 = fma_bf16x2(x, by2, 0x43004300u), line1 = fma_bf16x2(x, by1, 0x43024302u);
        codes[i] = min_u16x2(min_u16x2(line0, line1), fma_bf16x2(x, by_tenth, 0x43064306u));
    }
    pack_codes16(codes, words, out.codes);
    return out;
}

// Exponent of a float that is a normal power of two.
__device__ __forceinline__ bool power_of_two(float scale, int& exponent) {
    const uint32_t bits = __float_as_uint(scale);
    exponent = static_cast<int>(bits >> 23) - 127;
    return (bits & 0x007fffffu) == 0 && bits - 1 < kInfinityBits - 1;
}

// The product rounded to odd, which no later rounding to fewer bits can tell from the exact one. Not for
// products below the normal numbers.
__device__ __forceinline__ float multiply_to_odd(float a, float b) {
    const float product = __fmul_rz(a, b);
    const bool inexact = __fmaf_rn(a, b, -product) != 0.0f;
    return __uint_as_float(__float_as_uint(product) | (inexact ? 1u : 0u));
}

// Packs the codes of two E4M3 words, each in the low byte of a half of `codes`, with their signs.
__device__ __forceinline__ uint32_t pack_codes_e4m3(const uint32_t* codes, const uint32_t* words) {
    const uint32_t first = __byte_perm(codes[0], codes[1], 0x6420u) | (words[0] >> 4 & 0x08080808u);
    const uint32_t second = __byte_perm(codes[2], codes[3], 0x6420u) | (words[1] >> 4 & 0x08080808u);
    return __byte_perm(first, second, 0x7531u) * 16 + __byte_perm(first, second, 0x6420u);
}

// Quantizes FP8 to the nearest, two elements an instruction, as bf16 above but in FP16, onto 1024, and with
// stand-ins for the scale's mantissa. Returns false, with no result, where the scale is no normal number
// above 0, a code is NaN or the scale byte would have to be clamped; the lanes of a block agree.
template <int kWords>
__device__ __forceinline__ bool quantize_e4m3(const uint32_t (&words)[kWords], float scale,
                                              const Quantizer& quantizer, Mxfp4Vec<4 * kWords>& out) {
    constexpr int N = 4 * kWords;
    const uint32_t scale_bits = __float_as_uint(scale);
    const int exponent = static_cast<int>(scale_bits >> kMantissaBits) - 127;
    const uint32_t mantissa = scale_bits & ((1u << kMantissaBits) - 1);
    const uint4* cells = reinterpret_cast<const uint4*>(kStandIns.cells);
    const uint4 cell = __ldg(cells + mantissa / ((1u << kMantissaBits) / kStandInCells));
    const uint32_t stand_in = mantissa < cell.x ? cell.y : cell.z;  // StandIn's bound, below and above
    uint32_t magnitudes[N / 2], codes[N / 2];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        const uint32_t bytes = words[i] & kE4m3NanWord;
        magnitudes[2 * i] = e4m3x2_to_f16x2(bytes);
        magnitudes[2 * i + 1] = e4m3x2_to_f16x2(bytes >> 16);
    }
    const uint32_t amax = max_over_lanes<kLanesPerBlock<N>>(amax_u16x2(magnitudes));
    // An E4M3 code is a normal FP16: here with the exponent and mantissa of a float.
    const float largest = __uint_as_float((amax << 13) + ((127 - 15) << kMantissaBits));
    const float product = multiply_to_odd(largest, __uint_as_float(mantissa | 127 << kMantissaBits));
    const uint32_t rounded = __float_as_uint(product) + quantizer.scale_addend;
    const int binade =
        amax == 0 ? -exponent - kE8m0Bias : static_cast<int>(rounded >> kMantissaBits) - kE8m0Bias - 2;
    out.sf = static_cast<uint32_t>(binade + exponent + kE8m0Bias);
    const int shift = amax == 0 ? 0 : -binade * 1024;
    const uint32_t by1 = __byte_perm(stand_in, 0, 0x1010u) + shift * 0x10001u;
    const uint32_t by2 = by1 + 0x04000400u;
    const uint32_t by_tenth = __byte_perm(stand_in, 0, 0x3232u) + shift * 0x10001u;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const uint32_t x = magnitudes[i];
        const uint32_t line0 = fma_f16x2(x, by2, 0x64006400u), line1 = fma_f16x2(x, by1, 0x64026402u);
        codes[i] = min_u16x2(min_u16x2(line0, line1), fma_f16x2(x, by_tenth, 0x64066406u));
    }
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
        out.codes[i] = pack_codes_e4m3(codes + 4 * i, words + 2 * i);
    return scale_bits - kMinNormalBits < kInfinityBits - kMinNormalBits && amax < kHalfInfinityBits &&
           out.sf <= kE8m0Max;
}

// Splits an FP8 group's scale into a mantissa, with which to multiply the codes, and an exponent; after it, v
// holds data * mantissa rounded to odd.
template <int N>
__device__ __forceinline__ int scale_to_odd(float (&v)[N], float scale) {
    if (!isfinite(scale) || scale == 0.0f) {
#pragma unroll
        for (int i = 0; i < N; ++i)
            v[i] = isfinite(scale) ? __fmul_rn(v[i], scale) : __uint_as_float(kNanBits);
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
    for (int i = 0; i < N; ++i) {
        v[i] = multiply_to_odd(v[i], mantissa);
    }
    return exponent;
}
