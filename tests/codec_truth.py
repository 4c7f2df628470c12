"""Arithmetic independent of the oracle, in numpy and ml_dtypes: what the oracle's own tests compare it with."""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from bit_patterns import all_bf16
from hypothesis import settings
from hypothesis import strategies as st

from qcomm.formats import ScaleRule
from qcomm.tensors import FP8Tensor, MXFP4Tensor

Array = npt.NDArray[Any]

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
EVEN_CODES_FIRST = np.array([0, 2, 4, 6, 1, 3, 5, 7])
SCALES = np.ldexp(1.0, np.arange(255) - 127)
# The scale is the smallest for which amax / scale stays below ("right") or does not pass ("left") the limit.
SCALE_LIMITS: dict[ScaleRule, tuple[float, Literal["left", "right"]]] = {
    ScaleRule.FLOOR: (8, "right"),
    ScaleRule.EVEN: (7, "right"),
    ScaleRule.NEAR_MSE: (7.25, "right"),
    ScaleRule.RCEIL: (6, "left"),
    ScaleRule.CEIL: (4, "left"),
}
BF16_MAGNITUDES = all_bf16()[:0x7F80].double().numpy()
"""The non-negative finite BF16 values, rising: index is bit pattern."""

FEW = settings(deadline=None, max_examples=25)


def float32(values: object) -> Array:
    return np.array(values, dtype=np.float32)


def scale_bytes(amax: Array, rule: ScaleRule) -> Array:
    """Scale byte of each block maximum, by search over all scales."""
    limit, side = SCALE_LIMITS[rule]
    found = np.searchsorted((limit * SCALES).astype(np.longdouble), amax.astype(np.longdouble), side)
    return np.where(amax == 0, 0, found.clip(max=254)).astype(np.uint8)


def nearest_codes(scaled: Array) -> Array:
    """E2M1 code of each value, by enumeration of the distances; the first smallest is the even code."""
    distance = np.abs(np.abs(scaled).clip(max=8)[..., None] - MAGNITUDES[EVEN_CODES_FIRST])
    return (EVEN_CODES_FIRST[distance.argmin(-1)] | np.signbit(scaled) << 3).astype(np.uint8)


def pack(codes: Array) -> Array:
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(qdata: torch.Tensor) -> Array:
    packed = qdata.contiguous().numpy()
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def decode(x: MXFP4Tensor) -> Array:
    """Exact float64 values of an unrotated tensor, by ml_dtypes."""
    values = unpack(x.qdata).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = x.sf.contiguous().numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return values * scales.repeat(32, axis=-1)


def to_e4m3_codes(values: Array) -> Array:
    return values.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def bytes_of(x: torch.Tensor) -> Array:
    return x.contiguous().view(torch.uint8).numpy()


def random_float32(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Finite float32 of random bits: every exponent, subnormals included, is equally likely."""
    bits = rng.integers(0, 0xFF << 23, shape, dtype=np.uint32)
    return (bits | rng.integers(0, 2, shape, dtype=np.uint32) << 31).view(np.float32)


def random_mxfp4(rng: np.random.Generator, rows: int, K: int, low: int = 0, high: int = 256) -> MXFP4Tensor:
    """Random codes, with one block in eight all zero."""
    qdata = rng.integers(0, 256, (rows, K // 32, 16), dtype=np.uint8)
    qdata[rng.random((rows, K // 32)) < 0.125] &= 0x88
    sf = rng.integers(low, high, (rows, K // 32), dtype=np.uint8)
    return MXFP4Tensor(torch.from_numpy(qdata.reshape(rows, K // 2)), torch.from_numpy(sf))


def groups_under_maximum(index: int, size: int, position: int) -> torch.Tensor:
    """Rows of `size` BF16 values: all values up to the maximum, and in each row the maximum itself."""
    patterns = np.concatenate([np.arange(index + 1), np.arange(index + 1) | 0x8000])
    patterns = np.resize(patterns, (-(-len(patterns) // (size - 1)), size - 1))
    patterns = np.insert(patterns, position % size, index | (position & 1) << 15, axis=1)
    return torch.from_numpy(patterns.astype(np.uint16)).view(torch.bfloat16)


def fp8_of(codes: Array, sf: Array) -> tuple[FP8Tensor, Array]:
    """An FP8Tensor and its exact products: 4 by 24 bits, in the 64 bits of a long double."""
    x = FP8Tensor(torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(sf))
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.longdouble)
    return x, values * sf.astype(np.longdouble).repeat(128, axis=-1)


def alignment(x: MXFP4Tensor, axis: int) -> tuple[Array, Array]:
    """Top byte over 4 blocks of a row or 128 of a column, and distance to it; both `[rows, K // 32]`."""
    live = (decode(x).reshape(*x.sf.shape, 32) != 0).any(-1) & (x.sf.numpy() != 255)
    sf = np.where(live, x.sf.numpy().astype(np.int64), -1)
    size = 128 if axis == 0 else 4
    top = np.concatenate(
        [
            np.broadcast_to(part.max(axis, keepdims=True), part.shape)
            for part in np.split(sf, sf.shape[axis] // size, axis)
        ],
        axis,
    )
    return top, np.where(live, top - sf, 0)


@st.composite
def strided(draw: st.DrawFn, multiple: int, min_dims: int = 0, max_dims: int = 3) -> torch.Tensor:
    """A float32 view with 1 to 3 multiples of K and no, some or zero-sized leading dimensions."""
    lead = draw(st.lists(st.integers(0, 4), min_size=min_dims, max_size=max_dims))
    shape = (*lead, multiple * draw(st.integers(1, 3)))
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.integers(1, 2))
    start = draw(st.integers(0, step - 1))
    storage = [shape[d] for d in order]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    base = torch.randn(*storage[:-1], storage[-1] * step, generator=generator)[..., start::step]
    return base.permute(*(order.index(d) for d in range(len(shape))))


def non_contiguous(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, torch.zeros_like(x)), dim=-1)[..., 0]


E4M3_MAGNITUDES = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
"""The non-negative finite E4M3 values, rising: index is bit pattern."""


def nearest_e4m3_codes(values: Array) -> Array:
    """E4M3 code of each float64, by exact comparison with the midpoints: ties to even, saturating, NaN 0x7F."""
    middle = (E4M3_MAGNITUDES[1:] + E4M3_MAGNITUDES[:-1]) / 2
    magnitude = np.abs(values)
    below = np.searchsorted(middle, magnitude, side="left")
    tied = np.searchsorted(middle, magnitude, side="right") != below
    found = below + (tied & (below % 2 == 1))
    return np.where(np.isnan(values), 0x7F, found | np.signbit(values) << 7).astype(np.uint8)
