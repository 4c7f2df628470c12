"""Byte offsets of what travels: the record of one token, and the metadata that goes ahead of it.

The only place that knows them; kernels get the numbers as compile-time constants and parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from qcomm.config import BufferConfig
from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE, WireKind
from qcomm.topology import Topology

RECORD_ALIGNMENT = 16
"""Bulk copies move multiples of 16 bytes between 16-byte boundaries."""
SLOT_ALIGNMENT = 128
"""NVLink and L2 move lines of 128 bytes; a record that begins amid one takes one more."""


@dataclasses.dataclass(frozen=True)
class RecordLayout:
    """One token on the wire: data, then scales, padded to 16 bytes.

    bf16: 2 * hidden bytes. fp8: hidden bytes, then hidden / 128 float32. mxfp4: hidden / 2 bytes, then
    hidden / 32 E8M0 bytes.
    """

    kind: WireKind
    hidden: int

    @property
    def data_bytes(self) -> int:
        """Bytes of the elements; scales start here."""
        return {"bf16": 2 * self.hidden, "fp8": self.hidden, "mxfp4": self.hidden // 2}[self.kind]

    @property
    def sf_bytes(self) -> int:
        """Bytes of the scales."""
        return {"bf16": 0, "fp8": 4 * self.hidden // FP8_GROUP_SIZE, "mxfp4": self.hidden // BLOCK_SIZE}[self.kind]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole record."""
        return align(self.data_bytes + self.sf_bytes, RECORD_ALIGNMENT)

    def slot_bytes(self, behind: MetadataLayout | PutLayout | ValuesLayout | None = None) -> int:
        """Return the bytes of its place in symmetric memory, with what may follow it there."""
        return align(self.num_bytes + (behind.num_bytes if behind else 0), SLOT_ALIGNMENT)


@dataclasses.dataclass(frozen=True)
class MetadataLayout:
    """The int32 words that describe one record: source token, then per top-k entry three words.

    On the nvlink backend they are alike for all destinations, with global experts. On the collective backend experts
    are the destination's local ones, and -1 in entries whose expert does not live there.
    """

    num_topk: int

    @property
    def expert(self) -> slice:
        """Expert ids."""
        return slice(1, 1 + self.num_topk)

    @property
    def ordinal(self) -> slice:
        """Number of earlier tokens of the same source that go to the same expert."""
        return slice(1 + self.num_topk, 1 + 2 * self.num_topk)

    @property
    def weight(self) -> slice:
        """Routing weights, float32 bits."""
        return slice(1 + 2 * self.num_topk, 1 + 3 * self.num_topk)

    @property
    def num_words(self) -> int:
        """Words in all, padded to 16 bytes."""
        return align(1 + 3 * self.num_topk, 4)

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return 4 * self.num_words


@dataclasses.dataclass(frozen=True)
class PutLayout:
    """What is behind a record that another rank forwards: metadata, then an int32 slot at every rank, -1 for none."""

    num_topk: int
    num_ranks: int

    @property
    def num_bytes(self) -> int:
        """Bytes in all, padded to 16."""
        return MetadataLayout(self.num_topk).num_bytes + align(4 * self.num_ranks, RECORD_ALIGNMENT)


@dataclasses.dataclass(frozen=True)
class ValuesLayout:
    """The float32 numbers, one per top-k entry, that may come back behind a record of combine."""

    num_topk: int

    @property
    def num_bytes(self) -> int:
        """Bytes in all, padded to 16."""
        return align(4 * self.num_topk, RECORD_ALIGNMENT)


@dataclasses.dataclass(frozen=True)
class SumLayout:
    """A sum on its way to a relay of the collective backend: hidden float32, not rounded to the wire before that."""

    hidden: int

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return 4 * self.hidden


def align(value: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-value // multiple) * multiple


SYMMETRIC_ALIGNMENT = 256
NODES_FLAG_BYTES = 8
"""A flag where there are several nodes: NVSHMEM's signals have 64 bits."""


@dataclasses.dataclass(frozen=True)
class NodesLayout:
    """What several nodes add to symmetric memory: outboxes that puts are copied from, and what is forwarded.

    Attributes:
        num_nodes: nodes.
        forwards: whether a token goes to one rank of a node, which forwards it; else to each of its ranks.
        put_slot_bytes: of a dispatched record as it is put, `PutLayout` behind it where it is forwarded.
    """

    num_nodes: int
    forwards: bool
    put_slot_bytes: int


@dataclasses.dataclass(frozen=True)
class SymmetricLayout:
    """Offsets of the parts of a rank's symmetric memory; the same on every rank.

    Every part is indexed by source rank or node, so that no two ranks write one place. Counts exist twice, for even
    and odd calls, because a rank may write the next call's while a peer still reads this one's.
    """

    num_ranks: int
    num_local_experts: int
    max_tokens: int
    dispatch_slot_bytes: int
    combine_slot_bytes: int
    nodes: NodesLayout | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each part, in order."""
        slots, nodes = self.num_ranks * self.max_tokens, self.nodes
        flag_bytes = 4 if nodes is None else NODES_FLAG_BYTES
        across = nodes.num_nodes * self.max_tokens if nodes is not None and nodes.forwards else 0
        parts = {
            "barrier_flags": flag_bytes * self.num_ranks,
            "counts": 2 * 8 * self.num_ranks * (2 + self.num_local_experts + (across > 0)),
            "dispatch_flags": flag_bytes * slots,
            "combine_flags": flag_bytes * (slots + across),
            "dispatch_records": slots * self.dispatch_slot_bytes,
            "combine_records": (slots + across) * self.combine_slot_bytes,
        }
        if nodes is None:
            return parts
        return parts | {
            "dispatch_outbox": self.max_tokens * nodes.put_slot_bytes,
            "combine_outbox": (across or slots) * self.combine_slot_bytes,
            "inbox_flags": flag_bytes * across,
            "inbox": across * nodes.put_slot_bytes,
        }

    @property
    def offsets(self) -> dict[str, int]:
        """Offset of each part."""
        offsets, end = {}, 0
        for name, size in self.sizes.items():
            offsets[name] = end
            end += align(size, SYMMETRIC_ALIGNMENT)
        return offsets

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return sum(align(size, SYMMETRIC_ALIGNMENT) for size in self.sizes.values())


def symmetric_layout(config: BufferConfig, num_ranks: int, nodes: NodesLayout | None = None) -> SymmetricLayout:
    """Lay out a rank's symmetric memory; slots hold the larger of the forward and the backward leg."""
    return SymmetricLayout(
        num_ranks=num_ranks,
        num_local_experts=config.num_experts // num_ranks,
        max_tokens=config.num_max_tokens_per_rank,
        dispatch_slot_bytes=_largest_slot(config, "dispatch", MetadataLayout(config.num_topk)),
        combine_slot_bytes=_largest_slot(config, "combine", ValuesLayout(config.num_topk)),
        nodes=nodes,
    )


def nodes_layout(config: BufferConfig, topology: Topology, *, forwards: bool) -> NodesLayout | None:
    """Lay out what a rank needs besides for other nodes; None where there are none."""
    if topology.num_nodes == 1:
        return None
    words = PutLayout(config.num_topk, topology.num_ranks) if forwards else MetadataLayout(config.num_topk)
    return NodesLayout(topology.num_nodes, forwards, _largest_slot(config, "dispatch", words))


def _largest_slot(
    config: BufferConfig, op: Literal["dispatch", "combine"], behind: MetadataLayout | PutLayout | ValuesLayout
) -> int:
    legs = (config.precision.leg(op, backward) for backward in (False, True))
    return max(RecordLayout(leg.kind, config.hidden).slot_bytes(behind) for leg in legs)
