// The receive side of dispatch: reads each record once, as soon as it is there, and writes it converted into
// each of its rows.
#include "receiver.cuh"

// Any grid; whole teams, then a warp for each that tells it of its records. Dynamic shared memory: kStages
// stages a team, 128-byte aligned. It may begin when the kernel before lets it: count, where records are
// given their rows and the handle is filled; else the sender.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_recv(const __grid_constant__ DispatchRecvParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ Inbox inbox;
    const Comm& comm = p.comm;
    if (threadIdx.x == 0) {
        inbox.init();
        if (kPlaces) wait_flag(comm, &comm.state->counted, this_call(comm), comm.rank, kPhaseRoute);
    }
    if (__syncthreads_or(timed_out(comm))) return wait_for_previous();
    if (kPlaces) note_rest(comm, EveryBlock<WholeBlock>(), p.placement);
    const int team = static_cast<int>(threadIdx.x / 32) - kTeams * kTeamWarps;
    if (team >= 0) {
        tell_records(p, p.placement, this_call(comm), inbox, team, 0);
    } else {
        write_padding(p, p.placement, shared);
        convert_records(p, inbox, shared, p.placement.overflows);
    }
    // So that what comes after this kernel comes after those before it.
    wait_for_previous();
}
