"""What the tests of the MoE layer compare with."""

from __future__ import annotations

import torch

from qcomm import reference


def quantize_weights(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask the oracle's rule of FP8 groups for tiles of 128x128 instead."""
    tiles = reference.exact_values(w).unflatten(-1, (-1, 128)).unflatten(1, (-1, 128)).transpose(2, 3)
    data, sf = reference.quantize_fp8_groups(tiles.flatten(3))
    codes = data.view(torch.uint8).unflatten(3, (128, 128)).transpose(2, 3).flatten(3).flatten(1, 2)
    return codes.view(torch.float8_e4m3fn), sf
