"""Differentiable dispatch and combine.

Four legs of a training step: dispatch carries tokens forward, and its gradient comes back as a combine; combine
carries the experts' sums forward, and its gradient goes out as a dispatch along the same route. Each has a wire of its
own (`WirePrecision`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qcomm import gradients
from qcomm.buffer import Buffer
from qcomm.exchange import WireInput
from qcomm.formats import RecvDtype, RecvLayout, ScaleLayout
from qcomm.handle import DispatchHandle, Received


def dispatch(
    x: WireInput,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    buffer: Buffer,
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
) -> tuple[Received, DispatchHandle]:
    """Send every token to the ranks of its experts, as `Buffer.dispatch` does, differentiably. Collective.

    Gradients reach `x` (bfloat16) and `topk_weights`. They enter through

    - `recv.x` where it is bfloat16, else `recv.grad_carrier`: a bfloat16 stand-in of the rows without memory of its
      own. An autograd Function that computes on `recv.x` takes it as one more input and returns there the gradient of
      the rows, `[rows, hidden]` bfloat16;
    - `recv.weights` (of "token_major" `recv.topk_weights`), for experts that apply the weights themselves, and for
      `combine`, which reads them from the handle.

    The backward pass is collective too: it runs `Buffer.combine` on the `combine_bwd` leg, on every rank, one with no
    token or no row included. Every rank's loss must depend on what its dispatch returned, as it does through `combine`.

    Args:
        x: `[num_tokens, hidden]` bfloat16; an FP8Tensor or MXFP4Tensor gets no gradient.
        topk_idx: as for `Buffer.dispatch`; None with a handle.
        topk_weights: as for `Buffer.dispatch`; with a handle those it was made with.
        buffer: to exchange through; its calls are collective and ordered, in the backward pass too.
        handle: replay the route of an earlier dispatch, as recomputed activations do; weights are then the handle's.
        recv_layout: as for `Buffer.dispatch`, as are the next six.
        recv_dtype: what the rows arrive as.
        alignment: multiple at which expert groups start.
        columnwise: whether the column-wise operand is wanted too.
        sf_layout: storage of FP8 scales.
        static: whether not to synchronise with the host.
        num_max_recv_tokens: static capacity.
        seed: random bits of stochastic rounding; the backward pass draws others.

    Returns:
        What arrived, and the handle for `combine`.

    Raises:
        As `Buffer.dispatch`, in the backward pass as `Buffer.combine`. RuntimeError: differentiated twice.
    """
    options: dict[str, Any] = {
        "handle": handle,
        "recv_layout": recv_layout,
        "recv_dtype": recv_dtype,
        "alignment": alignment,
        "columnwise": columnwise,
        "sf_layout": sf_layout,
        "static": static,
        "num_max_recv_tokens": num_max_recv_tokens,
        "seed": seed,
    }
    if not torch.compiler.is_compiling():
        return _dispatch(x, topk_idx, topk_weights, buffer, options)
    from qcomm import compiled

    if _is_operator(handle) if handle is not None else static and not buffer.topology.relays:
        return _with_gradients(*compiled.dispatch(x, topk_idx, topk_weights, buffer, **options))
    return compiled.outside(_dispatch, x, topk_idx, topk_weights, buffer, options)


def _is_operator(handle: DispatchHandle) -> bool:
    """Tell whether operators take the handle: one that is static and, over several nodes, has nothing to pass on."""
    return handle.static and handle.relay is None and handle.forward is None


def _dispatch(
    x: WireInput,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    buffer: Buffer,
    options: dict[str, Any],
) -> tuple[Received, DispatchHandle]:
    call = _DispatchCall(buffer, x, topk_idx, topk_weights, options)
    tokens = x if isinstance(x, torch.Tensor) else None
    rows, weights = _Dispatch.apply(tokens, topk_weights, call)
    assert call.received is not None
    assert call.handle is not None
    return _with_gradients(rows, weights, call.received, call.handle)


def _with_gradients(
    rows: torch.Tensor, weights: torch.Tensor | None, received: Received, made: DispatchHandle
) -> tuple[Received, DispatchHandle]:
    """Put what has gradients into what a dispatch returned."""
    by_token = made.recv_layout == "token_major"
    changes: dict[str, Any] = {"topk_weights" if by_token else "weights": weights}
    changes["x" if rows.dtype == received.x.dtype else "grad_carrier"] = rows
    received = dataclasses.replace(received, **changes)
    return received, made if by_token else dataclasses.replace(made, row_weights=weights)


def combine(y: torch.Tensor, handle: DispatchHandle, *, weighted: bool | None = None, seed: int = 0) -> torch.Tensor:
    """Bring the experts' outputs back to the tokens, summed, as `Buffer.combine` does, differentiably. Collective.

    Gradients reach `y`, and through the handle the routing weights of `qcomm.dispatch`, if weighted. The backward pass
    is collective: it runs `Buffer.dispatch` along the handle's route on the `dispatch_bwd` leg, on every rank.

    Args:
        y: bfloat16, shaped like `recv.x` with `hidden` columns. Kept for the backward pass if weights need gradients.
        handle: of the `qcomm.dispatch` that `y` belongs to.
        weighted: whether to multiply each row by its routing weight; None does, except for "token_major". False where
            the experts have done so with `recv.weights`.
        seed: random bits of stochastic rounding; the backward pass draws others.

    Returns:
        `[num_tokens, hidden]` bfloat16.

    Raises:
        As `Buffer.combine`, in the backward pass as `Buffer.dispatch`. QcommError: the handle's buffer is gone.
        RuntimeError: differentiated twice.
    """
    if weighted is None:
        weighted = handle.recv_layout != "token_major"
    if not torch.compiler.is_compiling():
        return _combine(y, handle, weighted, seed)
    from qcomm import compiled

    if _is_operator(handle):
        return compiled.combine(y, handle, weighted, seed)
    return compiled.outside(_combine, y, handle, weighted, seed)


def _combine(y: torch.Tensor, handle: DispatchHandle, weighted: bool, seed: int) -> torch.Tensor:
    buffer, weights = Buffer.of(handle), handle.row_weights
    # The buffer's log keeps the handle, which must not keep the graph.
    kept = handle if weights is None or not weights.requires_grad else _without(handle, weights)
    out: torch.Tensor = _Combine.apply(y, weights if weighted else None, _CombineCall(buffer, kept, weighted, seed))
    return out


@dataclasses.dataclass
class _DispatchCall:
    """What `_Dispatch` needs besides tensors that have gradients, and what it gives besides them."""

    buffer: Buffer
    x: WireInput
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    options: dict[str, Any]
    received: Received | None = None
    handle: DispatchHandle | None = None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor | None, topk_weights: torch.Tensor | None, call: _DispatchCall
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights = None if call.options["handle"] is not None else topk_weights
        received, handle = call.buffer.dispatch(call.x, call.topk_idx, weights, **call.options)
        call.received, call.handle = received, handle
        ctx.dtype = torch.bfloat16 if x is None else x.dtype
        ctx.set_materialize_grads(False)
        rows, shape = received.x, (*received.x.shape[:-1], call.x.shape[-1])
        if rows.dtype != ctx.dtype:
            rows = torch.zeros((), dtype=torch.bfloat16, device=rows.device).expand(shape)
        by_token = handle.recv_layout == "token_major"
        weights = received.topk_weights if by_token else received.weights
        # An object of its own: the handle's may be an output of a replayed call, and the buffer's log keeps it.
        weights = None if weights is None else weights.detach()
        if weights is not None and not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(weights)
        # Nothing that ctx keeps may be an output: it would keep ctx, and neither would ever be freed.
        ctx.buffer, ctx.handle = call.buffer, _without(handle, rows, handle.row_weights)
        ctx.seed, ctx.shape, ctx.device = call.options["seed"], shape, rows.device
        ctx.topk_idx = received.topk_idx if by_token else None
        return rows, weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_rows: torch.Tensor | None, d_weights: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        if d_rows is None:
            d_rows = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)
        d_x, d_topk_weights = gradients.of_dispatch(ctx.buffer, d_rows, d_weights, ctx.topk_idx, ctx.handle, ctx.seed)
        return d_x if ctx.needs_input_grad[0] else None, d_topk_weights if ctx.needs_input_grad[1] else None, None


def _without(handle: DispatchHandle, *outputs: torch.Tensor | None) -> DispatchHandle:
    """Return the handle with other tensor objects in place of a Function's outputs, over the same memory."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(handle):
        value = getattr(handle, field.name)
        if isinstance(value, torch.Tensor) and any(value is output for output in outputs):
            changes[field.name] = value.detach()
    return dataclasses.replace(handle, **changes)


@dataclasses.dataclass(frozen=True)
class _CombineCall:
    """What `_Combine` needs besides tensors that have gradients."""

    buffer: Buffer
    handle: DispatchHandle
    weighted: bool
    seed: int


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, row_weights: torch.Tensor | None, call: _CombineCall) -> torch.Tensor:
        ctx.call = call
        keeps_y = row_weights is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(row_weights, y if keeps_y else None)
        return call.buffer.combine(y, call.handle, weighted=call.weighted, seed=call.seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        call = ctx.call
        row_weights, y = ctx.saved_tensors
        d_y, d_weights = gradients.of_combine(call.buffer, d_out, row_weights, y, call.handle, call.seed)
        return d_y, d_weights, None
