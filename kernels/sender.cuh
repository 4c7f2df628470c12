// Sending a block's records: warps that work write them into stages in shared memory, and warps that do
// nothing else send them, so that nobody else waits for a copy to complete.
#pragma once

#include "nodes.cuh"
#include "signals.cuh"
#include "team.cuh"

constexpr int kWorkers = kTeams * kTeamWarps;
constexpr int kSenders = QCOMM_SENDERS;
static_assert(kSlotBytes >= kRecordBytes + kMetadataBytes, "qcomm/records.py computes the same");
// So that a stage has one sender, which has sent the record before when it waits for the next.
static_assert(kStages % kSenders == 0, "qcomm/ops/comm.py sees to it");

// Behind a record that another node's rank forwards are its metadata, and its slots at every rank, -1 for
// none: PutLayout in qcomm/records.py.
constexpr int kSlotsOffset = kRecordBytes + kMetadataBytes;
constexpr int kForwardedBytes = kSlotsOffset + (4 * kNodes * kRanksPerNode + 15) / 16 * 16;
constexpr int kInboxSlotBytes = (kForwardedBytes + 127) / 128 * 128;

// Where a sender's puts go: from the outbox to the same part of another rank's symmetric memory as that of
// this rank here. Of one record to the next it is slot_bytes.
struct PutParts {
    const uint8_t* outbox;
    uint8_t* records;
    uint32_t* flags;
    uint32_t slot_bytes;
    uint32_t num_bytes;
};

// The place that a record is put to, by number; rank -1 for none.
struct Put {
    int32_t rank;
    int32_t index;
};

// The puts of a sender's records whose copies to the outbox are under way, in shared memory.
struct PutBoard {
#if QCOMM_NVSHMEM
    Put puts[kSenders][QCOMM_IN_FLIGHT][kMaxRanks];
    int32_t outbox_slots[kSenders][QCOMM_IN_FLIGHT];
#endif
};

// What the roles of a block share, in shared memory, besides the stages. Record number n of the block takes
// stage n % kStages and is made by team n % kTeams.
struct Outbox : PutBoard {
    // Records of a sending warp whose copies are under way. Few are enough for the links, and the more there
    // are, the later the receiver hears of each. Flags are raised by so many behind one fence.
    static constexpr uint32_t kInFlight = QCOMM_IN_FLIGHT, kEvery = QCOMM_FLAGS_TOGETHER;
    static_assert(kInFlight % kEvery == 0, "qcomm/tuning.py checks the same");

    Signals<kStages> written;  // by the team's warps
    Signals<kStages> read;     // by the sender: the stage may be written again
    uint32_t* flags[kSenders][kInFlight][kMaxRanks];

    __device__ __forceinline__ void init() {
        written.init(kTeamWarps);
        read.init(1);
    }

    // Shows what this warp has written of a record to the sender.
    __device__ __forceinline__ void hand_over(uint32_t n) {
        fence_proxy_async_shared();
        written.arrive(n);
    }
};

__device__ __forceinline__ uint8_t* stage_of(uint8_t* shared, uint32_t n) {
    return shared + n % kStages * kSlotBytes;
}

// A warp that sends every kSenders-th record; these are the last warps of a block. A lane below kMaxRanks has
// one destination of each record.
class Sender {
  public:
    __device__ __forceinline__ Sender(Outbox& outbox, uint8_t* shared, uint32_t epoch,
                                      const PutParts& parts = {})
        : outbox_(outbox), shared_(shared), epoch_(epoch), parts_(parts) {}

    // 0 to kSenders - 1.
    __device__ __forceinline__ int number() const { return number_; }

    // Returns the stage of the next record once it is written.
    __device__ __forceinline__ uint8_t* next() {
        outbox_.written.wait(record());
        return stage_of(shared_, record());
    }

#if QCOMM_NVSHMEM
    // Notes where the record is put to once its copy is in a slot of the outbox, to which the next send
    // copies it.
    __device__ __forceinline__ void will_put(const Put& put, int outbox_slot) {
        const uint32_t entry = sent_ % Outbox::kInFlight;
        if (lane_ < kMaxRanks) outbox_.puts[number_][entry][lane_] = put;
        if (lane_ == 0) outbox_.outbox_slots[number_][entry] = outbox_slot;
    }
#endif

    // Sends it; null for no destination.
    __device__ __forceinline__ void send(uint8_t* destination, uint32_t* flag, uint32_t num_bytes) {
        if (destination != nullptr) bulk_store(destination, stage_of(shared_, record()), num_bytes);
        bulk_commit();
        if (lane_ < kMaxRanks) flag_of(sent_) = destination == nullptr ? nullptr : flag;
        bulk_wait_read<kUnread>();
        if (sent_ >= kUnread) outbox_.read.arrive(record() - kUnread * kSenders);
        if (++sent_ % Outbox::kEvery == 0) raise<Outbox::kInFlight - Outbox::kEvery>();
    }

    // Waits for all copies and raises the flags that are left.
    __device__ __forceinline__ void finish() { raise<0>(); }

  private:
    // Records that may not have been read from their stages yet when the next is sent: the more, the fewer
    // stages there are to write ahead.
    static constexpr int kUnread = kStages > 2 * kSenders ? 1 : 0;

    __device__ __forceinline__ uint32_t record() const { return sent_ * kSenders + number_; }

    __device__ __forceinline__ uint32_t*& flag_of(uint32_t sent) {
        return outbox_.flags[number_][sent % Outbox::kInFlight][lane_];
    }

    // Waits for all but kLeft of the copies and raises the flags of those.
    template <int kLeft>
    __device__ __forceinline__ void raise() {
        if (static_cast<int32_t>(sent_ - kLeft - raised_) <= 0) return;
        bulk_wait<kLeft>();
        fence_sys();
#if QCOMM_NVSHMEM
        const uint32_t first = raised_;
#endif
        for (; static_cast<int32_t>(sent_ - kLeft - raised_) > 0; ++raised_) {
            if (lane_ >= kMaxRanks) continue;
            uint32_t* flag = flag_of(raised_);
            if (flag != nullptr) store_relaxed_sys(flag, epoch_);
        }
#if QCOMM_NVSHMEM
        if (parts_.outbox == nullptr) return;
        __syncwarp();  // all lanes read what one has copied to the outbox
        for (uint32_t sent = first; sent != raised_; ++sent)
            put_record(sent);
#endif
    }

#if QCOMM_NVSHMEM
    // A lane's put of each record is all lanes' work, one after the other.
    __device__ __forceinline__ void put_record(uint32_t sent) {
        const uint32_t entry = sent % Outbox::kInFlight;
        const Put mine = lane_ < kMaxRanks ? outbox_.puts[number_][entry][lane_] : Put{-1, 0};
        const int64_t slot = outbox_.outbox_slots[number_][entry];
        for (uint32_t left = __ballot_sync(kAllLanes, mine.rank >= 0); left != 0; left &= left - 1) {
            const int k = __ffs(left) - 1;
            const int64_t index = __shfl_sync(kAllLanes, mine.index, k);
            put(parts_.records + index * parts_.slot_bytes, parts_.outbox + slot * parts_.slot_bytes,
                parts_.num_bytes, parts_.flags + index * kFlagWords, epoch_,
                __shfl_sync(kAllLanes, mine.rank, k));
        }
    }
#endif

    Outbox& outbox_;
    uint8_t* shared_;
    uint32_t epoch_;
    uint32_t sent_ = 0;
    uint32_t raised_ = 0;
    const PutParts parts_;
    const int lane_ = threadIdx.x % 32;
    const int number_ = kSenders - (blockDim.x - threadIdx.x + 31) / 32;
};
