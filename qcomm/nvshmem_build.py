"""What kernels that call NVSHMEM from the device are compiled with, and how NVSHMEM learns of them.

NVRTC compiles the headers along, without linking: NVLink and NVSHMEM's proxy, no GPU-driven RDMA (IBGDA). Where
`NVSHMEM_IB_ENABLE_IBGDA` asks for that, and nvcc and the static device library are there, nvcc links the library.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from qcomm.errors import QcommUnsupportedError

IBGDA_VARIABLE = "NVSHMEM_IB_ENABLE_IBGDA"
_HEADER_WHEELS = {
    "nvshmem.h": "nvidia-nvshmem-cu13",
    "cuda_runtime.h": "nvidia-cuda-runtime",
    "cuda/std/type_traits": "nvidia-cuda-cccl",
}
_TOOLKITS = ("/usr/local/cuda",)
_COMPILE_TIMEOUT_S = 600


@dataclasses.dataclass(frozen=True)
class Build:
    """Where the headers are, and what links; `nvcc` is None for the header-only path.

    Attributes:
        include: folders of headers.
        version: of the headers.
        nvcc: the compiler, where the device library is linked.
        library: folder of libnvshmem_device.a.
        reason: why that path.
    """

    include: tuple[str, ...]
    version: str
    nvcc: str | None
    library: str | None
    reason: str


def find() -> Build:
    """Find what is installed.

    Raises:
        QcommUnsupportedError: a header is missing; names the packages to install.
    """
    return _find(_asks_for_ibgda())


def check_host_library(build: Build, host_version: str) -> None:
    """Require that the device code and the host library are of one version.

    Raises:
        QcommUnsupportedError: says which to install.
    """
    if build.version != host_version:
        raise QcommUnsupportedError(
            f"NVSHMEM's headers must be of the version of its host library, {host_version}, got {build.version} in "
            f"{build.include[0]}; install nvidia-nvshmem-cu13=={host_version}",
            phase="nvshmem.start",
            expected=host_version,
            seen=build.version,
        )


def host_version() -> str:
    """Return the version of NVSHMEM's host library, which this loads."""
    import nvshmem.core as nvshmem

    return str(nvshmem.get_version().libnvshmem_version)


def begin_module(module: int) -> None:
    """Tell NVSHMEM, which must run, of a loaded module that calls it."""
    from nvshmem import bindings

    status = bindings.cumodule_init(module)
    if status:
        raise QcommUnsupportedError(f"NVSHMEM refused a kernel: status {status}", phase="jit", seen=status)


def compile_linked(
    build: Build, source: pathlib.Path, arch: str, macros: list[tuple[str, str]], include: list[str]
) -> bytes:
    """Compile a kernel with nvcc and link NVSHMEM's device library.

    Raises:
        QcommUnsupportedError: nvcc refuses the source; holds its output.
    """
    assert build.nvcc is not None
    with tempfile.TemporaryDirectory(prefix="qcomm-nvcc-") as scratch:
        compiled, cubin = pathlib.Path(scratch) / "kernel.o", pathlib.Path(scratch) / "kernel.cubin"
        defines = [f"-D{name}={value}" for name, value in [*macros, ("QCOMM_NVSHMEM_LINKED", "1")]]
        # CUDA's own headers are those that came with nvcc.
        folders = [f"-I{folder}" for folder in [*include, build.include[0]]]
        _nvcc(build.nvcc, "-std=c++17", "-rdc=true", f"-arch={arch}", *defines, *folders, "-dc", source, "-o", compiled)
        link = ("-dlink", "-cubin", compiled, f"-L{build.library}", "-lnvshmem_device", "-o", cubin)
        _nvcc(build.nvcc, f"-arch={arch}", *link)
        return cubin.read_bytes()


def nvshmem_version(header: str) -> str:
    """Read the version out of nvshmem_version.h.

    Raises:
        ValueError: it isn't there.
    """
    parts = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        match = re.search(rf"^\s*#\s*define\s+NVSHMEM_VENDOR_{part}_VERSION\s+(\d+)", header, re.MULTILINE)
        if match is None:
            raise ValueError(f"header must define NVSHMEM_VENDOR_{part}_VERSION, got none")
        parts.append(match[1])
    return ".".join(parts)


def _asks_for_ibgda() -> bool:
    return os.environ.get(IBGDA_VARIABLE, "0").lower() not in ("", "0", "false", "no", "off")


@functools.cache
def _find(ibgda: bool) -> Build:
    folders = _folders()
    include = tuple(dict.fromkeys(_folder_of(folders, header) for header in _HEADER_WHEELS))
    version = nvshmem_version((pathlib.Path(include[0]) / "non_abi" / "nvshmem_version.h").read_text())
    nvcc, library = _nvcc_path(), pathlib.Path(include[0]).parent / "lib" / "libnvshmem_device.a"
    if not ibgda:
        return Build(include, version, None, None, f"header-only by NVRTC: {IBGDA_VARIABLE} is not set")
    missing = ["nvcc"] * (nvcc is None) + [str(library)] * (not library.exists())
    if missing:
        return Build(include, version, None, None, f"header-only by NVRTC, without IBGDA: no {' nor '.join(missing)}")
    return Build(include, version, nvcc, str(library.parent), f"linked by {nvcc}: {IBGDA_VARIABLE} is set")


def _folders() -> list[pathlib.Path]:
    """Return the folders that may hold headers: those of NVIDIA's wheels, then those of a toolkit."""
    found = []
    spec = importlib.util.find_spec("nvidia")
    for root in map(pathlib.Path, spec.submodule_search_locations or () if spec else ()):
        found += [root / "nvshmem" / "include", *sorted(root.glob("cu1*/include")), root / "cuda_runtime" / "include"]
    homes = [os.environ[name] for name in ("NVSHMEM_HOME", "CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found += [pathlib.Path(home) / "include" for home in (*homes, *_TOOLKITS)]
    return [folder for base in found for folder in (base, base / "cccl")]


def _folder_of(folders: list[pathlib.Path], header: str) -> str:
    for folder in folders:
        if (folder / header).exists():
            return str(folder)
    raise QcommUnsupportedError(
        f"kernels that call NVSHMEM need {header}, found it nowhere; install {_HEADER_WHEELS[header]}", phase="jit"
    )


def _nvcc_path() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    roots = [pathlib.Path(root) for root in (spec.submodule_search_locations or () if spec else ())]
    places = [str(folder) for root in roots for folder in root.glob("cu1*/bin")]
    places += [str(pathlib.Path(home) / "bin") for home in _TOOLKITS]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def _nvcc(nvcc: str, *arguments: str | pathlib.Path) -> None:
    done = subprocess.run([nvcc, *map(str, arguments)], capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    if done.returncode:
        raise QcommUnsupportedError(f"nvcc failed: {done.stderr.strip()}", phase="jit", seen=done.returncode)
