// Sending a team's records.
#pragma once

#include "team.cuh"

// A stage also holds the addresses of its flags. They are raised once the copies are complete: a few records
// at a time where there are stages for it, because that takes a fence; where there is one stage, when the
// next record is sent, so that it can be loaded meanwhile.
class Sender {
  public:
    static constexpr int kStageBytes = kRecordBytes + 8 * kMaxRanks;
    static_assert(kStageBytes == QCOMM_STAGE_BYTES, "qcomm/ops/comm.py computes the same");

    __device__ __forceinline__ Sender(const Team& team, uint8_t* shared, uint32_t epoch)
        : ring_(team, shared), epoch_(epoch) {}

    __device__ __forceinline__ uint8_t* stage() const { return ring_.stage(); }

    // Call before a record is written to the stage.
    __device__ __forceinline__ void begin(const Team& team) const {
        if constexpr (kStages == 1) {
            if (team.is_first_warp()) bulk_wait_read<0>();
            team.sync();
        }
    }

    // Sends the stage to the destinations of the first warp's first kMaxRanks lanes, null for none.
    __device__ __forceinline__ void send(const Team& team, uint8_t* destination, uint32_t* flag) {
        ring_.written(team);
        if (team.is_first_warp()) {
            if constexpr (kStages == 1) raise<0>(team);
            if (destination != nullptr) bulk_store(destination, stage(), kRecordBytes);
            bulk_commit();
            if (team.thread < kMaxRanks) flag_of(sent_) = destination == nullptr ? nullptr : flag;
            ++sent_;
            if (kStages > 1 && sent_ % kEvery == 0) raise<kPending<kEvery>>(team);
        }
        if constexpr (kStages > 1) ring_.next(team);
    }

    // Waits for all copies and raises the flags that are left.
    __device__ __forceinline__ void finish(const Team& team) {
        if (team.is_first_warp()) raise<0>(team);
    }

  private:
    static constexpr int kEvery = kStages >= 6 ? 4 : 1;

    __device__ __forceinline__ uint32_t*& flag_of(uint32_t number) const {
        return reinterpret_cast<uint32_t**>(ring_.stage(number) + kRecordBytes)[threadIdx.x % 32];
    }

    // Waits for all but kLeft of the copies and raises the flags of those.
    template <int kLeft>
    __device__ __forceinline__ void raise(const Team& team) {
        bulk_wait<kLeft>();
        fence_sys();
        if (team.thread >= kMaxRanks) return;
        for (; static_cast<int32_t>(sent_ - kLeft - raised_) > 0; ++raised_) {
            uint32_t* flag = flag_of(raised_);
            if (flag != nullptr) store_relaxed_sys(flag, epoch_);
        }
    }

    Ring<kStageBytes> ring_;
    uint32_t epoch_;
    uint32_t sent_ = 0;
    uint32_t raised_ = 0;
};
