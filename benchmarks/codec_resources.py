"""Registers, spills and shared memory of the kernels of `bench codec`, of those that its calls launch."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import codec_report
from codec_inputs import Entry, Inputs, Name
from codec_report import Line

from qcomm import jit
from qcomm.ops import codec, swiglu

_BYTES_PER_SPILL = 4


class Launches(NamedTuple):
    """Kernels in the order of their launches: specs of CUDA's; names of Triton's, each with what it compiled to."""

    cuda: list[jit.KernelSpec]
    triton: list[tuple[str, Any]]


def resources(entries: Sequence[Entry], inputs: Inputs, arch: str) -> list[Line]:
    """Compile the kernels of every entry, CUDA's as many at a time as there are cores; return what each takes."""
    launches: dict[Name, Launches] = {}
    for entry in entries:
        case = entry.make(inputs)
        with recorded() as launches[entry.name]:
            case.call()
    specs = list(dict.fromkeys(spec for made in launches.values() for spec in made.cuda))

    def compiled(spec: jit.KernelSpec) -> jit.ResourceUsage:
        # The launchers find it in the cache then.
        jit.cubin_path(spec, arch)
        return jit.resource_usage(spec, arch)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        usage = dict(zip(specs, pool.map(compiled, specs), strict=True))
    lines = []
    for name, made in launches.items():
        for spec in made.cuda:
            taken = usage[spec]
            numbers = taken.registers, taken.spill_bytes, taken.static_shared_bytes
            lines.append(codec_report.resources_line(name, spec.name, *numbers))
        for function, kernel in made.triton:
            numbers = kernel.n_regs, _BYTES_PER_SPILL * kernel.n_spills, kernel.metadata.shared
            lines.append(codec_report.resources_line(name, function, *numbers))
    return lines


@contextlib.contextmanager
def recorded() -> Iterator[Launches]:
    """Note what is launched in the block. CUDA's kernels are not run; Triton's are, which compiles them."""
    launches = Launches([], [])
    kernels = swiglu.kernels

    def recorders() -> _Recorders:
        return _Recorders(kernels(), launches)

    def note(spec: jit.KernelSpec, *rest: object) -> None:
        launches.cuda.append(spec)

    with mock.patch.object(codec, "launch", note), mock.patch.object(swiglu, "kernels", recorders):
        yield launches


class _Recorders:
    """Stands for the module of Triton's kernels."""

    def __init__(self, functions: object, launches: Launches) -> None:
        self._functions, self._launches = functions, launches

    def __getattr__(self, name: str) -> _Recorder:
        return _Recorder(name, getattr(self._functions, name), self._launches)


class _Recorder:
    """Stands for a kernel of Triton."""

    def __init__(self, name: str, function: Any, launches: Launches) -> None:
        self._name, self._function, self._launches = name, function, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self._launches.triton.append((self._name, self._function[grid](*arguments, **options)))

        return launch
