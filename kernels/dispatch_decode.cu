// Dispatch of few tokens by one kernel, from routing to the converted rows, without the host: what counts is
// how long one token takes. To the peers it is no different from route, dispatch_send and dispatch_recv.
#include "count.cuh"
#include "dispatch_send.cuh"
#include "receiver.cuh"
#include "route.cuh"

static_assert(kTeams <= kSenders, "a warp that sends tells a team of the records that come");
static_assert(kPlaces);

struct DispatchDecodeParams {
    DispatchSendParams send;  // its send_slot and ordinals are written here
    DispatchRecvParams recv;
};

static_assert(sizeof(DispatchDecodeParams) == QCOMM_SIZEOF_DISPATCH_DECODE,
              "qcomm/ops/dispatch_decode.py holds the same");

// What a block knows of the call, in shared memory besides the stages: where its copy of the counts lies.
struct Decode {
    Outbox outbox;
    Inbox inbox;
    Signals<1> counted;
    DispatchRecvParams recv;  // with the placement's counts in shared memory
    int first_bad;
    uint32_t came;
};

// Words of a bitmap of the rank's tokens.
__device__ __forceinline__ int bitmap_words(const DispatchDecodeParams& p) {
    return (p.send.num_tokens + 31) / 32;
}

// Clears what route_tokens fills. Call from all threads, before they meet.
__device__ __forceinline__ void clear_bitmaps(const DispatchDecodeParams& p, Decode& decode, uint32_t* bits) {
    const int words = number_of_keys(p.send.comm) * bitmap_words(p);
    for (int i = threadIdx.x; i < words; i += blockDim.x)
        bits[i] = 0;
    if (threadIdx.x == 0) decode.first_bad = kNoBadToken;
}

// Numbers this block's tokens; every block looks at all tokens of the rank. Block 0 also publishes the
// counts.
__device__ __forceinline__ void route_tokens(const DispatchDecodeParams& p, uint32_t epoch, Decode& decode,
                                             uint32_t* bits) {
    const Comm& comm = p.send.comm;
    const RouteMap map = {comm, bits, bitmap_words(p), 0};
    const Index* topk_idx = reinterpret_cast<const Index*>(p.send.topk_idx);
    const int first_bad = map.fill(topk_idx, p.send.num_tokens);
    if (first_bad != kNoBadToken) atomicMin(&decode.first_bad, first_bad);
    __syncthreads();
    // Before anything else, for the counts of all ranks are what every rank waits for first.
    if (blockIdx.x == 0) {
        publish_counts(comm, epoch, decode.first_bad, [&](int key) { return map.count(key); });
    }
    const int each = comm.num_ranks + kNumTopk;
    for (int i = threadIdx.x;; i += blockDim.x) {
        const int64_t token = blockIdx.x + static_cast<int64_t>(i / each) * gridDim.x;
        const int j = i % each - comm.num_ranks;
        if (token >= p.send.num_tokens) break;
        if (j < 0) {
            p.send.send_slot[token * comm.num_ranks + i % each] =
                map.number(comm.num_experts + i % each, token);
        } else {
            const Index expert = topk_idx[token * kNumTopk + j];
            const bool valid = expert >= 0 && expert < comm.num_experts;
            p.send.ordinals[token * kNumTopk + j] = valid ? map.number(static_cast<int>(expert), token) : 0;
        }
    }
    __syncthreads();
}

// Counts what comes into tables of this block; returns false past the deadline. Call from the workers.
__device__ __forceinline__ bool count_tokens(const DispatchDecodeParams& p, uint32_t epoch, Decode& decode,
                                             int32_t* counts) {
    const Comm& comm = p.send.comm;
    const FirstThreads<32 * kWorkers> workers;
    const int num_local = comm.num_local_experts, num_ranks = comm.num_ranks;
    int32_t* table = counts + num_ranks * (2 + num_local);
    Placement& mine = decode.recv.placement;
    if (threadIdx.x == 32 * (kWorkers - 1)) {
        decode.recv = p.recv;
        mine.recv_offsets = table + 2 * num_local + num_ranks + 2;
        mine.num_tokens_per_expert = mine.recv_offsets + num_ranks + 1;
        mine.source_starts = mine.num_tokens_per_expert + num_local;
        if (mine.group_offsets != nullptr) mine.group_offsets = mine.source_starts + num_ranks * num_local;
    }
    if (!gather_counts(comm, workers, epoch, blockIdx.x == 0, counts, &decode.came)) return false;
    count_records(comm, workers, mine, counts, table, blockIdx.x == 0);
    workers.sync();
    return true;
}

// Fills the handle from the tables of this block. Call from the workers.
__device__ __forceinline__ void note_counts(const Comm& comm, const Placement& handle,
                                            const Placement& tables) {
    constexpr int kThreads = 32 * kWorkers;
    for (int i = threadIdx.x; i <= comm.num_ranks; i += kThreads)
        handle.recv_offsets[i] = tables.recv_offsets[i];
    for (int i = threadIdx.x; i < comm.num_local_experts; i += kThreads)
        handle.num_tokens_per_expert[i] = tables.num_tokens_per_expert[i];
    for (int i = threadIdx.x; handle.group_offsets != nullptr && i <= comm.num_local_experts; i += kThreads)
        handle.group_offsets[i] = tables.group_offsets[i];
}

// What the block will need of the inputs; before it knows anything else.
__device__ __forceinline__ void prefetch_inputs(const DispatchSendParams& p) {
    for (int token = threadIdx.x; token < p.num_tokens; token += blockDim.x)
        prefetch(reinterpret_cast<const Index*>(p.topk_idx) + static_cast<int64_t>(token) * kNumTopk);
    const int64_t token = blockIdx.x;
    if (threadIdx.x == 0 && token < p.num_tokens && p.topk_weights != nullptr)
        prefetch(p.topk_weights + token * kNumTopk);
}

// Any grid whose blocks are on the GPU at the same time; kWorkers warps and kSenders more, which send, and
// the last kTeams of which then tell a team of the records that come. Dynamic shared memory, 128-byte
// aligned: kStages stages of records, kTeams * kStages of rows; then the bitmaps of routing, and later, in
// their place, tables of counts. A block routes and sends its tokens, and receives its records while its own
// are on their way. Counts the call in state->epoch.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_decode(const __grid_constant__ DispatchDecodeParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ Decode decode;
    const Comm& comm = p.send.comm;
    const uint32_t epoch = comm.state->epoch + 1;
    uint8_t* rows = shared + kStages * kSlotBytes;
    int32_t* table = reinterpret_cast<int32_t*>(rows + kTeams * kStages * kStageBytes);
    uint32_t* bits = reinterpret_cast<uint32_t*>(table);
    const bool dead = timed_out(comm);
    prefetch_inputs(p.send);
    if (threadIdx.x == 0) {
        decode.outbox.init();
        decode.inbox.init();
        decode.counted.init(kWorkers);
    }
    const bool works = threadIdx.x < 32 * kWorkers;
    Encoder encoder(p.send);
    if (works) encoder.begin();
    clear_bitmaps(p, decode, bits);
    if (__syncthreads_or(dead)) return;
    // By a warp that has nothing else to do yet. Every warp that tells of records waits for this rank's flag.
    if (blockIdx.x == 0 && threadIdx.x / 32 == kWorkers) {
        if (threadIdx.x % 32 < 2) p.recv.placement.overflows[threadIdx.x % 32] = 0;
        __syncwarp();
        announce(comm, epoch);
    }
    route_tokens(p, epoch, decode, bits);
    if (works) {
        encoder.encode(decode.outbox, shared);
        const bool came = count_tokens(p, epoch, decode, table);
        decode.counted.arrive(0);
        if (came) {
            if (blockIdx.x == 0) note_counts(comm, p.recv.placement, decode.recv.placement);
            note_rest(comm, decode.recv.placement, 32 * kWorkers);
            convert_records(decode.recv, decode.inbox, rows);
        }
    } else {
        send_records(p.send, epoch, decode.outbox, shared);
        const int team = static_cast<int>(threadIdx.x / 32) - (kWorkers + kSenders - kTeams);
        if (team >= 0) {
            decode.counted.wait(0);
            if (decode.came != 0) tell_records(decode.recv, epoch, decode.inbox, team);
        }
    }
    end_call(comm, epoch);
}
