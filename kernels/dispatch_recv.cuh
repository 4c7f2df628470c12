// What the two receive kernels of dispatch share: their parameters, and one lane's part of a row.
#pragma once

#include "record.cuh"
#include "wait.cuh"

struct DispatchRecvParams {
    Comm comm;
    const int32_t* recv_offsets;   // [num_ranks + 1]
    const int32_t* record_rows;    // [records, width]
    const int32_t* row_record;     // [rows]
    const int32_t* group_offsets;  // [num_local_experts + 1], or null
    uint8_t* x;                    // out [rows] of kHidden E4M3, bf16 or packed E2M1
    uint8_t* sf;                   // out, fp8: float32 with the strides below; mxfp4: [rows, kHidden / 32]
    uint64_t* overflows;       // in and out [2]: blocks too far down to be exact in x, and in x_columnwise
    uint8_t* x_columnwise;     // out [rows * kHidden] E4M3
    float* sf_columnwise;      // out [rows / 128, kHidden]
    int64_t sf_expert_stride;  // elements, for the "batched" layout
    int64_t sf_row_stride;
    int64_t sf_group_stride;
    Quantizer quantizer;
    int32_t width;
    int32_t rows_per_expert;  // 0 unless "batched"
};

static_assert(sizeof(DispatchRecvParams) == QCOMM_SIZEOF_DISPATCH_RECV,
              "qcomm/ops/dispatch.py holds the same");

enum RecvDtype { kRecvBf16 = QCOMM_BF16, kRecvFp8 = QCOMM_FP8, kRecvMxfp4 = QCOMM_MXFP4 };

constexpr RecvDtype kRecv = static_cast<RecvDtype>(QCOMM_RECV);

// One lane's part of a row in the receiver's format, and where its scales go.
struct RowVec {
    uint4 low;
    uint4 high;
    float scale;
    uint32_t sf;
};

__device__ __forceinline__ RowVec convert(const WireVec& w, const Quantizer& quantizer, uint32_t& overflows) {
    RowVec out = {};
    if constexpr (static_cast<int>(kWire) == static_cast<int>(kRecv)) {
        out.low = w.low;
        out.high = w.high;
        out.scale = w.scale;
        out.sf = w.sf;
    } else if constexpr (kWire == kMxfp4 && kRecv == kRecvFp8 && !kHadamard) {
        const Fp8Vec fp8 = mxfp4_to_fp8(codes_of(w), w.sf, overflows);
        out.low = fp8.data;
        out.scale = fp8.scale;
    } else if constexpr (kWire == kFp8 && kRecv == kRecvMxfp4) {
        float v[kVec];
        decode_e4m3(w.low, v);
        const int offset = scale_to_odd(v, w.scale);
        const Mxfp4Vec packed = quantize_mxfp4<false, true>(v, offset, quantizer, 0);
        out.low.x = packed.codes.x;
        out.low.y = packed.codes.y;
        out.sf = packed.sf;
    } else {
        float v[kVec];
        decode_wire(w, v);
        if constexpr (kRecv == kRecvBf16) {
            encode_bf16(v, out.low, out.high);
        } else if constexpr (kRecv == kRecvFp8) {
            const Fp8Vec fp8 = quantize_fp8(v);
            out.low = fp8.data;
            out.scale = fp8.scale;
        } else {
            const Mxfp4Vec packed = quantize_mxfp4<false, false>(v, 0, quantizer, 0);
            out.low.x = packed.codes.x;
            out.low.y = packed.codes.y;
            out.sf = packed.sf;
        }
    }
    return out;
}

__device__ __forceinline__ void write_row(const DispatchRecvParams& p, int row, int vec, const RowVec& out) {
    if constexpr (kRecv == kRecvBf16) {
        uint4* data = reinterpret_cast<uint4*>(p.x + static_cast<int64_t>(row) * (2 * kHidden)) + 2 * vec;
        data[0] = out.low;
        data[1] = out.high;
    } else if constexpr (kRecv == kRecvFp8) {
        reinterpret_cast<uint4*>(p.x + static_cast<int64_t>(row) * kHidden)[vec] = out.low;
        if (vec % kLanesPerGroup == 0) {
            int64_t offset = vec / kLanesPerGroup * p.sf_group_stride;
            if (p.rows_per_expert > 0) {
                offset +=
                    row / p.rows_per_expert * p.sf_expert_stride + row % p.rows_per_expert * p.sf_row_stride;
            } else {
                offset += row * p.sf_row_stride;
            }
            reinterpret_cast<float*>(p.sf)[offset] = out.scale;
        }
    } else {
        reinterpret_cast<uint2*>(p.x + static_cast<int64_t>(row) * (kHidden / 2))[vec] =
            make_uint2(out.low.x, out.low.y);
        if (vec % kLanesPerBlock == 0) {
            p.sf[static_cast<int64_t>(row) * (kHidden / 32) + vec / kLanesPerBlock] =
                static_cast<uint8_t>(out.sf);
        }
    }
}

__device__ __forceinline__ void add_overflows(uint64_t* total, uint32_t overflows) {
    overflows = __reduce_add_sync(kAllLanes, overflows);
    if (threadIdx.x % 32 == 0 && overflows != 0) atomicAdd(total, static_cast<uint64_t>(overflows));
}
