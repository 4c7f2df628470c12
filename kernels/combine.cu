// Combine: combine_send sums each record's rows and sends the sum to the token's rank; combine_recv adds the
// sums of each token by rank. Float32, every product and every sum rounded; the order of addition is fixed.
#include "sender.cuh"
#include "wait.cuh"

// Rows whose loads are in flight together, and records.
constexpr int kRowBatch = kStochastic ? 2 : 3;
constexpr int kSumBatch = kWire == kMxfp4 ? 4 : 2;
// Vectors of a token that a receiving warp takes, so that it looks at the flags once for several.
constexpr int kPartVecs = 2;
constexpr int kPartsPerToken = (kNumVecs + 32 * kPartVecs - 1) / (32 * kPartVecs);

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

// This lane's row and weight of a record, -1 for none.
struct RowOfLane {
    int row;
    float weight;
};

__device__ __forceinline__ RowOfLane row_of_lane(const CombineSendParams& p, int record) {
    const int lane = threadIdx.x % 32;
    if (lane >= p.width) return {-1, 1.0f};
    const int64_t entry = static_cast<int64_t>(record) * p.width + lane;
    return {p.record_rows[entry], p.record_weights == nullptr ? 1.0f : p.record_weights[entry]};
}

// Sums vector `vec` of a record's rows.
__device__ __forceinline__ void sum_rows(const CombineSendParams& p, const RowOfLane& mine, int vec,
                                         float (&sum)[kVec]) {
    for (uint32_t left = __ballot_sync(kAllLanes, mine.row >= 0); left != 0;) {
        uint32_t data[kRowBatch][kVec / 2];
        float weight[kRowBatch];
        bool valid[kRowBatch];
#pragma unroll
        for (int i = 0; i < kRowBatch; ++i) {
            valid[i] = left != 0;
            const int j = valid[i] ? __ffs(left) - 1 : 0;
            left &= left - 1;
            const int row = __shfl_sync(kAllLanes, mine.row, j);
            weight[i] = __shfl_sync(kAllLanes, mine.weight, j);
            if (!valid[i] || vec >= kNumVecs) continue;
            const uint4* y =
                reinterpret_cast<const uint4*>(p.y + static_cast<int64_t>(row) * (2 * kHidden)) + 2 * vec;
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
}

// Any grid; whole teams; a team takes records round robin over the sources. Dynamic shared memory: kStages of
// Sender's stages a team, 16-byte aligned. Reads each row of y once and writes each record once: the
// dispatch's slot of this rank's region at the source, then, with release order, that slot's flag.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    combine_send(const __grid_constant__ CombineSendParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    const Comm& comm = p.comm;
    if (__syncthreads_or(timed_out(comm))) return;
    const Team team;
    const int num_ranks = comm.num_ranks;
    Sender sender(team, shared, comm.state->epoch);

    int most = 0;
    for (int source = 0; source < num_ranks; ++source) {
        most = max(most, p.recv_offsets[source + 1] - p.recv_offsets[source]);
    }
    for (int i = team.index; i < most * num_ranks; i += team.count) {
        const int source = (i + comm.rank) % num_ranks, slot = i / num_ranks;
        const int record = p.recv_offsets[source] + slot;
        if (record >= p.recv_offsets[source + 1]) continue;
        const RowOfLane mine = row_of_lane(p, record);
        const int token = p.record_src_token[record];
        Quantizer quantizer = p.quantizer;
        quantizer.subsequence = num_ranks * (1 + source) + comm.rank;
        sender.begin(team);
#pragma unroll 1
        for (int step = 0; step < kVecsPerThread; ++step) {
            const int vec = team.vec(step);
            float sum[kVec] = {};
            sum_rows(p, mine, vec, sum);
            write_record(sender.stage(), encode_wire<false>(sum, 0, quantizer, token, vec), vec);
        }
        const int64_t index = slot_index(comm, comm.rank, slot);
        uint8_t* destination = region<uint8_t>(comm, source, comm.combine_records) + index * kRecordBytes;
        uint32_t* flag = region<uint32_t>(comm, source, comm.combine_flags) + index;
        sender.send(team, team.thread == 0 ? destination : nullptr, flag);
    }
    sender.finish(team);
}

// Any grid, QCOMM_RECV_THREADS threads; warps take parts of tokens in turn. A warp waits for the flags of the
// ranks a token went to, and reads its part of each of their records once.
extern "C" __global__ void __launch_bounds__(QCOMM_RECV_THREADS)
    combine_recv(const __grid_constant__ CombineRecvParams p) {
    const Comm& comm = p.comm;
    if (timed_out(comm)) return;
    const int lane = threadIdx.x % 32;
    const int warp = blockIdx.x + gridDim.x * (threadIdx.x / 32), num_warps = gridDim.x * (blockDim.x / 32);
    const uint32_t epoch = comm.state->epoch;
    const uint8_t* records = region<uint8_t>(comm, comm.rank, comm.combine_records);
    const auto slot_of = [&](int part) {
        const int token = part / kPartsPerToken;
        return lane < comm.num_ranks && token < p.num_tokens
                   ? p.send_slot[static_cast<int64_t>(token) * comm.num_ranks + lane]
                   : -1;
    };

    int next_slot = slot_of(warp);
    for (int part = warp; part < p.num_tokens * kPartsPerToken; part += num_warps) {
        const int token = part / kPartsPerToken, first_vec = part % kPartsPerToken * kPartVecs * 32;
        const int slot = next_slot;
        next_slot = slot_of(part + num_warps);
        bool arrived = true;
        if (slot >= 0) {
            const uint32_t* flag =
                region<uint32_t>(comm, comm.rank, comm.combine_flags) + slot_index(comm, lane, slot);
            arrived = wait_flag(comm, flag, epoch, lane, kPhaseCombine);
        }
        if (!__all_sync(kAllLanes, arrived)) return;
        const uint32_t ranks = __ballot_sync(kAllLanes, slot >= 0);
#pragma unroll 1
        for (int step = 0; step < kPartVecs; ++step) {
            const int vec = first_vec + step * 32 + lane;
            float sum[kVec] = {};
            for (uint32_t left = ranks; left != 0;) {
                LaneVec parts[kSumBatch];
                bool valid[kSumBatch];
#pragma unroll
                for (int i = 0; i < kSumBatch; ++i) {
                    valid[i] = left != 0;
                    const int rank = valid[i] ? __ffs(left) - 1 : 0;
                    left &= left - 1;
                    const int64_t index = slot_index(comm, rank, __shfl_sync(kAllLanes, slot, rank));
                    if (valid[i]) parts[i] = read_record(records + index * kRecordBytes, vec);
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
            if (vec >= kNumVecs) continue;
            LaneVec out;
            encode_bf16(sum, out.bf16());
            write_data<kBf16>(p.out + static_cast<int64_t>(token) * (2 * kHidden), vec, out);
        }
    }
}
