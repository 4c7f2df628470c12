"""What a user of NCCL would run instead.

BASELINES. `all_to_all_single` (NCCL; gloo on the CPU) of what qcomm sends: each token once per rank that holds any of
its experts, the own rank included, in BF16 or in FP8 with its scales, with the same split sizes. The tokens are packed
by rank, and the split sizes known, before the clock starts: NCCL gets its routing, its quantizer and its packing for
free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import harness
import torch
import torch.distributed as dist
from workload import Workload

from qcomm.config import Member
from qcomm.formats import WireKind, WirePrecision
from qcomm.records import RecordLayout

_KINDS: tuple[WireKind, ...] = ("bf16", "fp8")


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic:
    """Where one rank's tokens go.

    Attributes:
        send_counts, recv_counts: records per peer, the own rank included.
        remote_out, remote_in: records to and from other ranks, each of the rank with most.
        row_record: record of each row of the aligned expert-major layout, padding included; it reads record 0.
    """

    send_counts: list[int]
    recv_counts: list[int]
    remote_out: int
    remote_in: int
    row_record: torch.Tensor


def find_traffic(work: Workload) -> Traffic:
    """Route once, with the collective backend, and count. Collective."""
    rank = work.member.rank
    with work.buffer(WirePrecision.bf16(), "collective") as buffer:
        _, handle = buffer.dispatch(work.x, work.topk_idx)
    assert handle.send_counts is not None
    assert handle.recv_counts is not None
    out = sum(handle.send_counts) - handle.send_counts[rank]
    into = sum(handle.recv_counts) - handle.recv_counts[rank]
    everyone = harness.gather(work.member, (out, into))
    return Traffic(
        send_counts=list(handle.send_counts),
        recv_counts=list(handle.recv_counts),
        remote_out=max(each[0] for each in everyone),
        remote_in=max(each[1] for each in everyone),
        row_record=handle.row_record[: handle.num_rows].clamp(min=0),
    )


def dispatch(work: Workload, traffic: Traffic, clock: harness.Clock) -> list[harness.Row]:
    """Time all_to_all_single in BF16 and FP8, and in BF16 with the rows put in expert-major order. Collective."""
    hidden, name = work.geometry.hidden, _library(work.member)
    rows = []
    for kind in _KINDS:
        exchange = _all_to_all(work, traffic.send_counts, traffic.recv_counts, kind)
        rows.append(_row(name, kind, "-", clock.time(exchange), traffic, hidden))
    exchange = _all_to_all(work, traffic.send_counts, traffic.recv_counts, "bf16")

    def expand() -> torch.Tensor:
        return exchange().view(torch.bfloat16).index_select(0, traffic.row_record)

    rows.append(_row(f"{name} + expand", "bf16", "expert_major", clock.time(expand), traffic, hidden))
    return rows


def combine(work: Workload, traffic: Traffic, clock: harness.Clock) -> list[harness.Row]:
    """Time all_to_all_single back to the tokens' ranks, in BF16 and FP8. Collective."""
    rows = []
    for kind in _KINDS:
        exchange = _all_to_all(work, traffic.recv_counts, traffic.send_counts, kind)
        timing = clock.time(exchange)
        row = _row(_library(work.member), kind, "-", timing, traffic, work.geometry.hidden)
        rows.append(dataclasses.replace(row, remote_records=traffic.remote_in, remote_records_in=traffic.remote_out))
    return rows


def _row(call: str, kind: WireKind, layout: str, timing: harness.Timing, traffic: Traffic, hidden: int) -> harness.Row:
    record_bytes = RecordLayout(kind, hidden).num_bytes
    return harness.Row(call, kind, layout, timing, record_bytes, traffic.remote_out, traffic.remote_in)


def _library(member: Member) -> str:
    return "nccl" if member.device.type == "cuda" else "gloo"


def _all_to_all(
    work: Workload, send_counts: list[int], recv_counts: list[int], kind: WireKind
) -> Callable[[], torch.Tensor]:
    num_bytes = RecordLayout(kind, work.geometry.hidden).num_bytes
    device = work.member.device
    packed = torch.randint(0, 256, (sum(send_counts), num_bytes), dtype=torch.uint8, device=device)

    def exchange() -> torch.Tensor:
        came = torch.empty(sum(recv_counts), num_bytes, dtype=torch.uint8, device=device)
        dist.all_to_all_single(came, packed, recv_counts, send_counts, group=work.member.group)
        return came

    return exchange
