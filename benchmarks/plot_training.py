"""Loss curves and the table of what examples/train_moe.py wrote.

    python benchmarks/plot_training.py train.jsonl --plot train.svg

Of several runs of one name the last counts. The table: held-out loss at the end; by how many percent it is above the
mean of the BF16 runs, and above the BF16 run of the same seed, which had the same initial weights and batches; the
median step; and memory. Its last line is the spread of the BF16 runs, which differ in their seed: the largest less the
smallest over the mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotting

from qcomm.table import format_table

_COLOURS = {"bf16": "#7a9e7e", "fp8": "#e09f3e", "paper": "#2a6f97", "aggressive": "#9e2a2b"}
_STYLES = ("-", "--", ":", "-.")
_HEADERS = ("run", "held-out loss", "vs bf16 mean %", "vs same seed %", "step ms", "held MB", "peak MB")

Line = Mapping[str, Any]
Runs = dict[str, list[Line]]


def read(path: Path) -> Runs:
    """Read the lines of each run that came to its end, by its name; of equal names the last.

    Raises:
        ValueError: the file has none.
    """
    runs: Runs = {}
    lines: Runs = {}
    for line in map(json.loads, path.read_text().splitlines()):
        if line["kind"] == "run":
            lines[line["run"]] = []
        lines[line["run"]].append(line)
        if line["kind"] == "end":
            runs.pop(line["run"], None)
            runs[line["run"]] = lines[line["run"]]
    if not runs:
        raise ValueError(f"{path} must hold runs of train_moe.py that came to their end, got none")
    return runs


@dataclasses.dataclass(frozen=True)
class Against:
    """By how many percent held-out losses at the end are above BF16's.

    Attributes:
        mean: of each run, against the mean of the BF16 runs; empty without one.
        same_seed: of each run whose seed a BF16 run has.
        spread: of the BF16 runs, in percent; None without two.
    """

    mean: dict[str, float]
    same_seed: dict[str, float]
    spread: float | None


def against_bf16(runs: Runs) -> Against:
    """Compare every run with the BF16 runs."""
    losses = {name: float(lines[-1]["held_out_loss"]) for name, lines in runs.items()}
    seeds = {name: lines[0]["seed"] for name, lines in runs.items()}
    bf16 = {seeds[name]: losses[name] for name, lines in runs.items() if lines[0]["preset"] == "bf16"}
    if not bf16:
        return Against({}, {}, None)
    mean = sum(bf16.values()) / len(bf16)
    return Against(
        mean={name: 100 * (loss / mean - 1) for name, loss in losses.items()},
        same_seed={name: 100 * (losses[name] / bf16[seed] - 1) for name, seed in seeds.items() if seed in bf16},
        spread=100 * (max(bf16.values()) - min(bf16.values())) / mean if len(bf16) > 1 else None,
    )


def table(runs: Runs) -> str:
    """Lay out one row a run, and the spread below."""
    against = against_bf16(runs)
    rows = []
    for name, lines in runs.items():
        end = lines[-1]
        rows.append(
            (
                name,
                f"{end['held_out_loss']:.5f}",
                *(f"{found[name]:+.3f}" if name in found else "-" for found in (against.mean, against.same_seed)),
                f"{end['step_ms']:.2f}",
                *(f"{end[key] / 1e6:.0f}" if end[key] else "-" for key in ("held_bytes", "peak_bytes")),
            )
        )
    told = "spread of the bf16 runs: " + (
        "unknown, it needs two" if against.spread is None else f"{against.spread:.3f} %"
    )
    return f"{format_table(_HEADERS, rows)}\n\n{told}"


def draw(runs: Runs, path: Path) -> None:
    """Draw the training and held-out losses of all runs to an SVG or PNG file; the same lines give the same SVG.

    Raises:
        ModuleNotFoundError: there is no matplotlib.
    """
    plotting.require()
    from matplotlib.figure import Figure

    figure = Figure((10, 5), layout="constrained")
    training, held_out = figure.subplots(1, 2)
    against = against_bf16(runs)
    for name, lines in runs.items():
        about = lines[0]
        style = {
            "color": _COLOURS[about["preset"]],
            "linestyle": _STYLES[about["seed"] % len(_STYLES)],
            "linewidth": 1,
        }
        label = f"{name} ({against.mean[name]:+.2f} %)" if name in against.mean else name
        for axes, kind, key in ((training, "step", "loss"), (held_out, "held_out", "held_out_loss")):
            found = [line for line in lines if line["kind"] == kind]
            marker = {"marker": "o", "markersize": 3} if kind == "held_out" else {}
            axes.plot([line["step"] for line in found], [line[key] for line in found], label=label, **style, **marker)
    for axes, what in ((training, "training"), (held_out, "held-out")):
        axes.set_xlabel("step")
        axes.set_ylabel(f"{what} loss, nats a byte")
        axes.grid(alpha=0.3)
    losses = [line["loss"] for lines in runs.values() for line in lines if line["kind"] == "step"]
    # The first steps would make the rest flat.
    training.set_ylim(0.97 * min(losses), 2.5 * min(losses))
    training.legend(fontsize=7, title="held-out loss against the mean of bf16", title_fontsize=7)
    about = next(iter(runs.values()))[0]
    commit = f", commit {about['commit'][:12]}" if about["commit"] else ""
    told = "" if against.spread is None else f", spread of the bf16 runs {against.spread:.2f} %"
    figure.suptitle(
        f"{about['machine']['devices']}, {about['num_ranks']} ranks, {about['parameters'] / 1e6:.0f} M parameters"
        f"{told}{commit}",
        fontsize=9,
    )
    plotting.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, metavar="FILE", help="JSON lines of train_moe.py")
    parser.add_argument("--plot", type=plotting.drawing, metavar="FILE", help="draw to this SVG or PNG")
    given = parser.parse_args(arguments)
    try:
        runs = read(given.lines)
        print(table(runs))
        if given.plot is not None:
            draw(runs, given.plot)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
