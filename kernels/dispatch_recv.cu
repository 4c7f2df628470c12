// The receive side of dispatch: reads each record once, as soon as it is there, and writes it converted into
// each of its rows.
#include "dispatch_recv.cuh"

// Any grid and block. A warp first zeroes its share of the padding rows, then takes records round robin over
// the sources, which is the order in which they come; it waits for a record's flag, reads the record once and
// writes its rows.
extern "C" __global__ void __launch_bounds__(256)
    dispatch_recv(const __grid_constant__ DispatchRecvParams p) {
    const Comm& comm = p.comm;
    if (timed_out(comm)) return;
    const int lane = threadIdx.x % 32;
    const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32,
              num_warps = gridDim.x * (blockDim.x / 32);
    const uint32_t epoch = comm.state->epoch;
    const int num_ranks = comm.num_ranks;

    if (p.group_offsets != nullptr && p.rows_per_expert == 0) {
        RowVec zero = {};
        zero.scale = pow2(kMinScaleExponent);
        const int num_rows = p.group_offsets[comm.num_local_experts];
        for (int first = warp * 32; first < num_rows; first += num_warps * 32) {
            const bool padding = first + lane < num_rows && p.row_record[first + lane] < 0;
            for (uint32_t left = __ballot_sync(kAllLanes, padding); left != 0; left &= left - 1) {
                const int row = first + __ffs(left) - 1;
                for (int vec = lane; vec < kNumVecs; vec += 32)
                    write_row(p, row, vec, zero);
            }
        }
    }
    int most = 0;
    for (int source = 0; source < num_ranks; ++source) {
        most = max(most, p.recv_offsets[source + 1] - p.recv_offsets[source]);
    }
    uint32_t overflows = 0;
    for (int i = warp; i < most * num_ranks; i += num_warps) {
        const int source = i % num_ranks, slot = i / num_ranks;
        const int record = p.recv_offsets[source] + slot;
        if (record >= p.recv_offsets[source + 1]) continue;
        const int64_t index = slot_index(comm, source, slot);
        const int my_row = lane < p.width ? p.record_rows[static_cast<int64_t>(record) * p.width + lane] : -1;
        const uint32_t rows = __ballot_sync(kAllLanes, my_row >= 0);
        bool arrived = true;
        if (lane == 0) {
            const uint32_t* flag = region<uint32_t>(comm, comm.rank, comm.dispatch_flags) + index;
            arrived = wait_flag(comm, flag, epoch, source, kPhaseDispatch);
        }
        if (!__shfl_sync(kAllLanes, arrived, 0)) return;
        const uint8_t* bytes = region<uint8_t>(comm, comm.rank, comm.dispatch_records) + index * kRecordBytes;
        uint32_t record_overflows = 0;
#pragma unroll 7
        for (int step = 0; step < kVecsPerLane; ++step) {
            const int vec = step * 32 + lane;
            const RowVec out = convert(read_record(bytes, vec), p.quantizer, record_overflows);
            for (uint32_t left = rows; left != 0; left &= left - 1) {
                const int row = __shfl_sync(kAllLanes, my_row, __ffs(left) - 1);
                if (vec < kNumVecs) write_row(p, row, vec, out);
            }
        }
        overflows += record_overflows * __popc(rows);
    }
    add_overflows(p.overflows, overflows);
}
