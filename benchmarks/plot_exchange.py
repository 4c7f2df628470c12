"""Draws what `bench dispatch`, `combine` and `decode` measured: time and share of the wire's limit by tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotting

Line = Mapping[str, Any]
_MARKERS = "osD^vPX*"


def read(path: Path, benchmark: str) -> list[Line]:
    """Read the lines of the last run of a benchmark: those with the command and commit of its last line.

    Raises:
        ValueError: the file has none.
    """
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if line.get("benchmark") == benchmark]
    if not lines:
        raise ValueError(f"{path} must hold lines of bench {benchmark}, got none")
    last = lines[-1]["command"], lines[-1]["commit"]
    return [line for line in lines if (line["command"], line["commit"]) == last]


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw one run to an SVG or PNG file; the same lines give the same SVG.

    Raises:
        ModuleNotFoundError: there is no matplotlib.
        ValueError: the run has other sweeps than of tokens.
    """
    for name, values in (
        ("hidden", {line["geometry"]["hidden"] for line in lines}),
        ("ranks per node", {line.get("ranks_per_node") for line in lines}),
        ("inputs", {line.get("input", "bf16") for line in lines}),
    ):
        if len(values) > 1:
            raise ValueError(f"lines to be drawn must have one number of {name}, got {sorted(values)}")
    plotting.require()
    from matplotlib.figure import Figure

    series: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        series.setdefault((line["call"], line["wire"], line["layout"]), []).append(line)
    calls = list(dict.fromkeys(call for call, _, _ in series))
    counts = sorted({line["geometry"]["tokens"] for line in lines})
    figure = Figure((10, 5), layout="constrained")
    times, shares = figure.subplots(1, 2)
    for (call, wire, layout), found in series.items():
        found = sorted(found, key=lambda line: line["geometry"]["tokens"])
        style = {
            # "mxfp4 bytes" are as many as of mxfp4.
            "color": plotting.COLOURS[wire.split()[0]],
            "marker": _MARKERS[calls.index(call) % len(_MARKERS)],
            "linestyle": ":" if layout == "-" else "-" if layout == "expert_major" else "--",
            "markersize": 4,
            "linewidth": 1,
        }
        label = " ".join((call, wire, *([layout] if layout != "-" else [])))
        times.plot(
            [line["geometry"]["tokens"] for line in found], [line["p50_us"] for line in found], label=label, **style
        )
        limited = [line for line in found if line["limit_ratio"]]
        shares.plot(
            [line["geometry"]["tokens"] for line in limited], [1 / line["limit_ratio"] for line in limited], **style
        )
    for axes in (times, shares):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("tokens a rank")
    times.set_yscale("log", base=2)
    times.yaxis.set_major_formatter("{x:g}")
    times.set_ylabel("p50 of the slowest rank, µs")
    shares.set_ylim(0, 1.05)
    shares.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    first = lines[0]
    ceiling = f", {first['ceiling_gbs']:.0f} GB/s" if first["ceiling_gbs"] else ""
    shares.set_ylabel(f"share of the wire's limit (peer stores alone{ceiling})")
    sizes = first["geometry"]
    shape = f"hidden {sizes['hidden']}, top-{sizes['topk']} of {sizes['experts']}, {first['routing']} routing"
    commit = f", commit {first['commit'][:12]}" if first["commit"] else ""
    figure.suptitle(f"{first['machine']['devices']}, {first['num_ranks']} ranks, {shape}{commit}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    plotting.save(figure, path)
