"""Launch BF16 to E4M3 under scales that are powers of two. Triton kernels; the oracle is `reference.quantize_fp8`."""

from __future__ import annotations

import torch

from qcomm.formats import FP8_GROUP_SIZE
from qcomm.ops.triton_kernels import load

_BLOCK_GROUPS, _WARPS = 16, 4
_BLOCK_WARPS = 8


def launch_rows(
    x: torch.Tensor,
    data: torch.Tensor,
    sf: torch.Tensor,
    *,
    native: bool = True,
    block_groups: int = _BLOCK_GROUPS,
) -> None:
    """Quantize rows with 1x128 scales on the current stream of the current device; all tensors are flat.

    Args:
        x: `[rows, K]` bfloat16, K a multiple of 128.
        data: out, `[rows, K]` uint8, E4M3 codes.
        sf: out, `[rows, K / 128]` float32.
        native: convert by the GPU's own instruction, which Triton's interpreter does not have.
        block_groups: groups of 128 a program takes; the result does not depend on it.
    """
    num_groups = x.numel() // FP8_GROUP_SIZE
    if num_groups:
        grid = (-(-num_groups // block_groups),)
        load("quantize_fp8").quantize_rows[grid](
            x.view(torch.int16), data, sf, num_groups, BLOCK_GROUPS=block_groups, NATIVE=native, num_warps=_WARPS
        )


def launch_blocks(
    w: torch.Tensor, data: torch.Tensor, sf: torch.Tensor, *, transposed: bool, native: bool = True
) -> None:
    """Quantize matrices with 128x128 scales, as `launch_rows`.

    Args:
        w: `[num, N, K]` bfloat16, N and K multiples of 128.
        data: out, `[num, N, K]` uint8, or `[num, K, N]` if `transposed`.
        sf: out, `[num, N / 128, K / 128]` float32, or `[num, K / 128, N / 128]`.
        transposed: whether to write the transposes.
        native: as for `launch_rows`.
    """
    rows, columns = (size // FP8_GROUP_SIZE for size in w.shape[1:])
    tiles = w.shape[0] * rows * columns
    if tiles:
        load("quantize_fp8").quantize_blocks[(tiles,)](
            w.view(torch.int16), data, sf, rows, columns, TRANSPOSED=transposed, NATIVE=native, num_warps=_BLOCK_WARPS
        )
