"""Fits the model of time in qcomm/scaling.py to lines of `bench dispatch`, `combine` and `decode`.

Taken are calls without host synchronisation on the nvlink backend: `static` dispatch, combine, and both in a CUDA graph
("batched"). Each has its routes drawn again from its seed, which gives exact
bytes. Fitted is

    p50 = fixed + max(bytes of the busiest NVLink port / (ceiling * efficiency), bytes of own memory / bandwidth)

by least squares of relative errors over a grid; efficiency is one number, the others are each operation's own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import workload

from qcomm import scaling, validate
from qcomm.scaling import Call, ExpectedTime, Fit, Form, Rates, Traffic
from qcomm.topology import Topology
from qcomm.tuning import OPS, Op

Line = dict[str, Any]
Floats = np.ndarray[Any, np.dtype[np.float64]]
_CALLS = {("dispatch", "static"), ("combine", "combine"), ("decode", "dispatch"), ("decode", "combine")}
_MIN_POINTS = 4
_EFFICIENCIES = np.arange(1, 0.045, -0.01)
_MEMORY_GBS = np.arange(8000, 195, -20)


class Point(NamedTuple):
    """A measured call beside what the model makes of it; `nvlink_us` at the whole ceiling, `memory_gb` in GB."""

    line: Line
    op: Op
    nvlink_us: float
    memory_gb: float
    p50_us: float


@functools.lru_cache(maxsize=2)
def routes(routing: str, geometry: workload.Geometry, seed: int, num_ranks: int) -> list[torch.Tensor]:
    """Draw every rank's routes, as the benchmarks do."""
    return [workload.make_routing(routing, geometry, seed, rank, num_ranks) for rank in range(num_ranks)]


def traffic_of(line: Line, num_nodes: int = 1, form: Form = "flat") -> Traffic:
    """Count the records of a line's call, on so many nodes.

    Raises:
        ValueError: the ranks do not divide into the nodes, or the routes drawn here are not those of the run.
    """
    validate.multiple("num_ranks", line["num_ranks"], num_nodes)
    topology = Topology(line["num_ranks"], line["num_ranks"] // num_nodes)
    geometry = workload.Geometry(**line["geometry"])
    back = call_of(line).op == "combine"
    topk_idx = routes(line["routing"], geometry, line["seed"], topology.num_ranks)
    pairs = scaling.count(topk_idx, geometry.experts, topology, "flat")
    sent = (pairs.direct + pairs.rdma).fill_diagonal_(0)
    found = tuple(int(sent.sum(axis).max()) for axis in ((0, 1) if back else (1, 0)))
    wanted = line["remote_records"], line["remote_records_in"]
    if found != wanted:
        raise ValueError(f"remote_records, remote_records_in must be {found} for these routes, the line has {wanted}")
    traffic = scaling.count(topk_idx, geometry.experts, topology, form)
    return traffic.reversed() if back else traffic


def expected(line: Line, num_nodes: int = 1, form: Form = "flat", rates: Rates | None = None) -> ExpectedTime:
    """Say how long the call of a line of `bench dispatch`, `combine` or `decode` should take."""
    return scaling.expected_time(call_of(line), traffic_of(line, num_nodes, form), rates)


def call_of(line: Line) -> Call:
    """Return the call of a line."""
    return Call(
        op="combine" if line["call"] == "combine" else "dispatch",
        wire=line["wire"],
        hidden=line["geometry"]["hidden"],
        num_topk=line["geometry"]["topk"],
        routed=line["call"] in ("dispatch", "static"),
        recv_layout=line["layout"],
        recv_dtype=line["recv_dtype"] or "fp8",
        rounds_inside=line["backend"] != "collective",
    )


def points(lines: Iterable[Line]) -> list[Point]:
    """Pick the lines that the model is fitted to."""
    found = []
    for line in lines:
        if (line["benchmark"], line.get("call")) not in _CALLS:
            continue
        if line["backend"] != "nvlink" or not line["ceiling_gbs"]:
            continue
        call, traffic = call_of(line), traffic_of(line)
        ports = traffic.ports()
        busiest = max(float(ports["nvlink_out"].max()), float(ports["nvlink_in"].max()))
        nvlink_us = busiest * call.physical_bytes / line["ceiling_gbs"] / 1e3
        memory_gb = float(scaling.memory_bytes(call, traffic).max()) / 1e9
        found.append(Point(line, call.op, nvlink_us, memory_gb, line["p50_us"]))
    return found


def fit(measured: Mapping[Op, Sequence[Point]]) -> tuple[float, dict[Op, Fit]]:
    """Fit the links' efficiency and, for each operation, the rest.

    Raises:
        ValueError: an operation has fewer points than numbers to be fitted.
    """
    tables: dict[Op, tuple[Floats, Floats]] = {}
    for op, found in measured.items():
        if len(found) < _MIN_POINTS:
            raise ValueError(f"lines must hold at least {_MIN_POINTS} measured calls of {op}, got {len(found)}")
        nvlink_us, memory_gb, p50_us = (
            np.array([getattr(point, name) for point in found]) for name in ("nvlink_us", "memory_gb", "p50_us")
        )
        # Efficiency, bandwidth, point.
        busy_us = np.maximum(nvlink_us / _EFFICIENCIES[:, None, None], 1e6 * memory_gb / _MEMORY_GBS[:, None])
        weights = p50_us**-2
        fixed_us = np.maximum(0, ((p50_us - busy_us) * weights).sum(2) / weights.sum())
        tables[op] = fixed_us, (fixed_us[:, :, None] + busy_us) / p50_us - 1
    # Of equals the first: where links are never the limit, they are taken to be as fast as can be.
    efficiency = int(sum((errors**2).sum(2).min(1) for _, errors in tables.values()).argmin())
    fits = {}
    for op, (fixed_us, errors) in tables.items():
        bandwidth = int((errors[efficiency] ** 2).sum(1).argmin())
        fits[op] = Fit(
            fixed_us=round(float(fixed_us[efficiency, bandwidth]), 2),
            memory_gbs=float(_MEMORY_GBS[bandwidth]),
            largest_error=round(float(np.abs(errors[efficiency, bandwidth]).max()), 3),
        )
    return round(float(_EFFICIENCIES[efficiency]), 2), fits


def calibrate(files: Sequence[Path]) -> tuple[dict[str, Any], list[Point]]:
    """Fit every operation; return the part "measured" of scaling.json, and what was fitted to.

    Raises:
        ValueError: the files lack lines of an operation.
    """
    measured = points(json.loads(line) for file in files for line in file.read_text().splitlines())
    efficiency, fits = fit({op: [point for point in measured if point.op == op] for op in OPS})
    ceilings = [point.line["ceiling_gbs"] for point in measured]
    return {
        "devices": sorted({point.line["machine"]["devices"] for point in measured}),
        "commits": sorted({str(point.line["commit"]) for point in measured}),
        "nvlink_gbs": round(float(np.median(ceilings)), 1),
        "nvlink_efficiency": efficiency,
        "fits": {op: vars(found) for op, found in fits.items()},
    }, measured
