// The receive side of dispatch: reads each record once, as soon as it is there, and writes it converted into
// each of its rows.
#include "dispatch_recv.cuh"
#include "team.cuh"

// A converted row: data, then scales.
constexpr int kStageBytes = (kRowBytes + 4 * kRowScaleWords + 15) / 16 * 16;
static_assert(kStageBytes == QCOMM_STAGE_BYTES, "qcomm/ops/dispatch.py computes the same");
constexpr bool kPlaces = QCOMM_PLACES;          // whether records are given their rows here, or have them
constexpr int kBatch = kVecsPerThread < 2 ? 1 : 2;  // vectors that are loaded together

// Writes a staged row into row my_row of every lane that has one; returns with the copies under way.
__device__ __forceinline__ void write_rows(const DispatchRecvParams& p, const uint8_t* stage, int my_row) {
    const int lane = threadIdx.x % 32;
    const uint8_t* scales = stage + kRowBytes;
    if (my_row >= 0) bulk_store(p.x + static_cast<int64_t>(my_row) * kRowBytes, stage, kRowBytes);
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

constexpr int kPaddingRows = 16;  // of an expert's padding, that a warp takes at a time

// Zeroes this team's share of the padding rows, all from one stage, and notes that they are padding.
__device__ __forceinline__ void write_padding(const DispatchRecvParams& p, const Team& team,
                                              const Ring<kStageBytes>& ring) {
    uint8_t* stage = ring.stage();
    for (int i = team.thread; i < kRowBytes / 16; i += kTeamThreads)
        reinterpret_cast<uint4*>(stage)[i] = make_uint4(0, 0, 0, 0);
    for (int word = team.thread; word < kRowScaleWords; word += kTeamThreads) {
        const float scale = kRecv == kRecvFp8 ? pow2(kMinScaleExponent) : 0.0f;
        reinterpret_cast<float*>(stage + kRowBytes)[word] = scale;
    }
    ring.written(team);
    const int warp = team.index * kTeamWarps + team.thread / 32, num_warps = team.count * kTeamWarps;
    const int most = p.rows_per_expert > 0 ? p.rows_per_expert : p.placement.alignment - 1;
    const int pieces = (most + kPaddingRows - 1) / kPaddingRows, lane = threadIdx.x % 32;
    for (int i = warp; i < pieces * p.comm.num_local_experts; i += num_warps) {
        const int expert = i / pieces, end = p.placement.group_offsets[expert + 1];
        int row = p.placement.group_offsets[expert] + p.placement.num_tokens_per_expert[expert] +
                  i % pieces * kPaddingRows + lane;
        if (lane >= kPaddingRows || row >= end) row = -1;
        if (kPlaces && row >= 0) note_padding(p.placement, row);
        if (p.pads) write_rows(p, stage, row < p.num_rows ? row : -1);
    }
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

// Any grid; whole teams. Dynamic shared memory: kStages stages a team, 16-byte aligned. A team first zeroes
// its share of the padding rows, then takes records round robin over the sources, which is the order in which
// they come; it waits for a record's flag, reads the record once, converts it into a stage, and copies the
// stage to each of its rows: those in record_rows, or those that its metadata say, which are noted.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_recv(const __grid_constant__ DispatchRecvParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    const Comm& comm = p.comm;
    if (__syncthreads_or(timed_out(comm))) return;
    const Team team;
    const int lane = threadIdx.x % 32;
    const int num_ranks = comm.num_ranks;
    const int width = p.placement.layout == kTokenMajor ? 1 : kNumTopk;
    const int32_t* recv_offsets = p.placement.recv_offsets;
    Ring<kStageBytes> ring(team, shared);
    if (p.placement.layout != kTokenMajor) write_padding(p, team, ring);
    if (kPlaces) note_rest(comm, p.placement);

    int most = 0;
    for (int source = 0; source < num_ranks; ++source) {
        most = max(most, recv_offsets[source + 1] - recv_offsets[source]);
    }
    uint32_t overflows = 0;
    for (int first = team.index; first < most * num_ranks; first += 32 * team.count) {
        // A lane knows one of the team's next records, so that all their flags are looked at together.
        const int mine = first + lane * team.count, slot = mine / num_ranks;
        int my_record = -1, my_index = 0;
        if (slot < most) {
            const int source = mine % num_ranks, record = recv_offsets[source] + slot;
            if (record < recv_offsets[source + 1]) my_record = record;
            my_index = static_cast<int>(slot_index(comm, source, slot));
        }
        const auto my_flag = [&] {
            return region<uint32_t>(comm, comm.rank, comm.dispatch_flags) + my_index;
        };
        const auto look = [&] {
            return __ballot_sync(
                kAllLanes,
                my_record >= 0 && static_cast<int32_t>(load_acquire_sys(my_flag()) - comm.state->epoch) >= 0);
        };
        uint32_t there = look();
        const auto load_rows = [&](uint32_t left) {
            if (kPlaces || left == 0) return -1;
            const int record = __shfl_sync(kAllLanes, my_record, __ffs(left) - 1);
            return lane < width ? p.placement.record_rows[static_cast<int64_t>(record) * width + lane] : -1;
        };

        uint32_t left = __ballot_sync(kAllLanes, my_record >= 0);
        int rows_ahead = load_rows(left);
        for (; left != 0; left &= left - 1) {
            const int k = __ffs(left) - 1;
            const uint8_t* bytes = region<uint8_t>(comm, comm.rank, comm.dispatch_records) +
                                   static_cast<int64_t>(__shfl_sync(kAllLanes, my_index, k)) * kSlotBytes;
            if ((there >> k & 1) == 0) {
                // One that waits in vain goes on with its team, with any bytes; the host raises.
                if (lane == k)
                    wait_flag(comm, my_flag(), comm.state->epoch, mine % num_ranks, kPhaseDispatch);
                __syncwarp();
                there = look();
            }
            int my_row = rows_ahead;
            rows_ahead = load_rows(left & (left - 1));
            RecordEntry entry;
            if (kPlaces && team.is_first_warp()) entry = read_entry(comm, bytes + kRecordBytes);
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
            const bool overflowed = __any_sync(kAllLanes, record_overflows != 0);
            if (kPlaces && (team.is_first_warp() || overflowed)) {
                const int source = __shfl_sync(kAllLanes, mine, k) % num_ranks;
                const int record = __shfl_sync(kAllLanes, my_record, k);
                if (!team.is_first_warp()) entry = read_entry(comm, bytes + kRecordBytes);
                my_row = row_of(comm, p.placement, entry, source, record);
                if (team.is_first_warp()) note_record(p.placement, entry, source, record, my_row);
            }
            if (my_row >= p.num_rows) my_row = -1;
            ring.written(team);
            if (team.is_first_warp()) {
                write_rows(p, stage, my_row);
                bulk_wait_read<kPending<1>>();
            }
            ring.next(team);
            if (overflowed) overflows += record_overflows * __popc(__ballot_sync(kAllLanes, my_row >= 0));
        }
    }
    bulk_wait<0>();
    add_overflows(p.placement.overflows, overflows);
}
