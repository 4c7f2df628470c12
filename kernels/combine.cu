// Combine: combine_send sums each record's rows and sends the sum to the token's rank; combine_recv adds the
// sums of each token by rank; combine_decode does both, for few tokens. Float32, every product and every sum
// rounded; the order of addition is fixed.
#include "combine_send.cuh"

// Vectors of a token that a receiving warp takes, so that it looks at the flags once for several; but where
// there are as many warps as vectors, one.
constexpr int kPartVecs = kTakesValues ? 2 : 1;
constexpr int kPartsPerToken = (kNumVecs + 32 * kPartVecs - 1) / (32 * kPartVecs);

struct CombineRecvParams {
    Comm comm;
    const int32_t* send_slot;  // [num_tokens, slots_per_token]
    uint8_t* out;              // out [num_tokens, kHidden] bf16
    float* values;             // out [num_tokens, kNumTopk], sums of what came, or null
    int32_t num_tokens;
};

static_assert(sizeof(CombineRecvParams) == QCOMM_SIZEOF_COMBINE_RECV, "qcomm/ops/combine.py holds the same");

// Where a token's sums from a rank are. Sums of another node, where they are added up there first, count as
// those of its first rank.
__device__ __forceinline__ bool by_node(const Comm& comm, int rank) {
    return kForwards && !same_node(comm, rank);
}

__device__ __forceinline__ int slot_of_sum(const Comm& comm, const int32_t* send_slot, int token, int rank) {
    const int64_t first = static_cast<int64_t>(token) * slots_per_token(comm);
    if (!by_node(comm, rank)) return send_slot[first + rank];
    return rank % max(1, kRanksPerNode) == 0 ? send_slot[first + comm.num_ranks + node_of(rank)] : -1;
}

__device__ __forceinline__ int sums_index(const Comm& comm, int rank) {
    return by_node(comm, rank) ? comm.num_ranks + node_of(rank) : rank;
}

// Warps take parts of tokens in turn. A warp waits for the flags of the ranks a token went to, and reads its
// part of each of their records once. The loops stand here and again in combine_forward.cu, because as a
// function that both call they take registers that combine_decode does not have.
__device__ __forceinline__ void add_sums(const CombineRecvParams& p, uint32_t epoch) {
    const Comm& comm = p.comm;
    const int lane = threadIdx.x % 32;
    const int warp = blockIdx.x + gridDim.x * (threadIdx.x / 32), num_warps = gridDim.x * (blockDim.x / 32);
    const uint8_t* records = region<uint8_t>(comm, comm.rank, comm.combine_records);
    const auto slot_of = [&](int part) {
        const int token = part / kPartsPerToken;
        return lane < comm.num_ranks && token < p.num_tokens ? slot_of_sum(comm, p.send_slot, token, lane)
                                                             : -1;
    };

    int next_slot = slot_of(warp);
    for (int part = warp; part < p.num_tokens * kPartsPerToken; part += num_warps) {
        const int token = part / kPartsPerToken, first_vec = part % kPartsPerToken * kPartVecs * 32;
        const int slot = next_slot;
        next_slot = slot_of(part + num_warps);
        bool arrived = true;
        if (slot >= 0) {
            const uint32_t* flag = region<uint32_t>(comm, comm.rank, comm.combine_flags) +
                                   slot_index(comm, sums_index(comm, lane), slot) * kFlagWords;
            arrived = wait_flag(comm, flag, epoch, lane, kPhaseCombine);
        }
        if (!__all_sync(kAllLanes, arrived)) return;
        const uint32_t ranks = __ballot_sync(kAllLanes, slot >= 0);
        const auto index_of = [&](int rank) {
            return slot_index(comm, sums_index(comm, rank), __shfl_sync(kAllLanes, slot, rank));
        };
        if (kTakesValues && p.values != nullptr && first_vec == 0) {
            float value = 0.0f;
            for (uint32_t left = ranks; left != 0; left &= left - 1) {
                const int rank = __ffs(left) - 1;
                const int64_t index = index_of(rank);
                const volatile float* values =
                    reinterpret_cast<const volatile float*>(records + index * kSlotBytes + kRecordBytes);
                if (lane < kNumTopk) value += values[lane];
            }
            if (lane < kNumTopk) p.values[static_cast<int64_t>(token) * kNumTopk + lane] = value;
        }
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
                    const int64_t index = index_of(rank);
                    if (valid[i]) parts[i] = read_record(records + index * kSlotBytes, vec);
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

// Any grid; kWorkers warps, one that loads and kSenders that send. Dynamic shared memory: kChunks chunks,
// then kStages stages, 128-byte aligned: bulk copies that begin amid a line are slow. Reads each row of y
// once and writes each record once: the dispatch's slot of this rank's region at the source, then, with
// release order, that slot's flag. It may begin before barrier has ended, which it waits for before it sends;
// the receive may begin when all blocks are past that.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    combine_send(const __grid_constant__ CombineSendParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ SumBoard board;
    const bool dead = timed_out(p.comm);
    const BlockRecords records(p);
    if (threadIdx.x == 0) init(board);
    if (__syncthreads_or(dead)) return wait_for_previous();
    reduce_and_send<false>(p, records, 0, board, shared);
}

// Any grid, QCOMM_RECV_THREADS threads. It may begin when the sender lets it.
extern "C" __global__ void __launch_bounds__(QCOMM_RECV_THREADS)
    combine_recv(const __grid_constant__ CombineRecvParams p) {
    if (!timed_out(p.comm)) add_sums(p, this_call(p.comm));
    wait_for_previous();
}

struct CombineDecodeParams {
    CombineSendParams send;
    CombineRecvParams recv;
};

static_assert(sizeof(CombineDecodeParams) == QCOMM_SIZEOF_COMBINE_DECODE,
              "qcomm/ops/combine.py holds the same");

// What barrier, combine_send and combine_recv do, by one kernel: for few tokens, where what counts is how
// long one takes. Any grid whose blocks are on the GPU at the same time; block and dynamic shared memory of
// combine_send. Counts the call in state->epoch.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    combine_decode(const __grid_constant__ CombineDecodeParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ SumBoard board;
    const Comm& comm = p.send.comm;
    const uint32_t epoch = next_call(comm);
    const bool dead = timed_out(comm);
    const BlockRecords records(p.send);
    if (threadIdx.x == 0) init(board);
    if (!__syncthreads_or(dead)) {
        reduce_and_send<true>(p.send, records, epoch, board, shared);
        add_sums(p.recv, epoch);
    }
    end_call(comm, epoch, nullptr);
}
