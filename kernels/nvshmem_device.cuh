// NVSHMEM's device functions. NVRTC compiles them from their headers, which have no GPU-driven RDMA then;
// nvcc links the device library, which has (see qcomm/nvshmem_build.py).
#pragma once

#if QCOMM_NVSHMEM_LINKED
#include <nvshmem.h>
#include <nvshmemx.h>
#else
// The headers' switch for compiling every function where it is used.
#define __NVSHMEM_NUMBA_SUPPORT__
#include <cuda/std/type_traits>
namespace std {
using cuda::std::enable_if;
using cuda::std::is_integral;
using cuda::std::is_same;
using cuda::std::is_signed;
using cuda::std::is_unsigned;
}  // namespace std
#include "non_abi/nvshmem_build_options.h"
#undef NVSHMEM_IBGDA_SUPPORT
// What nvshmem.h includes for the device, less the collectives, which take half of its time.
#include "device/nvshmem_defines.h"
#include "device/nvshmemx_defines.h"
#endif
