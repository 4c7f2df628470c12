"""Load Triton kernels from kernels/."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType

from qcomm import resources
from qcomm.errors import QcommUnsupportedError

_SHARED = "fp8_bits"


@functools.cache
def load(name: str) -> ModuleType:
    """Load kernels/NAME.py, and Triton with it.

    Raises:
        QcommUnsupportedError: Triton is not installed.
    """
    try:
        _execute(_SHARED)
        return _execute(name)
    except ModuleNotFoundError as error:
        raise QcommUnsupportedError(
            f"kernels/{name}.py needs Triton (qcomm's extra `cuda`): {error}", phase=f"{name}.load"
        ) from error


@functools.cache
def _execute(name: str) -> ModuleType:
    full_name = f"qcomm_kernels_{name}"
    spec = importlib.util.spec_from_file_location(full_name, resources.find("kernels") / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # By this name the others import what they share.
    sys.modules[full_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full_name]
        raise
    return module
