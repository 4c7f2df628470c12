// Sending a block's records: warps that work write them into stages in shared memory, and one warp that does
// nothing else sends them, so that nobody waits for a copy to complete but that one.
#pragma once

#include "team.cuh"

constexpr int kWorkers = kTeams * kTeamWarps;
static_assert(kSlotBytes == QCOMM_STAGE_BYTES && kSlotBytes >= kRecordBytes + kMetadataBytes,
              "qcomm/records.py computes the same");

// A ring of barriers in shared memory; use number n of the ring takes barrier n % kCount.
template <int kCount>
struct Signals {
    uint64_t barriers[kCount];

    // Call from one thread, then meet the others.
    __device__ __forceinline__ void init(uint32_t arrivals) {
        for (int i = 0; i < kCount; ++i)
            mbarrier_init(barriers + i, arrivals);
    }

    __device__ __forceinline__ uint64_t* of(uint32_t n) { return barriers + n % kCount; }

    // A warp says that what it has read or written is done.
    __device__ __forceinline__ void arrive(uint32_t n) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(of(n));
    }

    // Waits for use number n.
    __device__ __forceinline__ void wait(uint32_t n) { mbarrier_wait(of(n), n / kCount & 1); }

    // Waits for the use before n, which there is not in the first round.
    __device__ __forceinline__ void wait_before(uint32_t n) { mbarrier_wait(of(n), n / kCount & 1 ^ 1); }
};

// What the roles of a block share, in shared memory, besides the stages. Record number n of the block takes
// stage n % kStages and is made by team n % kTeams.
struct Outbox {
    // Records whose flags are to be raised: their copies take 5 to 10 us to complete under load. Flags are
    // raised a few at a time behind one fence.
    static constexpr uint32_t kInFlight = 16, kEvery = 4;

    Signals<kStages> written;  // by the team's warps
    Signals<kStages> read;     // by the sender: the stage may be written again
    uint32_t* flags[kInFlight][kMaxRanks];

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

// The warp that sends. A lane below kMaxRanks has one destination of each record.
class Sender {
  public:
    __device__ __forceinline__ Sender(Outbox& outbox, uint8_t* shared, uint32_t epoch)
        : outbox_(outbox), shared_(shared), epoch_(epoch) {}

    // Returns the stage of the next record once it is written.
    __device__ __forceinline__ uint8_t* next() {
        outbox_.written.wait(sent_);
        return stage_of(shared_, sent_);
    }

    // Sends it; null for no destination.
    __device__ __forceinline__ void send(uint8_t* destination, uint32_t* flag, uint32_t num_bytes) {
        if (destination != nullptr) bulk_store(destination, stage_of(shared_, sent_), num_bytes);
        bulk_commit();
        if (lane_ < kMaxRanks)
            outbox_.flags[sent_ % Outbox::kInFlight][lane_] = destination == nullptr ? nullptr : flag;
        bulk_wait_read<kUnread>();
        if (sent_ >= kUnread) outbox_.read.arrive(sent_ - kUnread);
        if (++sent_ % Outbox::kEvery == 0) raise<Outbox::kInFlight - Outbox::kEvery>();
    }

    // Waits for all copies and raises the flags that are left.
    __device__ __forceinline__ void finish() { raise<0>(); }

  private:
    // Records that may not have been read from their stages yet when the next is sent.
    static constexpr int kUnread = kStages / 2;

    // Waits for all but kLeft of the copies and raises the flags of those.
    template <int kLeft>
    __device__ __forceinline__ void raise() {
        if (static_cast<int32_t>(sent_ - kLeft - raised_) <= 0) return;
        bulk_wait<kLeft>();
        fence_sys();
        for (; static_cast<int32_t>(sent_ - kLeft - raised_) > 0; ++raised_) {
            if (lane_ >= kMaxRanks) continue;
            uint32_t* flag = outbox_.flags[raised_ % Outbox::kInFlight][lane_];
            if (flag != nullptr) store_relaxed_sys(flag, epoch_);
        }
    }

    Outbox& outbox_;
    uint8_t* shared_;
    uint32_t epoch_;
    uint32_t sent_ = 0;
    uint32_t raised_ = 0;
    const int lane_ = threadIdx.x % 32;
};
