// Accesses of 32 bytes a lane, two neighbouring lanes' pieces changing places so that each instruction of a
// warp covers whole sectors.
#pragma once

#include "ptx.cuh"

// Exchanges the halves of two neighbouring lanes' 32 bytes: what two lanes hold as (0, 1) and (2, 3) becomes
// (0, 2) and (1, 3), and back. Each 16-byte access of the warp then covers whole sectors of 32 bytes.
__device__ __forceinline__ void exchange_halves(uint32_t (&words)[8]) {
    const bool odd = threadIdx.x & 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t taken = __shfl_xor_sync(kAllLanes, odd ? words[i] : words[4 + i], 1);
        words[i] = odd ? taken : words[i];
        words[4 + i] = odd ? words[4 + i] : taken;
    }
}

// Where in their 64 bytes two neighbouring lanes read or write, in units of 16 bytes, for vector `vec`: the
// first half here and the second two further on.
__device__ __forceinline__ int64_t pair_offset(int vec) {
    return 2 * static_cast<int64_t>(vec & ~1) + (vec & 1);
}
