// Threads of a block that work on something together.
#pragma once

#include "ptx.cuh"

struct WholeBlock {
    __device__ __forceinline__ int thread() const { return threadIdx.x; }
    __device__ __forceinline__ int size() const { return blockDim.x; }
    __device__ __forceinline__ void sync() const { __syncthreads(); }
    __device__ __forceinline__ bool all(bool mine) const { return __syncthreads_and(mine); }
};

// Warps [kFirst, kFirst + kCount); nobody else uses the barrier.
template <int kFirst, int kCount, int kBarrier>
struct Warps {
    __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x) - 32 * kFirst; }
    __device__ __forceinline__ int size() const { return 32 * kCount; }
    __device__ __forceinline__ void sync() const { barrier_sync<32 * kCount>(kBarrier); }
    __device__ __forceinline__ bool all(bool mine) const { return barrier_and<32 * kCount>(kBarrier, mine); }
};

// The threads of such a group in every block; they cannot meet.
template <typename Group>
struct EveryBlock {
    __device__ __forceinline__ int thread() const { return blockIdx.x * Group().size() + Group().thread(); }
    __device__ __forceinline__ int size() const { return gridDim.x * Group().size(); }
};

// The sum of this lane's number and those of the lanes before it. Call from a whole warp.
__device__ __forceinline__ int sum_of_lanes(int number) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int lower = __shfl_up_sync(kAllLanes, number, step);
        if (static_cast<int>(threadIdx.x % 32) >= step) number += lower;
    }
    return number;
}
