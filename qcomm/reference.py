"""The oracle of the codec: every conversion in plain vectorised PyTorch, on any device.

Slow and obvious on purpose. Arithmetic is float64, in which every product and comparison below is exact, or
integer; the exceptions, the Hadamard rotation, QUEST's deviation, the factor 4/3 and dequantization of FP8, are float32
with a stated order of operations. The CUDA kernels must give the same bits.
"""

from __future__ import annotations

import itertools
import math
from typing import TypeVar

import torch

from qcomm.formats import (
    ALIGN_EXPONENT,
    BF16_NAN,
    BLOCK_SIZE,
    E2M1_MAGNITUDES,
    E2M1_MAX_EXPONENT,
    E4M3_MAX,
    E4M3_MAX_EXPONENT,
    E4M3_NAN,
    E8M0_BIAS,
    E8M0_MAX,
    E8M0_NAN,
    EXACT_DISTANCE,
    FLOAT32_NAN,
    FP8_GROUP_SIZE,
    FP8_MIN_SCALE_EXPONENT,
    QUEST_FACTOR,
    QUEST_MAX_BELOW_FLOOR,
    UNBIASED_FACTOR,
    Rounding,
    ScaleRule,
)
from qcomm.tensors import FP8Tensor, MXFP4Tensor

_MASK32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 7

Word = TypeVar("Word", int, torch.Tensor)


def philox4x32(counter: tuple[Word, ...], key: tuple[int, int]) -> tuple[Word, ...]:
    """Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Seven rounds, the fewest that the authors call Crush-resistant.

    Args:
        counter: four 32-bit words: ints, or int64 tensors of one shape.
        key: two 32-bit words.

    Returns:
        Four 32-bit words of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            (p0 >> 32 & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK32, (k1 + _PHILOX_WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def random_bits16(rows: torch.Tensor, num_columns: int, seed: int, subsequence: int | torch.Tensor = 0) -> torch.Tensor:
    """Sixteen random bits for each element of the given rows, a function of the element's position alone.

    Element k of row r takes half (i % 8) % 2 of word (i % 8) // 2 of Philox4x32-7 at counter
    (i // 8 low, i // 8 high, subsequence, 0), where i = r * num_columns + k.

    Args:
        rows: `[num_rows]` int64 row numbers.
        num_columns: multiple of 8.
        seed: 64 bits; low and high words are the Philox key.
        subsequence: 32 bits that keep independent users of one seed apart; one, or `[num_rows]` int64.

    Returns:
        `[num_rows, num_columns]` int64 in [0, 65536).
    """
    chunks = torch.arange(num_columns // 8, device=rows.device)
    index = rows[:, None] * (num_columns // 8) + chunks
    if isinstance(subsequence, torch.Tensor):
        sub = subsequence.to(torch.int64)[:, None].expand_as(index)
    else:
        sub = torch.full_like(index, subsequence)
    counter = (index & _MASK32, index >> 32 & _MASK32, sub, torch.zeros_like(index))
    words = philox4x32(counter, (seed & _MASK32, seed >> 32 & _MASK32))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten(1)


def hadamard32(x: torch.Tensor) -> torch.Tensor:
    """Rotate each 32-block by the normalised Hadamard matrix (Sylvester order); its own inverse.

    Five butterfly stages of stride 1, 2, 4, 8, 16 in float32, (a, b) -> (a + b, a - b), then one multiplication by
    float32(32 ** -0.5).

    Args:
        x: `[..., K]` float32, K a multiple of 32.

    Returns:
        float32 of the same shape.
    """
    y = x.unflatten(-1, (-1, BLOCK_SIZE))
    stride = 1
    while stride < BLOCK_SIZE:
        pairs = y.unflatten(-1, (-1, 2, stride))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        stride *= 2
    return (y * torch.tensor(BLOCK_SIZE**-0.5, dtype=torch.float32, device=x.device)).flatten(-2)


def hadamard_signs(seed: int) -> int:
    """Return the signs of a rotation: a 32-bit mask, word 0 of Philox4x32-7 at counter (0, 0, 0, 1)."""
    return philox4x32((0, 0, 0, 1), (seed & _MASK32, seed >> 32 & _MASK32))[0]


def flip_signs(x: torch.Tensor, signs: int) -> torch.Tensor:
    """Negate the elements of each 32-block whose bits are set in the mask."""
    flip = torch.tensor([signs >> i & 1 for i in range(BLOCK_SIZE)], dtype=torch.bool, device=x.device)
    blocks = x.unflatten(-1, (-1, BLOCK_SIZE))
    return torch.where(flip, -blocks, blocks).flatten(-2)


def quantize_mxfp4(
    x: torch.Tensor | FP8Tensor,
    scale_rule: ScaleRule = ScaleRule.EVEN,
    rounding: Rounding = Rounding.NEAREST,
    *,
    seed: int = 0,
    subsequence: int | torch.Tensor = 0,
    rows: torch.Tensor | None = None,
    hadamard: bool = False,
    signs: int = 0,
) -> MXFP4Tensor:
    """Quantize to MXFP4.

    Args:
        x: `[..., K]` bfloat16, float16 or float32, or an FP8Tensor, whose exact products data * sf are
            quantized, rounded once; rotated or UNBIASED ones are rounded to float32 first. K is a multiple of 32.
        scale_rule: how a block picks the scale; QUEST wants a rotation and NEAREST.
        rounding: element rounding; UNBIASED wants FLOOR.
        seed: of the random bits of stochastic rounding (`random_bits16`).
        subsequence: keeps independent users of one seed apart.
        rows: row numbers for the random bits; None is 0, 1, 2, ...
        hadamard: rotate each block first (in float32).
        signs: 32-bit mask of the elements of a block to negate before the rotation.

    Returns:
        The tensor. A block that holds a NaN or an Inf gets scale byte 255 and codes 0; an all-zero block gets
        scale byte 0 and keeps the signs of its zeros.

    Raises:
        ValueError: K is not a multiple of 32, or options that do not go together.
        TypeError: another dtype.
    """
    return quantize_mxfp4_clip_mask(
        x, scale_rule, rounding, seed=seed, subsequence=subsequence, rows=rows, hadamard=hadamard, signs=signs
    )[0]


def quantize_mxfp4_clip_mask(
    x: torch.Tensor | FP8Tensor,
    scale_rule: ScaleRule = ScaleRule.EVEN,
    rounding: Rounding = Rounding.NEAREST,
    *,
    seed: int = 0,
    subsequence: int | torch.Tensor = 0,
    rows: torch.Tensor | None = None,
    hadamard: bool = False,
    signs: int = 0,
) -> tuple[MXFP4Tensor, torch.Tensor]:
    """Quantize as `quantize_mxfp4` does; also return which (rotated) elements lie at 6 scales or beyond, `[..., K]`.

    The complement of the mask of arXiv 2505.14669. False throughout a block with a NaN or an Inf.
    """
    if x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"x.shape[-1] must be a multiple of {BLOCK_SIZE}, got {x.shape[-1]}")
    check_quantizer(scale_rule, rounding, hadamard)
    values = exact_values(x)
    if rounding is Rounding.UNBIASED:
        values = values.to(torch.float32).to(torch.float64)
    if hadamard:
        values = hadamard32(flip_signs(values.to(torch.float32), signs)).to(torch.float64)
    blocks = values.unflatten(-1, (-1, BLOCK_SIZE))
    finite = torch.isfinite(blocks).all(-1)
    blocks = torch.where(finite[..., None], blocks, 0.0)
    amax = blocks.abs().amax(-1)
    if scale_rule is ScaleRule.QUEST:
        sf = _quest_scale(blocks, amax)
    else:
        mantissa, exponent = mantissa_exponent(amax)
        bump = mantissa >= scale_rule.threshold if scale_rule.inclusive else mantissa > scale_rule.threshold
        sf = _clamp_scale(exponent - E2M1_MAX_EXPONENT + bump.to(torch.int64) + E8M0_BIAS)
    sf = torch.where(amax == 0, 0, sf)
    scaled = blocks.abs() * pow2(E8M0_BIAS - sf)[..., None]
    clipped = (scaled >= E2M1_MAGNITUDES[-1]).flatten(-2)
    if rounding is Rounding.NEAREST:
        codes = _round_e2m1(scaled)
    else:
        flat_rows = math.prod(values.shape[:-1])
        index = torch.arange(flat_rows, device=x.device) if rows is None else rows.to(torch.int64)
        bits = random_bits16(index, x.shape[-1], seed, subsequence)
        if rounding is Rounding.UNBIASED:
            scaled = scaled * UNBIASED_FACTOR
        codes = _round_e2m1_stochastic(scaled, bits.view(scaled.shape))
    codes = torch.where(finite[..., None], codes | torch.signbit(blocks).to(torch.int64) << 3, 0).flatten(-2)
    sf = torch.where(finite, sf, E8M0_NAN)
    qdata = codes[..., 0::2] | codes[..., 1::2] << 4
    q = MXFP4Tensor(
        qdata.to(torch.uint8), sf.to(torch.uint8), hadamard, signs if hadamard else 0, rounding is Rounding.UNBIASED
    )
    return q, clipped


def check_quantizer(scale_rule: ScaleRule, rounding: Rounding, hadamard: bool) -> None:
    """Require options that go together.

    Raises:
        ValueError: QUEST without a rotation or with another rounding than NEAREST, UNBIASED without FLOOR.
    """
    if scale_rule is ScaleRule.QUEST and not (hadamard and rounding is Rounding.NEAREST):
        raise ValueError(
            f"scale_rule QUEST needs hadamard=True and NEAREST, got hadamard={hadamard} and {rounding.name}"
        )
    if rounding is Rounding.UNBIASED and scale_rule is not ScaleRule.FLOOR:
        raise ValueError(f"rounding UNBIASED needs scale_rule FLOOR, got {scale_rule.name}")


def dequantize_mxfp4(x: MXFP4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode to float32 or bfloat16: rotated back if the tensor was rotated, times 4/3 if it was prescaled.

    Other values are exact, but for magnitudes past the float range, which become infinite. A block with
    scale byte 255 decodes to NaN.

    Returns:
        `[..., K]` of the dtype.
    """
    magnitudes, negative = _decode_codes(x.qdata)
    sf = x.sf.to(torch.int64)
    exact = magnitudes.unflatten(-1, (-1, BLOCK_SIZE)) * pow2(sf - E8M0_BIAS)[..., None]
    exact = torch.where((sf == E8M0_NAN)[..., None], torch.nan, exact).flatten(-2)
    values = torch.where(negative, -exact, exact).to(torch.float32)
    if x.hadamard:
        values = flip_signs(hadamard32(values), x.hadamard_signs)
    if x.prescaled:
        values = values * torch.tensor(1 / UNBIASED_FACTOR, dtype=torch.float32, device=x.device)
    return to_dtype(values, dtype)


def quantize_fp8(x: torch.Tensor) -> FP8Tensor:
    """Quantize rows to E4M3 with 1x128 scales, each the smallest power of two with amax / scale <= 448.

    Nearest even. A group that holds a NaN or an Inf decodes to NaN throughout; it and an all-zero group get the
    scale 2^-126.

    Args:
        x: `[rows, K]` bfloat16, float16 or float32, K a multiple of 128.

    Raises:
        ValueError: K is not a multiple of 128.
    """
    if x.shape[-1] % FP8_GROUP_SIZE:
        raise ValueError(f"x.shape[-1] must be a multiple of {FP8_GROUP_SIZE}, got {x.shape[-1]}")
    data, sf = quantize_fp8_groups(exact_values(x).unflatten(-1, (-1, FP8_GROUP_SIZE)))
    return FP8Tensor(data.flatten(-2), sf)


def dequantize_fp8(x: FP8Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode `data * sf` in float32 (one rounding), then to the dtype.

    Returns:
        `[rows, K]` of the dtype.
    """
    values = x.data.to(torch.float32).unflatten(-1, (-1, FP8_GROUP_SIZE)) * x.sf[..., None]
    return to_dtype(values.flatten(-2), dtype)


def mxfp4_to_fp8(x: MXFP4Tensor) -> tuple[FP8Tensor, torch.Tensor]:
    """Convert rows to E4M3 with 1x128 scales by exponent alignment (arXiv 2603.02731, made exact).

    Of the four blocks under one scale the largest non-zero one maps to 2^6 and the others are shifted down by
    their exponent distance: exact up to distance 14, beyond that rounded to nearest even into subnormals. The scale
    stays a normal float32. Blocks with scale byte 255 become NaN. A rotated or prescaled tensor is decoded and
    quantized like any float32 tensor.

    Args:
        x: `[rows, K]`, K a multiple of 128.

    Returns:
        The FP8Tensor, and the number of blocks at a distance above 14 as int64 scalar on x's device.

    Raises:
        ValueError: K is not a multiple of 128.
    """
    if x.shape[-1] % FP8_GROUP_SIZE:
        raise ValueError(f"x.shape[-1] must be a multiple of {FP8_GROUP_SIZE}, got {x.shape[-1]}")
    if not x.is_plain:
        return quantize_fp8(dequantize_mxfp4(x)), torch.zeros((), dtype=torch.int64, device=x.device)
    per_group = FP8_GROUP_SIZE // BLOCK_SIZE
    sf = x.sf.to(torch.int64).unflatten(-1, (-1, per_group))
    top = torch.where(counts_for_alignment(x).unflatten(-1, (-1, per_group)), sf, 0).amax(-1)
    data, scale, overflows = align(x, top.repeat_interleave(per_group, dim=-1))
    return FP8Tensor(data, scale[..., ::per_group].contiguous()), overflows


def to_dtype(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 to float32 or bfloat16 (nearest even); a NaN becomes the one that the hardware writes."""
    if dtype == torch.float32:
        return torch.where(torch.isnan(values), FLOAT32_NAN, values.view(torch.int32)).view(torch.float32)
    if dtype != torch.bfloat16:
        raise TypeError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    bits = values.to(torch.bfloat16).view(torch.int16)
    return torch.where(torch.isnan(values), BF16_NAN, bits).to(torch.int16).view(torch.bfloat16)


def exact_values(x: torch.Tensor | FP8Tensor) -> torch.Tensor:
    """Return the values as float64, exact."""
    if isinstance(x, FP8Tensor):
        groups = x.data.to(torch.float64).unflatten(-1, (-1, FP8_GROUP_SIZE))
        return (groups * x.sf.to(torch.float64)[..., None]).flatten(-2)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"x must be bfloat16, float16, float32 or an FP8Tensor, got {x.dtype}")
    return x.to(torch.float64)


def pow2(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2**exponent as float64, exact; torch's own exp2 and ldexp don't promise that."""
    return (exponent.to(torch.int64) + 1023 << 52).view(torch.float64)


def mantissa_exponent(amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split positive float64 into a mantissa in [1, 2) and an exponent; 0 gives (0, -1)."""
    mantissa, exponent = torch.frexp(amax)
    return mantissa * 2, exponent.to(torch.int64) - 1


def _clamp_scale(sf: torch.Tensor) -> torch.Tensor:
    return sf.clamp(0, E8M0_MAX)


def _quest_scale(blocks: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Return QUEST's scale byte, int64: float32 sums over neighbours, pairs of neighbours, and so on.

    Values are divided by the maximum's binade first, so that no square overflows. std is that of the population:
    its square times QUEST_FACTOR squared has twice the exponent that is looked for.
    """
    _, exponent = mantissa_exponent(amax)
    exponent = exponent.clamp(min=-126)
    x = (blocks * pow2(-exponent)[..., None]).to(torch.float32)
    total, squares = x, x * x
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
        squares = squares[..., 0::2] + squares[..., 1::2]
    mean, mean_square = total[..., 0] / BLOCK_SIZE, squares[..., 0] / BLOCK_SIZE
    variance = mean_square - mean * mean
    scaled = variance * torch.tensor(QUEST_FACTOR**2, dtype=torch.float32, device=blocks.device)
    quest = exponent + E8M0_BIAS + ((scaled.view(torch.int32).to(torch.int64) >> 23) - 127 >> 1)
    floor = _clamp_scale(exponent - E2M1_MAX_EXPONENT + E8M0_BIAS)
    too_low = (variance <= 0) | (quest < floor - QUEST_MAX_BELOW_FLOOR)
    return torch.where(too_low, floor, _clamp_scale(quest))


def _round_e2m1(scaled: torch.Tensor) -> torch.Tensor:
    """Return the magnitude code nearest to each non-negative value; ties go to the even code."""
    codes = torch.zeros_like(scaled, dtype=torch.int64)
    for code, (low, high) in enumerate(itertools.pairwise(E2M1_MAGNITUDES)):
        middle = (low + high) / 2
        codes += (scaled > middle if code % 2 == 0 else scaled >= middle).to(torch.int64)
    return codes


def _round_e2m1_stochastic(scaled: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Round up where position between neighbours + bits / 65536 reaches 1; saturate at 6."""
    position = torch.minimum(torch.minimum(scaled * 2, scaled + 2), scaled / 2 + 4).clamp(max=7)
    return torch.floor(position + bits.to(torch.float64) / 65536).clamp(max=7).to(torch.int64)


def _decode_codes(qdata: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.stack((qdata & 0xF, qdata >> 4), dim=-1).flatten(-2).to(torch.int64)
    table = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float64, device=qdata.device)
    return table[codes & 7], codes >= 8


def counts_for_alignment(x: MXFP4Tensor) -> torch.Tensor:
    """Blocks that take part in an alignment: neither all zero nor NaN; `[..., K // 32]` bool."""
    nonzero = ((x.qdata & 0x77) != 0).unflatten(-1, (-1, BLOCK_SIZE // 2)).any(-1)
    return nonzero & (x.sf != E8M0_NAN)


def align(x: MXFP4Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shift each block by its distance to `top`, the largest scale byte of its group, `[..., K // 32]` int64."""
    lowest = FP8_MIN_SCALE_EXPONENT + ALIGN_EXPONENT + E8M0_BIAS
    top = top.clamp(min=lowest)
    distance = (top - x.sf.to(torch.int64)).clamp(min=0)
    magnitudes, negative = _decode_codes(x.qdata)
    aligned = magnitudes.unflatten(-1, (-1, BLOCK_SIZE)) * pow2(ALIGN_EXPONENT - distance)[..., None]
    aligned = torch.where(negative, -aligned.flatten(-2), aligned.flatten(-2))
    data = aligned.to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)
    is_nan = (x.sf == E8M0_NAN).repeat_interleave(BLOCK_SIZE, dim=-1)
    data = torch.where(is_nan, E4M3_NAN, data).to(torch.uint8).view(torch.float8_e4m3fn)
    scale = pow2(top - E8M0_BIAS - ALIGN_EXPONENT).to(torch.float32)
    overflows = ((distance > EXACT_DISTANCE) & counts_for_alignment(x)).sum()
    return data, scale, overflows


def quantize_fp8_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize float64 `[..., 128]` groups; returns float8_e4m3fn of the same shape and float32 `[...]`."""
    finite = torch.isfinite(groups).all(-1)
    amax = torch.where(finite, groups.abs().amax(-1), 0.0)
    mantissa, exponent = mantissa_exponent(amax)
    exponent = exponent - E4M3_MAX_EXPONENT + (mantissa > E4M3_MAX / 2**E4M3_MAX_EXPONENT).to(torch.int64)
    exponent = torch.where(amax == 0, FP8_MIN_SCALE_EXPONENT, exponent.clamp(min=FP8_MIN_SCALE_EXPONENT))
    data = (groups * pow2(-exponent)[..., None]).to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)
    data = torch.where(finite[..., None], data, E4M3_NAN).to(torch.uint8).view(torch.float8_e4m3fn)
    return data, pow2(exponent).to(torch.float32)
