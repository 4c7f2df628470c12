"""Run Triton kernels in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]


def outcomes(module: str, calls: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what `run_interpreted` of a test module makes of each call; skips the test without Triton."""
    pytest.importorskip("triton", reason="Triton, whose wheels exist for Linux only, is not installed")
    torch.save(calls, folder / "calls.pt")
    command = [sys.executable, str(REPO / "tests/programs/run_interpreted.py"), module]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [*command, str(folder / "calls.pt"), str(folder / "results.pt")],
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    return results
