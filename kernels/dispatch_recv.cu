// The receive side of dispatch: reads each record once, as soon as it is there, and writes it converted into
// each of its rows.
#include "receiver.cuh"

// Any grid; whole teams, then a warp for each that tells it of its records. Dynamic shared memory: kStages
// stages a team, 128-byte aligned. Where records are given their rows, the handle is filled too; that may be
// launched to begin when count lets it.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_recv(const __grid_constant__ DispatchRecvParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ Inbox inbox;
    const Comm& comm = p.comm;
    if (threadIdx.x == 0) {
        inbox.init();
        // No kernel's end orders this behind what route wrote, so not from a cache.
        const uint32_t epoch = load_relaxed_sys(&comm.state->epoch);
        if (kPlaces) wait_flag(comm, &comm.state->counted, epoch, comm.rank, kPhaseRoute);
    }
    if (__syncthreads_or(timed_out(comm))) {
        if (kPlaces && threadIdx.x == 0) wait_for_previous();
        return;
    }
    if (kPlaces) note_rest(comm, EveryBlock<WholeBlock>(), p.placement);
    const int team = static_cast<int>(threadIdx.x / 32) - kTeams * kTeamWarps;
    if (team >= 0) {
        tell_records(p, p.placement, comm.state->epoch, inbox, team, 0);
    } else {
        write_padding(p, p.placement, shared);
        convert_records(p, inbox, shared, p.placement.overflows);
    }
    // What comes after this kernel comes after count.
    if (kPlaces && threadIdx.x == 0) wait_for_previous();
}
