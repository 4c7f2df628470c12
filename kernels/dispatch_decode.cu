// Dispatch of few tokens by one kernel, from routing to the converted rows, without the host: what counts is
// how long one token takes. To the peers it is no different from route, dispatch_send and dispatch_recv.
#include "count.cuh"
#include "dispatch_send.cuh"
#include "receiver.cuh"
#include "route.cuh"

static_assert(kTeams == 1, "a block sends one record after the other, then receives");
static_assert(kPlaces);

struct DispatchDecodeParams {
    DispatchSendParams send;
    DispatchRecvParams recv;
    int32_t* send_slot;  // out [num_tokens, num_ranks]
    int32_t* ordinals;   // out [num_tokens, kNumTopk]
};

static_assert(sizeof(DispatchDecodeParams) == QCOMM_SIZEOF_DISPATCH_DECODE,
              "qcomm/ops/decode.py holds the same");

// What a block knows of the call, in shared memory besides the stages: where its copy of the counts lies.
struct Decode {
    Outbox outbox;
    Inbox inbox;
    DispatchRecvParams recv;  // with the placement's counts in shared memory
    int first_bad;
};

// Numbers this block's tokens; every block looks at all tokens of the rank. Block 0 also publishes the
// counts.
__device__ __forceinline__ void route_tokens(const DispatchDecodeParams& p, uint32_t epoch, Decode& decode,
                                             uint32_t* bits) {
    const Comm& comm = p.send.comm;
    const int words = (p.send.num_tokens + 31) / 32, num_keys = comm.num_experts + comm.num_ranks;
    const RouteMap map = {comm, bits, words, 0};
    for (int i = threadIdx.x; i < num_keys * words; i += blockDim.x)
        bits[i] = 0;
    if (threadIdx.x == 0) decode.first_bad = kNoBadToken;
    __syncthreads();
    const Index* topk_idx = reinterpret_cast<const Index*>(p.send.topk_idx);
    const int first_bad = map.fill(topk_idx, p.send.num_tokens);
    if (first_bad != kNoBadToken) atomicMin(&decode.first_bad, first_bad);
    __syncthreads();
    const int each = comm.num_ranks + kNumTopk;
    for (int i = threadIdx.x;; i += blockDim.x) {
        const int64_t token = blockIdx.x + static_cast<int64_t>(i / each) * gridDim.x;
        const int j = i % each - comm.num_ranks;
        if (token >= p.send.num_tokens) break;
        if (j < 0) {
            p.send_slot[token * comm.num_ranks + i % each] = map.number(comm.num_experts + i % each, token);
        } else {
            const Index expert = topk_idx[token * kNumTopk + j];
            const bool valid = expert >= 0 && expert < comm.num_experts;
            p.ordinals[token * kNumTopk + j] = valid ? map.number(static_cast<int>(expert), token) : 0;
        }
    }
    if (blockIdx.x == 0) {
        publish_counts(comm, epoch, decode.first_bad, [&](int key) { return map.count(key); });
    }
    __syncthreads();
}

// Any grid whose blocks are on the GPU at the same time; kWorkers warps and kSenders more. Dynamic shared
// memory, 128-byte aligned: kStages stages of a record or a row, whichever is larger; where tables of counts
// lie, first the bitmaps of routing. A block routes and sends its tokens, then receives its records. Counts
// the call in state->epoch.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_decode(const __grid_constant__ DispatchDecodeParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ Decode decode;
    const Comm& comm = p.send.comm;
    const Placement& placement = p.recv.placement;
    const uint32_t epoch = comm.state->epoch + 1;
    int32_t* tables = reinterpret_cast<int32_t*>(shared + kStages * QCOMM_DECODE_STAGE_BYTES);
    if (threadIdx.x == 0) {
        decode.outbox.init();
        decode.inbox.init();
    }
    if (blockIdx.x == 0) {
        announce(comm, epoch);
        // Before this rank's route flag, for which every block waits.
        if (threadIdx.x < 2) placement.overflows[threadIdx.x] = 0;
    }
    if (__syncthreads_or(timed_out(comm))) return;
    route_tokens(p, epoch, decode, reinterpret_cast<uint32_t*>(tables));
    if (threadIdx.x >= 32 * kWorkers) {
        send_records(p.send, epoch, decode.outbox, shared);
    } else {
        encode_tokens(p.send, decode.outbox, shared);
    }

    const bool ready = wait_for_counts(comm, epoch, blockIdx.x == 0);
    if (ready) {
        const int num_local = comm.num_local_experts, num_ranks = comm.num_ranks;
        int32_t* counted = tables + 2 * num_local + num_ranks + 2;
        if (threadIdx.x == 0) {
            decode.recv = p.recv;
            Placement& mine = decode.recv.placement;
            mine.recv_offsets = counted;
            mine.num_tokens_per_expert = mine.recv_offsets + num_ranks + 1;
            mine.source_starts = mine.num_tokens_per_expert + num_local;
            if (placement.group_offsets != nullptr)
                mine.group_offsets = mine.source_starts + num_ranks * num_local;
        }
        __syncthreads();
        const Placement& mine = decode.recv.placement;
        count_records(comm, mine, epoch, tables, blockIdx.x == 0);
        __syncthreads();
        if (blockIdx.x == 0) {
            for (int i = threadIdx.x; i <= num_ranks; i += blockDim.x)
                placement.recv_offsets[i] = mine.recv_offsets[i];
            for (int i = threadIdx.x; i < num_local; i += blockDim.x)
                placement.num_tokens_per_expert[i] = mine.num_tokens_per_expert[i];
            for (int i = threadIdx.x; placement.group_offsets != nullptr && i <= num_local; i += blockDim.x)
                placement.group_offsets[i] = mine.group_offsets[i];
        }
        note_rest(comm, mine);
        const int warp = threadIdx.x / 32;
        if (warp < kWorkers) {
            convert_records(decode.recv, decode.inbox, shared);
        } else if (warp == kWorkers) {
            tell_records(decode.recv, epoch, decode.inbox, 0);
        }
    }
    end_call(comm, epoch);
}
