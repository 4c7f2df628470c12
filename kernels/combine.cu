// Combine: combine_send sums each record's rows and sends the sum to the token's rank; combine_recv adds the
// sums of each token by rank. Float32, every product and every sum rounded; the order of addition is fixed.
#include "sender.cuh"
#include "wait.cuh"

// Records whose loads are in flight together.
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

constexpr int kChunkRows = 4;
constexpr int kChunkBytes = kChunkRows * 4 * kVec * 16;  // a warp's; 2 * kVec bytes a row and lane

// This lane's row and weight of a record, -1 for none.
struct RowOfLane {
    int row;
    float weight;
};

// A team's way through the rows it must sum, chunk by chunk: at most kChunkRows rows of a record, the part of
// them that is one vector a thread.
struct Walk {
    int number;     // of the record, counted round robin over the sources
    int step;       // which of a thread's vectors
    uint32_t left;  // rows that are still to come, by the lane that knows them
    RowOfLane mine;
    RowOfLane ahead;  // of the next record
};

struct Record {
    int source;
    int slot;
    int index;  // among those that came
};

__device__ __forceinline__ Record record_of(const CombineSendParams& p, int number) {
    const int source = (number + p.comm.rank) % p.comm.num_ranks, slot = number / p.comm.num_ranks;
    return {source, slot, p.recv_offsets[source] + slot};
}

// The first number from `number` on in the team's steps that is a record; `end` if there is none.
__device__ __forceinline__ int find_record(const CombineSendParams& p, const Team& team, int number,
                                           int end) {
    for (; number < end; number += team.count) {
        const Record record = record_of(p, number);
        if (record.index < p.recv_offsets[record.source + 1]) return number;
    }
    return end;
}

__device__ __forceinline__ RowOfLane row_of_lane(const CombineSendParams& p, int number, int end) {
    const int lane = threadIdx.x % 32;
    if (lane >= p.width || number >= end) return {-1, 1.0f};
    const int64_t entry = static_cast<int64_t>(record_of(p, number).index) * p.width + lane;
    return {p.record_rows[entry], p.record_weights == nullptr ? 1.0f : p.record_weights[entry]};
}

// Begins record `number`, whose rows have been loaded ahead.
__device__ __forceinline__ void begin_record(const CombineSendParams& p, const Team& team, int end,
                                             Walk& walk, int number) {
    walk.number = number;
    walk.step = 0;
    walk.mine = walk.ahead;
    walk.left = __ballot_sync(kAllLanes, walk.mine.row >= 0);
    if (number < end) walk.ahead = row_of_lane(p, find_record(p, team, number + team.count, end), end);
}

// Takes the next chunk off `left`.
__device__ __forceinline__ uint32_t take_chunk(uint32_t& left) {
    uint32_t chunk = left;
#pragma unroll
    for (int i = 0; i < kChunkRows; ++i)
        left &= left - 1;
    return chunk & ~left;
}

// Starts the copy of this thread's part of a chunk.
__device__ __forceinline__ void fetch_chunk(const CombineSendParams& p, const RowOfLane& mine, uint32_t chunk,
                                            int vec, uint8_t* buffer) {
    const int lane = threadIdx.x % 32;
    for (; chunk != 0; chunk &= chunk - 1) {
        const int row = __shfl_sync(kAllLanes, mine.row, __ffs(chunk) - 1);
        const uint8_t* from = p.y + static_cast<int64_t>(row) * (2 * kHidden) + 32 * vec;
        copy_async<16>(buffer + 16 * lane, from, vec < kNumVecs);
        copy_async<16>(buffer + 512 + 16 * lane, from + 16, vec < kNumVecs);
        buffer += 1024;
    }
}

// Adds this thread's part of a chunk.
__device__ __forceinline__ void add_chunk(const CombineSendParams& p, const RowOfLane& mine, uint32_t chunk,
                                          const uint8_t* buffer, float (&sum)[kVec]) {
    const int lane = threadIdx.x % 32;
    for (; chunk != 0; chunk &= chunk - 1) {
        const float weight = __shfl_sync(kAllLanes, mine.weight, __ffs(chunk) - 1);
        uint32_t data[kVec / 2];
        unpack(*reinterpret_cast<const uint4*>(buffer + 16 * lane), data);
        unpack(*reinterpret_cast<const uint4*>(buffer + 512 + 16 * lane), data + 4);
        buffer += 1024;
        float term[kVec];
        decode_bf16(data, term);
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
            if (p.record_weights != nullptr) term[e] = __fmul_rn(weight, term[e]);
            sum[e] = __fadd_rn(sum[e], term[e]);
        }
    }
}

// Any grid; whole teams; a team takes records round robin over the sources. Dynamic shared memory: kStages
// stages a team, 16-byte aligned, then two chunks a warp, of which one is fetched while the other is added.
// Reads each row of y once and writes each record once: the dispatch's slot of this rank's region at the
// source, then, with release order, that slot's flag.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    combine_send(const __grid_constant__ CombineSendParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    const Comm& comm = p.comm;
    if (__syncthreads_or(timed_out(comm))) return;
    const Team team;
    const int num_ranks = comm.num_ranks;
    uint8_t* chunks = shared + blockDim.x / kTeamThreads * kStages * Sender::kStageBytes +
                      threadIdx.x / 32 * (2 * kChunkBytes);
    Sender sender(team, shared, comm.state->epoch);

    int most = 0;
    for (int source = 0; source < num_ranks; ++source) {
        most = max(most, p.recv_offsets[source + 1] - p.recv_offsets[source]);
    }
    const int end = most * num_ranks;
    Walk walk;
    const int first = find_record(p, team, team.index, end);
    walk.ahead = row_of_lane(p, first, end);
    begin_record(p, team, end, walk, first);
    uint32_t chunk = take_chunk(walk.left);
    if (walk.number < end) fetch_chunk(p, walk.mine, chunk, team.thread, chunks);
    copy_commit();
    float sum[kVec] = {};
    uint32_t parity = 0;
    while (walk.number < end) {
        // The chunk to add now, whose copy is under way.
        const RowOfLane mine = walk.mine;
        const uint32_t now = chunk;
        const int number = walk.number, step = walk.step;
        const bool ends_step = walk.left == 0;
        if (ends_step) {
            if (step + 1 < kVecsPerThread) {
                ++walk.step;
                walk.left = __ballot_sync(kAllLanes, mine.row >= 0);
            } else {
                begin_record(p, team, end, walk, find_record(p, team, number + team.count, end));
            }
        }
        chunk = take_chunk(walk.left);
        if (walk.number < end) {
            fetch_chunk(p, walk.mine, chunk, team.vec(walk.step), chunks + (parity ^ 1) * kChunkBytes);
        }
        copy_commit();
        copy_wait<1>();
        add_chunk(p, mine, now, chunks + parity * kChunkBytes, sum);
        parity ^= 1;
        if (!ends_step) continue;
        const Record record = record_of(p, number);
        Quantizer quantizer = p.quantizer;
        quantizer.subsequence = num_ranks * (1 + record.source) + comm.rank;
        const int token = kStochastic ? p.record_src_token[record.index] : 0, vec = team.vec(step);
        write_record(sender.stage(), encode_wire<false>(sum, 0, quantizer, token, vec), vec);
#pragma unroll
        for (int e = 0; e < kVec; ++e)
            sum[e] = 0.0f;
        if (step + 1 < kVecsPerThread) continue;
        const int64_t index = slot_index(comm, comm.rank, record.slot);
        uint8_t* destination =
            region<uint8_t>(comm, record.source, comm.combine_records) + index * kRecordBytes;
        uint32_t* flag = region<uint32_t>(comm, record.source, comm.combine_flags) + index;
        sender.send(team, team.thread == 0 ? destination : nullptr, flag);
    }
    sender.finish(team);
}

// Any grid and block; a warp takes a part of every so manieth token, waits for the flags of the ranks it went
// to, and reads the part of each of their records once.
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
