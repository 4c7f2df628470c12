"""The collective backend: `all_to_all_single` on packed records, gloo on CPU and NCCL on GPU.

The codec and all placement are plain PyTorch (`qcomm.exchange`), so this backend runs wherever torch.distributed
does, and the other backends are tested against it.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

from qcomm import exchange
from qcomm.config import BufferConfig, Member
from qcomm.errors import QcommError, QcommPeerError, QcommTimeoutError
from qcomm.exchange import CombineOptions, DispatchOptions, Routing, Sums, WireInput
from qcomm.handle import CompletedEvent, DispatchHandle, Event, Owner, Received
from qcomm.records import MetadataLayout
from qcomm.transport.base import (
    Ending,
    dropped_token_error,
    overflow_error,
    peer_routing_error,
    received,
    routing_error,
)
from qcomm.transport.streams import record_stream


class CollectiveTransport:
    """See `qcomm.transport.base.Transport`."""

    symmetric_bytes = 0

    def __init__(
        self, config: BufferConfig, member: Member, owner: Owner, comm_stream: torch.cuda.Stream | None
    ) -> None:
        self._config = config
        self._member = member
        self._owner = owner
        self._num_local_experts = config.num_experts // member.num_ranks
        self._comm_stream = comm_stream
        self._noted: list[_Noted] = []

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
        path = _Path(routing.send_slot, offsets, send_counts, recv_counts)
        words = torch.cat(
            [
                exchange.metadata(routing, topk_weights, tokens, rank, num_local)
                for rank, tokens in enumerate(self._tokens_to_ranks(path))
            ]
        )
        words = self._forward(words, path, "dispatch.metadata", fill=-1)
        records = torch.arange(num_records, device=member.device)
        record_src = torch.searchsorted(offsets[1:].contiguous(), records, right=True)
        record_src = torch.where(records < offsets[-1], record_src, -1)
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
        )

    def _exchange_counts(
        self, routing: Routing, topk_idx: torch.Tensor, bad: torch.Tensor, static: bool
    ) -> torch.Tensor:
        """Gather every rank's token counts per rank and per expert: `[num_ranks, num_ranks + num_experts]` int64.

        The first bad token travels along, so that every rank raises when one rank's routing is bad and none waits.
        """
        member = self._member
        tokens = torch.arange(1, len(bad) + 1, device=bad.device)
        first_bad = torch.where(bad, tokens, len(bad) + 1).amin() if len(bad) else tokens.new_ones(())
        status = torch.where(first_bad <= len(bad), first_bad, 0)[None]
        mine = torch.cat((status, routing.tokens_per_rank, routing.tokens_per_expert))
        gathered = [torch.empty_like(mine) for _ in range(member.num_ranks)]
        self._wait(dist.all_gather(gathered, mine, group=member.group, async_op=True), "dispatch.counts")
        table = torch.stack(gathered)
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
        path = _Path.of(handle)
        records = exchange.encode_wire(x, options.wire, options.seed, self._member.rank)
        index = torch.cat(self._tokens_to_ranks(path)).clamp(min=0)
        records = records[index] if len(records) else records.new_zeros(len(index), records.shape[1])
        records = self._forward(records, path, "dispatch.records", fill=0)
        payload = exchange.lay_out(
            records, handle.record_rows, handle.num_rows, handle.group_offsets, self._config.hidden, options
        )
        return received(payload, handle, options)

    def _combine(
        self, y: torch.Tensor, row_values: torch.Tensor | None, handle: DispatchHandle, options: CombineOptions
    ) -> Sums:
        hidden, num_ranks, wire = self._config.hidden, self._member.num_ranks, options.wire
        path = _Path.of(handle)
        weights = handle.record_topk_weights if options.weighted and handle.has_weights else None
        sums = exchange.partial_sums(y.reshape(-1, hidden), handle.record_rows, weights)
        src = torch.searchsorted(path.offsets[1:].contiguous(), torch.arange(len(sums), device=sums.device), right=True)
        subsequence = exchange.combine_subsequence(src, self._member.rank, num_ranks)
        records = exchange.encode_wire(sums, wire, options.seed, subsequence, handle.record_src_token.clamp(min=0))
        parts = self._backward(records, path, "combine.records")
        decoded = [exchange.decode_wire(part, wire, hidden) for part in parts]
        out = exchange.sum_over_ranks(decoded, handle.send_slot, hidden)
        if row_values is None:
            return Sums(out, None)
        values = self._backward(exchange.record_values(row_values, handle.record_rows), path, "combine.values")
        return Sums(out, exchange.values_over_ranks(list(values), handle.send_slot, self._config.num_topk))

    def _tokens_to_ranks(self, path: _Path) -> list[torch.Tensor]:
        tokens = exchange.tokens_by_slot(path.send_slot, self._config.num_max_tokens_per_rank)
        if path.send_counts is None:
            return list(tokens)
        return [row[:count] for row, count in zip(tokens, path.send_counts, strict=True)]

    def _forward(self, rows: torch.Tensor, path: _Path, phase: str, fill: int) -> torch.Tensor:
        """Send each rank its rows; returns the rows that came, in record order."""
        if path.send_counts is not None and path.recv_counts is not None:
            return self._all_to_all(rows, path.send_counts, path.recv_counts, phase)
        num_ranks, slots = self._member.num_ranks, self._config.num_max_tokens_per_rank
        came = self._all_to_all(rows, (slots,) * num_ranks, (slots,) * num_ranks, phase)
        out = came.new_full((len(came) + 1, came.shape[1]), fill)
        out[self._record_of_slot(path, len(came))] = came
        return out[:-1]

    def _backward(self, records: torch.Tensor, path: _Path, phase: str) -> tuple[torch.Tensor, ...]:
        """Send each record back to its source; returns for each rank its rows, by slot."""
        if path.send_counts is not None and path.recv_counts is not None:
            came = self._all_to_all(records, path.recv_counts, path.send_counts, phase)
            return came.split(list(path.send_counts))
        num_ranks, slots = self._member.num_ranks, self._config.num_max_tokens_per_rank
        rows = records[self._record_of_slot(path, len(records)).clamp(max=len(records) - 1)]
        return self._all_to_all(rows, (slots,) * num_ranks, (slots,) * num_ranks, phase).split(slots)

    def _record_of_slot(self, path: _Path, spill: int) -> torch.Tensor:
        slots = torch.arange(self._config.num_max_tokens_per_rank, device=path.offsets.device)
        counts = path.offsets[1:] - path.offsets[:-1]
        return torch.where(slots < counts[:, None], path.offsets[:-1, None] + slots, spill).flatten()

    def _all_to_all(
        self, rows: torch.Tensor, send_counts: tuple[int, ...], recv_counts: tuple[int, ...], phase: str
    ) -> torch.Tensor:
        came = rows.new_empty((sum(recv_counts), rows.shape[1]))
        work = dist.all_to_all_single(
            came,
            rows.contiguous(),
            list(recv_counts),
            list(send_counts),
            group=self._member.group,
            async_op=True,
        )
        self._wait(work, phase)
        return came

    def _wait(self, work: dist.Work | None, phase: str) -> None:
        assert work is not None
        member = self._member
        try:
            if member.device.type == "cuda":
                work.wait()
            else:
                work.wait(datetime.timedelta(seconds=member.deadline_s))
        except RuntimeError as error:
            text = str(error)
            kind = QcommTimeoutError if "imed out" in text or "imeout" in text else QcommPeerError
            raise kind(f"rank {member.rank}: {phase} failed: {text}", rank=member.rank, phase=phase) from error


@dataclasses.dataclass(frozen=True, eq=False)
class _Path:
    """What moving rows along a route needs; counts are None in static mode."""

    send_slot: torch.Tensor
    offsets: torch.Tensor
    send_counts: tuple[int, ...] | None
    recv_counts: tuple[int, ...] | None

    @classmethod
    def of(cls, handle: DispatchHandle) -> _Path:
        offsets = handle.recv_offsets.to(torch.int64)
        return cls(handle.send_slot, offsets, handle.send_counts, handle.recv_counts)


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
