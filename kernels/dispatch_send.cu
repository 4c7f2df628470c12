// The send side of dispatch: quantizes each token once and copies its record to every destination rank.
#include "sender.cuh"
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
// Whether a team loads the next token while it encodes one; rounding at random and rotations take the
// registers for it.
constexpr bool kLoadsAhead = !kStochastic && !kHadamard && kVecsPerThread == 1;

// Reads one lane's part of a token; lanes past the end get zeros.
__device__ __forceinline__ LaneVec read_input(const DispatchSendParams& p, int token, int vec) {
    LaneVec in = {};
    in.scale = 1.0f;
    if (vec >= kNumVecs) return in;
    if constexpr (kInput == kInputBf16) {
        const uint4* data =
            reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(token) * (2 * kHidden)) + 2 * vec;
        unpack(load_stream(data), in.words);
        unpack(load_stream(data + 1), in.words + 4);
    } else if constexpr (kInput == kInputFp8) {
        const uint4* data = reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(token) * kHidden);
        unpack(load_stream(data + vec), in.words);
        const float* sf = reinterpret_cast<const float*>(p.sf) + token * p.sf_row_stride;
        in.scale = sf[vec / kVecsPerGroup * p.sf_group_stride];
    } else {
        const uint2* data = reinterpret_cast<const uint2*>(p.x + static_cast<int64_t>(token) * (kHidden / 2));
        unpack(load_stream(data + vec), in.words);
        in.sf = p.sf[static_cast<int64_t>(token) * (kHidden / kBlockSize) + vec / kVecsPerBlock];
    }
    return in;
}

__device__ __forceinline__ LaneVec encode_input(LaneVec& in, const Quantizer& quantizer, int token, int vec) {
    if constexpr (static_cast<int>(kInput) == static_cast<int>(kWire)) {
        return in;
    } else if constexpr (kInput == kInputBf16 && kWire == kMxfp4 && !kHadamard && !kStochastic) {
        return lane_vec(quantize_bf16(in.bf16(), quantizer));
    } else {
        if constexpr (kInput == kInputFp8 && !kHadamard && !kStochastic) {
            Mxfp4Vec<kVec> packed;
            const bool done = quantize_e4m3(in.data(), in.scale, quantizer, packed);
            if (__all_sync(kAllLanes, done)) return lane_vec(packed);
        }
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

// Any grid; whole teams. Dynamic shared memory: kStages of Sender's stages a team, 16-byte aligned. A team
// takes every count-th token, and loads the next while it encodes one. Reads x once and writes each record
// once per destination rank, itself included: slot send_slot[token][rank] of this rank's region there, then,
// with release order, that slot's flag.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_send(const __grid_constant__ DispatchSendParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    const Comm& comm = p.comm;
    if (__syncthreads_or(timed_out(comm))) return;
    const uint32_t epoch = comm.state->epoch;
    if (p.after_route) {
        bool came = true;
        if (threadIdx.x < comm.num_ranks) {
            const uint32_t* flag = region<uint32_t>(comm, comm.rank, comm.route_flags) + threadIdx.x;
            came = wait_flag(comm, flag, epoch, threadIdx.x, kPhaseRoute);
        }
        if (!__syncthreads_and(came)) return;
    }
    const Team team;
    const int lane = threadIdx.x % 32;
    Sender sender(team, shared, epoch);
    const auto slot_of = [&](int token) {
        return lane < comm.num_ranks && token < p.num_tokens
                   ? p.send_slot[static_cast<int64_t>(token) * comm.num_ranks + lane]
                   : -1;
    };
    const auto write = [&](LaneVec in, int token, int vec) {
        write_record(sender.stage(), encode_input(in, p.quantizer, token, vec), vec);
    };

    int next_slot = slot_of(team.index);
    LaneVec next;
    if (kLoadsAhead && team.index < p.num_tokens) next = read_input(p, team.index, team.thread);
    for (int token = team.index; token < p.num_tokens; token += team.count) {
        const int slot = next_slot, following = token + team.count;
        const LaneVec ahead = next;
        next_slot = slot_of(following);
        if (kLoadsAhead && following < p.num_tokens) next = read_input(p, following, team.thread);
        if (__all_sync(kAllLanes, slot < 0)) continue;
        sender.begin(team);
        if constexpr (kLoadsAhead) {
            write(ahead, token, team.thread);
        } else {
#pragma unroll 1
            for (int i = 0; i < kVecsPerThread; ++i)
                write(read_input(p, token, team.vec(i)), token, team.vec(i));
        }
        uint8_t* destination = nullptr;
        uint32_t* flag = nullptr;
        if (slot >= 0) {
            const int64_t index = slot_index(comm, comm.rank, slot);
            destination = region<uint8_t>(comm, lane, comm.dispatch_records) + index * kRecordBytes;
            flag = region<uint32_t>(comm, lane, comm.dispatch_flags) + index;
        }
        sender.send(team, destination, flag);
    }
    sender.finish(team);
}
