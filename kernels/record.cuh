// A token's record: reading one lane's part of it, and writing one lane's part of it.
#pragma once

#include "align.cuh"
#include "layout.cuh"
#include "quantize.cuh"

constexpr int kVec = 16;  // elements of a lane's part
constexpr int kVecsPerBlock = kLanesPerBlock<kVec>;
constexpr int kVecsPerGroup = kLanesPerGroup<kVec>;
constexpr int kHidden = QCOMM_HIDDEN;
constexpr WireKind kWire = static_cast<WireKind>(QCOMM_WIRE);
constexpr int kSumBatch = kWire == kMxfp4 ? 4 : 2;  // records to be added whose loads are in flight together
constexpr bool kHadamard = QCOMM_HADAMARD;
constexpr bool kStochastic = QCOMM_STOCHASTIC;
constexpr int kRecordBytes = QCOMM_RECORD_BYTES;
constexpr int kMetadataBytes = QCOMM_METADATA_BYTES;  // that may follow a record
constexpr int kSlotBytes = QCOMM_SLOT_BYTES;
constexpr int kScaleOffset = QCOMM_SCALE_OFFSET;
constexpr int kNumVecs = kHidden / kVec;

template <int kWords>
using Words = uint32_t[kWords];

// One lane's part of a record or of a received row.
struct LaneVec {
    uint32_t words[kVec / 2];  // bf16: all; fp8: the first four; mxfp4: the codes, in the first two
    float scale;               // fp8
    uint32_t sf;               // mxfp4

    __device__ __forceinline__ Words<kVec / 2>& bf16() { return words; }
    __device__ __forceinline__ Words<kVec / 4>& data() { return reinterpret_cast<Words<kVec / 4>&>(words); }
    __device__ __forceinline__ Words<kVec / 8>& codes() { return reinterpret_cast<Words<kVec / 8>&>(words); }
};

// Reads one lane's part; lanes past the end get zeros.
__device__ __forceinline__ LaneVec read_record(const uint8_t* record, int vec) {
    LaneVec w = {};
    if (vec >= kNumVecs) return w;
    if constexpr (kWire == kBf16) {
        const uint4* data = reinterpret_cast<const uint4*>(record) + 2 * vec;
        unpack(load_stream(data), w.words);
        unpack(load_stream(data + 1), w.words + 4);
    } else if constexpr (kWire == kFp8) {
        unpack(load_stream(reinterpret_cast<const uint4*>(record) + vec), w.words);
        w.scale = reinterpret_cast<const volatile float*>(record + kScaleOffset)[vec / kVecsPerGroup];
    } else {
        unpack(load_stream(reinterpret_cast<const uint2*>(record) + vec), w.words);
        w.sf = *reinterpret_cast<const volatile uint8_t*>(record + kScaleOffset + vec / kVecsPerBlock);
    }
    return w;
}

__device__ __forceinline__ LaneVec lane_vec(const Fp8Vec<kVec>& fp8) {
    LaneVec w = {};
#pragma unroll
    for (int i = 0; i < kVec / 4; ++i)
        w.words[i] = fp8.data[i];
    w.scale = fp8.scale;
    return w;
}

__device__ __forceinline__ LaneVec lane_vec(const Mxfp4Vec<kVec>& packed) {
    LaneVec w = {};
#pragma unroll
    for (int i = 0; i < kVec / 8; ++i)
        w.words[i] = packed.codes[i];
    w.sf = packed.sf;
    return w;
}

// Decodes one lane's part to float32.
__device__ __forceinline__ void decode_wire(LaneVec& w, float (&v)[kVec]) {
    if constexpr (kWire == kBf16) {
        decode_bf16(w.bf16(), v);
    } else if constexpr (kWire == kFp8) {
        decode_fp8(w.data(), w.scale, v);
    } else {
        decode_mxfp4(w.codes(), w.sf, v);
        if constexpr (kHadamard) hadamard32(v);
    }
}

// Encodes v * 2^offset, one lane's part of token `row`; offset is 0 unless the wire is mxfp4, unrotated.
// Changes v.
template <bool kScaled>
__device__ __forceinline__ LaneVec encode_wire(float (&v)[kVec], int offset, const Quantizer& quantizer,
                                               int row, int vec) {
    LaneVec w = {};
    if constexpr (kWire == kBf16) {
        encode_bf16(v, w.bf16());
    } else if constexpr (kWire == kFp8) {
        w = lane_vec(quantize_fp8(v));
    } else if constexpr (kHadamard && !kStochastic) {
        w = lane_vec(quantize_rotated(v, quantizer));
    } else {
        if constexpr (kHadamard) hadamard32(v);
        const uint64_t index = static_cast<uint64_t>(row) * kHidden + vec * kVec;
        w = lane_vec(quantize_mxfp4<kStochastic, kScaled>(v, offset, quantizer, index));
    }
    return w;
}

// Writes one lane's part of a row's data, to global or shared memory.
template <WireKind kKind>
__device__ __forceinline__ void write_data(uint8_t* row, int vec, const LaneVec& w) {
    if constexpr (kKind == kBf16) {
        reinterpret_cast<uint4*>(row)[2 * vec] = pack4(w.words);
        reinterpret_cast<uint4*>(row)[2 * vec + 1] = pack4(w.words + 4);
    } else if constexpr (kKind == kFp8) {
        reinterpret_cast<uint4*>(row)[vec] = pack4(w.words);
    } else {
        reinterpret_cast<uint2*>(row)[vec] = make_uint2(w.words[0], w.words[1]);
    }
}

// Writes one lane's part to a record in shared memory.
__device__ __forceinline__ void write_record(uint8_t* record, const LaneVec& w, int vec) {
    if (vec >= kNumVecs) return;
    write_data<kWire>(record, vec, w);
    if (kWire == kFp8 && vec % kVecsPerGroup == 0)
        reinterpret_cast<float*>(record + kScaleOffset)[vec / kVecsPerGroup] = w.scale;
    if (kWire == kMxfp4 && vec % kVecsPerBlock == 0)
        record[kScaleOffset + vec / kVecsPerBlock] = static_cast<uint8_t>(w.sf);
}
