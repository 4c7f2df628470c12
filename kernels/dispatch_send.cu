// The send side of dispatch: quantizes each token once and copies its record to every destination rank.
#include "dispatch_send.cuh"

// Any grid; kWorkers warps and kSenders that send. Dynamic shared memory: kStages stages, 128-byte aligned.
// Reads x once, the next token while one is encoded, and writes each record once per destination rank, itself
// included: slot send_slot[token][rank] of this rank's region there, the record's metadata behind it unless
// this is a replay; then, with release order, that slot's flag. It may begin before route or barrier has
// ended, which it waits for before it sends: then every rank has begun the call. Once a call: by then its
// tokens are taken. What follows may begin when all blocks are past route or barrier.
extern "C" __global__ void __maxnreg__(QCOMM_MAX_REGISTERS)
    dispatch_send(const __grid_constant__ DispatchSendParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ Outbox outbox;
    __shared__ Claims claims;
    if (threadIdx.x == 0) {
        outbox.init();
        claims.init();
    }
    if (__syncthreads_or(timed_out(p.comm))) return wait_for_previous();
    if (threadIdx.x >= 32 * kWorkers) {
        const Begun call = begun_before(p.comm);
        send_records(p, call.epoch, call.everywhere, outbox, claims, shared);
    } else {
        Encoder encoder(p);
        encoder.begin();
        encoder.encode(outbox, claims, shared);
    }
}
