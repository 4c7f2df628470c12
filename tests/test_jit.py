"""Kernels are compiled once, kept, and launched as they are asked for, without a GPU."""

from __future__ import annotations

import concurrent.futures
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import ARCH

from qcomm import QcommUnsupportedError, jit
from qcomm.jit import KernelSpec
from qcomm.ops import comm, route


class Cache:
    """A cache folder, sources that may be changed, and a compiler that only counts."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = root / "cache"
        self.sources = root / "kernels"
        self.compiled: list[KernelSpec] = []
        shutil.copytree(jit.kernels_dir(), self.sources)
        monkeypatch.setenv(jit.CACHE_VARIABLE, str(self.folder))
        monkeypatch.setattr(jit, "kernels_dir", lambda: self.sources)
        monkeypatch.setattr(jit, "compile_cubin", self.compile)

    def compile(self, spec: KernelSpec, arch: str) -> bytes:
        self.compiled.append(spec)
        return f"{spec} {arch}".encode()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(tmp_path, monkeypatch)


def test_a_second_process_compiles_nothing(cache: Cache) -> None:
    spec = comm.barrier_spec()
    path = jit.cubin_path(spec, ARCH)
    assert path.parent == cache.folder
    assert path.read_bytes() == f"{spec} {ARCH}".encode()
    assert jit.cubin_path(spec, ARCH) == path
    assert cache.compiled == [spec]
    assert list(cache.folder.iterdir()) == [path]


def test_what_a_kernel_depends_on_is_in_its_name(cache: Cache) -> None:
    spec = KernelSpec.of("barrier", "barrier", max_ranks=16)
    paths = [jit.cubin_path(spec, ARCH), jit.cubin_path(spec, "sm_100")]
    paths += [
        jit.cubin_path(other, ARCH)
        for other in (
            KernelSpec.of("barrier", "barrier", max_ranks=8),
            KernelSpec.of("barrier", "barrier", max_ranks=16, hidden=128),
            KernelSpec.of("route", "barrier", max_ranks=16),
            KernelSpec.of("barrier", "other", max_ranks=16),
        )
    ]
    for file in ("barrier.cu", "wait.cuh"):
        with (cache.sources / file).open("a") as source:
            source.write("// changed\n")
        paths.append(jit.cubin_path(spec, ARCH))
    (cache.sources / "new.cuh").touch()
    paths.append(jit.cubin_path(spec, ARCH))
    assert len(set(paths)) == len(paths) == len(cache.compiled)


def test_the_order_of_constants_does_not_matter() -> None:
    assert KernelSpec.of("f", "k", a=1, b=2) == KernelSpec.of("f", "k", b=2, a=1)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(jit.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert jit.cache_dir() == tmp_path / ".cache" / "qcomm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert jit.cache_dir() == tmp_path / "xdg" / "qcomm"
    monkeypatch.setenv(jit.CACHE_VARIABLE, str(tmp_path / "own"))
    assert jit.cache_dir() == tmp_path / "own"


def test_writers_at_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    num_writers, size = 8, 1 << 20
    together = threading.Barrier(num_writers)
    seen: list[int] = []
    done = threading.Event()

    def compile_slowly(spec: KernelSpec, arch: str) -> bytes:
        together.wait(10)
        return bytes(size)

    def watch() -> None:
        while not done.is_set():
            seen.extend(path.stat().st_size for path in cache.folder.glob("*.cubin"))
            time.sleep(0.0005)

    monkeypatch.setattr(jit, "compile_cubin", compile_slowly)
    watcher = threading.Thread(target=watch)
    watcher.start()
    with concurrent.futures.ThreadPoolExecutor(num_writers) as pool:
        paths = list(pool.map(lambda _: jit.cubin_path(comm.barrier_spec(), ARCH), range(num_writers)))
    done.set()
    watcher.join()
    assert len(set(paths)) == 1
    assert set(seen) <= {size}, "a cubin was there before it was whole"
    assert list(cache.folder.iterdir()) == [paths[0]]


def test_a_source_that_does_not_compile_leaves_nothing(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("cuda.core")
    monkeypatch.undo()
    monkeypatch.setenv(jit.CACHE_VARIABLE, str(cache.folder))
    monkeypatch.setattr(jit, "kernels_dir", lambda: cache.sources)
    (cache.sources / "broken.cu").write_text('extern "C" __global__ void broken() { nonsense(QCOMM_A); }\n')
    spec = KernelSpec.of("broken", "broken", a=1)
    for compile_it in (jit.compile_cubin, jit.resource_usage, jit.cubin_path):
        with pytest.raises(QcommUnsupportedError) as caught:
            compile_it(spec, ARCH)
        for words in ("broken", 'identifier "nonsense" is undefined', "broken.cu(1)"):
            assert words in str(caught.value)
        assert caught.value.phase == "jit"
    assert not list(cache.folder.iterdir())


def test_without_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(QcommUnsupportedError, match="cuda-core"):
        jit.compile_cubin(comm.barrier_spec(), ARCH)


def test_a_real_cubin_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    monkeypatch.setenv(jit.CACHE_VARIABLE, str(tmp_path))
    path = jit.cubin_path(comm.barrier_spec(), ARCH)
    assert path.read_bytes().startswith(b"\x7fELF")
    assert re.fullmatch(r"barrier-sm_90-[0-9a-f]{24}\.cubin", path.name)


def loaded(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., tuple[int]], function: Any) -> jit.Kernel:
    """Make a kernel of what stands for a function, which a driver that only calls `launch` launches."""
    kernel = jit.Kernel(function, False)
    monkeypatch.setattr(kernel, "_driver", SimpleNamespace(cuLaunchKernel=launch))
    monkeypatch.setattr(kernel, "_success", 0)
    return kernel


class Function:
    """Stands for the driver's function, which all who loaded it share."""

    kernel = SimpleNamespace(ptr=7)

    def __init__(self, shared_size_bytes: int = 0) -> None:
        self.shared_size_bytes, self.max_dynamic_shared_size_bytes = shared_size_bytes, 48 * 1024


def test_a_function_that_two_buffers_share_takes_what_the_hungrier_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaders that load one cubin get one function of the driver, whose attribute is the process's."""
    function = Function()

    def launch(*arguments: Any) -> tuple[int]:
        assert arguments[7] <= function.max_dynamic_shared_size_bytes
        return (0,)

    one, other = (loaded(monkeypatch, launch, function) for _ in range(2))
    for kernel, shared_bytes in ((one, 100_000), (other, 2_000), (one, 100_000), (other, 120_000), (one, 110_000)):
        kernel.launch(1, 32, shared_bytes, 0, route.RouteParams())


@pytest.mark.parametrize(("static", "asked"), [(0, 0), (640, 50_000), (640, 150_000), (200_000, 0)])
def test_no_sm_has_two_blocks_of_a_kernel_that_is_alone(
    static: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def launch(*arguments: Any) -> tuple[int]:
        taken.append(int(arguments[7]) + static + jit.RESERVED_SHARED_BYTES)
        return (0,)

    kernel = loaded(monkeypatch, launch, Function(static))
    for alone in (False, True):
        kernel.launch(1, 32, asked, 0, route.RouteParams(), alone=alone)
    assert taken[1] == max(taken[0], jit.SM_SHARED_BYTES // 2 + 128)
    assert 2 * taken[1] > jit.SM_SHARED_BYTES


def test_no_launch_is_early_where_torch_fills_what_it_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fills lets the next one begin at its blocks' ends, before all that they wrote is there."""
    calls = []

    def note(name: str) -> Callable[..., tuple[int]]:
        def launch(*_: object) -> tuple[int]:
            calls.append(name)
            return (0,)

        return launch

    kernel = loaded(monkeypatch, note("plain"), Function())
    kernel._driver.cuLaunchKernelEx = note("early")
    monkeypatch.setattr(kernel, "_early", lambda *_: None)
    kernel.launch(1, 32, 0, 0, route.RouteParams(), early=True)
    torch.use_deterministic_algorithms(True)
    try:
        kernel.launch(1, 32, 0, 0, route.RouteParams(), early=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == ["early", "plain"]
