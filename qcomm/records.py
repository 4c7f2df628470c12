"""Byte offsets of what travels: the record of one token, and the metadata that goes ahead of it.

The only place that knows them; kernels get the numbers as compile-time constants and parameters.
"""

from __future__ import annotations

import dataclasses

from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE, WireKind

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

    def slot_bytes(self, behind: MetadataLayout | ValuesLayout | None = None) -> int:
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
class ValuesLayout:
    """The float32 numbers, one per top-k entry, that may come back behind a record of combine."""

    num_topk: int

    @property
    def num_bytes(self) -> int:
        """Bytes in all, padded to 16."""
        return align(4 * self.num_topk, RECORD_ALIGNMENT)


def align(value: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-value // multiple) * multiple


SYMMETRIC_ALIGNMENT = 256


@dataclasses.dataclass(frozen=True)
class SymmetricLayout:
    """Offsets of the parts of a rank's symmetric memory; the same on every rank.

    Every part is indexed by source rank, so that no two ranks write one place. Counts exist twice, for even and odd
    calls, because a rank may write the next call's while a peer still reads this one's.
    """

    num_ranks: int
    num_local_experts: int
    max_tokens: int
    dispatch_slot_bytes: int
    combine_slot_bytes: int

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each part, in order."""
        slots = self.num_ranks * self.max_tokens
        return {
            "barrier_flags": 4 * self.num_ranks,
            "counts": 2 * 8 * self.num_ranks * (2 + self.num_local_experts),
            "dispatch_flags": 4 * slots,
            "combine_flags": 4 * slots,
            "dispatch_records": slots * self.dispatch_slot_bytes,
            "combine_records": slots * self.combine_slot_bytes,
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
