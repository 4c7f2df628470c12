"""The benchmark of the layer to train: what it prints, that wrong results end it, and that memory is as stated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import in_turn, mpirun, start
from ranks import need_gpus

from qcomm import resources

sys.path.insert(0, str(resources.find("benchmarks")))

import layer_memory

from qcomm.moe import MoEConfig

LAYERS = ["nccl once", "nccl pairs", "bf16", "fp8", "paper", "aggressive"]
WRONG_BASELINE = """
import sys
import layer_nccl, bench_layer
right = layer_nccl._swiglu_gradients
def wrong(d_h, gate_up, weights):
    d_gate_up, d_weights = right(d_h, gate_up, weights)
    return 1.1 * d_gate_up, d_weights
layer_nccl._swiglu_gradients = wrong
sys.exit(bench_layer.main())
"""


def bench(*arguments: str, num_ranks: int = 2, on_gpu: bool = False) -> str:
    command = [*mpirun(num_ranks), sys.executable, "-m", "qcomm", "bench", "layer", *arguments]
    done = start(*command, on_gpu=on_gpu)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def sections(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        found.setdefault(line["section"], []).append(line)
    return found


def check_times(lines: list[dict[str, Any]]) -> None:
    assert [line["layer"] for line in lines] == LAYERS
    by_name = {line["layer"]: line for line in lines}
    fastest = min(by_name[name]["total_p50_us"] for name in LAYERS[:2])
    for line in lines:
        assert line["nccl_ratio"] == pytest.approx(fastest / line["total_p50_us"])
        assert line["comm_share"] == pytest.approx(line["comm_total_p50_us"] / line["total_p50_us"])
        assert min(line["forward_p50_us"], line["backward_p50_us"], line["comm_forward_p50_us"]) > 0
    assert 0 < by_name["fp8"]["errors"]["out"] < by_name["paper"]["errors"]["out"]
    assert by_name["paper"]["errors"]["x"] < by_name["aggressive"]["errors"]["x"]


def check_memory(lines: list[dict[str, Any]]) -> None:
    assert [(line["keep"], line["recompute"]) for line in lines] == [
        (keep, recompute) for recompute in ("none", "swiglu") for keep in ("bf16", "fp8", "mxfp4")
    ]
    for line in lines:
        assert line["held"] == line["rows"] + line["rest"]
        assert line["rows"] > 0
    bf16, _, mxfp4 = lines[3:]
    # Rows alone, in bytes an element: 2, and 1/2 with a scale of a byte for 32.
    assert mxfp4["rows"] / bf16["rows"] == pytest.approx((1 / 2 + 1 / 32) / 2, rel=0.02)
    assert mxfp4["of_bf16"] <= 0.28
    assert mxfp4["of_fp8"] <= 0.54


@pytest.mark.mpi
def test_runs(tmp_path: Path) -> None:
    path = tmp_path / "layer.jsonl"
    out = bench("--topk", "4", "--iterations", "1", "--json", str(path))
    found = sections(path)
    assert list(found) == ["time", "product", "memory"]
    check_times(found["time"])
    check_memory(found["memory"])
    assert [(line["product"], line["operands"], line["backend"], line["taken"]) for line in found["product"]] == [
        (product, operands, "reference", True) for operands in ("bf16", "fp8") for product in ("mm", "wgrad")
    ]
    for line in (line for lines in found.values() for line in lines):
        assert line["command"].startswith("mpirun -n 2 python -m qcomm bench layer --topk 4")
        assert line["geometry"] == {"tokens": 64, "hidden": 256, "topk": 4, "experts": 8, "intermediate": 128}
    assert "products: mm bf16 by reference" in out


def test_one_rank_and_parts(tmp_path: Path) -> None:
    path = tmp_path / "layer.jsonl"
    bench("--skip", "times,products", "--json", str(path), num_ranks=1)
    assert list(sections(path)) == ["memory"]


def test_a_wrong_result_ends_the_run() -> None:
    done = start(sys.executable, "-c", WRONG_BASELINE)
    assert done.returncode == 1
    assert "layer " not in done.stdout.splitlines()[-1]
    assert "rank 0: bf16: the relative error of w1 must be at most 0.02, got 0.09" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "200"], "hidden must be a multiple of 128, got 200"),
        (["--intermediate", "64"], "intermediate must be a multiple of 128, got 64"),
        (["--iterations", "0"], "iterations must be positive, got 0"),
        (["--presets", "fp5"], "got 'fp5'"),
        (["--largest-batch"], "--largest-batch needs CUDA"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    done = in_turn("bench", "layer", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_largest_batch_bisects(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def peak(member: object, layer: object, x: torch.Tensor, stack: int) -> int:
        tried.append(x.shape[0])
        return 100 * x.shape[0] * stack

    monkeypatch.setattr(layer_memory, "_peak", peak)
    member, layer = (type("Stub", (), values) for values in _stubs())
    for budget, want in ((100 * 2 * 1280, 1280), (100 * 2 * 1279, 1152), (0, 0), (10**9, 4096)):
        got = layer_memory.largest_batch(member, layer, 4096, budget, 2, 0)  # type: ignore[arg-type]
        assert got == want
    assert len(tried) <= 4 * 6


def _stubs() -> tuple[dict[str, Any], dict[str, Any]]:
    return {"device": torch.device("cpu"), "rank": 0}, {"config": MoEConfig(128, 128, 4, 2)}


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_on_gpus(num_ranks: int, tmp_path: Path) -> None:
    need_gpus(num_ranks)
    path = tmp_path / "layer.jsonl"
    sizes = ["--tokens", "512", "--hidden", "1024", "--intermediate", "512", "--iterations", "3"]
    limits = ["--largest-batch", "--budget-gib", "0.5", "--stack", "4", "--most-tokens", "4096"]
    bench(*sizes, *limits, "--json", str(path), num_ranks=num_ranks, on_gpu=True)
    found = sections(path)
    check_times(found["time"])
    check_memory(found["memory"])
    bf16, fp8, mxfp4 = (line["tokens"] for line in found["largest"])
    assert 0 < bf16 <= fp8 <= mxfp4
