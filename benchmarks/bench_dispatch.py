"""Time dispatch on each wire and receive layout, beside NCCL, DeepEP where it is installed, and the peer-store ceiling.

Geometry: on GPUs 4096 tokens a rank of 7168, top-8 of 256 experts; on the CPU 64 of 256, top-4 of 16. Tokens are BF16,
or with --input fp8 quantized before the clock starts.

    mpirun -n 4 python -m qcomm bench dispatch
    mpirun -n 4 python -m qcomm bench dispatch --wire mxfp4 --recv-layout expert_major --json dispatch.jsonl
    mpirun -n 4 python -m qcomm bench dispatch --tokens 1024,4096,16384 --wire mxfp4 --json dispatch.jsonl
    mpirun -n 4 python -m qcomm bench dispatch --input fp8 --recv-layout expert_major
    mpirun -n 4 python -m qcomm bench dispatch --ranks-per-node 2 --nvlink-gbs 350 --rdma-gbs 45
    python -m qcomm bench dispatch --from dispatch.jsonl --plot dispatch.svg     (no GPU)

Calls: `dispatch` routes and synchronises with the host; `replay` follows the route of a handle; `static` routes without
host synchronisation; `columnwise` is a replay that also gives the column-wise FP8 operand.

Bytes: a token goes once to each rank that holds any of its experts. Its record is hidden / 2 + hidden / 32 bytes on the
mxfp4 wire, hidden + 4 * hidden / 128 on fp8 and 2 * hidden on bf16, padded to 16. remote = records to other ranks *
bytes of a record.

Every result is compared with an oracle first (oracle.py); a difference ends the run with code 1. harness.py says how
calls are timed, baselines.py what NCCL does, deep_ep_baseline.py what DeepEP does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import baselines
import deep_ep_baseline
import harness
import oracle
import runner
import workload

from qcomm.buffer import Buffer
from qcomm.formats import RecvDtype, RecvLayout, WireKind, WirePrecision
from qcomm.handle import DispatchHandle, Received
from qcomm.records import MetadataLayout, RecordLayout

NAME = "dispatch"
_ROUTED = ("dispatch", "static")

Dispatch = Callable[[], tuple[Received, DispatchHandle]]


def main() -> int:
    flags = workload.parse(NAME, __doc__ or "", ("expert_major", "token_major"), dispatch=True, links=True)
    return runner.run(
        runner.Benchmark(NAME, _precision, baselines.dispatch, _measure, deep_ep_baseline.dispatch), flags
    )


def _precision(wire: WireKind) -> WirePrecision:
    return WirePrecision(dispatch_fwd=wire)


def _measure(context: runner.Context, buffer: Buffer, wire: WireKind, layout: RecvLayout) -> list[harness.Row]:
    """Check, then time every call of one configuration. Collective."""
    work, traffic = context.work, context.traffic
    recv_dtype = context.flags.recv_dtype or ("bf16" if wire == "bf16" else "fp8")
    calls, handle = _calls(work, buffer, layout, recv_dtype)
    _check(work, buffer.backend, calls, wire, layout, recv_dtype)
    harness.release(work.member)
    rows = []
    for name, call in calls.items():
        timing = context.clock.time(call)
        buffer.check()
        rows.append(
            harness.Row(
                call=name,
                wire=wire,
                layout=layout,
                timing=timing,
                record_bytes=RecordLayout(wire, work.geometry.hidden).num_bytes,
                remote_records=traffic.remote_out,
                remote_records_in=traffic.remote_in,
                metadata_bytes=4 * MetadataLayout(work.geometry.topk).num_words if name in _ROUTED else 0,
                recv_dtype=recv_dtype,
                sent=harness.sent(work.member, handle, buffer.stats().dispatch_traffic),
            )
        )
    return rows


def _calls(
    work: workload.Workload, buffer: Buffer, layout: RecvLayout, recv_dtype: RecvDtype
) -> tuple[dict[str, Dispatch], DispatchHandle]:
    """Return the calls by name, and the route that those which need one follow. Collective."""
    x = work.given

    def routed(*, static: bool) -> tuple[Received, DispatchHandle]:
        return buffer.dispatch(
            x, work.topk_idx, work.topk_weights, recv_layout=layout, recv_dtype=recv_dtype, static=static
        )

    _, handle = routed(static=False)
    calls: dict[str, Dispatch] = {
        "dispatch": lambda: routed(static=False),
        "replay": lambda: buffer.dispatch(x, handle=handle, recv_dtype=recv_dtype),
        "static": lambda: routed(static=True),
    }
    if layout == "expert_major" and recv_dtype == "fp8":
        calls["columnwise"] = lambda: buffer.dispatch(x, handle=handle, recv_dtype=recv_dtype, columnwise=True)
    return calls, handle


def _check(
    work: workload.Workload,
    backend: str,
    calls: dict[str, Dispatch],
    wire: WireKind,
    layout: RecvLayout,
    recv_dtype: RecvDtype,
) -> None:
    """Compare every call's result with the oracle's. Collective.

    Raises:
        harness.MismatchError: some rank's differs.
    """
    want = oracle.expected_dispatch(backend, work, wire, layout, recv_dtype, "columnwise" in calls)
    problems = []
    for name, call in calls.items():
        problems += oracle.differing(f"{name}, wire {wire}, {layout}, {recv_dtype}", oracle.fields(*call()), want)
    harness.require_equal(work.member, problems)


if __name__ == "__main__":
    sys.exit(main())
