"""A handle in the making.

Kernels need the addresses of its parts at once, the caller its tensors when the call returns. Making these takes the
host longer than launching kernels does, so they are made behind the launches, while the GPU works.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from qcomm.formats import RecvLayout
from qcomm.handle import FLOAT_PARTS, NOT_BY_TOKEN, PARTS, DispatchHandle, Forward, Owner, part_shapes
from qcomm.options import DispatchOptions

_PLANS = 1024
"""Plans that are remembered, one for each number of tokens and rows."""


class _Part(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    dtype: torch.dtype


class Plan(NamedTuple):
    """Where the parts of a handle, and what else routing writes, lie in one piece of `num_words` 4-byte words."""

    parts: Mapping[str, _Part]
    num_words: int


@functools.lru_cache(maxsize=_PLANS)
def make_plan(
    recv_layout: RecvLayout,
    forward_nodes: int,
    forward_shapes: tuple[tuple[str, tuple[int, ...]], ...],
    **sizes: int,
) -> Plan:
    """Plan a handle of worst-case length.

    Args:
        recv_layout: of the dispatch.
        forward_nodes: nodes that tokens are numbered within, to be forwarded there, or 0.
        forward_shapes: name and shape of what `Forward` holds besides `node_slot`.
        sizes: those that `part_shapes` takes.

    Returns:
        The parts of `part_shapes` in their order; then `ordinals` of `route`, `source_starts` of `count`, and those of
        `forward_shapes`. A token's `node_slot` stands behind its `send_slot`.
    """
    shapes = part_shapes(recv_layout, **sizes)
    num_tokens, num_ranks = sizes["num_tokens"], sizes["num_ranks"]
    shapes["send_slot"] = (num_tokens, num_ranks + forward_nodes)
    shapes["ordinals"] = (num_tokens, sizes["num_topk"])
    shapes["source_starts"] = (num_ranks, sizes["num_local_experts"])
    shapes |= dict(forward_shapes)
    parts, start = {}, 0
    for name, shape in shapes.items():
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        parts[name] = _Part(shape, strides, start, torch.float32 if name in FLOAT_PARTS else torch.int32)
        start += math.prod(shape)
    slots = parts["send_slot"]
    parts["send_slot"] = slots._replace(shape=(num_tokens, num_ranks))
    if forward_nodes:
        parts["node_slot"] = slots._replace(shape=(num_tokens, forward_nodes), start=slots.start + num_ranks)
    if recv_layout == "token_major":
        for name in NOT_BY_TOKEN:
            del parts[name]
    return Plan(parts, start)


class Draft:
    """A handle whose tensors are made when they are asked for.

    Args:
        plan: of its parts.
        num_rows, rows_per_expert: of the worst case, as in the handle.
        device: to allocate on.

    Attributes:
        addresses: of all parts.
        num_rows, rows_per_expert: as given.
    """

    def __init__(self, plan: Plan, num_rows: int, rows_per_expert: int, device: torch.device) -> None:
        self._parts = plan.parts
        self.num_rows, self.rows_per_expert = num_rows, rows_per_expert
        self._memory = torch.empty(plan.num_words, dtype=torch.int32, device=device)
        base = self._memory.data_ptr()
        self.addresses = {name: base + 4 * part.start for name, part in plan.parts.items()}

    def handle(self, owner: Owner, options: DispatchOptions, *, has_weights: bool) -> DispatchHandle:
        """Return the handle, of which the host knows no counts."""
        # A "token_major" handle lacks some.
        tensors: dict[str, Any] = {name: self._tensor(name) if name in self._parts else None for name in PARTS}
        forward = None
        if "node_slot" in self._parts:
            forward = Forward(self._tensor("node_slot"), self._tensor("counts"), self._tensor("slots"))
        return DispatchHandle(
            owner=owner,
            num_tokens=tensors["send_slot"].shape[0],
            recv_layout=options.recv_layout,
            alignment=options.alignment,
            static=options.static,
            num_rows=self.num_rows,
            rows_per_expert=self.rows_per_expert,
            has_weights=has_weights,
            num_tokens_per_expert_list=None,
            send_counts=None,
            recv_counts=None,
            forward=forward,
            **tensors,
        )

    def _tensor(self, name: str) -> torch.Tensor:
        shape, strides, start, dtype = self._parts[name]
        part = self._memory.as_strided(shape, strides, start)
        return part if dtype is torch.int32 else part.view(dtype)
