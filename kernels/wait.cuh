// Waiting for a peer: the only loop on flags. Every wait has a deadline; a wait that passes it reports who
// waited for what, and from then on every wait of this buffer returns soon, so that kernels end and the host
// raises.
#pragma once

#include "nodes.cuh"

enum Phase {
    kPhaseBarrier = QCOMM_PHASE_BARRIER,
    kPhaseRoute = QCOMM_PHASE_ROUTE,
    kPhaseDispatch = QCOMM_PHASE_DISPATCH,
    kPhaseCombine = QCOMM_PHASE_COMBINE,
};

enum ReportCode { kTimeout = QCOMM_TIMEOUT, kOverflow = QCOMM_OVERFLOW, kBadRoute = QCOMM_BAD_ROUTE };

__device__ __forceinline__ void write_report(Report* report, uint32_t code, const Comm& comm, int peer,
                                             int phase, int expected, int seen) {
    report->rank = comm.rank;
    report->peer = peer;
    report->phase = phase;
    report->expected = expected;
    report->seen = seen;
    store_release_sys(&report->code, code);
}

__device__ __forceinline__ bool timed_out(const Comm& comm) {
    return load_relaxed_sys(&comm.state->timed_out) != 0;
}

// The number of the call that begins. Never 0, which flags hold that no call has written; counts go by its
// parity.
__device__ __forceinline__ uint32_t next_call(const Comm& comm) {
    const uint32_t epoch = comm.state->epoch;
    return epoch == 0xffffffffu ? 2 : epoch + 1;
}

// What the first kernel of a call leaves to the others. Call from one thread.
__device__ __forceinline__ void begin_call(const Comm& comm, uint32_t epoch) {
    comm.state->num_claimed = 0;
    comm.state->epoch = epoch;
}

// The number of the call, which its first kernel has left; not from a cache, because kernels may begin before
// the one before them has ended.
__device__ __forceinline__ uint32_t this_call(const Comm& comm) {
    return load_relaxed_sys(&comm.state->epoch);
}

constexpr int kPollNs = 20;
// What ends a wait in vain is seldom looked at, for that delays the next poll.
constexpr uint32_t kPollsPerCheck = 32;

// A flag is the number of the call that wrote it last. Many are written by some calls only, so an old one may
// be any number; but none is ahead of a call that waits for it, except that a peer may have begun the next.
template <bool kMayBeAhead>
__device__ __forceinline__ bool reached(uint32_t flag, uint32_t epoch) {
    return kMayBeAhead ? static_cast<int32_t>(flag - epoch) >= 0 : flag == epoch;
}

// Tells whether a wait since `start` is in vain, and if it is the first, reports it.
__device__ __forceinline__ bool in_vain(const Comm& comm, uint64_t start, const uint32_t* flag,
                                        uint32_t epoch, int peer, Phase phase) {
    if (timed_out(comm)) return true;
    if (global_timer_ns() - start <= comm.deadline_ns) return false;
    if (atomicExch(&comm.state->timed_out, 1u) == 0)
        write_report(&comm.reports->timeout, kTimeout, comm, peer, phase, epoch, load_relaxed_sys(flag));
    return true;
}

// Waits until came() or, looked at seldom, gives_up(); tells whether it came.
template <typename Came, typename GivesUp>
__device__ __forceinline__ bool poll(const Came& came, const GivesUp& gives_up) {
    for (uint32_t polls = 1; !came(); ++polls) {
        if (polls % kPollsPerCheck == 0 && gives_up()) return false;
        __nanosleep(kPollNs);
    }
    return true;
}

// Waits until the flag says that a call's turn has come, and orders nothing. Returns false past the deadline.
template <bool kMayBeAhead = false>
__device__ __forceinline__ bool poll_flag(const Comm& comm, const uint32_t* flag, uint32_t epoch, int peer,
                                          Phase phase) {
    const uint64_t start = global_timer_ns();
    return poll([&] { return reached<kMayBeAhead>(load_relaxed_sys(flag), epoch); },
                [&] { return in_vain(comm, start, flag, epoch, peer, phase); });
}

// Waits until some of the flags of a warp's lanes, those with one, have come, and returns which, none past
// the deadline; then what their peers wrote before is visible.
__device__ __forceinline__ uint32_t wait_any_flag(const Comm& comm, bool has_flag, const uint32_t* flag,
                                                  uint32_t epoch, int peer, Phase phase) {
    const uint64_t start = global_timer_ns();
    uint32_t those;
    const auto came = [&] {
        those = __ballot_sync(kAllLanes, has_flag && reached<false>(load_acquire_sys(flag), epoch));
        return those != 0;
    };
    poll(came, [&] {
        return __any_sync(kAllLanes, has_flag && in_vain(comm, start, flag, epoch, peer, phase)) != 0;
    });
    return those;
}

// Waits likewise; then everything the peer wrote before it raised the flag is visible.
template <bool kMayBeAhead = false>
__device__ __forceinline__ bool wait_flag(const Comm& comm, const uint32_t* flag, uint32_t epoch, int peer,
                                          Phase phase) {
    if (reached<kMayBeAhead>(load_acquire_sys(flag), epoch)) return true;
    if (!poll_flag<kMayBeAhead>(comm, flag, epoch, peer, phase)) return false;
    load_acquire_sys(flag);
    return true;
}

// Notes how long a peer has kept this rank waiting since `start`. Call from one thread of a call.
__device__ __forceinline__ void note_wait(const Comm& comm, int peer, uint64_t start) {
    comm.state->waited_ns[peer] += global_timer_ns() - start;
}

// Waits until a rank has begun a call; one thread of the call notes how long that took.
__device__ __forceinline__ bool wait_begun(const Comm& comm, int rank, uint32_t epoch, Phase phase,
                                           bool notes) {
    const uint64_t start = notes ? global_timer_ns() : 0;
    const uint32_t* flag = flag_at(comm, comm.rank, comm.barrier_flags, rank);
    const bool began = wait_flag<true>(comm, flag, epoch, rank, phase);
    if (notes) note_wait(comm, rank, start);
    return began;
}

// Waits until every rank has begun the call; returns false past the deadline. Call from one warp.
__device__ __forceinline__ bool all_began(const Comm& comm, uint32_t epoch, Phase phase, bool notes) {
    const int lane = threadIdx.x % 32;
    return __all_sync(kAllLanes, lane >= comm.num_ranks || wait_begun(comm, lane, epoch, phase, notes));
}

// Lets the sender begin when every rank has begun the call, and not sooner: on every SM, it would keep out
// what a late rank waits for. Call from one warp.
__device__ __forceinline__ void let_sender_begin(const Comm& comm, uint32_t epoch, Phase phase) {
    all_began(comm, epoch, phase, true);
    let_next_begin();
}

// The number of a call, and whether every rank has begun it.
struct Begun {
    uint32_t epoch;
    bool everywhere;
};

// What a sender that was let begin is told of its call: waits for the end of the kernel that let it, after
// which what follows may begin too.
__device__ __forceinline__ Begun begun_before(const Comm& comm) {
    wait_for_previous();
    let_next_begin();
    return {this_call(comm), !timed_out(comm)};
}

constexpr int kDoneShift = 16;

// Ends a call of one kernel: its last block counts the call in state->epoch, which every block has read by
// then. Call from all threads. Tells one thread of that block the sum of all blocks' overflows, which are
// `overflows` of each, in shared memory or null; all others, -1.
__device__ __forceinline__ int64_t end_call(const Comm& comm, uint32_t epoch, const uint64_t* overflows) {
    using Word = unsigned long long;  // nvcc's uint64_t is another type of this size
    __syncthreads();
    if (threadIdx.x != 0) return -1;
    const Word mine = 1 + (overflows == nullptr ? 0 : static_cast<Word>(*overflows) << kDoneShift);
    const Word all = atomicAdd(reinterpret_cast<Word*>(&comm.state->done), mine) + mine;
    if ((all & ((1u << kDoneShift) - 1)) != gridDim.x) return -1;
    comm.state->done = 0;
    comm.state->epoch = epoch;
    return static_cast<int64_t>(all >> kDoneShift);
}

// Tells the peers that this rank has begun a call. Call from one warp.
__device__ __forceinline__ void announce(const Comm& comm, uint32_t epoch) {
    const int lane = threadIdx.x % 32;
    if (lane < comm.num_ranks) raise(comm, lane, comm.barrier_flags, epoch);
}
