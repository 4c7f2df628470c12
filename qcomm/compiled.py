"""Dispatch and combine as operators of torch, for `torch.compile`; imported when one of them is first traced.

An operator sees a buffer as its number and a handle as `qcomm.flattened` has it. Only static calls become operators,
for their shapes are known without counts. All are marked as having effects, in order: a compiler drops none of them
and keeps their order, so that the calls come on every rank as the program has them.

An operator must not return memory twice. So the handle's tensors come as one piece, which is cut outside, and the
routing weights, which have a gradient, as a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from qcomm import exchange, gradients
from qcomm.buffer import Buffer
from qcomm.exchange import Payload, WireInput
from qcomm.flattened import cut, facts_of, handle_of, joined, num_tokens_of, num_words, route_of, shapes_of
from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE, ScaleLayout
from qcomm.handle import DispatchHandle, Received
from qcomm.tensors import FP8Tensor, MXFP4Tensor, empty_scales
from qcomm.transport.base import received, rows_of_records
from qcomm.validate import signed64

P = ParamSpec("P")
R = TypeVar("R")


_REASON = (
    "of qcomm only dispatch and combine with static=True are part of a graph; other calls wait for counts on the host, "
    "and swiglu_experts may; those that relay between nodes are not part of one either"
)


@torch.compiler.disable(reason=_REASON)
def outside(call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call outside of the graph."""
    return call(*args, **kwargs)


def dispatch(
    x: WireInput,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    buffer: Buffer,
    handle: DispatchHandle | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, Received, DispatchHandle]:
    """Dispatch statically, in code that is traced.

    Args:
        x: as for `qcomm.dispatch`, as are the others.
        topk_idx: `[num_tokens, num_topk]`; None with a handle.
        topk_weights: `[num_tokens, num_topk]` or None.
        buffer: to exchange through.
        handle: to replay, or None.
        options: the rest of them.

    Returns:
        The rows and the weights that have gradients; what arrived; the handle.
    """
    chosen = buffer._options(handle, **options)
    layout, num_ranks, num_local = chosen.recv_layout, buffer.num_ranks, buffer.num_local_experts
    num_records = num_ranks * buffer._config.num_max_tokens_per_rank
    if handle is None:
        owner, has_weights = buffer._owner, int(topk_weights is not None)
        num_rows, rows_per_expert = exchange.worst_case_rows(chosen, num_records, buffer.num_topk, num_local)
        facts = [owner.buffer, owner.generation, chosen.alignment, num_rows, rows_per_expert, has_weights]
        route = []
    else:
        buffer._check_handle(handle)
        facts, route = facts_of(handle), route_of(handle)
    sizes = [num_ranks, num_local, buffer.num_topk, num_records]
    rows, weights, data, sf, x_columnwise, sf_columnwise, overflows, piece = _dispatch(
        *_parts(x),
        topk_idx,
        topk_weights,
        chosen.capacity,
        chosen.recv_dtype,
        chosen.columnwise,
        chosen.sf_layout.value,
        signed64(chosen.seed),
        sizes,
        layout,
        facts,
        route,
    )
    if handle is None:
        handle = handle_of(layout, facts, cut(piece, shapes_of(layout, facts, sizes, x.shape[0])))
    plain = chosen.recv_dtype == "bf16"
    payload = Payload(
        rows if plain else data,
        None if plain else sf,
        x_columnwise if chosen.columnwise else None,
        sf_columnwise if chosen.columnwise else None,
        overflows,
    )
    result = received(payload, handle, chosen)
    return rows.view(*result.x.shape[:-1], rows.shape[1]), weights, result, handle


def combine(y: torch.Tensor, handle: DispatchHandle, weighted: bool, seed: int) -> torch.Tensor:
    """Combine statically, in code that is traced; see `qcomm.combine`."""
    row_weights = handle.row_weights if weighted else None
    out: torch.Tensor = _combine(
        y, row_weights, weighted, signed64(seed), handle.recv_layout, facts_of(handle), route_of(handle)
    )
    return out


@torch.library.custom_op("qcomm::dispatch", mutates_args=())
def _dispatch(
    x: torch.Tensor,
    x_sf: torch.Tensor | None,
    hadamard: bool,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    capacity: int | None,
    recv_dtype: str,
    columnwise: bool,
    sf_layout: str,
    seed: int,
    sizes: list[int],
    recv_layout: str,
    facts: list[int],
    route: list[torch.Tensor],
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    buffer = Buffer.numbered(facts[0])
    options: dict[str, Any] = {"topk_idx": topk_idx, "recv_dtype": recv_dtype}
    if route:
        # Its weights were given with the route; here they only get their gradient.
        options["handle"] = handle_of(recv_layout, facts, route)
    else:
        options |= {"topk_weights": topk_weights, "recv_layout": recv_layout, "alignment": facts[2]}
        options |= {"static": True, "num_max_recv_tokens": capacity}
    options |= {"columnwise": columnwise, "sf_layout": ScaleLayout(sf_layout), "seed": _unsigned64(seed)}
    result, handle = buffer.dispatch(_whole(x, x_sf, hadamard), **options)
    buffer._log.forget()
    num_rows, hidden = handle.num_rows, buffer.hidden
    data, sf = result.x.flatten(0, -2), None if result.sf is None else result.sf.flatten(0, -2)
    rows = data if recv_dtype == "bf16" else _carrier(data, num_rows, hidden)
    weights = result.topk_weights if recv_layout == "token_major" else result.weights
    assert weights is not None
    columns, columns_sf = result.x_columnwise, result.sf_columnwise
    if columns is not None and columns_sf is not None:
        columns = _filled_up(columns, num_rows * hidden)
        columns_sf = _filled_up(columns_sf, num_rows // FP8_GROUP_SIZE)
    piece = None if route else joined(handle, shapes_of(recv_layout, facts, sizes, x.shape[0]))
    others = (None if recv_dtype == "bf16" else data, sf, columns, columns_sf, result.spread_overflows, piece)
    return rows, weights.clone(), *(x.new_empty(0) if other is None else other for other in others)


@_dispatch.register_fake
def _(
    x: torch.Tensor,
    x_sf: torch.Tensor | None,
    hadamard: bool,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    capacity: int | None,
    recv_dtype: str,
    columnwise: bool,
    sf_layout: str,
    seed: int,
    sizes: list[int],
    recv_layout: str,
    facts: list[int],
    route: list[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    num_rows, hidden = facts[3], x.shape[1] * (2 if x.dtype == torch.uint8 else 1)
    data = sf = columns = columns_sf = piece = x.new_empty(0)
    rows = _carrier(x, num_rows, hidden)
    if recv_dtype == "bf16":
        rows = x.new_empty(num_rows, hidden, dtype=torch.bfloat16)
    elif recv_dtype == "mxfp4":
        data = x.new_empty(num_rows, hidden // 2, dtype=torch.uint8)
        sf = x.new_empty(num_rows, hidden // BLOCK_SIZE, dtype=torch.uint8)
    else:
        data = x.new_empty(num_rows, hidden, dtype=torch.float8_e4m3fn)
        sf = empty_scales(num_rows, hidden // FP8_GROUP_SIZE, ScaleLayout(sf_layout), x.device)
    if columnwise:
        columns = x.new_empty(num_rows * hidden, dtype=torch.float8_e4m3fn)
        columns_sf = x.new_empty(num_rows // FP8_GROUP_SIZE, hidden, dtype=torch.float32)
    if not route:
        shapes = shapes_of(recv_layout, facts, sizes, x.shape[0])
        piece = x.new_empty(num_words(shapes), dtype=torch.int32)
    by_token = recv_layout == "token_major"
    weights = x.new_empty((num_rows, sizes[2]) if by_token else (num_rows,), dtype=torch.float32)
    return rows, weights, data, sf, columns, columns_sf, x.new_empty(2, dtype=torch.int64), piece


def _keep_for_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, (seed, sizes, recv_layout, facts, route) = inputs[0], inputs[-5:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*(route or output[-1:]))
    ctx.facts, ctx.recv_layout, ctx.sizes, ctx.seed = facts, recv_layout, sizes, seed
    ctx.replays, ctx.num_tokens, ctx.hidden = bool(route), x.shape[0], output[0].shape[1]


def _dispatch_backward(
    ctx: Any, d_rows: torch.Tensor | None, d_weights: torch.Tensor | None, *_: None
) -> tuple[Any, ...]:
    route = list(ctx.saved_tensors)
    num_given = len(route) if ctx.replays else 0
    if not ctx.replays:
        route = cut(route[0], shapes_of(ctx.recv_layout, ctx.facts, ctx.sizes, ctx.num_tokens))
    if d_rows is None:
        d_rows = route[0].new_zeros(ctx.facts[3], ctx.hidden, dtype=torch.bfloat16)
    d_x, d_topk_weights = _gradients_of_dispatch(
        d_rows, d_weights, ctx.sizes[2], ctx.seed, ctx.recv_layout, ctx.facts, route
    )
    needs_x, _, _, _, needs_weights, *_ = ctx.needs_input_grad
    return (
        d_x if needs_x else None,
        None,
        None,
        None,
        d_topk_weights if needs_weights and d_weights is not None else None,
        *[None] * 8,
        [None] * num_given,
    )


_dispatch.register_autograd(_dispatch_backward, setup_context=_keep_for_dispatch)


@torch.library.custom_op("qcomm::gradients_of_dispatch", mutates_args=())
def _gradients_of_dispatch(
    d_rows: torch.Tensor,
    d_weights: torch.Tensor | None,
    num_topk: int,
    seed: int,
    recv_layout: str,
    facts: list[int],
    route: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    buffer, handle = Buffer.numbered(facts[0]), handle_of(recv_layout, facts, route)
    topk_idx = None
    if recv_layout == "token_major":
        topk_idx = rows_of_records(handle.record_topk_idx, handle.num_rows, -1)
    elif recv_layout == "batched":
        d_rows = d_rows.unflatten(0, (-1, handle.rows_per_expert))
    d_x, d_topk_weights = gradients.of_dispatch(buffer, d_rows, d_weights, topk_idx, handle, _unsigned64(seed))
    buffer._log.forget()
    return d_x, d_x.new_empty(0) if d_topk_weights is None else d_topk_weights


@_gradients_of_dispatch.register_fake
def _(
    d_rows: torch.Tensor,
    d_weights: torch.Tensor | None,
    num_topk: int,
    seed: int,
    recv_layout: str,
    facts: list[int],
    route: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens = num_tokens_of(route)
    d_x = d_rows.new_empty(num_tokens, d_rows.shape[-1])
    if d_weights is None:
        return d_x, d_x.new_empty(0)
    return d_x, d_weights.new_empty(num_tokens, num_topk)


@torch.library.custom_op("qcomm::combine", mutates_args=())
def _combine(
    y: torch.Tensor,
    row_weights: torch.Tensor | None,
    weighted: bool,
    seed: int,
    recv_layout: str,
    facts: list[int],
    route: list[torch.Tensor],
) -> torch.Tensor:
    buffer, handle = Buffer.numbered(facts[0]), handle_of(recv_layout, facts, route)
    out = buffer.combine(y, handle, weighted=weighted, seed=_unsigned64(seed))
    buffer._log.forget()
    return out


@_combine.register_fake
def _(
    y: torch.Tensor,
    row_weights: torch.Tensor | None,
    weighted: bool,
    seed: int,
    recv_layout: str,
    facts: list[int],
    route: list[torch.Tensor],
) -> torch.Tensor:
    return y.new_empty(num_tokens_of(route), y.shape[-1])


def _keep_for_combine(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y, row_weights, _, seed, recv_layout, facts, route = inputs
    keeps_y = row_weights is not None and ctx.needs_input_grad[1]
    ctx.save_for_backward(row_weights, y if keeps_y else None, *route)
    ctx.facts, ctx.recv_layout, ctx.seed, ctx.shape = facts, recv_layout, seed, y.shape


def _combine_backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    row_weights, y, *route = ctx.saved_tensors
    d_y, d_weights = _gradients_of_combine(
        d_out, row_weights, y, list(ctx.shape), ctx.seed, ctx.recv_layout, ctx.facts, route
    )
    return d_y, None if y is None else d_weights, *[None] * 4, [None] * len(route)


_combine.register_autograd(_combine_backward, setup_context=_keep_for_combine)


@torch.library.custom_op("qcomm::gradients_of_combine", mutates_args=())
def _gradients_of_combine(
    d_out: torch.Tensor,
    row_weights: torch.Tensor | None,
    y: torch.Tensor | None,
    shape: list[int],
    seed: int,
    recv_layout: str,
    facts: list[int],
    route: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    buffer, handle = Buffer.numbered(facts[0]), handle_of(recv_layout, facts, route)
    d_y, d_weights = gradients.of_combine(buffer, d_out, row_weights, y, handle, _unsigned64(seed))
    buffer._log.forget()
    return d_y, d_y.new_empty(0) if d_weights is None else d_weights


@_gradients_of_combine.register_fake
def _(
    d_out: torch.Tensor,
    row_weights: torch.Tensor | None,
    y: torch.Tensor | None,
    shape: list[int],
    seed: int,
    recv_layout: str,
    facts: list[int],
    route: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    d_y = d_out.new_empty(shape)
    return d_y, d_y.new_empty(0) if y is None or row_weights is None else torch.empty_like(row_weights)


for _operator in (_dispatch, _gradients_of_dispatch, _combine, _gradients_of_combine):
    _register_effectful_op(_operator._opoverload, _EffectType.ORDERED)


def _parts(x: WireInput) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    if isinstance(x, MXFP4Tensor):
        return x.qdata, x.sf, x.hadamard
    return (x.data, x.sf, False) if isinstance(x, FP8Tensor) else (x, None, False)


def _whole(data: torch.Tensor, sf: torch.Tensor | None, hadamard: bool) -> WireInput:
    if sf is None:
        return data
    return MXFP4Tensor(data, sf, hadamard) if data.dtype == torch.uint8 else FP8Tensor(data, sf)


def _carrier(like: torch.Tensor, num_rows: int, hidden: int) -> torch.Tensor:
    """Stand in for rows in bfloat16, without memory of its own."""
    return like.new_zeros((), dtype=torch.bfloat16).expand(num_rows, hidden)


def _filled_up(x: torch.Tensor, length: int) -> torch.Tensor:
    """Lengthen what the collective backend cut to the rows that came."""
    if len(x) == length:
        return x
    out = torch.zeros(length, *x.shape[1:], device=x.device).to(x.dtype)
    out[: len(x)] = x
    return out


def _unsigned64(value: int) -> int:
    return value % 2**64
