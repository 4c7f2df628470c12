// Routing: where each token goes. No atomic decides an order.
#include "route.cuh"

struct RouteParams {
    Comm comm;
    const Index* topk_idx;  // [num_tokens, kNumTopk]
    int32_t* send_slot;     // out [num_tokens, slots_per_token]
    int32_t* ordinals;      // out [num_tokens, kNumTopk]: earlier tokens of this rank to the same expert
    int32_t num_tokens;
    int32_t chunk;  // tokens a block numbers, a multiple of 32
};

static_assert(sizeof(RouteParams) == QCOMM_SIZEOF_ROUTE, "qcomm/ops/route.py holds the same structure");

constexpr int kKeysPerLoad = 4;

__host__ __device__ constexpr int whole_loads(int num_keys) {
    return (num_keys + kKeysPerLoad - 1) / kKeysPerLoad * kKeysPerLoad;
}

// Tells the peers that this call has begun; numbers each token within its destination ranks and its experts,
// in token order, and writes this rank's counts to the peers. Counts the call in state->epoch.
//
// Grid ceil(num_tokens / chunk), at least 1 and at most QCOMM_MAX_CHUNKS; any block of whole warps. Dynamic
// shared memory, for num_keys = number_of_keys rounded up to 4: num_keys * (1 + chunk / 32) words:
// how many earlier tokens go to each, then for each a bitmap of the chunk's tokens. A block
// publishes its chunk's counts and adds up those of the chunks before it; blocks start in order, so it waits
// only for blocks that run. The last block, which thereby knows the totals, writes them to every peer. The
// first waits until every rank has begun the call; then the sender may begin.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS) route(const __grid_constant__ RouteParams p) {
    extern __shared__ __align__(16) uint32_t shared[];
    if (blockIdx.x != 0) let_next_begin();
    const Comm& comm = p.comm;
    const int num_keys = whole_loads(number_of_keys(comm));
    const int words = p.chunk / 32;
    uint32_t* before = shared;
    const int begin = blockIdx.x * p.chunk;
    const int end = min(begin + p.chunk, p.num_tokens);
    const uint32_t epoch = next_call(comm);
    const bool dead = timed_out(comm);
    const bool is_last = blockIdx.x == gridDim.x - 1;
    const RouteMap map = {comm, shared + num_keys, words, begin};
    for (int i = threadIdx.x; i < num_keys * (1 + words); i += blockDim.x)
        shared[i] = 0;
    // Peers that are late must find what the call that timed out told them, and nothing newer.
    if (__syncthreads_or(dead)) return;
    if (blockIdx.x == 0 && threadIdx.x < 32) announce(comm, epoch);
    const int first_bad = map.fill(WholeBlock(), p.topk_idx, end);
    if (first_bad != kNoBadToken) atomicMin(&comm.state->bad_token, first_bad);
    __syncthreads();
    if (!is_last) {
        for (int key = threadIdx.x; key < num_keys; key += blockDim.x)
            comm.chunk_counts[blockIdx.x * num_keys + key] = map.count(key);
        __syncthreads();
        if (threadIdx.x == 0) store_release_gpu(comm.chunk_flags + blockIdx.x, epoch);
    }
    for (int chunk = threadIdx.x; chunk < blockIdx.x; chunk += blockDim.x) {
        wait_flag(comm, comm.chunk_flags + chunk, epoch, comm.rank, kPhaseRoute);
    }
    __syncthreads();
    // A thread adds up four keys of one chunk in `parts`.
    const int columns = num_keys / kKeysPerLoad, parts = max(1, static_cast<int>(blockDim.x) / columns);
    for (int i = threadIdx.x; i < columns * parts; i += blockDim.x) {
        const int column = i % columns;
        const uint4* counts = reinterpret_cast<const uint4*>(comm.chunk_counts) + column;
        uint32_t sums[kKeysPerLoad] = {};
#pragma unroll 4
        for (int chunk = i / columns; chunk < blockIdx.x; chunk += parts) {
            const uint4 more = counts[chunk * columns];
            sums[0] += more.x;
            sums[1] += more.y;
            sums[2] += more.z;
            sums[3] += more.w;
        }
#pragma unroll
        for (int k = 0; k < kKeysPerLoad; ++k) {
            if (sums[k] != 0) atomicAdd(before + kKeysPerLoad * column + k, sums[k]);
        }
    }
    __syncthreads();

    if (is_last) {
        const int bad = *reinterpret_cast<volatile int32_t*>(&comm.state->bad_token);
        publish_counts(comm, WholeBlock(), epoch, bad,
                       [&](int key) { return static_cast<int>(before[key]) + map.count(key); });
        __syncthreads();
        if (threadIdx.x == 0) {
            comm.state->bad_token = kNoBadToken;
            begin_call(comm, epoch);
        }
    }

    const auto number = [&](int key, int token) {
        const int n = map.number(key, token);
        return n < 0 ? -1 : n + static_cast<int>(before[key]);
    };
    const int num_slots = (end - begin) * slots_per_token(comm), num_entries = (end - begin) * kNumTopk;
    for (int i = threadIdx.x; i < num_slots + num_entries; i += blockDim.x) {
        if (i < num_slots) {
            const int64_t slot = static_cast<int64_t>(begin) * slots_per_token(comm) + i;
            p.send_slot[slot] =
                number(comm.num_experts + i % slots_per_token(comm), begin + i / slots_per_token(comm));
        } else {
            const int entry = i - num_slots;
            const int64_t index = static_cast<int64_t>(begin) * kNumTopk + entry;
            const Index expert = p.topk_idx[index];
            const bool valid = expert >= 0 && expert < comm.num_experts;
            p.ordinals[index] = valid ? number(static_cast<int>(expert), begin + entry / kNumTopk) : 0;
        }
    }
    // When its share is done, for others wait for that.
    if (blockIdx.x == 0 && threadIdx.x < 32) let_sender_begin(comm, epoch, kPhaseRoute);
}
