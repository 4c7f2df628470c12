"""The nvlink backend: peers write into each other's symmetric memory, and flags say when.

A call's kernels follow each other on one stream, the caller's or, for async calls, the communication stream. Each lets
the next begin before it ends, by programmatic dependent launch: a receive runs beside the send, and that beside what
routes. Every call begins with an exchange among all ranks (route, or a barrier), after which every rank has finished
its earlier calls; so no slot is overwritten while a peer reads it. A split call leaves all that waits for records to
its hook.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from qcomm import exchange, tuning
from qcomm.config import BufferConfig, Member, synchronize_hosts
from qcomm.errors import (
    QcommError,
    QcommTimeoutError,
)
from qcomm.exchange import Payload, Sums, WireInput
from qcomm.formats import FP8_GROUP_SIZE, WireFormat
from qcomm.handle import Addresses, DispatchHandle, Owner, Received, addresses_of
from qcomm.jit import KernelLoader, KernelSpec
from qcomm.ops import combine, count, dispatch, dispatch_decode, route
from qcomm.ops.comm import (
    BAD_ROUTE,
    MAX_RANKS,
    PHASES,
    Comm,
    HostReports,
    Launcher,
    Report,
    State,
    launch_barrier,
)
from qcomm.ops.count import Placement
from qcomm.ops.dispatch import Receive, Routing
from qcomm.options import CombineOptions, DispatchOptions
from qcomm.records import NodesLayout, align, symmetric_layout
from qcomm.tensors import FP8Tensor, MXFP4Tensor
from qcomm.transport.base import (
    Ending,
    dropped_token_error,
    overflow_error,
    peer_routing_error,
    received,
    routing_error,
)
from qcomm.transport.calls import Call, Calls
from qcomm.transport.draft import Draft, make_plan
from qcomm.transport.symmetric import SymmetricMemory, abandon, allocate
from qcomm.tuning import Tunings

_SPINS_PER_QUERY = 1 << 20
_GUESS_MARGIN = 32
_NO_BAD_TOKEN = 0x7FFFFFFF
_MAX_SEQUENCE = 0x7FFFFFFF
_POINTER_ALIGNMENT = 16


class NvlinkTransport:
    """See `qcomm.transport.base.Transport`."""

    def __init__(
        self,
        config: BufferConfig,
        member: Member,
        owner: Owner,
        comm_stream: torch.cuda.Stream,
        num_sms: int | None,
        provider: str,
    ) -> None:
        self._config, self._member, self._owner = config, member, owner
        self._calls = Calls(member.device, comm_stream)
        self._sequence = 0
        self._guess: dict[str, int] = {}
        device = torch.cuda.get_device_properties(member.device)
        chosen = tuning.choose_all(device.name, device.multi_processor_count, member.num_ranks, num_sms)
        tunings = self._tune(chosen)
        self._layout = symmetric_layout(config, member.num_ranks, self._nodes_layout())
        with torch.cuda.device(member.device):
            self._memory = self._allocate(provider)
            self._state = torch.zeros(ctypes.sizeof(State), dtype=torch.uint8, device=member.device)
            chunk_words = 1 + route.num_keys(config.num_experts, member.num_ranks + self._forward_nodes)
            self._chunks = torch.zeros(route.MAX_CHUNKS * chunk_words, dtype=torch.int32, device=member.device)
            self._reports = torch.zeros(ctypes.sizeof(HostReports), dtype=torch.uint8, pin_memory=True)
            host_words = count.HOST_FIXED + member.num_ranks + 1 + self._layout.num_local_experts
            self._host = torch.zeros(host_words, dtype=torch.int32, pin_memory=True)
        self._host_view = self._host.numpy()
        self._reports_view = HostReports.from_address(self._reports.data_ptr())
        self._launcher = Launcher(
            KernelLoader(member.device, waits=True, specialise=self._specialise),
            self._comm(),
            config.num_topk,
            device.multi_processor_count,
            tunings,
            self._forward_nodes,
        )
        self.symmetric_bytes = self._layout.num_bytes
        self._clear()

    def dispatch(
        self,
        x: WireInput,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        options: DispatchOptions,
    ) -> tuple[Received, DispatchHandle, Ending]:
        _check_addresses(x)
        hidden = self._config.hidden
        with self._begin(options, x, topk_idx, topk_weights) as call:
            draft, routing = self._draft(len(topk_idx), options), Routing(topk_idx, topk_weights)
            decodes = not options.split and dispatch_decode.suits(self._launcher, options, len(topk_idx), hidden)
            if not decodes:
                route.launch_route(self._launcher, call.stream, topk_idx, draft.addresses)
                self._send(call, x, draft.addresses, routing, options.wire, options.seed)
            # Apart from the handle's memory, for an operator of torch may not return both in one piece.
            overflows = torch.empty(2, dtype=torch.int64, device=self._member.device)
            parts = {**draft.addresses, "overflows": overflows.data_ptr()}
            placement = Placement.of(parts, options, draft.num_rows, draft.rows_per_expert)
            receive = Receive(self._launcher, placement, options, hidden, overflows, places=True)
            make_handle = functools.partial(draft.handle, self._owner, options, has_weights=topk_weights is not None)
            counts = functools.partial(self._launch_count, placement=placement, options=options)
            if decodes:
                payload, params = receive.prepare(draft.num_rows, draft.rows_per_expert)
                dispatch_decode.launch_decode(self._launcher, call.stream, x, parts, routing, params, options)
                handle = make_handle()
            elif options.split:
                payload, _ = receive.prepare(draft.num_rows, draft.rows_per_expert)
                # Not in the hook: one that raises may be called again, and must not have counted yet.
                receive.load()
                handle = make_handle()
                result = received(payload, handle, options)
                fill = functools.partial(receive.fill, early=True)
                return result, handle, self._split(call, (counts, fill), result, handle)
            elif options.static:
                payload, _ = receive.prepare(draft.num_rows, draft.rows_per_expert)
                counts(call.stream, early=True)
                receive.fill(call.stream, early=True)
                handle = make_handle()
            else:
                handle, payload = self._receive_counted(call, counts, receive, make_handle, topk_idx)
            result = received(payload, handle, options)
            call.keep(result, handle)
        return result, handle, Ending(call.event)

    def replay(self, x: WireInput, handle: DispatchHandle, options: DispatchOptions) -> tuple[Received, Ending]:
        _check_addresses(x)
        with self._begin(options, x, handle) as call:
            overflows = torch.empty(2, dtype=torch.int64, device=self._member.device)
            launch_barrier(self._launcher, call.stream, overflows)
            parts = {**addresses_of(handle), "overflows": overflows.data_ptr()}
            self._send(call, x, parts, None, options.wire, options.seed)
            placement = Placement.of(parts, options, handle.num_rows, handle.rows_per_expert)
            receive = Receive(self._launcher, placement, options, self._config.hidden, overflows, places=False)
            payload, _ = receive.prepare(handle.num_rows, handle.rows_per_expert)
            if not options.split:
                receive.fill(call.stream, early=True)
            result = received(payload, handle, options)
            if options.split:
                return result, self._split(call, (receive.fill,), result, handle)
            call.keep(result)
        return result, Ending(call.event)

    def combine(
        self,
        y: torch.Tensor,
        row_values: torch.Tensor | None,
        handle: DispatchHandle,
        options: CombineOptions,
    ) -> tuple[Sums, Ending]:
        _check_addresses(y)
        with self._begin(options, y, row_values, handle) as call:
            sums = combine.allocate(handle, self._config.hidden, row_values is not None)
            if not options.split and combine.is_decode(self._launcher, handle, options.wire, row_values):
                combine.launch_decode(self._launcher, call.stream, y, handle, options, sums)
                call.keep(*sums)
                return sums, Ending(call.event)
            launch_barrier(self._launcher, call.stream, None)
            self._send_sums(call, y, row_values, handle, options)
            receive = functools.partial(
                combine.launch_recv, self._launcher, handle=handle, wire=options.wire, sums=sums
            )
            if options.split:
                return sums, self._split(call, (receive,), *sums, handle)
            receive(call.stream, early=True)
            call.keep(*sums)
        return sums, Ending(call.event)

    def check(self) -> QcommError | None:
        timeout, notice = self._reports_view.timeout, self._reports_view.notice
        if timeout.code:
            return self._timeout_error(timeout)
        if not notice.code:
            return None
        code, expected, seen = notice.code, notice.expected, notice.seen
        notice.code = 0
        if code == BAD_ROUTE:
            return dropped_token_error(self._member.rank, seen)
        return overflow_error(self._member.rank, needed=expected, available=seen)

    def waited_ns(self) -> Sequence[int]:
        state = State.from_buffer_copy(self._state.cpu().numpy().tobytes())
        return state.waited_ns[: self._member.num_ranks]

    def reset(self, generation: int) -> None:
        self._owner = dataclasses.replace(self._owner, generation=generation)
        self._settle()
        self._clear()

    def destroy(self) -> None:
        self._settle()
        self._memory.free()

    def abandon(self) -> None:
        torch.cuda.synchronize(self._member.device)
        abandon(self._memory)

    def _settle(self) -> None:
        """Wait until every rank's calls have ended, and what they sent is there. Collective.

        No flag of theirs may come after flags are cleared, or when the memory is another's.
        """
        torch.cuda.synchronize(self._member.device)
        self._memory.settle()
        synchronize_hosts(self._member)

    def _clear(self) -> None:
        """Forget every earlier call. Collective; no rank's kernels may be running."""
        self._memory.local.zero_()
        self._state.copy_(torch.frombuffer(bytearray(self._first_state()), dtype=torch.uint8))
        self._reports.zero_()
        self._chunks.zero_()
        torch.cuda.synchronize(self._member.device)
        self._calls.forget()
        synchronize_hosts(self._member)

    def _tune(self, tunings: Tunings) -> Tunings:
        """Change how kernels are set, before anything is made."""
        return tunings

    def _nodes_layout(self) -> NodesLayout | None:
        """Return what symmetric memory holds for other nodes."""
        return None

    def _allocate(self, provider: str) -> SymmetricMemory:
        """Allocate symmetric memory. Collective."""
        return allocate(provider, self._layout.num_bytes, self._member)

    def _specialise(self, spec: KernelSpec) -> KernelSpec:
        """Change a kernel's constants."""
        return spec

    def _first_state(self) -> State:
        """Return the state before any call."""
        return State(bad_token=_NO_BAD_TOKEN)

    @property
    def _forward_nodes(self) -> int:
        """Nodes that tokens are numbered within, to be forwarded there."""
        return 0

    @property
    def _forward_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Field and shape of what `Forward` holds besides `node_slot`; nothing where none forwards."""
        return ()

    def _send(
        self, call: Call, x: WireInput, parts: Addresses, routing: Routing | None, wire: WireFormat, seed: int
    ) -> None:
        """Launch what sends tokens, behind `route` or, without a routing, behind the barrier."""
        dispatch.launch_send(self._launcher, call.stream, x, parts, routing, wire, seed)

    def _send_sums(
        self,
        call: Call,
        y: torch.Tensor,
        row_values: torch.Tensor | None,
        handle: DispatchHandle,
        options: CombineOptions,
    ) -> None:
        """Launch what sends sums."""
        combine.launch_send(self._launcher, call.stream, y, row_values, handle, options)

    def _begin(
        self, options: DispatchOptions | CombineOptions, *inputs: object
    ) -> contextlib.AbstractContextManager[Call]:
        """Begin a call, whose event somebody keeps if it is async or split."""
        return self._calls.begin(*inputs, async_op=options.async_op, keeps_event=options.async_op or options.split)

    def _comm(self) -> Comm:
        config, member, layout = self._config, self._member, self._layout
        addresses = self._memory.peers + [0] * (MAX_RANKS - member.num_ranks)
        offsets = {name: offset for name, offset in layout.offsets.items() if hasattr(Comm, name)}
        return Comm(
            peer=(ctypes.c_uint64 * MAX_RANKS)(*addresses),
            state=self._state.data_ptr(),
            reports=self._reports.data_ptr(),
            chunk_flags=self._chunks.data_ptr(),
            chunk_counts=self._chunks[route.MAX_CHUNKS :].data_ptr(),
            deadline_ns=round(member.deadline_s * 1e9),
            rank=member.rank,
            num_ranks=member.num_ranks,
            max_tokens=config.num_max_tokens_per_rank,
            num_experts=config.num_experts,
            num_local_experts=layout.num_local_experts,
            **offsets,
        )

    def _draft(self, num_tokens: int, options: DispatchOptions) -> Draft:
        """Allocate a handle of worst-case length, and what else routing writes."""
        config, num_ranks, num_local = self._config, self._member.num_ranks, self._layout.num_local_experts
        num_records = num_ranks * config.num_max_tokens_per_rank
        rows, rows_per_expert = exchange.worst_case_rows(options, num_records, config.num_topk, num_local)
        plan = make_plan(
            options.recv_layout,
            self._forward_nodes,
            self._forward_shapes,
            num_tokens=num_tokens,
            num_topk=config.num_topk,
            num_ranks=num_ranks,
            num_local_experts=num_local,
            num_records=num_records,
            num_rows=rows,
        )
        return Draft(plan, rows, rows_per_expert, self._member.device)

    def _launch_count(
        self, stream: int, placement: Placement, options: DispatchOptions, *, early: bool = False
    ) -> None:
        """Say what comes."""
        self._sequence = self._sequence % _MAX_SEQUENCE + 1
        host = None if options.static else self._host
        count.launch_count(self._launcher, stream, placement, host, self._sequence, early=early)

    def _receive_counted(
        self,
        call: Call,
        counts: Callable[..., None],
        receive: Receive,
        make_handle: Callable[[], DispatchHandle],
        topk_idx: torch.Tensor,
    ) -> tuple[DispatchHandle, Payload]:
        """Receive as many rows as come, which only the counts tell, that `counts` launches.

        A receive of about the last call's length is launched before they are there, so that the GPU need not wait for
        the host; only if it turns out too short is it launched again, with the right length.
        """
        layout = receive.recv_layout
        guess, payload = self._guess.get(layout, 0), None
        if guess and receive.can_guess:
            payload, _ = receive.prepare(guess, 0)
        counts(call.stream, early=True)
        if payload is not None:
            receive.fill(call.stream, early=True)
            call.join()
        handle, came = make_handle(), self._wait_for_counts(topk_idx)
        num_rows, rows_per_expert = came.rows
        self._guess[layout] = align(num_rows + num_rows // _GUESS_MARGIN, FP8_GROUP_SIZE)
        if payload is None:
            payload = receive.launch(call.stream, num_rows, rows_per_expert, early=True)
        elif num_rows > guess:
            payload = receive.launch_again(call.stream, num_rows)
            call.reopen()
        else:
            payload = dispatch.cut(payload, num_rows)
        recv_counts = tuple(b - a for a, b in itertools.pairwise(came.offsets))
        return handle.cut(num_rows, rows_per_expert, came.per_expert, recv_counts), payload

    def _wait_for_counts(self, topk_idx: torch.Tensor) -> _Counts:
        """Wait for what comes, which `count` tells the host; raise if a rank cannot take part."""
        member, host = self._member, self._host_view
        spins = 0
        while host[count.HOST_SEQUENCE] != self._sequence:
            spins += 1
            if spins % _SPINS_PER_QUERY == 0:
                # The kernels end by their deadline; a broken CUDA context raises here.
                torch.cuda.current_stream().query()
        if not host[count.HOST_READY]:
            while not self._reports_view.timeout.code:
                pass
            raise self._timeout_error(self._reports_view.timeout)
        words = host.tolist()
        bad_rank, bad_token = words[count.HOST_BAD_RANK], words[count.HOST_BAD_TOKEN]
        if bad_rank == member.rank:
            raise routing_error(member.rank, bad_token, topk_idx[bad_token].tolist(), self._config.num_experts)
        if bad_rank >= 0:
            raise peer_routing_error(member.rank, bad_rank, bad_token)
        first = count.HOST_FIXED + member.num_ranks + 1
        rows = words[count.HOST_ROWS], words[count.HOST_ROWS_PER_EXPERT]
        return _Counts(words[count.HOST_FIXED : first], tuple(words[first:]), rows)

    def _timeout_error(self, report: Report) -> QcommTimeoutError:
        phase = PHASES[report.phase]
        return QcommTimeoutError(
            f"rank {report.rank} waited {self._member.deadline_s} s for rank {report.peer} in {phase}: expected call "
            f"{report.expected}, saw {report.seen}; call reset() on every rank to use the buffer again",
            rank=report.rank,
            peer=report.peer,
            phase=phase,
            expected=report.expected,
            seen=report.seen,
        )

    def _capture_error(self, call: bool, hook: bool) -> QcommError:
        rank, words = self._member.rank, {True: "captured", False: "not captured"}
        return QcommError(
            f"rank {rank}: a hook must be called in the CUDA graph capture that its call is in, if any; "
            f"the call is {words[call]}, the hook {words[hook]}",
            rank=rank,
            phase="buffer.hook",
            expected=call,
            seen=hook,
        )

    def _split(self, call: Call, receive: Sequence[Callable[[int], None]], *results: object) -> Ending:
        """Leave the receive of a call, which launches on a stream what fills the results, to its hook."""

        def rest() -> None:
            with self._calls.begin() as resumed:
                if resumed.captured != call.captured:
                    raise self._capture_error(call.captured, resumed.captured)
                resumed.follow(call, *results)
                for launch in receive:
                    launch(resumed.stream)

        return Ending(call.event, rest)


class _Counts(NamedTuple):
    """What a rank is about to receive."""

    offsets: list[int]
    per_expert: tuple[int, ...]
    rows: tuple[int, int]


def _check_addresses(x: WireInput) -> None:
    parts = {"x.data": x.data} if isinstance(x, FP8Tensor) else {}
    parts = {"x.qdata": x.qdata, "x.sf": x.sf} if isinstance(x, MXFP4Tensor) else parts
    parts = {"x": x} if isinstance(x, torch.Tensor) else parts
    for name, part in parts.items():
        multiple = 4 if name == "x.sf" else _POINTER_ALIGNMENT
        if part.data_ptr() % multiple:
            raise ValueError(f"{name} must start at a multiple of {multiple} bytes, got {part.data_ptr():#x}")
