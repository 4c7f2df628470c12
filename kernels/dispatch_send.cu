// The send side of dispatch: quantizes each token once and copies its record to every destination rank.
#include "record.cuh"
#include "wait.cuh"

enum InputKind { kInputBf16 = QCOMM_BF16, kInputFp8 = QCOMM_FP8, kInputMxfp4 = QCOMM_MXFP4 };

struct DispatchSendParams {
    Comm comm;
    const uint8_t* x;   // [num_tokens] rows of bf16, E4M3 or packed E2M1
    const uint8_t* sf;  // fp8: float32 with the strides below; mxfp4: [num_tokens, kHidden / 32]; else null
    const int32_t* send_slot;  // [num_tokens, num_ranks]
    int64_t sf_row_stride;     // elements
    int64_t sf_group_stride;   // elements
    Quantizer quantizer;
    int32_t num_tokens;
    int32_t after_route;  // whether the call began with route, and this kernel must wait for the peers'
};

static_assert(sizeof(DispatchSendParams) == QCOMM_SIZEOF_DISPATCH_SEND,
              "qcomm/ops/dispatch.py holds the same");

constexpr InputKind kInput = static_cast<InputKind>(QCOMM_INPUT);

// Reads one lane's part of a bf16 or FP8 token; lanes past the end get zeros.
__device__ __forceinline__ LaneVec read_input(const DispatchSendParams& p, int token, int vec) {
    LaneVec in = {};
    if (vec >= kNumVecs) return in;
    if constexpr (kInput == kInputBf16) {
        const uint4* data =
            reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(token) * (2 * kHidden)) + 2 * vec;
        unpack(load_stream(data), in.words);
        unpack(load_stream(data + 1), in.words + 4);
    } else {
        const uint4* data = reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(token) * kHidden);
        unpack(load_stream(data + vec), in.words);
        const float* sf = reinterpret_cast<const float*>(p.sf) + token * p.sf_row_stride;
        in.scale = sf[vec / kVecsPerGroup * p.sf_group_stride];
    }
    return in;
}

__device__ __forceinline__ LaneVec encode_input(LaneVec& in, const Quantizer& quantizer, int token, int vec) {
    if constexpr (static_cast<int>(kInput) == static_cast<int>(kWire)) {
        return in;
    } else if constexpr (kInput == kInputBf16 && kWire == kMxfp4 && !kHadamard && !kStochastic) {
        return lane_vec(quantize_bf16(in.bf16(), quantizer));
    } else {
        float v[kVec];
        int offset = 0;
        if constexpr (kInput == kInputBf16) {
            decode_bf16(in.bf16(), v);
        } else if constexpr (kHadamard) {
            decode_fp8(in.data(), in.scale, v);
        } else {
            decode_e4m3(in.data(), v);
            offset = scale_to_odd(v, in.scale);
        }
        return encode_wire<kInput == kInputFp8>(v, offset, quantizer, token, vec);
    }
}

// Any grid, at most 384 threads; a warp takes every num_warps-th token. Dynamic shared memory: one record a
// warp, 16-byte aligned. Reads x once and writes each record once per destination rank, itself included: slot
// send_slot[token][rank] of this rank's region there, then, with release order, that slot's flag.
extern "C" __global__ void __launch_bounds__(384, 2)
    dispatch_send(const __grid_constant__ DispatchSendParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    const Comm& comm = p.comm;
    if (timed_out(comm)) return;
    const uint32_t epoch = comm.state->epoch;
    if (p.after_route) {
        bool came = true;
        if (threadIdx.x < comm.num_ranks) {
            const uint32_t* flag = region<uint32_t>(comm, comm.rank, comm.route_flags) + threadIdx.x;
            came = wait_flag(comm, flag, epoch, threadIdx.x, kPhaseRoute);
        }
        if (!__syncthreads_and(came)) return;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int num_warps = gridDim.x * (blockDim.x / 32);
    Sender sender(shared + warp * kRecordBytes, epoch);

    for (int token = blockIdx.x + gridDim.x * warp; token < p.num_tokens; token += num_warps) {
        const int slot =
            lane < comm.num_ranks ? p.send_slot[static_cast<int64_t>(token) * comm.num_ranks + lane] : -1;
        if (__all_sync(kAllLanes, slot < 0)) continue;
        if constexpr (kInput == kInputMxfp4) {
            uint8_t* stage = sender.stage();
            const uint4* data =
                reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(token) * (kHidden / 2));
            const uint32_t* sf =
                reinterpret_cast<const uint32_t*>(p.sf + static_cast<int64_t>(token) * (kHidden / 32));
            for (int i = lane; i < kHidden / 32; i += 32)
                reinterpret_cast<uint4*>(stage)[i] = data[i];
            for (int i = lane; i < kHidden / 128; i += 32) {
                reinterpret_cast<uint32_t*>(stage + kScaleOffset)[i] = sf[i];
            }
        } else {
            for (int first = 0; first < kVecsPerLane; first += kBatch) {
                LaneVec parts[kBatch];
#pragma unroll
                for (int i = 0; i < kBatch; ++i)
                    parts[i] = read_input(p, token, (first + i) * 32 + lane);
                uint8_t* stage = sender.stage();
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    const int vec = (first + i) * 32 + lane;
                    write_record(stage, encode_input(parts[i], p.quantizer, token, vec), vec);
                }
            }
        }
        uint8_t* destination = nullptr;
        uint32_t* flag = nullptr;
        if (slot >= 0) {
            const int64_t index = slot_index(comm, comm.rank, slot);
            destination = region<uint8_t>(comm, lane, comm.dispatch_records) + index * kRecordBytes;
            flag = region<uint32_t>(comm, lane, comm.dispatch_flags) + index;
        }
        sender.send(destination, flag);
    }
    sender.finish();
}
