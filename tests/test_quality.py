"""The quality benchmark: it runs, and its errors are ordered as the formats say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qcomm import reference, resources
from qcomm.formats import Rounding, ScaleRule
from qcomm.tensors import MXFP4Tensor

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(resources.find("benchmarks")))

import bench_quality  # noqa: E402
import distributions  # noqa: E402

KEYS = {
    "benchmark",
    "command",
    "commit",
    "machine",
    "rows",
    "columns",
    "seed",
    "source",
    "conversion",
    "error_percent",
    "spread_overflows",
}


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "qcomm", "bench", "quality", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)


def test_runs_and_orders(tmp_path: Path) -> None:
    path = tmp_path / "quality.jsonl"
    done = start("--rows", "256", "--columns", "512", "--json", str(path))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.keys() == KEYS for line in lines)
    # Title, blank line, headers and rule.
    assert len(done.stdout.splitlines()) == 4 + len(lines)
    assert "gaussian" in done.stdout

    error = {(line["source"], line["conversion"]): line["error_percent"] for line in lines}
    assert {source for source, _ in error} == set(distributions.SOURCES)
    assert error["gaussian", "mxfp4 EVEN"] <= error["gaussian", "mxfp4 FLOOR"]
    assert error["outliers", "mxfp4 EVEN, hadamard"] < 0.7 * error["outliers", "mxfp4 EVEN"]
    for source in distributions.SOURCES:
        assert 0 < error[source, "fp8"] < error[source, "mxfp4 EVEN"] / 10
        assert error[source, "mxfp4 EVEN"] < error[source, "mxfp4 CEIL"]
        assert error[source, "mxfp4 EVEN"] < error[source, "fp8, then mxfp4 EVEN"]
        assert error[source, "mxfp4 RCEIL"] < error[source, "mxfp4 RCEIL, stochastic"]
        assert error[source, "mxfp4 to fp8, row"] == error[source, "mxfp4 to fp8, column"] == 0
    for line in lines:
        want = 0 if "to fp8" in line["conversion"] else None
        assert line["spread_overflows"] == want


def test_chunks_draw_their_own_random_bits() -> None:
    x = distributions.make_source("gaussian", 256, 128, seed=1)
    whole = reference.quantize_mxfp4(x, ScaleRule.RCEIL, Rounding.STOCHASTIC, seed=1)
    values = reference.dequantize_mxfp4(whole).double()
    want = 100 * (x.double() - values).square().sum() / x.double().square().sum()
    assert bench_quality.measure(x, 1)["mxfp4 RCEIL, stochastic"].percent == pytest.approx(want.item())


def test_spread_overflows_are_counted() -> None:
    x = torch.ones(128, 128, dtype=torch.bfloat16)
    x[:, :32] *= 2.0**-20
    loss = bench_quality.measure(x, 0)["mxfp4 to fp8, row"]
    assert loss.overflows == 128
    assert loss.error > 0


def test_a_broken_conversion_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def off_by_a_code(x: MXFP4Tensor) -> object:
        return reference.mxfp4_to_fp8(MXFP4Tensor(x.qdata ^ 1, x.sf))

    monkeypatch.setattr(bench_quality, "mxfp4_to_fp8", off_by_a_code)
    monkeypatch.setattr(sys, "argv", ["quality", "--rows", "128", "--columns", "128"])
    assert bench_quality.main() == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "row: not exact without spread overflow" in caught.err


def test_wrong_usage() -> None:
    done = start("--rows", "100")
    assert done.returncode == 2
    assert "must be a positive multiple of 128, got 100" in done.stderr


@pytest.mark.parametrize("distance", range(20))
def test_exactness_theorem(distance: int) -> None:
    """docs/formats.md: all codes are exact up to distance 14, beyond it those it names are not."""
    codes = torch.tensor([c | (c + 1) << 4 for c in range(0, 16, 2)], dtype=torch.uint8)
    qdata = torch.zeros(1, 64, dtype=torch.uint8)
    qdata[0, :16] = 0x77
    qdata[0, 16:24] = codes
    x = MXFP4Tensor(qdata, torch.tensor([[200, 200 - distance, 0, 0]], dtype=torch.uint8))
    got, overflows = reference.mxfp4_to_fp8(x)
    part = reference.dequantize_fp8(got)[0, 32:48]
    want = reference.dequantize_mxfp4(x)[0, 32:48]
    inexact = (part != want).nonzero().flatten().tolist()
    assert int(overflows) == (distance > 14)
    assert bool(inexact) == (distance > 14)
    if distance == 15:
        assert inexact == [1, 3, 9, 11]
    assert (got.data.view(torch.uint8)[0, 32:48] >> 7).tolist() == [0] * 8 + [1] * 8
    assert bool(part.any()) == (distance < 19)
