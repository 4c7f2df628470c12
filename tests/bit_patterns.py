"""Bit-level helpers shared by the codec tests."""

from __future__ import annotations

import torch

SAME_WIDTH_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def all_bf16() -> torch.Tensor:
    """All 65,536 BF16 values, in the order of their bits: 0 up to NaN, then -0 down to NaN."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def all_e4m3() -> torch.Tensor:
    """All 256 E4M3 values, in the order of their bits."""
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit (-0 is not 0, a NaN equals itself)."""
    width = SAME_WIDTH_INT[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(width), b.contiguous().view(width))
