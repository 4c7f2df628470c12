"""Format constants and frozen descriptors: the one place where the numbers of the formats live.

Sources: OCP Microscaling Formats (MX) v1.0 for E2M1, E8M0 and the FLOOR rule; arXiv 2603.02731 for the
FP4 to FP8 exponent alignment; arXiv 2505.14669 (Quartet) for the rotation, stochastic rounding, QUEST and UNBIASED.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Literal, cast

BLOCK_SIZE = 32
"""Elements under one E8M0 scale."""
FP8_GROUP_SIZE = 128
"""Elements under one FP8 scale."""

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX_EXPONENT = 2
"""Exponent of the largest E2M1 binade: a block of maximum m * 2^E gets the scale 2^(E - 2 + bump)."""
E8M0_BIAS = 127
E8M0_MAX = 254
E8M0_NAN = 255

E4M3_MAX = 448.0
E4M3_NAN = 0x7F
E4M3_MAX_EXPONENT = 8
FP8_MIN_SCALE_EXPONENT = -126
"""FP8 scales stay normal float32 numbers; an all-zero (or non-finite) group gets 2^-126."""

ALIGN_EXPONENT = 6
"""Exponent alignment maps the largest non-zero block of a group to 2^6, so that 6 becomes 384."""
EXACT_DISTANCE = 14
"""Largest exponent distance at which every aligned E2M1 code is exact in E4M3."""

BF16_NAN = 0x7FFF
FLOAT32_NAN = 0x7FFFFFFF
"""The NaNs that conversions write (what the hardware writes)."""

QUEST_FACTOR = 2.92247856 / 6.0
"""QUEST's scale over the standard deviation: a Gaussian's clipping point of least error, over the largest code."""
QUEST_MAX_BELOW_FLOOR = 2
"""QUEST's scale byte lies at most this far below FLOOR's; a block that deviates less takes FLOOR's."""
UNBIASED_FACTOR = 0.75
"""What UNBIASED rounding multiplies by, so that 8, the bound of FLOOR's scaled maximum, becomes 6."""


class ScaleRule(enum.Enum):
    """How a block picks its scale.

    By its maximum m * 2^E, 1 <= m < 2: the scale is 2^(E - 2 + bump), and each member holds (threshold,
    inclusive), bump being 1 where m > threshold, or m >= threshold if inclusive. FLOOR never bumps (OCP MX v1.0).
    EVEN bumps at m >= 1.75, where the maximum would round up to the next binade. NEAR_MSE bumps at m >= 1.8125. RCEIL
    bumps at m > 1.5, so that nothing saturates. CEIL bumps at m > 1, the next power of two.

    By its standard deviation: QUEST (arXiv 2505.14669), 2^floor(log2(QUEST_FACTOR * std)), for rotated blocks.
    Larger elements are clipped. It is not a wire format's.
    """

    FLOOR = (2.0, True)
    EVEN = (1.75, True)
    NEAR_MSE = (1.8125, True)
    RCEIL = (1.5, False)
    CEIL = (1.0, False)
    QUEST = (2.0, False)

    @property
    def threshold(self) -> float:
        """Mantissa in [1, 2] at which the rule bumps."""
        return self.value[0]

    @property
    def inclusive(self) -> bool:
        """Whether a mantissa equal to the threshold bumps."""
        return self.value[1]

    @property
    def addend(self) -> int:
        """Integer R for which `(float32_bits + R) >> 23` is the biased exponent plus bump; FLOOR's for QUEST."""
        if self is ScaleRule.QUEST:
            return ScaleRule.FLOOR.addend
        return round((2.0 - self.threshold) * 2**23) - (0 if self.inclusive else 1)


MAXIMUM_RULES = (ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.NEAR_MSE, ScaleRule.RCEIL, ScaleRule.CEIL)
"""The rules that go by the block's maximum."""


class Rounding(enum.Enum):
    """How a scaled value becomes an E2M1 code."""

    NEAREST = 0
    """Nearest, ties to the even code, saturating at 6."""
    STOCHASTIC = 1
    """Up with a probability equal to the position between the two neighbours (16 random bits)."""
    UNBIASED = 2
    """STOCHASTIC over FLOOR's scale of 3/4 of the values, so that nothing saturates; decoding multiplies by 4/3."""


WIRE_ROUNDINGS = (Rounding.NEAREST, Rounding.STOCHASTIC)
"""The roundings that a wire format may have."""


class ScaleLayout(enum.Enum):
    """How the scales of an FP8 tensor of shape [rows, K] are stored."""

    ROW_MAJOR = "row_major"
    """float32 `[rows, K // 128]`, contiguous."""
    COLUMN_MAJOR = "column_major"
    """float32 `[rows, K // 128]` with strides (1, rows padded to a multiple of 4)."""
    PACKED_UE8M0 = "packed_ue8m0"
    """int32 `[rows, ceil(K / 512)]` with strides (1, rows padded to a multiple of 4): byte j of word w, from the low
    end, is the exponent byte (value 2^(b - 127)) of group 4 w + j; bytes past the last group are 0."""


FLOAT_SCALE_LAYOUTS = (ScaleLayout.ROW_MAJOR, ScaleLayout.COLUMN_MAJOR)
"""The storages of float32 scales, which an exchange delivers."""
COLUMN_MAJOR_ROW_MULTIPLE = 4

WireKind = Literal["bf16", "fp8", "mxfp4"]
WIRE_KINDS: tuple[WireKind, ...] = ("bf16", "fp8", "mxfp4")
RecvDtype = Literal["fp8", "bf16", "mxfp4"]
RECV_DTYPES: tuple[RecvDtype, ...] = ("fp8", "bf16", "mxfp4")
RecvLayout = Literal["expert_major", "token_major", "batched"]
RECV_LAYOUTS: tuple[RecvLayout, ...] = ("expert_major", "token_major", "batched")


@dataclasses.dataclass(frozen=True)
class WireFormat:
    """What one leg of an exchange puts on the wire.

    Args:
        kind: "bf16", "fp8" (E4M3, one float32 scale per 128) or "mxfp4" (E2M1, one E8M0 scale per 32).
        scale_rule: scale rule of "mxfp4"; ignored by the others.
        rounding: element rounding of "mxfp4"; ignored by the others.
        hadamard: rotate each 32-block by the normalised Hadamard matrix before "mxfp4" quantization; the
            receiver rotates back.

    Raises:
        ValueError: unknown kind, or an MXFP4 option on another kind.
    """

    kind: WireKind
    scale_rule: ScaleRule = ScaleRule.EVEN
    rounding: Rounding = Rounding.NEAREST
    hadamard: bool = False

    def __post_init__(self) -> None:
        if self.kind not in WIRE_KINDS:
            raise ValueError(f"kind must be one of {WIRE_KINDS}, got {self.kind!r}")
        if self.kind != "mxfp4" and (self.hadamard or self.rounding is not Rounding.NEAREST):
            raise ValueError(f"hadamard and stochastic rounding need kind 'mxfp4', got {self.kind!r}")
        if self.scale_rule not in MAXIMUM_RULES:
            raise ValueError(f"scale_rule of a wire must be one of {MAXIMUM_RULES}, got {self.scale_rule}")
        if self.rounding not in WIRE_ROUNDINGS:
            raise ValueError(f"rounding of a wire must be one of {WIRE_ROUNDINGS}, got {self.rounding}")


@dataclasses.dataclass(frozen=True)
class WirePrecision:
    """The wire format of the four legs of training; each is a WireFormat or the name of a kind.

    `dispatch_bwd` is the gradient of combine, `combine_bwd` the gradient of dispatch.
    """

    dispatch_fwd: WireFormat | WireKind = "mxfp4"
    combine_fwd: WireFormat | WireKind = "bf16"
    dispatch_bwd: WireFormat | WireKind = "bf16"
    combine_bwd: WireFormat | WireKind = "bf16"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            leg = getattr(self, field.name)
            if isinstance(leg, str):
                object.__setattr__(self, field.name, WireFormat(cast(WireKind, leg)))
            elif not isinstance(leg, WireFormat):
                raise TypeError(f"{field.name} must be a WireFormat or a str, got {type(leg).__name__}")

    def leg(self, op: Literal["dispatch", "combine"], backward: bool) -> WireFormat:
        """Return the wire format of one leg."""
        leg = getattr(self, f"{op}_{'bwd' if backward else 'fwd'}")
        assert isinstance(leg, WireFormat)
        return leg

    @classmethod
    def paper(cls) -> WirePrecision:
        """The recipe of arXiv 2603.02731: MXFP4 forward dispatch, BF16 combine, FP8 backward."""
        return cls("mxfp4", "bf16", "fp8", "fp8")

    @classmethod
    def bf16(cls) -> WirePrecision:
        """BF16 on every leg."""
        return cls("bf16", "bf16", "bf16", "bf16")

    @classmethod
    def fp8(cls) -> WirePrecision:
        """FP8 dispatch and backward legs, BF16 forward combine."""
        return cls("fp8", "bf16", "fp8", "fp8")

    @classmethod
    def aggressive(cls) -> WirePrecision:
        """The paper's forward legs; rotated, stochastically rounded MXFP4 backward (unbiased)."""
        backward = WireFormat("mxfp4", ScaleRule.RCEIL, Rounding.STOCHASTIC, hadamard=True)
        return cls("mxfp4", "bf16", backward, backward)
