// The hop of combine between nodes: adds up this node's sums for a token of another node, in float32 by rank,
// and puts the one record that they make to the token's rank.
#include "record.cuh"
#include "topk.cuh"
#include "wait.cuh"

static_assert(kForwards && kNodes > 0);

struct CombineForwardParams {
    Comm comm;
    const int32_t* counts;  // [kNodes], as dispatch_forward left them
    const int32_t* slots;   // [kNodes][max_tokens][kEntryWords]
    Quantizer quantizer;
    int32_t has_values;  // whether numbers come behind the records
};

static_assert(sizeof(CombineForwardParams) == QCOMM_SIZEOF_COMBINE_FORWARD,
              "qcomm/ops/forward.py holds the same");

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

// Any grid, any block of whole warps. A warp takes every token of another node that came by this rank in
// turn: waits for the sums of the ranks here that it went to, reads each once, writes their sum to the outbox
// and puts it to the token's rank with a signal. Runs after the call has begun everywhere.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    combine_forward(const __grid_constant__ CombineForwardParams p) {
    const Comm& comm = p.comm;
    if (timed_out(comm)) return;
    const uint32_t epoch = comm.state->epoch;
    const int lane = threadIdx.x % 32;
    const int warp = blockIdx.x + gridDim.x * (threadIdx.x / 32), num_warps = gridDim.x * (blockDim.x / 32);
    const int here = node_of(comm.rank);
    const uint8_t* records = region<uint8_t>(comm, comm.rank, comm.combine_records);
    const uint32_t num_bytes = kRecordBytes + (p.has_values ? kMetadataBytes : 0);
    for (int node = 0; node < kNodes; ++node) {
        if (node == here) continue;
        const int source = counterpart(comm, node);
        for (int i = warp; i < p.counts[node]; i += num_warps) {
            const int64_t index = slot_index(comm, node, i);
            const int32_t* entry = p.slots + index * kEntryWords;
            const int slot = lane < kRanksPerNode ? entry[1 + lane] : -1;
            // A rank here sent its sums as if it were the one of its place in the token's node: see route_of.
            const int64_t there = slot_index(comm, node * kRanksPerNode + lane, slot);
            bool came = true;
            if (slot >= 0) {
                came = wait_flag(comm, flag_at(comm, comm.rank, comm.combine_flags, there), epoch,
                                 here * kRanksPerNode + lane, kPhaseCombine);
            }
            if (!__all_sync(kAllLanes, came)) return;
            const uint32_t ranks = __ballot_sync(kAllLanes, slot >= 0);
            const auto record_of = [&](int rank) {
                return records + __shfl_sync(kAllLanes, there, rank) * kSlotBytes;
            };
            uint8_t* out =
                region<uint8_t>(comm, comm.rank, comm.state->nodes.combine_outbox) + index * kSlotBytes;
            Quantizer quantizer = p.quantizer;
            // Apart from those of the ranks' own sums, which are below num_ranks * (1 + num_ranks).
            quantizer.subsequence = comm.num_ranks * (1 + comm.num_ranks + source) + here;
#pragma unroll 1
            for (int vec = lane; vec < (kNumVecs + 31) / 32 * 32; vec += 32) {
                float sum[kVec] = {};
                add_records(ranks, record_of, vec, sum);
                write_record(out, encode_wire<false>(sum, 0, quantizer, entry[0], vec), vec);
            }
            if (p.has_values) {
                const float value = add_values(ranks, record_of);
                if (lane < kNumTopk) reinterpret_cast<float*>(out + kRecordBytes)[lane] = value;
            }
            fence_sys();
            __syncwarp();
            const int64_t place = slot_index(comm, comm.num_ranks + here, i);
            put(region<uint8_t>(comm, comm.rank, comm.combine_records) + place * kSlotBytes, out, num_bytes,
                flag_at(comm, comm.rank, comm.combine_flags, place), epoch, source);
        }
    }
}
