"""What dispatch returns: the received rows, and the handle that combine and replay need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch

from qcomm.formats import RecvLayout, WireFormat
from qcomm.tensors import FP8Tensor, MXFP4Tensor


class Event(Protocol):
    """What `async_op=True` returns: a torch.cuda.Event, or a completed event on CPU."""

    def wait(self) -> None:
        """Make the current stream wait for the operation."""

    def synchronize(self) -> None:
        """Block the host until the operation has finished."""

    def query(self) -> bool:
        """Tell whether the operation has finished."""


class CompletedEvent:
    """The event of an operation that finished before it returned."""

    def wait(self) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True."""
        return True


@dataclasses.dataclass(frozen=True)
class Owner:
    """Names the buffer, and its generation, that a handle belongs to; `reset()` starts a new generation."""

    buffer: int
    generation: int


@dataclasses.dataclass(frozen=True, eq=False)
class Relay:
    """What a rank passes on within its node, of a dispatch over several nodes of several ranks.

    A token goes once to each node that it has experts on, to the rank of the sender's place in its node: the relay.
    A relayed record is one such token; they are numbered by source node, then token. Lengths as for `DispatchHandle`.

    Attributes:
        node_slot: `[num_tokens, num_nodes]` int32: of this rank's tokens, the record number at the relay of that node
            among this rank's records, -1 where it did not go.
        src_offsets: `[num_nodes + 1]` int64: first relayed record of each source node, and the number of them.
        src_token: `[relayed]` int32.
        rank_slot: `[relayed, ranks_per_node]` int32: the record number at that rank of the node among those from this
            relay, -1 where it did not go.
        recv_offsets: `[ranks_per_node + 1]` int64: first record from each relay, as records come.
        arrival: `[records]` int64: place of each record among them as they come: by relay, source node, token.
        node_send_counts, node_recv_counts: records per node on the host, or None.
        send_counts, recv_counts: records per rank of the node, as sent by and to the relays, or None.
    """

    node_slot: torch.Tensor
    src_offsets: torch.Tensor
    src_token: torch.Tensor
    rank_slot: torch.Tensor
    recv_offsets: torch.Tensor
    arrival: torch.Tensor
    node_send_counts: tuple[int, ...] | None
    node_recv_counts: tuple[int, ...] | None
    send_counts: tuple[int, ...] | None
    recv_counts: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """What a rank passes on as a relay where kernels do it: of other nodes' tokens; those of its own go straight.

    Attributes:
        node_slot: as in `Relay`, -1 for the own node.
        counts: `[num_nodes]` int32: relayed records from each node, 0 from the own.
        slots: `[num_nodes, num_max_tokens_per_rank, 1 + ranks_per_node]` int32: source token of each, then `rank_slot`
            as in `Relay`; valid are as many for each node as `counts` says.
    """

    node_slot: torch.Tensor
    counts: torch.Tensor
    slots: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class DispatchHandle:
    """Where every token of one dispatch went. Immutable; valid until its buffer is reset or destroyed.

    A record is one token as it arrived at this rank; records are numbered by source rank, then by token. Tensors live
    on the buffer's device. Those of records, and `row_record`, may be longer than what is valid, which is the first
    `recv_offsets[-1]` records; in static mode so may those of rows, of which the ones below `group_offsets[-1]` are.

    Attributes:
        owner: buffer and generation it belongs to.
        num_tokens: tokens this rank sent from.
        recv_layout, alignment, static: as given to dispatch.
        num_rows: rows of `recv.x` (its leading axes multiplied).
        rows_per_expert: rows of one expert in the "batched" layout, else 0.
        has_weights: whether routing weights were given.
        send_slot: `[num_tokens, num_ranks]` int32: the token's record number at that rank among this rank's
            records, -1 where it did not go.
        recv_offsets: `[num_ranks + 1]` int32: first record of each source rank, and the number of records.
        record_src_token: `[records]` int32.
        record_topk_idx: `[records, num_topk]` int32 local expert ids, -1 where the expert is on another rank.
        record_topk_weights: `[records, num_topk]` float32.
        record_rows: `[records, num_topk]` int32: rows in `recv.x` of the record's experts, -1 for none; in the
            "token_major" layout `[records, 1]`, the record itself.
        row_record: `[num_rows]` int32 record of each row, -1 for padding.
        row_src: `[num_rows, 2]` int32: source rank and token of each row, -1 for padding.
        row_weights: `[num_rows]` float32, 0 for padding; None in the "token_major" layout.
        num_tokens_per_expert: `[num_local_experts]` int32.
        num_tokens_per_expert_list: the same on the host, None in static mode.
        group_offsets: `[num_local_experts + 1]` int32: first row of each expert, and the end of the last; None
            in the "token_major" layout.
        send_counts, recv_counts: records per peer on the host, each None where the host does not know it.
        relay: what this rank passes on; None where records go straight to the ranks of their experts.
        forward: the same where kernels pass it on.
    """

    owner: Owner
    num_tokens: int
    recv_layout: RecvLayout
    alignment: int
    static: bool
    num_rows: int
    rows_per_expert: int
    has_weights: bool
    send_slot: torch.Tensor
    recv_offsets: torch.Tensor
    record_src_token: torch.Tensor
    record_topk_idx: torch.Tensor
    record_topk_weights: torch.Tensor
    record_rows: torch.Tensor
    row_record: torch.Tensor
    row_src: torch.Tensor
    row_weights: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    num_tokens_per_expert_list: tuple[int, ...] | None
    group_offsets: torch.Tensor | None
    send_counts: tuple[int, ...] | None
    recv_counts: tuple[int, ...] | None
    relay: Relay | None = None
    forward: Forward | None = None

    def cut(
        self,
        num_rows: int,
        rows_per_expert: int,
        num_tokens_per_expert_list: tuple[int, ...],
        recv_counts: tuple[int, ...],
    ) -> DispatchHandle:
        """Return the handle for what came, of one for the worst case; no copies.

        The host does it while the GPU waits for what comes next, and dataclasses.replace takes five times as long.
        """
        made = object.__new__(DispatchHandle)
        made.__dict__.update(
            self.__dict__,
            num_rows=num_rows,
            rows_per_expert=rows_per_expert,
            row_src=self.row_src[:num_rows],
            row_weights=None if self.row_weights is None else self.row_weights[:num_rows],
            num_tokens_per_expert_list=num_tokens_per_expert_list,
            recv_counts=recv_counts,
        )
        return made

    @property
    def relayed(self) -> bool:
        """Whether tokens went to each node once, to be passed on there."""
        return self.relay is not None or self.forward is not None


def part_shapes(
    recv_layout: RecvLayout,
    *,
    num_tokens: int,
    num_topk: int,
    num_ranks: int,
    num_local_experts: int,
    num_records: int,
    num_rows: int,
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a worst-case handle's tensors, by name, in the order in which one piece of memory has them.

    Each is of 4-byte words. What a "token_major" handle has not stands there too, `row_weights` without elements.
    """
    by_token = recv_layout == "token_major"
    # By token these are the result's rows, of which there may be more than records. To pad them afterwards would
    # be to read what the hook of a split call has yet to write.
    known = max(num_records, num_rows) if by_token else num_records
    return {
        "row_src": (num_rows, 2),
        "row_weights": (0 if by_token else num_rows,),
        "row_record": (num_rows,),
        "send_slot": (num_tokens, num_ranks),
        "recv_offsets": (num_ranks + 1,),
        "record_src_token": (num_records,),
        "record_topk_idx": (known, num_topk),
        "record_topk_weights": (known, num_topk),
        "record_rows": (num_records, 1 if by_token else num_topk),
        "num_tokens_per_expert": (num_local_experts,),
        "group_offsets": (num_local_experts + 1,),
    }


PARTS = tuple(
    part_shapes("expert_major", num_tokens=0, num_topk=0, num_ranks=0, num_local_experts=0, num_records=0, num_rows=0)
)
FLOAT_PARTS = ("row_weights", "record_topk_weights")
NOT_BY_TOKEN = ("row_weights", "group_offsets")
"""Parts that are float32, the others being int32; and those that a "token_major" handle has not."""

Addresses = Mapping[str, int]
"""Where the parts of a handle stand on the device, by name; those that it has not are missing."""


def addresses_of(handle: DispatchHandle) -> Addresses:
    """Return the addresses of a handle's parts, and of what `forward` tells."""
    tensors = {name: getattr(handle, name) for name in PARTS}
    if handle.forward is not None:
        tensors |= {"counts": handle.forward.counts, "slots": handle.forward.slots}
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Received:
    """What a rank received. Tensors are the caller's: no later call overwrites them.

    Attributes:
        x: what the expert GEMM reads: `[rows, hidden]` float8_e4m3fn or bfloat16, or uint8 MXFP4 data
            `[rows, hidden // 2]`; with the "batched" layout `[num_local_experts, rows, ...]`. Padding rows inside
            a group are zero. In static mode rows from `group_offsets[-1]` on are unspecified, and so are a "batched"
            expert's rows past its count.
        sf: float32 `[..., hidden // 128]` for fp8, uint8 `[..., hidden // 32]` for mxfp4, None for bf16.
        x_columnwise: `[rows * hidden]` float8_e4m3fn: each expert's transposed `[hidden, rows_e]` block, one after
            the other; None unless asked for.
        sf_columnwise: `[rows // 128, hidden]` float32, one scale per 128 rows of a column.
        num_tokens_per_expert: `[num_local_experts]` int32 on the device.
        num_tokens_per_expert_list: the same on the host where dispatch synchronised anyway, else None.
        group_offsets: `[num_local_experts + 1]` int32 first row of each expert; None for "token_major".
        weights: `[rows]` float32 routing weight of each row, 0 for padding; None for "token_major".
        src: `[rows, 2]` int32: source rank and source token of each row, -1 for padding.
        topk_idx, topk_weights: `[rows, num_topk]` local expert ids (-1 elsewhere) and weights, "token_major" only.
        spread_overflows: `[2]` int64 on the device: blocks whose exponent distance was above 14, so that E4M3
            rounded them, in `x` and in `x_columnwise`.
        wire: format the rows travelled in.
        grad_carrier: of `qcomm.dispatch`, where `x` is not bfloat16: a bfloat16 tensor of the rows' shape without
            memory of its own, where what computes on `x` returns the gradient of the rows; else None.
    """

    x: torch.Tensor
    sf: torch.Tensor | None
    x_columnwise: torch.Tensor | None
    sf_columnwise: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    num_tokens_per_expert_list: tuple[int, ...] | None
    group_offsets: torch.Tensor | None
    weights: torch.Tensor | None
    src: torch.Tensor
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    spread_overflows: torch.Tensor
    wire: WireFormat
    grad_carrier: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor | FP8Tensor | MXFP4Tensor:
        """Return `x` with its scales as one object, rows flattened: bfloat16, FP8Tensor or MXFP4Tensor."""
        x = self.x.flatten(0, -2)
        if self.sf is None:
            return x
        sf = self.sf.flatten(0, -2) if self.sf.dim() > 2 else self.sf
        return MXFP4Tensor(x, sf, self.wire.hadamard) if x.dtype == torch.uint8 else FP8Tensor(x, sf)
