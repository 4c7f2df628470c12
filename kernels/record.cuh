// A token's record: reading one lane's part of it, writing one lane's part of it, and sending it.
#pragma once

#include "layout.cuh"
#include "mxfp4.cuh"

constexpr int kHidden = QCOMM_HIDDEN;
constexpr WireKind kWire = static_cast<WireKind>(QCOMM_WIRE);
constexpr bool kHadamard = QCOMM_HADAMARD;
constexpr bool kStochastic = QCOMM_STOCHASTIC;
constexpr int kRecordBytes = QCOMM_RECORD_BYTES;
constexpr int kScaleOffset = QCOMM_SCALE_OFFSET;
constexpr int kNumVecs = kHidden / kVec;
constexpr int kVecsPerLane = (kNumVecs + 31) / 32;
// Vectors a lane loads before it works on the first: enough loads in flight to hide their latency, in the
// registers that the work leaves.
constexpr int kMaxBatch = kHadamard || kStochastic ? 2 : kWire == kBf16 ? 4 : 7;
constexpr int kBatch = kVecsPerLane < kMaxBatch ? kVecsPerLane : kMaxBatch;

// One lane's part of a record or of a received row.
struct LaneVec {
    uint4 low;    // bf16: elements 0 to 7; fp8: all; mxfp4: codes in x and y
    uint4 high;   // bf16: elements 8 to 15
    float scale;  // fp8
    uint32_t sf;  // mxfp4
};

// Reads one lane's part; lanes past the end get zeros.
__device__ __forceinline__ LaneVec read_record(const uint8_t* record, int vec) {
    LaneVec w = {};
    if (vec >= kNumVecs) return w;
    if constexpr (kWire == kBf16) {
        const uint4* data = reinterpret_cast<const uint4*>(record) + 2 * vec;
        w.low = load_stream(data);
        w.high = load_stream(data + 1);
    } else if constexpr (kWire == kFp8) {
        w.low = load_stream(reinterpret_cast<const uint4*>(record) + vec);
        w.scale = reinterpret_cast<const volatile float*>(record + kScaleOffset)[vec / kLanesPerGroup];
    } else {
        const uint2 codes = load_stream(reinterpret_cast<const uint2*>(record) + vec);
        w.low.x = codes.x;
        w.low.y = codes.y;
        w.sf = *reinterpret_cast<const volatile uint8_t*>(record + kScaleOffset + vec / kLanesPerBlock);
    }
    return w;
}

__device__ __forceinline__ LaneVec lane_vec(const Fp8Vec& fp8) {
    LaneVec v = {};
    v.low = fp8.data;
    v.scale = fp8.scale;
    return v;
}

__device__ __forceinline__ LaneVec lane_vec(const Mxfp4Vec& packed) {
    LaneVec w = {};
    w.low.x = packed.codes.x;
    w.low.y = packed.codes.y;
    w.sf = packed.sf;
    return w;
}

__device__ __forceinline__ uint2 codes_of(const LaneVec& w) {
    return make_uint2(w.low.x, w.low.y);
}

// Decodes one lane's part to float32.
__device__ __forceinline__ void decode_wire(const LaneVec& w, float (&v)[kVec]) {
    if constexpr (kWire == kBf16) {
        decode_bf16(w.low, w.high, v);
    } else if constexpr (kWire == kFp8) {
        decode_fp8(w.low, w.scale, v);
    } else {
        decode_mxfp4(codes_of(w), w.sf, v);
        if constexpr (kHadamard) hadamard32(v);
    }
}

// Encodes v * 2^offset, one lane's part of token `row`; offset is 0 unless the wire is mxfp4.
template <bool kScaled>
__device__ __forceinline__ LaneVec encode_wire(float (&v)[kVec], int offset, const Quantizer& quantizer,
                                               int row, int vec) {
    LaneVec w = {};
    if constexpr (kWire == kBf16) {
        encode_bf16(v, w.low, w.high);
    } else if constexpr (kWire == kFp8) {
        w = lane_vec(quantize_fp8(v));
    } else {
        if constexpr (kHadamard) hadamard32(v);
        const uint64_t index = static_cast<uint64_t>(row) * kHidden + vec * kVec;
        w = lane_vec(quantize_mxfp4<kStochastic, kScaled>(v, offset, quantizer, index));
    }
    return w;
}

// Writes one lane's part to a record in shared memory.
__device__ __forceinline__ void write_record(uint8_t* record, const LaneVec& w, int vec) {
    if (vec >= kNumVecs) return;
    if constexpr (kWire == kBf16) {
        uint4* data = reinterpret_cast<uint4*>(record) + 2 * vec;
        data[0] = w.low;
        data[1] = w.high;
    } else if constexpr (kWire == kFp8) {
        reinterpret_cast<uint4*>(record)[vec] = w.low;
        if (vec % kLanesPerGroup == 0) {
            reinterpret_cast<float*>(record + kScaleOffset)[vec / kLanesPerGroup] = w.scale;
        }
    } else {
        reinterpret_cast<uint2*>(record)[vec] = codes_of(w);
        if (vec % kLanesPerBlock == 0)
            record[kScaleOffset + vec / kLanesPerBlock] = static_cast<uint8_t>(w.sf);
    }
}

// A warp's shared-memory stage. While the copies of one record fly, the next is loaded and encoded; a
// record's flags are raised once its copies are complete. Lane l sends to rank l.
class Sender {
  public:
    __device__ __forceinline__ Sender(uint8_t* stage, uint32_t epoch) : stage_(stage), epoch_(epoch) {}

    // Returns the stage, free to be written.
    __device__ __forceinline__ uint8_t* stage() {
        bulk_wait_read<0>();
        __syncwarp();
        return stage_;
    }

    // Sends the stage to this lane's destination, null for none.
    __device__ __forceinline__ void send(uint8_t* destination, uint32_t* flag) {
        fence_proxy_async_shared();
        finish();
        __syncwarp();
        if (destination != nullptr) bulk_store(destination, stage_, kRecordBytes);
        bulk_commit();
        flag_ = destination == nullptr ? nullptr : flag;
    }

    // Raises the flags of the last record once it is there.
    __device__ __forceinline__ void finish() {
        bulk_wait<0>();
        if (flag_ != nullptr) store_release_sys(flag_, epoch_);
    }

  private:
    uint8_t* stage_;
    uint32_t* flag_ = nullptr;
    uint32_t epoch_;
};
