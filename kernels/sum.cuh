// Adding the records of one token, in float32, by rank.
#pragma once

#include "record.cuh"
#include "topk.cuh"

constexpr int kSumBatch = kWire == kMxfp4 ? 4 : 2;  // records whose loads are in flight together

// Adds one lane's parts of the records of `ranks`, a bit each; record_of(rank) says where one is. Call from a
// warp.
template <typename RecordOf>
__device__ __forceinline__ void add_records(uint32_t ranks, const RecordOf& record_of, int vec,
                                            float (&sum)[kVec]) {
    for (uint32_t left = ranks; left != 0;) {
        LaneVec parts[kSumBatch];
        bool valid[kSumBatch];
#pragma unroll
        for (int i = 0; i < kSumBatch; ++i) {
            valid[i] = left != 0;
            const int rank = valid[i] ? __ffs(left) - 1 : 0;
            left &= left - 1;
            const uint8_t* record = record_of(rank);
            if (valid[i]) parts[i] = read_record(record, vec);
        }
#pragma unroll
        for (int i = 0; i < kSumBatch; ++i) {
            if (!valid[i]) continue;
            float part[kVec];
            decode_wire(parts[i], part);
#pragma unroll
            for (int e = 0; e < kVec; ++e)
                sum[e] = __fadd_rn(sum[e], part[e]);
        }
    }
}

// Adds this lane's numbers that came behind the records.
template <typename RecordOf>
__device__ __forceinline__ float add_values(uint32_t ranks, const RecordOf& record_of) {
    const int lane = threadIdx.x % 32;
    float value = 0.0f;
    for (uint32_t left = ranks; left != 0; left &= left - 1) {
        const volatile float* values =
            reinterpret_cast<const volatile float*>(record_of(__ffs(left) - 1) + kRecordBytes);
        if (lane < kNumTopk) value += values[lane];
    }
    return value;
}
