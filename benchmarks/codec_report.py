"""The report of `bench codec`: its JSON lines, read and written, and the tables made of them.

A line is of a `row`: "copy" and "kernel" are timed, "baseline" is timed or has the reason why not in `failed`,
"resources" is what a kernel takes on an SM. Every line holds RUN_KEYS.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from codec_baselines import CHAIN
from codec_entries import COLUMNWISE
from codec_inputs import Case, Name, Size
from codec_swiglu import BACKWARD, FORWARD

from qcomm.table import format_table

NAME = "codec"
RUN_KEYS = ("benchmark", "command", "commit", "machine", "arch", "sizes", "iterations", "seed", "ceiling_gbs")
TARGET_SIZE = Size(16384, 7168)
TARGETS = {
    Name("bf16 to mxfp4"): 0.90,
    Name("bf16 to mxfp4", "hadamard"): 0.85,
    Name("bf16 to mxfp4", "stochastic"): 0.85,
    Name("fp8 to mxfp4", "power-of-two scales"): 0.88,
    Name("fp8 to mxfp4", "float32 scales"): 0.88,
    Name("mxfp4 to bf16"): 0.90,
    Name("mxfp4 to fp8", "row-major scales"): 0.90,
    Name("mxfp4 to fp8", "column-major scales"): 0.90,
    Name("mxfp4 to fp8", "packed scales"): 0.90,
    COLUMNWISE: 0.85,
    Name("fp8 transpose", COLUMNWISE.variant): 0.85,
    Name(FORWARD): 0.80,
    Name(FORWARD, "weights"): 0.80,
    Name(BACKWARD): 0.80,
    Name(BACKWARD, "weights"): 0.80,
}
"""Share of the ceiling that a kernel must reach at TARGET_SIZE."""
CHAIN_TARGET = 3.0
"""How many times faster than the unfused chain the column-wise kernel must be at TARGET_SIZE."""

Line = dict[str, Any]


class Times(NamedTuple):
    """Of a call, in microseconds; host_bound if the device waited for the host."""

    p50_us: float
    p99_us: float
    host_bound: bool


class Ceiling(NamedTuple):
    """Bandwidth of the copy of BF16 TARGET_SIZE, and of that of a line's own size."""

    gbs: float
    own_gbs: float


def timed_line(row: str, name: Name, size: Size, case: Case, times: Times, ceiling: Ceiling) -> Line:
    """Build the line of a copy or of a kernel."""
    gbs = bandwidth_gbs(case, times)
    return {
        "row": row,
        **name._asdict(),
        **size._asdict(),
        "bytes_in": case.bytes_in,
        "bytes_out": case.bytes_out,
        **times._asdict(),
        "gbs": gbs,
        "share": gbs / ceiling.gbs,
        "own_share": gbs / ceiling.own_gbs,
        "target": TARGETS.get(name) if size == TARGET_SIZE else None,
    }


def bandwidth_gbs(case: Case, times: Times) -> float:
    """Return the bytes of a case over its p50."""
    return (case.bytes_in + case.bytes_out) / times.p50_us / 1e3


def baseline_line(kernel: Line, name: str, times: Times | None, failed: str | None) -> Line:
    """Build the line of a kernel's baseline, which has times or has failed."""
    same = {key: kernel[key] for key in ("kernel", "variant", *Size._fields)}
    found = times._asdict() if times else dict.fromkeys(Times._fields)
    speedup = times.p50_us / kernel["p50_us"] if times else None
    return {"row": "baseline", **same, "baseline": name, **found, "speedup": speedup, "failed": failed}


def resources_line(name: Name, function: str, registers: int, spill_bytes: int, shared_bytes: int) -> Line:
    """Build the line of what a kernel takes: registers and spills of a thread, shared memory of a block."""
    taken = {"registers": registers, "spill_bytes": spill_bytes, "shared_bytes": shared_bytes}
    return {"row": "resources", **name._asdict(), "function": function, **taken}


def json_lines(lines: Iterable[Line]) -> str:
    """Render one JSON object a line."""
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def read_last_run(path: Path) -> list[Line]:
    """Read the last run of a file of JSON lines.

    Raises:
        ValueError: the file holds no line of this benchmark.
    """
    lines = [json.loads(text) for text in path.read_text().splitlines() if text.strip()]
    lines = [line for line in lines if line.get("benchmark") == NAME]
    if not lines:
        raise ValueError(f"{path} must hold lines of `bench {NAME}`, it has none")
    return [line for line in lines if all(line[key] == lines[-1][key] for key in RUN_KEYS)]


def tables(lines: Sequence[Line]) -> str:
    """Lay out one run: times, baselines, resources, and which targets were missed."""
    first = lines[0]
    parts = [
        f"{first['machine']['devices']}, torch {first['machine']['torch']}, {first['iterations']} iterations; "
        f"ceiling (copy of BF16 {TARGET_SIZE}) {first['ceiling_gbs']:.0f} GB/s",
        _timed_table([line for line in lines if line["row"] in ("copy", "kernel")]),
        _baseline_table([line for line in lines if line["row"] == "baseline"]),
        _resources_table([line for line in lines if line["row"] == "resources"]),
    ]
    if any(line.get("host_bound") for line in lines):
        parts.append("*: the device waited for the host, so the time is not the kernels' alone")
    return "\n\n".join([*filter(None, parts), "\n".join(verdict(lines))])


def verdict(lines: Sequence[Line]) -> list[str]:
    """Name every target of the run that was missed, or say how many were met."""
    missed, met = [], 0
    for line in lines:
        name = Name(line["kernel"], line["variant"])
        size = Size(line["rows"], line["columns"]) if "rows" in line else None
        if line["row"] == "kernel" and line["target"] is not None:
            wanted, reached = line["target"], line["share"]
        elif line["row"] == "baseline" and line["baseline"] == CHAIN and size == TARGET_SIZE:
            wanted, reached = CHAIN_TARGET, line["speedup"]
        elif line["row"] == "resources":
            wanted, reached = 0, -line["spill_bytes"]
        else:
            continue
        if reached is not None and reached >= wanted:
            met += 1
        elif line["row"] == "resources":
            missed.append(f"missed: {name} spills {line['spill_bytes']} bytes")
        else:
            what = "x the unfused chain" if line["row"] == "baseline" else "of the ceiling"
            missed.append(f"missed: {name} at {size}: {_cell(reached, 3)} {what}, target {wanted:g}")
    return [*missed, f"{met} of {met + len(missed)} targets met"]


def _timed_table(lines: Sequence[Line]) -> str:
    timed = ("kernel", "variant", "size", "MB in", "MB out", "p50 us", "p99 us")
    headers = (*timed, "GB/s", "of ceiling", "of own copy", "target")
    cells = [
        (
            *_first_cells(line),
            *(f"{line[key] / 1e6:.2f}" for key in ("bytes_in", "bytes_out")),
            *_times(line),
            f"{line['gbs']:.0f}",
            *(_cell(line[key], 3) for key in ("share", "own_share")),
            _cell(line["target"], 2),
        )
        for line in lines
    ]
    return format_table(headers, cells)


def _baseline_table(lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    headers = ("kernel", "variant", "size", "baseline", "p50 us", "p99 us", "kernel is faster by", "")
    cells = [
        (*_first_cells(line), line["baseline"], *_times(line), _cell(line["speedup"], 2, "x"), line["failed"] or "")
        for line in lines
    ]
    return format_table(headers, cells)


def _resources_table(lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    keys = ("registers", "spill_bytes", "shared_bytes")
    cells = [(line["kernel"], line["variant"], line["function"], *(str(line[key]) for key in keys)) for line in lines]
    return format_table(("kernel", "variant", "function", "registers", "spill bytes", "shared bytes"), cells)


def _first_cells(line: Line) -> tuple[str, str, str]:
    return line["kernel"], line["variant"], str(Size(line["rows"], line["columns"]))


def _times(line: Line) -> tuple[str, str]:
    mark = "*" if line["host_bound"] else ""
    return _cell(line["p50_us"], 1, mark), _cell(line["p99_us"], 1)


def _cell(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"
