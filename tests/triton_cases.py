"""Triton kernels without a GPU: in Triton's interpreter, in a process of its own; and compiled for Hopper."""

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


def compile_for_hopper(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], num_warps: int) -> Any:
    """Compile a kernel as a launch with aligned tensors does.

    Args:
        kernel: a `triton.jit` function.
        pointers: the type of each pointer, such as "*i32"; every other argument that is no constant is an int32.
        constants: values of constants; None stands for a tensor that is not there.
        num_warps: of a program.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    anyhow = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    aligned = [n for n in names if signature[n].startswith("*") and n not in anyhow]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, dict(constants), attributes)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
