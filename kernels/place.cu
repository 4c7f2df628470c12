// What a rank is about to receive (count), and, for receivers that need to know every row beforehand, where
// all of it goes (place).
#include "count.cuh"

struct PlaceParams {
    Comm comm;
    Placement placement;
    int32_t record_bytes;
    int32_t slot_bytes;
};

static_assert(sizeof(PlaceParams) == QCOMM_SIZEOF_PLACE, "qcomm/ops/place.py holds the same structure");

// Waits for every rank's counts and counts what comes. Zeroes the overflow counters of the receive that
// follows.
//
// Grid 1, any block of at least two warps. Dynamic shared memory: count_records' table.
extern "C" __global__ void count(const __grid_constant__ PlaceParams params) {
    extern __shared__ int32_t table[];
    const Comm& comm = params.comm;
    const Placement& p = params.placement;
    const uint32_t epoch = comm.state->epoch;
    __shared__ uint32_t came;
    const bool ready = wait_for_counts(comm, WholeBlock(), epoch, true, &came);
    if (ready) count_records(comm, WholeBlock(), p, epoch, table, true);
    if (threadIdx.x < 2) p.overflows[threadIdx.x] = 0;
    if (p.host == nullptr) return;
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        p.host[QCOMM_HOST_READY] = ready;
        __threadfence_system();
        store_release_sys(reinterpret_cast<uint32_t*>(p.host), p.host_sequence);
    }
}

// After count: waits for the records, and notes where each is and goes.
//
// Any grid and block of whole warps; a warp takes a record, round robin over the sources.
extern "C" __global__ void __launch_bounds__(256) place(const __grid_constant__ PlaceParams params) {
    const Comm& comm = params.comm;
    const Placement& p = params.placement;
    if (timed_out(comm)) return;
    const uint32_t epoch = comm.state->epoch;
    const int warp = blockIdx.x + gridDim.x * (threadIdx.x / 32), num_warps = gridDim.x * (blockDim.x / 32);
    int most = 0;
    for (int source = 0; source < comm.num_ranks; ++source)
        most = max(most, p.recv_offsets[source + 1] - p.recv_offsets[source]);
    for (int i = warp; i < most * comm.num_ranks; i += num_warps) {
        const int source = i % comm.num_ranks, slot = i / comm.num_ranks;
        const int record = p.recv_offsets[source] + slot;
        if (record >= p.recv_offsets[source + 1]) continue;
        const int64_t index = slot_index(comm, source, slot);
        const uint32_t* flag = region<uint32_t>(comm, comm.rank, comm.dispatch_flags) + index;
        if (!wait_flag(comm, flag, epoch, source, kPhaseDispatch)) return;
        const uint8_t* slots = region<uint8_t>(comm, comm.rank, comm.dispatch_records);
        const RecordEntry entry = read_entry(comm, slots + index * params.slot_bytes + params.record_bytes);
        note_record(p, entry, source, record, row_of(comm, p, entry, source, record));
    }
    if (p.layout != kTokenMajor) {
        for (int expert = warp; expert < comm.num_local_experts; expert += num_warps) {
            const int end = p.group_offsets[expert + 1];
            int row = p.group_offsets[expert] + p.num_tokens_per_expert[expert] + threadIdx.x % 32;
            for (; row < end; row += 32)
                note_padding(p, row);
        }
    }
    note_rest(comm, p, blockDim.x);
}
