"""Symmetric memory: one allocation per rank that every rank of the group can address."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from qcomm.config import Member
from qcomm.errors import QcommUnsupportedError

PROVIDERS = ("nvshmem", "torch")
_NVSHMEM_IS_INITIALIZED = 2


class SymmetricMemory(Protocol):
    """This rank's allocation and where the peers' are.

    Attributes:
        local: `[num_bytes]` uint8 on this rank's GPU.
        peers: address of every rank's allocation as this GPU sees it, own included; 0 where only NVSHMEM reaches it.
    """

    local: torch.Tensor
    peers: list[int]

    def settle(self) -> None:
        """Wait until what this rank's kernels wrote to peers is there, as much as their end does not tell."""

    def free(self) -> None:
        """Free the allocation. Collective."""


def available_providers() -> tuple[str, ...]:
    """Return the providers whose packages are installed, the preferred one first."""
    found = []
    if importlib.util.find_spec("nvshmem") is not None:
        found.append("nvshmem")
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is not None:
        found.append("torch")
    return tuple(found)


_abandoned: list[SymmetricMemory] = []


def abandon(memory: SymmetricMemory) -> None:
    """Keep an allocation until the process ends, because peers that cannot be asked may still write to it."""
    _abandoned.append(memory)


def running_nvshmem() -> tuple[int, int] | None:
    """Return this process's NVSHMEM PE and the number of PEs, None while NVSHMEM does not run."""
    if "nvshmem.core" not in sys.modules:
        return None
    import nvshmem.core as nvshmem

    if nvshmem.init_status() < _NVSHMEM_IS_INITIALIZED:
        return None
    return int(nvshmem.my_pe()), int(nvshmem.n_pes())


def allocate(
    provider: str, num_bytes: int, member: Member, near: Callable[[int, int], bool] | None = None
) -> SymmetricMemory:
    """Allocate symmetric memory. Collective.

    Args:
        provider: "nvshmem" (the heap of nvshmem4py) or "torch" (torch.distributed's symmetric memory).
        num_bytes: the same on every rank.
        member: this rank's place.
        near: as for `NvshmemMemory`; "torch" serves ranks that all reach each other.

    Raises:
        QcommUnsupportedError: the provider cannot serve this group.
    """
    return NvshmemMemory(num_bytes, member, near) if provider == "nvshmem" else TorchMemory(num_bytes, member)


class NvshmemMemory:
    """Memory on the NVSHMEM symmetric heap.

    NVSHMEM is a process-wide runtime: the first buffer of a process starts it for its group, if nobody has, and it
    runs until the process ends.

    Args:
        num_bytes: the same on every rank.
        member: this rank's place.
        near: tells whether a rank reaches another's memory by itself; None where all do. Where some do not, rank r must
            be NVSHMEM's PE r, as kernels take it to be.
    """

    def __init__(self, num_bytes: int, member: Member, near: Callable[[int, int], bool] | None = None) -> None:
        import nvshmem.core as nvshmem

        if running_nvshmem() is None:
            _start_nvshmem(nvshmem, member)
        if nvshmem.n_pes() != member.num_ranks:
            raise QcommUnsupportedError(
                f"provider 'nvshmem' needs a group of all {nvshmem.n_pes()} NVSHMEM PEs, got {member.num_ranks} ranks; "
                "use provider='torch'",
                rank=member.rank,
                phase="buffer.create",
                expected=nvshmem.n_pes(),
                seen=member.num_ranks,
            )
        self._nvshmem = nvshmem
        pes: list[int] = [0] * member.num_ranks
        dist.all_gather_object(pes, nvshmem.my_pe(), group=member.group)
        if near is not None and pes != list(range(member.num_ranks)):
            raise QcommUnsupportedError(
                f"several nodes need a group whose ranks are NVSHMEM's PEs in order, got PEs {pes}",
                rank=member.rank,
                phase="buffer.create",
                seen=tuple(pes),
            )
        self.local: torch.Tensor = nvshmem.tensor((num_bytes,), dtype=torch.uint8)

        def address(rank: int, pe: int) -> int:
            if rank == member.rank:
                return int(self.local.data_ptr())
            if near is not None and not near(member.rank, rank):
                return 0
            return int(nvshmem.get_peer_tensor(self.local, pe).data_ptr())

        self.peers = [address(rank, pe) for rank, pe in enumerate(pes)]

    def settle(self) -> None:
        """Wait for puts to other nodes, which outlive the kernels that issued them."""
        if 0 not in self.peers:
            return
        stream = torch.cuda.current_stream(self.local.device)
        self._nvshmem.quiet(stream=stream)
        stream.synchronize()

    def free(self) -> None:
        """Free the allocation. Collective."""
        self._nvshmem.free_tensor(self.local)


class TorchMemory:
    """torch.distributed's symmetric memory, on its CUDA backend: one host."""

    def __init__(self, num_bytes: int, member: Member) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.local = symmetric.empty(num_bytes, dtype=torch.uint8, device=member.device)
        handle = symmetric.rendezvous(self.local, member.group.group_name)
        self.peers = [int(address) for address in handle.buffer_ptrs]
        self._handle: Any = handle

    def settle(self) -> None:
        """Return at once: stores to peers are there when their kernel has ended."""

    def free(self) -> None:
        """Free the allocation."""
        self._handle = None
        self.local = torch.empty(0, dtype=torch.uint8)


def _start_nvshmem(nvshmem: Any, member: Member) -> None:
    from cuda.core import Device

    device = Device(member.device.index)
    device.set_current()
    box = [nvshmem.get_unique_id(empty=member.rank != 0)]
    dist.broadcast_object_list(box, src=member.global_rank(0), group=member.group)
    nvshmem.init(device=device, uid=box[0], rank=member.rank, nranks=member.num_ranks, initializer_method="uid")
