// The receive side of dispatch: the warps that learn of a block's records and give them their rows, and those
// that convert them.
#pragma once

#include "dispatch_recv.cuh"
#include "signals.cuh"
#include "team.cuh"

// A converted row: data, then scales; in whole lines, amid which bulk copies are slow to begin.
constexpr int kStageBytes = (kRowBytes + 4 * kRowScaleWords + 127) / 128 * 128;
static_assert(kStageBytes == QCOMM_ROW_STAGE_BYTES, "qcomm/ops/dispatch.py computes the same");
constexpr bool kPlaces = QCOMM_PLACES;              // whether records are given their rows here, or have them
constexpr int kBatch = kVecsPerThread < 2 ? 1 : 2;  // vectors that are loaded together

// Writes a staged row into row my_row of every lane that has one; returns with the copies under way.
__device__ __forceinline__ void write_rows(const DispatchRecvParams& p, const uint8_t* stage, int my_row) {
    const int lane = threadIdx.x % 32;
    const uint8_t* scales = stage + kRowBytes;
    if (my_row >= 0) bulk_store_stream(p.x + static_cast<int64_t>(my_row) * kRowBytes, stage, kRowBytes);
    const bool together = kRowScaleWords % 4 == 0 && p.sf_together;
    if (kRowScaleWords > 0 && together && my_row >= 0) {
        bulk_store(scale_word(p, my_row, 0), scales, 4 * kRowScaleWords);
    }
    bulk_commit();
    if (kRowScaleWords > 0 && !together) {
        for (uint32_t left = __ballot_sync(kAllLanes, my_row >= 0); left != 0; left &= left - 1) {
            const int row = __shfl_sync(kAllLanes, my_row, __ffs(left) - 1);
            for (int word = lane; word < kRowScaleWords; word += 32)
                *scale_word(p, row, word) = reinterpret_cast<const uint32_t*>(scales)[word];
        }
    }
}

// One warp of num_warps notes which rows are padding, and copies a stage to them, if any: of those few at a
// time, so that every SM has as many to write.
__device__ __forceinline__ void pad_rows(const DispatchRecvParams& p, const Placement& placement,
                                         const uint8_t* stage, int warp, int num_warps) {
    const int most = p.rows_per_expert > 0 ? p.rows_per_expert : placement.alignment - 1;
    const int piece = stage == nullptr ? 32 : 4, pieces = (most + piece - 1) / piece, lane = threadIdx.x % 32;
    for (int i = warp; i < pieces * p.comm.num_local_experts; i += num_warps) {
        const int expert = i / pieces, end = placement.group_offsets[expert + 1];
        int row = placement.group_offsets[expert] + placement.num_tokens_per_expert[expert] +
                  i % pieces * piece + lane;
        if (lane >= piece || row >= end) row = -1;
        if (kPlaces && row >= 0) note_padding(placement, row);
        if (stage != nullptr) write_rows(p, stage, row < p.num_rows ? row : -1);
    }
}

// Zeroes this team's share of the padding rows, all from one stage, and notes that they are padding. Call
// from whole teams, whose stages are free before and after.
__device__ __forceinline__ void write_padding(const DispatchRecvParams& p, const Placement& placement,
                                              uint8_t* shared) {
    if (placement.layout == kTokenMajor) return;
    const Team team;
    const int warp = team.index + team.count * (team.thread / 32), num_warps = team.count * kTeamWarps;
    if (!p.pads) return pad_rows(p, placement, nullptr, warp, num_warps);
    const Ring<kStageBytes> ring(team, shared);
    uint8_t* stage = ring.stage();
    for (int i = team.thread; i < kRowBytes / 16; i += kTeamThreads)
        reinterpret_cast<uint4*>(stage)[i] = make_uint4(0, 0, 0, 0);
    for (int word = team.thread; word < kRowScaleWords; word += kTeamThreads) {
        const float scale = kRecv == kRecvFp8 ? pow2(kMinScaleExponent) : 0.0f;
        reinterpret_cast<float*>(stage + kRowBytes)[word] = scale;
    }
    ring.written(team);
    pad_rows(p, placement, stage, warp, num_warps);
    bulk_wait_read<0>();
    team.sync();
}

// Writes one lane's part of a converted row into a stage.
__device__ __forceinline__ void write_part(uint8_t* stage, int vec, const LaneVec& out) {
    if (vec >= kNumVecs) return;
    write_data<static_cast<WireKind>(kRecv)>(stage, vec, out);
    if (kRecv == kRecvFp8 && vec % kVecsPerGroup == 0) {
        reinterpret_cast<float*>(stage + kRowBytes)[vec / kVecsPerGroup] = out.scale;
    }
    if (kRecv == kRecvMxfp4 && vec % kVecsPerBlock == 0) {
        stage[kRowBytes + vec / kVecsPerBlock] = static_cast<uint8_t>(out.sf);
    }
}

// What the telling warp of each team tells it, in shared memory.
struct Inbox {
    static constexpr int kDepth = 4;

    struct Item {
        int32_t index;           // slot of the record, -1 after the last
        int32_t rows[kNumTopk];  // of x, -1 for none
    };

    Item items[kTeams][kDepth];
    Signals<kDepth> told[kTeams];    // the record is there
    Signals<kDepth> placed[kTeams];  // and its rows are known
    Signals<kDepth> taken[kTeams];

    __device__ __forceinline__ void init() {
        for (int team = 0; team < kTeams; ++team) {
            told[team].init(1);
            placed[team].init(1);
            taken[team].init(kTeamWarps);
        }
    }
};

// Has a team convert any bytes into no row, so that instructions and parameters are there when a record
// comes.
__device__ __forceinline__ void tell_rehearsal(Inbox& inbox, int team) {
    const int lane = threadIdx.x % 32;
    Inbox::Item& item = inbox.items[team][0];
    if (lane == 0) item.index = 0;
    if (lane < kNumTopk) item.rows[lane] = -1;
    inbox.told[team].arrive(0);
    inbox.placed[team].arrive(0);
}

// Tells a team that it has been told of all, n in number.
__device__ __forceinline__ void tell_end(Inbox& inbox, int team, uint32_t n) {
    inbox.taken[team].wait_before(n);
    if (threadIdx.x % 32 == 0) inbox.items[team][n % Inbox::kDepth].index = -1;
    inbox.told[team].arrive(n);
}

// The warp that waits for a team's records, which are dealt out round robin over the sources, and tells of
// each as it comes: one that is late keeps none of 32 others waiting. It says where each goes: to those in
// record_rows, or those that its metadata say, which are noted. Past the deadline it goes on with any bytes;
// the host raises. The team was told of n before.
__device__ __forceinline__ void tell_records(const DispatchRecvParams& p, const Placement& placement,
                                             uint32_t epoch, Inbox& inbox, int team, uint32_t n) {
    const Comm& comm = p.comm;
    const int lane = threadIdx.x % 32, num_ranks = comm.num_ranks;
    const int width = placement.layout == kTokenMajor ? 1 : kNumTopk;
    const int step = gridDim.x * kTeams;
    const int most = most_records(comm, placement.recv_offsets);
    const uint32_t* flags = region<uint32_t>(comm, comm.rank, comm.dispatch_flags);
    const uint8_t* records = region<uint8_t>(comm, comm.rank, comm.dispatch_records);
    for (int first = blockIdx.x + gridDim.x * team; first < most * num_ranks; first += 32 * step) {
        // A lane knows one of the team's next records, so that all their flags are looked at together.
        const int mine = first + lane * step, slot = mine / num_ranks;
        int my_record = -1, my_index = 0;
        if (slot < most) {
            const int source = mine % num_ranks, record = placement.recv_offsets[source] + slot;
            if (record < placement.recv_offsets[source + 1]) my_record = record;
            my_index = static_cast<int>(slot_index(comm, source, slot));
        }
        const auto metadata = [&](int k) {
            const int index = __shfl_sync(kAllLanes, my_index, k);
            return read_entry(comm, records + static_cast<int64_t>(index) * kSlotBytes + kRecordBytes);
        };
        const auto rows = [&](int k) {
            const int64_t record = __shfl_sync(kAllLanes, my_record, k);
            return lane < width ? placement.record_rows[record * width + lane] : -1;
        };
        uint32_t there = 0, left = __ballot_sync(kAllLanes, my_record >= 0);
        RecordEntry entry, next_entry;
        int row, next_row;
        bool has_next = false;  // read ahead, of the first of those that are there
        for (; left != 0; ++n) {
            if (there == 0) {
                there = wait_any_flag(comm, my_record >= 0 && (left >> lane & 1) != 0,
                                      flags + my_index * kFlagWords, epoch, mine % num_ranks, kPhaseDispatch);
                if (there == 0) there = left;
            }
            const int k = __ffs(there) - 1;
            there &= there - 1;
            left &= ~(1u << k);
            const int following = __ffs(there) - 1;
            inbox.taken[team].wait_before(n);
            Inbox::Item& item = inbox.items[team][n % Inbox::kDepth];
            if (lane == k) item.index = my_index;
            inbox.told[team].arrive(n);
            const int source = __shfl_sync(kAllLanes, mine, k) % num_ranks;
            const int record = __shfl_sync(kAllLanes, my_record, k);
            // What the next one needs is read before this one is placed.
            if constexpr (kPlaces) {
                entry = has_next ? next_entry : metadata(k);
                if (following >= 0) next_entry = metadata(following);
                row = row_of(comm, placement, entry, source, record);
            } else {
                row = has_next ? next_row : rows(k);
                if (following >= 0) next_row = rows(following);
            }
            has_next = following >= 0;
            if (lane < kNumTopk) item.rows[lane] = row < p.num_rows ? row : -1;
            inbox.placed[team].arrive(n);
            if (kPlaces) note_record(placement, entry, source, record, row);
        }
    }
    tell_end(inbox, team, n);
}

// A team's warps: convert each record that they are told of into a stage, and copy the stage to each of its
// rows; add their overflows to `total`.
__device__ __forceinline__ void convert_records(const DispatchRecvParams& p, Inbox& inbox, uint8_t* shared,
                                                uint64_t* total) {
    const Team team;
    const int lane = threadIdx.x % 32;
    Ring<kStageBytes> ring(team, shared);
    const uint8_t* records = region<uint8_t>(p.comm, p.comm.rank, p.comm.dispatch_records);
    uint32_t overflows = 0;
    for (uint32_t n = 0;; ++n) {
        inbox.told[team.number].wait(n);
        const Inbox::Item& item = inbox.items[team.number][n % Inbox::kDepth];
        if (item.index < 0) break;
        const uint8_t* bytes = records + static_cast<int64_t>(item.index) * kSlotBytes;
        uint8_t* stage = ring.stage();
        uint32_t record_overflows = 0;
#pragma unroll 1
        for (int i = 0; i < kVecsPerThread; i += kBatch) {
            LaneVec parts[kBatch];
#pragma unroll
            for (int j = 0; j < kBatch; ++j)
                parts[j] = read_record(bytes, team.vec(i + j));
#pragma unroll
            for (int j = 0; j < kBatch; ++j)
                write_part(stage, team.vec(i + j), convert(parts[j], p.quantizer, record_overflows));
        }
        ring.written(team);
        const bool overflowed = __any_sync(kAllLanes, record_overflows != 0);
        int row = -1;
        if (team.is_first_warp() || overflowed) {
            inbox.placed[team.number].wait(n);
            if (lane < kNumTopk) row = item.rows[lane];
        }
        if (overflowed) overflows += record_overflows * __popc(__ballot_sync(kAllLanes, row >= 0));
        inbox.taken[team.number].arrive(n);
        if (team.is_first_warp()) {
            write_rows(p, stage, row);
            bulk_wait_read<kPending>();
        }
        ring.next(team);
    }
    // What is under way is written when the kernel ends.
    bulk_wait_read<0>();
    add_overflows(total, overflows);
}
