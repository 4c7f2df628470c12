// Dispatch of few tokens by one kernel, from routing to the converted rows, without the host: what counts is
// how long one token takes. To the peers it is no different from route, dispatch_send and dispatch_recv.
#include "count.cuh"
#include "dispatch_send.cuh"
#include "receiver.cuh"
#include "route.cuh"

static_assert(kPlaces);

struct DispatchDecodeParams {
    DispatchSendParams send;  // its send_slot and ordinals are written here
    DispatchRecvParams recv;
    int32_t count_words;  // of the tables of counts
    int32_t padding;
};

static_assert(sizeof(DispatchDecodeParams) == QCOMM_SIZEOF_DISPATCH_DECODE,
              "qcomm/ops/dispatch_decode.py holds the same");

// What a block knows of the call, in shared memory besides the stages: where its copy of the counts lies.
struct Decode {
    Outbox outbox;
    Inbox inbox;
    Placement tables;  // the handle's, with the counts in shared memory
    uint64_t overflows;
    int first_bad;
    bool counted;
};

// Besides the workers: those that count what comes, of which kTeams then tell of records and the others fill
// the handle; and the senders.
constexpr int kCounters = QCOMM_COUNTERS;
static_assert(kTeams < kCounters, "a warp fills the handle");
using Counters = Warps<kWorkers, kCounters, 13>;
using Clerks = Warps<kWorkers + kTeams, kCounters - kTeams, 0>;
using Senders = Warps<kWorkers + kCounters, kSenders, 14>;
using Routers = Warps<kWorkers, kCounters + kSenders, 15>;
static_assert(kTeams < 13, "teams have the barriers from 1 on");

// Words of a bitmap of the rank's tokens.
__device__ __forceinline__ int bitmap_words(const DispatchDecodeParams& p) {
    return (p.send.num_tokens + 31) / 32;
}

// Makes ready what the roles share. Call from all threads, before they meet.
__device__ __forceinline__ void init(const DispatchDecodeParams& p, Decode& decode, uint32_t* bits) {
    const int words = number_of_keys(p.send.comm) * bitmap_words(p);
    for (int i = threadIdx.x; i < words; i += blockDim.x)
        bits[i] = 0;
    if (threadIdx.x != 0) return;
    decode.outbox.init();
    decode.inbox.init();
    decode.overflows = 0;
    decode.first_bad = kNoBadToken;
}

// Numbers this block's tokens. Call from one warp.
__device__ __forceinline__ void number_tokens(const DispatchSendParams& p, const RouteMap& map) {
    const Comm& comm = p.comm;
    const int each = comm.num_ranks + kNumTopk;
#pragma unroll 1
    for (int i = threadIdx.x % 32;; i += 32) {
        const int64_t token = blockIdx.x + static_cast<int64_t>(i / each) * gridDim.x;
        const int j = i % each - comm.num_ranks;
        if (token >= p.num_tokens) break;
        if (j < 0) {
            p.send_slot[token * comm.num_ranks + i % each] = map.number(comm.num_experts + i % each, token);
        } else {
            const Index expert = reinterpret_cast<const Index*>(p.topk_idx)[token * kNumTopk + j];
            const bool valid = expert >= 0 && expert < comm.num_experts;
            p.ordinals[token * kNumTopk + j] = valid ? map.number(static_cast<int>(expert), token) : 0;
        }
    }
}

// Fills the handle from the tables of this block.
__device__ __forceinline__ void fill_handle(const DispatchRecvParams& p, const Placement& tables) {
    const Clerks clerks;
    const Comm& comm = p.comm;
    const Placement& handle = p.placement;
    const auto copy = [&](int32_t* to, const int32_t* from, int count) {
#pragma unroll 1
        for (int i = clerks.thread(); i < count; i += clerks.size())
            to[i] = from[i];
    };
    if (blockIdx.x == 0) {
        copy(handle.recv_offsets, tables.recv_offsets, comm.num_ranks + 1);
        copy(handle.num_tokens_per_expert, tables.num_tokens_per_expert, comm.num_local_experts);
        if (handle.group_offsets != nullptr) {
            copy(handle.group_offsets, tables.group_offsets, comm.num_local_experts + 1);
        }
    }
    note_rest(comm, EveryBlock<Clerks>(), tables);
    if (p.pads || tables.layout == kTokenMajor) return;
    constexpr int kWarps = kCounters - kTeams;
    pad_rows(p, tables, nullptr, blockIdx.x + gridDim.x * (clerks.thread() / 32), gridDim.x * kWarps);
}

// Counts what comes into tables of this block, tells the teams of its records and fills the handle. Call from
// the counters.
__device__ __forceinline__ void receive_records(const DispatchRecvParams& p, uint32_t epoch, Decode& decode,
                                                int32_t* counts) {
    const Comm& comm = p.comm;
    const Counters counters;
    const int num_local = comm.num_local_experts, num_ranks = comm.num_ranks, team = counters.thread() / 32;
    if (team < kTeams) tell_rehearsal(decode.inbox, team);
    int32_t* table = counts + num_ranks * (2 + num_local);
    if (counters.thread() == 0) {
        Placement& tables = decode.tables;
        tables = p.placement;
        tables.recv_offsets = table + 2 * num_local + num_ranks + 2;
        tables.num_tokens_per_expert = tables.recv_offsets + num_ranks + 1;
        tables.source_starts = tables.num_tokens_per_expert + num_local;
        if (tables.group_offsets != nullptr)
            tables.group_offsets = tables.source_starts + num_ranks * num_local;
    }
    const bool came = counters.all(gather_counts(comm, counters, epoch, blockIdx.x == 0, counts));
    if (came) count_records(comm, counters, decode.tables, counts, table, blockIdx.x == 0);
    if (counters.thread() == 0) decode.counted = came;
    counters.sync();
    if (team >= kTeams) {
        if (came) fill_handle(p, decode.tables);
    } else if (came) {
        tell_records(p, decode.tables, epoch, decode.inbox, team, 1);
    } else {
        tell_end(decode.inbox, team, 1);
    }
}

// What the block will need of the inputs; before it knows anything else.
__device__ __forceinline__ void prefetch_inputs(const DispatchSendParams& p) {
    for (int token = threadIdx.x; token < p.num_tokens; token += blockDim.x)
        prefetch(reinterpret_cast<const Index*>(p.topk_idx) + static_cast<int64_t>(token) * kNumTopk);
    const int64_t token = blockIdx.x;
    if (threadIdx.x == 0 && token < p.num_tokens && p.topk_weights != nullptr)
        prefetch(p.topk_weights + token * kNumTopk);
}

// Any grid whose blocks are on the GPU at the same time; kWorkers warps, then kCounters, then kSenders.
// Dynamic shared memory, 128-byte aligned: kStages stages of records, kTeams * kStages of rows; then tables
// of counts; then the bitmaps of routing. The workers encode the block's tokens while the others route them,
// and convert records while those send, count and tell. Every block looks at all tokens of the rank; what the
// peers are told of them is told by the first. Counts the call in state->epoch.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_decode(const __grid_constant__ DispatchDecodeParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ Decode decode;
    const Comm& comm = p.send.comm;
    const uint32_t epoch = next_call(comm);
    uint8_t* rows = shared + kStages * kSlotBytes;
    int32_t* counts = reinterpret_cast<int32_t*>(rows + kTeams * kStages * kStageBytes);
    uint32_t* bits = reinterpret_cast<uint32_t*>(counts) + p.count_words;
    const int warp = threadIdx.x / 32;
    const bool dead = timed_out(comm);
    if (blockIdx.x == 0 && warp == 0 && !dead) announce(comm, epoch);
    prefetch_inputs(p.send);
    Encoder encoder(p.send);
    if (warp < kWorkers) encoder.begin();
    init(p, decode, bits);
    if (__syncthreads_or(dead)) return;
    if (warp < kWorkers) {
        Shares shares;
        encoder.encode(decode.outbox, shares, shared);
        convert_records(p.recv, decode.inbox, rows, &decode.overflows);
        if (decode.counted && p.recv.pads) {
            Team().sync();
            write_padding(p.recv, decode.tables, rows);
        }
    } else {
        const Routers routers;
        const RouteMap map = {comm, bits, bitmap_words(p), 0};
        const Index* topk_idx = reinterpret_cast<const Index*>(p.send.topk_idx);
        const int first_bad = map.fill(routers, topk_idx, p.send.num_tokens);
        if (first_bad != kNoBadToken) atomicMin(&decode.first_bad, first_bad);
        routers.sync();
        if (warp < kWorkers + kCounters) {
            publish_counts(comm, EveryBlock<Counters>(), epoch, decode.first_bad,
                           [&](int key) { return map.count(key); });
            receive_records(p.recv, epoch, decode, counts);
        } else {
            bool began = true;
            if (warp == kWorkers + kCounters) number_tokens(p.send, map);
            if (warp == kWorkers + kCounters + kSenders - 1) {
                began = all_began(comm, epoch, kPhaseRoute, false);
            }
            Shares shares;
            send_records(p.send, epoch, Senders().all(began), decode.outbox, shares, shared);
        }
    }
    const int64_t overflows = end_call(comm, epoch, &decode.overflows);
    if (overflows >= 0) {
        p.recv.placement.overflows[0] = overflows;
        p.recv.placement.overflows[1] = 0;
    }
}
