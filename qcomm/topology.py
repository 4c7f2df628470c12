"""Which ranks of a group share a node: by their hosts, or by a number of ranks per node that was asked for."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import socket
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from qcomm import validate
from qcomm.config import BufferConfig, Member
from qcomm.errors import QcommConfigError

RANKS_PER_NODE_VARIABLE = "QCOMM_RANKS_PER_NODE"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Nodes of equal size whose ranks follow one another: node 0 has ranks 0 to ranks_per_node - 1, and so on.

    Attributes:
        num_ranks: in the group; a multiple of `ranks_per_node`.
        ranks_per_node: ranks of each node.

    Raises:
        ValueError, TypeError: a number that is no positive int, or ranks that make no whole nodes.
    """

    num_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        validate.positive("num_ranks", self.num_ranks)
        check(self.ranks_per_node, self.num_ranks)

    @property
    def num_nodes(self) -> int:
        """Nodes in all."""
        return self.num_ranks // self.ranks_per_node

    @property
    def relays(self) -> bool:
        """Whether a token may spare copies by going to a node once: several nodes of several ranks."""
        return 1 < self.ranks_per_node < self.num_ranks

    def node(self, rank: int) -> int:
        """Return the node of a rank."""
        return rank // self.ranks_per_node

    def local_index(self, rank: int) -> int:
        """Return the place of a rank among those of its node."""
        return rank % self.ranks_per_node

    def rank(self, node: int, local_index: int) -> int:
        """Return the rank at a place in a node."""
        return node * self.ranks_per_node + local_index

    def same_node(self, rank: int, other: int) -> bool:
        """Tell whether two ranks share a node."""
        return self.node(rank) == self.node(other)


@dataclasses.dataclass(frozen=True)
class Found:
    """The topology of a group; `note` says what there is to say of it, None for one node by its hosts."""

    topology: Topology
    note: str | None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank runs: its host, and which part of it where the variable splits hosts."""

    host: str
    part: int | None = None

    def __str__(self) -> str:
        name = self.host.partition(" ")[0]
        return name if self.part is None else f"{name} part {self.part}"


def host_id() -> str:
    """Name this host: its name, and what tells it from others of that name."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def from_environ(environ: Mapping[str, str]) -> int | None:
    """Read the ranks per node that the environment asks for.

    Raises:
        ValueError: it does not hold a positive number.
    """
    text = environ.get(RANKS_PER_NODE_VARIABLE)
    if text is None:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{RANKS_PER_NODE_VARIABLE} must be a positive number, got {text!r}")
    return int(text)


def check(ranks_per_node: int | None, num_ranks: int) -> None:
    """Require ranks per node that divide a group."""
    if ranks_per_node is None:
        return
    validate.positive("ranks_per_node", ranks_per_node)
    if num_ranks % ranks_per_node:
        raise ValueError(f"ranks_per_node must divide the {num_ranks} ranks, got {ranks_per_node}")


def find(config: BufferConfig, member: Member) -> Found:
    """Find the nodes of a group. Collective.

    An argument `ranks_per_node` counts, else the hosts; the variable splits these by rank of the default group.

    Raises:
        QcommConfigError: a node that was asked for has ranks on several hosts.
    """
    splits = config.environ_ranks_per_node
    part = None if splits is None else member.global_rank(member.rank) // splits
    places = [Place(host_id(), part)] * member.num_ranks
    dist.all_gather_object(places, places[0], group=member.group)
    if config.ranks_per_node is not None:
        topology = Topology(member.num_ranks, config.ranks_per_node)
        _require_one_host(topology, [place.host for place in places], member.rank)
        return Found(topology, _describe(topology))
    return by_place(places)


def by_place(places: Sequence[Place]) -> Found:
    """Make nodes of the ranks that share a place; where these differ in size or mix, every rank is a node."""
    num_ranks = len(places)
    runs = [(place, len(list(same))) for place, same in itertools.groupby(places)]
    sizes = {size for _, size in runs}
    if len(sizes) == 1 and len({place for place, _ in runs}) == len(runs):
        topology = Topology(num_ranks, sizes.pop())
        alone = topology.num_nodes == 1
        return Found(topology, None if alone else _describe(topology))
    return Found(
        Topology(num_ranks, 1),
        "every rank counts as a node, for nodes need equally many ranks in a row, got " + _by_place(places),
    )


def _describe(topology: Topology) -> str:
    return f"{topology.num_nodes} node{'s' * (topology.num_nodes > 1)} of {topology.ranks_per_node}"


def _by_place(places: Sequence[Place | str]) -> str:
    """Say which ranks are where, by place."""
    ranks: dict[Place | str, list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    return ", ".join(f"ranks {', '.join(map(str, there))} on {place}" for place, there in ranks.items())


def _require_one_host(topology: Topology, hosts: Sequence[str], rank: int) -> None:
    for node in range(topology.num_nodes):
        first = topology.rank(node, 0)
        if len(set(hosts[first : first + topology.ranks_per_node])) > 1:
            text = f"ranks_per_node must keep each node on one host, got {topology.ranks_per_node} with "
            names = _by_place([Place(host) for host in hosts])
            raise QcommConfigError(text + names, rank=rank, phase="buffer.create", seen=tuple(hosts))
