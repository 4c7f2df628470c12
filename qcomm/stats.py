"""What a buffer's calls moved and waited for, computed when asked for from what the calls left anyway."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from qcomm.formats import WireFormat
from qcomm.handle import DispatchHandle, Forward
from qcomm.records import RecordLayout, SumLayout
from qcomm.topology import Topology

_BFLOAT16_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of the records that a rank sent to other ranks in one call, metadata and the routing's counts left out.

    "Logical" bytes are those of the same tokens in bfloat16. A record that a rank passes on for another within its node
    counts as sent by both.

    Attributes:
        between_nodes, between_nodes_logical: to ranks of other nodes.
        inside_node, inside_node_logical: to other ranks of the own node.
    """

    between_nodes: int = 0
    between_nodes_logical: int = 0
    inside_node: int = 0
    inside_node_logical: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes as sent, in all."""
        return self.between_nodes + self.inside_node


@dataclasses.dataclass(frozen=True)
class BufferStats:
    """One rank's figures. Those of a dispatch or combine are of the last one, a replay included; zero before it.

    They are zero after one under `torch.compile` too, which may overwrite what a call returned.

    Attributes:
        num_dispatches, num_replays, num_combines: calls since the buffer was made; replays of a CUDA graph are not
            seen by the host and do not count.
        tokens_per_expert: `num_local_experts` numbers of tokens, those whose rows were dropped left out but for
            "token_major".
        tokens_sent, tokens_received: `num_ranks` numbers of tokens, to and from each rank, this one included; a token
            counts once for a rank, whatever number of its experts is there.
        dispatch_bytes, combine_bytes: bytes of the records that this rank sent to other ranks.
        dispatch_traffic, combine_traffic: the same by where they went; nodes are those of `Buffer.topology`. A static
            call of the collective backend moves its empty slots besides.
        dropped_rows: rows that a static receive had no room for.
        spread_overflows: blocks of 32 that E4M3 rounded because their exponent distance was above 14, in `recv.x` and
            in `recv.x_columnwise`.
        waited_us: `num_ranks` numbers of microseconds: how long this rank's kernels waited for each rank to begin its
            calls, in all since the buffer was made or reset, replays of a CUDA graph included. A call waits for all
            ranks at the same time. Zeros on the collective backend, which does not measure them.
    """

    num_dispatches: int
    num_replays: int
    num_combines: int
    tokens_per_expert: tuple[int, ...]
    tokens_sent: tuple[int, ...]
    tokens_received: tuple[int, ...]
    dispatch_bytes: int
    combine_bytes: int
    dispatch_traffic: Traffic
    combine_traffic: Traffic
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
        self, rank: int, topology: Topology, num_local_experts: int, hidden: int, waited_ns: Sequence[int]
    ) -> BufferStats:
        """Compute the figures; waits for the device."""
        nobody = (0,) * topology.num_ranks
        per_expert, sent, received, dropped, spread = (0,) * num_local_experts, nobody, nobody, 0, (0, 0)
        dispatched = combined = Traffic()
        if self.dispatched is not None:
            handle, overflows, wire = self.dispatched
            per_expert = tuple(handle.num_tokens_per_expert.tolist())
            sent, received = _sent(handle), _received(handle)
            dispatched = _dispatch_traffic(handle, rank, topology, RecordLayout(wire.kind, hidden).num_bytes, hidden)
            dropped = _dropped(handle)
            spread = tuple(overflows.tolist())
        if self.combined is not None:
            handle, wire = self.combined
            combined = _combine_traffic(handle, rank, topology, RecordLayout(wire.kind, hidden).num_bytes, hidden)
        counts = self.num_dispatches, self.num_replays, self.num_combines
        waited = tuple(ns / 1e3 for ns in waited_ns)
        moved = dispatched.num_bytes, combined.num_bytes
        return BufferStats(*counts, per_expert, sent, received, *moved, dispatched, combined, dropped, spread, waited)


def _dispatch_traffic(handle: DispatchHandle, rank: int, topology: Topology, record_bytes: int, hidden: int) -> Traffic:
    between, inside = _by_distance(_sent(handle), rank, topology)
    if handle.forward is not None:
        between = int((handle.forward.node_slot >= 0).sum())
        inside += _forwarded(handle.forward, topology.local_index(rank))
    elif handle.relay is not None:
        between = _without(handle.relay.node_slot, topology.node(rank))
        inside = _without(handle.relay.rank_slot, topology.local_index(rank))
    logical = _BFLOAT16_BYTES * hidden
    return Traffic(between * record_bytes, between * logical, inside * record_bytes, inside * logical)


def _combine_traffic(handle: DispatchHandle, rank: int, topology: Topology, record_bytes: int, hidden: int) -> Traffic:
    inside_bytes = record_bytes
    between, inside = _by_distance(_received(handle), rank, topology)
    if handle.forward is not None:
        between = int(handle.forward.counts.sum())
        local = topology.local_index(rank)
        inside = sum(n for peer, n in enumerate(_received(handle)) if topology.local_index(peer) != local)
    elif handle.relay is not None:
        back = handle.relay.src_offsets.diff().tolist(), handle.relay.recv_offsets.diff().tolist()
        between = sum(back[0]) - back[0][topology.node(rank)]
        inside = sum(back[1]) - back[1][topology.local_index(rank)]
        inside_bytes = SumLayout(hidden).num_bytes
    logical = _BFLOAT16_BYTES * hidden
    return Traffic(between * record_bytes, between * logical, inside * inside_bytes, inside * logical)


def _by_distance(tokens: Sequence[int], rank: int, topology: Topology) -> tuple[int, int]:
    """Add up the tokens of each rank by where they are: on other nodes, on other ranks of this one."""
    inside = sum(n for peer, n in enumerate(tokens) if peer != rank and topology.same_node(peer, rank))
    return sum(tokens) - tokens[rank] - inside, inside


def _forwarded(forward: Forward, own: int) -> int:
    """Count the records that were forwarded to other ranks than the own one."""
    valid = torch.arange(forward.slots.shape[1], device=forward.slots.device) < forward.counts[:, None]
    return _without(forward.slots[valid][:, 1:], own)


def _without(slot: torch.Tensor, own: int) -> int:
    """Count the records that go to other peers than the own one."""
    sent = (slot >= 0).sum(0).tolist()
    return int(sum(sent) - sent[own])


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
