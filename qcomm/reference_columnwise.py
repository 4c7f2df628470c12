"""The oracle of the column-wise conversions: transposed E4M3 with one scale per 128 rows of a column."""

from __future__ import annotations

import itertools

import torch

from qcomm.formats import BLOCK_SIZE, E4M3_MAX, E4M3_NAN, E8M0_BIAS, FP8_GROUP_SIZE, FP8_MIN_SCALE_EXPONENT
from qcomm.reference import (
    align,
    counts_for_alignment,
    dequantize_mxfp4,
    exact_values,
    mantissa_exponent,
    pow2,
    quantize_fp8_groups,
)
from qcomm.tensors import FP8Tensor, MXFP4Tensor

GROUP_MULTIPLE = BLOCK_SIZE
"""Groups of rows start at multiples of it."""


def mxfp4_to_fp8_columnwise(
    x: MXFP4Tensor, group_offsets: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convert to transposed E4M3 blocks, one per group of rows, with 128x1 scales, by exponent alignment.

    The alignment of `reference.mxfp4_to_fp8`, over the blocks that one column of blocks has in a tile: 128 rows of a
    group, fewer in its last one. A rotated or prescaled tensor is decoded and quantized like any float32 tensor.

    Args:
        x: `[rows, K]`, K a multiple of 32.
        group_offsets: start of each group and the end of the last; multiples of 32, the last at most rows.

    Returns:
        `[group_offsets[-1] * K]` float8_e4m3fn: the groups' `[K, rows_e]` blocks one after the other;
        `[tiles, K]` float32 scales; the int64 number of blocks at a distance above 14.

    Raises:
        ValueError: offsets that do not start at 0, that decrease, or that are not multiples of 32.
    """
    tiles, num_tiles = _tiles_of_rows(group_offsets, x.shape[0], x.device)
    total = group_offsets[-1]
    x = MXFP4Tensor(x.qdata[:total], x.sf[:total], x.hadamard, x.hadamard_signs, x.prescaled)
    if not x.is_plain:
        data, scale = quantize_fp8_columnwise(dequantize_mxfp4(x), group_offsets)
        return data, scale, torch.zeros((), dtype=torch.int64, device=x.device)
    sf = torch.where(counts_for_alignment(x), x.sf.to(torch.int64), 0)
    top = _largest_of_tiles(sf, tiles, num_tiles)
    data, _, overflows = align(x, top[tiles])
    # The scale of a tile is that of any of its rows; of a tile of zeros too.
    lowest = MXFP4Tensor(x.qdata.new_zeros(num_tiles, x.shape[1] // 2), x.sf.new_zeros(num_tiles, x.sf.shape[1]))
    _, scale, _ = align(lowest, top)
    return transpose_groups(data, group_offsets), scale.repeat_interleave(BLOCK_SIZE, dim=-1), overflows


def quantize_fp8_columnwise(x: torch.Tensor, group_offsets: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to transposed E4M3 blocks with 128x1 scales, by the rule of `reference.quantize_fp8`.

    Args:
        x: `[rows, K]` bfloat16, float16 or float32.
        group_offsets: as for `mxfp4_to_fp8_columnwise`.

    Returns:
        Data and scales as `mxfp4_to_fp8_columnwise` returns them.
    """
    tiles, num_tiles = _tiles_of_rows(group_offsets, x.shape[0], x.device)
    values = exact_values(x[: group_offsets[-1]])
    # A tile of fewer rows is filled with zeros, which change neither maximum nor finiteness.
    starts = torch.searchsorted(tiles, torch.arange(num_tiles, device=x.device))
    within = torch.arange(len(tiles), device=x.device) - starts[tiles]
    padded = values.new_zeros(num_tiles, FP8_GROUP_SIZE, x.shape[1])
    padded[tiles, within] = values
    data, sf = quantize_fp8_groups(padded.transpose(1, 2))
    codes = data.view(torch.uint8).transpose(1, 2)[tiles, within]
    return transpose_groups(codes, group_offsets), sf


def fp8_transpose(x: FP8Tensor, group_offsets: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Transpose E4M3 rows with 1x128 scales to E4M3 columns with 128x1 scales, by exponent alignment.

    A tile is 128 columns under one row scale by 128 rows of a group (fewer in its last one). Its scale is the smallest
    power of two that is not below any row's scale in it, from 2^-126 to 2^127; an element is the exact product of its
    code and its row's scale over the tile's, rounded to nearest even once, subnormals included, saturating at 448.
    Under powers of two that is a shift by the exponent distance, exact while nothing falls off. Rows of zeros don't
    count for the maximum, nor do rows whose scale is not finite, which become NaN. A NaN becomes 0x7F.

    Args:
        x: `[rows, K]`, float32 scales of 0 or above.
        group_offsets: as for `mxfp4_to_fp8_columnwise`.

    Returns:
        Data and scales as `mxfp4_to_fp8_columnwise` returns them.
    """
    tiles, num_tiles = _tiles_of_rows(group_offsets, x.shape[0], x.device)
    total = group_offsets[-1]
    codes, sf = x.data[:total], x.sf[:total].to(torch.float64)
    groups = codes.to(torch.float64).unflatten(-1, (-1, FP8_GROUP_SIZE))
    finite = torch.isfinite(sf)
    counts = finite & ((codes.view(torch.uint8) & 0x7F) != 0).unflatten(-1, (-1, FP8_GROUP_SIZE)).any(-1)
    mantissa, exponent = mantissa_exponent(torch.where(counts, sf.abs(), 0.0))
    exponent = torch.where(mantissa == 0, FP8_MIN_SCALE_EXPONENT, exponent + (mantissa > 1).to(torch.int64))
    exponent = exponent.clamp(FP8_MIN_SCALE_EXPONENT, E8M0_BIAS)
    top = _largest_of_tiles(exponent - FP8_MIN_SCALE_EXPONENT, tiles, num_tiles) + FP8_MIN_SCALE_EXPONENT
    exact = groups * torch.where(finite, sf, torch.nan)[..., None] * pow2(-top[tiles])[..., None]
    data = round_e4m3(exact.flatten(-2))
    scale = pow2(top).to(torch.float32).repeat_interleave(FP8_GROUP_SIZE, dim=-1)
    return transpose_groups(data, group_offsets), scale


def round_e4m3(exact: torch.Tensor) -> torch.Tensor:
    """Round float64 to E4M3, nearest even, once, saturating; NaN becomes 0x7F."""
    magnitude = exact.abs().clamp(max=E4M3_MAX)
    _, exponent = mantissa_exponent(magnitude)
    step = pow2(torch.where(magnitude == 0, -6, exponent).clamp(min=-6) - 3)
    rounded = torch.copysign(torch.round(magnitude / step) * step, exact)
    codes = rounded.to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(torch.isnan(exact), E4M3_NAN, codes).to(torch.uint8).view(torch.float8_e4m3fn)


def transpose_groups(data: torch.Tensor, group_offsets: list[int]) -> torch.Tensor:
    """Transpose each group of rows, `[group_offsets[-1] * K]`."""
    data = data.view(torch.uint8)
    blocks = [data[a:b].t().reshape(-1) for a, b in itertools.pairwise(group_offsets)]
    flat = torch.cat(blocks) if blocks else data.new_empty(0)
    return flat.view(torch.float8_e4m3fn)


def count_tiles(group_offsets: list[int]) -> int:
    """Return the number of tiles of all groups."""
    return sum(-(-(b - a) // FP8_GROUP_SIZE) for a, b in itertools.pairwise(group_offsets))


def check_group_offsets(group_offsets: list[int], num_rows: int, multiple: int = GROUP_MULTIPLE) -> None:
    """Require offsets that rise from 0 to at most num_rows in multiples.

    Raises:
        ValueError: they do not.
    """
    steps = itertools.pairwise(group_offsets)
    ok = group_offsets and group_offsets[0] == 0 and group_offsets[-1] <= num_rows
    if not ok or any(b < a or b % multiple for a, b in steps):
        raise ValueError(
            f"group_offsets must rise from 0 to at most {num_rows} in multiples of {multiple}, got {group_offsets}"
        )


def _tiles_of_rows(group_offsets: list[int], num_rows: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Return the tile of each row of the groups, int64, and the number of tiles."""
    check_group_offsets(group_offsets, num_rows)
    tiles: list[torch.Tensor] = [torch.zeros(0, dtype=torch.int64)]
    first = 0
    for a, b in itertools.pairwise(group_offsets):
        tiles.append(first + torch.arange(b - a) // FP8_GROUP_SIZE)
        first += -(-(b - a) // FP8_GROUP_SIZE)
    return torch.cat(tiles).to(device), first


def _largest_of_tiles(values: torch.Tensor, tiles: torch.Tensor, num_tiles: int) -> torch.Tensor:
    """Return the largest of each tile's rows, `[tiles, columns]`, of non-negative int64 `[rows, columns]`."""
    index = tiles[:, None].expand_as(values)
    return values.new_zeros(num_tiles, values.shape[1]).scatter_reduce(0, index, values, "amax")
