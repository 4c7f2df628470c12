"""Start-up: a process group from torchrun, from mpirun, or for a single process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

# Its functions take the default group of the moment it is imported as theirs, for good. Were that ours, gloo's threads
# would outlive the group, and one that lets a tensor go while the interpreter ends would abort the process.
import torch.distributed.nn.functional

from qcomm.errors import QcommUnsupportedError

_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        launcher: "torchrun", "mpirun" or "single".
        rank, num_ranks: in the job.
        local_rank, num_local_ranks: on this host.
        device: where this rank's tensors go.
    """

    launcher: str
    rank: int
    num_ranks: int
    local_rank: int
    num_local_ranks: int
    device: torch.device


def find_launcher(environ: Mapping[str, str]) -> str:
    """Tell which launcher started a process with this environment."""
    if "TORCHELASTIC_RUN_ID" in environ or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environ.keys():
        return "torchrun"
    if any(name in environ for name in _MPI_SIZE_VARIABLES):
        return "mpirun"
    return "single"


@contextlib.contextmanager
def process_group(*, use_cuda: bool | None = None) -> Iterator[Launch]:
    """Initialise torch.distributed for the block, from whatever launched this process. Collective.

    gloo serves CPU tensors and, where there are GPUs, NCCL serves CUDA tensors; each rank takes the GPU of its
    local rank. mpirun needs mpi4py, which only carries the address of rank 0.

    Args:
        use_cuda: take GPUs; None takes them where torch finds at least one per local rank.

    Yields:
        How this process was started.

    Raises:
        QcommUnsupportedError: `use_cuda=True`, and fewer GPUs than ranks on this host.
    """
    launch, address = _launch()
    num_gpus = torch.cuda.device_count()
    cuda = num_gpus >= launch.num_local_ranks if use_cuda is None else use_cuda
    if cuda and launch.local_rank >= num_gpus:
        raise QcommUnsupportedError(
            f"use_cuda=True needs a GPU for each of the {launch.num_local_ranks} ranks of this host, found {num_gpus}",
            rank=launch.rank,
            phase="bootstrap",
            expected=launch.num_local_ranks,
            seen=num_gpus,
        )
    if cuda:
        launch = dataclasses.replace(launch, device=torch.device("cuda", launch.local_rank))
        torch.cuda.set_device(launch.device)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=address,
        rank=launch.rank,
        world_size=launch.num_ranks,
        device_id=launch.device if cuda else None,
    )
    try:
        yield launch
    finally:
        dist.destroy_process_group()


def _launch() -> tuple[Launch, str]:
    launcher, cpu = find_launcher(os.environ), torch.device("cpu")
    if launcher == "torchrun":
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return Launch(launcher, rank, size, local_rank, local_size, cpu), "env://"
    if launcher == "single":
        return Launch(launcher, 0, 1, 0, 1, cpu), f"tcp://127.0.0.1:{_free_port()}"
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    hosts = set(world.allgather(socket.gethostname()))
    host = "127.0.0.1" if len(hosts) == 1 else socket.gethostname()
    address = world.bcast(f"tcp://{host}:{_free_port()}" if world.rank == 0 else None)
    return Launch(launcher, world.rank, world.size, local.rank, local.size, cpu), address


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])
