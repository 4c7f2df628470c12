// What the receive kernels of dispatch share: their parameters, and one lane's part of a row.
#pragma once

#include "place.cuh"
#include "record.cuh"

struct DispatchRecvParams {
    Comm comm;
    Placement placement;
    uint8_t* x;                // out [rows] of kHidden E4M3, bf16 or packed E2M1
    uint8_t* sf;               // out, fp8: float32 with the strides below; mxfp4: [rows, kHidden / 32]
    uint8_t* x_columnwise;     // out [rows * kHidden] E4M3
    float* sf_columnwise;      // out [rows / 128, kHidden]
    int64_t sf_expert_stride;  // elements, for the "batched" layout
    int64_t sf_row_stride;
    int64_t sf_group_stride;
    Quantizer quantizer;
    int32_t rows_per_expert;  // 0 unless "batched"
    int32_t pads;             // whether rows of a group that hold no record are zeroed
    int32_t num_rows;         // rows of x; what belongs past them is left out
    int32_t sf_together;      // whether a row's scales are adjacent and start at a multiple of 16 bytes
};

static_assert(sizeof(DispatchRecvParams) == QCOMM_SIZEOF_DISPATCH_RECV,
              "qcomm/ops/dispatch.py holds the same");

enum RecvDtype { kRecvBf16 = QCOMM_BF16, kRecvFp8 = QCOMM_FP8, kRecvMxfp4 = QCOMM_MXFP4 };

constexpr RecvDtype kRecv = static_cast<RecvDtype>(QCOMM_RECV);

constexpr int kRowBytes = kRecv == kRecvBf16 ? 2 * kHidden : kRecv == kRecvFp8 ? kHidden : kHidden / 2;
constexpr int kRowScaleWords =
    kRecv == kRecvBf16 ? 0 : kHidden / 128;  // float32 of fp8, or four bytes of mxfp4

// Converts one lane's part of a record to what the receiver asked for.
__device__ __forceinline__ LaneVec convert(LaneVec& w, const Quantizer& quantizer, uint32_t& overflows) {
    if constexpr (static_cast<int>(kWire) == static_cast<int>(kRecv)) {
        return w;
    } else if constexpr (kWire == kMxfp4 && kRecv == kRecvFp8 && !kHadamard) {
        return lane_vec(align_group(w.codes(), w.sf, overflows));
    } else if constexpr (kWire == kBf16 && kRecv == kRecvMxfp4) {
        return lane_vec(quantize_bf16(w.bf16(), quantizer));
    } else if constexpr (kWire == kFp8 && kRecv == kRecvMxfp4) {
        float v[kVec];
        decode_e4m3(w.data(), v);
        const int offset = scale_to_odd(v, w.scale);
        return lane_vec(quantize_mxfp4<false, true>(v, offset, quantizer, 0));
    } else {
        float v[kVec];
        decode_wire(w, v);
        if constexpr (kRecv == kRecvFp8) return lane_vec(quantize_fp8(v));
        LaneVec out = {};
        encode_bf16(v, out.bf16());
        return out;
    }
}

// Where word `word` of a row's scales goes.
__device__ __forceinline__ uint32_t* scale_word(const DispatchRecvParams& p, int row, int word) {
    int64_t offset = static_cast<int64_t>(row) * kRowScaleWords + word;
    if constexpr (kRecv == kRecvFp8) {
        const int64_t expert = p.rows_per_expert > 0 ? row / p.rows_per_expert : 0;
        const int64_t index = p.rows_per_expert > 0 ? row % p.rows_per_expert : row;
        offset = expert * p.sf_expert_stride + index * p.sf_row_stride + word * p.sf_group_stride;
    }
    return reinterpret_cast<uint32_t*>(p.sf) + offset;
}

// Where the record of a row is, as index of its slot; -1 for none.
__device__ __forceinline__ int64_t slot_of_row(const DispatchRecvParams& p, int row) {
    const int record = p.placement.row_record[row];
    if (record < 0) return -1;
    int source = 0;
    while (record >= p.placement.recv_offsets[source + 1])
        ++source;
    return slot_index(p.comm, source, record - p.placement.recv_offsets[source]);
}

// The expert whose group a row is in.
__device__ __forceinline__ int expert_of_row(const DispatchRecvParams& p, int row) {
    int expert = 0;
    for (int step = 1 << 30; step > 0; step >>= 1) {
        const int next = expert + step;
        if (next < p.comm.num_local_experts && p.placement.group_offsets[next] <= row) expert = next;
    }
    return expert;
}
