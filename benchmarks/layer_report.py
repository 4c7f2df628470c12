"""What `bench layer` prints and writes of what it measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import harness
import layer_memory
import layer_products

from qcomm.table import format_table

ONCE, PAIRS = "nccl once", "nccl pairs"


@dataclasses.dataclass(frozen=True)
class Timed:
    """One layer's times; the last two without router and experts."""

    name: str
    forward: harness.Timing
    backward: harness.Timing
    total: harness.Timing
    comm_forward: harness.Timing
    comm_total: harness.Timing
    errors: dict[str, float]


def products(taken: Mapping[str, str], absent: Mapping[str, str]) -> str:
    """Say what multiplies, and why not what would be preferred."""
    lines = [f"products: {', '.join(f'{name} by {backend}' for name, backend in taken.items())}"]
    return "\n".join([*lines, *(f"  {name} does not run: {why}" for name, why in absent.items())])


def time_lines(timed: list[Timed]) -> list[dict[str, Any]]:
    nccl_us = min(each.total.p50_us for each in timed if each.name in (ONCE, PAIRS))
    return [
        {
            "layer": each.name,
            **{f"{part}_p50_us": getattr(each, part).p50_us for part in ("forward", "backward", "total")},
            "total_p99_us": each.total.p99_us,
            "total_host_us": each.total.host_us,
            "comm_forward_p50_us": each.comm_forward.p50_us,
            "comm_total_p50_us": each.comm_total.p50_us,
            "comm_share": each.comm_total.p50_us / each.total.p50_us,
            "nccl_ratio": nccl_us / each.total.p50_us,
            "errors": each.errors,
        }
        for each in timed
    ]


def time_table(lines: list[dict[str, Any]]) -> str:
    headers = (
        "layer",
        "forward us",
        "backward us",
        "total us",
        "p99 us",
        "host us",
        "comm us",
        "comm share",
        "vs nccl",
    )
    keys = ("forward_p50_us", "backward_p50_us", "total_p50_us", "total_p99_us", "total_host_us", "comm_total_p50_us")
    errors = ("out", "x", "w1", "w2", "router")
    rows = [
        (
            line["layer"],
            *(f"{line[key]:.1f}" for key in keys),
            f"{line['comm_share']:.2f}",
            f"{line['nccl_ratio']:.2f}x",
            *(f"{line['errors'][key]:.4f}" if line["errors"] else "-" for key in errors),
        )
        for line in lines
    ]
    return format_table((*headers, *(f"{key} error" for key in errors)), rows)


def product_table(timed: list[layer_products.Timed]) -> str:
    rows = [
        (each.product, each.operands, each.backend, f"{each.timing.p50_us:.1f}", f"{each.tflops:.1f}", each.taken)
        for each in timed
    ]
    cells = [(*row[:-1], "yes" if row[-1] else "") for row in rows]
    return format_table(("product", "operands", "backend", "p50 us", "TFLOP/s", "taken"), cells)


def with_ratios(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add what is kept over what BF16 and FP8 keep at equal recompute."""
    held = {(line["keep"], line["recompute"]): line["held"] for line in lines}
    return [
        {**line, **{f"of_{keep}": line["held"] / held[keep, line["recompute"]] for keep in ("bf16", "fp8")}}
        for line in lines
    ]


def memory_table(lines: list[dict[str, Any]]) -> str:
    cells = []
    for line in lines:
        sizes = [f"{line[key] / 1e6:.3f}" if line[key] is not None else "-" for key in ("held", "rows", "rest", "peak")]
        ratios = [f"{line[key]:.4f}" for key in ("of_bf16", "of_fp8")]
        cells.append((line["keep"], line["recompute"], *sizes, *ratios))
    headers = ("keep", "recompute", "held MB", "rows MB", "rest MB", "peak MB", "held of bf16", "held of fp8")
    return format_table(headers, cells)


def largest_table(lines: list[dict[str, Any]]) -> str:
    first = lines[0]
    cells = []
    for line in lines:
        least = ">= " if line["tokens"] + layer_memory.STEP > line["most_tokens"] else ""
        ratio = line["tokens"] / first["tokens"] if first["tokens"] else float("nan")
        cells.append((line["keep"], line["recompute"], f"{least}{line['tokens']}", f"{ratio:.2f}x"))
    headers = ("keep", "recompute", "tokens a rank", "of bf16")
    return f"{first['stack']} layers in {first['budget'] / 2**30:g} GiB\n\n{format_table(headers, cells)}"
