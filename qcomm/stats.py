"""What a buffer's calls moved and waited for, computed when asked for from what the calls left anyway."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from qcomm.formats import WireFormat
from qcomm.handle import DispatchHandle
from qcomm.records import RecordLayout


@dataclasses.dataclass(frozen=True)
class BufferStats:
    """One rank's figures. Those of a dispatch or combine are of the last one, a replay included; zero before it.

    They are zero after one under `torch.compile` too, which may overwrite what a call returned.

    Attributes:
        num_dispatches, num_replays, num_combines: calls since the buffer was made; replays of a CUDA graph are not
            seen by the host and do not count.
        tokens_per_expert: `num_local_experts` numbers of tokens, those whose rows were dropped left out.
        tokens_sent, tokens_received: `num_ranks` numbers of tokens, to and from each rank, this one included; a token
            counts once for a rank, whatever number of its experts is there.
        dispatch_bytes, combine_bytes: bytes of the records that this rank sent to other ranks.
        dropped_rows: rows that a static receive had no room for.
        spread_overflows: blocks of 32 that E4M3 rounded because their exponent distance was above 14, in `recv.x` and
            in `recv.x_columnwise`.
        waited_us: `num_ranks` numbers of microseconds: how long this rank's kernels waited for each rank to begin its
            calls, in all since the buffer was made or reset, replays of a CUDA graph included. A call waits for all
            ranks at the same time; a split dispatch counts from its hook on. Zeros on the collective backend, which
            does not measure them.
    """

    num_dispatches: int
    num_replays: int
    num_combines: int
    tokens_per_expert: tuple[int, ...]
    tokens_sent: tuple[int, ...]
    tokens_received: tuple[int, ...]
    dispatch_bytes: int
    combine_bytes: int
    dropped_rows: int
    spread_overflows: tuple[int, int]
    waited_us: tuple[float, ...]


@dataclasses.dataclass
class CallLog:
    """What is kept of a buffer's calls: counts, and references to what the last ones returned."""

    num_dispatches: int = 0
    num_replays: int = 0
    num_combines: int = 0
    dispatched: tuple[DispatchHandle, torch.Tensor, WireFormat] | None = None
    combined: tuple[DispatchHandle, WireFormat] | None = None

    def forget(self) -> None:
        """Let go of what the last calls returned."""
        self.dispatched = self.combined = None

    def stats(
        self, rank: int, num_ranks: int, num_local_experts: int, hidden: int, waited_ns: Sequence[int]
    ) -> BufferStats:
        """Compute the figures; waits for the device."""
        nobody = (0,) * num_ranks
        per_expert, sent, received, dropped, spread = (0,) * num_local_experts, nobody, nobody, 0, (0, 0)
        dispatch_bytes = combine_bytes = 0
        if self.dispatched is not None:
            handle, overflows, wire = self.dispatched
            per_expert = tuple(handle.num_tokens_per_expert.tolist())
            sent, received = _sent(handle), _received(handle)
            dispatch_bytes = (sum(sent) - sent[rank]) * RecordLayout(wire.kind, hidden).num_bytes
            dropped = _dropped(handle)
            spread = tuple(overflows.tolist())
        if self.combined is not None:
            handle, wire = self.combined
            back = _received(handle)
            combine_bytes = (sum(back) - back[rank]) * RecordLayout(wire.kind, hidden).num_bytes
        counts = self.num_dispatches, self.num_replays, self.num_combines
        waited = tuple(ns / 1e3 for ns in waited_ns)
        return BufferStats(*counts, per_expert, sent, received, dispatch_bytes, combine_bytes, dropped, spread, waited)


def _sent(handle: DispatchHandle) -> tuple[int, ...]:
    return tuple((handle.send_slot >= 0).sum(0).tolist())


def _received(handle: DispatchHandle) -> tuple[int, ...]:
    sources = handle.recv_offsets.diff()
    return tuple(sources.tolist())


def _dropped(handle: DispatchHandle) -> int:
    """Count the rows that records should have and do not."""
    valid = slice(int(handle.recv_offsets[-1]))
    if handle.recv_layout == "token_major":
        wanted = handle.record_src_token[valid, None] >= 0
    else:
        wanted = handle.record_topk_idx[valid] >= 0
    return int((wanted & (handle.record_rows[valid] < 0)).sum())
