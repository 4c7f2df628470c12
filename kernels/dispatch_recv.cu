// The receive side of dispatch: reads each record once, as soon as it is there, and writes it converted into
// each of its rows.
#include "dispatch_recv.cuh"
#include "team.cuh"

// A converted row: data, then scales.
constexpr int kStageBytes = (kRowBytes + 4 * kRowScaleWords + 15) / 16 * 16;
static_assert(kStageBytes == QCOMM_STAGE_BYTES, "qcomm/ops/dispatch.py computes the same");
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

// Zeroes this team's share of the padding rows, all from one stage.
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
    const int end = p.padded_rows > 0 ? p.padded_rows : p.group_offsets[p.comm.num_local_experts];
    const int num_rows = min(end, p.num_rows);
    const int warp = team.index * kTeamWarps + team.thread / 32, num_warps = team.count * kTeamWarps;
    for (int first = warp * 32; first < num_rows; first += num_warps * 32) {
        const int row = first + static_cast<int>(threadIdx.x % 32);
        write_rows(p, stage, row < num_rows && p.row_record[row] < 0 ? row : -1);
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
// stage to each of its rows.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_recv(const __grid_constant__ DispatchRecvParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    const Comm& comm = p.comm;
    if (__syncthreads_or(timed_out(comm))) return;
    const Team team;
    const int lane = threadIdx.x % 32;
    const int num_ranks = comm.num_ranks;
    Ring<kStageBytes> ring(team, shared);
    if (p.padded_rows != 0) write_padding(p, team, ring);

    int most = 0;
    for (int source = 0; source < num_ranks; ++source) {
        most = max(most, p.recv_offsets[source + 1] - p.recv_offsets[source]);
    }
    uint32_t overflows = 0;
    for (int first = team.index; first < most * num_ranks; first += 32 * team.count) {
        // A lane knows one of the team's next records, so that all their flags are looked at together.
        const int mine = first + lane * team.count, slot = mine / num_ranks;
        int my_record = -1, my_index = 0;
        if (slot < most) {
            const int source = mine % num_ranks, record = p.recv_offsets[source] + slot;
            if (record < p.recv_offsets[source + 1]) my_record = record;
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
            if (left == 0) return -1;
            const int record = __shfl_sync(kAllLanes, my_record, __ffs(left) - 1);
            return lane < p.width ? p.record_rows[static_cast<int64_t>(record) * p.width + lane] : -1;
        };

        uint32_t left = __ballot_sync(kAllLanes, my_record >= 0);
        int rows_ahead = load_rows(left);
        for (; left != 0; left &= left - 1) {
            const int k = __ffs(left) - 1;
            const uint8_t* bytes = region<uint8_t>(comm, comm.rank, comm.dispatch_records) +
                                   static_cast<int64_t>(__shfl_sync(kAllLanes, my_index, k)) * kRecordBytes;
            if ((there >> k & 1) == 0) {
                // One that waits in vain goes on with its team; the host raises.
                if (lane == k)
                    wait_flag(comm, my_flag(), comm.state->epoch, mine % num_ranks, kPhaseDispatch);
                __syncwarp();
                there = look();
            }
            const int my_row = rows_ahead < p.num_rows ? rows_ahead : -1;
            rows_ahead = load_rows(left & (left - 1));
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
            if (team.is_first_warp()) {
                write_rows(p, stage, my_row);
                bulk_wait_read<kPending<1>>();
            }
            ring.next(team);
            overflows += record_overflows * __popc(__ballot_sync(kAllLanes, my_row >= 0));
        }
    }
    bulk_wait<0>();
    add_overflows(p.overflows, overflows);
}
