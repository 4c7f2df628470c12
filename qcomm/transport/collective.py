"""The collective backend: packed records over a process group, gloo on CPU and NCCL on GPU.

The codec and all placement are plain PyTorch (`qcomm.exchange`), so this backend runs wherever torch.distributed
does, and the other backends are tested against it. Over several nodes of several ranks, a token goes to each node once
(`qcomm.transport.hops`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import torch

from qcomm import exchange, reference
from qcomm.config import BufferConfig, Member
from qcomm.errors import QcommError
from qcomm.exchange import Routing, Sums, WireInput
from qcomm.handle import CompletedEvent, DispatchHandle, Event, Owner, Received
from qcomm.options import CombineOptions, DispatchOptions
from qcomm.records import MetadataLayout
from qcomm.topology import Topology
from qcomm.transport.base import (
    Ending,
    dropped_token_error,
    overflow_error,
    peer_routing_error,
    received,
    routing_error,
)
from qcomm.transport.hops import Carrier, Direct, Relayed
from qcomm.transport.messages import Messages
from qcomm.transport.streams import record_stream


class CollectiveTransport:
    """See `qcomm.transport.base.Transport`."""

    symmetric_bytes = 0

    def __init__(
        self,
        config: BufferConfig,
        member: Member,
        owner: Owner,
        comm_stream: torch.cuda.Stream | None,
        topology: Topology,
    ) -> None:
        self._config = config
        self._member = member
        self._owner = owner
        self._num_local_experts = config.num_experts // member.num_ranks
        self._comm_stream = comm_stream
        self._noted: list[_Noted] = []
        self._messages = Messages(member)
        carrier = Carrier(self._messages)
        self._way = Relayed(config, member, carrier, topology) if topology.relays else Direct(config, member, carrier)

    def dispatch(
        self,
        x: WireInput,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        options: DispatchOptions,
    ) -> tuple[Received, DispatchHandle, Ending]:
        with _Async(self._member.device, self._comm_stream, options.async_op, x, topk_idx, topk_weights) as run:
            handle = self._route(topk_idx, topk_weights, options)
            received = self._send(x, handle, options)
            run.keep(received, handle)
        return received, handle, run.ending(options.split, received, handle)

    def replay(self, x: WireInput, handle: DispatchHandle, options: DispatchOptions) -> tuple[Received, Ending]:
        with _Async(self._member.device, self._comm_stream, options.async_op, x, handle) as run:
            received = self._send(x, handle, options)
            run.keep(received)
        return received, run.ending(options.split, received)

    def combine(
        self,
        y: torch.Tensor,
        row_values: torch.Tensor | None,
        handle: DispatchHandle,
        options: CombineOptions,
    ) -> tuple[Sums, Ending]:
        with _Async(self._member.device, self._comm_stream, options.async_op, y, row_values, handle) as run:
            sums = self._combine(y, row_values, handle, options)
            run.keep(*sums)
        return sums, run.ending(options.split, *sums)

    def check(self) -> QcommError | None:
        noted, self._noted = self._noted, []
        for note in noted:
            failure = note.failure(self._member.rank)
            if failure is not None:
                return failure
        return None

    def waited_ns(self) -> Sequence[int]:
        return (0,) * self._member.num_ranks

    def reset(self, generation: int) -> None:
        self._owner = dataclasses.replace(self._owner, generation=generation)
        self._noted = []

    def destroy(self) -> None:
        self._noted = []

    def abandon(self) -> None:
        self._noted = []

    def _route(
        self, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, options: DispatchOptions
    ) -> DispatchHandle:
        member, config = self._member, self._config
        num_ranks, num_local = member.num_ranks, self._num_local_experts
        bad = exchange.bad_routes(topk_idx, config.num_experts)
        routing = exchange.route(torch.where(bad[:, None], -1, topk_idx), config.num_experts, num_ranks)
        counts = self._exchange_counts(routing, topk_idx, bad, options.static)
        tokens_from = counts[:, member.rank]
        first = num_ranks + member.rank * num_local
        expert_counts = counts[:, first : first + num_local]
        offsets = torch.cat((tokens_from.new_zeros(1), tokens_from.cumsum(0)))
        if options.static:
            send_counts = recv_counts = per_expert = None
            num_records = num_ranks * config.num_max_tokens_per_rank
            num_rows, rows_per_expert = exchange.worst_case_rows(options, num_records, config.num_topk, num_local)
        else:
            send_counts = tuple(counts[member.rank, :num_ranks].tolist())
            recv_counts = tuple(tokens_from.tolist())
            per_expert = tuple(expert_counts.sum(0).tolist())
            num_records = sum(recv_counts)
            num_rows, rows_per_expert = exchange.exact_rows(options, num_records, per_expert)
        words, relay = self._way.describe(routing, topk_weights, counts, options.static)
        record_src = exchange.group_of(offsets, num_records)
        record_src = torch.where(record_src < num_ranks, record_src, -1)
        placement = exchange.place(
            words, config.num_topk, record_src, expert_counts, options, num_rows, rows_per_expert
        )
        if options.static:
            self._noted.append(_Noted("rows", placement.rows_needed, rows_per_expert or num_rows))
        layout = MetadataLayout(config.num_topk)
        return DispatchHandle(
            owner=self._owner,
            num_tokens=topk_idx.shape[0],
            recv_layout=options.recv_layout,
            alignment=options.alignment,
            static=options.static,
            num_rows=num_rows,
            rows_per_expert=rows_per_expert,
            has_weights=topk_weights is not None,
            send_slot=routing.send_slot,
            recv_offsets=offsets.to(torch.int32),
            record_src_token=words[:, 0].contiguous(),
            record_topk_idx=words[:, layout.expert].contiguous(),
            record_topk_weights=words[:, layout.weight].contiguous().view(torch.float32),
            record_rows=placement.record_rows,
            row_record=placement.row_record,
            row_src=placement.row_src,
            row_weights=placement.row_weights,
            num_tokens_per_expert=placement.num_tokens_per_expert,
            num_tokens_per_expert_list=per_expert,
            group_offsets=placement.group_offsets,
            send_counts=send_counts,
            recv_counts=recv_counts,
            relay=relay,
        )

    def _exchange_counts(
        self, routing: Routing, topk_idx: torch.Tensor, bad: torch.Tensor, static: bool
    ) -> torch.Tensor:
        """Gather every rank's token counts per rank, expert and, where records are relayed, node: int64 columns.

        The first bad token travels along, so that every rank raises when one rank's routing is bad and none waits.
        """
        member = self._member
        tokens = torch.arange(1, len(bad) + 1, device=bad.device)
        first_bad = torch.where(bad, tokens, len(bad) + 1).amin() if len(bad) else tokens.new_ones(())
        status = torch.where(first_bad <= len(bad), first_bad, 0)[None]
        per_node = (self._way.node_slot(routing) >= 0).sum(0)
        mine = torch.cat((status, routing.tokens_per_rank, routing.tokens_per_expert, per_node))
        table = self._messages.gather(mine, "dispatch.counts")
        if static and table.is_cuda:
            self._noted.append(_Noted("route", status, 0))
            return table[:, 1:]
        failed = {rank: token - 1 for rank, token in enumerate(table[:, 0].tolist()) if token}
        if member.rank in failed:
            token = failed[member.rank]
            raise routing_error(member.rank, token, topk_idx[token].tolist(), self._config.num_experts)
        if failed:
            raise peer_routing_error(member.rank, *next(iter(failed.items())))
        return table[:, 1:]

    def _send(self, x: WireInput, handle: DispatchHandle, options: DispatchOptions) -> Received:
        records = exchange.encode_wire(x, options.wire, options.seed, self._member.rank)
        records = self._way.forward(records, handle)
        payload = exchange.lay_out(
            records, handle.record_rows, handle.num_rows, handle.group_offsets, self._config.hidden, options
        )
        return received(payload, handle, options)

    def _combine(
        self, y: torch.Tensor, row_values: torch.Tensor | None, handle: DispatchHandle, options: CombineOptions
    ) -> Sums:
        weights = handle.record_topk_weights if options.weighted and handle.has_weights else None
        sums = exchange.partial_sums(y.reshape(-1, self._config.hidden), handle.record_rows, weights)
        out = reference.to_dtype(self._way.combine(sums, handle, options), torch.bfloat16)
        if row_values is None:
            return Sums(out, None)
        return Sums(out, self._way.values(exchange.record_values(row_values, handle.record_rows), handle))


@dataclasses.dataclass(frozen=True, eq=False)
class _Noted:
    """A value on the device that the next host check reads."""

    what: Literal["rows", "route"]
    value: torch.Tensor
    limit: int

    def failure(self, rank: int) -> QcommError | None:
        value = int(self.value)
        if value <= self.limit:
            return None
        if self.what == "rows":
            return overflow_error(rank, needed=value, available=self.limit)
        return dropped_token_error(rank, value - 1)


class _Async:
    """Runs the body on the communication stream if asked to, and records the event to wait on."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None, async_op: bool, *inputs: object) -> None:
        self._device = device
        self._stream = stream if async_op else None
        self._inputs = inputs
        self.event: Event = CompletedEvent()

    def __enter__(self) -> _Async:
        if self._stream is not None:
            self._caller = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(self._caller)
            record_stream(self._stream, *self._inputs)
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()
        return self

    def keep(self, *results: object) -> None:
        """Tell the allocator that the caller's stream uses the results."""
        if self._stream is not None:
            record_stream(self._caller, *results)

    def ending(self, split: bool, *results: object) -> Ending:
        """Return how the call ended; all of a split one was launched too, so that its hook only orders streams."""
        rest = functools.partial(_follow, self._device, self.event, *results)
        return Ending(self.event, rest if split else None)

    def __exit__(self, *exc: object) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self.event = event
        if self._stream is not None:
            self._context.__exit__(None, None, None)


def _follow(device: torch.device, event: Event, *results: object) -> None:
    """Make the current stream wait for a call, and tell the allocator that it uses the results."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            event.wait()
            record_stream(torch.cuda.current_stream(), *results)
