"""Starting qcomm as its users do: in a process of its own, or several under mpirun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
_MPIRUN = Path(sys.executable).parent / "mpirun"


def mpirun(num_ranks: int) -> tuple[str, ...]:
    """Return what goes before a command for so many ranks, nothing for one; skip the test where there is no mpirun."""
    if num_ranks == 1:
        return ()
    if not _MPIRUN.is_file():
        pytest.skip(f"no mpirun in {_MPIRUN.parent}")
    return (str(_MPIRUN), "-n", str(num_ranks), "--oversubscribe", "--bind-to", "none")


def start(*command: str, on_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "benchmarks")]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
