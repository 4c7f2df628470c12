"""Stand-ins for the FP8 products of torch and DeepGEMM, by what their documentation says they take."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qcomm.moe import products

FLOAT = torch.float32


def _decode(data: torch.Tensor, sf: torch.Tensor, block_rows: int) -> torch.Tensor:
    """Decode `[rows, K]` under scales of block_rows x 128; there may be more scales than needed, along K."""
    scales = sf.repeat_interleave(block_rows, 0).repeat_interleave(128, 1)
    assert scales.shape[0] == data.shape[0]
    return data.to(FLOAT) * scales[:, : data.shape[1]]


def _rows_of(recipe: Any) -> int:
    return {F.ScalingType.BlockWise1x128: 1, F.ScalingType.BlockWise128x128: 128}[recipe]


def scaled_mm_v2(
    a: torch.Tensor,
    b: torch.Tensor,
    a_sf: list[torch.Tensor],
    a_recipe: list[int],
    a_swizzle: Any,
    b_sf: list[torch.Tensor],
    b_recipe: list[int],
    b_swizzle: Any,
    bias: None,
    output_dtype: torch.dtype,
    contraction_dim: Any,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """Take a `[M, K]` by rows and b `[K, N]` by columns.

    Scales are contiguous along their first dimension: 1x128 `[M or N, K / 128]`, 128x128 of b `[K / 128, N / 128]`.
    """
    ((left_sf,), (right_sf,)) = a_sf, b_sf
    left_rows, right_rows = (_rows_of(F.ScalingType(recipe)) for (recipe,) in (a_recipe, b_recipe))
    assert (len(a_swizzle), len(b_swizzle), len(contraction_dim)) == (0, 0, 0)
    assert a.stride(1) == b.stride(0) == 1
    assert left_sf.stride(0) == right_sf.stride(0) == 1
    assert left_sf.stride(1) in (1, a.shape[0])
    if right_rows == 128:
        assert right_sf.shape[0] % 4 == 0
        right_sf = right_sf.t()
    assert out.is_contiguous()
    assert out.dtype == output_dtype
    product = _decode(a, left_sf, left_rows) @ _decode(b.t(), right_sf, right_rows).t()
    return out.copy_(product)


def scaled_grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_sf: torch.Tensor,
    a_recipe: Any,
    b_sf: torch.Tensor,
    b_recipe: Any,
    *,
    offs: torch.Tensor,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """Take a `[rows, K]` and b `[groups, K, N]` by columns; `offs` are the groups' ends."""
    out = torch.full((a.shape[0], b.shape[2]), float("nan"), dtype=output_dtype)
    for group, (first, end) in enumerate(itertools.pairwise((0, *offs.tolist()))):
        left = _decode(a[first:end], a_sf[first:end], _rows_of(a_recipe))
        out[first:end] = left @ _decode(b[group].t(), b_sf[group], _rows_of(b_recipe)).t()
    return out


def m_grouped_fp8_gemm_nt_contiguous(a: Any, b: Any, out: torch.Tensor, m_indices: torch.Tensor) -> None:
    """Multiply every row with the weights of its group, -1 for none."""
    assert m_indices.dtype == torch.int32
    rows = _decode(a[0], a[1], 1)
    for group in range(b[0].shape[0]):
        chosen = m_indices == group
        out[chosen] = (rows[chosen] @ _decode(b[0][group], b[1][group], 128).t()).to(out.dtype)


def k_grouped_fp8_gemm_nt_contiguous(
    a: Any, b: Any, d: torch.Tensor, ks: list[int], ks_tensor: torch.Tensor, c: torch.Tensor
) -> None:
    """Add the groups' products to c; operands are flat, `[M, k]` after `[M, k]`, scales `[M, tiles]`."""
    assert ks_tensor.tolist() == ks
    assert ks_tensor.dtype == torch.int32
    first = 0
    for group, k in enumerate(ks):
        sides = []
        for (data, sf), width in ((a, d.shape[1]), (b, d.shape[2])):
            block = data[first * width : (first + k) * width].view(width, k)
            sides.append(_decode(block, sf[:, first // 128 : (first + k) // 128], 1))
        d[group] = c[group] + sides[0] @ sides[1].t()
        first += k
    assert a[0].numel() == first * d.shape[1]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in the places of what they stand for."""
    monkeypatch.setattr(torch, "_scaled_mm_v2", scaled_mm_v2)
    monkeypatch.setattr(F, "scaled_grouped_mm", scaled_grouped_mm)
    fake = SimpleNamespace(
        m_grouped_fp8_gemm_nt_contiguous=m_grouped_fp8_gemm_nt_contiguous,
        k_grouped_fp8_gemm_nt_contiguous=k_grouped_fp8_gemm_nt_contiguous,
    )
    monkeypatch.setattr(products, "_deep_gemm", lambda: fake)
