"""Draws what `simulate` found: expected time and RDMA bytes a token by nodes, flat against hierarchical."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotting

Line = Mapping[str, Any]
_STYLES = {"flat": "--", "hierarchical": "-"}
_OPS = ("dispatch", "combine")


def read(path: Path) -> list[Line]:
    """Read the lines of the last run: those with the command and commit of the last line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if (line["command"], line["commit"]) == (lines[-1]["command"], lines[-1]["commit"])]


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw one run to an SVG or PNG file; the same lines give the same SVG.

    Raises:
        ValueError: there is nothing to draw.
        ModuleNotFoundError: there is no matplotlib.
    """
    plotting.require()
    from matplotlib.figure import Figure

    found = [line for line in lines if line.get("kind") == "traffic"]
    if not found:
        raise ValueError("lines must hold traffic of simulate, got none")
    counts = sorted({line["num_nodes"] for line in found})
    figure = Figure((10, 8), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, op in enumerate(_OPS):
        times, sent = grid[0][column], grid[1][column]
        series: dict[tuple[str, str], list[Line]] = {}
        for line in (line for line in found if line["op"] == op):
            series.setdefault((line["form"], line["wire"]), []).append(line)
        for (form, wire), points in series.items():
            points = sorted(points, key=lambda line: line["num_nodes"])
            style: dict[str, Any] = {
                "color": plotting.COLOURS[wire],
                "linestyle": _STYLES[form],
                "marker": "o",
                "markersize": 3,
                "linewidth": 1,
            }
            nodes = [line["num_nodes"] for line in points]
            label = f"{form} {wire}" if column == 0 else None
            times.plot(nodes, [line["expected_us"] for line in points], label=label, **style)
            sent.plot(nodes, [_bytes_a_token(line) / 1e3 for line in points], **style)
        times.set_title(op, fontsize=9)
        for axes in (times, sent):
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
        times.set_yscale("log")
        times.yaxis.set_major_formatter("{x:,.0f}")
        sent.set_ylim(bottom=0)
        sent.set_xlabel("nodes")
    grid[0][0].set_ylabel("expected time, µs")
    grid[1][0].set_ylabel("kB a token by RDMA, mean of all GPUs")
    first, sizes = found[0], found[0]["geometry"]
    shape = (
        f"{sizes['tokens']} tokens a rank, hidden {sizes['hidden']}, top-{sizes['topk']}, {first['routing']} routing"
    )
    rates = f"NVLink {first['nvlink_gbs']:g} GB/s, RDMA {first['rdma_gbs']:g} GB/s"
    figure.suptitle(f"Model, not measured: {first['gpus_per_node']} GPUs a node, {shape}, {rates}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    plotting.save(figure, path)


def _bytes_a_token(line: Line) -> float:
    record_bytes = line["record_bytes"] + line["metadata_bytes"]
    return float(line["rdma_out_mean_records"] * record_bytes / line["geometry"]["tokens"])
