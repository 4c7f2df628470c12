"""What a Buffer is for: the shape every rank must agree on, and this rank's place in the group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist

from qcomm.errors import QcommConfigError
from qcomm.formats import WirePrecision


@dataclasses.dataclass(frozen=True)
class BufferConfig:
    """The shape of a Buffer; the same on every rank.

    `environ_ranks_per_node` is what the environment asks for, where the argument `ranks_per_node` does not.
    """

    num_experts: int
    num_topk: int
    hidden: int
    num_max_tokens_per_rank: int
    precision: WirePrecision
    backend: str
    provider: str
    device_type: str
    ranks_per_node: int | None = None
    environ_ranks_per_node: int | None = None

    def fields(self) -> Iterator[tuple[str, object]]:
        """Yield every field, each leg of the precision by itself."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, WirePrecision):
                for leg in dataclasses.fields(value):
                    yield f"precision.{leg.name}", getattr(value, leg.name)
            else:
                yield field.name, value


@dataclasses.dataclass(frozen=True)
class Member:
    """This rank's place: its process group, rank and device, and how a wait ends."""

    group: dist.ProcessGroup
    rank: int
    num_ranks: int
    device: torch.device
    deadline_s: float

    def global_rank(self, rank: int) -> int:
        """Return the rank in the default group of a rank of this group."""
        return dist.get_global_rank(self.group, rank)


def agree(config: BufferConfig, member: Member) -> None:
    """Check that every rank of the group made its buffer with the same configuration. Collective.

    Raises:
        QcommConfigError: names each field that differs and every rank's value of it.
    """
    gathered: list[BufferConfig | None] = [None] * member.num_ranks
    dist.all_gather_object(gathered, config, group=member.group)
    differing = []
    columns = zip(*(list(c.fields()) for c in gathered if c is not None), strict=True)
    for column in columns:
        values = [value for _, value in column]
        if any(value != values[0] for value in values):
            each = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            differing.append(f"{column[0][0]} must be the same on every rank, got {each}")
    if differing:
        raise QcommConfigError("; ".join(differing), rank=member.rank, phase="buffer.create")


def synchronize_hosts(member: Member) -> None:
    """Wait until every rank of the group has come here. Collective."""
    dist.all_gather_object([None] * member.num_ranks, None, group=member.group)
