// Starts a call that needs no routing: a replay, or a combine.
//
// Grid 1, block of one warp. Raises this rank's flag in every peer, waits for every peer's,
// and counts the call in state->epoch. A rank that has passed knows that every peer has finished its earlier
// calls, so that its slots may be overwritten; then the sender may begin.
#include "wait.cuh"

struct BarrierParams {
    Comm comm;
    uint64_t* overflows;  // out [2], or null
};

extern "C" __global__ void barrier(const __grid_constant__ BarrierParams p) {
    const Comm& comm = p.comm;
    const uint32_t epoch = next_call(comm);
    // Peers that are late must find what the call that timed out told them, and nothing newer.
    if (__syncthreads_or(timed_out(comm))) return;
    announce(comm, epoch);
    let_sender_begin(comm, epoch, kPhaseBarrier);
    if (threadIdx.x == 0) begin_call(comm, epoch);
    if (threadIdx.x < 2 && p.overflows != nullptr) p.overflows[threadIdx.x] = 0;
}
