"""SwiGLU experts over what dispatch delivered, as one autograd Function that keeps its operands in MXFP4.

The recipe of arXiv 2603.02731: the tokens that came in MXFP4 become FP8 by exponent alignment for the forward product
and are kept as they came; SwiGLU's input is kept in MXFP4; the weight gradient takes the column-wise FP8 operand made
of what was kept. Gradients, weights and SwiGLU's output are FP8 where they enter products.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from qcomm import reference, reference_swiglu, validate
from qcomm.formats import FP8_GROUP_SIZE
from qcomm.handle import DispatchHandle, Received
from qcomm.moe.products import Columns, Groups, Rows, decode_rows, grouped_mm, grouped_wgrad
from qcomm.moe.quantize import quantize_rows, quantize_weights
from qcomm.ops.dequantize import dequantize
from qcomm.ops.fp8_transpose import fp8_transpose
from qcomm.ops.mxfp4_to_fp8 import mxfp4_to_fp8
from qcomm.ops.mxfp4_to_fp8_columnwise import mxfp4_to_fp8_columnwise
from qcomm.ops.swiglu import swiglu_backward, swiglu_bf16, swiglu_forward
from qcomm.tensors import FP8Tensor, MXFP4Tensor

Keep = Literal["mxfp4", "fp8", "bf16"]
KEEPS: tuple[Keep, ...] = ("mxfp4", "fp8", "bf16")
"""What the dispatched tokens and SwiGLU's input are kept as; "mxfp4" and "fp8" multiply in FP8, "bf16" in BF16."""

Recompute = Literal["none", "swiglu"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "swiglu")
"""What backward computes anew: nothing, or SwiGLU's output from its kept input."""


def swiglu_experts(
    recv: Received,
    handle: DispatchHandle,
    w1: torch.Tensor,
    w2: torch.Tensor,
    *,
    keep: Keep = "mxfp4",
    recompute: Recompute = "none",
    weighted: bool = False,
) -> torch.Tensor:
    """Run every local expert on its rows: `w2 @ (silu(gate) * up)` with gate and up of `w1 @ row`. Differentiable once.

    Gradients reach w1, w2, the tokens and the routing weights, through what `qcomm.dispatch` returned.

    Args:
        recv: of `qcomm.dispatch` with recv_layout "expert_major", recv_dtype `keep`, row-major scales and an alignment
            that is a multiple of 128.
        handle: that came with it.
        w1: `[num_local_experts, 2 * intermediate, hidden]` bfloat16, gate then up.
        w2: `[num_local_experts, hidden, intermediate]` bfloat16. Hidden and intermediate are multiples of 128 where
            `keep` is not "bf16".
        keep: what the rows and SwiGLU's input are kept as until backward, and with it which products run.
        recompute: "none" keeps SwiGLU's output too, in FP8 ("bf16": in BF16); "swiglu" computes it anew from the kept
            input, whose rounding is then in w2's gradient.
        weighted: multiply SwiGLU's output by `recv.weights`; combine then with weighted=False. A weighted combine keeps
            the experts' output in bfloat16 for the gradient of the weights, nearly four times the rows in MXFP4.

    Returns:
        `[rows, hidden]` bfloat16 for `combine`; rows past the last group are unspecified.

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    if torch.compiler.is_compiling():
        from qcomm import compiled

        return compiled.outside(_swiglu_experts, recv, handle, w1, w2, keep, recompute, weighted)
    return _swiglu_experts(recv, handle, w1, w2, keep, recompute, weighted)


def _swiglu_experts(
    recv: Received,
    handle: DispatchHandle,
    w1: torch.Tensor,
    w2: torch.Tensor,
    keep: Keep,
    recompute: Recompute,
    weighted: bool,
) -> torch.Tensor:
    validate.one_of("keep", keep, KEEPS)
    validate.one_of("recompute", recompute, RECOMPUTES)
    if handle.recv_layout != "expert_major":
        raise ValueError(f"recv must have the layout 'expert_major', got {handle.recv_layout!r}")
    if handle.alignment % FP8_GROUP_SIZE:
        raise ValueError(f"alignment must be a multiple of {FP8_GROUP_SIZE}, got {handle.alignment}")
    rows = recv.tensor()
    kind = {torch.Tensor: "bf16", FP8Tensor: "fp8", MXFP4Tensor: "mxfp4"}[type(rows)]
    if kind != keep:
        raise ValueError(f"recv must be dispatched with recv_dtype={keep!r}, what is kept, got {kind!r}")
    any_size, dtypes = (None, None, None), (torch.bfloat16,)
    validate.tensor("w1", w1, shape=any_size, dtypes=dtypes, device=rows.device, contiguous=False)
    count, width = w1.shape[0], w1.shape[1] // 2
    hidden, multiple = rows.shape[1], 1 if keep == "bf16" else FP8_GROUP_SIZE
    validate.multiple("intermediate", width, multiple)
    validate.tensor("w1", w1, shape=(count, 2 * width, hidden), dtypes=dtypes, device=rows.device)
    validate.tensor("w2", w2, shape=(count, hidden, width), dtypes=dtypes, device=rows.device)
    if count != recv.num_tokens_per_expert.shape[0]:
        raise ValueError(f"w1 must be of {recv.num_tokens_per_expert.shape[0]} experts, got {count}")
    carrier = recv.x if recv.grad_carrier is None else recv.grad_carrier
    call = _Call(rows, Groups.of(handle), keep, recompute)
    y: torch.Tensor = _SwigluExperts.apply(carrier, recv.weights if weighted else None, w1, w2, call)
    return y


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the Function needs besides tensors that have gradients."""

    rows: Rows | MXFP4Tensor
    groups: Groups
    keep: Keep
    recompute: Recompute


class _SwigluExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, carrier: torch.Tensor, weights: torch.Tensor | None, w1: torch.Tensor, w2: torch.Tensor, call: _Call
    ) -> torch.Tensor:
        groups = call.groups
        if call.keep == "bf16":
            x = call.rows
            assert isinstance(x, torch.Tensor)
            gate_up = grouped_mm(x, w1, groups)
            h: Rows = _swiglu(call.keep, gate_up, weights)
            y = grouped_mm(h, w2, groups)
            kept_gate_up: Rows | MXFP4Tensor = gate_up
        else:
            gate_up = grouped_mm(_by_rows(call.rows), quantize_weights(w1), groups)
            h, saved = swiglu_forward(gate_up, weights=weights)
            y = grouped_mm(h, quantize_weights(w2), groups)
            kept_gate_up = saved if call.keep == "mxfp4" else quantize_rows(gate_up)
        ctx.groups, ctx.keep = groups, call.keep
        ctx.hadamard = isinstance(call.rows, MXFP4Tensor) and call.rows.hadamard
        # Of frozen weights no operand is kept.
        _, _, needs_w1, needs_w2, _ = ctx.needs_input_grad
        kept_rows = _parts(call.rows) if needs_w1 else (None, None)
        kept_h = _parts(h) if needs_w2 and call.recompute == "none" else (None, None)
        ctx.save_for_backward(weights, w1, w2, *kept_rows, *_parts(kept_gate_up), *kept_h)
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_y: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        groups, keep = ctx.groups, ctx.keep
        weights, w1, w2, x_data, x_sf, gate_up_data, gate_up_sf, h_data, h_sf = ctx.saved_tensors
        gate_up = _whole(gate_up_data, gate_up_sf)
        h = None if h_data is None else _whole(h_data, h_sf)
        needs_x, needs_weights, needs_w1, needs_w2, _ = ctx.needs_input_grad
        d_y = d_y.contiguous()
        d_y_rows = d_y if keep == "bf16" else quantize_rows(d_y)
        d_w2 = None
        if needs_w2:
            if h is None:
                h = _swiglu(keep, gate_up, weights)
            d_w2 = _wgrad(groups, d_y_rows, h, w2)
        h = None
        d_gate_up, d_weights = None, None
        if needs_x or needs_weights or needs_w1:
            d_h = grouped_mm(d_y_rows, _transposed(keep, w2), groups)
            d_gate_up, d_weights = _swiglu_gradients(d_h, gate_up, weights)
        d_x, d_w1 = None, None
        if d_gate_up is not None and (needs_x or needs_w1):
            d_rows = d_gate_up if keep == "bf16" else quantize_rows(d_gate_up)
            if needs_x:
                d_x = grouped_mm(d_rows, _transposed(keep, w1), groups)
            if needs_w1:
                d_w1 = _wgrad(groups, d_rows, _whole(x_data, x_sf, ctx.hadamard), w1)
        return d_x, d_weights, d_w1, d_w2, None


def _by_rows(rows: Rows | MXFP4Tensor) -> FP8Tensor:
    """Return the FP8 operand of the forward product."""
    if isinstance(rows, MXFP4Tensor):
        return mxfp4_to_fp8(rows)
    assert isinstance(rows, FP8Tensor)
    return rows


def _wgrad(groups: Groups, d_y: Rows, x: Rows | MXFP4Tensor, w: torch.Tensor) -> torch.Tensor:
    """Compute the gradient of w."""
    return grouped_wgrad(_columns(groups, d_y), _columns(groups, x), groups, tuple(w.shape)).to(w.dtype)


def _columns(groups: Groups, rows: Rows | MXFP4Tensor) -> Columns:
    """Return an operand of a weight gradient: column-wise, but for bfloat16."""
    if isinstance(rows, MXFP4Tensor):
        return mxfp4_to_fp8_columnwise(rows, groups.argument())
    return fp8_transpose(rows, groups.argument()) if isinstance(rows, FP8Tensor) else rows


def _swiglu(keep: Keep, gate_up: Rows | MXFP4Tensor, weights: torch.Tensor | None) -> Rows:
    """Compute SwiGLU's output, from its input or what was kept of that."""
    x = dequantize(gate_up) if isinstance(gate_up, MXFP4Tensor) else decode_rows(gate_up)
    if keep != "bf16":
        return swiglu_forward(x, weights=weights)[0]
    if _has_groups(x.shape[1] // 2):
        return swiglu_bf16(x, weights=weights)
    return reference.to_dtype(reference_swiglu.product(x, weights), torch.bfloat16)


def _swiglu_gradients(
    d_h: torch.Tensor, gate_up: Rows | MXFP4Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the gradients of SwiGLU's input and of the weights."""
    if not isinstance(gate_up, MXFP4Tensor):
        gate_up = decode_rows(gate_up)
        if not _has_groups(d_h.shape[1]):
            return reference_swiglu.gradients(d_h, gate_up, weights)
    return swiglu_backward(d_h, gate_up, weights=weights)


def _has_groups(width: int) -> bool:
    """Tell whether SwiGLU's kernels take so many columns; in BF16 others come too, and go by plain PyTorch."""
    return width % FP8_GROUP_SIZE == 0


def _transposed(keep: Keep, w: torch.Tensor) -> Any:
    """Return the weights of a gradient of rows; FP8 codes are made anew, not kept."""
    return w.transpose(1, 2) if keep == "bf16" else quantize_weights(w, transposed=True)


def _parts(x: Rows | MXFP4Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take a tensor apart, for autograd to keep."""
    if isinstance(x, MXFP4Tensor):
        return x.qdata, x.sf
    return (x.data, x.sf) if isinstance(x, FP8Tensor) else (x, None)


def _whole(data: torch.Tensor, sf: torch.Tensor | None, hadamard: bool = False) -> Rows | MXFP4Tensor:
    """Put a tensor together again."""
    if sf is None:
        return data
    return MXFP4Tensor(data, sf, hadamard) if data.dtype == torch.uint8 else FP8Tensor(data, sf)
