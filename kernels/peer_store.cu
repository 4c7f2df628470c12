// The ceiling of the benchmarks: how fast this GPU's SMs store to its peers, with nothing else to do.
//
// Any grid and block. Reads each vector of `source` once and stores it to every peer; a block begins with
// another peer than its neighbour, so that all links are busy at any time. Orders nothing: the end of the
// kernel makes the stores visible.
#include "layout.cuh"

struct PeerStoreParams {
    const uint4* source;     // [num_vecs] 16-byte vectors of this GPU
    uint4* peer[kMaxRanks];  // [num_vecs] of each of num_peers other GPUs, written by no other rank
    int64_t num_vecs;
    int32_t num_peers;
};

static_assert(sizeof(PeerStoreParams) == QCOMM_SIZEOF_PEER_STORE, "qcomm/ops/peer_store.py holds the same");

extern "C" __global__ void peer_store(const __grid_constant__ PeerStoreParams p) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t i = first; i < p.num_vecs; i += stride) {
        const uint4 v = load_stream(p.source + i);
        for (int turn = 0; turn < p.num_peers; ++turn) {
            p.peer[(blockIdx.x + turn) % p.num_peers][i] = v;
        }
    }
}
