"""What the backward passes of dispatch and combine compute: the same in eager and in compiled code."""

from __future__ import annotations

import torch

from qcomm.buffer import Buffer
from qcomm.handle import DispatchHandle

BACKWARD_SEED = 1 << 63
"""Added to a call's seed on its way back, so that no leg draws the bits of another one."""


def of_dispatch(
    buffer: Buffer,
    d_rows: torch.Tensor,
    d_weights: torch.Tensor | None,
    topk_idx: torch.Tensor | None,
    handle: DispatchHandle,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of a dispatch's tokens and routing weights. Collective.

    Args:
        buffer: that dispatched.
        d_rows: bfloat16, shaped like `recv.x` with `hidden` columns.
        d_weights: of `recv.weights`, or in the "token_major" layout of `recv.topk_weights`.
        topk_idx: `recv.topk_idx`, in the "token_major" layout only.
        handle: of the dispatch.
        seed: of the dispatch.

    Returns:
        `[num_tokens, hidden]` bfloat16, and `[num_tokens, num_topk]` float32 if there is a `d_weights`.
    """
    if d_weights is not None and topk_idx is not None:
        # Of a row's entries only those are its own whose expert is here.
        d_weights = torch.where(topk_idx >= 0, d_weights, 0)
    d_weights = None if d_weights is None else d_weights.contiguous()
    return buffer._return_gradients(d_rows.contiguous(), d_weights, handle, seed ^ BACKWARD_SEED)


def of_combine(
    buffer: Buffer,
    d_out: torch.Tensor,
    row_weights: torch.Tensor | None,
    y: torch.Tensor | None,
    handle: DispatchHandle,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of what was combined and of its routing weights. Collective.

    Args:
        buffer: that combined.
        d_out: `[num_tokens, hidden]` bfloat16.
        row_weights: the handle's, if the combine was weighted.
        y: what was combined, if its routing weights need a gradient.
        handle: of the combine.
        seed: of the combine.

    Returns:
        The gradient of y, in its shape, and that of `row_weights` if there is a y.
    """
    received, _ = buffer.dispatch(
        d_out.contiguous(), handle=handle, recv_dtype="bf16", backward=True, seed=seed ^ BACKWARD_SEED
    )
    d_rows = received.x
    if handle.static:
        # Rows past the last group hold anything.
        filled = (handle.row_record >= 0).view(*d_rows.shape[:-1], 1)
        d_rows = torch.where(filled, d_rows, 0)
    if row_weights is None:
        return d_rows, None
    weights = row_weights.view(*d_rows.shape[:-1], 1)
    d_weights = (
        None if y is None else (d_rows.to(row_weights.dtype) * y.to(row_weights.dtype)).sum(-1).view_as(row_weights)
    )
    return (weights * d_rows).to(d_rows.dtype), d_weights
