// A team is the warps of a block that work on one record at a time, each on its own part.
#pragma once

#include "record.cuh"

constexpr int kTeams = QCOMM_TEAMS;  // of a block
constexpr int kTeamWarps = QCOMM_TEAM_WARPS;
constexpr int kTeamThreads = 32 * kTeamWarps;
constexpr int kVecsPerThread = (kNumVecs + kTeamThreads - 1) / kTeamThreads;

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

    // This thread's vector i.
    __device__ __forceinline__ int vec(int i) const { return i * kTeamThreads + thread; }
};
