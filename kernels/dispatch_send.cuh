// The send side of dispatch: the warps that encode a block's tokens, and those that copy the records to every
// destination rank.
#pragma once

#include "sender.cuh"
#include "topk.cuh"
#include "wait.cuh"

enum InputKind { kInputBf16 = QCOMM_BF16, kInputFp8 = QCOMM_FP8, kInputMxfp4 = QCOMM_MXFP4 };

struct DispatchSendParams {
    Comm comm;
    const uint8_t* x;    // [num_tokens] rows of bf16, E4M3 or packed E2M1
    const uint8_t* sf;   // fp8: float32 with the strides below; mxfp4: [num_tokens, kHidden / 32]; else null
    int32_t* send_slot;  // [num_tokens, slots_per_token]
    const int32_t* topk_idx;      // [num_tokens, kNumTopk] of index_words words each, the lowest first
    int32_t* ordinals;            // [num_tokens, kNumTopk]
    const int32_t* topk_weights;  // [num_tokens, kNumTopk] bits of float32, or null for ones
    int64_t sf_row_stride;        // elements
    int64_t sf_group_stride;      // elements
    Quantizer quantizer;
    int32_t num_tokens;
    int32_t index_words;  // 0 for a replay, whose records have no metadata
};

static_assert(sizeof(DispatchSendParams) == QCOMM_SIZEOF_DISPATCH_SEND,
              "qcomm/ops/dispatch.py holds the same");

constexpr int kMetadataWords = 1 + 3 * kNumTopk;
constexpr int kWordsPerLane = (kMetadataWords + 31) / 32;
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

// One lane's words of the metadata that follow a record, those of the next token read ahead: see
// MetadataLayout in qcomm/records.py.
class Metadata {
  public:
    __device__ __forceinline__ explicit Metadata(const DispatchSendParams& p) {
#pragma unroll
        for (int i = 0; i < kWordsPerLane; ++i) {
            const int word = 32 * i + threadIdx.x % 32 - 1, field = word / kNumTopk, j = word % kNumTopk;
            from_[i] = nullptr;
            stride_[i] = kNumTopk * (field == 0 ? p.index_words : 1);
            next_[i] = __float_as_int(1.0f);
            if (p.index_words == 0 || word < 0 || word >= 3 * kNumTopk) continue;
            if (field == 0) from_[i] = p.topk_idx + j * p.index_words;
            if (field == 1) from_[i] = p.ordinals + j;
            if (field == 2 && p.topk_weights != nullptr) from_[i] = p.topk_weights + j;
        }
    }

    __device__ __forceinline__ void read(int token) {
#pragma unroll
        for (int i = 0; i < kWordsPerLane; ++i)
            if (from_[i] != nullptr) next_[i] = from_[i][static_cast<int64_t>(token) * stride_[i]];
    }

    __device__ __forceinline__ void write(uint8_t* record, int token) const {
#pragma unroll
        for (int i = 0; i < kWordsPerLane; ++i) {
            const int word = 32 * i + threadIdx.x % 32;
            if (word < kMetadataWords)
                reinterpret_cast<int32_t*>(record + kRecordBytes)[word] = word == 0 ? token : next_[i];
        }
    }

  private:
    const int32_t* from_[kWordsPerLane];
    int32_t stride_[kWordsPerLane];
    int32_t next_[kWordsPerLane];
};

#if QCOMM_NVSHMEM
// Where the records of other nodes' ranks are put: to one rank of each node, which forwards them; or to each
// rank.
constexpr int kOutboxLane = 31;
static_assert(kOutboxLane >= kMaxRanks);

class FarSender {
  public:
    __device__ __forceinline__ FarSender(const DispatchSendParams& p) : p_(p) {}

    __device__ __forceinline__ PutParts parts() const {
        const Comm& comm = p_.comm;
        const Nodes& nodes = comm.state->nodes;
        const uint64_t records = kForwards ? nodes.inbox : comm.dispatch_records;
        const uint64_t flags = kForwards ? nodes.inbox_flags : comm.dispatch_flags;
        const bool replays = p_.index_words == 0;
        return {region<uint8_t>(comm, comm.rank, nodes.dispatch_outbox),
                region<uint8_t>(comm, comm.rank, records), region<uint32_t>(comm, comm.rank, flags),
                kForwards ? kInboxSlotBytes : kSlotBytes,
                static_cast<uint32_t>(replays     ? kRecordBytes
                                      : kForwards ? kForwardedBytes
                                                  : kSlotsOffset)};
    }

    // Notes where a token's record is put, and returns this lane's place in the outbox to copy it to, or
    // null. The lane has `slot` at `rank`, -1 for none. Puts nothing unless the call has begun everywhere.
    __device__ __forceinline__ uint8_t* will_put(Sender& sender, const PutParts& parts, int token, int rank,
                                                 int slot, bool began) const {
        const Comm& comm = p_.comm;
        const int lane = threadIdx.x % 32;
        Put put = {-1, 0};
        uint8_t* copy = const_cast<uint8_t*>(parts.outbox) + static_cast<int64_t>(token) * parts.slot_bytes;
        if constexpr (kForwards) {
            const int32_t* node_slots =
                p_.send_slot + static_cast<int64_t>(token) * slots_per_token(comm) + comm.num_ranks;
            if (lane < kNodes && began && node_slots[lane] >= 0) {
                put = {counterpart(comm, lane), node_of(comm.rank) * comm.max_tokens + node_slots[lane]};
            }
            if (lane < comm.num_ranks && began && p_.index_words != 0)
                reinterpret_cast<int32_t*>(copy + kSlotsOffset)[rank] = slot;
        } else if (slot >= 0 && began && !same_node(comm, rank)) {
            put = {rank, static_cast<int32_t>(slot_index(comm, comm.rank, slot))};
        }
        const bool any = __any_sync(kAllLanes, put.rank >= 0);
        sender.will_put(put, token);
        return any && lane == kOutboxLane ? copy : nullptr;
    }

  private:
    const DispatchSendParams& p_;
};
#endif

// Of which token a record of the block is, by its number; from one number on, of none. This way every
// gridDim.x-th token is the block's.
struct Shares {
    static constexpr bool kTakes = false;

    __device__ __forceinline__ int of(uint32_t n) const { return blockIdx.x + gridDim.x * n; }

    // That of record n + step, where n is of `token`.
    __device__ __forceinline__ int after(int token, uint32_t, int step) const {
        return token + gridDim.x * step;
    }
};

// This way a block takes the rank's next token when it comes to it: some SMs send a third faster than others,
// and would be done long before those. The team takes each two records ahead, so that it never waits for the
// counter, which route or barrier has zeroed. Several teams share instead.
struct Claims {
    static constexpr bool kTakes = kTeams == 1;
    static constexpr uint32_t kFirst = 2;  // that a block has without taking them
    static constexpr int kNone = 0x7fffffff;
    // When one is overwritten, the stages of later ones have been read, whose senders had asked further on.
    static constexpr uint32_t kRing = kStages + 3;
    static_assert(kSenders <= 2, "of the records of no token two are told, one for each sender");

    int32_t tokens[kRing];
    Signals<kRing> known;

    __device__ __forceinline__ void init() { known.init(1); }

    __device__ __forceinline__ int of(uint32_t n) {
        if (!kTakes || n < kFirst) return Shares().of(n);
        known.wait(n - kFirst);
        return tokens[(n - kFirst) % kRing];
    }

    __device__ __forceinline__ int after(int token, uint32_t n, int step) {
        return kTakes ? of(n + step) : Shares().after(token, n, step);
    }

    // Says of which token record n is, after those before it. Call from one thread.
    __device__ __forceinline__ void tell(uint32_t n, int token) {
        if (n < kFirst) return;
        tokens[(n - kFirst) % kRing] = token;
        mbarrier_arrive(known.of(n - kFirst));
    }

    __device__ __forceinline__ static int take(const Comm& comm) {
        return static_cast<int>(atomicAdd(&comm.state->num_claimed, 1u) + kFirst * gridDim.x);
    }
};

// A warp that sends every kSenders-th of the block's records, once per destination rank, or rank or node that
// it is put to; or none, unless the call has begun everywhere.
template <typename Tokens>
__device__ __forceinline__ void send_records(const DispatchSendParams& p, uint32_t epoch, bool began,
                                             Outbox& outbox, Tokens& tokens, uint8_t* shared) {
    const Comm& comm = p.comm;
    const int lane = threadIdx.x % 32;
#if QCOMM_NVSHMEM
    const FarSender far(p);
    const PutParts parts = far.parts();
#else
    const PutParts parts = {};
#endif
    Sender sender(outbox, shared, epoch, parts);
    // A lane's rank changes with the token: were it the same for all, all ranks would send to one at a time,
    // over its links alone.
    const auto rank_of = [&](int token) { return (lane + token + token / gridDim.x) % comm.num_ranks; };
    const auto slot_of = [&](int token) {
        return lane < comm.num_ranks && token < p.num_tokens
                   ? p.send_slot[static_cast<int64_t>(token) * slots_per_token(comm) + rank_of(token)]
                   : -1;
    };
    uint32_t n = sender.number();
    int token = tokens.of(n), next_token;
    Metadata metadata(p);
    int next_slot = slot_of(token);
    if (token < p.num_tokens) metadata.read(token);
    for (; token < p.num_tokens; token = next_token) {
        next_token = tokens.after(token, n, kSenders);
        n += kSenders;
        const int slot = next_slot, rank = rank_of(token);
        uint8_t* record = sender.next();
        if (p.index_words != 0) {
            metadata.write(record, token);
            fence_proxy_async_shared();
            __syncwarp();
            if (next_token < p.num_tokens) metadata.read(next_token);
        }
        next_slot = slot_of(next_token);
        uint8_t* destination = nullptr;
        uint32_t* flag = nullptr;
        if (slot >= 0 && began && same_node(comm, rank)) {
            const int64_t index = slot_index(comm, comm.rank, slot);
            destination = region<uint8_t>(comm, rank, comm.dispatch_records) + index * kSlotBytes;
            flag = flag_at(comm, rank, comm.dispatch_flags, index);
        }
#if QCOMM_NVSHMEM
        uint8_t* const copy = far.will_put(sender, parts, token, rank, slot, began);
        if (copy != nullptr) destination = copy;
#endif
        sender.send(destination, flag, p.index_words != 0 ? kRecordBytes + kMetadataBytes : kRecordBytes);
    }
    sender.finish();
}

// A team's warps, each on its own part: encode every kTeams-th of the block's records, and read the next
// token meanwhile.
class Encoder {
  public:
    __device__ __forceinline__ explicit Encoder(const DispatchSendParams& p) : p_(p) {}

    // Begins to read the first token.
    __device__ __forceinline__ void begin() {
        if (team_.index >= p_.num_tokens) return;
        if constexpr (kLoadsAhead) {
            next_ = read_input(p_, team_.index, team_.thread);
        } else {
            constexpr int kInputBytes = kInput == kInputBf16  ? 2 * kHidden
                                        : kInput == kInputFp8 ? kHidden
                                                              : kHidden / 2;
            for (int byte = 128 * team_.thread; byte < kInputBytes; byte += 128 * kTeamThreads)
                prefetch(p_.x + static_cast<int64_t>(team_.index) * kInputBytes + byte);
        }
    }

    template <typename Tokens>
    __device__ __forceinline__ void encode(Outbox& outbox, Tokens& tokens, uint8_t* shared) {
        uint32_t n = team_.number;
        int following, taken = 0;
        // What can be worked out again takes no register.
        for (int token = team_.index; token < p_.num_tokens;
             token = Tokens::kTakes ? following : token + team_.count, n += kTeams) {
            if constexpr (Tokens::kTakes) {
                if (team_.thread == 0) {
                    if (n == 0) wait_for_previous();  // it zeroes the counter
                    tokens.tell(n + 1, taken);
                    taken = Tokens::take(p_.comm);
                }
            }
            following = tokens.after(token, n, kTeams);
            const LaneVec ahead = next_;
            if (kLoadsAhead && following < p_.num_tokens) next_ = read_input(p_, following, team_.thread);
            outbox.read.wait_before(n);
            uint8_t* stage = stage_of(shared, n);
            if constexpr (kLoadsAhead) {
                write(stage, ahead, token, team_.thread);
            } else {
#pragma unroll 1
                for (int i = 0; i < kVecsPerThread; ++i)
                    write(stage, read_input(p_, token, team_.vec(i)), token, team_.vec(i));
            }
            outbox.hand_over(n);
        }
        if constexpr (Tokens::kTakes) {
            // What the other sender still asks for.
            if (team_.thread == 0 && kSenders > 1) tokens.tell(n + 1, Tokens::kNone);
        }
    }

  private:
    __device__ __forceinline__ void write(uint8_t* stage, LaneVec in, int token, int vec) const {
        write_record(stage, encode_input(in, p_.quantizer, token, vec), vec);
    }

    const DispatchSendParams& p_;
    const Team team_;
    LaneVec next_;
};
