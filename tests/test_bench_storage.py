"""The storage benchmark: it runs, reports what it says, and ends where a saving breaks what it states."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import need_gpus

from qcomm import reference, resources, storage
from qcomm.tensors import FP8Tensor, MXFP4Tensor

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(resources.find("benchmarks")))

import bench_storage  # noqa: E402

SMALL = ("--tokens", "32", "--hidden", "128", "--intermediate", "128", "--iterations", "2")
KEYS = {
    "benchmark",
    "command",
    "commit",
    "machine",
    "geometry",
    "iterations",
    "seed",
    "saving",
    "held_bytes",
    "peak_bytes",
    "stored_tensors",
    "stored_bytes_before",
    "stored_bytes",
    "forward_p50_ms",
    "total_p50_ms",
    "total_p99_ms",
    "dx_error_percent",
    "dw_error_percent",
}


def start(*arguments: str, on_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    if not on_gpu:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "qcomm", "bench", "storage", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)


def test_runs_and_orders(tmp_path: Path) -> None:
    path = tmp_path / "storage.jsonl"
    done = start(*SMALL, "--json", str(path))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.keys() == KEYS for line in lines)
    # Title, note, blank line, headers and rule.
    assert len(done.stdout.splitlines()) == 5 + len(lines)
    assert "held and peak need CUDA's allocator" in done.stdout

    by_name = {line["saving"]: line for line in lines}
    assert list(by_name) == ["plain", "fp8", "mxfp4", "mxfp4 mlp"]
    plain, fp8, mxfp4, mlp = by_name.values()
    assert plain["stored_tensors"] == plain["dx_error_percent"] == plain["dw_error_percent"] == 0
    assert fp8["stored_tensors"] == mxfp4["stored_tensors"] > mlp["stored_tensors"] > 0
    assert fp8["stored_bytes_before"] == mxfp4["stored_bytes_before"] > mlp["stored_bytes_before"]
    assert fp8["stored_bytes"] == pytest.approx(mxfp4["stored_bytes"] * 8.25 / 4.25)
    assert 0 < fp8["dw_error_percent"] < mxfp4["dw_error_percent"] / 5
    assert 0 < mlp["dw_error_percent"] < mxfp4["dw_error_percent"]
    for line in lines:
        assert line["held_bytes"] is line["peak_bytes"] is None
        assert 0 < line["forward_p50_ms"] < line["total_p50_ms"] <= line["total_p99_ms"]
        assert line["geometry"] == {"tokens": 32, "batch": 1, "hidden": 128, "intermediate": 128}


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    need_gpus(1)
    path = tmp_path / "storage.jsonl"
    done = start("--tokens", "512", "--hidden", "1024", "--json", str(path), on_gpu=True)
    assert done.returncode == 0, done.stderr
    plain, fp8, mxfp4, mlp = (json.loads(line) for line in path.read_text().splitlines())
    assert 0 < mxfp4["held_bytes"] < fp8["held_bytes"] < plain["held_bytes"]
    assert mxfp4["held_bytes"] < mlp["held_bytes"] < plain["held_bytes"]
    assert all(line["held_bytes"] <= line["peak_bytes"] for line in (plain, fp8, mxfp4, mlp))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_codec_is_the_formats(dtype: torch.dtype) -> None:
    x = (torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None]).to(
        dtype
    )
    x[3] = 0
    x[4, 0] = 448.0
    codec = bench_storage.Fp8Codec()
    got, want = codec.encode(x.flatten()), reference.quantize_fp8(x)
    assert torch.equal(got.sf, want.sf)
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
    values = reference.dequantize_fp8(want).to(dtype)
    assert torch.equal(codec.decode(got, dtype), values.flatten())


def small_bench() -> bench_storage.Bench:
    return bench_storage.Bench(bench_storage.Geometry(32, 1, 128, 128), torch.device("cpu"), 0)


class _Broken(storage.MXFP4Codec):
    scale = 0.5

    def decode(self, encoded: MXFP4Tensor, dtype: torch.dtype) -> torch.Tensor:
        return super().decode(encoded, dtype) * self.scale


class _NaN(_Broken):
    scale = float("nan")


class _Large(bench_storage.Fp8Codec):
    def encode(self, x: torch.Tensor) -> FP8Tensor:
        fp8 = super().encode(x)
        return FP8Tensor(fp8.data.repeat(2, 1), fp8.sf.repeat(2, 1))

    def decode(self, encoded: FP8Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows = encoded.shape[0] // 2
        return super().decode(FP8Tensor(encoded.data[:rows], encoded.sf[:rows]), dtype)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (_Broken(), "fp8: gradient error must be at most 0.5 %, got "),
        (_NaN(), "fp8: a gradient is not finite"),
        (_Large(), "fp8: what is stored must take at most 0.515625 of its bytes, got "),
    ],
    ids=["wrong", "nan", "large"],
)
def test_a_broken_saving_is_found(codec: storage.Codec[storage.Encoded], message: str) -> None:
    bench = small_bench()
    saving = bench.savings["plain"][0]
    bench.savings = {
        "plain": (saving, saving),
        "fp8": (lambda: storage.SavedTensors(codec, min_numel=1).active(), contextlib.nullcontext),
    }
    with pytest.raises(bench_storage.CheckError, match=f"^{message}"):
        bench.measure()


def test_a_broken_saving_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench_storage.ERROR_LIMITS, "fp8", 0.0)
    monkeypatch.setattr(sys, "argv", ["storage", *SMALL])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_storage.main() == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith("fp8: gradient error must be at most 0.0 %")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hidden", "100"), "hidden must be a multiple of 128, got 100"),
        (("--iterations", "0"), "iterations must be positive, got 0"),
        (("--batch", "-1"), "batch must be positive, got -1"),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["storage", *arguments])
    with pytest.raises(SystemExit) as caught:
        bench_storage.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
