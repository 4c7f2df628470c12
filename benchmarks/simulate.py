"""Count what the exchange puts on each link at any number of nodes, and say how long it should take. No GPU.

    python -m qcomm simulate --nodes 64 --gpus 8
    python -m qcomm simulate --nodes 1,2,4,8,16,32,64,128 --routing skewed --json scaling.jsonl --plot scaling.svg
    python -m qcomm simulate --from scaling.jsonl --plot scaling.svg
    python -m qcomm simulate --calibrate dispatch.jsonl combine.jsonl decode.jsonl --update scaling.json

Two forms of exchange, "flat" and "hierarchical", dispatch and combine, each on the wires named; qcomm/scaling.py says
what goes where. Routes are drawn as by the benchmarks (workload.py), with the smallest multiple of the ranks that is at
least --experts as their number of experts. All tokens are counted where drawing them takes at most 2^28 random numbers,
else as many of each rank as that allows, at least 64, or --sample; "error" is the relative standard error of the
busiest link's records then.

Per GPU, of the busiest one: NVLink and RDMA bytes, the larger of in and out; RDMA messages, one a record; physical
bytes are those of records with their metadata, logical ones the BF16 bytes that they stand for. The time is that of the
model in qcomm/scaling.py, with the rates of qcomm/scaling.json: a fixed time, and the largest of what NVLink, RDMA and
the GPU's own memory take. --nvlink-gbs and --rdma-gbs name other rates, in GB/s for each direction.

Symmetric memory is that of a buffer whose four legs have the wire, and of `WirePrecision.paper()`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import calibration
import harness
import plot_scaling
import plotting
import workload

from qcomm import scaling, validate
from qcomm.config import BufferConfig
from qcomm.formats import WIRE_KINDS, RecvDtype, WireKind, WirePrecision
from qcomm.records import nodes_layout, symmetric_layout
from qcomm.scaling import FORMS, Call, Form, Rates, Traffic
from qcomm.table import format_table
from qcomm.topology import Topology
from qcomm.tuning import OPS

NAME = "simulate"
_RANDOM_NUMBERS = 2**28
_LEAST_SAMPLE = 64
_HEADERS = (
    "nodes",
    "ranks",
    "form",
    "op",
    "wire",
    "NVLink MB",
    "RDMA MB",
    "logical RDMA MB",
    "RDMA messages",
    "error %",
    "NVLink us",
    "RDMA us",
    "memory us",
    "expected us",
    "bound by",
)
_CALIBRATION_HEADERS = ("benchmark", "call", "wire", "layout", "ranks", "tokens", "p50 us", "expected us", "error %")

Line = plot_scaling.Line


def main() -> int:
    given = _parse()
    if given.calibrate is not None:
        return _calibrate(given.calibrate, given.update)
    if given.lines is not None:
        return _draw(plot_scaling.read(given.lines), given.plot)
    rates = scaling.calibrated()
    changed = {name: getattr(given, name) for name in ("nvlink_gbs", "rdma_gbs") if getattr(given, name)}
    rates = dataclasses.replace(rates, **changed)
    lines: list[Line] = []
    try:
        validate.positive("gpus", given.gpus)
        for num_nodes in given.nodes:
            validate.positive("num_nodes", num_nodes)
            lines += simulate(given, Topology(num_nodes * given.gpus, given.gpus), rates)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    print(report(lines, rates))
    if given.json is not None:
        with given.json.open("a") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)
    return 0 if given.plot is None else _draw(lines, given.plot)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m qcomm {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=workload.counts, default=(1, 2, 4, 8), metavar="N[,N...]", help="1,2,4,8")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="of a node (default 8)")
    sizes = {"tokens": 4096, "hidden": 7168, "topk": 8, "experts": 256}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help=f"default {size}")
    parser.add_argument("--routing", choices=workload.ROUTINGS, default=workload.ROUTINGS[0])
    parser.add_argument("--wire", type=workload.names_of(WIRE_KINDS), action="extend", help="repeatable, or comma list")
    workload.add_rate_flags(parser, nvlink="as measured", rdma="as assumed")
    parser.add_argument("--sample", type=int, metavar="N", help="tokens of each rank to look at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON object a row")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="lines", help="draw these lines, count nothing")
    parser.add_argument("--plot", type=plotting.drawing, metavar="FILE", help="draw to an .svg or .png")
    parser.add_argument("--calibrate", type=Path, nargs="+", metavar="FILE", help="fit the model to measured lines")
    parser.add_argument("--update", type=Path, metavar="FILE", help="put the fit into this scaling.json")
    given = parser.parse_args()
    if given.lines is not None and given.plot is None:
        parser.error("--from FILE needs --plot FILE")
    if given.update is not None and given.calibrate is None:
        parser.error("--update FILE needs --calibrate FILE")
    if given.sample is not None and given.sample <= 0:
        parser.error(f"--sample must be positive, got {given.sample}")
    given.wire = tuple(cast("list[WireKind]", given.wire or ["mxfp4", "fp8", "bf16"]))
    return given


def simulate(given: argparse.Namespace, topology: Topology, rates: Rates) -> list[Line]:
    """Count and time every form, operation and wire on one number of nodes; return the JSON objects."""
    num_ranks = topology.num_ranks
    experts = -(-given.experts // num_ranks) * num_ranks
    validate.buffer_shape(experts, given.topk, given.hidden, given.tokens, num_ranks)
    geometry = workload.Geometry(given.tokens, given.hidden, given.topk, experts)
    sample = given.sample or max(_LEAST_SAMPLE, _RANDOM_NUMBERS // (num_ranks * experts))
    about = {
        "benchmark": NAME,
        "command": shlex.join(["python", "-m", "qcomm", NAME, *sys.argv[1:]]),
        "commit": harness.commit(),
        "num_nodes": topology.num_nodes,
        "gpus_per_node": topology.ranks_per_node,
        "geometry": dataclasses.asdict(geometry),
        "routing": given.routing,
        "seed": given.seed,
    }
    lines: list[Line] = []
    tokens = min(sample, given.tokens)
    routes = calibration.routes(given.routing, dataclasses.replace(geometry, tokens=tokens), given.seed, num_ranks)
    sent = {form: scaling.count(routes, experts, topology, form, tokens / given.tokens) for form in FORMS}
    for form, op, wire in itertools.product(FORMS, OPS, given.wire):
        traffic = sent[form] if op == "dispatch" else sent[form].reversed()
        recv_dtype: RecvDtype = "bf16" if wire == "bf16" else "fp8"
        call = Call(op=op, wire=wire, hidden=given.hidden, num_topk=given.topk, recv_dtype=recv_dtype)
        what = {"kind": "traffic", "form": form, "op": op, "wire": wire}
        rated = {"nvlink_gbs": rates.nvlink_gbs, "rdma_gbs": rates.rdma_gbs}
        lines.append({**about, **what, **rated, **figures(call, traffic, rates)})
    for form, (name, precision) in itertools.product(FORMS, precisions(given.wire)):
        what = {"kind": "memory", "form": form, "precision": name}
        lines.append({**about, **what, "symmetric_bytes": symmetric_bytes(geometry, topology, form, precision)})
    return lines


def figures(call: Call, traffic: Traffic, rates: Rates) -> dict[str, Any]:
    """Return what a line says of one call: of the busiest GPU, and of the mean one."""
    ports, time = traffic.ports(), scaling.expected_time(call, traffic, rates)
    found: dict[str, Any] = {
        "sampled_tokens": round(traffic.fraction * float(traffic.all_tokens().max())),
        "standard_error": traffic.standard_error(),
        "record_bytes": call.physical_bytes - call.metadata_bytes,
        "metadata_bytes": call.metadata_bytes,
        "logical_record_bytes": call.logical_bytes,
    }
    for name, records in ports.items():
        largest = round(float(records.max()))
        found[f"{name}_records"] = largest
        found[f"{name}_bytes"] = largest * call.bytes_on("rdma" if name.startswith("rdma") else "nvlink", traffic.form)
        found[f"{name}_logical_bytes"] = largest * call.logical_bytes
        found[f"{name}_mean_records"] = float(records.mean())
    found["relayed_records"] = round(float(traffic.relayed.sum() - traffic.relayed.trace()) / traffic.fraction)
    return {**found, **time.figures()}


def precisions(wires: Sequence[WireKind]) -> Iterator[tuple[str, WirePrecision]]:
    """Yield the precisions whose memory is told, by name."""
    for wire in wires:
        yield wire, WirePrecision(wire, wire, wire, wire)
    yield "paper", WirePrecision.paper()


def symmetric_bytes(geometry: workload.Geometry, topology: Topology, form: Form, precision: WirePrecision) -> int:
    """Return the symmetric memory of a rank's buffer."""
    config = BufferConfig(
        num_experts=geometry.experts,
        num_topk=geometry.topk,
        hidden=geometry.hidden,
        num_max_tokens_per_rank=geometry.tokens,
        precision=precision,
        backend="nvlink",
        provider="nvshmem",
        device_type="cuda",
    )
    nodes = nodes_layout(config, topology, forwards=form == "hierarchical")
    return symmetric_layout(config, topology.num_ranks, nodes).num_bytes


def report(lines: Sequence[Line], rates: Rates) -> str:
    """Lay out both tables."""
    traffic = [line for line in lines if line["kind"] == "traffic"]
    memory = [line for line in lines if line["kind"] == "memory"]
    first, sizes = lines[0], lines[0]["geometry"]
    experts = dict.fromkeys(line["geometry"]["experts"] for line in lines)
    title = (
        f"{first['gpus_per_node']} GPUs a node, {sizes['tokens']} tokens a rank of {sizes['hidden']}, "
        f"top-{sizes['topk']} of {', '.join(map(str, experts))} experts, {first['routing']} routing; "
        f"NVLink {rates.nvlink_gbs:g} GB/s, of which {rates.nvlink_efficiency:g} reached, RDMA {rates.rdma_gbs:g} GB/s"
    )
    columns = list(dict.fromkeys((line["form"], line["precision"]) for line in memory))
    gib: dict[int, dict[tuple[str, str], str]] = {}
    for line in memory:
        row = gib.setdefault(line["num_nodes"], {})
        row[line["form"], line["precision"]] = f"{line['symmetric_bytes'] / 2**30:.3f}"
    headers = ["nodes", *(f"{form} {name}" for form, name in columns)]
    held = format_table(headers, [[str(nodes), *(row[column] for column in columns)] for nodes, row in gib.items()])
    return f"{title}\n\n{format_table(_HEADERS, [_cells(line) for line in traffic])}\n\nSymmetric GiB a rank\n\n{held}"


def _cells(line: Line) -> tuple[str, ...]:
    def busiest(link: str, what: str) -> int:
        return max(line[f"{link}_{way}_{what}"] for way in ("out", "in"))

    return (
        str(line["num_nodes"]),
        str(line["num_nodes"] * line["gpus_per_node"]),
        line["form"],
        line["op"],
        line["wire"],
        *(f"{busiest(link, 'bytes') / 1e6:.3f}" for link in ("nvlink", "rdma")),
        f"{busiest('rdma', 'logical_bytes') / 1e6:.3f}",
        str(busiest("rdma", "records")),
        f"{100 * line['standard_error']:.2f}",
        *(f"{line[f'expected_{name}_us']:.1f}" for name in ("nvlink", "rdma", "memory")),
        f"{line['expected_us']:.1f}",
        line["bound"],
    )


def _draw(lines: Sequence[Line], path: Path) -> int:
    try:
        plot_scaling.draw(lines, path)
    except (ValueError, ModuleNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _calibrate(files: Sequence[Path], update: Path | None) -> int:
    try:
        measured, points = calibration.calibrate(files)
        assumed = json.loads(scaling.CALIBRATION.read_text())["assumed"]
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    rates = scaling.rates_of({"assumed": assumed, "measured": measured})
    rows = []
    for point in points:
        line, time = point.line, calibration.expected(point.line, rates=rates)
        told = (line["benchmark"], line["call"], line["wire"], line["layout"], str(line["num_ranks"]))
        figures_of = (point.p50_us, time.total_us, 100 * (time.total_us / point.p50_us - 1))
        rows.append((*told, str(line["geometry"]["tokens"]), *(f"{figure:.1f}" for figure in figures_of)))
    print(f"{json.dumps(measured, indent=2)}\n\n{format_table(_CALIBRATION_HEADERS, rows)}")
    if update is not None:
        update.write_text(json.dumps({"assumed": assumed, "measured": measured}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
