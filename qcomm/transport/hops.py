"""The ways that records take between ranks: straight to those of their experts, or by way of a relay on each node."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from qcomm import exchange
from qcomm.config import BufferConfig, Member
from qcomm.exchange import Routing
from qcomm.handle import DispatchHandle, Relay
from qcomm.options import CombineOptions
from qcomm.records import MetadataLayout
from qcomm.topology import Topology
from qcomm.transport.messages import Messages


@dataclasses.dataclass(frozen=True, eq=False)
class Hop:
    """Which rows go to which peers, and come from them; counts are None in static mode.

    Attributes:
        peers: ranks.
        slot: `[num_rows, num_peers]` int32 number of each row among those for a peer, -1 if it does not go there.
        offsets: `[num_peers + 1]` int64: first row from each peer, and the number of them.
        send_counts, recv_counts: rows per peer.
        capacity: most rows for a peer, which static mode sends in any case.
    """

    peers: tuple[int, ...]
    slot: torch.Tensor
    offsets: torch.Tensor
    send_counts: tuple[int, ...] | None
    recv_counts: tuple[int, ...] | None
    capacity: int

    def rows_by_peer(self) -> list[torch.Tensor]:
        """Return for each peer the rows to send, -1 for an empty slot."""
        rows = exchange.tokens_by_slot(self.slot, self.capacity)
        if self.send_counts is None:
            return list(rows)
        return [row[:count] for row, count in zip(rows, self.send_counts, strict=True)]

    def places(self, spill: int) -> torch.Tensor:
        """Return where the rows of all slots stand among those that came, `spill` for an empty slot."""
        slots = torch.arange(self.capacity, device=self.offsets.device)
        return torch.where(slots < self.offsets.diff()[:, None], self.offsets[:-1, None] + slots, spill).flatten()


class Carrier:
    """Moves rows along hops."""

    def __init__(self, messages: Messages) -> None:
        self._messages = messages

    def forward(self, rows: torch.Tensor, hop: Hop, phase: str) -> torch.Tensor:
        """Send each peer its rows; return those that came, by peer; unused ones are zero."""
        index = torch.cat(hop.rows_by_peer()).clamp(min=0)
        given = rows[index] if len(rows) else rows.new_zeros(len(index), rows.shape[1])
        return self.forward_slots(given, hop, phase, fill=0)

    def forward_slots(self, rows: torch.Tensor, hop: Hop, phase: str, fill: int) -> torch.Tensor:
        """Send rows that stand by peer and slot; return those that came, by peer; unused ones hold `fill`."""
        if hop.send_counts is not None and hop.recv_counts is not None:
            return self._messages.exchange(rows, hop.peers, hop.send_counts, hop.recv_counts, phase)
        each = (hop.capacity,) * len(hop.peers)
        came = self._messages.exchange(rows, hop.peers, each, each, phase)
        out = came.new_full((len(came) + 1, came.shape[1]), fill)
        out[hop.places(len(came))] = came
        return out[:-1]

    def backward(self, rows: torch.Tensor, hop: Hop, phase: str) -> tuple[torch.Tensor, ...]:
        """Send each row that came back to its peer; return for each peer its rows, by slot."""
        if hop.send_counts is not None and hop.recv_counts is not None:
            came = self._messages.exchange(rows, hop.peers, hop.recv_counts, hop.send_counts, phase)
            return came.split(list(hop.send_counts))
        rows = rows[hop.places(len(rows)).clamp(max=len(rows) - 1)]
        each = (hop.capacity,) * len(hop.peers)
        return self._messages.exchange(rows, hop.peers, each, each, phase).split(hop.capacity)


class Direct:
    """Every record goes straight to the ranks of its experts."""

    def __init__(self, config: BufferConfig, member: Member, carrier: Carrier) -> None:
        self._config = config
        self._member = member
        self._carrier = carrier

    def node_slot(self, routing: Routing) -> torch.Tensor:
        """Return no nodes: their tokens need no count."""
        return routing.send_slot[:, :0]

    def describe(
        self, routing: Routing, topk_weights: torch.Tensor | None, counts: torch.Tensor, static: bool
    ) -> tuple[torch.Tensor, None]:
        """Exchange metadata: returns the words of the records that come, -1 in those unused. See `Relayed`."""
        config, member = self._config, self._member
        hop = self._hop(
            routing.send_slot,
            _offsets(counts[:, member.rank]),
            None if static else _ints(counts[member.rank, : member.num_ranks]),
            None if static else _ints(counts[:, member.rank]),
        )
        num_local = config.num_experts // member.num_ranks
        words = [
            exchange.metadata(routing, topk_weights, tokens, rank, num_local)
            for rank, tokens in enumerate(hop.rows_by_peer())
        ]
        return self._carrier.forward_slots(torch.cat(words), hop, "dispatch.metadata", fill=-1), None

    def forward(self, records: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Send a record for each token; returns those that come, in the handle's order."""
        return self._carrier.forward(records, self._hop_of(handle), "dispatch.records")

    def combine(self, sums: torch.Tensor, handle: DispatchHandle, options: CombineOptions) -> torch.Tensor:
        """Return each record's sum to its token, `[num_tokens, hidden]` float32."""
        src = exchange.group_of(handle.recv_offsets, len(sums))
        subsequence = exchange.combine_subsequence(src, self._member.rank, self._member.num_ranks)
        hop = self._hop_of(handle)
        return return_sums(self._carrier, sums, hop, options, subsequence, handle.record_src_token)

    def values(self, values: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Return each record's numbers to its token, `[num_tokens, num_topk]` float32, unrounded."""
        parts = self._carrier.backward(values, self._hop_of(handle), "combine.values")
        return exchange.sum_parts(parts, handle.send_slot, values.shape[1])

    def _hop_of(self, handle: DispatchHandle) -> Hop:
        offsets = handle.recv_offsets.to(torch.int64)
        return self._hop(handle.send_slot, offsets, handle.send_counts, handle.recv_counts)

    def _hop(
        self, slot: torch.Tensor, offsets: torch.Tensor, send: tuple[int, ...] | None, recv: tuple[int, ...] | None
    ) -> Hop:
        everyone = tuple(range(self._member.num_ranks))
        return Hop(everyone, slot, offsets, send, recv, self._config.num_max_tokens_per_rank)


class Relayed:
    """A record goes once to each node of its experts, to the rank of the sender's place there, which passes it on.

    Sums come back the same way: those of a node's ranks, in float32, to its relay, which adds them by rank and sends
    one record back.
    """

    def __init__(self, config: BufferConfig, member: Member, carrier: Carrier, topology: Topology) -> None:
        self._config = config
        self._member = member
        self._carrier = carrier
        self._topology = topology
        self._node = topology.node(member.rank)
        self._local = topology.local_index(member.rank)
        self._relays = tuple(topology.rank(node, self._local) for node in range(topology.num_nodes))
        self._mates = tuple(topology.rank(self._node, local) for local in range(topology.ranks_per_node))

    def node_slot(self, routing: Routing) -> torch.Tensor:
        """Number the tokens that go to each node: `[num_tokens, num_nodes]` int32, -1 for those that don't."""
        sent = routing.send_slot.unflatten(1, (self._topology.num_nodes, self._topology.ranks_per_node))
        return exchange.number((sent >= 0).any(-1))

    def describe(
        self, routing: Routing, topk_weights: torch.Tensor | None, counts: torch.Tensor, static: bool
    ) -> tuple[torch.Tensor, Relay]:
        """Exchange metadata.

        Args:
            routing: of this rank's tokens.
            topk_weights: of them.
            counts: `[num_ranks, num_ranks + num_experts + num_nodes]` int64: each rank's tokens for each rank, expert
                and node.
            static: whether the host may not read them.

        Returns:
            The words of the records that come, in the handle's order, -1 in those unused; and what to pass on.
        """
        nodes, mates = len(self._relays), len(self._mates)
        me, num_ranks = self._member.rank, self._member.num_ranks
        to_nodes, to_me = counts[:, -nodes:], counts[:, me]
        node_slot = self.node_slot(routing)
        from_relays = to_nodes.unflatten(0, (nodes, mates))[:, self._local, self._node]
        of_relays = counts.unflatten(0, (nodes, mates))[:, self._local]
        to_mates = of_relays[:, self._mates[0] : self._mates[0] + mates].sum(0)
        from_mates = to_me.view(nodes, mates).sum(0)
        across = self._across(
            node_slot,
            _offsets(from_relays),
            None if static else _ints(to_nodes[me]),
            None if static else _ints(from_relays),
        )
        num_local = self._config.num_experts // num_ranks
        of_nodes = [
            exchange.metadata(routing, topk_weights, tokens, node, num_local * mates)
            for node, tokens in enumerate(across.rows_by_peer())
        ]
        words = self._carrier.forward_slots(torch.cat(of_nodes), across, "dispatch.metadata", fill=-1)
        experts = words[:, MetadataLayout(self._config.num_topk).expert]
        owner = torch.where(experts >= 0, torch.div(experts, num_local, rounding_mode="floor"), -1)
        locals_ = torch.arange(mates, device=words.device)
        relay = Relay(
            node_slot=node_slot,
            src_offsets=across.offsets,
            src_token=words[:, 0].contiguous(),
            rank_slot=exchange.number((owner[:, :, None] == locals_).any(1)),
            recv_offsets=_offsets(from_mates),
            arrival=_arrival(to_me, nodes, mates, self._num_records(to_me, static)),
            node_send_counts=across.send_counts,
            node_recv_counts=across.recv_counts,
            send_counts=None if static else _ints(to_mates),
            recv_counts=None if static else _ints(from_mates),
        )
        inside = self._inside(relay)
        of_mates = [
            exchange.narrow_metadata(words, rows, self._config.num_topk, mate, num_local)
            for mate, rows in enumerate(inside.rows_by_peer())
        ]
        came = self._carrier.forward_slots(torch.cat(of_mates), inside, "dispatch.metadata", fill=-1)
        return came[relay.arrival], relay

    def forward(self, records: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Send a record for each token; returns those that come, in the handle's order."""
        relay = _relay(handle)
        relayed = self._carrier.forward(records, self._across_of(relay), "dispatch.records")
        return self._carrier.forward(relayed, self._inside(relay), "dispatch.relay")[relay.arrival]

    def combine(self, sums: torch.Tensor, handle: DispatchHandle, options: CombineOptions) -> torch.Tensor:
        """Return each record's sum to its token, `[num_tokens, hidden]` float32."""
        relay = _relay(handle)
        of_node = self._to_relay(sums, relay, "combine.relay")
        nodes = exchange.group_of(relay.src_offsets, len(of_node)).clamp(max=len(self._relays) - 1)
        src = nodes * len(self._mates) + self._local
        subsequence = exchange.combine_subsequence(src, self._member.rank, self._member.num_ranks)
        return return_sums(self._carrier, of_node, self._across_of(relay), options, subsequence, relay.src_token)

    def values(self, values: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Return each record's numbers to its token, `[num_tokens, num_topk]` float32, unrounded."""
        relay = _relay(handle)
        of_node = self._to_relay(values, relay, "combine.values")
        parts = self._carrier.backward(of_node, self._across_of(relay), "combine.values")
        return exchange.sum_parts(parts, relay.node_slot, values.shape[1])

    def _to_relay(self, rows: torch.Tensor, relay: Relay, phase: str) -> torch.Tensor:
        """Add float32 rows of this node's ranks at their relay: `[relayed, width]`."""
        as_they_came = torch.empty_like(rows)
        as_they_came[relay.arrival] = rows
        parts = self._carrier.backward(as_they_came, self._inside(relay), phase)
        return exchange.sum_parts(parts, relay.rank_slot, rows.shape[1])

    def _across_of(self, relay: Relay) -> Hop:
        return self._across(relay.node_slot, relay.src_offsets, relay.node_send_counts, relay.node_recv_counts)

    def _across(
        self, slot: torch.Tensor, offsets: torch.Tensor, send: tuple[int, ...] | None, recv: tuple[int, ...] | None
    ) -> Hop:
        return Hop(self._relays, slot, offsets, send, recv, self._config.num_max_tokens_per_rank)

    def _inside(self, relay: Relay) -> Hop:
        capacity = self._config.num_max_tokens_per_rank * len(self._relays)
        offsets = relay.recv_offsets
        return Hop(self._mates, relay.rank_slot, offsets, relay.send_counts, relay.recv_counts, capacity)

    def _num_records(self, to_me: torch.Tensor, static: bool) -> int:
        return self._member.num_ranks * self._config.num_max_tokens_per_rank if static else int(to_me.sum())


def return_sums(
    carrier: Carrier,
    sums: torch.Tensor,
    hop: Hop,
    options: CombineOptions,
    subsequence: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Encode sums, send them back along a hop and add what comes there by peer: `[num_rows, hidden]` float32."""
    hidden, wire = sums.shape[1], options.wire
    records = exchange.encode_wire(sums, wire, options.seed, subsequence, tokens.clamp(min=0))
    parts = carrier.backward(records, hop, "combine.records")
    return exchange.sum_parts([exchange.decode_wire(part, wire, hidden) for part in parts], hop.slot, hidden)


def _relay(handle: DispatchHandle) -> Relay:
    assert handle.relay is not None
    return handle.relay


def _arrival(to_me: torch.Tensor, nodes: int, mates: int, num_records: int) -> torch.Tensor:
    """Place records, which are numbered by source rank, among those that come by relay, then source node."""
    starts = to_me.cumsum(0) - to_me
    by_relay = to_me.view(nodes, mates).t().flatten()
    places = (by_relay.cumsum(0) - by_relay).view(mates, nodes).t().flatten()
    records = torch.arange(num_records, device=to_me.device)
    source = torch.searchsorted(to_me.cumsum(0), records, right=True)
    there = source < len(to_me)
    source = source.clamp(max=len(to_me) - 1)
    return torch.where(there, places[source] + records - starts[source], records)


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _ints(counts: torch.Tensor) -> tuple[int, ...]:
    values: Sequence[int] = counts.tolist()
    return tuple(values)
