"""Time dispatch and combine at decode sizes: static, in a CUDA graph, "batched" for masked grouped GEMMs.

Geometry: on GPUs 1, 8, 32 and 128 tokens a rank of 7168, top-8 of 256 experts, BF16 in; on the CPU 64 of 256, top-4 of
16, without a graph. A rank has rows for every token of every rank for each of its experts.

    mpirun -n 4 python -m qcomm bench decode
    mpirun -n 4 python -m qcomm bench decode --tokens 64 --wire mxfp4 --json decode.jsonl
    python -m qcomm bench decode --from decode.jsonl --plot decode.svg     (no GPU)

Calls: `dispatch` routes, sends and receives FP8 (BF16 on the bf16 wire); `combine` sums rows of BF16, weighted, and
sends the sums on the same wire. Each is one replay of a graph.

Every result is compared with an oracle first (oracle.py), after a replay; a difference ends the run with code 1.
harness.py says how calls are timed, baselines.py what NCCL does.
"""

from __future__ import annotations

import sys

import baselines
import harness
import oracle
import runner
import torch
import workload

from qcomm.buffer import Buffer
from qcomm.formats import RecvLayout, WireKind, WirePrecision
from qcomm.handle import DispatchHandle
from qcomm.records import MetadataLayout, RecordLayout

NAME = "decode"
_TOKENS = (1, 8, 32, 128)


def main() -> int:
    flags = workload.parse(NAME, __doc__ or "", ("batched",), dispatch=True)
    return runner.run(runner.Benchmark(NAME, _precision, baselines.dispatch, _measure, tokens=_TOKENS), flags)


def _precision(wire: WireKind) -> WirePrecision:
    return WirePrecision(dispatch_fwd=wire, combine_fwd=wire)


def _measure(context: runner.Context, buffer: Buffer, wire: WireKind, layout: RecvLayout) -> list[harness.Row]:
    """Check, then time both calls of one configuration. Collective."""
    work, traffic, clock = context.work, context.traffic, context.clock
    recv_dtype = context.flags.recv_dtype or ("bf16" if wire == "bf16" else "fp8")
    dispatch, (received, handle) = clock.captured(
        lambda: buffer.dispatch(
            work.x, work.topk_idx, work.topk_weights, recv_layout=layout, recv_dtype=recv_dtype, static=True
        )
    )
    want = oracle.expected_dispatch(buffer.backend, work, wire, layout, recv_dtype, columnwise=False)
    what = f"wire {wire}, {layout}, {recv_dtype}, {work.geometry.tokens} tokens"
    problems = oracle.differing(f"dispatch, {what}", oracle.fields(received, handle), want)

    generator = torch.Generator(work.member.device).manual_seed(1000 * context.flags.seed + work.member.rank)
    shape = (*received.x.shape[:-1], work.geometry.hidden)
    y = torch.randn(shape, generator=generator, device=work.member.device, dtype=torch.bfloat16)
    combine, out = clock.captured(lambda: buffer.combine(y, handle))
    problems += oracle.differing(
        f"combine, {what}", {"sum": oracle.bits(out)}, {"sum": oracle.bits(_expected_combine(context, wire, y, handle))}
    )
    harness.require_equal(work.member, problems)

    record_bytes = RecordLayout(wire, work.geometry.hidden).num_bytes
    metadata_bytes = 4 * MetadataLayout(work.geometry.topk).num_words
    rows = []
    for name, call, remote, metadata in (
        ("dispatch", dispatch, traffic.remote_out, metadata_bytes),
        ("combine", combine, traffic.remote_in, 0),
    ):
        timing = clock.time(call)
        buffer.check()
        other = traffic.remote_in + traffic.remote_out - remote
        rows.append(harness.Row(name, wire, layout, timing, record_bytes, remote, other, metadata, recv_dtype))
    return rows


def _expected_combine(context: runner.Context, wire: WireKind, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
    """Compute what combine along a handle's route must give. Collective."""
    work, layout = context.work if handle.relayed else oracle.straight(context.work), handle.recv_layout
    with work.buffer(_precision(wire), "collective") as buffer:
        _, handle = buffer.dispatch(work.x, work.topk_idx, work.topk_weights, recv_layout=layout, static=True)
        return buffer.combine(y, handle)


if __name__ == "__main__":
    sys.exit(main())
