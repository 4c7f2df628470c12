// The receive side of dispatch: reads each record once, as soon as it is there, and writes it converted into
// each of its rows.
#include "dispatch_recv.cuh"

// A converted row: data, then scales.
constexpr int kStageBytes = (kRowBytes + 4 * kRowScaleWords + 15) / 16 * 16;
static_assert(kStageBytes == QCOMM_STAGE_BYTES, "qcomm/ops/dispatch.py computes the same");

// Writes a staged row into row my_row of every lane that has one; returns with the copies under way.
__device__ __forceinline__ void write_rows(const DispatchRecvParams& p, const uint8_t* stage, int my_row) {
    const int lane = threadIdx.x % 32;
    fence_proxy_async_shared();
    __syncwarp();
    if (my_row >= 0) bulk_store(p.x + static_cast<int64_t>(my_row) * kRowBytes, stage, kRowBytes);
    bulk_commit();
    if constexpr (kRowScaleWords > 0) {
        const uint32_t* scales = reinterpret_cast<const uint32_t*>(stage + kRowBytes);
        for (uint32_t left = __ballot_sync(kAllLanes, my_row >= 0); left != 0; left &= left - 1) {
            const int row = __shfl_sync(kAllLanes, my_row, __ffs(left) - 1);
            for (int word = lane; word < kRowScaleWords; word += 32)
                *scale_word(p, row, word) = scales[word];
        }
    }
}

// Any grid, at most 384 threads. Dynamic shared memory: one stage a warp, 16-byte aligned. A warp first
// zeroes its share of the padding rows, then takes records round robin over the sources, which is the order
// in which they come; it waits for a record's flag, reads the record once, converts it into a stage, and
// copies the stage to each of its rows.
extern "C" __global__ void __launch_bounds__(384, 2)
    dispatch_recv(const __grid_constant__ DispatchRecvParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    const Comm& comm = p.comm;
    if (timed_out(comm)) return;
    const int lane = threadIdx.x % 32;
    const int warp = blockIdx.x + gridDim.x * (threadIdx.x / 32), num_warps = gridDim.x * (blockDim.x / 32);
    const uint32_t epoch = comm.state->epoch;
    const int num_ranks = comm.num_ranks;
    uint8_t* stage = shared + threadIdx.x / 32 * kStageBytes;

    if (p.padded_rows != 0) {
        for (int i = lane; i < kRowBytes / 16; i += 32)
            reinterpret_cast<uint4*>(stage)[i] = make_uint4(0, 0, 0, 0);
        for (int word = lane; word < kRowScaleWords; word += 32) {
            const float scale = kRecv == kRecvFp8 ? pow2(kMinScaleExponent) : 0.0f;
            reinterpret_cast<float*>(stage + kRowBytes)[word] = scale;
        }
        const int end = p.padded_rows > 0 ? p.padded_rows : p.group_offsets[comm.num_local_experts];
        const int num_rows = min(end, p.num_rows);
        for (int first = warp * 32; first < num_rows; first += num_warps * 32) {
            const int row = first + lane;
            write_rows(p, stage, row < num_rows && p.row_record[row] < 0 ? row : -1);
        }
    }

    int most = 0;
    for (int source = 0; source < num_ranks; ++source) {
        most = max(most, p.recv_offsets[source + 1] - p.recv_offsets[source]);
    }
    uint32_t overflows = 0;
    for (int next = warp; next < most * num_ranks; next += num_warps) {
        const int source = next % num_ranks, slot = next / num_ranks;
        const int record = p.recv_offsets[source] + slot;
        if (record >= p.recv_offsets[source + 1]) continue;
        const int64_t index = slot_index(comm, source, slot);
        int my_row = lane < p.width ? p.record_rows[static_cast<int64_t>(record) * p.width + lane] : -1;
        if (my_row >= p.num_rows) my_row = -1;
        bool arrived = true;
        if (lane == 0) {
            const uint32_t* flag = region<uint32_t>(comm, comm.rank, comm.dispatch_flags) + index;
            arrived = wait_flag(comm, flag, epoch, source, kPhaseDispatch);
        }
        if (!__shfl_sync(kAllLanes, arrived, 0)) break;
        const uint8_t* bytes = region<uint8_t>(comm, comm.rank, comm.dispatch_records) + index * kRecordBytes;
        uint32_t record_overflows = 0;
        for (int first = 0; first < kVecsPerLane; first += kBatch) {
            LaneVec parts[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                parts[i] = read_record(bytes, (first + i) * 32 + lane);
            if (first == 0) {  // the stage has been read
                bulk_wait_read<0>();
                __syncwarp();
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int vec = (first + i) * 32 + lane;
                const LaneVec out = convert(parts[i], p.quantizer, record_overflows);
                if (vec >= kNumVecs) continue;
                write_data<static_cast<WireKind>(kRecv)>(stage, vec, out);
                if (kRecv == kRecvFp8 && vec % kVecsPerGroup == 0) {
                    reinterpret_cast<float*>(stage + kRowBytes)[vec / kVecsPerGroup] = out.scale;
                }
                if (kRecv == kRecvMxfp4 && vec % kVecsPerBlock == 0) {
                    stage[kRowBytes + vec / kVecsPerBlock] = static_cast<uint8_t>(out.sf);
                }
            }
        }
        write_rows(p, stage, my_row);
        overflows += record_overflows * __popc(__ballot_sync(kAllLanes, my_row >= 0));
    }
    bulk_wait<0>();
    add_overflows(p.overflows, overflows);
}
