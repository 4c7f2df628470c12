// The receive side of dispatch: the warps that learn of a block's records and give them their rows, and those
// that convert them.
#pragma once

#include "dispatch_recv.cuh"
#include "pairs.cuh"
#include "signals.cuh"
#include "team.cuh"

constexpr bool kPlaces = QCOMM_PLACES;              // whether records are given their rows here, or have them
constexpr int kBatch = kVecsPerThread < 2 ? 1 : 2;  // vectors that are loaded together

// Writes a row of zeros, under the smallest scale. Call from one warp.
__device__ __forceinline__ void write_zeros(const DispatchRecvParams& p, int row) {
    const int lane = threadIdx.x % 32;
    uint4* const x = reinterpret_cast<uint4*>(p.x + static_cast<int64_t>(row) * kRowBytes);
    for (int i = lane; i < kRowBytes / 16; i += 32)
        store_stream(x + i, make_uint4(0, 0, 0, 0));
    const float scale = kRecv == kRecvFp8 ? pow2(kMinScaleExponent) : 0.0f;
    for (int word = lane; word < kRowScaleWords; word += 32)
        *scale_word(p, row, word) = __float_as_uint(scale);
}

// One warp of num_warps notes which rows are padding, and `zeroes` them or not: few at a time, so that every
// SM has as many to write.
__device__ __forceinline__ void pad_rows(const DispatchRecvParams& p, const Placement& placement, bool zeroes,
                                         int warp, int num_warps) {
    const int most = p.rows_per_expert > 0 ? p.rows_per_expert : placement.alignment - 1;
    const int piece = zeroes ? 4 : 32, pieces = (most + piece - 1) / piece, lane = threadIdx.x % 32;
    for (int i = warp; i < pieces * p.comm.num_local_experts; i += num_warps) {
        const int expert = i / pieces, end = placement.group_offsets[expert + 1];
        const int first = placement.group_offsets[expert] + placement.num_tokens_per_expert[expert] +
                          i % pieces * piece;
        if (kPlaces && lane < piece && first + lane < end) note_padding(placement, first + lane);
        if (!zeroes) continue;
        for (int row = first; row < min(min(first + piece, end), p.num_rows); ++row)
            write_zeros(p, row);
    }
}

// Writes this warp's share of the padding rows, and notes that they are padding. Call from whole teams.
__device__ __forceinline__ void write_padding(const DispatchRecvParams& p, const Placement& placement) {
    if (placement.layout == kTokenMajor) return;
    const Team team;
    pad_rows(p, placement, p.pads, team.index + team.count * (team.thread / 32), team.count * kTeamWarps);
}

// What the telling warp of each team tells it, in shared memory.
struct Inbox {
    static constexpr int kDepth = 4;

    struct Item {
        int32_t index;           // slot of the record, -1 after the last
        int32_t rows[kNumTopk];    // of x, -1 for none
        int64_t scales[kNumTopk];  // where theirs begin, in elements; of fp8 only
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
            if (lane < kNumTopk) {
                item.rows[lane] = row < p.num_rows ? row : -1;
                if (kRecv == kRecvFp8) item.scales[lane] = scale_offset(p, row);
            }
            inbox.placed[team].arrive(n);
            if (kPlaces) note_record(placement, entry, source, record, row);
        }
    }
    tell_end(inbox, team, n);
}

// This lane's vector i of a record; those of a warp are adjacent.
__device__ __forceinline__ int vec_of(const Team& team, int i) {
    return (team.thread / 32 * kVecsPerThread + i) * 32 + threadIdx.x % 32;
}

// Reads one lane's part; of bf16 that is received as it is, the pieces that exchange_halves would give it.
__device__ __forceinline__ LaneVec read_part(const uint8_t* record, int vec) {
    if constexpr (kWire != kBf16) return read_record(record, vec);
    LaneVec w = {};
    if (vec < kNumVecs) {
        const uint4* data = reinterpret_cast<const uint4*>(record) + pair_offset(vec);
        unpack(load_stream(data), w.words);
        unpack(load_stream(data + 2), w.words + 4);
    }
    if constexpr (kRecv != kRecvBf16) exchange_halves(w.words);
    return w;
}

// Writes one lane's part of a row's data; of bf16, the pieces that exchange_halves gave it.
__device__ __forceinline__ void write_part(const DispatchRecvParams& p, int row, int vec, const LaneVec& w) {
    if (vec >= kNumVecs) return;
    uint8_t* const x = p.x + static_cast<int64_t>(row) * kRowBytes;
    if constexpr (kRecv == kRecvBf16) {
        uint4* const data = reinterpret_cast<uint4*>(x) + pair_offset(vec);
        store_stream(data, pack4(w.words));
        store_stream(data + 2, pack4(w.words + 4));
    } else if constexpr (kRecv == kRecvFp8) {
        store_stream(reinterpret_cast<uint4*>(x) + vec, pack4(w.words));
    } else {
        store_stream(reinterpret_cast<uint2*>(x) + vec, make_uint2(w.words[0], w.words[1]));
    }
}

// The scales of a batch of a warp's vectors, of which a lane writes one: whole sectors of the usual layout.
class ScaleWriter {
  public:
    // `first` is this lane's first vector of the batch.
    __device__ __forceinline__ explicit ScaleWriter(const LaneVec (&parts)[kBatch], int first)
        : number_(first / 32 * kOfVec + static_cast<int>(threadIdx.x % 32)) {
        const int lane = threadIdx.x % 32;
        writes_ = kRecv != kRecvBf16 && lane < kBatch * kOfVec && number_ < kNumVecs / kLanes;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            const uint32_t mine = kRecv == kRecvFp8 ? __float_as_uint(parts[j].scale) : parts[j].sf;
            const uint32_t its = __shfl_sync(kAllLanes, mine, lane % kOfVec * kLanes);
            if (lane / kOfVec == j) scale_ = its;
        }
    }

    __device__ __forceinline__ void write(const DispatchRecvParams& p, int row, int64_t offset) const {
        if (!writes_) return;
        if constexpr (kRecv == kRecvFp8)
            reinterpret_cast<uint32_t*>(p.sf)[offset + number_ * p.sf_group_stride] = scale_;
        if constexpr (kRecv == kRecvMxfp4)
            p.sf[static_cast<int64_t>(row) * (4 * kRowScaleWords) + number_] = static_cast<uint8_t>(scale_);
    }

  private:
    static constexpr int kLanes = kRecv == kRecvFp8 ? kVecsPerGroup : kVecsPerBlock;  // that share a scale
    static constexpr int kOfVec = 32 / kLanes;  // of a warp's vector

    const int number_;
    bool writes_;
    uint32_t scale_ = 0;
};

// A team's warps, each on its own part: convert each record that they are told of, and write it to each of
// its rows; add their overflows to `total`. Plain stores: bulk copies to rows wait in line behind those to
// peers, and an SM copies 37 bytes a nanosecond at most.
__device__ __forceinline__ void convert_records(const DispatchRecvParams& p, Inbox& inbox, uint64_t* total) {
    const Team team;
    const int lane = threadIdx.x % 32;
    const uint8_t* records = region<uint8_t>(p.comm, p.comm.rank, p.comm.dispatch_records);
    uint32_t overflows = 0;
    for (uint32_t n = 0;; ++n) {
        inbox.told[team.number].wait(n);
        const Inbox::Item& item = inbox.items[team.number][n % Inbox::kDepth];
        if (item.index < 0) break;
        const uint8_t* bytes = records + static_cast<int64_t>(item.index) * kSlotBytes;
        uint32_t rows = 0, record_overflows = 0;
#pragma unroll 1
        for (int i = 0; i < kVecsPerThread; i += kBatch) {
            LaneVec parts[kBatch];
            const int first = vec_of(team, i);
#pragma unroll
            for (int j = 0; j < kBatch; ++j)
                parts[j] = read_part(bytes, first + 32 * j);
            if (i == 0) {
                inbox.placed[team.number].wait(n);
                rows = __ballot_sync(kAllLanes, lane < kNumTopk && item.rows[lane % kNumTopk] >= 0);
            }
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                parts[j] = convert(parts[j], p.quantizer, record_overflows);
                if constexpr (kRecv == kRecvBf16 && kWire != kBf16) exchange_halves(parts[j].words);
            }
            const ScaleWriter scales(parts, first);
#pragma unroll 1
            for (uint32_t left = rows; left != 0; left &= left - 1) {
                const int k = __ffs(left) - 1, row = item.rows[k];
#pragma unroll
                for (int j = 0; j < kBatch; ++j)
                    write_part(p, row, first + 32 * j, parts[j]);
                scales.write(p, row, item.scales[k]);
            }
        }
        inbox.taken[team.number].arrive(n);
        overflows += record_overflows * __popc(rows);
    }
    add_overflows(total, overflows);
}
