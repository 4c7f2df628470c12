"""Which backend a buffer takes, and why."""

from __future__ import annotations

import dataclasses
import importlib.util

import torch
import torch.distributed as dist

from qcomm import nvshmem_build, validate
from qcomm.config import BufferConfig, Member
from qcomm.errors import QcommUnsupportedError
from qcomm.handle import Owner
from qcomm.ops.comm import MAX_BLOCK_SHARED_BYTES, MAX_HIDDEN, MAX_RANKS, MAX_TOPK
from qcomm.ops.route import route_shared_bytes
from qcomm.topology import Topology, host_id
from qcomm.transport import symmetric
from qcomm.transport.base import Transport
from qcomm.transport.collective import CollectiveTransport

BACKENDS = ("auto", "collective", "nvlink", "nvshmem")
PROVIDERS = ("auto", *symmetric.PROVIDERS)
_NVLINK_PACKAGES = {"cupy": "cupy-cuda13x", "cuda.core": "cuda-core", "cuda.bindings": "cuda-bindings"}


@dataclasses.dataclass(frozen=True)
class Capability:
    """Whether this process could take the nvlink backend, and with which providers of symmetric memory."""

    supported: bool
    reason: str
    providers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend, the provider of its symmetric memory (None without one), and the reason for both."""

    backend: str
    provider: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class _Seat:
    """What a rank tells the others before they choose."""

    capability: Capability
    host: str
    device_uuid: str
    reachable_uuids: tuple[str, ...]
    nvshmem: tuple[int, int] | None
    visible_uuids: tuple[str, ...]
    nvshmem_obstacle: str | None = None
    nvshmem_build: str = ""


def local_capability(device: torch.device) -> Capability:
    """Tell whether this process could take the nvlink backend; starts nothing on the GPU but its context."""
    if device.type != "cuda":
        return Capability(False, "tensors are on the CPU", ())
    try:
        validate.compute_capability(torch.cuda.get_device_capability(device))
    except QcommUnsupportedError as error:
        return Capability(False, str(error), ())
    missing = [package for module, package in _NVLINK_PACKAGES.items() if not _importable(module)]
    if missing:
        return Capability(False, f"not installed: {', '.join(missing)}", ())
    providers = symmetric.available_providers()
    if not providers:
        return Capability(False, "no provider of symmetric memory is installed", ())
    return Capability(True, f"Hopper or newer, symmetric memory from {' or '.join(providers)}", providers)


def choose(config: BufferConfig, member: Member, topology: Topology) -> Choice:
    """Choose the fastest backend that every rank can run. Collective.

    Raises:
        QcommUnsupportedError: nvlink or nvshmem was asked for and some rank cannot run it.
    """
    if config.backend == "collective":
        return Choice("collective", None, "asked for")
    seats: list[_Seat] = [_seat(member.device, topology)] * member.num_ranks
    dist.all_gather_object(seats, seats[0], group=member.group)
    several = topology.num_nodes > 1
    if several and config.backend != "nvlink":
        choice = _choose_nvshmem(config, seats, member.num_ranks, topology)
    elif config.backend == "nvshmem":
        choice = Choice("collective", None, "ranks are on one node; backend 'nvlink' serves it")
    else:
        choice = _choose_nvlink(config, seats, member.num_ranks, topology)
    if config.backend in (choice.backend, "auto"):
        return choice
    raise QcommUnsupportedError(
        f"backend {config.backend!r} cannot run here: {choice.reason}",
        rank=member.rank,
        phase="buffer.create",
        seen=choice.reason,
    )


def _choose_nvlink(config: BufferConfig, seats: list[_Seat], num_ranks: int, topology: Topology) -> Choice:
    """Choose nvlink, or collective for a reason."""
    obstacle = _obstacle(seats) or _several_nodes(topology) or _limit(config, num_ranks)
    if obstacle is not None:
        return Choice("collective", None, obstacle)
    common = [p for p in symmetric.PROVIDERS if all(p in seat.capability.providers for seat in seats)]
    running = [seat.nvshmem for seat in seats]
    if "nvshmem" in common and not _one_nvshmem(running):
        common.remove("nvshmem")
    wanted = common if config.provider == "auto" else [p for p in common if p == config.provider]
    if wanted:
        how = "asked for" if config.backend == "nvlink" else "every rank reaches every GPU"
        return Choice("nvlink", wanted[0], f"{how}; symmetric memory from {wanted[0]}")
    obstacle = f"provider {config.provider!r} cannot serve this group, {common or 'none'} can"
    if config.provider == "nvshmem" and running != [None] * num_ranks:
        obstacle += f"; NVSHMEM runs as (PE, number of PEs) {running}"
    return Choice("collective", None, obstacle)


def _choose_nvshmem(config: BufferConfig, seats: list[_Seat], num_ranks: int, topology: Topology) -> Choice:
    """Choose nvshmem, or collective for a reason."""
    obstacle = None
    for node in range(topology.num_nodes):
        first = topology.rank(node, 0)
        obstacle = obstacle or _obstacle(seats[first : first + topology.ranks_per_node], first)
    for rank, seat in enumerate(seats):
        obstacle = obstacle or (seat.nvshmem_obstacle and f"rank {rank}: {seat.nvshmem_obstacle}")
    obstacle = obstacle or _limit(config, num_ranks, topology.num_nodes)
    running = [seat.nvshmem for seat in seats]
    if obstacle is None and not _one_nvshmem(running):
        obstacle = f"NVSHMEM runs as (PE, number of PEs) {running}"
    if obstacle is None and config.provider == "torch":
        obstacle = "provider 'torch' serves one node"
    if obstacle is not None:
        return Choice("collective", None, obstacle)
    how = "asked for" if config.backend == "nvshmem" else "several nodes"
    return Choice("nvshmem", "nvshmem", f"{how}; device code {seats[0].nvshmem_build}")


def create(
    choice: Choice,
    config: BufferConfig,
    member: Member,
    owner: Owner,
    comm_stream: torch.cuda.Stream | None,
    num_sms: int | None,
    topology: Topology,
) -> Transport:
    """Make the transport of a choice. Collective."""
    if choice.backend == "collective":
        return CollectiveTransport(config, member, owner, comm_stream, topology)
    assert choice.provider is not None
    assert comm_stream is not None
    if choice.backend == "nvshmem":
        from qcomm.transport.nvshmem import NvshmemTransport

        return NvshmemTransport(config, member, owner, comm_stream, num_sms, topology)
    from qcomm.transport.nvlink import NvlinkTransport

    return NvlinkTransport(config, member, owner, comm_stream, num_sms, choice.provider)


def _seat(device: torch.device, topology: Topology) -> _Seat:
    capability = local_capability(device)
    host = host_id()
    if device.type != "cuda":
        return _Seat(capability, host, "", (), None, ())
    count = torch.cuda.device_count()
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
    reachable = [
        uuids[i] for i in range(count) if i == device.index or torch.cuda.can_device_access_peer(device.index, i)
    ]
    running = symmetric.running_nvshmem() if "nvshmem" in capability.providers else None
    # It loads NVSHMEM, which one node may do without.
    probes = capability.supported and topology.num_nodes > 1
    obstacle, build = nvshmem_capability() if probes else (None, "")
    return _Seat(capability, host, uuids[device.index], tuple(reachable), running, tuple(uuids), obstacle, build)


def nvshmem_capability() -> tuple[str | None, str]:
    """Return what keeps this process from the nvshmem backend, None if nothing does; and how kernels are built."""
    if "nvshmem" not in symmetric.available_providers():
        return "not installed: nvshmem4py-cu13", ""
    try:
        build = nvshmem_build.find()
        nvshmem_build.check_host_library(build, nvshmem_build.host_version())
    except QcommUnsupportedError as error:
        return str(error), ""
    return None, build.reason


def _several_nodes(topology: Topology) -> str | None:
    return None if topology.num_nodes == 1 else f"ranks are on {topology.num_nodes} nodes"


def _limit(config: BufferConfig, num_ranks: int, num_nodes: int = 0) -> str | None:
    """Say which limit of the nvlink and nvshmem backends the buffer's shape passes, None if it keeps within them."""
    backend = "nvshmem" if num_nodes else "nvlink"
    sizes = {
        "ranks": (num_ranks, MAX_RANKS),
        "num_topk": (config.num_topk, MAX_TOPK),
        "hidden": (config.hidden, MAX_HIDDEN),
    }
    for name, (size, limit) in sizes.items():
        if size > limit:
            return f"the {backend} backend takes {name} of at most {limit}, got {size}"
    routing = route_shared_bytes(config.num_experts, num_ranks + num_nodes, config.num_max_tokens_per_rank)
    if routing > MAX_BLOCK_SHARED_BYTES:
        return (
            f"the {backend} backend has {MAX_BLOCK_SHARED_BYTES} bytes of shared memory to route in, num_experts "
            f"{config.num_experts} and num_max_tokens_per_rank {config.num_max_tokens_per_rank} need {routing}"
        )
    return None


def _obstacle(seats: list[_Seat], first: int = 0) -> str | None:
    """Say what keeps these ranks, in a row from `first`, from reaching each other by NVLink, None if nothing does."""
    for rank, seat in enumerate(seats, first):
        if not seat.capability.supported:
            return seat.capability.reason if rank == 0 else f"rank {rank}: {seat.capability.reason}"
    if len({seat.host for seat in seats}) > 1:
        return "ranks are on several hosts"
    for rank, seat in enumerate(seats, first):
        for peer, other in enumerate(seats, first):
            if rank != peer and seat.device_uuid == other.device_uuid:
                return f"ranks {rank} and {peer} share a GPU"
            # A GPU this process cannot see (CUDA_VISIBLE_DEVICES) cannot be asked about; opening it will tell.
            if other.device_uuid in seat.visible_uuids and other.device_uuid not in seat.reachable_uuids:
                return f"the GPU of rank {rank} cannot reach that of rank {peer}"
    return None


def _one_nvshmem(running: list[tuple[int, int] | None]) -> bool:
    """Tell whether NVSHMEM runs nowhere in the group yet, or runs for exactly this group."""
    pes = {seat[0] for seat in running if seat is not None}
    return not pes or (len(pes) == len(running) and all(s is not None and s[1] == len(running) for s in running))


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
