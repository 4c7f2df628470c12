// Routing: where each token goes (route), and where each arriving record goes (place). No atomic decides an
// order.
#include "wait.cuh"

constexpr int kNumTopk = QCOMM_NUM_TOPK;

#if QCOMM_INDEX_BYTES == 8
using Index = int64_t;
#else
using Index = int32_t;
#endif

struct RouteParams {
    Comm comm;
    const Index* topk_idx;      // [num_tokens, kNumTopk]
    const float* topk_weights;  // [num_tokens, kNumTopk] or null
    int32_t* send_slot;         // out [num_tokens, num_ranks]
    int32_t num_tokens;
    int32_t chunk;  // tokens a block numbers, a multiple of 32
};

static_assert(sizeof(RouteParams) == QCOMM_SIZEOF_ROUTE, "qcomm/ops/route.py holds the same structure");

struct PlaceParams {
    Comm comm;
    int32_t* recv_offsets;           // out [num_ranks + 1]
    int32_t* record_src_token;       // out [records]
    int32_t* record_topk_idx;        // out [records, kNumTopk]
    float* record_topk_weights;      // out [records, kNumTopk]
    int32_t* record_rows;            // out [records, kNumTopk], or [records, 1] by token
    int32_t* row_record;             // out [rows]
    int32_t* row_src;                // out [rows, 2]
    float* row_weights;              // out [rows], or null by token
    int32_t* num_tokens_per_expert;  // out [num_local_experts]
    int32_t* group_offsets;          // out [num_local_experts + 1], or null by token
    uint64_t* overflows;             // out [2]
    int32_t* host;                   // out, pinned: see place_host in qcomm/ops/route.py; null in static mode
    int32_t host_sequence;
    int32_t capacity;         // rows there are
    int32_t rows_per_expert;  // of the "batched" layout; 0 takes the largest count, aligned
    int32_t alignment;
    int32_t layout;
    int32_t is_static;
};

static_assert(sizeof(PlaceParams) == QCOMM_SIZEOF_PLACE, "qcomm/ops/route.py holds the same structure");

enum RecvLayout {
    kExpertMajor = QCOMM_EXPERT_MAJOR,
    kTokenMajor = QCOMM_TOKEN_MAJOR,
    kBatched = QCOMM_BATCHED
};

// Loads a token's experts; a token that names one out of range, or one twice, goes nowhere and is reported as
// bad.
__device__ __forceinline__ bool load_experts(const RouteParams& p, int token, int (&experts)[kNumTopk]) {
    bool bad = false;
#pragma unroll
    for (int j = 0; j < kNumTopk; ++j) {
        const Index id = p.topk_idx[static_cast<int64_t>(token) * kNumTopk + j];
        bad |= id < -1 || id >= p.comm.num_experts;
        experts[j] = static_cast<int>(id);
#pragma unroll
        for (int i = 0; i < j; ++i)
            bad |= experts[i] == experts[j] && experts[j] >= 0;
    }
    if (bad) {
#pragma unroll
        for (int j = 0; j < kNumTopk; ++j)
            experts[j] = -1;
    }
    return bad;
}

__device__ __forceinline__ uint32_t ranks_of(const Comm& comm, const int (&experts)[kNumTopk]) {
    uint32_t ranks = 0;
#pragma unroll
    for (int j = 0; j < kNumTopk; ++j) {
        if (experts[j] >= 0) ranks |= 1u << (experts[j] / comm.num_local_experts);
    }
    return ranks;
}

// Numbers each token within its destination ranks and its experts, in token order, and writes every record's
// metadata and this rank's counts to the peers. Counts the call in state->epoch.
//
// Grid ceil(num_tokens / chunk), at least 1 and at most 128; any block of whole warps. Dynamic shared memory:
// (num_experts + num_ranks) * (1 + chunk / 32) words: how many earlier tokens go to each expert and rank,
// then for each a bitmap of the chunk's tokens. A block publishes its chunk's counts and adds up those of the
// chunks before it; blocks start in order, so it waits only for blocks that run. The last block to finish
// raises this rank's route flag in every peer.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS) route(const __grid_constant__ RouteParams p) {
    extern __shared__ uint32_t shared[];
    const Comm& comm = p.comm;
    const int num_keys = comm.num_experts + comm.num_ranks;
    const int words = p.chunk / 32;
    uint32_t* before = shared;
    uint32_t* bitmap = shared + num_keys;
    const int begin = blockIdx.x * p.chunk;
    const int end = min(begin + p.chunk, p.num_tokens);
    const uint32_t epoch = comm.state->epoch + 1;

    for (int i = threadIdx.x; i < num_keys * (1 + words); i += blockDim.x)
        shared[i] = 0;
    __syncthreads();
    for (int token = begin + threadIdx.x; token < end; token += blockDim.x) {
        int experts[kNumTopk];
        if (load_experts(p, token, experts)) atomicMin(&comm.state->bad_token, token);
        const int word = (token - begin) / 32;
        const uint32_t bit = 1u << ((token - begin) % 32);
#pragma unroll
        for (int j = 0; j < kNumTopk; ++j) {
            if (experts[j] >= 0) atomicOr(bitmap + experts[j] * words + word, bit);
        }
        for (uint32_t ranks = ranks_of(comm, experts); ranks != 0; ranks &= ranks - 1) {
            atomicOr(bitmap + (comm.num_experts + __ffs(ranks) - 1) * words + word, bit);
        }
    }
    __syncthreads();
    for (int key = threadIdx.x; key < num_keys; key += blockDim.x) {
        uint32_t count = 0;
        for (int w = 0; w < words; ++w)
            count += __popc(bitmap[key * words + w]);
        comm.chunk_counts[blockIdx.x * num_keys + key] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) store_release_gpu(comm.chunk_flags + blockIdx.x, epoch);
    for (int chunk = threadIdx.x; chunk < blockIdx.x; chunk += blockDim.x) {
        wait_flag(comm, comm.chunk_flags + chunk, epoch, comm.rank, kPhaseRoute);
    }
    __syncthreads();
    constexpr int kParts = 8;
    for (int i = threadIdx.x; i < num_keys * kParts; i += blockDim.x) {
        const int key = i % num_keys;
        uint32_t sum = 0;
#pragma unroll 16
        for (int chunk = i / num_keys; chunk < blockIdx.x; chunk += kParts) {
            sum += comm.chunk_counts[chunk * num_keys + key];
        }
        if (sum != 0) atomicAdd(before + key, sum);
    }
    __syncthreads();

    // How many tokens before `token` go to a key, and whether this one does.
    const auto number = [&](int key, int token, bool& member) {
        const int word = (token - begin) / 32, bit = (token - begin) % 32;
        const uint32_t* row = bitmap + key * words;
        uint32_t n = before[key];
        for (int w = 0; w < word; ++w)
            n += __popc(row[w]);
        member = row[word] >> bit & 1;
        return static_cast<int>(n + __popc(row[word] & ((1u << bit) - 1)));
    };

    const int lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    for (int i = threadIdx.x / 32; i < (end - begin) * comm.num_ranks; i += num_warps) {
        const int token = begin + i / comm.num_ranks, rank = i % comm.num_ranks;
        bool goes;
        const int slot = number(comm.num_experts + rank, token, goes);
        if (lane == 0) p.send_slot[static_cast<int64_t>(token) * comm.num_ranks + rank] = goes ? slot : -1;
        if (!goes) continue;
        int32_t* record = metadata_of(comm, rank, epoch, comm.rank, slot);
        for (int w = lane; w < comm.metadata_words; w += 32) {
            int32_t value = w == 0 ? token : 0;
            if (w > 0 && w <= 3 * kNumTopk) {
                const int field = (w - 1) / kNumTopk, j = (w - 1) % kNumTopk;
                const int64_t entry = static_cast<int64_t>(token) * kNumTopk + j;
                const int expert = static_cast<int>(p.topk_idx[entry]);
                const bool local = expert >= 0 && expert / comm.num_local_experts == rank;
                if (field == 0) {
                    value = local ? expert - rank * comm.num_local_experts : -1;
                } else if (field == 1) {
                    bool member;
                    value = local ? number(expert, token, member) : 0;
                } else {
                    const float weight = p.topk_weights == nullptr ? 1.0f : p.topk_weights[entry];
                    value = local ? __float_as_int(weight) : 0;
                }
            }
            record[w] = value;
        }
    }
    if (blockIdx.x == gridDim.x - 1) {
        const auto total = [&](int key) {
            uint32_t n = before[key];
            for (int w = 0; w < words; ++w)
                n += __popc(bitmap[key * words + w]);
            return static_cast<int32_t>(n);
        };
        for (int key = threadIdx.x; key < num_keys; key += blockDim.x) {
            if (key < comm.num_experts) {
                const int rank = key / comm.num_local_experts;
                counts_of(comm, rank, epoch, comm.rank)[2 + key % comm.num_local_experts] = total(key);
            } else {
                counts_of(comm, key - comm.num_experts, epoch, comm.rank)[1] = total(key);
            }
        }
    }

    __syncthreads();
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
        __threadfence_system();
        is_last = atomicAdd(&comm.state->route_blocks_done, 1u) == gridDim.x - 1;
        __threadfence_system();
    }
    __syncthreads();
    if (!is_last) return;
    if (threadIdx.x < comm.num_ranks) {
        const int bad = *reinterpret_cast<volatile int32_t*>(&comm.state->bad_token);
        counts_of(comm, threadIdx.x, epoch, comm.rank)[0] = bad < p.num_tokens ? bad + 1 : 0;
        store_release_sys(region<uint32_t>(comm, threadIdx.x, comm.route_flags) + comm.rank, epoch);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        comm.state->route_blocks_done = 0;
        comm.state->bad_token = 0x7fffffff;
        comm.state->epoch = epoch;
    }
}

// Waits for every rank's counts and metadata, then gives each record its rows: by expert, then source rank,
// then source token. Zeroes the overflow counters of the receive that follows.
//
// Any grid, 256 threads. Dynamic shared memory: (num_ranks + 2) * num_local_experts + num_ranks + 2 words.
// Rows that hold no record get row_record and row_src -1 and weight 0. A static receive short of rows drops
// the records that do not fit and leaves a notice.
extern "C" __global__ void __launch_bounds__(256) place(const __grid_constant__ PlaceParams p) {
    extern __shared__ int32_t table[];
    const Comm& comm = p.comm;
    const int num_ranks = comm.num_ranks, num_local = comm.num_local_experts;
    int32_t* before = table;                          // [num_ranks][num_local]: rows of earlier ranks
    int32_t* start = before + num_ranks * num_local;  // [num_local + 1]
    int32_t* total = start + num_local + 1;           // [num_local]
    int32_t* offsets = total + num_local;             // [num_ranks + 1]
    const uint32_t epoch = comm.state->epoch;
    __shared__ int ready;
    if (threadIdx.x == 0) ready = 1;
    __syncthreads();
    if (threadIdx.x < num_ranks) {
        const uint32_t* flag = region<uint32_t>(comm, comm.rank, comm.route_flags) + threadIdx.x;
        if (!wait_flag(comm, flag, epoch, threadIdx.x, kPhaseRoute)) ready = 0;
    }
    __syncthreads();

    if (ready) {
        for (int expert = threadIdx.x; expert < num_local; expert += blockDim.x) {
            int sum = 0;
            for (int source = 0; source < num_ranks; ++source) {
                before[source * num_local + expert] = sum;
                sum += counts_of(comm, comm.rank, epoch, source)[2 + expert];
            }
            total[expert] = sum;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            offsets[0] = 0;
            for (int source = 0; source < num_ranks; ++source) {
                offsets[source + 1] = offsets[source] + counts_of(comm, comm.rank, epoch, source)[1];
            }
        }
        if (threadIdx.x >= 32 && threadIdx.x < 64) {
            const int lane = threadIdx.x - 32;
            int most = 0;
            for (int expert = lane; expert < num_local; expert += 32)
                most = max(most, total[expert]);
            most = __reduce_max_sync(0xffffffffu, most);
            const auto padded = [&](int count) {
                return (count + p.alignment - 1) / p.alignment * p.alignment;
            };
            const int each = p.rows_per_expert > 0 ? p.rows_per_expert : padded(most);
            int end = 0;
            if (lane == 0) start[0] = 0;
            for (int base = 0; base < num_local; base += 32) {
                const int expert = base + lane;
                int sum = expert >= num_local ? 0 : p.layout == kBatched ? each : padded(total[expert]);
                for (int step = 1; step < 32; step *= 2) {
                    const int lower = __shfl_up_sync(0xffffffffu, sum, step);
                    if (lane >= step) sum += lower;
                }
                if (expert < num_local) start[expert + 1] = end + sum;
                end += __shfl_sync(0xffffffffu, sum, 31);
            }
        }
        __syncthreads();
        const int num_records = offsets[num_ranks];
        const int thread = blockIdx.x * blockDim.x + threadIdx.x, num_threads = gridDim.x * blockDim.x;

        for (int entry = thread; entry < num_records * kNumTopk; entry += num_threads) {
            const int record = entry / kNumTopk, j = entry % kNumTopk;
            int source = 0;
            while (record >= offsets[source + 1])
                ++source;
            const int32_t* words = metadata_of(comm, comm.rank, epoch, source, record - offsets[source]);
            const int token = words[0], expert = words[1 + j], ordinal = words[1 + kNumTopk + j];
            const float weight = __int_as_float(words[1 + 2 * kNumTopk + j]);
            p.record_topk_idx[entry] = expert;
            p.record_topk_weights[entry] = weight;
            int row = -1;
            if (p.layout == kTokenMajor) {
                if (j == 0 && record < p.capacity) row = record;
                if (j == 0) p.record_rows[record] = row;
            } else {
                if (expert >= 0) {
                    row = start[expert] + before[source * num_local + expert] + ordinal;
                    if (row >= (p.layout == kBatched ? start[expert + 1] : p.capacity)) row = -1;
                }
                p.record_rows[entry] = row;
                if (row >= 0) p.row_weights[row] = weight;
            }
            if (j == 0) p.record_src_token[record] = token;
            if (row >= 0) {
                p.row_record[row] = record;
                reinterpret_cast<int2*>(p.row_src)[row] = make_int2(source, token);
            }
        }

        const auto clear = [&](int row) {
            p.row_record[row] = -1;
            reinterpret_cast<int2*>(p.row_src)[row] = make_int2(-1, -1);
            if (p.row_weights != nullptr) p.row_weights[row] = 0.0f;
        };
        if (p.layout != kTokenMajor) {
            for (int expert = blockIdx.x; expert < num_local; expert += gridDim.x) {
                const int end = min(start[expert + 1], p.capacity);
                for (int row = start[expert] + total[expert] + threadIdx.x; row < end; row += blockDim.x) {
                    clear(row);
                }
            }
        }
        if (p.is_static) {
            const int end = p.layout == kTokenMajor ? num_records : start[num_local];
            for (int row = end + thread; row < p.capacity; row += num_threads)
                clear(row);
        }

        if (blockIdx.x == 0) {
            int needed = p.layout == kTokenMajor ? num_records : start[num_local];
            int available = p.capacity;
            if (p.layout == kBatched) {
                needed = 0;
                available = p.rows_per_expert;
                for (int expert = 0; expert < num_local; ++expert)
                    needed = max(needed, total[expert]);
            }
            int bad_rank = -1;
            for (int source = num_ranks - 1; source >= 0; --source) {
                if (counts_of(comm, comm.rank, epoch, source)[0] != 0) bad_rank = source;
            }
            if (counts_of(comm, comm.rank, epoch, comm.rank)[0] != 0) bad_rank = comm.rank;
            const int bad_token = bad_rank < 0 ? -1 : counts_of(comm, comm.rank, epoch, bad_rank)[0] - 1;
            for (int source = threadIdx.x; source <= num_ranks; source += blockDim.x) {
                p.recv_offsets[source] = offsets[source];
                if (p.host != nullptr) p.host[QCOMM_HOST_FIXED + source] = offsets[source];
            }
            for (int expert = threadIdx.x; expert < num_local; expert += blockDim.x) {
                const int limit = p.layout == kBatched ? start[expert + 1] : p.capacity;
                const int fit = p.layout == kTokenMajor ? total[expert]
                                                        : max(0, min(total[expert], limit - start[expert]));
                p.num_tokens_per_expert[expert] = fit;
                if (p.host != nullptr) p.host[QCOMM_HOST_FIXED + num_ranks + 1 + expert] = total[expert];
            }
            if (p.group_offsets != nullptr) {
                for (int expert = threadIdx.x; expert <= num_local; expert += blockDim.x) {
                    p.group_offsets[expert] = min(start[expert], p.capacity);
                }
            }
            if (threadIdx.x == 0 && p.is_static) {
                if (needed > available) {
                    write_report(&comm.reports->notice, kOverflow, comm, -1, kPhaseRoute, needed, available);
                } else if (bad_rank == comm.rank) {
                    write_report(&comm.reports->notice, kBadRoute, comm, bad_rank, kPhaseRoute, 0, bad_token);
                }
            }
            if (threadIdx.x == 0 && p.host != nullptr) {
                p.host[QCOMM_HOST_BAD_RANK] = bad_rank;
                p.host[QCOMM_HOST_BAD_TOKEN] = bad_token;
                p.host[QCOMM_HOST_ROWS] = p.layout == kTokenMajor ? num_records : start[num_local];
                p.host[QCOMM_HOST_ROWS_PER_EXPERT] = p.layout == kBatched ? start[1] : 0;
            }
        }
    }

    __syncthreads();
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        p.overflows[0] = 0;
        p.overflows[1] = 0;
        if (p.host != nullptr) {
            p.host[QCOMM_HOST_READY] = ready;
            __threadfence_system();
            store_release_sys(reinterpret_cast<uint32_t*>(p.host), p.host_sequence);
        }
    }
}
