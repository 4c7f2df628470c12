// Waiting for a peer: the only loop on a flag. Every wait has a deadline; a wait that passes it reports who
// waited for what, and from then on every wait of this buffer returns at once, so that kernels end and the
// host raises.
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

constexpr int kPollNs = 200;

// Waits until the flag, a counter that only grows, has reached `expected`; then everything the peer wrote
// before it raised the flag is visible. Returns false past the deadline.
__device__ __forceinline__ bool wait_flag(const Comm& comm, const uint32_t* flag, uint32_t expected, int peer,
                                          Phase phase) {
    if (static_cast<int32_t>(load_acquire_sys(flag) - expected) >= 0) return true;
    const uint64_t start = global_timer_ns();
    while (static_cast<int32_t>(load_relaxed_sys(flag) - expected) < 0) {
        if (timed_out(comm)) return false;
        if (global_timer_ns() - start > comm.deadline_ns) {
            if (atomicExch(&comm.state->timed_out, 1u) == 0) {
                write_report(&comm.reports->timeout, kTimeout, comm, peer, phase, expected,
                             load_relaxed_sys(flag));
            }
            return false;
        }
        __nanosleep(kPollNs);
    }
    load_acquire_sys(flag);
    return true;
}

// The same, for what only one thread of a call waits for: notes how long the peer kept this rank waiting.
__device__ __forceinline__ bool wait_for_peer(const Comm& comm, const uint32_t* flag, uint32_t expected,
                                              int peer, Phase phase) {
    const uint64_t start = global_timer_ns();
    const bool came = wait_flag(comm, flag, expected, peer, phase);
    comm.state->waited_ns[peer] += global_timer_ns() - start;
    return came;
}

// Ends a call of one kernel: its last block counts the call in state->epoch, which every block has read by
// then.
__device__ __forceinline__ void end_call(const Comm& comm, uint32_t epoch) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (atomicAdd(&comm.state->blocks_done, 1u) == gridDim.x - 1) {
        comm.state->blocks_done = 0;
        comm.state->epoch = epoch;
    }
}

// Tells the peers that this rank has begun a call. Call from one warp.
__device__ __forceinline__ void announce(const Comm& comm, uint32_t epoch) {
    const int lane = threadIdx.x % 32;
    if (lane < comm.num_ranks) raise(comm, lane, comm.barrier_flags, epoch);
}
