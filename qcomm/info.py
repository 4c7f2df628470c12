"""What this machine has, for `python -m qcomm info`. Initialises neither MPI nor NVSHMEM."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from qcomm import __version__, nvshmem_build, validate
from qcomm.errors import QcommUnsupportedError
from qcomm.table import format_table

NONE = "none"
UNKNOWN = "unknown"
_TIMEOUT_S = 30
_ANSI_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_LINKS = re.compile(r"NV\d+")
_MPI_LIBRARY = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing this machine has or lacks."""

    name: str
    value: str
    note: str = ""


def show(*, as_json: bool = False) -> None:
    """Print what `rows` found, as a table or as a JSON object of name: {value, note}."""
    found = rows()
    if as_json:
        print(json.dumps({row.name: {"value": row.value, "note": row.note} for row in found}, indent=2))
    else:
        print(format_table(("item", "value", "note"), [(row.name, row.value, row.note) for row in found]))


def rows() -> list[Row]:
    """Look at everything there is; never raises."""
    items: list[tuple[str, Callable[[], Row]]] = [("qcomm", _qcomm), ("python", _python), ("torch", _torch)]
    gpus = [(f"GPU {index}", functools.partial(_gpu, index)) for index in range(_num_gpus())]
    items += gpus or [("GPU", _no_gpu)]
    items += [
        ("peer access", _peer_access),
        ("NVLink", _nvlink),
        ("NVSHMEM host library", _nvshmem_host),
        ("NVSHMEM headers", _nvshmem_headers),
        ("NVSHMEM kernels", _nvshmem_kernels),
        ("nvshmem4py", _nvshmem4py),
        ("mpi4py", _mpi4py),
        ("MPI library", _mpi_library),
        ("mpirun", _mpirun),
        ("NCCL", _nccl),
        ("CuPy", _cupy),
        ("NVRTC", _nvrtc),
        ("nvcc", _nvcc),
        ("compile cache", _compile_cache),
        ("tuning table", _tuning_table),
        ("backend", _backend),
    ]
    return [_guarded(name, item) for name, item in items]


def _guarded(name: str, item: Callable[[], Row]) -> Row:
    try:
        return item()
    except Exception as error:
        text = str(error).strip()
        return Row(name, UNKNOWN, f"{type(error).__name__}: {text.splitlines()[0] if text else ''}")


def _qcomm() -> Row:
    return Row("qcomm", __version__, str(Path(__file__).resolve().parent))


def _python() -> Row:
    return Row("python", platform.python_version(), sys.executable)


def _torch() -> Row:
    return Row(
        "torch",
        torch.__version__,
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA",
    )


def _num_gpus() -> int:
    try:
        return torch.cuda.device_count()
    except Exception:
        return 0


def _no_gpu() -> Row:
    return Row("GPU", NONE, "torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU")


def _gpu(index: int) -> Row:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    try:
        validate.compute_capability(capability)
        verdict = "supported"
    except QcommUnsupportedError as error:
        verdict = f"not supported: {error}"
    memory = f"{properties.total_memory / 2**30:.1f} GiB"
    note = f"compute capability {capability[0]}.{capability[1]}, {memory}, {verdict}"
    return Row(f"GPU {index}", properties.name, note)


def _peer_access() -> Row:
    pairs = _pairs()
    if not pairs:
        return Row("peer access", NONE, "fewer than two GPUs")
    able = [
        (a, b) for a, b in pairs if torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a)
    ]
    return Row("peer access", *_describe_pairs(able, pairs))


def _nvlink() -> Row:
    pairs = _pairs()
    if not pairs:
        return Row("NVLink", NONE, "fewer than two GPUs")
    smi = _number_by_uuid(_output("nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"))
    links = parse_topology(_output("nvidia-smi", "topo", "-m"))
    number = [smi[str(torch.cuda.get_device_properties(i).uuid)] for i in range(_num_gpus())]
    between = {(a, b): links[number[a], number[b]] for a, b in pairs}
    value, note = _describe_pairs([pair for pair, link in between.items() if _LINKS.fullmatch(link)], pairs)
    kinds = ", ".join(sorted(set(between.values())))
    return Row("NVLink", value, f"{note + '; ' if note else ''}nvidia-smi topo: {kinds}")


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """Read the GPU to GPU part of `nvidia-smi topo -m`: {(0, 1): "NV18", ...}."""
    lines = [_ANSI_STYLE.sub("", line).split() for line in text.splitlines()]
    columns = next((line for line in lines if line[:1] == ["GPU0"] and "X" not in line), [])
    gpus = [int(name.removeprefix("GPU")) for name in columns if re.fullmatch(r"GPU\d+", name)]
    links: dict[tuple[int, int], str] = {}
    for cells in lines:
        if len(cells) > len(gpus) and re.fullmatch(r"GPU\d+", cells[0]) and cells != columns:
            row = int(cells[0].removeprefix("GPU"))
            links |= {(row, column): cell for column, cell in zip(gpus, cells[1:], strict=False)}
    return links


def _number_by_uuid(text: str) -> dict[str, int]:
    pairs = (line.split(",") for line in text.splitlines() if "," in line)
    return {uuid.strip().removeprefix("GPU-"): int(index) for index, uuid in pairs}


def _pairs() -> list[tuple[int, int]]:
    count = _num_gpus()
    return [(a, b) for a in range(count) for b in range(a + 1, count)]


def _describe_pairs(able: list[tuple[int, int]], pairs: list[tuple[int, int]]) -> tuple[str, str]:
    if len(able) == len(pairs):
        return "all pairs", ""
    return (f"{len(able)} of {len(pairs)} pairs" if able else NONE), ", ".join(f"{a}-{b}" for a, b in able)


def _nvshmem_host() -> Row:
    package = _first_installed("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
    if package is None:
        return Row("NVSHMEM host library", NONE, "nvidia-nvshmem-cu13 is not installed")
    name, version = package
    library = _file_of(name, "libnvshmem_host.so")
    return Row("NVSHMEM host library", version, f"{name}, {library or 'libnvshmem_host.so is missing from it'}")


def _nvshmem_headers() -> Row:
    name = "NVSHMEM headers"
    package = _first_installed("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
    path = _file_of(package[0], "nvshmem_version.h") if package else None
    if path is None:
        return Row(name, NONE, "no nvshmem_version.h in an nvidia-nvshmem wheel")
    version = nvshmem_build.nvshmem_version(path.read_text())
    assert package is not None
    agrees = package[1].split(".")[:3] == version.split(".")
    return Row(name, version, f"{'as' if agrees else 'NOT as'} the host library, {package[1]}; {path}")


def _nvshmem_kernels() -> Row:
    name = "NVSHMEM kernels"
    try:
        build = nvshmem_build.find()
    except QcommUnsupportedError as error:
        return Row(name, NONE, str(error))
    return Row(name, "nvcc" if build.nvcc else "NVRTC", build.reason)


def _nvshmem4py() -> Row:
    return _package_row("nvshmem4py", "nvshmem4py-cu13", "nvshmem4py-cu12")


def _mpi4py() -> Row:
    return _package_row("mpi4py", "mpi4py")


def _mpi_library() -> Row:
    name = "MPI library"
    if _first_installed("mpi4py") is None:
        return Row(name, NONE, "mpi4py is not installed")
    # In a process of its own: loading an MPI library changes signal handlers and may fail hard.
    environ = {**os.environ, "MPI4PY_RC_INITIALIZE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _MPI_LIBRARY], env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    if done.returncode:
        return Row(name, NONE, f"mpi4py cannot load one: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    version, _, rest = done.stdout.strip().rstrip("\x00").partition(",")
    return Row(name, version, rest.strip())


def _mpirun() -> Row:
    beside = Path(sys.executable).parent
    path = shutil.which("mpirun", path=str(beside)) or shutil.which("mpirun")
    if path is None:
        return Row("mpirun", NONE, f"neither in {beside} nor on PATH")
    on_path = shutil.which("mpirun")
    return Row("mpirun", path, "" if on_path == path else f"on PATH: {on_path or NONE}")


def _nccl() -> Row:
    if torch.version.cuda is None:
        return Row("NCCL", NONE, "torch is built without CUDA")
    return Row("NCCL", ".".join(map(str, torch.cuda.nccl.version())), "torch's")


def _cupy() -> Row:
    return _package_row("CuPy", "cupy-cuda13x", "cupy-cuda12x", "cupy")


def _nvrtc() -> Row:
    with contextlib.suppress(ImportError):
        from cuda.bindings import nvrtc
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("nvrtc").abs_path
        status, major, minor = nvrtc.nvrtcVersion()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            return Row("NVRTC", UNKNOWN, f"nvrtcVersion returned {status}")
        return Row("NVRTC", f"{major}.{minor}", str(path))
    return Row("NVRTC", NONE, "cuda-bindings is not installed")


def _nvcc() -> Row:
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    places = [str(Path(home) / "bin") for home in homes if home]
    path = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))
    return Row("nvcc", path or NONE, "" if path else "not needed: NVRTC compiles the kernels")


def _compile_cache() -> Row:
    from qcomm.jit import cache_dir

    path = cache_dir()
    return Row("compile cache", str(path), "" if path.is_dir() else "made by the first compilation")


def _tuning_table() -> Row:
    from qcomm import tuning

    table = tuning.current()
    devices = {torch.cuda.get_device_properties(index).name for index in range(_num_gpus())}
    here = sum(row.device in devices for row in table.rows)
    return Row("tuning table", str(tuning.current_path()), f"{len(table.rows)} rows, {here} for the GPUs here")


def _backend() -> Row:
    from qcomm.transport.select import local_capability, nvshmem_capability

    device = torch.device("cuda", torch.cuda.current_device()) if _num_gpus() else torch.device("cpu")
    capability = local_capability(device)
    backend = "nvlink" if capability.supported else "collective"
    obstacle, _ = nvshmem_capability() if capability.supported else (capability.reason, "")
    across = "nvshmem" if obstacle is None else f"collective ({obstacle})"
    note = f"auto takes {backend}: {capability.reason}"
    return Row("backend", backend, f"{note}; over several nodes {across}" if capability.supported else note)


def _package_row(name: str, *packages: str) -> Row:
    found = _first_installed(*packages)
    if found is None:
        return Row(name, NONE, f"{packages[0]} is not installed")
    return Row(name, found[1], "" if found[0] == name else found[0])


def _first_installed(*packages: str) -> tuple[str, str] | None:
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return package, importlib.metadata.version(package)
    return None


def _file_of(package: str, prefix: str) -> Path | None:
    for path in importlib.metadata.files(package) or ():
        if path.name.startswith(prefix):
            return Path(str(path.locate()))
    return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
