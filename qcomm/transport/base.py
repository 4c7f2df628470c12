"""The protocol between Buffer and a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from qcomm.errors import QcommError, QcommOverflowError, QcommPeerError, QcommRoutingError
from qcomm.exchange import Payload, Sums, WireInput, describe_bad_route
from qcomm.handle import DispatchHandle, Event, Received
from qcomm.options import CombineOptions, DispatchOptions


class Ending(NamedTuple):
    """How a call ends.

    Attributes:
        event: after all that the call launched.
        receive: of a split call, launches the rest of it on the current stream; else None.
    """

    event: Event
    receive: Callable[[], None] | None = None


class Transport(Protocol):
    """One backend of one Buffer.

    Arguments were checked by the Buffer; every method but `check`, `waited_ns` and `abandon` is collective.
    """

    def dispatch(
        self,
        x: WireInput,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        options: DispatchOptions,
    ) -> tuple[Received, DispatchHandle, Ending]:
        """Route, send and receive."""

    def replay(self, x: WireInput, handle: DispatchHandle, options: DispatchOptions) -> tuple[Received, Ending]:
        """Send and receive along a known route."""

    def combine(
        self,
        y: torch.Tensor,
        row_values: torch.Tensor | None,
        handle: DispatchHandle,
        options: CombineOptions,
    ) -> tuple[Sums, Ending]:
        """Sum rows per token and return the sums to the tokens' ranks; with `row_values`, each row's number too."""

    symmetric_bytes: int

    def check(self) -> QcommError | None:
        """Take the failure noted since the last check, if any."""

    def waited_ns(self) -> Sequence[int]:
        """Read how long this rank waited for each to begin its calls, since it was made or reset; 0 if not measured."""

    def reset(self, generation: int) -> None:
        """Make the transport usable again after a failure."""

    def destroy(self) -> None:
        """Free everything it holds."""

    def abandon(self) -> None:
        """Let go without the peers, which may be dead: memory that they can write to stays. Not collective."""


def received(payload: Payload, handle: DispatchHandle, options: DispatchOptions) -> Received:
    """Join the rows of one call with what its handle knows of them."""
    by_token = handle.recv_layout == "token_major"

    def shaped(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None or handle.recv_layout != "batched":
            return t
        return t.unflatten(0, (len(handle.num_tokens_per_expert), handle.rows_per_expert))

    x = shaped(payload.x)
    assert x is not None
    return Received(
        x=x,
        sf=shaped(payload.sf),
        x_columnwise=payload.x_columnwise,
        sf_columnwise=payload.sf_columnwise,
        num_tokens_per_expert=handle.num_tokens_per_expert,
        num_tokens_per_expert_list=handle.num_tokens_per_expert_list,
        group_offsets=handle.group_offsets,
        weights=handle.row_weights,
        src=handle.row_src,
        topk_idx=rows_of_records(handle.record_topk_idx, handle.num_rows, -1) if by_token else None,
        topk_weights=rows_of_records(handle.record_topk_weights, handle.num_rows, 0) if by_token else None,
        spread_overflows=payload.spread_overflows,
        wire=options.wire,
    )


def rows_of_records(records: torch.Tensor, num_rows: int, fill: int) -> torch.Tensor:
    """Cut or fill up what is known by record to the rows of a "token_major" result."""
    missing = num_rows - len(records)
    return records[:num_rows] if missing <= 0 else torch.nn.functional.pad(records, (0, 0, 0, missing), value=fill)


def overflow_error(rank: int, needed: int, available: int) -> QcommOverflowError:
    """Build the error of a static receive that ran out of rows."""
    return QcommOverflowError(
        f"rank {rank}: a static receive needed {needed} rows, num_max_recv_tokens gave {available}",
        rank=rank,
        phase="dispatch.place",
        expected=needed,
        seen=available,
    )


def routing_error(rank: int, token: int, ids: list[int], num_experts: int) -> QcommRoutingError:
    """Build the error of the rank that gave a bad topk_idx."""
    text = describe_bad_route(token, ids, num_experts)
    return QcommRoutingError(text, rank=rank, phase="dispatch.layout", seen=ids)


def peer_routing_error(rank: int, peer: int, token: int) -> QcommPeerError:
    """Build the error of the ranks whose peer gave a bad topk_idx."""
    return QcommPeerError(
        f"rank {peer} gave a bad topk_idx (token {token}); no rank has a result",
        rank=rank,
        peer=peer,
        phase="dispatch.layout",
        seen=token,
    )


def dropped_token_error(rank: int, token: int) -> QcommRoutingError:
    """Build the error of a static dispatch that left out a token with a bad route."""
    text = f"rank {rank}: topk_idx[{token}] must hold distinct experts in range; the token was dropped"
    return QcommRoutingError(text, rank=rank, phase="dispatch.layout", seen=token)
