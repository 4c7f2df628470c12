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

// A warp says at a barrier, given by pointer or by address, that what it has read or written is done.
template <typename Barrier>
__device__ __forceinline__ void arrive_warp(Barrier barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

// Signals whose address a loop keeps: see kept_shared_address.
template <int kCount>
struct KeptSignals {
    uint32_t address;

    __device__ __forceinline__ void arrive(const Cursor<kCount>& at) const { arrive_warp(barrier(at)); }
    __device__ __forceinline__ void wait(const Cursor<kCount>& at) const {
        mbarrier_wait(barrier(at), at.parity);
    }
    __device__ __forceinline__ uint32_t barrier(const Cursor<kCount>& at) const {
        return address + sizeof(uint64_t) * at.index;
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
    __device__ __forceinline__ KeptSignals<kCount> kept() const { return {kept_shared_address(barriers)}; }

    // A warp says that what it has read or written is done.
    __device__ __forceinline__ void arrive(uint32_t n) {
        const Cursor<kCount> at(n);
        arrive_warp(barriers + at.index);
    }

    // Waits for use number n.
    __device__ __forceinline__ void wait(uint32_t n) {
        const Cursor<kCount> at(n);
        mbarrier_wait(barriers + at.index, at.parity);
    }

    // Waits for the use before n, which there is not in the first round.
    __device__ __forceinline__ void wait_before(uint32_t n) { mbarrier_wait(of(n), n / kCount & 1 ^ 1); }
};
