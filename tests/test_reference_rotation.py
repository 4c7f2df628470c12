"""The oracle of the rotation, its random signs, and QUEST, the scale rule for rotated blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bit_patterns import equal_bits
from codec_truth import Array, nearest_codes, pack, random_float32, scale_bytes

from qcomm.formats import MAXIMUM_RULES, WIRE_ROUNDINGS, Rounding, ScaleRule
from qcomm.reference import (
    dequantize_fp8,
    dequantize_mxfp4,
    flip_signs,
    hadamard32,
    hadamard_signs,
    philox4x32,
    quantize_mxfp4,
    quantize_mxfp4_clip_mask,
    to_dtype,
)
from qcomm.tensors import FP8Tensor, MXFP4Tensor


def _sylvester() -> Array:
    matrix: Array = np.ones((1, 1))
    for _ in range(5):
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix


def test_hadamard_matrix() -> None:
    matrix = hadamard32(torch.eye(32))
    assert torch.equal(matrix, torch.from_numpy(_sylvester()).float() * torch.tensor(32**-0.5))
    assert torch.equal(matrix, matrix.t())
    assert (matrix.double() @ matrix.double().t() - torch.eye(32)).abs().max() < 1e-6


def test_hadamard_against_float64() -> None:
    x = torch.randn(7, 3, 96, generator=torch.Generator().manual_seed(14))
    y = hadamard32(x)
    truth = x.double().unflatten(-1, (3, 32)) @ torch.from_numpy(_sylvester()) / 32**0.5
    assert (y - truth.flatten(-2)).abs().max() < 1e-6
    assert (hadamard32(y) - x).abs().max() < 2e-6


def test_hadamard_order_of_operations() -> None:
    """Bit for bit: five stages over the partner i ^ stride, smallest stride first, then one product."""
    x = np.random.default_rng(15).standard_normal((64, 32), dtype=np.float32)
    y, index = x, np.arange(32)
    for stride in (1, 2, 4, 8, 16):
        partner = y[:, index ^ stride]
        y = np.where(index & stride, partner - y, y + partner)
    truth = torch.from_numpy(y * np.float32(32**-0.5))
    assert equal_bits(hadamard32(torch.from_numpy(x)), truth)


@pytest.mark.parametrize("rounding", WIRE_ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_rotated_quantize_is_rotate_then_quantize(dtype: torch.dtype, rounding: Rounding) -> None:
    dense = torch.randn(16, 128, generator=torch.Generator().manual_seed(16))
    x: torch.Tensor | FP8Tensor = dense.to(dtype)
    values = dense.to(dtype).float()
    if dtype == torch.float8_e4m3fn:
        x = FP8Tensor(dense.to(dtype), torch.linspace(0.7, 1.9, 16)[:, None])
        values = dequantize_fp8(x)
    q = quantize_mxfp4(x, rounding=rounding, seed=3, hadamard=True)
    plain = quantize_mxfp4(hadamard32(values), rounding=rounding, seed=3)
    assert q.hadamard
    assert torch.equal(q.qdata, plain.qdata)
    assert torch.equal(q.sf, plain.sf)
    assert equal_bits(dequantize_mxfp4(q), hadamard32(dequantize_mxfp4(plain)))


def test_rotated_round_trip_error() -> None:
    """Rotation keeps the norm of the error, and no rotated value is off by more than one step."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(17))
    q = quantize_mxfp4(x, ScaleRule.RCEIL, hadamard=True)
    error = (dequantize_mxfp4(q).double() - x).unflatten(-1, (3, 32)).norm(dim=-1)
    step = 2.0 ** (q.sf.double() - 127)
    assert (error <= 32**0.5 * step * (1 + 1e-5)).all()
    rounded = to_dtype(dequantize_mxfp4(q), torch.bfloat16)
    assert equal_bits(dequantize_mxfp4(q, torch.bfloat16), rounded)


def test_rotation_helps_a_block_with_an_outlier() -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(18))
    x[:, 7] = 16.0
    plain, rotated = (dequantize_mxfp4(quantize_mxfp4(x, hadamard=h)) - x for h in (False, True))
    assert rotated.square().mean() < 0.5 * plain.square().mean()


def test_rotated_non_finite_block_is_nan_alone() -> None:
    x = torch.ones(3, 64, dtype=torch.bfloat16)
    x[0, 3], x[1, 40] = torch.inf, torch.nan
    q = quantize_mxfp4(x, hadamard=True)
    assert (q.sf == 255).tolist() == [[True, False], [False, True], [False, False]]
    assert torch.equal(dequantize_mxfp4(q).isnan(), (q.sf == 255).repeat_interleave(32, dim=-1))


SEEDS = (0, 1, 2**32, 2**63 + 11, 2**64 - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_signs_are_a_word_of_philox(seed: int) -> None:
    counter = tuple(torch.tensor([c]) for c in (0, 0, 0, 1))
    assert hadamard_signs(seed) == int(philox4x32(counter, (seed % 2**32, seed // 2**32))[0])


def test_signs_are_random() -> None:
    """Each element's sign is that of a fair coin over 1024 seeds, within 5 standard deviations of 16."""
    signs = np.array([hadamard_signs(seed) for seed in range(1024)])
    assert len(np.unique(signs)) == 1024
    counts = (signs[:, None] >> np.arange(32) & 1).sum(0)
    assert (np.abs(counts - 512) <= 5 * 16).all()


def _flipped(x: torch.Tensor, signs: int) -> torch.Tensor:
    """Sign bits of float32 turned by the mask, as bits."""
    mask = np.array([signs >> i & 1 for i in range(32)], dtype=np.uint32) << 31
    bits = x.numpy().view(np.uint32).reshape(*x.shape[:-1], -1, 32) ^ mask
    return torch.from_numpy(bits.view(np.float32).reshape(x.shape))


@pytest.mark.parametrize("signs", [0, 1, 1 << 31, 0xDEADBEEF, 2**32 - 1])
def test_flip_signs(signs: int) -> None:
    x = torch.randn(3, 2, 96, generator=torch.Generator().manual_seed(27))
    x[0, 0, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    assert equal_bits(flip_signs(x, signs), _flipped(x, signs))


@pytest.mark.parametrize("rounding", WIRE_ROUNDINGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_signs_come_before_the_rotation_and_go_after_it(seed: int, rounding: Rounding) -> None:
    signs = hadamard_signs(seed)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(28))
    q = quantize_mxfp4(x, rounding=rounding, seed=3, hadamard=True, signs=signs)
    plain = quantize_mxfp4(hadamard32(_flipped(x, signs)), rounding=rounding, seed=3)
    assert (q.hadamard, q.hadamard_signs) == (True, signs)
    assert torch.equal(q.qdata, plain.qdata)
    assert torch.equal(q.sf, plain.sf)
    assert equal_bits(dequantize_mxfp4(q), _flipped(hadamard32(dequantize_mxfp4(plain)), signs))


def test_signs_without_a_rotation_are_left_out() -> None:
    q = quantize_mxfp4(torch.ones(1, 32), signs=5)
    assert q.hadamard_signs == 0
    assert (dequantize_mxfp4(q) == 1).all()


def _quest(x: torch.Tensor) -> tuple[MXFP4Tensor, torch.Tensor]:
    return quantize_mxfp4_clip_mask(x, ScaleRule.QUEST, hadamard=True)


def _quest_bytes(rotated: Array) -> tuple[Array, Array]:
    """QUEST's byte of each `[..., 32]` block in long double, and where float32 sums may put it elsewhere.

    The sums of 32 are off by at most 6 units of 2^-24 of the sum of squares each, squares and products included.
    """
    blocks = rotated.astype(np.longdouble)
    floor = scale_bytes(np.abs(rotated).max(-1), ScaleRule.FLOOR).astype(np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.log2(np.longdouble("2.92247856") / 6 * blocks.std(-1))
        error = 12 * 2.0**-24 * np.square(blocks).mean(-1) / blocks.var(-1)
        unsure = ~(np.abs(exponent - np.rint(exponent)) > error)
    quest = np.floor(np.maximum(exponent, -999)).astype(np.int64) + 127
    return np.where(quest < floor - 2, floor, quest.clip(0, 254)), unsure


def _rotated(x: torch.Tensor) -> Array:
    rotated: Array = hadamard32(x.float()).unflatten(-1, (-1, 32)).numpy()
    return rotated


def _quest_inputs() -> dict[str, Array]:
    rng = np.random.default_rng(29)
    gaussian = rng.standard_normal((4096, 32), dtype=np.float32)
    spiky = gaussian.copy()
    spiky[:, 7] *= 100
    cauchy = rng.standard_cauchy((4096, 32)).astype(np.float32)
    scaled = np.ldexp(gaussian, rng.integers(-149, 120, (4096, 1)))
    # Rotated blocks around a common value: the deviation is far below the maximum.
    shifted = gaussian * np.float32(0.01) * rng.integers(1, 40, (4096, 1)).astype(np.float32) + np.float32(3)
    signs = np.copysign(rng.uniform(1, 2, (4096, 1)), gaussian).astype(np.float32)
    unrotated = {"shifted": shifted, "signs": signs}
    back = {name: hadamard32(torch.from_numpy(x)).numpy() for name, x in unrotated.items()}
    return {"gaussian": gaussian, "spiky": spiky, "cauchy": cauchy, "scaled": scaled, **back}


QUEST_INPUTS = _quest_inputs()


@pytest.mark.parametrize("name", QUEST_INPUTS)
def test_quest_scale_is_that_of_the_deviation(name: str) -> None:
    x = torch.from_numpy(QUEST_INPUTS[name])
    truth, unsure = _quest_bytes(_rotated(x))
    sf = _quest(x)[0].sf.numpy()
    np.testing.assert_array_equal(sf[~unsure], truth[~unsure])
    # Subnormal blocks have few distinct deviations, some of them at a power of two.
    assert unsure.mean() < 0.01


@pytest.mark.parametrize("name", QUEST_INPUTS)
def test_quest_order_of_operations(name: str) -> None:
    """Bit for bit: values over the maximum's binade, float32 sums of neighbours, then of their sums."""
    rotated = _rotated(torch.from_numpy(QUEST_INPUTS[name]))[:, 0]
    floor_exponent = np.maximum(np.frexp(np.abs(rotated).max(-1))[1] - 1, -126)
    sums = np.ldexp(rotated, -floor_exponent[:, None])
    squares = sums * sums
    for _ in range(5):
        sums, squares = sums[:, ::2] + sums[:, 1::2], squares[:, ::2] + squares[:, 1::2]
    mean = sums[:, 0] / np.float32(32)
    variance = squares[:, 0] / np.float32(32) - mean * mean
    assert variance.dtype == np.float32
    scaled = variance * np.float32((2.92247856 / 6) ** 2)
    quest = floor_exponent + 127 + ((np.frexp(scaled)[1] - 1) >> 1)
    floor = scale_bytes(np.abs(rotated).max(-1), ScaleRule.FLOOR).astype(np.int64)
    truth = np.where((variance <= 0) | (quest < floor - 2), floor, quest.clip(0, 254))
    np.testing.assert_array_equal(_quest(torch.from_numpy(QUEST_INPUTS[name]))[0].sf[:, 0].numpy(), truth)


def test_quest_lies_between_two_below_and_one_above_floor() -> None:
    """And takes every place between; a block that deviates less takes FLOOR's."""
    seen, num_flat = set(), 0
    for name in ("gaussian", "spiky", "cauchy", "shifted", "signs"):
        x = torch.from_numpy(QUEST_INPUTS[name])
        floor = quantize_mxfp4(x, ScaleRule.FLOOR, hadamard=True).sf.int()
        sf = _quest(x)[0].sf.int()
        seen |= set((sf - floor).unique().tolist())
        deviation = _rotated(x).astype(np.float64).std(-1) * 2.92247856 / 6
        flat = torch.from_numpy(deviation < 0.999 * np.ldexp(0.25, floor.numpy() - 127))
        assert (sf == floor)[flat].all()
        num_flat += int(flat.sum())
    assert seen == {-2, -1, 0, 1}
    assert num_flat > 100


@pytest.mark.parametrize("value", [1.0, -3.5, 2.0**-120, 2.0**120])
def test_quest_of_an_impulse_is_floor(value: float) -> None:
    """The rotated block is constant, or of one magnitude and mean 0."""
    x = torch.diag(torch.full((32,), value))
    q, clipped = _quest(x)
    floor = quantize_mxfp4(x, ScaleRule.FLOOR, hadamard=True)
    assert q.sf[0] == floor.sf[0]
    assert torch.equal(q.qdata[0], floor.qdata[0])
    magnitude = abs(np.float32(value) * np.float32(32**-0.5))
    exponent = np.floor(np.log2(np.longdouble("2.92247856") / 6 * magnitude))
    assert (q.sf[1:] == int(exponent) + 127).all()
    assert (clipped[1:] == bool(magnitude / 2.0**exponent >= 6)).all()


@pytest.mark.parametrize("shift", [-100, -7, 90])
def test_quest_moves_with_powers_of_two(shift: int) -> None:
    x = torch.from_numpy(QUEST_INPUTS["gaussian"])
    (q, clipped), (moved, moved_clipped) = _quest(x), _quest(x * 2.0**shift)
    assert torch.equal(moved.sf.int(), q.sf.int() + shift)
    assert torch.equal(moved.qdata, q.qdata)
    assert torch.equal(moved_clipped, clipped)


def test_quest_of_zero_and_non_finite_blocks() -> None:
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(30))
    clean, clean_clipped = _quest(x)
    x[0, 32:64], x[1, 32:64] = 0.0, -0.0
    x[2, 40], x[3, 63] = torch.nan, torch.inf
    # Finite, but not once added up.
    x[4, 32:64] = 3e38
    x[5, 32:64] = torch.tensor([3e38, -3e38]).repeat(16)
    q, clipped = _quest(x)
    assert q.sf[:, 1].tolist() == [0, 0, 255, 255, 255, 255]
    assert not (q.qdata[:, 16:32] & 0x77).any()
    assert not q.qdata[2:, 16:32].any()
    assert not clipped[:, 32:64].any()
    for block in (0, 2):
        part = slice(32 * block, 32 * block + 32)
        assert torch.equal(q.sf[:, block], clean.sf[:, block])
        assert torch.equal(clipped[:, part], clean_clipped[:, part])
        assert torch.equal(dequantize_mxfp4(q)[:, part], dequantize_mxfp4(clean)[:, part])


@pytest.mark.parametrize("name", QUEST_INPUTS)
def test_quest_codes_and_clip_mask(name: str) -> None:
    """Nearest codes under the scale; clipped where the magnitude is 6 scales or more, which all become code 7."""
    x = torch.from_numpy(QUEST_INPUTS[name])
    q, clipped = _quest(x)
    scaled = np.ldexp(_rotated(x).astype(np.float64), 127 - q.sf.numpy().astype(np.int64)[..., None])
    scaled = scaled.reshape(x.shape)
    np.testing.assert_array_equal(q.qdata.numpy(), pack(nearest_codes(scaled)))
    np.testing.assert_array_equal(clipped.numpy(), np.abs(scaled) >= 6)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_clip_mask_of_the_other_rules(rule: ScaleRule, hadamard: bool) -> None:
    x = torch.from_numpy(random_float32(np.random.default_rng(31), (64, 32)) * np.float32(2**-6))
    edge = torch.tensor([6.0, np.nextafter(np.float32(6), np.float32(0)), 5.0, -6.0, -7.9, 8.0]).repeat(6)[:32]
    # Under FLOOR the edges count as they stand.
    x = torch.cat([x, edge[None], edge[None].clamp(-7.9, 7.9)])
    q, clipped = quantize_mxfp4_clip_mask(x, rule, hadamard=hadamard)
    values = hadamard32(x) if hadamard else x
    scaled = np.ldexp(values.double().numpy(), 127 - q.sf.numpy().astype(np.int64))
    finite = np.isfinite(scaled).all(-1, keepdims=True)
    np.testing.assert_array_equal(clipped.numpy(), (np.abs(scaled) >= 6) & finite)


@pytest.mark.parametrize(
    ("rule", "rounding", "hadamard", "message"),
    [
        (
            ScaleRule.QUEST,
            Rounding.NEAREST,
            False,
            "QUEST needs hadamard=True and NEAREST, got hadamard=False and NEAR",
        ),
        (ScaleRule.QUEST, Rounding.STOCHASTIC, True, "QUEST needs .*, got hadamard=True and STOCHASTIC"),
        (ScaleRule.QUEST, Rounding.UNBIASED, True, "QUEST needs .*, got hadamard=True and UNBIASED"),
        (ScaleRule.EVEN, Rounding.UNBIASED, True, "UNBIASED needs scale_rule FLOOR, got EVEN"),
        (ScaleRule.RCEIL, Rounding.UNBIASED, False, "UNBIASED needs scale_rule FLOOR, got RCEIL"),
    ],
)
def test_options_that_do_not_go_together(rule: ScaleRule, rounding: Rounding, hadamard: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_mxfp4(torch.zeros(1, 32), rule, rounding, hadamard=hadamard)
