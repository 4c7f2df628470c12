"""Time a layer whose batch is halved, so that one half is exchanged while the experts work on the other.

Geometry: on GPUs 4096 tokens a rank of 7168, top-8 of 256 experts, BF16 in; on the CPU 64 of 256, top-4 of 16, where
nothing overlaps. The route is known, as in a backward pass or a step whose routing came first.

    mpirun -n 4 python -m qcomm bench overlap
    mpirun -n 4 python -m qcomm bench overlap --wire mxfp4 --num-sms 24 --json overlap.jsonl

Calls: `exchange` dispatches and combines both halves and does nothing between; `experts` is the work alone, one matrix
product of each half's received rows with a [hidden, hidden] matrix in BF16; `in turn` is both, one after the other;
`overlapped` issues every exchange with `async_op=True`, so that the second half's dispatch runs beside the first half's
experts, and the first half's combine beside the second's. Rows arrive "token_major" as BF16; sums go back in BF16.

`overlapped` must give the bits of `in turn`, and both those of an oracle (the collective backend; on it, a second
buffer); a difference ends the run with code 1. harness.py says how calls are timed, baselines.py what NCCL does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import baselines
import harness
import oracle
import runner
import torch
import workload

from qcomm.buffer import Buffer
from qcomm.formats import RecvLayout, WireKind, WirePrecision
from qcomm.handle import DispatchHandle, Received

NAME = "overlap"


class Half(NamedTuple):
    """Half of a rank's tokens, `[tokens / 2, hidden]`, and where they go."""

    x: torch.Tensor
    handle: DispatchHandle


def main() -> int:
    flags = workload.parse(NAME, __doc__ or "", ("token_major",), dispatch=False)
    return runner.run(runner.Benchmark(NAME, _precision, baselines.dispatch, _measure), flags)


def _precision(wire: WireKind) -> WirePrecision:
    return WirePrecision(dispatch_fwd=wire, combine_fwd="bf16")


def _measure(context: runner.Context, buffer: Buffer, wire: WireKind, layout: RecvLayout) -> list[harness.Row]:
    """Check, then time the four calls of one wire. Collective."""
    work, hidden = context.work, context.work.geometry.hidden
    generator = torch.Generator(work.member.device).manual_seed(context.flags.seed)
    weight = torch.randn(hidden, hidden, generator=generator, device=work.member.device) / hidden**0.5
    weight = weight.to(torch.bfloat16)

    def experts(received: Received) -> torch.Tensor:
        return torch.nn.functional.linear(received.x, weight)

    halves = _halves(work, buffer, layout)
    received = [_dispatch(buffer, half) for half in halves]
    calls: dict[str, Callable[[], object]] = {
        "exchange": lambda: [buffer.combine(_dispatch(buffer, half).x, half.handle, weighted=False) for half in halves],
        "experts": lambda: [experts(each) for each in received],
        "in turn": lambda: _in_turn(buffer, halves, experts),
        "overlapped": lambda: _overlapped(buffer, halves, experts),
    }
    with work.buffer(_precision(wire), "collective") as other:
        want = _in_turn(other, _halves(work, other, layout), experts)
    problems = []
    for name, outs in (
        ("in turn", _in_turn(buffer, halves, experts)),
        ("overlapped", _overlapped(buffer, halves, experts)),
    ):
        for number, (got, right) in enumerate(zip(outs, want, strict=True)):
            what = f"{name}, wire {wire}, half {number}"
            problems += oracle.differing(what, {"sum": oracle.bits(got)}, {"sum": oracle.bits(right)})
    harness.require_equal(work.member, problems)
    rows = []
    for name, call in calls.items():
        timing = context.clock.time(call)
        buffer.check()
        rows.append(harness.Row(name, wire, layout, timing, 0, 0, 0, recv_dtype="bf16"))
    return rows


def _halves(work: workload.Workload, buffer: Buffer, layout: RecvLayout) -> list[Half]:
    """Route both halves. Collective."""
    halves = []
    for x, idx in zip(work.x.tensor_split(2), work.topk_idx.tensor_split(2), strict=True):
        _, handle = buffer.dispatch(x, idx, recv_layout=layout, recv_dtype="bf16")
        halves.append(Half(x, handle))
    return halves


def _dispatch(buffer: Buffer, half: Half) -> Received:
    received, _ = buffer.dispatch(half.x, handle=half.handle, recv_dtype="bf16")
    return received


def _in_turn(buffer: Buffer, halves: list[Half], experts: Callable[[Received], torch.Tensor]) -> list[torch.Tensor]:
    return [buffer.combine(experts(_dispatch(buffer, half)), half.handle, weighted=False) for half in halves]


def _overlapped(buffer: Buffer, halves: list[Half], experts: Callable[[Received], torch.Tensor]) -> list[torch.Tensor]:
    """Start every exchange as early as its input is there; it runs on the buffer's stream, the experts on this one."""
    arriving = [buffer.dispatch(half.x, handle=half.handle, recv_dtype="bf16", async_op=True) for half in halves]
    leaving = []
    for half, (received, _, came) in zip(halves, arriving, strict=True):
        came.wait()
        leaving.append(buffer.combine(experts(received), half.handle, weighted=False, async_op=True))
    for _, done in leaving:
        done.wait()
    return [out for out, _ in leaving]


if __name__ == "__main__":
    sys.exit(main())
