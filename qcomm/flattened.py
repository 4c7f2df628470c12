"""A static handle as operators of torch take it: its tensors, the "route", and its numbers, the "facts".

A route has the tensors in the order of `part_shapes`, empty ones for what the handle has not. Sizes are those of the
buffer: num_ranks, num_local_experts, num_topk, and the records that may come.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from qcomm.formats import RecvLayout
from qcomm.handle import FLOAT_PARTS, NOT_BY_TOKEN, PARTS, DispatchHandle, Owner, part_shapes


def facts_of(handle: DispatchHandle) -> list[int]:
    """Return the handle's numbers."""
    owner, has_weights = handle.owner, int(handle.has_weights)
    return [owner.buffer, owner.generation, handle.alignment, handle.num_rows, handle.rows_per_expert, has_weights]


def route_of(handle: DispatchHandle) -> list[torch.Tensor]:
    """Return the handle's tensors, without gradients."""
    absent = handle.row_src.new_empty(0)
    tensors = [getattr(handle, name) for name in PARTS]
    return [absent if tensor is None else tensor.detach() for tensor in tensors]


def handle_of(recv_layout: str, facts: list[int], route: list[torch.Tensor]) -> DispatchHandle:
    """Return the handle of a route and facts."""
    buffer, generation, alignment, num_rows, rows_per_expert, has_weights = facts
    tensors: dict[str, Any] = dict(zip(PARTS, route, strict=True))
    if recv_layout == "token_major":
        tensors |= dict.fromkeys(NOT_BY_TOKEN)
    return DispatchHandle(
        owner=Owner(buffer, generation),
        num_tokens=num_tokens_of(route),
        recv_layout=cast(RecvLayout, recv_layout),
        alignment=alignment,
        static=True,
        num_rows=num_rows,
        rows_per_expert=rows_per_expert,
        has_weights=bool(has_weights),
        num_tokens_per_expert_list=None,
        send_counts=None,
        recv_counts=None,
        **tensors,
    )


def num_tokens_of(route: list[torch.Tensor]) -> int:
    """Return how many tokens a rank sent along a route."""
    return route[PARTS.index("send_slot")].shape[0]


def shapes_of(recv_layout: str, facts: list[int], sizes: list[int], num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a route's tensors, by name."""
    num_ranks, num_local_experts, num_topk, num_records = sizes
    return part_shapes(
        cast(RecvLayout, recv_layout),
        num_tokens=num_tokens,
        num_topk=num_topk,
        num_ranks=num_ranks,
        num_local_experts=num_local_experts,
        num_records=num_records,
        num_rows=facts[3],
    )


def num_words(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the words of all tensors together."""
    return sum(map(math.prod, shapes.values()))


def joined(handle: DispatchHandle, shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
    """Return the handle's tensors one after the other, int32: without a copy where a backend made them so."""
    first = handle.row_src
    storage = first.untyped_storage()
    if handle.num_tokens_per_expert.untyped_storage().data_ptr() == storage.data_ptr():
        return first.new_empty(0).set_(storage, 0, (num_words(shapes),), (1,))
    parts = []
    for name, shape in shapes.items():
        part = getattr(handle, name)
        words = first.new_empty(0) if part is None else part.flatten().view(torch.int32)
        parts.append(torch.nn.functional.pad(words, (0, math.prod(shape) - len(words))))
    return torch.cat(parts)


def cut(piece: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> list[torch.Tensor]:
    """Return the route whose tensors were joined."""
    route, start = [], 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        part = piece[start:end].view(shape)
        route.append(part.view(torch.float32) if name in FLOAT_PARTS else part)
        start = end
    return route
