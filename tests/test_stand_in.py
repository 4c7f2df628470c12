"""The table of kernels/stand_in.cuh: recomputed in fractions, found in the cubin, and shown to give the same codes."""

from __future__ import annotations

import struct
from fractions import Fraction

import pytest

from qcomm import jit
from qcomm.ops import catalog

CELLS, MANTISSA_BITS = 128, 23
HALF_WAY = [Fraction(n, 8) for n in (2, 6, 10, 14, 20, 28, 40)]
"""Between the E2M1 magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6."""


def mantissa(x: Fraction) -> Fraction:
    while x >= 2:
        x /= 2
    while x < 1:
        x *= 2
    return x


QUOTIENTS = sorted({mantissa(half_way / code) for half_way in HALF_WAY for code in range(1, 16)})
QUOTIENTS_OF_5 = sorted({mantissa(Fraction(5, code)) for code in range(1, 16)})


def half(x: Fraction) -> tuple[int, Fraction]:
    """FP16 below x, its bits and its value."""
    exponent = 15
    while x < 1:
        x, exponent = 2 * x, exponent - 1
    last = int((x - 1) * 1024)
    return exponent << 10 | last, (1 + Fraction(last, 1024)) * Fraction(2) ** (exponent - 15)


def middle(x: Fraction, quotients: list[Fraction], exact: bool) -> Fraction:
    low, high = max(q for q in quotients if q <= x), min([q for q in quotients if q > x], default=Fraction(2))
    return x if exact and x == low else (low + high) / 2


def stand_in(x: Fraction, exact: bool) -> tuple[tuple[int, Fraction], tuple[int, Fraction]]:
    return half(middle(x, QUOTIENTS, exact)), half(middle(x, QUOTIENTS_OF_5, exact) / 10)


def bits(x: Fraction, exact: bool) -> int:
    (low, _), (high, _) = stand_in(x, exact)
    return low | high << 16


def table() -> list[tuple[int, int, int, int]]:
    cells = []
    for i in range(CELLS):
        start = 1 + Fraction(i, CELLS)
        inside = [q for q in QUOTIENTS if start <= q < start + Fraction(1, CELLS)]
        assert len(inside) < 2
        below = bits(start, exact=True)
        bound = int((inside[0] - 1) * 2**MANTISSA_BITS) + 1 if inside else 0
        cells.append((bound, below, bits(inside[0], exact=False) if inside else below, 0))
    return cells


def code(x: Fraction) -> int:
    """To the nearest, ties to even."""
    return max(i + 1 if x > p or (x == p and i % 2) else 0 for i, p in enumerate(HALF_WAY))


def test_the_kernel_holds_the_table() -> None:
    (spec,) = (
        spec
        for spec in catalog.codec_specs()
        if spec.file == "quantize_mxfp4"
        and {"SOURCE": 3, "FLAT_SCALES": 1, "HADAMARD": 0, "STOCHASTIC": 0, "CLIP_MASK": 0}.items()
        <= dict(spec.constants).items()
    )
    entries = b"".join(struct.pack("<4I", *cell) for cell in table())
    assert jit.compile_cubin(spec, "sm_90").count(entries) == 1


@pytest.mark.parametrize("number", range(len(QUOTIENTS)))
def test_codes_are_those_of_the_scale(number: int) -> None:
    """At a quotient, between it and the next, and at both ends of that; every E4M3 mantissa and exponent.

    `round` is to even, as is the addition to 1024; FP16 products are not rounded before it.
    """
    last_bit = Fraction(1, 2**MANTISSA_BITS)
    low = QUOTIENTS[number]
    high = [*QUOTIENTS, Fraction(2)][number + 1]
    exact = low.denominator & (low.denominator - 1) == 0
    scales = [(low, True)] if exact else []
    first = low + last_bit - (low % last_bit)
    last = high - (high % last_bit or last_bit)
    scales += [(scale, False) for scale in (first, (low + high) / 2, last)]
    for scale, at_quotient in scales:
        (_, factor), (_, tenth) = stand_in(scale if at_quotient else low, at_quotient)
        for significand in range(8, 16):
            for exponent in range(-10, 3):
                number_of_code = Fraction(significand, 8) * Fraction(2) ** exponent
                if number_of_code * scale >= 8:
                    continue
                x = number_of_code * factor
                lines = 2 * x, x + 2, number_of_code * tenth + 6
                assert min(map(round, lines)) == code(number_of_code * scale), (scale, number_of_code)
