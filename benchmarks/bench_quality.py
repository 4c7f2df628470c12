"""Measure what each conversion loses: CPU, one process, plain PyTorch (qcomm.reference).

    python -m qcomm bench quality
    python -m qcomm bench quality --rows 512 --json quality.jsonl

Sources, all in BF16: `gaussian`; `swiglu`, silu(a) * b of two Gaussians; `outliers`, a Gaussian with 1 % of its columns
times 30.

Error: 100 * sum((x - q)^2) / sum(x^2) in float64. x is the BF16 source, for MXFP4 from FP8 too, which is rounded twice;
for the two conversions of MXFP4 to FP8 it is the MXFP4 values (EVEN, nearest), so that only the second step counts.
Spread overflows are blocks more than 14 binades below the largest block under their FP8 scale.

Checked before anything is printed; a failure ends the run with code 1:
- MXFP4 to FP8 is exact, by row and by column, where there is no spread overflow;
- no element of a block lies above 6 scales under RCEIL and CEIL;
- a stochastically rounded element is less than 2 scales from its source, the widest gap of E2M1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import harness
import torch
from distributions import SOURCES, make_source

from qcomm.formats import BLOCK_SIZE, E2M1_MAGNITUDES, E8M0_BIAS, FP8_GROUP_SIZE, MAXIMUM_RULES, Rounding, ScaleRule
from qcomm.reference import (
    dequantize_fp8,
    dequantize_mxfp4,
    mxfp4_to_fp8,
    quantize_fp8,
    quantize_mxfp4,
)
from qcomm.reference_columnwise import mxfp4_to_fp8_columnwise
from qcomm.table import format_table
from qcomm.tensors import MXFP4Tensor

NAME = "quality"
# Rows converted at a time: small enough for the caches, and whole FP8 tiles.
_CHUNK = FP8_GROUP_SIZE
_WIDEST_GAP = 2.0


class CheckError(Exception):
    """A conversion broke what this benchmark states about it."""


@dataclasses.dataclass
class Loss:
    """Sums over the chunks of one conversion; overflows is None where none can happen."""

    error: float = 0.0
    energy: float = 0.0
    overflows: int | None = None

    @property
    def percent(self) -> float:
        return 100 * self.error / self.energy

    def add(self, x: torch.Tensor, q: torch.Tensor, overflows: torch.Tensor | None = None) -> None:
        x, q = x.double(), q.double()
        self.error += (x - q).square().sum().item()
        self.energy += x.square().sum().item()
        if overflows is not None:
            self.overflows = (self.overflows or 0) + int(overflows)


def measure(x: torch.Tensor, seed: int) -> dict[str, Loss]:
    """Convert a source every way.

    Raises:
        CheckError: a conversion broke what the module's text states.
    """
    losses: dict[str, Loss] = {}
    for start in range(0, x.shape[0], _CHUNK):
        part = x[start : start + _CHUNK]
        rows = torch.arange(start, start + part.shape[0])
        for name, want, got, overflows in _conversions(part, rows, seed):
            losses.setdefault(name, Loss()).add(want, got, overflows)
    return losses


def _conversions(
    x: torch.Tensor, rows: torch.Tensor, seed: int
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yield each conversion's name, what it was given, what came out, and its spread overflows."""
    for rule in MAXIMUM_RULES:
        q = quantize_mxfp4(x, rule)
        if rule in (ScaleRule.RCEIL, ScaleRule.CEIL):
            _require((_in_scales(x, q).abs() <= E2M1_MAGNITUDES[-1]).all(), f"{rule.name}: an element saturates")
        yield f"mxfp4 {rule.name}", x, dequantize_mxfp4(q), None
    yield "mxfp4 EVEN, hadamard", x, dequantize_mxfp4(quantize_mxfp4(x, hadamard=True)), None

    q = quantize_mxfp4(x, ScaleRule.RCEIL, Rounding.STOCHASTIC, seed=seed, rows=rows)
    decoded = dequantize_mxfp4(q)
    far = _in_scales(decoded.double() - x.double(), q).abs() >= _WIDEST_GAP
    _require(~far.any(), "stochastic: an element is 2 scales or more from its source")
    yield "mxfp4 RCEIL, stochastic", x, decoded, None

    yield "mxfp4 QUEST, hadamard", x, dequantize_mxfp4(quantize_mxfp4(x, ScaleRule.QUEST, hadamard=True)), None
    q = quantize_mxfp4(x, ScaleRule.FLOOR, Rounding.UNBIASED, seed=seed, rows=rows, hadamard=True)
    yield "mxfp4 UNBIASED, hadamard", x, dequantize_mxfp4(q), None

    fp8 = quantize_fp8(x)
    yield "fp8", x, dequantize_fp8(fp8), None
    yield "fp8, then mxfp4 EVEN", x, dequantize_mxfp4(quantize_mxfp4(fp8)), None

    q = quantize_mxfp4(x)
    values = dequantize_mxfp4(q)
    by_row, overflows = mxfp4_to_fp8(q)
    yield "mxfp4 to fp8, row", *_aligned("row", values, dequantize_fp8(by_row), overflows)
    data, sf, overflows = mxfp4_to_fp8_columnwise(q, [0, x.shape[0]])
    by_column = data.view(x.shape[1], x.shape[0]).t().float() * sf.repeat_interleave(FP8_GROUP_SIZE, dim=0)
    yield "mxfp4 to fp8, column", *_aligned("column", values, by_column, overflows)


def _aligned(
    name: str, values: torch.Tensor, got: torch.Tensor, overflows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _require(overflows > 0 or torch.equal(got, values), f"mxfp4 to fp8, {name}: not exact without spread overflow")
    return values, got, overflows


def _in_scales(x: torch.Tensor, q: MXFP4Tensor) -> torch.Tensor:
    """Divide each element by its block's scale."""
    scale = torch.exp2(q.sf.double() - E8M0_BIAS)
    return x.double() / scale.repeat_interleave(BLOCK_SIZE, dim=-1)


def _require(holds: torch.Tensor | bool, problem: str) -> None:
    if not holds:
        raise CheckError(problem)


def _json_lines(found: dict[str, dict[str, Loss]], given: argparse.Namespace) -> str:
    about = {
        **harness.about_cpu(NAME),
        "rows": given.rows,
        "columns": given.columns,
        "seed": given.seed,
    }
    lines = [
        {
            **about,
            "source": source,
            "conversion": name,
            "error_percent": loss.percent,
            "spread_overflows": loss.overflows,
        }
        for source, losses in found.items()
        for name, loss in losses.items()
    ]
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def _table(found: dict[str, dict[str, Loss]]) -> str:
    cells = [
        (name, source, f"{loss.percent:.4f}", "-" if loss.overflows is None else str(loss.overflows))
        for source, losses in found.items()
        for name, loss in losses.items()
    ]
    return format_table(("conversion", "source", "error %", "overflows"), cells)


def _multiple(text: str) -> int:
    value = int(text)
    if value <= 0 or value % FP8_GROUP_SIZE:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of {FP8_GROUP_SIZE}, got {value}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m qcomm bench {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=_multiple, default=2048, metavar="N", help="default 2048")
    parser.add_argument("--columns", type=_multiple, default=4096, metavar="N", help="default 4096")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON object a row")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        found = {
            source: measure(make_source(source, given.rows, given.columns, given.seed), given.seed)
            for source in SOURCES
        }
    except CheckError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    print(f"[{given.rows}, {given.columns}] of BF16, seed {given.seed}\n\n{_table(found)}", flush=True)
    if given.json is not None:
        with given.json.open("a") as file:
            file.write(_json_lines(found, given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
