"""Ranks for tests: persistent worker processes in one process group."""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import pytest
import torch
import torch.distributed as dist

from qcomm.topology import RANKS_PER_NODE_VARIABLE

P = ParamSpec("P")
R = TypeVar("R")
DeviceKind = Literal["cpu", "cuda"]

_PING_TIMEOUT_S = 10.0
_GRACE_S = 15.0


class RankError(RuntimeError):
    """A worker raised, died or did not answer; the message holds its traceback."""


class RankPool:
    """`num_ranks` processes in one process group, started by the first run and kept for the next.

    Ranks on "cuda" take one GPU each, and share them where there are fewer. A pool whose ranks no longer agree after
    a failure starts anew.
    """

    def __init__(self, num_ranks: int, device: DeviceKind = "cpu") -> None:
        self.num_ranks = num_ranks
        self.device = device
        self._workers: list[tuple[SpawnProcess, Connection[Any, Any]]] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def run(self, fn: Callable[Concatenate[int, int, P], R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """Run `fn(rank, num_ranks, ...)` on every rank; returns the results by rank, tensors on the CPU.

        Raises:
            RankError: the first rank to fail, or the ranks that did not answer in time.
        """
        return self.run_for(120.0, fn, *args, **kwargs)

    def run_for(
        self,
        timeout_s: float,
        fn: Callable[Concatenate[int, int, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[R]:
        """Run as `run` does, with another timeout."""
        if not all(process.is_alive() for process, _ in self._workers):
            self.close()
        if not self._workers:
            self._start()
        answers, failure = self._ask(fn, args, kwargs, timeout_s)
        if failure is not None:
            alive = self._workers and all(process.is_alive() for process, _ in self._workers)
            if not alive or self._ask(_ping, (), {}, _PING_TIMEOUT_S)[1] is not None:
                self.close()
            raise RankError(failure)
        return [answers[rank] for rank in range(self.num_ranks)]

    def close(self) -> None:
        """Stop the processes."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._scratch = tempfile.TemporaryDirectory(prefix="qcomm-ranks-")
        address = f"file://{Path(self._scratch.name) / 'store'}"
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            args = (rank, self.num_ranks, self.device, address, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _ask(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float
    ) -> tuple[dict[int, Any], str | None]:
        """Send a call to every rank; returns the answers by rank and the first failure."""
        task = pickle.dumps((fn, args, kwargs))
        pending = {rank: connection for rank, (_, connection) in enumerate(self._workers)}
        for connection in pending.values():
            # A process that was just killed: reading says so.
            with contextlib.suppress(BrokenPipeError):
                connection.send_bytes(task)
        answers: dict[int, Any] = {}
        failure = None
        end = time.monotonic() + timeout_s
        while pending:
            ready = wait(list(pending.values()), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                late = f"ranks {sorted(pending)} did not answer in {timeout_s} s"
                failure = late if failure is None else failure
                self.close()
                return answers, failure
            for rank in [rank for rank, connection in pending.items() if connection in ready]:
                connection = pending.pop(rank)
                try:
                    reply: _Reply = pickle.loads(connection.recv_bytes())
                except EOFError:
                    reply = _Reply(None, f"the process ended with {self._workers[rank][0].exitcode}")
                if reply.trace is None:
                    answers[rank] = reply.value
                elif failure is None:
                    failure = f"rank {rank} of {self.num_ranks} failed: {reply.trace}"
                    end = min(end, time.monotonic() + _GRACE_S)
        return answers, failure


class _Reply(NamedTuple):
    value: Any
    trace: str | None


class Target(NamedTuple):
    """Where a test body runs."""

    pool: RankPool
    backend: str
    ranks_per_node: int | None = None

    def run(self, fn: Callable[Concatenate[int, int, str, str, P], R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """Run `fn(rank, num_ranks, device, backend, ...)` on every rank."""
        if self.ranks_per_node is None:
            return self.pool.run(fn, self.pool.device, self.backend, *args, **kwargs)
        return self.pool.run(_on_nodes, self.ranks_per_node, fn, self.pool.device, self.backend, *args, **kwargs)


class Pools:
    """The pools of a session, by device and size."""

    def __init__(self) -> None:
        self._pools: dict[tuple[DeviceKind, int], RankPool] = {}

    def get(self, num_ranks: int, device: DeviceKind = "cpu", num_gpus: int | None = None) -> RankPool:
        """Return the pool; skips the test where there are fewer GPUs than ranks, or than `num_gpus`."""
        if device == "cuda":
            need_gpus(num_ranks if num_gpus is None else num_gpus)
        return self._pools.setdefault((device, num_ranks), RankPool(num_ranks, device))

    def close(self) -> None:
        """Stop them all."""
        for pool in self._pools.values():
            pool.close()


GPU_SIZES = (1, 2, 4)
GPU_NODES = ((2, 1), (2, 2))
"""Nodes, and ranks of each, that one host is split into for the nvshmem backend."""
NODE_GPUS = 2
"""GPUs that these need: NVSHMEM lets ranks of different nodes share one."""
NODES = ((2, 2),)


def need_gpus(count: int) -> None:
    """Skip the test where there are fewer GPUs."""
    found = torch.cuda.device_count()
    if found < count:
        pytest.skip(f"needs {count} GPUs, found {found}")


def targets(
    *cpu_sizes: int, gpu_sizes: tuple[int, ...] = GPU_SIZES, nodes: tuple[tuple[int, int], ...] = ()
) -> pytest.MarkDecorator:
    """Run a body for each size with the collective backend on the CPU, and with every backend on GPUs.

    Args:
        cpu_sizes: ranks on the CPU.
        gpu_sizes: GPUs.
        nodes: (nodes, ranks of each), on the CPU and on GPUs: the collective backend over virtual nodes.
    """
    cpu = [pytest.param(("cpu", size, "collective", None), id=f"cpu{size}-collective") for size in cpu_sizes]
    gpu = [
        pytest.param(("cuda", size, backend, None), id=f"gpu{size}-{backend}", marks=pytest.mark.gpu)
        for size in gpu_sizes
        for backend in ("nvlink", "collective")
    ]
    virtual = [
        pytest.param(
            (device, num_nodes * each, backend, each),
            id=f"{name}{num_nodes}x{each}-{backend}",
            marks=[pytest.mark.gpu] * (device == "cuda"),
        )
        for device, name, backend, shapes in (
            ("cpu", "cpu", "collective", nodes),
            ("cuda", "gpu", "collective", nodes),
            ("cuda", "gpu", "nvshmem", [shape for shape in GPU_NODES if math.prod(shape) in gpu_sizes]),
        )
        for num_nodes, each in shapes
    ]
    return pytest.mark.parametrize("target", cpu + gpu + virtual, indirect=True)


def device_of(device: str, rank: int) -> torch.device:
    """Return a rank's device."""
    return torch.device("cuda", rank % torch.cuda.device_count()) if device == "cuda" else torch.device(device)


class _CpuPickler(pickle.Pickler):
    """Takes tensors to the CPU; plain pickle copies bytes, so that processes share no storage."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            return obj.cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _serve(rank: int, num_ranks: int, device: DeviceKind, address: str, connection: Connection[Any, Any]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    own = device_of(device, rank)
    if device == "cuda":
        torch.cuda.set_device(own)
    # It refuses a GPU's second rank.
    takes_nccl = device == "cuda" and num_ranks <= torch.cuda.device_count()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if takes_nccl else "cpu:gloo,cuda:gloo" if device == "cuda" else "gloo",
        init_method=address,
        rank=rank,
        world_size=num_ranks,
        device_id=own if takes_nccl else None,
    )
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(task, rank, num_ranks))


def _answer(task: bytes, rank: int, num_ranks: int) -> bytes:
    try:
        fn, args, kwargs = pickle.loads(task)
        return _dump(_Reply(fn(rank, num_ranks, *args, **kwargs), None))
    except BaseException:
        return _dump(_Reply(None, traceback.format_exc()))


def _dump(reply: _Reply) -> bytes:
    out = io.BytesIO()
    _CpuPickler(out, pickle.HIGHEST_PROTOCOL).dump(reply)
    return out.getvalue()


def _on_nodes(rank: int, num_ranks: int, ranks_per_node: int, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
    """Run a body on virtual nodes."""
    os.environ[RANKS_PER_NODE_VARIABLE] = str(ranks_per_node)
    try:
        return fn(rank, num_ranks, *args, **kwargs)
    finally:
        del os.environ[RANKS_PER_NODE_VARIABLE]


def _ping(rank: int, num_ranks: int) -> None:
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == num_ranks, f"rank {rank} summed {total}"
