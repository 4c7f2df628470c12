"""The oracle of SwiGLU with its conversions, in plain PyTorch.

float32 throughout, in the stated order; exp is torch's, and sums are float64, rounded once. The conversions are those
of `qcomm.reference`.
"""

from __future__ import annotations

import torch

from qcomm import reference
from qcomm.formats import ScaleRule
from qcomm.tensors import FP8Tensor, MXFP4Tensor

MAX_DIVISOR = 2.0**126
"""Above it 1 / (1 + exp(-gate)) counts as 0: float32 loses its bits there, and fast division gives up."""
MIN_SILU = 2.0**-126
"""A silu of the forward pass below it counts as 0 of its sign: the least normal float32."""


def product(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu(gate) * up, times the row's weight, in that order.

    Args:
        x: `[rows, 2 * F]` bfloat16, gate then up.
        weights: `[rows]` float32.

    Returns:
        `[rows, F]` float32.
    """
    gate, up = x.to(torch.float32).chunk(2, dim=-1)
    divisor = 1 + torch.exp(-gate)
    silu = torch.where(divisor > MAX_DIVISOR, gate * 0, gate / divisor)
    h = torch.where(silu.abs() < MIN_SILU, silu * 0, silu) * up
    return h if weights is None else h * weights[:, None]


def swiglu_forward(
    x: torch.Tensor, weights: torch.Tensor | None = None, scale_rule: ScaleRule = ScaleRule.EVEN
) -> tuple[FP8Tensor, MXFP4Tensor]:
    """Return `product` in FP8 with 1x128 scales, and x in MXFP4."""
    return reference.quantize_fp8(product(x, weights)), reference.quantize_mxfp4(x, scale_rule)


def swiglu_backward(
    grad_h: torch.Tensor, saved: MXFP4Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of x and of the weights, at the x that was saved; see `gradients`.

    Args:
        grad_h: `[rows, F]` bfloat16.
        saved: of shape `[rows, 2 * F]`, neither rotated nor prescaled.
        weights: `[rows]` float32.

    Returns:
        `[rows, 2 * F]` bfloat16, rounded once, and `[rows]` float32, None without weights.
    """
    return gradients(grad_h, reference.dequantize_mxfp4(saved), weights)


def gradients(
    grad_h: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of x and of the weights.

    With s = 1 / (1 + exp(-gate)) and silu = gate * s they are grad_h * up * (s + silu * (1 - s)) for gate and
    grad_h * silu for up, both times the weight, and the sum of grad_h * silu * up over a row for the weight.

    Args:
        grad_h: `[rows, F]` bfloat16.
        x: `[rows, 2 * F]` bfloat16 or float32, gate then up.
        weights: `[rows]` float32.

    Returns:
        `[rows, 2 * F]` bfloat16, rounded once, and `[rows]` float32, None without weights.
    """
    gate, up = x.to(torch.float32).chunk(2, dim=-1)
    grad = grad_h.to(torch.float32)
    divisor = 1 + torch.exp(-gate)
    sigmoid = torch.where(divisor > MAX_DIVISOR, 0.0, 1 / divisor)
    silu = gate * sigmoid
    grad_gate, grad_up = grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu
    grad_weights = None
    if weights is not None:
        grad_weights = (grad_up * up).sum(-1, dtype=torch.float64).to(torch.float32)
        grad_gate, grad_up = grad_gate * weights[:, None], grad_up * weights[:, None]
    return reference.to_dtype(torch.cat((grad_gate, grad_up), dim=-1), torch.bfloat16), grad_weights
