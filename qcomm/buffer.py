"""Buffer: the expert-parallel exchange of one group and shape."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Literal, overload

import torch
import torch.distributed as dist

from qcomm import topology, validate
from qcomm.config import BufferConfig, Member, agree
from qcomm.errors import QcommError
from qcomm.exchange import Sums, WireInput
from qcomm.formats import RecvDtype, RecvLayout, ScaleLayout, WirePrecision
from qcomm.handle import DispatchHandle, Event, Owner, Received
from qcomm.hook import RecvHook
from qcomm.options import CombineOptions, DispatchOptions
from qcomm.stats import BufferStats, CallLog
from qcomm.transport.base import Ending, Transport
from qcomm.transport.select import BACKENDS, PROVIDERS, Choice, choose, create
from qcomm.transport.streams import profiled

_MOST_DEADLINE_S = 1e9
_buffer_numbers = itertools.count()
_buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
"""Every buffer by its number, which is what handles and operators of torch hold of it."""


class Buffer:
    """Dispatch and combine of MoE tokens among the ranks of a group, in quantized records.

    Collective to make and to destroy; owns symmetric memory where the backend has any. One call at a time: calls on
    one buffer are ordered on its device whatever streams they come from. On GPUs each call is an NVTX range,
    "qcomm.dispatch", "qcomm.replay" or "qcomm.combine", and the hook of a split one another, with ".recv" behind. A
    context manager.

    Args:
        group: process group; None for the default group.
        num_experts: experts in all, spread evenly: rank r holds [r * num_experts / num_ranks, ...).
        num_topk: width of `topk_idx`.
        hidden: elements in a token, a multiple of 128.
        num_max_tokens_per_rank: most tokens a rank passes to one dispatch.
        precision: wire format of each leg.
        backend: "auto", "collective", "nvlink" or "nvshmem"; `backend` and `backend_reason` say what auto took and why.
        provider: symmetric memory of the nvlink backend: "auto", "nvshmem" or "torch"; nvshmem has its own.
        device: where tensors live; None is the current CUDA device, or the CPU where there is none.
        deadline_s: seconds any wait for a peer may take, but for those inside NCCL; at most 10**9.
        num_sms: SMs each communication kernel may occupy; None lets qcomm choose.
        comm_stream: stream of `async_op=True` calls; None makes one.
        ranks_per_node: ranks of each node, as if every so many ranks in a row had a host of their own; a divisor of the
            ranks, and no node on two hosts. None takes the hosts, each split into parts of `QCOMM_RANKS_PER_NODE`
            ranks where the environment has that.

    Raises:
        ValueError, TypeError: arguments no buffer can be made from; raised before any rank is spoken to.
        QcommConfigError: ranks disagree; names the field and every rank's value. Or a node of `ranks_per_node` ranks
            is on several hosts; names the hosts and ranks.
        QcommUnsupportedError: the backend asked for cannot run here.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        num_experts: int,
        num_topk: int,
        hidden: int,
        num_max_tokens_per_rank: int,
        precision: WirePrecision | None = None,
        backend: str = "auto",
        provider: str = "auto",
        device: torch.device | str | None = None,
        deadline_s: float = 30.0,
        num_sms: int | None = None,
        comm_stream: torch.cuda.Stream | None = None,
        ranks_per_node: int | None = None,
    ) -> None:
        self._transport: Transport | None = None
        self._hook: RecvHook | None = None
        self._log = CallLog()
        if group is None:
            if not dist.is_initialized():
                raise ValueError("group must be given, or torch.distributed initialised; see qcomm.bootstrap")
            group = dist.group.WORLD
        assert group is not None
        validate.one_of("backend", backend, BACKENDS)
        validate.one_of("provider", provider, PROVIDERS)
        if num_sms is not None:
            validate.positive("num_sms", num_sms)
        validate.seconds("deadline_s", deadline_s, _MOST_DEADLINE_S)
        if precision is not None:
            validate.instance("precision", precision, WirePrecision)
        num_ranks = dist.get_world_size(group)
        validate.buffer_shape(num_experts, num_topk, hidden, num_max_tokens_per_rank, num_ranks)
        topology.check(ranks_per_node, num_ranks)
        self._member = Member(group, dist.get_rank(group), num_ranks, _device(device), deadline_s)
        self._config = BufferConfig(
            num_experts=num_experts,
            num_topk=num_topk,
            hidden=hidden,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            precision=precision or WirePrecision(),
            backend=backend,
            provider=provider,
            device_type=self._member.device.type,
            ranks_per_node=ranks_per_node,
            environ_ranks_per_node=topology.from_environ(os.environ) if ranks_per_node is None else None,
        )
        agree(self._config, self._member)
        self._nodes = topology.find(self._config, self._member)
        self._choice: Choice = choose(self._config, self._member, self._nodes.topology)
        self._owner = Owner(next(_buffer_numbers), 0)
        if comm_stream is None and self._member.device.type == "cuda":
            comm_stream = torch.cuda.Stream(self._member.device, priority=-1)
        self._comm_stream = comm_stream
        self._transport = create(
            self._choice, self._config, self._member, self._owner, comm_stream, num_sms, self._nodes.topology
        )
        _buffers[self._owner.buffer] = self

    @staticmethod
    def of(handle: DispatchHandle) -> Buffer:
        """Return the buffer that a handle belongs to.

        Raises:
            QcommError: it is gone.
        """
        return Buffer.numbered(handle.owner.buffer)

    @staticmethod
    def numbered(number: int) -> Buffer:
        """Return the buffer of a number, `handle.owner.buffer`.

        Raises:
            QcommError: it is gone.
        """
        found = _buffers.get(number)
        if found is None:
            raise QcommError("the buffer that the handle belongs to is gone", phase="buffer.of")
        return found

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._choice.backend

    @property
    def backend_reason(self) -> str:
        """Why that backend; and which nodes it sees, unless all ranks are on one host."""
        return "; ".join(part for part in (self._choice.reason, self._nodes.note) if part)

    @property
    def topology(self) -> topology.Topology:
        """Which ranks share a node."""
        return self._nodes.topology

    @property
    def group(self) -> dist.ProcessGroup:
        """The group it exchanges in."""
        self._live()
        return self._member.group

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return self._member.rank

    @property
    def num_ranks(self) -> int:
        """Ranks in the group."""
        return self._member.num_ranks

    @property
    def num_local_experts(self) -> int:
        """Experts on this rank."""
        return self._config.num_experts // self._member.num_ranks

    @property
    def num_topk(self) -> int:
        """Width of `topk_idx`."""
        return self._config.num_topk

    @property
    def hidden(self) -> int:
        """Elements in a token."""
        return self._config.hidden

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        return self._member.device

    @property
    def symmetric_bytes(self) -> int:
        """Bytes of symmetric memory this rank holds; 0 on the collective backend."""
        return self._live().symmetric_bytes

    @overload
    def dispatch(
        self,
        x: WireInput,
        topk_idx: torch.Tensor | None = ...,
        topk_weights: torch.Tensor | None = ...,
        *,
        handle: DispatchHandle | None = ...,
        recv_layout: RecvLayout | None = ...,
        recv_dtype: RecvDtype | None = ...,
        alignment: int | None = ...,
        columnwise: bool = ...,
        sf_layout: ScaleLayout = ...,
        static: bool | None = ...,
        num_max_recv_tokens: int | None = ...,
        seed: int = ...,
        backward: bool = ...,
        async_op: Literal[False] = ...,
        return_recv_hook: Literal[False] = ...,
    ) -> tuple[Received, DispatchHandle]: ...

    @overload
    def dispatch(
        self,
        x: WireInput,
        topk_idx: torch.Tensor | None = ...,
        topk_weights: torch.Tensor | None = ...,
        *,
        handle: DispatchHandle | None = ...,
        recv_layout: RecvLayout | None = ...,
        recv_dtype: RecvDtype | None = ...,
        alignment: int | None = ...,
        columnwise: bool = ...,
        sf_layout: ScaleLayout = ...,
        static: bool | None = ...,
        num_max_recv_tokens: int | None = ...,
        seed: int = ...,
        backward: bool = ...,
        async_op: Literal[True],
        return_recv_hook: Literal[False] = ...,
    ) -> tuple[Received, DispatchHandle, Event]: ...

    @overload
    def dispatch(
        self,
        x: WireInput,
        topk_idx: torch.Tensor | None = ...,
        topk_weights: torch.Tensor | None = ...,
        *,
        handle: DispatchHandle | None = ...,
        recv_layout: RecvLayout | None = ...,
        recv_dtype: RecvDtype | None = ...,
        alignment: int | None = ...,
        columnwise: bool = ...,
        sf_layout: ScaleLayout = ...,
        static: bool | None = ...,
        num_max_recv_tokens: int | None = ...,
        seed: int = ...,
        backward: bool = ...,
        async_op: Literal[False] = ...,
        return_recv_hook: Literal[True],
    ) -> tuple[Received, DispatchHandle, Callable[[], None]]: ...

    def dispatch(
        self,
        x: WireInput,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        handle: DispatchHandle | None = None,
        recv_layout: RecvLayout | None = None,
        recv_dtype: RecvDtype | None = None,
        alignment: int | None = None,
        columnwise: bool = False,
        sf_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
        static: bool | None = None,
        num_max_recv_tokens: int | None = None,
        seed: int = 0,
        backward: bool = False,
        async_op: bool = False,
        return_recv_hook: bool = False,
    ) -> (
        tuple[Received, DispatchHandle]
        | tuple[Received, DispatchHandle, Event]
        | tuple[Received, DispatchHandle, Callable[[], None]]
    ):
        """Send every token to the ranks of its experts, at most one copy per rank. Collective.

        Waits on the host for the counts, to size the result, unless `static` or a handle is given.

        Args:
            x: `[num_tokens, hidden]` bfloat16, FP8Tensor (wire fp8, bit-unchanged, or mxfp4) or MXFP4Tensor
                (wire mxfp4, as is). Contiguous. num_tokens may differ between ranks and may be 0.
            topk_idx: `[num_tokens, num_topk]` int32 or int64 experts, distinct in a row, -1 for none.
            topk_weights: `[num_tokens, num_topk]` float32 routing weights; None for an unweighted combine.
            handle: replay the route of an earlier dispatch of this buffer instead of giving topk_idx; layout,
                alignment and static are then the handle's.
            recv_layout: "expert_major" (default; by expert, then source rank, then source token), "token_major"
                (one row per arriving token) or "batched" (`[num_local_experts, rows, hidden]`).
            recv_dtype: "fp8", "bf16" or "mxfp4"; None is "fp8", on the bf16 wire "bf16".
            alignment: expert groups start at multiples of it (default 128).
            columnwise: also give the column-wise FP8 operand; needs "expert_major", "fp8" and an alignment that is a
                multiple of 128.
            sf_layout: storage of FP8 scales.
            static: no host synchronisation: worst-case or given capacity, counts on the device only.
            num_max_recv_tokens: static capacity in rows (per expert for "batched"); a multiple of alignment.
            seed: random bits of stochastic rounding.
            backward: use the `dispatch_bwd` leg.
            async_op: run on the communication stream and also return an event.
            return_recv_hook: only send, and also return a hook, a callable without arguments that launches the receive
                on the stream then current. Needs `static` or a handle, and no `async_op`. Once the sends are through,
                nothing of the call occupies an SM until the hook is called. Only what is launched after the hook may
                read the result, the handle's tensors included, and no other call of the buffer may be made before it;
                in a CUDA graph both are captured together. On the collective backend the call does everything, and
                the hook is only called.

        Returns:
            What arrived, the handle for combine and replay; and the event with `async_op=True`, or the hook with
            `return_recv_hook=True`.

        Raises:
            ValueError, TypeError: wrong arguments, before anything is launched.
            QcommRoutingError: topk_idx holds an expert out of range or twice; no rank keeps a result of the call.
            QcommPeerError: a peer's topk_idx does (static calls on a GPU tell only the rank itself).
            QcommTimeoutError: a peer did not come before the deadline. A timeout after routing is raised by `check`
                or by a later call. On the nvlink backend `reset` makes the buffer usable again.
            QcommOverflowError: an earlier static receive ran out of rows.
            QcommError: a hook is outstanding; before anything is launched. From the hook: it was called before, or
                dropped by `reset` or `destroy`.
        """
        transport = self._idle()
        self.check()
        _check_split(return_recv_hook, async_op)
        if handle is None:
            if topk_idx is None:
                raise ValueError("topk_idx must be given unless handle is, got None")
            if return_recv_hook and not static:
                raise ValueError(
                    f"return_recv_hook must be False unless static=True or a handle is given, got True, static={static}"
                )
            num_tokens = self._check_routing(x, topk_idx, topk_weights)
        else:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("topk_idx and topk_weights must be None with a handle, got tensors")
            self._check_handle(handle)
            num_tokens = handle.num_tokens
        options = self._options(
            handle,
            recv_layout=recv_layout,
            recv_dtype=recv_dtype,
            alignment=alignment,
            columnwise=columnwise,
            sf_layout=sf_layout,
            static=static,
            num_max_recv_tokens=num_max_recv_tokens,
            seed=seed,
            backward=backward,
            async_op=async_op,
            split=return_recv_hook,
        )
        validate.tokens(x, num_tokens=num_tokens, hidden=self._config.hidden, wire=options.wire, device=self.device)
        if handle is None:
            assert topk_idx is not None
            with profiled("dispatch", self.device):
                received, handle, ending = transport.dispatch(x, topk_idx, topk_weights, options)
            self._log.num_dispatches += 1
            call = "dispatch"
        else:
            with profiled("replay", self.device):
                received, ending = transport.replay(x, handle, options)
            self._log.num_replays += 1
            call = "replay"
        self._log.dispatched = handle, received.spread_overflows, options.wire
        if ending.receive is not None:
            return received, handle, self._leave(call, ending.receive)
        return (received, handle, ending.event) if async_op else (received, handle)

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: DispatchHandle,
        *,
        weighted: bool = ...,
        seed: int = ...,
        backward: bool = ...,
        async_op: Literal[False] = ...,
        return_recv_hook: Literal[False] = ...,
    ) -> torch.Tensor: ...

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: DispatchHandle,
        *,
        weighted: bool = ...,
        seed: int = ...,
        backward: bool = ...,
        async_op: Literal[True],
        return_recv_hook: Literal[False] = ...,
    ) -> tuple[torch.Tensor, Event]: ...

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: DispatchHandle,
        *,
        weighted: bool = ...,
        seed: int = ...,
        backward: bool = ...,
        async_op: Literal[False] = ...,
        return_recv_hook: Literal[True],
    ) -> tuple[torch.Tensor, Callable[[], None]]: ...

    def combine(
        self,
        y: torch.Tensor,
        handle: DispatchHandle,
        *,
        weighted: bool = True,
        seed: int = 0,
        backward: bool = False,
        async_op: bool = False,
        return_recv_hook: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Event] | tuple[torch.Tensor, Callable[[], None]]:
        """Sum the experts' outputs of each token and bring the sums back to the tokens' ranks. Collective.

        Each rank sums a token's rows in float32 in top-k order, rounds the sum once to the wire format, and the
        token's rank adds these in float32 by rank: the same order, hence the same bits, on every run. Does not
        synchronise with the host.

        Args:
            y: bfloat16, shaped like `recv.x` with `hidden` columns; padding rows are not read.
            handle: of the dispatch that `y` belongs to.
            weighted: multiply each row by its routing weight (1 where dispatch had none). Must be False for
                "token_major", whose rows are already sums over experts.
            seed: random bits of stochastic rounding.
            backward: use the `combine_bwd` leg.
            async_op: run on the communication stream and also return an event.
            return_recv_hook: only sum and send, and also return a hook that launches the receive, as for `dispatch`.

        Returns:
            `[num_tokens, hidden]` bfloat16, zero for a token with no expert; and the event with `async_op=True`, or the
            hook with `return_recv_hook=True`.

        Raises:
            ValueError, TypeError: wrong arguments, before anything is launched.
            QcommTimeoutError, QcommPeerError, QcommError: as for `dispatch`.
        """
        for name, value in (("weighted", weighted), ("backward", backward), ("async_op", async_op)):
            validate.boolean(name, value)
        _check_split(return_recv_hook, async_op)
        wire = self._config.precision.leg("combine", backward)
        options = CombineOptions(wire, weighted=weighted, seed=seed, async_op=async_op, split=return_recv_hook)
        sums, ending = self._combine(y, None, handle, options)
        if ending.receive is not None:
            return sums.out, self._leave("combine", ending.receive)
        return (sums.out, ending.event) if async_op else sums.out

    def _options(
        self,
        handle: DispatchHandle | None,
        *,
        recv_layout: RecvLayout | None,
        recv_dtype: RecvDtype | None,
        alignment: int | None,
        columnwise: bool,
        sf_layout: ScaleLayout,
        static: bool | None,
        num_max_recv_tokens: int | None,
        seed: int,
        backward: bool = False,
        async_op: bool = False,
        split: bool = False,
    ) -> DispatchOptions:
        """Give a dispatch's choices their defaults, a handle's where one is replayed, and check them."""
        if handle is None:
            recv_layout, alignment = recv_layout or "expert_major", 128 if alignment is None else alignment
            static = False if static is None else static
        else:
            for name, given, held in (
                ("recv_layout", recv_layout, handle.recv_layout),
                ("alignment", alignment, handle.alignment),
                ("static", static, handle.static),
                ("num_max_recv_tokens", num_max_recv_tokens, None),
            ):
                if given is not None and given != held:
                    raise ValueError(f"{name} must be the handle's, {held}, got {given}")
            recv_layout, alignment, static = handle.recv_layout, handle.alignment, handle.static
        validate.boolean("backward", backward)
        wire = self._config.precision.leg("dispatch", backward)
        if recv_dtype is None:
            recv_dtype = "bf16" if wire.kind == "bf16" else "fp8"
        options = DispatchOptions(
            recv_layout=recv_layout,
            recv_dtype=recv_dtype,
            alignment=alignment,
            columnwise=columnwise,
            static=static,
            capacity=num_max_recv_tokens,
            sf_layout=sf_layout,
            wire=wire,
            seed=seed,
            async_op=async_op,
            split=split,
        )
        options.check()
        return options

    def _return_gradients(
        self, rows: torch.Tensor, row_values: torch.Tensor | None, handle: DispatchHandle, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bring the gradients of a dispatch's rows back to its tokens, and those of its weights. Collective.

        Args:
            rows: as `y` of `combine`; summed without weights, on the `combine_bwd` leg.
            row_values: `[rows]` float32, "token_major" `[rows, num_topk]`, contiguous; or None.
            handle: of the dispatch.
            seed: random bits of stochastic rounding.

        Returns:
            `[num_tokens, hidden]` bfloat16, and `[num_tokens, num_topk]` float32, which nothing rounds.
        """
        wire = self._config.precision.leg("combine", backward=True)
        options = CombineOptions(wire, weighted=False, seed=seed, async_op=False, split=False)
        sums, _ = self._combine(rows, row_values, handle, options)
        return sums.out, sums.values

    def _combine(
        self, y: torch.Tensor, row_values: torch.Tensor | None, handle: DispatchHandle, options: CombineOptions
    ) -> tuple[Sums, Ending]:
        transport = self._idle()
        self.check()
        self._check_handle(handle)
        if handle.recv_layout == "token_major" and options.weighted:
            raise ValueError("weighted must be False with recv_layout 'token_major', whose rows are sums, got True")
        rows: tuple[int, ...] = (handle.num_rows,)
        if handle.recv_layout == "batched":
            rows = (self.num_local_experts, handle.rows_per_expert)
        validate.tensor("y", y, shape=(*rows, self._config.hidden), dtypes=(torch.bfloat16,), device=self.device)
        validate.seed(options.seed)
        with profiled("combine", self.device):
            sums, ending = transport.combine(y, row_values, handle, options)
        self._log.num_combines += 1
        self._log.combined = handle, options.wire
        return sums, ending

    def check(self) -> None:
        """Raise what the device reported since the last check: an overflow, a bad route or a timeout.

        Every dispatch and combine checks first. On the nvlink backend this does not wait for the device; synchronise
        before calling it to hear of everything launched so far. On the collective backend it waits for earlier static
        calls.
        """
        failure = self._live().check()
        if failure is not None:
            raise failure

    def stats(self) -> BufferStats:
        """Return what this rank's last calls moved, how many there were, and how long they waited for each peer.

        Calls only keep a reference to what they returned; the figures are computed here, which waits for the device.

        Raises:
            QcommError: a hook is outstanding, without which there is nothing to count.
        """
        transport = self._idle()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        rank, hidden = self._member.rank, self._config.hidden
        return self._log.stats(rank, self.topology, self.num_local_experts, hidden, transport.waited_ns())

    def reset(self) -> None:
        """Make the buffer usable after a timeout: forget calls in flight, and every handle and hook. Collective.

        The collective backend cannot mend its process group: a gloo group does not survive a timeout.
        """
        transport = self._live()
        self._drop_hook("reset()")
        self._owner = Owner(self._owner.buffer, self._owner.generation + 1)
        transport.reset(self._owner.generation)
        self._log.forget()

    def destroy(self) -> None:
        """Free what the buffer holds. Collective; a second call does nothing. See `abandon` for dead peers."""
        if self._transport is not None:
            self._let_go("destroy()").destroy()

    def abandon(self) -> None:
        """Stop using the buffer without waiting for the peers, as after a peer died. Not collective.

        Memory that peers may still write to stays allocated until the process ends. Leaving a `with` block by an
        exception does this, since the peers may not be leaving theirs.
        """
        if self._transport is not None:
            self._let_go("abandon()").abandon()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.destroy()
        else:
            self.abandon()

    def __del__(self) -> None:
        if getattr(self, "_transport", None) is not None:
            warnings.warn(
                "a qcomm.Buffer was not destroyed; use it as a context manager", ResourceWarning, stacklevel=1
            )

    def _live(self) -> Transport:
        if self._transport is None:
            raise QcommError("the buffer was destroyed", rank=self._member.rank, phase="buffer.use")
        return self._transport

    def _idle(self) -> Transport:
        """Return the transport of a buffer whose last call is whole."""
        transport = self._live()
        if self._hook is not None:
            self._hook.require_called()
        return transport

    def _leave(self, call: str, receive: Callable[[], None]) -> RecvHook:
        """Leave the receive of a call to a hook."""
        self._hook = RecvHook(call, self._member.rank, self._member.device, receive)
        return self._hook

    def _let_go(self, by: str) -> Transport:
        """Give up the transport; and the group, whose threads must end before the interpreter does."""
        transport, self._transport = self._live(), None
        self._drop_hook(by)
        self._log.forget()
        self._member = dataclasses.replace(self._member, group=None)  # type: ignore[arg-type]
        return transport

    def _drop_hook(self, by: str) -> None:
        if self._hook is not None:
            self._hook.drop(by)

    def _check_handle(self, handle: object) -> None:
        if not isinstance(handle, DispatchHandle):
            raise TypeError(f"handle must be a DispatchHandle, got {type(handle).__name__}")
        if handle.owner.buffer != self._owner.buffer:
            raise ValueError(f"handle must come from this buffer ({self._owner}), got {handle.owner}")
        if handle.owner.generation != self._owner.generation:
            raise ValueError(f"handle must be newer than the last reset ({self._owner}), got {handle.owner}")

    def _check_routing(self, x: WireInput, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None) -> int:
        config = self._config
        shape = (None, config.num_topk)
        validate.tensor("topk_idx", topk_idx, shape=shape, dtypes=(torch.int32, torch.int64), device=self.device)
        num_tokens = topk_idx.shape[0]
        if num_tokens > config.num_max_tokens_per_rank:
            raise ValueError(
                f"topk_idx must have at most num_max_tokens_per_rank = {config.num_max_tokens_per_rank} rows, "
                f"got {num_tokens}"
            )
        if topk_weights is not None:
            full = (num_tokens, config.num_topk)
            validate.tensor("topk_weights", topk_weights, shape=full, dtypes=(torch.float32,), device=self.device)
        return num_tokens


def _check_split(return_recv_hook: bool, async_op: bool) -> None:
    validate.boolean("return_recv_hook", return_recv_hook)
    if return_recv_hook and async_op:
        raise ValueError(f"async_op must be False with return_recv_hook=True, got {async_op}")


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device
