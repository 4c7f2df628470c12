// The codec. A lane holds N consecutive elements, 16 or 32: two neighbouring lanes share an MX block or none
// do, and eight or four share an FP8 group. A function with a shuffle needs the whole warp. Bits as in
// qcomm/reference.py. Encoding is in quantize.cuh, conversion
// to FP8 in align.cuh.
#pragma once

#include "ptx.cuh"

constexpr int kBlockSize = 32;
constexpr int kGroupSize = 128;
template <int N>
constexpr int kLanesPerBlock = kBlockSize / N;
template <int N>
constexpr int kLanesPerGroup = kGroupSize / N;

constexpr int kE8m0Bias = 127;
constexpr int kE8m0Max = 254;
constexpr uint32_t kE8m0Nan = 255;
constexpr int kMinScaleExponent = -126;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fffffffu;
constexpr uint32_t kBf16Nan = 0x7fffu;
constexpr uint32_t kSignBits = 0x80808080u;
constexpr uint32_t kE4m3NanWord = 0x7f7f7f7fu;
constexpr float kUnbiasedInverse = static_cast<float>(1 / 0.75);
constexpr float kHadamardNorm = 0x1.6a09e6p-3f;  // 32^-0.5

template <int N>
struct Mxfp4Vec {
    uint32_t codes[N / 8];  // element i in nibble i
    uint32_t sf;            // E8M0, the same on all lanes of a block
};

template <int N>
struct Fp8Vec {
    uint32_t data[N / 4];  // element i in byte i
    float scale;           // the same on all lanes of a group
};

// 2^exponent for exponents of -127 (subnormal) to 127.
__device__ __forceinline__ float pow2(int exponent) {
    return __uint_as_float(exponent < -126 ? 0x00400000u : static_cast<uint32_t>(exponent + 127) << 23);
}

template <int N>
__device__ __forceinline__ void multiply(float (&v)[N], float factor) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        v[i] = __fmul_rn(v[i], factor);
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
template <int N>
__device__ __forceinline__ uint32_t amax_bits(const float (&v)[N]) {
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i)
        amax = max_abs(amax, v[i]);
    return __float_as_uint(amax) & kNanBits;
}

// The largest of packed 16-bit magnitudes.
template <int kWords>
__device__ __forceinline__ uint32_t amax_u16x2(const uint32_t (&magnitudes)[kWords]) {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i)
        amax = max_u16x2(amax, magnitudes[i]);
    return max(amax & 0xffffu, amax >> 16);
}

// Float bits of the largest bf16 magnitude. As unsigned integers negative numbers are the largest, and among
// them those of large magnitude; as signed ones they are the smallest. So no magnitude need be made.
template <int kWords>
__device__ __forceinline__ uint32_t amax_of_bf16(const uint32_t (&words)[kWords]) {
    uint32_t as_signed = words[0], as_unsigned = words[0];
#pragma unroll
    for (int i = 1; i < kWords; ++i) {
        as_signed = max_s16x2(as_signed, words[i]);
        as_unsigned = max_u16x2(as_unsigned, words[i]);
    }
    const uint32_t amax = max_s16x2(as_signed, as_unsigned & 0x7fff7fffu);
    return max(amax << 16, amax & 0xffff0000u);
}

// Four codes looked up in a table of the bytes of eight magnitudes, with their signs where `signs` has bits,
// which are tops of bytes.
__device__ __forceinline__ uint32_t look_up4(uint32_t codes, uint32_t table_low, uint32_t table_high,
                                             uint32_t signs) {
    return __byte_perm(table_low, table_high, codes & 0x7777u) |
           (__byte_perm(codes, codes << 4, 0x1504u) & signs);
}

// Eight codes: bytes of codes 0 to 3 and of codes 4 to 7.
__device__ __forceinline__ void look_up(uint32_t codes, uint32_t table_low, uint32_t table_high,
                                        uint32_t signs, uint32_t& first, uint32_t& second) {
    const uint32_t index = codes & 0x77777777u, shifted = codes << 4;
    first = __byte_perm(table_low, table_high, index) | (__byte_perm(codes, shifted, 0x1504u) & signs);
    second = __byte_perm(table_low, table_high, index >> 16) | (__byte_perm(codes, shifted, 0x3726u) & signs);
}

// Decoding.

template <int kWords>
__device__ __forceinline__ void decode_bf16(const uint32_t (&words)[kWords], float (&v)[2 * kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        v[2 * i] = __uint_as_float(words[i] << 16);
        v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

template <int kWords>
__device__ __forceinline__ void decode_e4m3(const uint32_t (&words)[kWords], float (&v)[4 * kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        const float2 low = from_e4m3x2(words[i] & 0xffffu), high = from_e4m3x2(words[i] >> 16);
        v[4 * i] = low.x;
        v[4 * i + 1] = low.y;
        v[4 * i + 2] = high.x;
        v[4 * i + 3] = high.y;
    }
}

template <int kWords>
__device__ __forceinline__ void decode_fp8(const uint32_t (&words)[kWords], float scale,
                                           float (&v)[4 * kWords]) {
    decode_e4m3(words, v);
    multiply(v, scale);
}

template <int kWords>
__device__ __forceinline__ void decode_mxfp4(const uint32_t (&codes)[kWords], uint32_t sf,
                                             float (&v)[8 * kWords]) {
    const float scale = sf == kE8m0Nan ? __uint_as_float(kNanBits) : pow2(static_cast<int>(sf) - kE8m0Bias);
#pragma unroll
    for (int i = 0; i < 8 * kWords; ++i) {
        const uint32_t code = codes[i / 8] >> (4 * (i % 8));
        // E2M1 bits at the bottom of a float's exponent: the value times 2^-126.
        const float tiny = __uint_as_float((code & 7) << 22 | (code & 8) << 28);
        v[i] = __fmul_rn(__fmul_rn(tiny, 0x1p126f), scale);
    }
}

// MXFP4 to bf16, exact but for overflow: two elements a word. The bf16 patterns of the eight magnitudes come
// from two byte tables; the scale, a power of two that bf16 holds, is one packed multiplication.
template <int kWords>
__device__ __forceinline__ void decode_mxfp4_bf16(const uint32_t (&codes)[kWords], uint32_t sf,
                                                  uint32_t (&words)[4 * kWords]) {
    const uint32_t half = sf == 0 ? 0x0040u : sf == kE8m0Nan ? kBf16Nan : sf << 7;
    const uint32_t scale = half * 0x10001u;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        const uint32_t index = codes[i] & 0x77777777u;
        uint32_t highs[2];
        look_up(codes[i], 0x3f3f3f00u, 0x40404040u, kSignBits, highs[0], highs[1]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t lows = __byte_perm(0xc0800000u, 0xc0804000u, index >> (16 * j));
            words[4 * i + 2 * j] = mul_bf16x2(__byte_perm(lows, highs[j], 0x5140u), scale);
            words[4 * i + 2 * j + 1] = mul_bf16x2(__byte_perm(lows, highs[j], 0x7362u), scale);
        }
    }
}

// Strides kFirst to kEnd / 2 of the rotation, in order.
template <int kFirst, int kEnd, int N>
__device__ __forceinline__ void hadamard_strides(float (&v)[N]) {
#pragma unroll
    for (int stride = kFirst; stride < kEnd; stride *= 2) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if ((i & stride) == 0) {
                const float a = v[i], b = v[i + stride];
                v[i] = __fadd_rn(a, b);
                v[i + stride] = __fsub_rn(a, b);
            }
        }
    }
}

// The Hadamard rotation of a block times 32^0.5.
template <int N>
__device__ __forceinline__ void hadamard32_sums(float (&v)[N]) {
    hadamard_strides<1, N>(v);
    if constexpr (kLanesPerBlock<N> == 2) {
        const float sign = threadIdx.x & 1 ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < N; ++i)
            v[i] = __fmaf_rn(v[i], sign, __shfl_xor_sync(kAllLanes, v[i], 1));
    }
}

// The same; returns the bits of the largest magnitude. Of a sum and a difference the larger is the sum of the
// magnitudes, rounded alike; and the largest of those, which have no sign, are taken three at a time.
template <int N>
__device__ __forceinline__ uint32_t hadamard32_sums_amax(float (&v)[N]) {
    if constexpr (kLanesPerBlock<N> == 2) {
        hadamard32_sums(v);
        return max_over_lanes<2>(amax_bits(v));
    }
    hadamard_strides<1, N / 2>(v);
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
        amax = max(amax, __float_as_uint(__fadd_rn(fabsf(v[i]), fabsf(v[i + N / 2]))));
    hadamard_strides<N / 2, N>(v);
    return amax;
}

// The normalised rotation; its own inverse.
template <int N>
__device__ __forceinline__ void hadamard32(float (&v)[N]) {
    hadamard32_sums(v);
    multiply(v, kHadamardNorm);
}

// The bit of this lane's element i in a mask of the block, at the top of the word.
template <int N>
__device__ __forceinline__ uint32_t sign_of(uint32_t signs, int i) {
    return signs >> (threadIdx.x % kLanesPerBlock<N> * N) << (31 - i) & 0x80000000u;
}

// Decodes any MXFP4 tensor's vector to float32.
template <bool kRotated, bool kPrescaled, int kWords>
__device__ __forceinline__ void decode_values(const uint32_t (&codes)[kWords], uint32_t sf, uint32_t signs,
                                              float (&v)[8 * kWords]) {
    decode_mxfp4(codes, sf, v);
    if constexpr (kRotated) {
        hadamard32_sums(v);
#pragma unroll
        for (int i = 0; i < 8 * kWords; ++i) {
            const uint32_t norm = __float_as_uint(kHadamardNorm) | sign_of<8 * kWords>(signs, i);
            v[i] = __fmul_rn(v[i], __uint_as_float(norm));
        }
    }
    if constexpr (kPrescaled) multiply(v, kUnbiasedInverse);
}

// Encoding BF16 and FP8.

template <int kWords>
__device__ __forceinline__ void encode_bf16(const float (&v)[2 * kWords], uint32_t (&words)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
        words[i] = to_bf16x2(v[2 * i], v[2 * i + 1]);
}

template <int kWords>
__device__ __forceinline__ void encode_e4m3(const float (&v)[4 * kWords], float factor,
                                            uint32_t (&words)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        const uint32_t low = to_e4m3x2(__fmul_rn(v[4 * i], factor), __fmul_rn(v[4 * i + 1], factor));
        const uint32_t high = to_e4m3x2(__fmul_rn(v[4 * i + 2], factor), __fmul_rn(v[4 * i + 3], factor));
        words[i] = low | high << 16;
    }
}

// Exponent of the smallest power of two that brings a magnitude to at most 448; the least for zero and
// non-finite.
__device__ __forceinline__ int fp8_scale_exponent(uint32_t amax) {
    if (amax >= kInfinityBits) return kMinScaleExponent;
    const int exponent =
        static_cast<int>(amax >> 23) - 127 - 8 + ((amax & 0x007fffffu) > 0x00600000u ? 1 : 0);
    return max(exponent, kMinScaleExponent);
}

template <int N>
__device__ __forceinline__ Fp8Vec<N> quantize_fp8(const float (&v)[N]) {
    const uint32_t amax = max_over_lanes<kLanesPerGroup<N>>(amax_bits(v));
    const int exponent = fp8_scale_exponent(amax);
    Fp8Vec<N> out;
    out.scale = pow2(exponent);
    encode_e4m3(v, amax >= kInfinityBits ? __uint_as_float(kNanBits) : pow2(-exponent), out.data);
    return out;
}
