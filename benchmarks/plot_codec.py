"""Draws what `bench codec` measured: each kernel's share of the ceiling, a bar a size, and the targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import plotting
from codec_inputs import Name, Size
from codec_report import TARGET_SIZE, Line

_COLOURS = ("#2a6f97", "#e09f3e", "#7a9e7e", "#9e5a63")
_BAR_INCHES, _EDGE_INCHES = 0.14, 1.4


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw the kernels of one run to an SVG or PNG file; the same lines give the same SVG.

    Raises:
        ModuleNotFoundError: there is no matplotlib.
    """
    plotting.require()
    from matplotlib.figure import Figure

    kernels = [line for line in lines if line["row"] == "kernel"]
    names = list(dict.fromkeys(Name(line["kernel"], line["variant"]) for line in kernels))
    sizes = list(dict.fromkeys(Size(line["rows"], line["columns"]) for line in kernels))
    height = 0.8 / len(sizes)
    figure = Figure((9, _EDGE_INCHES + _BAR_INCHES * len(names) * (len(sizes) + 1)), layout="constrained")
    axes = figure.subplots()
    for line in kernels:
        name, size = Name(line["kernel"], line["variant"]), Size(line["rows"], line["columns"])
        middle = names.index(name) + (sizes.index(size) + 0.5) * height - 0.4
        axes.barh(middle, line["share"], height, color=_COLOURS[sizes.index(size) % len(_COLOURS)])
        axes.text(line["share"] + 0.005, middle, f"{line['p50_us']:.1f} µs", va="center", fontsize=6)
        if line["target"] is not None:
            axes.plot([line["target"]] * 2, [middle - height / 2, middle + height / 2], color="black", linewidth=2)
    for number, size in enumerate(sizes):
        axes.barh(0, 0, color=_COLOURS[number % len(_COLOURS)], label=str(size))
    axes.plot([], [], color="black", linewidth=2, label=f"target at {TARGET_SIZE}")
    axes.set_yticks(range(len(names)), [str(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, max(1.1, *(line["share"] + 0.1 for line in kernels)))
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    first = lines[0]
    axes.set_xlabel(f"share of the bandwidth of a copy of BF16 {TARGET_SIZE}, {first['ceiling_gbs']:.0f} GB/s")
    commit = f", commit {first['commit'][:12]}" if first["commit"] else ""
    axes.set_title(f"{first['machine']['devices']}, torch {first['machine']['torch']}{commit}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(sizes) + 1, fontsize=8)
    plotting.save(figure, path)
