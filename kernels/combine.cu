// Combine: combine_send sums each record's rows and sends the sum to the token's rank; combine_recv adds the
// sums of each token by rank. Float32, every product and every sum rounded; the order of addition is fixed.
#include "record.cuh"
#include "wait.cuh"

// Rows whose loads are in flight together.
constexpr int kRowBatch = 3;

struct CombineSendParams {
    Comm comm;
    const int32_t* recv_offsets;      // [num_ranks + 1]
    const int32_t* record_rows;       // [records, width]
    const float* record_weights;      // [records, width], or null for a plain sum
    const int32_t* record_src_token;  // [records]
    const uint8_t* y;                 // [rows, kHidden] bf16
    Quantizer quantizer;
    int32_t width;
};

static_assert(sizeof(CombineSendParams) == QCOMM_SIZEOF_COMBINE_SEND, "qcomm/ops/combine.py holds the same");

struct CombineRecvParams {
    Comm comm;
    const int32_t* send_slot;  // [num_tokens, num_ranks]
    uint8_t* out;              // out [num_tokens, kHidden] bf16
    int32_t num_tokens;
};

static_assert(sizeof(CombineRecvParams) == QCOMM_SIZEOF_COMBINE_RECV, "qcomm/ops/combine.py holds the same");

// Any grid, at most 384 threads; a warp takes records round robin over the sources. Dynamic shared memory:
// one record a warp, 16-byte aligned. Reads each row of y once and writes each record once: the dispatch's
// slot of this rank's region at the source, then, with release order, that slot's flag.
extern "C" __global__ void __launch_bounds__(384, 2)
    combine_send(const __grid_constant__ CombineSendParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    const Comm& comm = p.comm;
    if (timed_out(comm)) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int num_warps = gridDim.x * (blockDim.x / 32), num_ranks = comm.num_ranks;
    Sender sender(shared + warp * kRecordBytes, comm.state->epoch);

    int most = 0;
    for (int source = 0; source < num_ranks; ++source) {
        most = max(most, p.recv_offsets[source + 1] - p.recv_offsets[source]);
    }
    for (int i = blockIdx.x + gridDim.x * warp; i < most * num_ranks; i += num_warps) {
        const int source = (i + comm.rank) % num_ranks, slot = i / num_ranks;
        const int record = p.recv_offsets[source] + slot;
        if (record >= p.recv_offsets[source + 1]) continue;
        int my_row = -1;
        float my_weight = 1.0f;
        if (lane < p.width) {
            const int64_t entry = static_cast<int64_t>(record) * p.width + lane;
            my_row = p.record_rows[entry];
            if (p.record_weights != nullptr) my_weight = p.record_weights[entry];
        }
        const uint32_t rows = __ballot_sync(kAllLanes, my_row >= 0);
        const int token = p.record_src_token[record];
        Quantizer quantizer = p.quantizer;
        quantizer.subsequence = num_ranks * (1 + source) + comm.rank;
        uint8_t* stage = sender.stage();
        for (int step = 0; step < kVecsPerLane; ++step) {
            const int vec = step * 32 + lane;
            float sum[kVec] = {};
            for (uint32_t left = rows; left != 0;) {
                uint32_t data[kRowBatch][kVec / 2];
                float weight[kRowBatch];
                bool valid[kRowBatch];
#pragma unroll
                for (int i = 0; i < kRowBatch; ++i) {
                    valid[i] = left != 0;
                    const int j = valid[i] ? __ffs(left) - 1 : 0;
                    left &= left - 1;
                    const int row = __shfl_sync(kAllLanes, my_row, j);
                    weight[i] = __shfl_sync(kAllLanes, my_weight, j);
                    if (!valid[i] || vec >= kNumVecs) continue;
                    const uint4* y =
                        reinterpret_cast<const uint4*>(p.y + static_cast<int64_t>(row) * (2 * kHidden)) +
                        2 * vec;
                    unpack(load_stream(y), data[i]);
                    unpack(load_stream(y + 1), data[i] + 4);
                }
#pragma unroll
                for (int i = 0; i < kRowBatch; ++i) {
                    if (!valid[i] || vec >= kNumVecs) continue;
                    float term[kVec];
                    decode_bf16(data[i], term);
#pragma unroll
                    for (int e = 0; e < kVec; ++e) {
                        if (p.record_weights != nullptr) term[e] = __fmul_rn(weight[i], term[e]);
                        sum[e] = __fadd_rn(sum[e], term[e]);
                    }
                }
            }
            write_record(stage, encode_wire<false>(sum, 0, quantizer, token, vec), vec);
        }
        const int64_t index = slot_index(comm, comm.rank, slot);
        uint8_t* destination = region<uint8_t>(comm, source, comm.combine_records) + index * kRecordBytes;
        uint32_t* flag = region<uint32_t>(comm, source, comm.combine_flags) + index;
        sender.send(lane == 0 ? destination : nullptr, flag);
    }
    sender.finish();
}

// Any grid and block; a warp takes every num_warps-th token, waits for the flags of the ranks it went to, and
// reads each of their records once.
extern "C" __global__ void __launch_bounds__(256) combine_recv(const __grid_constant__ CombineRecvParams p) {
    const Comm& comm = p.comm;
    if (timed_out(comm)) return;
    const int lane = threadIdx.x % 32;
    const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32,
              num_warps = gridDim.x * (blockDim.x / 32);
    const uint32_t epoch = comm.state->epoch;

    for (int token = warp; token < p.num_tokens; token += num_warps) {
        int slot = -1;
        bool arrived = true;
        if (lane < comm.num_ranks) {
            slot = p.send_slot[static_cast<int64_t>(token) * comm.num_ranks + lane];
            if (slot >= 0) {
                const uint32_t* flag =
                    region<uint32_t>(comm, comm.rank, comm.combine_flags) + slot_index(comm, lane, slot);
                arrived = wait_flag(comm, flag, epoch, lane, kPhaseCombine);
            }
        }
        if (!__all_sync(kAllLanes, arrived)) return;
        const uint32_t ranks = __ballot_sync(kAllLanes, slot >= 0);
        for (int step = 0; step < kVecsPerLane; ++step) {
            const int vec = step * 32 + lane;
            float sum[kVec] = {};
            for (uint32_t left = ranks; left != 0;) {
                LaneVec parts[kRowBatch];
                bool valid[kRowBatch];
#pragma unroll
                for (int i = 0; i < kRowBatch; ++i) {
                    valid[i] = left != 0;
                    const int rank = valid[i] ? __ffs(left) - 1 : 0;
                    left &= left - 1;
                    const int64_t index = slot_index(comm, rank, __shfl_sync(kAllLanes, slot, rank));
                    if (!valid[i]) continue;
                    const uint8_t* records = region<uint8_t>(comm, comm.rank, comm.combine_records);
                    parts[i] = read_record(records + index * kRecordBytes, vec);
                }
#pragma unroll
                for (int i = 0; i < kRowBatch; ++i) {
                    if (!valid[i]) continue;
                    float part[kVec];
                    decode_wire(parts[i], part);
#pragma unroll
                    for (int e = 0; e < kVec; ++e)
                        sum[e] = __fadd_rn(sum[e], part[e]);
                }
            }
            if (vec >= kNumVecs) continue;
            LaneVec out;
            encode_bf16(sum, out.bf16());
            write_data<kBf16>(p.out + static_cast<int64_t>(token) * (2 * kHidden), vec, out);
        }
    }
}
