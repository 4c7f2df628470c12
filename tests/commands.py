"""Starting qcomm as its users do: in a process of its own, or several under mpirun."""

from __future__ import annotations

import functools
import json
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
    return subprocess.run(command, env=_environ(on_gpu), capture_output=True, text=True, timeout=240, check=False)


def in_turn(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m qcomm` with these arguments on the CPU, in a process that does all such calls of a session.

    For the many that end before they do much: a process of its own would be importing torch most of its time.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(arguments), file=server.stdin, flush=True)
    code, out, err = json.loads(server.stdout.readline())
    return subprocess.CompletedProcess(arguments, code, out, err)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Start the process of `in_turn`; it ends with this one, whose end of the pipe closes."""
    program = str(REPO / "tests/programs/in_turn.py")
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, program], env=_environ(False), stdin=pipe, stdout=pipe, text=True)


def _environ(on_gpu: bool) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "benchmarks")]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}),
    }
