"""Time dispatch and combine over a thin link between two nodes of two CPU ranks: MXFP4 against BF16, relayed or not.

The nodes are network namespaces of this machine, joined by a veth pair (thin_link.py: needs root, `ip` and `tc`). The
ranks are started by torchrun in each, as on two hosts, and talk over gloo.

    python -m qcomm bench link
    python -m qcomm bench link --rate 1gbit --tokens 512 --json link.jsonl

Geometry: 128 tokens a rank of 7168, top-8 of 32 experts, uniform routing; tokens are received as they came.
"relayed": a token goes once to each node, and one sum comes back (the nodes are the two hosts). "straight": it goes to
each rank (`ranks_per_node=1`).

Every result is compared with the oracle first (oracle.py); a difference ends the run with code 1. Then each call runs
`--iterations` times between barriers; p50 is that of the slowest rank, with the codec in it, which is plain PyTorch on
the CPU. Bytes are those of a call, of the node that sends most: "link" is the growth of the link's counter over the
iterations, packet headers, acknowledgements, metadata and barriers included, divided by them; "records" are the records
that the node's ranks send to the other host.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import oracle
import thin_link
import torch
import workload

from qcomm.formats import WireKind, WirePrecision
from qcomm.records import RecordLayout
from qcomm.table import format_table

_RANKS_PER_NODE = 2
_WIRES: tuple[WireKind, ...] = ("bf16", "mxfp4")
_WAYS = {"straight": 1, "relayed": None}
_HEADERS = ("call", "wire", "way", "p50 ms", "p99 ms", "link MB", "records MB", "link Mbit/s")
_COUNTER = Path(f"/sys/class/net/{thin_link.DEVICE}/statistics/tx_bytes")


def main() -> int:
    flags = _parse()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _measure(flags)
    obstacle = thin_link.obstacle()
    if obstacle is not None:
        sys.stderr.write(f"no link between two nodes can be made here: {obstacle}\n")
        return 2
    with (
        thin_link.ThinLink(flags.rate) as link,
        link.start(_RANKS_PER_NODE, Path(__file__), *sys.argv[1:]) as launchers,
    ):
        for launcher in launchers:
            out, _ = launcher.communicate()
            sys.stdout.write(out)
        return max(abs(launcher.returncode) for launcher in launchers)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m qcomm bench link",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rate", default="200mbit", help="of the link, as tc reads it (default 200mbit)")
    for name, size in (("tokens", 128), ("hidden", 7168), ("topk", 8), ("experts", 32), ("iterations", 5)):
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help=f"default {size}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON object a row")
    return parser.parse_args()


def _measure(flags: argparse.Namespace) -> int:
    """Run on one rank of the two nodes."""
    with harness.session() as session:
        member = session.member
        geometry = workload.Geometry(flags.tokens, flags.hidden, flags.topk, flags.experts)
        generator = torch.Generator().manual_seed(member.rank)
        x = torch.randn(geometry.tokens, geometry.hidden, generator=generator).to(torch.bfloat16)
        weights = torch.rand(geometry.tokens, geometry.topk, generator=generator)
        idx = workload.make_routing("uniform", geometry, 0, member.rank, member.num_ranks)
        about = {
            "benchmark": "link",
            "command": f"python -m qcomm bench link {' '.join(sys.argv[1:])}".strip(),
            "commit": harness.commit(),
            "machine": harness.machine(member),
            "rate": flags.rate,
            "num_ranks": member.num_ranks,
            "ranks_per_node": _RANKS_PER_NODE,
            "geometry": dataclasses.asdict(geometry),
            "iterations": flags.iterations,
        }
        rows = []
        try:
            for wire in _WIRES:
                for way, ranks_per_node in _WAYS.items():
                    work = workload.Workload(member, geometry, x, idx, weights, ranks_per_node)
                    rows += [{"wire": wire, "way": way, **row} for row in _one(work, wire, flags.iterations)]
        except harness.MismatchError as error:
            if member.rank == 0:
                sys.stderr.write(f"results differ from the oracle's, no times are reported:\n{error}\n")
            return 1
        if member.rank == 0:
            _report(about, rows, flags.json)
    return 0


def _one(work: workload.Workload, wire: WireKind, iterations: int) -> list[dict[str, object]]:
    """Check, then time both calls of one configuration. Collective."""
    member = work.member
    with work.buffer(WirePrecision(dispatch_fwd=wire, combine_fwd=wire), "collective") as buffer:
        assert buffer.topology.num_nodes == (member.num_ranks if work.ranks_per_node else 2)
        received, handle = buffer.dispatch(work.x, work.topk_idx, work.topk_weights, recv_dtype=wire)
        want = oracle.expected_dispatch("collective", work, wire, "expert_major", wire, False)
        problems = oracle.differing(f"dispatch, {wire}", oracle.fields(received, handle), want)
        shape = (len(received.x), work.geometry.hidden)
        y = torch.randn(shape, generator=torch.Generator().manual_seed(9 + member.rank)).to(torch.bfloat16)
        got = oracle.bits(buffer.combine(y, handle))
        summed = oracle.bits(oracle.expected_combine(buffer, work, y, handle, wire, True))
        problems += oracle.differing(f"combine, {wire}", {"sum": got}, {"sum": summed})
        harness.require_equal(member, problems)
        stats, hidden = buffer.stats(), work.geometry.hidden
        sent, back = stats.dispatch_traffic.between_nodes, stats.combine_traffic.between_nodes
        if not buffer.topology.relays:
            record = RecordLayout(wire, hidden).num_bytes
            sent, back = (_to_other_host(n, member.rank) * record for n in (stats.tokens_sent, stats.tokens_received))
        return [
            {
                "call": "dispatch",
                **_timed(
                    work,
                    lambda: buffer.dispatch(work.x, work.topk_idx, work.topk_weights, recv_dtype=wire),
                    sent,
                    iterations,
                ),
            },
            {"call": "combine", **_timed(work, lambda: buffer.combine(y, handle), back, iterations)},
        ]


def _to_other_host(tokens: Sequence[int], rank: int) -> int:
    return sum(n for peer, n in enumerate(tokens) if peer // _RANKS_PER_NODE != rank // _RANKS_PER_NODE)


def _timed(
    work: workload.Workload, call: Callable[[], object], record_bytes: int, iterations: int
) -> dict[str, object]:
    """Time a call; `record_bytes` go from this rank to the other host. Collective."""
    member, times_us = work.member, []
    call()
    harness.settle(member)
    before = int(_COUNTER.read_text())
    for _ in range(iterations):
        harness.settle(member)
        start = time.perf_counter()
        call()
        times_us.append(1e6 * (time.perf_counter() - start))
    harness.settle(member)
    linked = max(harness.gather(member, (int(_COUNTER.read_text()) - before) / iterations))
    timing = harness.slowest(member, times_us, times_us)
    everyone = harness.gather(member, record_bytes)
    nodes = [sum(everyone[first : first + _RANKS_PER_NODE]) for first in range(0, len(everyone), _RANKS_PER_NODE)]
    return {
        "p50_us": timing.p50_us,
        "p99_us": timing.p99_us,
        "link_bytes": round(linked),
        "record_bytes": max(nodes),
        "link_mbit_s": 8 * linked / timing.p50_us,
    }


def _report(about: dict[str, object], rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    lines = [
        (
            row["call"],
            row["wire"],
            row["way"],
            f"{row['p50_us'] / 1e3:.0f}",
            f"{row['p99_us'] / 1e3:.0f}",
            f"{row['link_bytes'] / 1e6:.2f}",
            f"{row['record_bytes'] / 1e6:.2f}",
            f"{row['link_mbit_s']:.0f}",
        )
        for row in rows
    ]
    title = f"2 nodes of {_RANKS_PER_NODE} CPU ranks, {about['rate']} between them, {about['geometry']}"
    print(f"{title}\n\n{format_table(_HEADERS, lines)}", flush=True)
    if path is not None:
        with path.open("a") as file:
            file.writelines(json.dumps({**about, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
