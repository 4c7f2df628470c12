// What a rank is about to receive.
#include "count.cuh"

struct CountParams {
    Comm comm;
    Placement placement;
};

static_assert(sizeof(CountParams) == QCOMM_SIZEOF_COUNT, "qcomm/ops/count.py holds the same structure");

// Waits for every rank's counts and counts what comes. Begins with the sender, behind route. Zeroes the
// overflow counters of the receive that follows, and lets it begin before: this kernel's own end takes ten
// microseconds on an SM that sends.
//
// Grid 1, any block of whole warps. Dynamic shared memory: the counts, then count_records' table.
extern "C" __global__ void count(const __grid_constant__ CountParams params) {
    extern __shared__ int32_t counts[];
    const Comm& comm = params.comm;
    const Placement& p = params.placement;
    const uint32_t epoch = this_call(comm);
    const bool dead = __syncthreads_or(timed_out(comm));
    const bool ready = !dead && __syncthreads_and(gather_counts(comm, WholeBlock(), epoch, true, counts));
    // Not sooner: until then the receive would only occupy every SM.
    let_next_begin();
    int32_t* table = counts + comm.num_ranks * (2 + comm.num_local_experts);
    if (ready) count_records(comm, WholeBlock(), p, counts, table, true);
    if (threadIdx.x < 2) p.overflows[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x == 0) store_release_gpu(&comm.state->counted, epoch);
    if (p.host != nullptr) {
        __threadfence_system();
        __syncthreads();
        if (threadIdx.x == 0) {
            p.host[QCOMM_HOST_READY] = ready;
            __threadfence_system();
            store_release_sys(reinterpret_cast<uint32_t*>(p.host), p.host_sequence);
        }
    }
    wait_for_previous();
}
