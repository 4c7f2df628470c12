"""Synthetic BF16 values on which errors of formats are measured."""

from __future__ import annotations

import torch

SOURCES = ("gaussian", "swiglu", "outliers")
_OUTLIER_SHARE, _OUTLIER_FACTOR = 0.01, 30.0


def make_source(name: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Make one BF16 source, `[rows, columns]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    if name == "swiglu":
        x = torch.nn.functional.silu(x) * torch.randn(rows, columns, generator=generator)
    elif name == "outliers":
        count = max(1, round(_OUTLIER_SHARE * columns))
        x[:, torch.randperm(columns, generator=generator)[:count]] *= _OUTLIER_FACTOR
    return x.bfloat16()
