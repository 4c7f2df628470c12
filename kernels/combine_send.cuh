// The send side of combine: the warp that loads the rows of a block's records, those that sum and encode
// them, and those that send the sums.
#pragma once

#include "sender.cuh"
#include "topk.cuh"
#include "wait.cuh"

// Whether numbers of rows may travel along; the kernel for few tokens has no registers for them.
constexpr bool kTakesValues = QCOMM_TAKES_VALUES;

struct CombineSendParams {
    Comm comm;
    const int32_t* recv_offsets;      // [num_ranks + 1]
    const int32_t* record_rows;       // [records, width]
    const float* record_weights;      // [records, width], or null for a plain sum
    const int32_t* record_src_token;  // [records]
    const float* row_values;          // [rows, values_width] that travel behind the records, or null
    const uint8_t* y;                 // [rows, kHidden] bf16
    Quantizer quantizer;
    int32_t width;
    int32_t values_width;  // 1, or kNumTopk where a record has one row
};

static_assert(sizeof(CombineSendParams) == QCOMM_SIZEOF_COMBINE_SEND, "qcomm/ops/combine.py holds the same");

// The part of a row that a team sums in one step, and its place in shared memory.
constexpr int kChunkBytes = 2 * kVec * kTeamThreads;
constexpr int kChunks = QCOMM_CHUNKS;
static_assert(kChunkBytes == QCOMM_CHUNK_BYTES, "qcomm/ops/combine.py computes the same");

// Chunks of a record that are on their way before its team is told of it. A team that is not the only one may
// look for a chunk only then: before, what was in the chunk's place may still be on its own way, and a
// barrier cannot tell one use from the next but one.
constexpr uint32_t kLoadedFirst = kTeams == 1 ? 0 : kChunks;

// What the warp that loads a record's rows tells those that sum and send it.
struct Item {
    uint8_t* destination;
    uint32_t* flag;
    int32_t token;
    int32_t source;
    uint32_t first_chunk;
    int32_t num_rows;
    float weights[kNumTopk];
    float values[kNumTopk];
};

// What the loading warp reads of a record ahead of its rows, by asynchronous copies.
struct Ahead {
    int32_t rows[kNumTopk];  // -1 for none
    float weights[kNumTopk];
    float values[kNumTopk];
    int32_t token;
};

constexpr uint32_t kRowsAhead = 6, kValuesAhead = 3, kAhead = 8;  // records

// Which record is one of the next, and where its sum goes. The loading warp, which a block's rows wait for,
// works it out for many at a time, one a lane.
struct Upcoming {
    uint8_t* destination;
    uint32_t* flag;
    int32_t record;
    int32_t source;
};

constexpr uint32_t kUpcoming = 64;
static_assert(kUpcoming > kRowsAhead + 32, "32 are worked out when the last of kRowsAhead is not known");

// What the warps of a block share.
struct SumBoard {
    Outbox outbox;
    Item items[kStages];
    Ahead ahead[kAhead];
    Upcoming upcoming[kUpcoming];
    Signals<kStages> told;    // the item is there
    Signals<kChunks> loaded;  // the chunk is there
    Signals<kChunks> summed;  // and may be overwritten
};

// The records of a block, round robin over the sources.
struct BlockRecords {
    const Comm& comm;
    const int32_t* recv_offsets;
    int total;  // in the grid, with those that a source with fewer records does not have

    __device__ __forceinline__ explicit BlockRecords(const CombineSendParams& p)
        : comm(p.comm),
          recv_offsets(p.recv_offsets),
          total(most_records(comm, recv_offsets) * comm.num_ranks) {}

    // Another one for each of a block's records, and at any time for each rank: see dispatch_send.
    __device__ __forceinline__ int source(int i) const {
        return (i + comm.rank + i / comm.num_ranks * comm.num_ranks / gridDim.x) % comm.num_ranks;
    }
    __device__ __forceinline__ int slot(int i) const { return i / comm.num_ranks; }

    // -1 for none.
    __device__ __forceinline__ int record(int i) const {
        if (i >= total) return -1;
        const int record = recv_offsets[source(i)] + slot(i);
        return record < recv_offsets[source(i) + 1] ? record : -1;
    }

    // How many there are. Call from all threads.
    __device__ __forceinline__ int count() const {
        int n = 0;
        for (int base = 0; base * gridDim.x + blockIdx.x < total; base += blockDim.x)
            n += __syncthreads_count(record((base + threadIdx.x) * gridDim.x + blockIdx.x) >= 0);
        return n;
    }
};

// Where a rank's sums for a source go: to the source, or, where its node's sums are added up first, to the
// rank here that does it for that source; and under the number of which rank they lie there.
struct SumRoute {
    int to;
    int from;
};

__device__ __forceinline__ SumRoute route_of(const Comm& comm, int source) {
    if constexpr (kForwards) {
        const int here = node_of(comm.rank) * kRanksPerNode;
        return {here + source % kRanksPerNode, counterpart(comm, node_of(source))};
    }
    return {same_node(comm, source) ? source : comm.rank, comm.rank};
}

__device__ __forceinline__ uint8_t* combine_outbox(const Comm& comm) {
    return region<uint8_t>(comm, comm.rank, comm.state->nodes.combine_outbox);
}

// Where the sum of the record in a slot of a source goes: to a rank that this GPU reaches, or to the outbox.
__device__ __forceinline__ void set_destination(const Comm& comm, int source, int slot, Upcoming& upcoming) {
    const auto [to, from] = route_of(comm, source);
    const int64_t index = slot_index(comm, from, slot);
    upcoming.destination = region<uint8_t>(comm, to, comm.combine_records) + index * kSlotBytes;
    upcoming.flag = flag_at(comm, to, comm.combine_flags, index);
#if QCOMM_NVSHMEM
    if (!kForwards && !same_node(comm, source))
        upcoming.destination = combine_outbox(comm) + slot_index(comm, source, slot) * kSlotBytes;
#endif
}

// What travels of a record.
__device__ __forceinline__ int bytes_sent(const CombineSendParams& p) {
    return kRecordBytes + (kTakesValues && p.row_values != nullptr ? kMetadataBytes : 0);
}

// What the warp that loads must know of records itself, which it begins to read kRowsAhead records before:
// which rows there are, and where their sum goes. Call from that warp.
class RecordReader {
  public:
    __device__ __forceinline__ RecordReader(const CombineSendParams& p, const BlockRecords& records,
                                            SumBoard& board)
        : p_(p), records_(records), board_(board) {}

    // Begins with the first records; nothing else of the block need be known.
    __device__ __forceinline__ void begin() {
#pragma unroll 1
        for (uint32_t n = 0; n < kRowsAhead; ++n) {
            read(n);
            copy_commit();
        }
    }

    // Begins with record n, if there is one.
    __device__ __forceinline__ void read(uint32_t n) {
        while (num_known_ <= n && first_ < records_.total)
            look_ahead();
        if (num_known_ <= n) return;
        const int lane = threadIdx.x % 32, record = board_.upcoming[n % kUpcoming].record;
        Ahead& ahead = board_.ahead[n % kAhead];
        const int64_t entry = static_cast<int64_t>(record) * p_.width + lane;
        if (lane < p_.width) {
            copy_async<4>(ahead.rows + lane, p_.record_rows + entry, true);
            if (p_.record_weights != nullptr)
                copy_async<4>(ahead.weights + lane, p_.record_weights + entry, true);
        }
        if (lane == 0) copy_async<4>(&ahead.token, p_.record_src_token + record, true);
    }

  private:
    __device__ __forceinline__ void look_ahead() {
        const int lane = threadIdx.x % 32, i = first_ + lane * gridDim.x;
        const int record = records_.record(i);
        const uint32_t mask = __ballot_sync(kAllLanes, record >= 0);
        if (record >= 0) {
            const uint32_t n = num_known_ + __popc(mask & ((1u << lane) - 1));
            Upcoming& upcoming = board_.upcoming[n % kUpcoming];
            upcoming.record = record;
            upcoming.source = records_.source(i);
            set_destination(p_.comm, upcoming.source, records_.slot(i), upcoming);
        }
        first_ += 32 * gridDim.x;
        num_known_ += __popc(mask);
        __syncwarp();
    }

    const CombineSendParams& p_;
    const BlockRecords& records_;
    SumBoard& board_;
    int first_ = blockIdx.x;
    uint32_t num_known_ = 0;
};

// The warp that loads: tells what is to be summed, and copies the rows to shared memory chunk by chunk. The
// reader has begun; when it knows a record's rows, the numbers that travel along are read kValuesAhead
// records before.
__device__ __forceinline__ void load_rows(const CombineSendParams& p, RecordReader& reader, int num_records,
                                          SumBoard& board, uint8_t* chunks) {
    const int lane = threadIdx.x % 32;
    const bool takes_values = kTakesValues && p.row_values != nullptr;
    const auto row_of = [&](uint32_t n) { return lane < p.width ? board.ahead[n % kAhead].rows[lane] : -1; };
    const auto read_values = [&](uint32_t n) {
        if (n >= num_records) return;
        int row = row_of(n);
        if (p.values_width != 1) row = __shfl_sync(kAllLanes, row, 0);
        const int64_t entry = static_cast<int64_t>(row) * p.values_width + (p.values_width == 1 ? 0 : lane);
        if (lane < kNumTopk)
            copy_async<4>(board.ahead[n % kAhead].values + lane, p.row_values + (row < 0 ? 0 : entry),
                          row >= 0);
    };
    if (takes_values) {
        copy_wait<0>();
        for (uint32_t n = 0; n < kValuesAhead; ++n)
            read_values(n);
        copy_commit();
        copy_wait<0>();
    }
    uint32_t chunk = 0;
    for (uint32_t n = 0; n < num_records; ++n) {
        copy_wait<kValuesAhead - 1>();
        reader.read(n + kRowsAhead);
        if (takes_values) read_values(n + kValuesAhead);
        copy_commit();
        const Ahead& ahead = board.ahead[n % kAhead];
        const int row = row_of(n);
        board.outbox.read.wait_before(n);
        Item& item = board.items[n % kStages];
        const uint32_t mask = __ballot_sync(kAllLanes, row >= 0);
        const int num_rows = __popc(mask), mine = __popc(mask & ((1u << lane) - 1));
        if (row >= 0) item.weights[mine] = p.record_weights != nullptr ? ahead.weights[lane] : 1.0f;
        if (takes_values && lane < kNumTopk) item.values[lane] = ahead.values[lane];
        if (lane == 0) {
            const Upcoming& upcoming = board.upcoming[n % kUpcoming];
            item.destination = upcoming.destination;
            item.flag = upcoming.flag;
            item.token = ahead.token;
            item.source = upcoming.source;
            item.first_chunk = chunk;
            item.num_rows = num_rows;
        }
        // Each lane loads its row, as many at a time as the ring has room for.
        uint32_t done = 0;
#pragma unroll 1
        for (int step = 0; step < kVecsPerThread; ++step) {
            const int num_bytes = min(kChunkBytes, 2 * kHidden - step * kChunkBytes);
            for (int first = 0; first < num_rows;) {
                const int last = min(num_rows, static_cast<int>(first + kChunks - done % kChunks));
                if (done == kLoadedFirst) board.told.arrive(n);
                if (row >= 0 && mine >= first && mine < last) {
                    const uint32_t at = chunk + mine - first;
                    const uint8_t* y = p.y + static_cast<int64_t>(row) * (2 * kHidden) + step * kChunkBytes;
                    board.summed.wait_before(at);
                    mbarrier_arrive_expect(board.loaded.of(at), num_bytes);
                    bulk_load_stream(chunks + at % kChunks * kChunkBytes, y, num_bytes, board.loaded.of(at));
                }
                __syncwarp();
                chunk += last - first;
                done += last - first;
                first = last;
            }
        }
        if (done <= kLoadedFirst) board.told.arrive(n);
    }
}

// A team's warps, each on its own part: sum the rows of every kTeams-th record, and encode the sums.
__device__ __forceinline__ void sum_rows(const CombineSendParams& p, int num_records, SumBoard& board,
                                         uint8_t* stages, const uint8_t* chunks) {
    const Team team;
    const uint32_t my_chunks = kept_shared_address(chunks) + sizeof(uint4) * 2 * team.thread;
    const auto loaded = board.loaded.kept(), summed = board.summed.kept();
    for (uint32_t n = team.number; n < num_records; n += kTeams) {
        board.told.wait(n);
        const Item& item = board.items[n % kStages];
        const int num_rows = item.num_rows, token = item.token;
        Quantizer quantizer = p.quantizer;
        quantizer.subsequence = p.comm.num_ranks * (1 + item.source) + p.comm.rank;
        Cursor<kChunks> chunk(item.first_chunk);
#pragma unroll 1
        for (int step = 0; step < kVecsPerThread; ++step) {
            const int vec = team.vec(step);
            float sum[kVec] = {};
#pragma unroll 1
            for (int row = 0; row < num_rows; ++row) {
                const float weight = item.weights[row];
                loaded.wait(chunk);
                const uint32_t y = my_chunks + chunk.index * kChunkBytes;
                uint32_t data[kVec / 2];
                unpack(load_shared(y), data);
                unpack(load_shared(y + sizeof(uint4)), data + 4);
                summed.arrive(chunk);
                chunk.next();
                float term[kVec];
                decode_bf16(data, term);
#pragma unroll
                for (int e = 0; e < kVec; ++e) {
                    sum[e] = __fadd_rn(sum[e], __fmul_rn(weight, term[e]));
                }
            }
            const LaneVec encoded = encode_wire<false>(sum, 0, quantizer, token, vec);
            write_record(stage_of(stages, n), encoded, vec);
        }
        board.outbox.hand_over(n);
    }
}

// The warps that send: a lane has the one destination of each record. First they wait until the call has
// begun on every rank: of call `epoch`, which begins here, or of that which the kernel before has begun.
template <bool kBegins>
__device__ __forceinline__ void send_sums(const CombineSendParams& p, uint32_t epoch, int num_records,
                                          SumBoard& board, uint8_t* stages) {
    const Comm& comm = p.comm;
#if QCOMM_NVSHMEM
    const PutParts parts = {kForwards ? nullptr : combine_outbox(comm),
                            region<uint8_t>(comm, comm.rank, comm.combine_records),
                            region<uint32_t>(comm, comm.rank, comm.combine_flags), kSlotBytes,
                            static_cast<uint32_t>(bytes_sent(p))};
#else
    const PutParts parts = {};
#endif
    bool came = true;
    if constexpr (!kBegins) {
        const Begun call = begun_before(comm);
        epoch = call.epoch;
        came = call.everywhere;
    }
    Sender sender(board.outbox, stages, epoch, parts);
    const int lane = threadIdx.x % 32;
    const bool is_first = blockIdx.x == 0 && sender.number() == 0;
    if (kBegins && is_first) announce(comm, epoch);
    if (kBegins && lane < comm.num_ranks) came = wait_begun(comm, lane, epoch, kPhaseBarrier, is_first);
    const bool sends = __all_sync(kAllLanes, came) && lane == 0;
    for (uint32_t n = sender.number(); n < num_records; n += kSenders) {
        board.told.wait(n);
        const Item& item = board.items[n % kStages];
        uint8_t* record = sender.next();
        if (kTakesValues && p.row_values != nullptr) {
            if (lane < kNumTopk) reinterpret_cast<float*>(record + kRecordBytes)[lane] = item.values[lane];
            fence_proxy_async_shared();
            __syncwarp();
        }
        const uint32_t num_bytes = bytes_sent(p);
        uint8_t* destination = sends ? item.destination : nullptr;
        uint32_t* flag = sends ? item.flag : nullptr;
#if QCOMM_NVSHMEM
        if constexpr (!kForwards) {
            Put put = {-1, 0};
            int outbox_slot = 0;
            if (sends && !same_node(comm, item.source)) {
                put = {item.source, static_cast<int32_t>((flag - parts.flags) / kFlagWords)};
                outbox_slot = static_cast<int>((destination - parts.outbox) / kSlotBytes);
                flag = nullptr;
            }
            sender.will_put(put, outbox_slot);
        }
#endif
        sender.send(destination, flag, num_bytes);
    }
    sender.finish();
}

// All warps of a sending block, by their roles.
template <bool kBegins>
__device__ __forceinline__ void reduce_and_send(const CombineSendParams& p, const BlockRecords& records,
                                                uint32_t epoch, SumBoard& board, uint8_t* shared) {
    uint8_t* stages = shared + kChunks * kChunkBytes;
    const int role = static_cast<int>(threadIdx.x / 32) - kWorkers;
    RecordReader reader(p, records, board);
    if (role == 0) reader.begin();
    const int num_records = records.count();
    if (role < 0) {
        sum_rows(p, num_records, board, stages, shared);
    } else if (role == 0) {
        load_rows(p, reader, num_records, board, shared);
    } else {
        send_sums<kBegins>(p, epoch, num_records, board, stages);
    }
}

__device__ __forceinline__ void init(SumBoard& board) {
    board.outbox.init();
    board.told.init(1);
    board.loaded.init(1);
    board.summed.init(kTeamWarps);
    fence_mbarrier_init();
}
