// Counting what comes.
#pragma once

#include "place.cuh"

// The threads of a block that work on something together.
struct WholeBlock {
    __device__ __forceinline__ int size() const { return blockDim.x; }
    __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// The first kThreads of them; nobody else uses the barrier.
template <int kThreads>
struct FirstThreads {
    __device__ __forceinline__ int size() const { return kThreads; }
    __device__ __forceinline__ void sync() const { barrier_sync<kThreads>(15); }
};

// Waits for every rank's counts and copies them to shared memory, `counts` [num_ranks][2 +
// num_local_experts]; returns false past the deadline. Call from all threads of a group; one of the call
// notes how long each peer kept it waiting. `came` is shared memory.
template <typename Group>
__device__ __forceinline__ bool gather_counts(const Comm& comm, const Group& group, uint32_t epoch,
                                              bool notes, int32_t* counts, uint32_t* came) {
    if (threadIdx.x == 0) *came = 1;
    group.sync();
    const int width = 2 + comm.num_local_experts;
    for (int i = threadIdx.x; i < comm.num_ranks * width; i += group.size()) {
        const int source = i / width;
        const Count* count = counts_of(comm, comm.rank, epoch, source) + i % width;
        const bool here = notes && i % width == 0
                              ? wait_for_peer(comm, &count->epoch, epoch, source, kPhaseRoute)
                              : wait_flag(comm, &count->epoch, epoch, source, kPhaseRoute);
        if (!here) *came = 0;
        counts[i] = *reinterpret_cast<const volatile int32_t*>(&count->value);
    }
    group.sync();
    return *came != 0;
}

// Says how many records and rows there will be and where each source's rows of an expert begin, from the
// counts that were gathered. Call from all threads of one block, of two warps at least; `table` is shared
// memory, 2 * num_local_experts + num_ranks + 2 words. A static receive short of rows leaves a notice, if
// this block `reports`.
template <typename Group>
__device__ __forceinline__ void count_records(const Comm& comm, const Group& group, const Placement& p,
                                              const int32_t* counts, int32_t* table, bool reports) {
    const int num_ranks = comm.num_ranks, num_local = comm.num_local_experts;
    int32_t* start = table;                  // [num_local + 1]
    int32_t* total = start + num_local + 1;  // [num_local]
    int32_t* offsets = total + num_local;    // [num_ranks + 1]
    const auto count_of = [&](int source, int word) { return counts[source * (2 + num_local) + word]; };
    for (int expert = threadIdx.x; expert < num_local; expert += group.size()) {
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
    group.sync();
    int most = 0;  // the first warp's: tokens of the expert that has most
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        for (int expert = lane; expert < num_local; expert += 32)
            most = max(most, total[expert]);
        most = __reduce_max_sync(0xffffffffu, most);
        const auto padded = [&](int count) { return (count + p.alignment - 1) / p.alignment * p.alignment; };
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
    group.sync();

    for (int expert = threadIdx.x; expert < num_local; expert += group.size()) {
        int row = start[expert];
        for (int source = 0; source < num_ranks; ++source) {
            p.source_starts[source * num_local + expert] = row;
            row += count_of(source, 2 + expert);
        }
        const int limit = p.layout == kBatched ? start[expert + 1] : p.capacity;
        const int fit =
            p.layout == kTokenMajor ? total[expert] : max(0, min(total[expert], limit - start[expert]));
        p.num_tokens_per_expert[expert] = fit;
        if (p.host != nullptr) p.host[QCOMM_HOST_FIXED + num_ranks + 1 + expert] = total[expert];
    }
    for (int source = threadIdx.x; source <= num_ranks; source += group.size()) {
        p.recv_offsets[source] = offsets[source];
        if (p.host != nullptr) p.host[QCOMM_HOST_FIXED + source] = offsets[source];
    }
    if (p.group_offsets != nullptr) {
        for (int expert = threadIdx.x; expert <= num_local; expert += group.size())
            p.group_offsets[expert] = min(start[expert], p.capacity);
    }
    if (threadIdx.x == 0 && reports) {
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
                needed = most;
                available = p.rows_per_expert;
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
