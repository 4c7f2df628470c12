// The hop of dispatch between nodes: records that another node's rank put here go on to the ranks of this
// node.
#include "sender.cuh"
#include "topk.cuh"
#include "wait.cuh"

static_assert(kForwards && kTeamWarps == 1, "a warp loads a record");

struct DispatchForwardParams {
    Comm comm;
    int32_t* counts;  // [kNodes] records from each node: out, or, in a replay, in
    int32_t* slots;  // [kNodes][max_tokens][kEntryWords], out or in: each record's token, then its slots here
    int32_t replays;
};

static_assert(sizeof(DispatchForwardParams) == QCOMM_SIZEOF_DISPATCH_FORWARD,
              "qcomm/ops/forward.py holds the same");

// What the warps of a block share. Record number n of the block is loaded by team n % kTeams.
struct ForwardBoard {
    Outbox outbox;
    int32_t counts[kNodes];
    int32_t slots[kStages][kRanksPerNode];  // of the record in a stage, -1 for none
};

// A block's records, round robin over the other nodes.
class Arrivals {
  public:
    __device__ __forceinline__ Arrivals(const Comm& comm, const int32_t* counts)
        : own_(node_of(comm.rank)), counts_(counts), i_(static_cast<int>(blockIdx.x - gridDim.x)) {
        for (int node = 0; node < kNodes; ++node)
            most_ = max(most_, counts[node]);
    }

    // Goes on to the next one; false past the last.
    __device__ __forceinline__ bool next() {
        do {
            i_ += gridDim.x;
            if (slot() >= most_) return false;
        } while (slot() >= counts_[node()]);
        return true;
    }

    __device__ __forceinline__ int node() const {
        const int other = i_ % (kNodes - 1);
        return other < own_ ? other : other + 1;
    }
    __device__ __forceinline__ int slot() const { return i_ / (kNodes - 1); }

  private:
    const int own_;
    const int32_t* counts_;
    int i_;
    int most_ = 0;
};

// Learns how many records come from each node. Call from all threads.
__device__ __forceinline__ bool begin(const DispatchForwardParams& p, uint32_t epoch, ForwardBoard& board) {
    const Comm& comm = p.comm;
    const int node = threadIdx.x;
    bool came = true;
    if (node < kNodes) {
        const int source = counterpart(comm, node);
        int count = 0;
        if (source != comm.rank && p.replays) count = p.counts[node];
        if (source != comm.rank && !p.replays) {
            const Count* put = counts_of(comm, comm.rank, epoch, source) + 2 + comm.num_local_experts;
            came = wait_flag(comm, &put->epoch, epoch, source, kPhaseRoute);
            count = came ? *reinterpret_cast<const volatile int32_t*>(&put->value) : 0;
        }
        board.counts[node] = count;
        if (!p.replays && blockIdx.x == 0) p.counts[node] = count;
    }
    return __syncthreads_and(came);
}

// A team's warp: waits for every kTeams-th of the block's records, and loads it into a stage. One that does
// not come in time goes nowhere.
__device__ __forceinline__ void load_records(const DispatchForwardParams& p, uint32_t epoch,
                                             ForwardBoard& board, uint8_t* stages) {
    const Comm& comm = p.comm;
    const int lane = threadIdx.x % 32, team = threadIdx.x / 32;
    const uint32_t num_bytes = p.replays ? kRecordBytes : kSlotsOffset;
    const uint8_t* inbox = region<uint8_t>(comm, comm.rank, comm.state->nodes.inbox);
    Arrivals arrivals(comm, board.counts);
    for (uint32_t n = 0; arrivals.next(); ++n) {
        if (n % kTeams != team) continue;
        const int64_t index = slot_index(comm, arrivals.node(), arrivals.slot());
        const uint8_t* record = inbox + index * kInboxSlotBytes;
        int32_t* entry = p.slots + index * kEntryWords;
        int slot = -1;
        if (p.replays && lane < kRanksPerNode) slot = entry[1 + lane];
        const uint32_t* flag = flag_at(comm, comm.rank, comm.state->nodes.inbox_flags, index);
        const int source = counterpart(comm, arrivals.node());
        // Every lane looks for itself: an acquire by one shows the bytes to that one.
        const bool came = __all_sync(kAllLanes, wait_flag(comm, flag, epoch, source, kPhaseDispatch));
        if (!p.replays && came) {
            const volatile int32_t* slots = reinterpret_cast<const volatile int32_t*>(record + kSlotsOffset);
            if (lane < kRanksPerNode) slot = slots[node_of(comm.rank) * kRanksPerNode + lane];
            if (lane < kRanksPerNode) entry[1 + lane] = slot;
            if (lane == 31) entry[0] = *reinterpret_cast<const volatile int32_t*>(record + kRecordBytes);
        }
        board.outbox.read.wait_before(n);
        if (lane < kRanksPerNode) board.slots[n % kStages][lane] = came ? slot : -1;
        __syncwarp();
        if (lane != 0) continue;
        if (!came) {
            mbarrier_arrive(board.outbox.written.of(n));
            continue;
        }
        fence_proxy_async_global();
        mbarrier_arrive_expect(board.outbox.written.of(n), num_bytes);
        bulk_load(stage_of(stages, n), record, num_bytes, board.outbox.written.of(n));
    }
}

// A warp that sends every kSenders-th of the block's records to the ranks that it is for, just as their
// source would.
__device__ __forceinline__ void send_on(const DispatchForwardParams& p, uint32_t epoch, ForwardBoard& board,
                                        uint8_t* stages) {
    const Comm& comm = p.comm;
    const int lane = threadIdx.x % 32;
    Sender sender(board.outbox, stages, epoch);
    Arrivals arrivals(comm, board.counts);
    for (uint32_t n = 0; arrivals.next(); ++n) {
        if (n % kSenders != sender.number()) continue;
        sender.next();
        uint8_t* destination = nullptr;
        uint32_t* flag = nullptr;
        if (lane < kRanksPerNode) {
            // Neighbouring records begin with other ranks, so that all links are busy at any time.
            const int there = (lane + n + blockIdx.x) % kRanksPerNode;
            const int slot = board.slots[n % kStages][there];
            if (slot >= 0) {
                const int rank = node_of(comm.rank) * kRanksPerNode + there;
                const int64_t index = slot_index(comm, counterpart(comm, arrivals.node()), slot);
                destination = region<uint8_t>(comm, rank, comm.dispatch_records) + index * kSlotBytes;
                flag = flag_at(comm, rank, comm.dispatch_flags, index);
            }
        }
        sender.send(destination, flag, p.replays ? kRecordBytes : kSlotsOffset);
    }
    sender.finish();
}

// Any grid; kTeams warps that load and kSenders that send. Dynamic shared memory: kStages
// stages, 128-byte aligned. Reads each record in this rank's inbox once, when its source's put has raised its
// flag there, and writes it to the source's region at each rank of this node that it is for; then, with
// release order, that slot's flag. Notes who is for what, which combine and replays need.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_forward(const __grid_constant__ DispatchForwardParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ ForwardBoard board;
    const uint32_t epoch = p.comm.state->epoch;
    if (threadIdx.x == 0) board.outbox.init();
    if (__syncthreads_or(timed_out(p.comm))) return;
    if (!begin(p, epoch, board)) return;
    if (threadIdx.x < 32 * kTeams) {
        load_records(p, epoch, board, shared);
    } else {
        send_on(p, epoch, board, shared);
    }
}
