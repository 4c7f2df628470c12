"""Ranks started by mpirun and by torchrun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs" / "exchange_once.py"
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def _launch(command: list[str], num_ranks: int, **environment: str) -> None:
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    for rank in range(num_ranks):
        assert f"rank {rank} (local {rank}) of {num_ranks}: ok" in done.stdout


@pytest.mark.mpi
def test_mpirun() -> None:
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is neither beside python nor on PATH")
    flags = ["-n", "3", "--oversubscribe", "--bind-to", "none"]
    _launch([mpirun, *flags, sys.executable, str(PROGRAM), "mpirun", "3"], 3)


@pytest.mark.mpi
def test_mpich() -> None:
    mpich = Path(sys.prefix) / "mpich"
    mpiexec = mpich / "bin" / "mpiexec.hydra"
    if not mpiexec.exists():
        pytest.skip(f"needs MPICH in {mpich}, where make venv puts it")
    command = [str(mpiexec), "-n", "3", sys.executable, str(PROGRAM), "mpirun", "3"]
    _launch(command, 3, MPI4PY_LIBMPI=str(mpich / "lib" / "libmpi.so.12"))


def test_torchrun() -> None:
    flags = ["--standalone", "--nproc-per-node", "2"]
    _launch([sys.executable, "-m", "torch.distributed.run", *flags, str(PROGRAM), "torchrun", "2"], 2)


def test_single_process() -> None:
    _launch([sys.executable, str(PROGRAM), "single", "1"], 1)
