// Counting what comes.
#pragma once

#include "group.cuh"
#include "place.cuh"

// Waits for every rank's counts and copies them to shared memory, `counts` [num_ranks][2 +
// num_local_experts]; returns false to a thread that waited in vain. Call from all threads of a group; one of
// the call notes how long each peer kept it waiting.
template <typename Group>
__device__ __forceinline__ bool gather_counts(const Comm& comm, const Group& group, uint32_t epoch,
                                              bool notes, int32_t* counts) {
    const int width = 2 + comm.num_local_experts, num_ranks = comm.num_ranks;
    // The first number of every source first, so that the waits for them begin at the same time.
    const auto count_at = [&](int i) {
        return counts_of(comm, comm.rank, epoch, i % num_ranks) + i / num_ranks;
    };
    while (true) {
        int missing = -1;
#pragma unroll 4
        for (int i = group.thread(); i < num_ranks * width; i += group.size()) {
            const uint64_t both = load_relaxed_sys(reinterpret_cast<const uint64_t*>(count_at(i)));
            counts[i % num_ranks * width + i / num_ranks] = static_cast<int32_t>(both);
            const uint32_t seen = static_cast<uint32_t>(both >> 32);
            if (missing < 0 && !reached<false>(seen, epoch)) missing = i;
        }
        if (missing < 0) return true;
        const uint64_t start = global_timer_ns();
        const bool came = poll_flag(comm, &count_at(missing)->epoch, epoch, missing % num_ranks, kPhaseRoute);
        if (notes && missing < num_ranks) note_wait(comm, missing % num_ranks, start);
        if (!came) return false;
    }
}

// Says how many records and rows there will be and where each source's rows of an expert begin, from the
// counts that were gathered. Call from all threads of a group, of two warps at least; `table` is shared
// memory, 2 * num_local_experts + num_ranks + 2 words. A static receive short of rows leaves a notice, if
// this block `reports`.
template <typename Group>
__device__ __forceinline__ void count_records(const Comm& comm, const Group& group, const Placement& p,
                                              const int32_t* counts, int32_t* table, bool reports) {
    const int num_ranks = comm.num_ranks, num_local = comm.num_local_experts;
    const int warp = group.thread() / 32, lane = threadIdx.x % 32;
    int32_t* start = table;                  // [num_local + 1]
    int32_t* total = start + num_local + 1;  // [num_local]
    int32_t* offsets = total + num_local;    // [num_ranks + 1]
    const auto count_of = [&](int source, int word) { return counts[source * (2 + num_local) + word]; };
#pragma unroll 1
    for (int expert = group.thread(); expert < num_local; expert += group.size()) {
        int sum = 0;
#pragma unroll 1
        for (int source = 0; source < num_ranks; ++source)
            sum += count_of(source, 2 + expert);
        total[expert] = sum;
    }
    static_assert(kMaxRanks <= 32, "a lane knows a source");
    if (warp == 1) {
        const int end = sum_of_lanes(lane < num_ranks ? count_of(lane, 1) : 0);
        if (lane == 0) offsets[0] = 0;
        if (lane < num_ranks) offsets[lane + 1] = end;
    }
    group.sync();
    const int alignment = p.alignment, layout = p.layout, capacity = p.capacity;
    int most = 0;  // the first warp's: tokens of the expert that has most
    if (warp == 0) {
        // A lane has experts that follow one another.
        const int each = (num_local + 31) / 32, begin = min(lane * each, num_local);
        const int end = min(begin + each, num_local);
        const auto padded = [&](int count) { return (count + alignment - 1) / alignment * alignment; };
#pragma unroll 1
        for (int expert = begin; expert < end; ++expert)
            most = max(most, total[expert]);
        most = __reduce_max_sync(kAllLanes, most);
        const int batch = p.rows_per_expert > 0 ? p.rows_per_expert : padded(most);
        const auto rows = [&](int expert) { return layout == kBatched ? batch : padded(total[expert]); };
        int sum = 0;
#pragma unroll 1
        for (int expert = begin; expert < end; ++expert)
            sum += rows(expert);
        int row = sum_of_lanes(sum) - sum;
#pragma unroll 1
        for (int expert = begin; expert < end; ++expert) {
            start[expert] = row;
            row += rows(expert);
        }
        if (lane == 31) start[num_local] = row;
    }
    group.sync();

    int32_t* const source_starts = p.source_starts;
    int32_t* const host = p.host;
#pragma unroll 1
    for (int expert = group.thread(); expert < num_local; expert += group.size()) {
        int row = start[expert];
#pragma unroll 1
        for (int source = 0; source < num_ranks; ++source) {
            source_starts[source * num_local + expert] = row;
            row += count_of(source, 2 + expert);
        }
        const int limit = layout == kBatched ? start[expert + 1] : capacity;
        const int fit =
            layout == kTokenMajor ? total[expert] : max(0, min(total[expert], limit - start[expert]));
        p.num_tokens_per_expert[expert] = fit;
        if (host != nullptr) host[QCOMM_HOST_FIXED + num_ranks + 1 + expert] = total[expert];
    }
#pragma unroll 1
    for (int source = group.thread(); source <= num_ranks; source += group.size()) {
        p.recv_offsets[source] = offsets[source];
        if (host != nullptr) host[QCOMM_HOST_FIXED + source] = offsets[source];
    }
    if (p.group_offsets != nullptr) {
#pragma unroll 1
        for (int expert = group.thread(); expert <= num_local; expert += group.size())
            p.group_offsets[expert] = min(start[expert], capacity);
    }
    if (warp != 0 || !reports) return;
    const uint32_t bad_ranks = __ballot_sync(kAllLanes, lane < num_ranks && count_of(lane, 0) != 0);
    if (lane != 0) return;
    // This rank itself, if it is one.
    const int bad_rank = (bad_ranks >> comm.rank & 1) != 0 ? comm.rank : __ffs(bad_ranks) - 1;
    const int bad_token = bad_rank < 0 ? -1 : count_of(bad_rank, 0) - 1;
    const int rows = layout == kTokenMajor ? offsets[num_ranks] : start[num_local];
    if (p.is_static) {
        const int needed = layout == kBatched ? most : rows;
        const int available = layout == kBatched ? p.rows_per_expert : capacity;
        if (needed > available) {
            write_report(&comm.reports->notice, kOverflow, comm, -1, kPhaseRoute, needed, available);
        } else if (bad_rank == comm.rank) {
            write_report(&comm.reports->notice, kBadRoute, comm, bad_rank, kPhaseRoute, 0, bad_token);
        }
    }
    if (host != nullptr) {
        host[QCOMM_HOST_BAD_RANK] = bad_rank;
        host[QCOMM_HOST_BAD_TOKEN] = bad_token;
        host[QCOMM_HOST_ROWS] = rows;
        host[QCOMM_HOST_ROWS_PER_EXPERT] = layout == kBatched ? start[1] : 0;
    }
}
