"""The accuracy benchmark: its sums are those of plain loops, and its errors lie where the formats put them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qcomm import exchange, reference, resources
from qcomm.formats import WireFormat

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(resources.find("benchmarks")))

import bench_accuracy  # noqa: E402
import distributions  # noqa: E402
from bench_accuracy import Geometry, Wire  # noqa: E402

PAGE = REPO / "docs" / "accuracy.md"
RESULTS = REPO / "benchmarks" / "results" / "accuracy-cpu.jsonl"
SMALL = Geometry(tokens=32, hidden=512, topk=4, experts=16, ranks=4)
SMALL_FLAGS = ["--tokens", "32", "--hidden", "512", "--topk", "4", "--experts", "16"]
WIRES = {wire.name: wire for wire in bench_accuracy.WIRES}
BITS = {
    "float32": 32,
    "bf16": 16,
    "fp8": 8.25,
    "mxfp4": 4.25,
    "mxfp4, hadamard": 4.25,
    "mxfp4 twice": 8.5,
}
KEYS = {
    "benchmark",
    "command",
    "commit",
    "machine",
    "geometry",
    "seed",
    "source",
    "wire",
    "in_library",
    "bits_per_element",
    "error_percent",
    "bf16_ratio",
}
# Half a unit in the last place, relative to the value: 8 bits of significand, and 4.
BF16_ROUNDING, E4M3_ROUNDING = 2.0**-8, 2.0**-4


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "qcomm", "bench", "accuracy", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def committed_run() -> list[dict[str, Any]]:
    lines = read(RESULTS)
    return [line for line in lines if line["commit"] == lines[-1]["commit"]]


def test_runs_and_orders(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.jsonl"
    done = start(*SMALL_FLAGS, "--seed", "3", "--json", str(path))
    assert done.returncode == 0, done.stderr
    lines = read(path)
    assert all(line.keys() == KEYS for line in lines)
    assert all(line["geometry"] == vars(SMALL) and line["seed"] == 3 for line in lines)
    assert all(line["benchmark"] == "accuracy" and line["command"].endswith(str(path)) for line in lines)
    assert {line["wire"]: line["bits_per_element"] for line in lines} == BITS
    assert {line["wire"] for line in lines if line["in_library"]} == BITS.keys() - {"float32", "mxfp4 twice"}
    # Title, blank line, headers and rule.
    assert len(done.stdout.splitlines()) == 4 + len(lines)
    assert done.stdout.startswith("32 tokens of 512, top-4 of 16 experts on 4 ranks, seed 3\n")

    error = {(line["source"], line["wire"]): line["error_percent"] for line in lines}
    assert error.keys() == {(source, wire) for source in distributions.SOURCES for wire in BITS}
    for line in lines:
        assert line["bf16_ratio"] == pytest.approx(line["error_percent"] / error[line["source"], "bf16"])
    for source in distributions.SOURCES:
        at = {wire: error[source, wire] for wire in BITS}
        # No element is off by more than the rounding; the mean is no less than a third of that.
        assert 100 * BF16_ROUNDING / 3 < at["float32"] < 100 * BF16_ROUNDING
        assert 1.2 * at["float32"] < at["bf16"] < 2 * at["float32"]
        assert 100 * E4M3_ROUNDING / 3 < at["fp8"] < 100 * E4M3_ROUNDING
        assert 2 * at["fp8"] < at["mxfp4"] < 25
        assert at["mxfp4 twice"] < at["mxfp4"] / 5
        assert at["bf16"] < at["mxfp4 twice"] < at["fp8"]
    assert error["outliers", "mxfp4, hadamard"] < 0.8 * error["outliers", "mxfp4"]
    assert error["swiglu", "mxfp4, hadamard"] < 0.9 * error["swiglu", "mxfp4"]
    assert error["gaussian", "mxfp4, hadamard"] == pytest.approx(error["gaussian", "mxfp4"], rel=0.05)


def test_a_seed_gives_its_numbers() -> None:
    first, again, other = (
        bench_accuracy.measure(bench_accuracy.make_layer(SMALL, "swiglu", seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert all(first[wire] != other[wire] for wire in BITS)


@pytest.mark.parametrize("source", distributions.SOURCES)
def test_sums_are_those_of_plain_loops(source: str) -> None:
    """In float64, element by element of the routing; the bf16 wire rounds each rank's sum, and then the output."""
    layer = bench_accuracy.make_layer(SMALL, source, 0)
    total = torch.zeros(SMALL.tokens, SMALL.hidden, dtype=torch.float64)
    magnitudes = torch.zeros_like(total)
    for token in range(SMALL.tokens):
        by_rank: dict[int, torch.Tensor] = {}
        for k in range(SMALL.topk):
            rank = int(layer.topk_idx[token, k]) // (SMALL.experts // SMALL.ranks)
            row = layer.y[token * SMALL.topk + k].double()
            by_rank[rank] = by_rank.get(rank, torch.zeros(())) + float(layer.topk_weights[token, k]) * row
        for part in by_rank.values():
            total[token] += part
            magnitudes[token] += part.abs()
    torch.testing.assert_close(bench_accuracy.exact(layer), total, rtol=1e-12, atol=1e-12)
    # A little more for float32 sums, and for the output's rounding of what is off already.
    off = (bench_accuracy.combine(layer, bench_accuracy.BF16).double() - total).abs()
    assert (off <= 1.01 * BF16_ROUNDING * (total.abs() + magnitudes)).all()
    off = (bench_accuracy.combine(layer, WIRES["float32"]).double() - total).abs()
    assert (off <= 1.01 * BF16_ROUNDING * total.abs() + 1e-5 * magnitudes).all()


def test_routing() -> None:
    layer = bench_accuracy.make_layer(SMALL, "gaussian", 0)
    torch.testing.assert_close(layer.topk_weights.sum(1), torch.ones(SMALL.tokens))
    assert not exchange.bad_routes(layer.topk_idx, SMALL.experts).any()
    owners = layer.topk_idx // (SMALL.experts // SMALL.ranks)
    assert owners.unique().tolist() == list(range(SMALL.ranks))


def test_twice_sends_what_once_leaves() -> None:
    x = distributions.make_source("gaussian", 8, 128, seed=0).float() * 1.1
    once = reference.dequantize_mxfp4(reference.quantize_mxfp4(x))
    rest = reference.dequantize_mxfp4(reference.quantize_mxfp4(x - once))
    assert torch.equal(WIRES["mxfp4"].carry(x), once)
    assert torch.equal(WIRES["mxfp4 twice"].carry(x), once + rest)
    assert not torch.equal(once, once + rest)


def test_bits_count_padding() -> None:
    """A record at hidden 128: 64 bytes of codes, 4 of scales, 12 of padding."""
    assert WIRES["mxfp4"].bits_per_element(128) == 5
    assert Wire("fp8", WireFormat("fp8")).bits_per_element(128) == 9


def test_ranks_without_a_row() -> None:
    errors = bench_accuracy.measure(bench_accuracy.make_layer(Geometry(1, 128, 1, 16, 16), "gaussian", 0))
    # One row of weight 1, which is BF16: nothing is rounded.
    assert errors["float32"] == errors["bf16"] == 0
    assert 0 < errors["fp8"] < errors["mxfp4"]


def test_a_wrong_sum_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    decode = exchange.decode_wire

    def doubled(records: torch.Tensor, wire: WireFormat, hidden: int) -> torch.Tensor:
        return decode(records, wire, hidden) * (2 if wire.kind == "fp8" else 1)

    monkeypatch.setattr(exchange, "decode_wire", doubled)
    monkeypatch.setattr(sys, "argv", ["accuracy", *SMALL_FLAGS])
    assert bench_accuracy.main() == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    assert re.fullmatch(r"wire fp8: \d+ elements of 16384 differ from the oracle's\n", caught.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be positive, got 0"),
        (["--topk", "-1"], "--topk must be positive, got -1"),
        (["--topk", "65"], "--topk must be at most the 64 experts, got 65"),
        (["--hidden", "100"], "--hidden must be a multiple of 128, got 100"),
        (["--experts", "66"], "--experts must be a multiple of the 4 ranks, got 66"),
        (["--ranks", "0"], "--ranks must be positive, got 0"),
        (["--seed", "-1"], "--seed must be in [0, 2**64), got -1"),
        (
            ["--json", "/nowhere/at/all.jsonl"],
            "--json must be a file in a folder that exists, got /nowhere/at/all.jsonl",
        ),
        (["--json", "/"], "--json must be a file in a folder that exists, got /"),
        (["--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the run began")

    monkeypatch.setattr(bench_accuracy, "make_layer", never)
    monkeypatch.setattr(sys, "argv", ["accuracy", *arguments])
    with pytest.raises(SystemExit) as exited:
        bench_accuracy.main()
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_committed_run_is_that_of_its_seed() -> None:
    """Up to what another version of torch may draw or round."""
    lines = {line["wire"]: line for line in committed_run() if line["source"] == "outliers"}
    assert lines.keys() == BITS.keys()
    first = lines["bf16"]
    errors = bench_accuracy.measure(bench_accuracy.make_layer(Geometry(), "outliers", first["seed"]))
    assert first["geometry"] == vars(Geometry())
    for wire, line in lines.items():
        assert line["error_percent"] == pytest.approx(errors[wire], rel=1e-3)


def test_page_has_the_committed_run() -> None:
    block = PAGE.read_text().partition("<!-- bench:accuracy -->\n")[2].partition("<!-- /bench:accuracy -->")[0]
    rows = [line.strip("| ").split(" | ") for line in block.splitlines() if line.startswith("| ")]
    headers, _, *body = rows
    shown = {(row[0], source): cell for row in body for source, cell in zip(headers[2:], row[2:], strict=True)}
    lines = committed_run()
    assert {(line["wire"], line["source"]) for line in lines} == shown.keys()
    for line in lines:
        error, ratio = shown[line["wire"], line["source"]].split()
        assert float(error) == pytest.approx(line["error_percent"], abs=0.0005)
        assert float(ratio.strip("(x)")) == pytest.approx(line["bf16_ratio"], abs=0.05)
    assert {row[0]: float(row[1]) for row in body} == BITS
    assert f"commit {lines[0]['commit'][:12]}" in block
