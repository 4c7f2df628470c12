"""Compile, cache and load the CUDA kernels.

NVRTC compiles a file of the kernels folder for one set of constants, which the file sees as `QCOMM_*` macros; the
cubin is kept on disk under a name that covers the sources, the constants, the architecture and NVRTC's version, so that
a second process compiles nothing.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import io
import os
import pathlib
import re
import tempfile
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from qcomm import nvshmem_build, resources
from qcomm.errors import QcommUnsupportedError

CACHE_VARIABLE = "QCOMM_CACHE_DIR"
SM_SHARED_BYTES = 228 * 1024
RESERVED_SHARED_BYTES = 1024
"""What a block costs of an SM's besides its own."""
MORE_THAN_HALF = SM_SHARED_BYTES // 2 - RESERVED_SHARED_BYTES + 128
"""Shared memory of a block beside which an SM takes no second one like it; SMs give out 128 bytes at a time."""
_MAX_CARVEOUT = 100
_IMPORTS = threading.Lock()
"""cuda-core cannot be imported by two threads at once."""


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """A kernel of one file, specialised.

    Attributes:
        file: name in the kernels folder, without suffix.
        name: the `extern "C"` function.
        constants: sorted (name, value) pairs; the file sees `QCOMM_<NAME>`.
    """

    file: str
    name: str
    constants: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, file: str, name: str, **constants: int) -> KernelSpec:
        """Build a spec from keyword constants."""
        return cls(file, name, tuple(sorted((key.upper(), int(value)) for key, value in constants.items())))

    def with_constants(self, constants: Mapping[str, int]) -> KernelSpec:
        """Return the spec with some of its constants changed."""
        return KernelSpec.of(self.file, self.name, **{k.lower(): v for k, v in self.constants} | dict(constants))

    @property
    def uses_nvshmem(self) -> bool:
        """Whether the kernel calls NVSHMEM's device functions."""
        return bool(dict(self.constants).get("NVSHMEM"))


def kernels_dir() -> pathlib.Path:
    """Return the folder of the kernel sources."""
    return resources.find("kernels")


def cache_dir() -> pathlib.Path:
    """Return the folder of compiled kernels: $QCOMM_CACHE_DIR, or qcomm in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(os.environ[CACHE_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "qcomm"


@dataclasses.dataclass(frozen=True)
class ResourceUsage:
    """What one kernel takes, as ptxas reports it.

    Attributes:
        registers: per thread.
        spill_bytes: stored per thread in local memory for want of registers.
        static_shared_bytes: per block; dynamic shared memory, and the 1 KiB that CUDA takes for itself, come on top.
    """

    registers: int
    spill_bytes: int
    static_shared_bytes: int


def compile_cubin(spec: KernelSpec, arch: str) -> bytes:
    """Compile a spec for an architecture such as "sm_90"; needs NVRTC but no GPU.

    Raises:
        QcommUnsupportedError: NVRTC is missing, or refuses the source; holds its log.
    """
    return _compile(spec, arch, None)


def resource_usage(spec: KernelSpec, arch: str) -> ResourceUsage:
    """Compile a spec and return what its kernel takes; needs NVRTC but no GPU.

    Raises:
        QcommUnsupportedError: as for `compile_cubin`.
    """
    log = io.StringIO()
    _compile(spec, arch, log)
    # A file may hold several kernels; each has its lines after the one that names it.
    parts = re.split(r"Compiling entry function '(\w+)'", log.getvalue())
    lines = dict(zip(parts[1::2], parts[2::2], strict=True))[spec.name]

    def number(pattern: str) -> int:
        found = re.search(pattern, lines)
        return int(found[1]) if found else 0

    return ResourceUsage(
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill stores"),
        static_shared_bytes=number(r"(\d+) bytes smem"),
    )


def cubin_path(spec: KernelSpec, arch: str) -> pathlib.Path:
    """Return where the spec's cubin is kept; compiles it if it is not there yet.

    Safe among processes: a cubin is written whole under another name, then renamed.
    """
    key = repr((spec, arch, _sources_digest(), _nvrtc_version(), _nvshmem_build(spec)))
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = cache_dir() / f"{spec.name}-{arch}-{digest}.cubin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        cubin = compile_cubin(spec, arch)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = pathlib.Path(scratch) / path.name
            whole.write_bytes(cubin)
            os.replace(whole, path)
    return path


class Kernel:
    """A loaded kernel.

    One that waits, and those it waits for, ask for the largest shared-memory carveout. An SM changes its carveout only
    when it is empty: a kernel that waits for another one's sends, running under a small carveout, would keep that one
    out for good. Others leave the choice to the driver, which gives L1 what shared memory does not need.
    """

    def __init__(self, function: Any, waits: bool) -> None:
        from cuda.bindings import driver

        self._function, self._driver = function, driver
        self._success = driver.CUresult.CUDA_SUCCESS
        if waits:
            function.preferred_shared_memory_carveout = _MAX_CARVEOUT
        self._handle = int(function.kernel.ptr)
        self._static_shared_bytes, self._shared_bytes = int(function.shared_size_bytes), 0
        self._early_config: Any = None

    def launch(
        self,
        grid: int,
        block: int,
        shared_bytes: int,
        stream: int,
        params: ctypes.Structure,
        *,
        early: bool = False,
        alone: bool = False,
    ) -> None:
        """Launch on a stream handle with the one parameter every kernel of qcomm takes, a structure.

        One that is `early` begins when the kernel before it on the stream lets it, if that does, not when it ends. Not
        so where torch fills what it allocates: that kernel would be the one before it. No SM has two blocks of one that
        is `alone`.
        """
        driver = self._driver
        if alone:
            shared_bytes = max(shared_bytes, MORE_THAN_HALF - self._static_shared_bytes)
        early = early and not torch.are_deterministic_algorithms_enabled()
        # Also below the 48 KiB that need no permission, because those count what the kernel itself declares. Another
        # buffer's loader may have the same function, which needs what the hungrier of the two takes.
        if shared_bytes > self._shared_bytes:
            self._shared_bytes = max(shared_bytes, self._function.max_dynamic_shared_size_bytes)
            self._function.max_dynamic_shared_size_bytes = self._shared_bytes
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        kernel_params = ctypes.addressof(pointers)

        def launch() -> Any:
            if early:
                config = self._early(grid, block, shared_bytes, stream)
                return driver.cuLaunchKernelEx(config, self._handle, kernel_params, 0)
            return driver.cuLaunchKernel(self._handle, grid, 1, 1, block, 1, 1, shared_bytes, stream, kernel_params, 0)

        (result,) = launch()
        if result == self._success:
            return
        if result == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            # A thread that has not used CUDA yet, as autograd's may be, has no context; torch too sets it when needed.
            _, context = driver.cuDevicePrimaryCtxRetain(torch.cuda.current_device())
            driver.cuCtxSetCurrent(context)
            (result,) = launch()
        if result != self._success:
            raise QcommUnsupportedError(f"launching a kernel failed: {result}", phase="launch", seen=result)

    def _early(self, grid: int, block: int, shared_bytes: int, stream: int) -> Any:
        """Describe an early launch: its dependence on the kernel before it is programmatic."""
        config = self._early_config
        if config is None:
            driver = self._driver
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config = self._early_config = driver.CUlaunchConfig()
            config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
            config.attrs, config.numAttrs = [attribute], 1
        config.gridDimX, config.blockDimX = grid, block
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        return config


class KernelLoader:
    """Loads kernels for one device and remembers them; `waits` as in `Kernel`, for all of them.

    `specialise` changes every spec first.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        waits: bool,
        specialise: Callable[[KernelSpec], KernelSpec] = lambda spec: spec,
    ) -> None:
        self._waits, self._specialise = waits, specialise
        self._arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        self._kernels: dict[tuple[Hashable, ...], Kernel] = {}

    def get(self, make_spec: Callable[..., KernelSpec], *args: Hashable) -> Kernel:
        """Return the kernel of `make_spec(*args)`, compiling and loading it at first use."""
        key = (make_spec, *args)
        kernel = self._kernels.get(key)
        if kernel is None:
            import cupy

            spec = self._specialise(make_spec(*args))
            module = cupy.RawModule(path=str(cubin_path(spec, self._arch)))
            if spec.uses_nvshmem:
                nvshmem_build.begin_module(module.module.ptr)
            kernel = self._kernels[key] = Kernel(module.get_function(spec.name), self._waits)
        return kernel


def _nvrtc_version() -> tuple[int, int] | None:
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        return None
    _, major, minor = nvrtc.nvrtcVersion()
    return int(major), int(minor)


def _nvshmem_build(spec: KernelSpec) -> object:
    return nvshmem_build.find() if spec.uses_nvshmem else None


def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(kernels_dir().glob("*.cu*")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile(spec: KernelSpec, arch: str, log: io.StringIO | None) -> bytes:
    """Compile a spec; with a log, ptxas writes there what each kernel takes."""
    source = kernels_dir() / f"{spec.file}.cu"
    macros = [(f"QCOMM_{name}", str(value)) for name, value in spec.constants]
    include = [str(kernels_dir())]
    if spec.uses_nvshmem:
        build = nvshmem_build.find()
        if build.nvcc is not None and log is None:
            return nvshmem_build.compile_linked(build, source, arch, macros, include)
        include += build.include
    try:
        with _IMPORTS:
            from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise QcommUnsupportedError(f"compiling kernels needs cuda-core: {error}", phase="jit") from error
    options = ProgramOptions(
        name=source.name,
        arch=arch,
        std="c++17",
        include_path=include,
        define_macro=macros,
        device_as_default_execution_space=True if spec.uses_nvshmem else None,
        ptxas_options=None if log is None else ["-v"],
        no_cache=log is not None,  # what NVRTC takes from its own cache comes without a log
    )
    try:
        return bytes(Program(source.read_text(), "c++", options).compile("cubin", logs=log).code)
    except Exception as error:
        raise QcommUnsupportedError(f"NVRTC could not compile {spec}: {error}", phase="jit") from error
