"""`python -m qcomm simulate`: tables, JSON lines, plot and calibration, and that its committed lines are its own."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import REPO, in_turn

from qcomm import resources, scaling
from qcomm.config import BufferConfig
from qcomm.formats import WirePrecision
from qcomm.records import nodes_layout, symmetric_layout
from qcomm.topology import Topology

sys.path.insert(0, str(resources.find("benchmarks")))

import simulate

RESULTS = REPO / "benchmarks" / "results"
MEASURED = [str(RESULTS / f"{name}-h100-x4.jsonl") for name in ("dispatch", "combine", "decode")]
TINY = ["--gpus", "2", "--tokens", "24", "--hidden", "128", "--experts", "8", "--topk", "2"]
COMMITTED = [RESULTS / "scaling.jsonl", RESULTS / "scaling-skewed.jsonl"]


def run(*arguments: str, code: int = 0) -> str:
    done = in_turn("simulate", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run(tmp_path: Path) -> None:
    path, plot, again = (tmp_path / name for name in ("s.jsonl", "s.svg", "again.svg"))
    drawing = ["--plot", str(plot)] if importlib.util.find_spec("matplotlib") else []
    shown = run("--nodes", "1,3,8", *TINY, "--wire", "mxfp4,bf16", "--json", str(path), *drawing)
    lines = read(path)
    traffic = [line for line in lines if line["kind"] == "traffic"]
    memory = [line for line in lines if line["kind"] == "memory"]
    assert len(traffic) == 3 * 2 * 2 * 2
    assert len(memory) == 3 * 2 * 3
    # The smallest multiple of the ranks that is at least 8.
    assert {line["num_nodes"]: line["geometry"]["experts"] for line in lines} == {1: 8, 3: 12, 8: 16}
    assert "top-2 of 8, 12, 16 experts" in shown
    for line in traffic:
        assert line["expected_us"] > line["expected_fixed_us"] > 0
        assert (line["rdma_out_bytes"] > 0) == (line["num_nodes"] > 1)
        record_bytes = {"mxfp4": 80, "bf16": 256}[line["wire"]]
        assert line["record_bytes"] == record_bytes
        assert line["metadata_bytes"] == (32 if line["op"] == "dispatch" else 0)
        assert line["rdma_out_bytes"] == line["rdma_out_records"] * (record_bytes + line["metadata_bytes"])
        assert line["rdma_out_logical_bytes"] == line["rdma_out_records"] * 256
        assert (line["sampled_tokens"], line["standard_error"]) == (24, 0)
        assert (line["relayed_records"] > 0) == (line["form"] == "hierarchical" and line["num_nodes"] > 1)
    for line in memory:
        assert f"{line['symmetric_bytes'] / 2**30:.3f}" in shown
    if drawing:
        run("--from", str(path), "--plot", str(again))
        assert again.read_bytes() == plot.read_bytes()


def test_rates_and_samples(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    usual = [*TINY, "--nodes", "4", "--wire", "fp8", "--routing", "skewed", "--json", str(path)]
    run(*usual)
    run(*usual, "--nvlink-gbs", "1", "--rdma-gbs", "0.5")
    run(*usual, "--sample", "6")
    found = [line for line in read(path) if line["kind"] == "traffic" and line["form"] == "flat"]
    base, slow, sampled = (found[2 * number] for number in range(3))
    rates = scaling.calibrated()
    assert slow["expected_rdma_us"] == pytest.approx(base["expected_rdma_us"] * rates.rdma_gbs / 0.5)
    assert slow["expected_nvlink_us"] == pytest.approx(base["expected_nvlink_us"] * rates.nvlink_gbs)
    assert base["standard_error"] == 0 < sampled["standard_error"]
    assert sampled["sampled_tokens"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "num_nodes must be positive, got 0"),
        (["--hidden", "100"], "hidden must be a multiple of 128, got 100"),
        (["--topk", "300"], "num_topk must be at most num_experts = 256, got 300"),
        (["--rdma-gbs", "0"], "must be positive, got 0"),
        (["--sample", "-1"], "--sample must be positive, got -1"),
        (["--from", "x.jsonl"], "--from FILE needs --plot FILE"),
        (["--update", "x.json"], "--update FILE needs --calibrate FILE"),
        (["--calibrate", "nosuch.jsonl"], "nosuch.jsonl"),
        (["--calibrate", str(RESULTS / "codec-h200.jsonl")], "at least 4 measured calls of dispatch, got 0"),
    ],
)
def test_wrong_use(arguments: list[str], message: str) -> None:
    done = in_turn("simulate", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_calibration_writes_what_ships(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    shown = run("--calibrate", *MEASURED, "--update", str(path))
    assert path.read_text() == scaling.CALIBRATION.read_text()
    assert "expected us" in shown


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_lines_are_what_it_says(path: Path, tmp_path: Path) -> None:
    """Those of few nodes, which take no time; all have the same command."""
    committed = [line for line in read(path) if line["num_nodes"] <= 2]
    again = tmp_path / "again.jsonl"
    routing = committed[0]["routing"]
    run("--nodes", "1,2", "--routing", routing, "--json", str(again))
    found = read(again)
    assert len(found) == len(committed) > 0
    for line, wanted in zip(found, committed, strict=True):
        assert line.keys() == wanted.keys()
        for key in line.keys() - {"command", "commit"}:
            exact = not isinstance(line[key], float)
            assert line[key] == (wanted[key] if exact else pytest.approx(wanted[key])), key


def _bytes_of_64_ranks(config: BufferConfig, *, forwards: bool) -> int:
    return symmetric_layout(config, 64, nodes_layout(config, Topology(64, 8), forwards=forwards)).num_bytes


def test_memory_of_64_ranks() -> None:
    """The figures that docs/scaling.md states, by the allocator's own formula."""
    text = (REPO / "docs" / "scaling.md").read_text()
    for name, precision in {"": WirePrecision(), "paper": WirePrecision.paper()}.items():
        config = BufferConfig(256, 8, 7168, 4096, precision, "nvlink", "nvshmem", "cuda")
        sizes = [_bytes_of_64_ranks(config, forwards=forwards) for forwards in (False, True)]
        call = f"WirePrecision.{name}()" if name else "WirePrecision()"
        (row,) = re.findall(rf"^\| `{re.escape(call)}` \|(.*)\|$", text, re.MULTILINE)
        assert [cell.strip() for cell in row.split("|")] == [f"{num_bytes / 2**30:.2f} GiB" for num_bytes in sizes]
    for line in (line for line in read(COMMITTED[0]) if line["kind"] == "memory" and line["num_nodes"] == 8):
        wire = line["precision"]
        precision = WirePrecision.paper() if wire == "paper" else WirePrecision(*[wire] * 4)
        config = BufferConfig(256, 8, 7168, 4096, precision, "nvlink", "nvshmem", "cuda")
        assert line["geometry"] == {"tokens": 4096, "hidden": 7168, "topk": 8, "experts": 256}
        assert line["symmetric_bytes"] == _bytes_of_64_ranks(config, forwards=line["form"] == "hierarchical")


def test_precisions() -> None:
    assert dict(simulate.precisions(["fp8"])) == {
        "fp8": WirePrecision("fp8", "fp8", "fp8", "fp8"),
        "paper": WirePrecision.paper(),
    }
