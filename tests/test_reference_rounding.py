"""The oracle of random rounding: Philox, stochastic and unbiased, against exact rational arithmetic."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from codec_truth import MAGNITUDES, pack, unpack

from qcomm.formats import Rounding, ScaleRule
from qcomm.reference import dequantize_mxfp4, hadamard_signs, philox4x32, quantize_mxfp4, random_bits16
from qcomm.tensors import FP8Tensor, MXFP4Tensor


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """The vectors of Random123's kat_vectors."""
    out = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in out) == words


def test_random_bits_are_the_halves_of_the_words_low_first() -> None:
    bits = random_bits16(torch.tensor([0]), 8, seed=0)
    assert bits.tolist() == [[0xB709, 0x5F6F, 0x3F64, 0x0D89, 0x1F81, 0x4F12, 0x0A48, 0x4F73]]


@pytest.mark.parametrize("row", [0, 5, 2**31 + 1, 2**34 + 3])
def test_random_bits_are_those_of_the_documented_counter(row: int) -> None:
    seed, subsequence = 0xFEDCBA9876543210, 0x89ABCDEF
    bits = random_bits16(torch.tensor([row]), 32, seed, subsequence)[0]
    for k in (0, 9, 31):
        chunk, place = divmod(row * 32 + k, 8)
        counter = [torch.tensor([c]) for c in (chunk % 2**32, chunk // 2**32, subsequence, 0)]
        word = int(philox4x32(tuple(counter), (0x76543210, 0xFEDCBA98))[place // 2])
        assert bits[k] == (word & 0xFFFF if place % 2 == 0 else word >> 16)


def _stochastic_code(value: Fraction, bits: int) -> int:
    magnitudes = [Fraction(m) for m in MAGNITUDES.tolist()]
    if value >= 6:
        return 7
    low = max(code for code in range(8) if magnitudes[code] <= value)
    position = (value - magnitudes[low]) / (magnitudes[low + 1] - magnitudes[low])
    return low + (position + Fraction(bits, 65536) >= 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_stochastic_codes_follow_the_random_bits(dtype: torch.dtype) -> None:
    rows, K, seed, subsequence = 12, 128, 2**63 + 11, 3
    dense = torch.randn(rows, K, generator=torch.Generator().manual_seed(6))
    x: torch.Tensor | FP8Tensor = dense.to(dtype)
    exact = dense.to(dtype).double()
    if dtype == torch.float8_e4m3fn:
        x = FP8Tensor(dense.to(dtype), torch.linspace(0.7, 1.9, rows)[:, None])
        exact = exact * x.sf.double()
    for rule in (ScaleRule.FLOOR, ScaleRule.RCEIL):
        q = quantize_mxfp4(x, rule, Rounding.STOCHASTIC, seed=seed, subsequence=subsequence)
        scale = 2.0 ** (q.sf.double() - 127).repeat_interleave(32, dim=-1)
        bits = random_bits16(torch.arange(rows), K, seed, subsequence).flatten().tolist()
        scaled = (exact / scale).flatten().tolist()
        truth = [
            _stochastic_code(abs(Fraction(v)), b) + 8 * (np.copysign(1, v) < 0)
            for v, b in zip(scaled, bits, strict=True)
        ]
        assert unpack(q.qdata).reshape(-1).tolist() == truth
        assert torch.equal(q.sf, quantize_mxfp4(x, rule).sf)


def test_stochastic_turns_exactly_where_position_and_bits_reach_one() -> None:
    """Values made for the bits they meet: the position is 1 - bits / 65536, or 2^-22 beside it."""
    rows, seed = 96, 77
    bits = random_bits16(torch.arange(rows), 32, seed).numpy()
    rng = np.random.default_rng(5)
    position = (65536 - bits + rng.choice([-1 / 64, 0, 1 / 64], bits.shape)) / 65536
    low = rng.integers(0, 7, bits.shape)
    values = MAGNITUDES[low] + position.clip(0, 1 - 2**-22) * np.diff(MAGNITUDES)[low]
    values[:, 0] = 6
    np.testing.assert_array_equal(values, values.astype(np.float32))
    x = torch.from_numpy(values.astype(np.float32))
    q = quantize_mxfp4(x, ScaleRule.RCEIL, Rounding.STOCHASTIC, seed=seed)
    truth = map(_stochastic_code, map(Fraction, values.flatten().tolist()), bits.flatten().tolist())
    assert unpack(q.qdata).reshape(-1).tolist() == list(truth)


def _stochastic(x: torch.Tensor, seed: int, **position: Any) -> torch.Tensor:
    return quantize_mxfp4(x, ScaleRule.RCEIL, Rounding.STOCHASTIC, seed=seed, **position).qdata


def test_stochastic_is_a_function_of_seed_and_subsequence() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(7))
    assert torch.equal(_stochastic(x, 1, subsequence=2), _stochastic(x, 1, subsequence=2))
    positions = [(1, 2), (2, 2), (1, 3), (2**32 + 1, 2), (2, 1), (0, 0)]
    results = [_stochastic(x, seed, subsequence=sub) for seed, sub in positions]
    for i, a in enumerate(results):
        assert not any(torch.equal(a, b) for b in results[:i])


def test_stochastic_depends_on_the_row_number_not_on_the_split() -> None:
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(8))
    whole = _stochastic(x, 9).flatten(0, 1)
    flat = x.flatten(0, 1)
    for a, b in [(0, 1), (1, 5), (5, 12)]:
        assert torch.equal(_stochastic(flat[a:b], 9, rows=torch.arange(a, b)), whole[a:b])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(9))
    assert torch.equal(_stochastic(flat[order], 9, rows=order.to(torch.int32)), whole[order])


def test_subsequence_of_each_row() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(10))
    subsequence = torch.tensor([4, 0, 4, 2**32 - 1, 1, 4], dtype=torch.int64)
    together = _stochastic(x, 5, subsequence=subsequence)
    for row, sub in enumerate(subsequence.tolist()):
        assert torch.equal(together[row], _stochastic(x, 5, subsequence=sub)[row])


def test_stochastic_is_unbiased() -> None:
    """The mean of N roundings is within 5 standard deviations, gap * sqrt(p (1 - p) / N) each, of the value.

    Sixteen bits resolve p to 2^-16, which moves the mean by less than gap / 65536 more.
    """
    rows, seeds = 512, 64
    values = torch.linspace(-5.9, 5.9, 32)
    values[0] = -6.0
    magnitude = values.abs().double().numpy()
    low = MAGNITUDES[np.searchsorted(MAGNITUDES, magnitude, side="right") - 1]
    gap = np.select([magnitude < 2, magnitude < 4], [0.5, 1.0], 2.0)
    p = (magnitude - low) / gap
    total = torch.zeros(32, dtype=torch.float64)
    for seed in range(seeds):
        q = quantize_mxfp4(values.expand(rows, 32), ScaleRule.RCEIL, Rounding.STOCHASTIC, seed=seed)
        assert (q.sf == 127).all()
        total += dequantize_mxfp4(q).double().sum(0)
    error = (total / (rows * seeds) - values).abs().numpy()
    assert (error <= gap * (5 * np.sqrt(p * (1 - p) / (rows * seeds)) + 1 / 65536)).all()
    assert error[0] == 0


@pytest.mark.parametrize("sf", [0, 1, 127, 252])
def test_stochastic_never_moves_grid_values(sf: int) -> None:
    codes = np.tile(np.arange(16, dtype=np.uint8), (2000, 4))
    grid = MXFP4Tensor(torch.from_numpy(pack(codes)), torch.full((2000, 2), sf, dtype=torch.uint8))
    q = quantize_mxfp4(dequantize_mxfp4(grid), ScaleRule.RCEIL, Rounding.STOCHASTIC, seed=12)
    assert torch.equal(q.qdata, grid.qdata)
    assert torch.equal(q.sf, grid.sf)


def test_stochastic_saturates_at_six() -> None:
    x = torch.linspace(6, 7.99, 32).expand(2000, 32)
    q = quantize_mxfp4(x, ScaleRule.FLOOR, Rounding.STOCHASTIC, seed=13)
    assert (q.sf == 127).all()
    assert (q.qdata == 0x77).all()


def _unbiased(x: torch.Tensor | FP8Tensor, seed: int = 0, **options: Any) -> MXFP4Tensor:
    return quantize_mxfp4(x, ScaleRule.FLOOR, Rounding.UNBIASED, seed=seed, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_unbiased_codes_follow_the_random_bits(dtype: torch.dtype) -> None:
    """The stochastic code of exactly 3/4 of the value, under FLOOR's scale; of an FP8 product, as float32 has it."""
    rows, K, seed, subsequence = 12, 128, 2**64 - 3, 7
    dense = torch.randn(rows, K, generator=torch.Generator().manual_seed(32))
    x: torch.Tensor | FP8Tensor = dense.to(dtype)
    exact = dense.to(dtype).double()
    if dtype == torch.float8_e4m3fn:
        x = FP8Tensor(dense.to(dtype), torch.linspace(0.7, 1.9, rows)[:, None])
        exact = (exact * x.sf.double()).float().double()
    q = _unbiased(x, seed, subsequence=subsequence)
    assert q.prescaled
    assert torch.equal(q.sf, quantize_mxfp4(x, ScaleRule.FLOOR).sf)
    scaled = (exact / 2.0 ** (q.sf.double() - 127).repeat_interleave(32, dim=-1)).flatten().tolist()
    bits = random_bits16(torch.arange(rows), K, seed, subsequence).flatten().tolist()
    truth = [
        _stochastic_code(abs(Fraction(v) * 3 / 4), b) + 8 * (np.copysign(1, v) < 0)
        for v, b in zip(scaled, bits, strict=True)
    ]
    assert unpack(q.qdata).reshape(-1).tolist() == truth


def test_unbiased_reaches_the_largest_code_and_never_saturates() -> None:
    """FLOOR's scaled maximum is below 8, and 3/4 of it below 6: code 7 is a rounding up, from above 4."""
    largest = np.nextafter(np.float32(8), np.float32(0))
    x = torch.tensor([largest, 5.4]).repeat(16).expand(2000, 32)
    q = _unbiased(x, seed=33)
    assert (q.sf == 127).all()
    codes = unpack(q.qdata)
    assert set(codes[:, 1::2].ravel().tolist()) == {6, 7}
    bits = random_bits16(torch.arange(2000), 32, 33).numpy()[:, ::2]
    position = 4 + Fraction(float(largest)) * 3 / 8
    assert position < 7
    np.testing.assert_array_equal(codes[:, ::2], np.where(bits >= (7 - position) * 65536, 7, 6))


def test_prescaled_decodes_times_four_thirds() -> None:
    """One float32 product with float32(4/3), after the rotation if there is one."""
    qdata = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(16, 16)
    sf = torch.tensor([0, 1, 2, 64, 126, 127, 128, 200, 250, 251, 252, 253, 254, 255, 5, 9]).to(torch.uint8)[:, None]
    third = np.float32(4 / 3)
    with np.errstate(over="ignore"):
        for options in ({}, {"hadamard": True}, {"hadamard": True, "hadamard_signs": 0xF00DCAFE}):
            plain = MXFP4Tensor(qdata, sf, **options)
            truth = dequantize_mxfp4(plain).numpy() * third
            out = dequantize_mxfp4(dataclasses.replace(plain, prescaled=True))
            np.testing.assert_array_equal(out.numpy().view(np.int32)[:13], truth.view(np.int32)[:13])
            assert out[13].isnan().all()


def test_unbiased_keeps_zeros_and_spoils_blocks() -> None:
    x = torch.zeros(3, 64)
    x[0, ::2] = -0.0
    x[1, 3], x[2, 40] = torch.nan, -torch.inf
    q = _unbiased(x)
    assert q.sf.tolist() == [[0, 0], [255, 0], [0, 255]]
    assert torch.equal(torch.signbit(dequantize_mxfp4(q))[0], torch.signbit(x)[0])
    assert not q.qdata[1:].any()


@pytest.mark.parametrize("shift", [-126, 0, 124])
def test_unbiased_rounding_is_unbiased(shift: int) -> None:
    """The mean of N decoded roundings is within 5 standard deviations of the value, all over FLOOR's range.

    A rounding of 3 v / 4 has standard deviation gap * sqrt(p (1 - p)); decoding multiplies it by 4/3. Sixteen bits
    move the mean by less than gap / 65536 more, float32(4/3) by 2^-24 of it.
    """
    rows, seeds = 512, 64
    values = torch.linspace(-7.99, 7.99, 32)
    magnitude = 0.75 * values.abs().double().numpy()
    low = MAGNITUDES[np.searchsorted(MAGNITUDES, magnitude, side="right") - 1]
    gap = np.select([magnitude < 2, magnitude < 4], [0.5, 1.0], 2.0)
    p = (magnitude - low) / gap
    total = torch.zeros(32, dtype=torch.float64)
    for seed in range(seeds):
        q = _unbiased((values * 2.0**shift).expand(rows, 32), seed)
        assert (q.sf == 127 + shift).all()
        total += (dequantize_mxfp4(q).double() / 2.0**shift).sum(0)
    error = (total / (rows * seeds) - values).abs().numpy()
    bound = gap * (5 * np.sqrt(p * (1 - p) / (rows * seeds)) + 1 / 65536) * 4 / 3 + 2.0**-21
    assert (error <= bound).all()


def test_unbiased_rounding_of_a_rotated_block_is_unbiased() -> None:
    """Over seeds and signs of the rotation: within 5 standard deviations of the mean, as the sample shows them.

    Before decoding, a code is off by less than one gap of at most 2 scales. Sixteen bits and float32 add less than
    2^-14 of the block's maximum.
    """
    draws, rows = 48, 256
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(34)) * torch.logspace(-3, 3, 4)[:, None]
    x[:, 5] *= 20
    decoded = torch.stack(
        [
            dequantize_mxfp4(_unbiased(x.repeat(rows, 1), seed, hadamard=True, signs=hadamard_signs(seed)))
            for seed in range(draws)
        ]
    )
    samples = decoded.double().view(draws * rows, 4, 32)
    error = (samples.mean(0) - x).abs()
    bound = 5 * samples.std(0) / (draws * rows) ** 0.5 + x.abs().amax(-1, keepdim=True) * 2.0**-14
    assert (error <= bound).all()
    # Narrow enough to tell: without the factor 4/3 the mean would be off by a quarter.
    assert (bound[:, 5] < x[:, 5].abs() / 50).all()
