"""What the tests of the codec's functions share: devices, inputs, poisoned outputs between guards, comparison."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from bit_patterns import SAME_WIDTH_INT
from codec_truth import random_float32, random_mxfp4
from hypothesis import strategies as st

from qcomm.formats import ScaleLayout, ScaleRule
from qcomm.tensors import FP8ColumnwiseTensor, FP8Tensor, MXFP4Tensor, empty_scales, scales_shape

Device = torch.device | str
Movable = TypeVar("Movable", bound=torch.Tensor | MXFP4Tensor | FP8Tensor)
Test = TypeVar("Test", bound=Callable[..., None])

NEEDS_GPU = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs 1 GPU, found 0")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]

POISON = 0xAA
_GUARD_BYTES = 256
_BIG_ELEMENTS = 2**31
_BIG_FREE_BYTES = 40 * 2**30

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotated": {"hadamard": True},
    "signs": {"hadamard": True, "hadamard_signs": 0x9E3779B1},
    "prescaled": {"prescaled": True},
    "signs, prescaled": {"hadamard": True, "hadamard_signs": 0x9E3779B1, "prescaled": True},
}
"""What an MXFP4Tensor can be, as its constructor's options."""


def gpu_only(test: Test) -> Test:
    """Mark a test that needs a GPU."""
    marked: Test = pytest.mark.gpu(NEEDS_GPU(test))
    return marked


def big_rows(columns: int, multiple: int = 1) -> int:
    """Rows of a tensor of more than 2^31 elements; skips the test on a GPU without room for it."""
    free, _ = torch.cuda.mem_get_info()
    if free < _BIG_FREE_BYTES:
        pytest.skip(f"needs {_BIG_FREE_BYTES >> 30} GiB of free GPU memory, found {free / 2**30:.1f}")
    return -(-(_BIG_ELEMENTS // columns + 300) // multiple) * multiple


def slices_of(rows: int, size: int) -> list[slice]:
    """The first rows, the last ones, and some in between, at multiples of `size`."""
    middle = torch.randint(rows // size, (1,), generator=torch.Generator().manual_seed(rows)).item()
    return [slice(start, start + size) for start in (0, rows // size // 2 * size, int(middle) * size, rows - size)]


def moved(x: Movable, device: Device) -> Movable:
    """The same tensor on another device."""
    result: Any
    if isinstance(x, torch.Tensor):
        result = x.to(device)
    else:
        parts = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        on_device: dict[str, Any] = {k: v.to(device) for k, v in parts.items() if isinstance(v, torch.Tensor)}
        result = dataclasses.replace(x, **on_device)
    return result


class Outputs:
    """Tensors to write: poisoned, contiguous, each between guard bytes that a kernel must leave alone."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._bases: list[tuple[torch.Tensor, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        base = torch.full((num_bytes + 2 * _GUARD_BYTES,), POISON, dtype=torch.uint8, device=self._device)
        self._bases.append((base, num_bytes))
        return base[_GUARD_BYTES : _GUARD_BYTES + num_bytes].view(dtype).view(shape)

    def mxfp4(self, shape: tuple[int, ...]) -> MXFP4Tensor:
        *lead, columns = shape
        qdata = self.empty((*lead, columns // 2), torch.uint8)
        return MXFP4Tensor(qdata, self.empty((*lead, columns // 32), torch.uint8))

    def fp8(self, rows: int, columns: int, layout: ScaleLayout) -> FP8Tensor:
        width = scales_shape(rows, columns // 128, layout)[1]
        dtype = torch.int32 if layout is ScaleLayout.PACKED_UE8M0 else torch.float32
        if layout is ScaleLayout.ROW_MAJOR:
            sf = self.empty((rows, width), dtype)
        else:
            sf = self.empty((width, -(-rows // 4) * 4), dtype).t()[:rows]
        assert sf.stride() == empty_scales(rows, columns // 128, layout).stride()
        return FP8Tensor(self.empty((rows, columns), torch.float8_e4m3fn), sf)

    def columnwise(self, held: int, tiles: int, columns: int) -> FP8ColumnwiseTensor:
        """Room for `held` rows; the offsets are left to the function."""
        data = self.empty((held * columns,), torch.float8_e4m3fn)
        offsets = torch.zeros(1, dtype=torch.int32, device=self._device)
        return FP8ColumnwiseTensor(data, self.empty((tiles, columns), torch.float32), offsets)

    def check(self) -> None:
        """Require that nothing was written beside the tensors."""
        for base, num_bytes in self._bases:
            before, after = base[:_GUARD_BYTES], base[_GUARD_BYTES + num_bytes :]
            assert (before == POISON).all(), f"wrote before a tensor of {num_bytes} bytes"
            assert (after == POISON).all(), f"wrote past a tensor of {num_bytes} bytes"


def poison(x: torch.Tensor) -> None:
    """Fill a tensor of any strides with poison."""
    width = SAME_WIDTH_INT[x.element_size()]
    x.view(width).copy_(torch.full((x.element_size(),), POISON, dtype=torch.uint8, device=x.device).view(width))


def poison_allocator(num_bytes: int, device: Device) -> None:
    """Leave poison where the next allocation of as many bytes will probably be."""
    torch.full((num_bytes,), POISON, dtype=torch.uint8, device=device)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Require dtype, shape and every bit of a tensor that may be on another device."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
    width = SAME_WIDTH_INT[actual.element_size()]
    found = actual.contiguous().view(width)
    wanted = expected.to(actual.device).contiguous().view(width)
    if torch.equal(found, wanted):
        return
    wrong = (found != wanted).nonzero()
    at = tuple(wrong[0].tolist())
    mask = 2 ** (8 * actual.element_size()) - 1
    bits = f"{int(found[at]) & mask:#x} instead of {int(wanted[at]) & mask:#x}"
    pytest.fail(f"{name}: {len(wrong)} of {found.numel()} elements differ, first {at}: {bits}")


def assert_same_mxfp4(actual: MXFP4Tensor, expected: MXFP4Tensor) -> None:
    """Require every bit and the flags."""
    assert_same_bits(actual.sf, expected.sf, "sf")
    assert_same_bits(actual.qdata, expected.qdata, "qdata")
    flags = [(q.hadamard, q.hadamard_signs, q.prescaled) for q in (actual, expected)]
    assert flags[0] == flags[1]


def assert_same_columnwise(
    actual: FP8ColumnwiseTensor, data: torch.Tensor, sf: torch.Tensor, offsets: list[int]
) -> None:
    """Require the groups' bits; what lies past them still holds the poison."""
    assert actual.group_offsets.tolist() == offsets
    assert_same_bits(actual.sf[: len(sf)], sf, "sf")
    assert_same_bits(actual.data[: len(data)], data, "data")
    assert (actual.data[len(data) :].view(torch.uint8) == POISON).all(), "wrote rows past the last group"


def values_under_maxima(rule: ScaleRule, dtype: torch.dtype, device: Device, step: int = 1) -> torch.Tensor:
    """Blocks `[..., 32]` of a 16-bit dtype that meet every value under every scale which the rule can give it.

    For each binade, under the largest maximum that the rule does not bump and under the largest of all: every value of
    both signs up to it, and in each block the maximum itself. Behind them each value as a block's maximum, alone.

    Args:
        rule: one that goes by the maximum.
        dtype: bfloat16 or float16.
        device: where to build them.
        step: take every step-th binade only.
    """
    mantissa_bits, top_binade = (7, 254) if dtype == torch.bfloat16 else (10, 30)
    mantissas = torch.arange(2**mantissa_bits, device=device)
    m = 1 + mantissas / 2**mantissa_bits
    bumped = m >= rule.threshold if rule.inclusive else m > rule.threshold
    ends = torch.stack((mantissas[~bumped][-1], mantissas[-1])).unique()
    binades = torch.arange(0, top_binade + 1, step, device=device)
    maxima = ((binades << mantissa_bits)[:, None] | ends).flatten()
    counts = 2 * (maxima + 1)
    num_blocks = -(-counts // 31)
    which = torch.repeat_interleave(torch.arange(len(maxima), device=device), num_blocks)
    number = torch.arange(len(which), device=device) - (num_blocks.cumsum(0) - num_blocks)[which]
    position, column = (number % 32)[:, None], torch.arange(32, device=device)
    k = (number[:, None] * 31 + column - (column > position).long()) % counts[which][:, None]
    top = maxima[which] | (number & 1) << 15
    blocks = torch.where(column == position, top[:, None], k >> 1 | (k & 1) << 15)
    every = torch.arange(int(maxima[-1]) + 1, device=device)
    alone = torch.where(column == (every % 32)[:, None], every[:, None], 0)
    return torch.cat((blocks, alone)).to(torch.int16).view(dtype)


def float32_near_thresholds() -> torch.Tensor:
    """Blocks `[..., 32]` around every midpoint of E2M1 and every rule's threshold, under every exponent."""
    rng = np.random.default_rng(50)
    thresholds = np.array([1, 1.5, 1.75, 1.8125, 1.25, 1.99], dtype=np.float32)
    below, above = np.float32(0), np.float32(9)
    maxima = np.concatenate([np.nextafter(thresholds, below), thresholds, np.nextafter(thresholds, above)])
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], dtype=np.float32)
    edges = np.concatenate([np.nextafter(middles, below), middles, np.nextafter(middles, above)])
    exponents = np.arange(-128, 128)[:, None, None]
    shape = (256, len(maxima), 32)
    drawn = rng.choice(edges, shape).astype(np.float64)
    values = np.ldexp(drawn, exponents - 2 + rng.integers(0, 2, shape))
    largest = np.ldexp(maxima.astype(np.float64)[:, None], exponents)
    values = np.where(np.arange(32) == rng.integers(0, 32, shape[:2])[..., None], largest, np.minimum(values, largest))
    signed = np.where(rng.random(shape) < 0.5, -values, values)
    with np.errstate(over="ignore"):
        return torch.from_numpy(signed.astype(np.float32).reshape(-1, 32))


def wild(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values for every path: Gaussians under any scale, random bits, blocks of zeros, subnormal ones, NaN, infinity."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((*shape[:-1], shape[-1] // 32, 32), dtype=np.float32)
    values *= np.exp2(rng.integers(-20, 12, values.shape[:-1]))[..., None].astype(np.float32)
    blocks = torch.from_numpy(values).to(dtype)
    kind = torch.from_numpy(rng.random(values.shape[:-1]))
    bits = torch.from_numpy(random_float32(rng, values.shape)).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    blocks[kind < 0.2] = bits.to(dtype)[kind < 0.2]
    tiny = torch.finfo(dtype).smallest_normal
    blocks[(kind > 0.2) & (kind < 0.3)] *= tiny
    blocks[(kind > 0.3) & (kind < 0.4)] *= 0
    for low, bad in ((0.4, torch.nan), (0.43, torch.inf), (0.46, -torch.inf)):
        chosen = (kind > low) & (kind < low + 0.03)
        blocks[..., seed % 32] = torch.where(chosen, bad, blocks[..., seed % 32]).to(dtype)
    return blocks.flatten(-2)


def wild_fp8(rows: int, columns: int, seed: int, powers_of_two: bool = False) -> FP8Tensor:
    """Codes of every kind under scales of every kind, one group in eight all zero."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, columns // 128, 128), dtype=np.uint8)
    codes[((codes & 0x7F) == 0x7F) & (rng.random(codes.shape) < 0.99)] = 0x38
    codes[rng.random(codes.shape[:2]) < 0.125] &= 0x80
    exponents = rng.integers(-30, 30, codes.shape[:2])
    with np.errstate(under="ignore"):
        sf = np.ldexp(np.float32(1), exponents)
        if not powers_of_two:
            sf *= rng.uniform(1, 2, sf.shape).astype(np.float32)
    for value in (0.0, np.inf, np.nan, 1e-41, 3e38, 2.0**-126, 2.0**127):
        sf[rng.random(sf.shape) < 0.01] = value
    data = torch.from_numpy(codes.reshape(rows, columns)).view(torch.float8_e4m3fn)
    return FP8Tensor(data, torch.from_numpy(sf))


def wild_mxfp4(rows: int, columns: int, seed: int, form: str = "plain") -> MXFP4Tensor:
    """Random codes; half the blocks have any scale byte, the others one of a few; one block in eight is all zero."""
    rng = np.random.default_rng(seed)
    anywhere, near = random_mxfp4(rng, rows, columns), random_mxfp4(rng, rows, columns, 110, 130)
    mixed = torch.where(torch.from_numpy(rng.random(near.sf.shape) < 0.5), anywhere.sf, near.sf)
    return MXFP4Tensor(near.qdata, mixed, **FORMS[form])


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, one element past an aligned address."""
    base = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return base[1:].view(x.shape).copy_(x)


def spread_out(x: torch.Tensor) -> torch.Tensor:
    """The same values, in every second element of a larger tensor."""
    base = torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)
    return base[..., 1].copy_(x)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values, in column-major order."""
    return x.t().contiguous().t()


REARRANGEMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "misaligned": misaligned,
    "spread out": spread_out,
    "transposed": transposed,
}


@st.composite
def group_offsets(draw: st.DrawFn, max_rows: int = 768) -> tuple[list[int], int, int]:
    """Groups of rows, some of them empty; also what their offsets are multiples of, and rows past the last."""
    alignment = draw(st.sampled_from([32, 64, 128]))
    sizes = draw(st.lists(st.integers(0, 3), max_size=5))
    offsets = [0]
    for size in sizes:
        if offsets[-1] + size * alignment <= max_rows:
            offsets.append(offsets[-1] + size * alignment)
    return offsets, alignment, draw(st.sampled_from([0, 1, 31, 128, 200]))


GROUPS = [
    ([0], 128),
    ([0, 0], 128),
    ([0, 128], 128),
    ([0, 128, 128, 384, 384, 768], 128),
    ([0, 0, 0, 256], 128),
    ([0, 64], 64),
    ([0, 192, 192, 256, 448], 64),
    ([0, 32], 32),
    ([0, 96, 96, 512], 32),
    ([0, 0, 160, 320, 352, 352, 384], 32),
]
"""Offsets of groups, empty ones among them, and what they are multiples of."""


def columnwise_tiles(rows: int, offsets: list[int], alignment: int, as_tensor: bool) -> tuple[int, int]:
    """Rows and tiles that a column-wise result has: as many as there can be where offsets are on a device."""
    if not as_tensor:
        return offsets[-1], sum(-(-(b - a) // 128) for a, b in itertools.pairwise(offsets))
    return rows, rows // 128 + (0 if alignment % 128 == 0 else len(offsets) - 1)


def given_offsets(offsets: list[int], as_tensor: bool, device: Device) -> list[int] | torch.Tensor:
    """Offsets as ints, or as a tensor on the device."""
    return torch.tensor(offsets, dtype=torch.int32, device=device) if as_tensor else offsets
