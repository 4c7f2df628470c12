// What a rank is about to receive (count), and, for receivers that need to know every row beforehand, where
// all of it goes (place).
#include "place.cuh"

struct PlaceParams {
    Comm comm;
    Placement placement;
    int32_t record_bytes;
    int32_t slot_bytes;
};

static_assert(sizeof(PlaceParams) == QCOMM_SIZEOF_PLACE, "qcomm/ops/place.py holds the same structure");

// Waits for every rank's counts; says how many records and rows there will be and where each source's rows
// of an expert begin. Zeroes the overflow counters of the receive that follows.
//
// Grid 1, any block of at least two warps. Dynamic shared memory: 2 * num_local_experts + num_ranks + 2
// words. A static receive short of rows leaves a notice.
extern "C" __global__ void count(const __grid_constant__ PlaceParams params) {
    extern __shared__ int32_t table[];
    const Comm& comm = params.comm;
    const Placement& p = params.placement;
    const int num_ranks = comm.num_ranks, num_local = comm.num_local_experts;
    int32_t* start = table;                   // [num_local + 1]
    int32_t* total = start + num_local + 1;   // [num_local]
    int32_t* offsets = total + num_local;     // [num_ranks + 1]
    const uint32_t epoch = comm.state->epoch;
    bool came = true;
    if (threadIdx.x < num_ranks) {
        const uint32_t* flag = region<uint32_t>(comm, comm.rank, comm.route_flags) + threadIdx.x;
        came = wait_for_peer(comm, flag, epoch, threadIdx.x, kPhaseRoute);
    }
    const bool ready = __syncthreads_and(came);

    if (ready) {
        const auto count_of = [&](int source, int word) {
            return counts_of(comm, comm.rank, epoch, source)[word];
        };
        for (int expert = threadIdx.x; expert < num_local; expert += blockDim.x) {
            int sum = 0;
            for (int source = 0; source < num_ranks; ++source)
                sum += count_of(source, 2 + expert);
            total[expert] = sum;
        }
        if (threadIdx.x == 0) {
            offsets[0] = 0;
            for (int source = 0; source < num_ranks; ++source)
                offsets[source + 1] = offsets[source] + count_of(source, 1);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            const int lane = threadIdx.x;
            int most = 0;
            for (int expert = lane; expert < num_local; expert += 32)
                most = max(most, total[expert]);
            most = __reduce_max_sync(0xffffffffu, most);
            const auto padded = [&](int count) {
                return (count + p.alignment - 1) / p.alignment * p.alignment;
            };
            const int each = p.rows_per_expert > 0 ? p.rows_per_expert : padded(most);
            int end = 0;
            if (lane == 0) start[0] = 0;
            for (int base = 0; base < num_local; base += 32) {
                const int expert = base + lane;
                int sum = expert >= num_local ? 0 : p.layout == kBatched ? each : padded(total[expert]);
                for (int step = 1; step < 32; step *= 2) {
                    const int lower = __shfl_up_sync(0xffffffffu, sum, step);
                    if (lane >= step) sum += lower;
                }
                if (expert < num_local) start[expert + 1] = end + sum;
                end += __shfl_sync(0xffffffffu, sum, 31);
            }
        }
        __syncthreads();

        for (int expert = threadIdx.x; expert < num_local; expert += blockDim.x) {
            int row = start[expert];
            for (int source = 0; source < num_ranks; ++source) {
                p.source_starts[source * num_local + expert] = row;
                row += count_of(source, 2 + expert);
            }
            const int limit = p.layout == kBatched ? start[expert + 1] : p.capacity;
            const int fit = p.layout == kTokenMajor ? total[expert]
                                                    : max(0, min(total[expert], limit - start[expert]));
            p.num_tokens_per_expert[expert] = fit;
            if (p.host != nullptr) p.host[QCOMM_HOST_FIXED + num_ranks + 1 + expert] = total[expert];
        }
        for (int source = threadIdx.x; source <= num_ranks; source += blockDim.x) {
            p.recv_offsets[source] = offsets[source];
            if (p.host != nullptr) p.host[QCOMM_HOST_FIXED + source] = offsets[source];
        }
        if (p.group_offsets != nullptr) {
            for (int expert = threadIdx.x; expert <= num_local; expert += blockDim.x)
                p.group_offsets[expert] = min(start[expert], p.capacity);
        }
        if (threadIdx.x == 0) {
            int bad_rank = -1;
            for (int source = num_ranks - 1; source >= 0; --source) {
                if (count_of(source, 0) != 0) bad_rank = source;
            }
            if (count_of(comm.rank, 0) != 0) bad_rank = comm.rank;
            const int bad_token = bad_rank < 0 ? -1 : count_of(bad_rank, 0) - 1;
            const int rows = p.layout == kTokenMajor ? offsets[num_ranks] : start[num_local];
            if (p.is_static) {
                int needed = rows, available = p.capacity;
                if (p.layout == kBatched) {
                    needed = 0;
                    available = p.rows_per_expert;
                    for (int expert = 0; expert < num_local; ++expert)
                        needed = max(needed, total[expert]);
                }
                if (needed > available) {
                    write_report(&comm.reports->notice, kOverflow, comm, -1, kPhaseRoute, needed, available);
                } else if (bad_rank == comm.rank) {
                    write_report(&comm.reports->notice, kBadRoute, comm, bad_rank, kPhaseRoute, 0, bad_token);
                }
            }
            if (p.host != nullptr) {
                p.host[QCOMM_HOST_BAD_RANK] = bad_rank;
                p.host[QCOMM_HOST_BAD_TOKEN] = bad_token;
                p.host[QCOMM_HOST_ROWS] = rows;
                p.host[QCOMM_HOST_ROWS_PER_EXPERT] = p.layout == kBatched ? start[1] : 0;
            }
        }
    }

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
    note_rest(comm, p);
}
