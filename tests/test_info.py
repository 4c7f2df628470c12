"""`python -m qcomm info`, on this machine and on machines told about."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qcomm
from qcomm import info, nvshmem_build

REPO = Path(__file__).resolve().parents[1]
TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\tSYS\t0-31\t0\t\tN/A\n"
    "GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\tSYS\t X \n\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
)
UUIDS = "0, GPU-aaaa\n1, GPU-bbbb\n2, GPU-cccc\n"
VERSION_HEADER = """
#define NVSHMEM_VENDOR_MAJOR_VERSION 3
#define NVSHMEM_VENDOR_MINOR_VERSION 4
#define NVSHMEM_VENDOR_PATCH_VERSION 5
"""
EXPECTED_ITEMS = [
    "qcomm",
    "python",
    "torch",
    "peer access",
    "NVLink",
    "NVSHMEM host library",
    "NVSHMEM headers",
    "nvshmem4py",
    "mpi4py",
    "MPI library",
    "mpirun",
    "NCCL",
    "CuPy",
    "NVRTC",
    "nvcc",
    "compile cache",
    "tuning table",
    "backend",
]


def run_info(*args: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qcomm", "info", *args],
        env={**os.environ, "PYTHONPATH": str(REPO), **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def three_gpus(monkeypatch: pytest.MonkeyPatch, visible: tuple[str, ...] = ("aaaa", "bbbb", "cccc")) -> None:
    def properties(index: int) -> SimpleNamespace:
        return SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 * 2**30, uuid=visible[index])

    def output(*command: str) -> str:
        return TOPOLOGY if "topo" in command else UUIDS

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(info, "_output", output)


def found() -> dict[str, info.Row]:
    return {row.name: row for row in info.rows()}


def test_table() -> None:
    lines = run_info().splitlines()
    assert lines[0].split() == ["item", "value", "note"]
    for item in EXPECTED_ITEMS:
        assert any(line.startswith(f"{item} ") for line in lines), item
    assert any(line.startswith("backend ") and "auto takes" in line for line in lines)


def test_json() -> None:
    report = json.loads(run_info("--json"))
    assert set(EXPECTED_ITEMS) <= set(report)
    assert report["qcomm"]["value"] == qcomm.__version__
    assert report["torch"]["value"] == torch.__version__
    assert all(set(entry) == {"value", "note"} for entry in report.values())


def test_machine_without_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("cuda", "cuda.bindings", "cuda.pathfinder"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = found()
    for item in ("GPU", "NVLink", "NVSHMEM host library", "NVSHMEM headers", "nvshmem4py", "mpi4py", "MPI library"):
        assert rows[item].value == info.NONE, item
        assert rows[item].note, item
    for item in ("mpirun", "NCCL", "CuPy", "NVRTC"):
        assert rows[item].value == info.NONE, item
    assert rows["backend"].value == "collective"


def test_no_item_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError("libcuda.so.1 is from another driver\nsecond line")

    three_gpus(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", broken)
    rows = found()
    for item in ("GPU 0", "GPU 2", "peer access", "NVLink"):
        assert rows[item].value == info.UNKNOWN
        assert rows[item].note == "OSError: libcuda.so.1 is from another driver"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    three_gpus(monkeypatch)
    rows = found()
    assert rows["GPU 0"].value == "NVIDIA H200"
    assert rows["GPU 0"].note == "compute capability 9.0, 139.0 GiB, supported"
    assert rows["peer access"].value == "all pairs"
    assert rows["NVLink"].value == "1 of 3 pairs"
    assert rows["NVLink"].note == "0-1; nvidia-smi topo: NV18, SYS"


def test_nvlink_follows_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    three_gpus(monkeypatch, visible=("bbbb", "aaaa"))
    assert found()["NVLink"].value == "all pairs"
    three_gpus(monkeypatch, visible=("cccc", "aaaa"))
    assert found()["NVLink"].value == info.NONE


def test_old_gpu_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(name="NVIDIA A100", major=8, minor=0, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: old)
    assert "not supported: the nvlink backend needs compute capability 9.0" in found()["GPU 0"].note


def test_topology() -> None:
    links = info.parse_topology(TOPOLOGY)
    assert links[0, 1] == links[1, 0] == "NV18"
    assert links[0, 2] == links[2, 1] == "SYS"
    assert len(links) == 9
    assert info.parse_topology("") == {}


def test_nvshmem_version() -> None:
    assert nvshmem_build.nvshmem_version(VERSION_HEADER) == "3.4.5"
    with pytest.raises(ValueError, match="NVSHMEM_VENDOR_MAJOR_VERSION"):
        nvshmem_build.nvshmem_version("")


@pytest.mark.parametrize(
    ("version", "verdict"), [("3.4.5", "as the host library"), ("3.5.0", "NOT as the host library")]
)
def test_nvshmem_agreement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, verdict: str) -> None:
    header = tmp_path / "nvshmem_version.h"
    header.write_text(VERSION_HEADER)
    monkeypatch.setattr(info, "_first_installed", lambda *packages: ("nvidia-nvshmem-cu13", version))
    monkeypatch.setattr(info, "_file_of", lambda package, prefix: header if prefix == header.name else None)
    rows = found()
    assert rows["NVSHMEM headers"].value == "3.4.5"
    assert rows["NVSHMEM headers"].note.startswith(f"{verdict}, {version}")
    assert rows["NVSHMEM host library"].value == version
