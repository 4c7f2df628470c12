// How the warps of a block tell each other that something in shared memory is there, or may be overwritten.
#pragma once

#include "ptx.cuh"

// A use of a ring, counted on without divisions.
template <int kCount>
struct Cursor {
    uint32_t index;   // of the barrier
    uint32_t parity;  // of its phase

    __device__ __forceinline__ explicit Cursor(uint32_t n) : index(n % kCount), parity(n / kCount & 1) {}

    __device__ __forceinline__ void next() {
        if (++index == kCount) {
            index = 0;
            parity ^= 1;
        }
    }
};

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
    __device__ __forceinline__ void arrive(uint32_t n) { arrive(Cursor<kCount>(n)); }
    __device__ __forceinline__ void arrive(const Cursor<kCount>& at) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(barriers + at.index);
    }

    // Waits for use number n.
    __device__ __forceinline__ void wait(uint32_t n) { wait(Cursor<kCount>(n)); }
    __device__ __forceinline__ void wait(const Cursor<kCount>& at) {
        mbarrier_wait(barriers + at.index, at.parity);
    }

    // Waits for the use before n, which there is not in the first round.
    __device__ __forceinline__ void wait_before(uint32_t n) { mbarrier_wait(of(n), n / kCount & 1 ^ 1); }
};
