// A team is the warps of a block that work on one record at a time, each on its own part.
#pragma once

#include "record.cuh"

constexpr int kTeams = QCOMM_TEAMS;  // of a block
constexpr int kTeamWarps = QCOMM_TEAM_WARPS;
constexpr int kTeamThreads = 32 * kTeamWarps;
constexpr int kVecsPerThread = (kNumVecs + kTeamThreads - 1) / kTeamThreads;
constexpr int kStages = QCOMM_STAGES;  // a team's, in shared memory
// Copies that may be under way when the first warp has waited, which it does for every record.
constexpr int kPending = kStages > 2 ? kStages - 2 : 0;

struct Team {
    int number;  // in its block
    int index;   // in the grid; neighbours are on different SMs
    int count;   // in the grid
    int thread;  // in the team

    __device__ __forceinline__ Team() {
        number = threadIdx.x / kTeamThreads;
        index = blockIdx.x + gridDim.x * number;
        count = gridDim.x * kTeams;
        thread = threadIdx.x % kTeamThreads;
    }

    __device__ __forceinline__ bool is_first_warp() const { return thread < 32; }

    // This thread's vector i.
    __device__ __forceinline__ int vec(int i) const { return i * kTeamThreads + thread; }

    __device__ __forceinline__ void sync() const {
        if constexpr (kTeamWarps == 1) {
            __syncwarp();
        } else {
            barrier_sync<kTeamThreads>(1 + number);
        }
    }
};

// A team's ring of stages. All of the team write a stage; then its first warp copies it out, while the others
// write the next. A stage comes round again when its copies are done: before the first warp meets the others
// it has waited for all but the last kPending.
template <int kBytes>
class Ring {
  public:
    __device__ __forceinline__ Ring(const Team& team, uint8_t* shared)
        : first_(shared + team.number * kStages * kBytes), stage_(first_) {}

    __device__ __forceinline__ uint8_t* stage() const { return stage_; }

    // Makes the stage, which all have written, ready to be copied.
    __device__ __forceinline__ void written(const Team& team) const {
        fence_proxy_async_shared();
        team.sync();
    }

    // Goes on to the next stage, after the first warp has waited for its copies.
    __device__ __forceinline__ void next(const Team& team) {
        if constexpr (kStages == 1) {
            team.sync();
        } else {
            stage_ = stage_ == first_ + (kStages - 1) * kBytes ? first_ : stage_ + kBytes;
        }
    }

  private:
    uint8_t* first_;
    uint8_t* stage_;
};
