"""Time combine on each wire, beside NCCL, DeepEP where it is installed, and the peer-store ceiling.

Geometry: on GPUs 4096 tokens a rank of 7168, top-8 of 256 experts; on the CPU 64 of 256, top-4 of 16. BF16 in and out;
expert-major rows, weighted ("token_major" ones, if asked for, are sums already and go unweighted).

    mpirun -n 4 python -m qcomm bench combine
    mpirun -n 4 python -m qcomm bench combine --wire bf16,fp8 --json combine.jsonl
    mpirun -n 4 python -m qcomm bench combine --ranks-per-node 2 --nvlink-gbs 350 --rdma-gbs 45
    python -m qcomm bench combine --from combine.jsonl --plot combine.svg     (no GPU)

Bytes: a rank sends one sum back for each token that came, whatever number of experts it has there. Its record is
2 * hidden bytes on the bf16 wire, hidden + 4 * hidden / 128 on fp8 and hidden / 2 + hidden / 32 on mxfp4, padded to 16.
remote = records to other ranks * bytes of a record.

The NCCL baselines move sums that are ready: they add nothing up on either side. Every result is compared with an oracle
first (oracle.py); a difference ends the run with code 1. harness.py says how calls are timed, baselines.py what
NCCL does, deep_ep_baseline.py what DeepEP does.
"""

from __future__ import annotations

import sys

import baselines
import deep_ep_baseline
import harness
import oracle
import runner
import torch
import workload

from qcomm.buffer import Buffer
from qcomm.formats import RecvLayout, WireKind, WirePrecision
from qcomm.handle import DispatchHandle
from qcomm.records import RecordLayout

NAME = "combine"


def main() -> int:
    flags = workload.parse(NAME, __doc__ or "", ("expert_major",), dispatch=False, links=True)
    return runner.run(runner.Benchmark(NAME, _precision, baselines.combine, _measure, deep_ep_baseline.combine), flags)


def _precision(wire: WireKind) -> WirePrecision:
    return WirePrecision(combine_fwd=wire)


def _measure(context: runner.Context, buffer: Buffer, wire: WireKind, layout: RecvLayout) -> list[harness.Row]:
    """Check, then time one configuration. Collective."""
    work, traffic, weighted = context.work, context.traffic, layout != "token_major"
    received, handle = buffer.dispatch(work.x, work.topk_idx, work.topk_weights, recv_layout=layout)
    generator = torch.Generator(work.member.device).manual_seed(1000 * context.flags.seed + work.member.rank)
    shape = (*received.x.shape[:-1], work.geometry.hidden)
    y = torch.randn(shape, generator=generator, device=work.member.device, dtype=torch.bfloat16)
    _check(work, buffer, y, handle, wire, weighted)
    harness.release(work.member)
    timing = context.clock.time(lambda: buffer.combine(y, handle, weighted=weighted))
    buffer.check()
    record_bytes = RecordLayout(wire, work.geometry.hidden).num_bytes
    sent = harness.sent(work.member, handle, buffer.stats().combine_traffic)
    return [harness.Row(NAME, wire, layout, timing, record_bytes, traffic.remote_in, traffic.remote_out, sent=sent)]


def _check(
    work: workload.Workload,
    buffer: Buffer,
    y: torch.Tensor,
    handle: DispatchHandle,
    wire: WireKind,
    weighted: bool,
) -> None:
    """Compare a result with the oracle's. Collective.

    Raises:
        harness.MismatchError: some rank's differs.
    """
    layout = handle.recv_layout
    got = oracle.bits(buffer.combine(y, handle, weighted=weighted))
    want = oracle.bits(oracle.expected_combine(buffer, work, y, handle, wire, weighted))
    problems = oracle.differing(f"combine, wire {wire}, {layout}", {"sum": got}, {"sum": want})
    harness.require_equal(work.member, problems)


if __name__ == "__main__":
    sys.exit(main())
