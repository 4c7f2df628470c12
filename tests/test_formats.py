"""Scale rules, wire formats and wire precisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest

from qcomm.formats import MAXIMUM_RULES, Rounding, ScaleRule, WireFormat, WireKind, WirePrecision

BUMPS: dict[ScaleRule, Callable[[np.ndarray], np.ndarray]] = {
    ScaleRule.FLOOR: lambda m: m >= 2,
    ScaleRule.EVEN: lambda m: m >= 1.75,
    ScaleRule.NEAR_MSE: lambda m: m >= 1.8125,
    ScaleRule.RCEIL: lambda m: m > 1.5,
    ScaleRule.CEIL: lambda m: m > 1,
}


def _legs(precision: WirePrecision) -> list[WireFormat]:
    return [
        precision.leg("dispatch", backward=False),
        precision.leg("combine", backward=False),
        precision.leg("dispatch", backward=True),
        precision.leg("combine", backward=True),
    ]


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_addend_carries_the_bump_into_the_exponent(rule: ScaleRule) -> None:
    """Every exponent of a normal float32, with every BF16 mantissa and its float32 neighbours."""
    exponent = np.arange(1, 255)[:, None, None]
    mantissa_bits = np.arange(128)[:, None] * 2**16 + np.arange(-3, 4)
    mantissa_bits = mantissa_bits.clip(0, 2**23 - 1)
    bits = exponent << 23 | mantissa_bits
    bump = BUMPS[rule](1 + mantissa_bits / 2**23)
    np.testing.assert_array_equal((bits + rule.addend) >> 23, exponent + bump)


@pytest.mark.parametrize("rule", MAXIMUM_RULES)
def test_addend_keeps_subnormals_at_the_lowest_scale(rule: ScaleRule) -> None:
    bits = np.concatenate([np.arange(0, 2**23, 2**16), np.arange(1, 2**23, 2**16), [2**23 - 1]])
    assert ((bits + rule.addend) >> 23).max() <= 1


@pytest.mark.parametrize(
    ("rule", "threshold", "inclusive"),
    [
        (ScaleRule.EVEN, 1.75, True),
        (ScaleRule.NEAR_MSE, 1.8125, True),
        (ScaleRule.RCEIL, 1.5, False),
        (ScaleRule.CEIL, 1.0, False),
    ],
)
def test_scale_rule_threshold(rule: ScaleRule, threshold: float, inclusive: bool) -> None:
    assert (rule.threshold, rule.inclusive) == (threshold, inclusive)


def test_floor_never_bumps() -> None:
    assert ScaleRule.FLOOR.threshold >= 2.0
    assert ScaleRule.FLOOR.addend == 0


@pytest.mark.parametrize("kind", ["bf16", "fp8", "mxfp4"])
def test_wire_format_defaults(kind: WireKind) -> None:
    wire = WireFormat(kind)
    assert (wire.scale_rule, wire.rounding, wire.hadamard) == (ScaleRule.EVEN, Rounding.NEAREST, False)


def test_wire_format_rejects_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*'mxfp4'.*, got 'int8'"):
        WireFormat("int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("option", [{"hadamard": True}, {"rounding": Rounding.STOCHASTIC}], ids=str)
def test_wire_format_rejects_mxfp4_options_elsewhere(kind: WireKind, option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"need kind 'mxfp4', got '{kind}'"):
        WireFormat(kind, **option)  # type: ignore[arg-type]


def test_descriptors_are_frozen_and_hashable() -> None:
    wire = WireFormat("mxfp4", hadamard=True)
    assert {wire: 1}[WireFormat("mxfp4", hadamard=True)] == 1
    assert hash(WirePrecision("mxfp4")) == hash(WirePrecision(WireFormat("mxfp4")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        wire.hadamard = False  # type: ignore[misc]


def test_wire_precision_turns_names_into_formats() -> None:
    assert WirePrecision("mxfp4") == WirePrecision(WireFormat("mxfp4"))
    assert WirePrecision("fp8").dispatch_fwd == WireFormat("fp8")


def test_wire_precision_rejects_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="got 'fp4'"):
        WirePrecision(combine_bwd="fp4")  # type: ignore[arg-type]


@pytest.mark.parametrize("leg", [f.name for f in dataclasses.fields(WirePrecision)])
def test_wire_precision_names_the_leg_of_a_wrong_type(leg: str) -> None:
    with pytest.raises(TypeError, match=f"{leg} must be a WireFormat or a str, got int"):
        WirePrecision(**{leg: 8})  # type: ignore[arg-type]


def test_leg_picks_each_field() -> None:
    a, b, c, d = (WireFormat("mxfp4", rule) for rule in list(ScaleRule)[:4])
    precision = WirePrecision(dispatch_fwd=a, combine_fwd=b, dispatch_bwd=c, combine_bwd=d)
    assert _legs(precision) == [a, b, c, d]


@pytest.mark.parametrize(
    ("precision", "kinds"),
    [
        (WirePrecision(), ("mxfp4", "bf16", "bf16", "bf16")),
        (WirePrecision.paper(), ("mxfp4", "bf16", "fp8", "fp8")),
        (WirePrecision.bf16(), ("bf16", "bf16", "bf16", "bf16")),
        (WirePrecision.fp8(), ("fp8", "bf16", "fp8", "fp8")),
        (WirePrecision.aggressive(), ("mxfp4", "bf16", "mxfp4", "mxfp4")),
    ],
)
def test_presets(precision: WirePrecision, kinds: tuple[str, ...]) -> None:
    assert tuple(leg.kind for leg in _legs(precision)) == kinds


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_aggressive_backward_is_unbiased(op: Literal["dispatch", "combine"]) -> None:
    """Stochastic, and with a scale rule under which nothing saturates."""
    leg = WirePrecision.aggressive().leg(op, backward=True)
    assert leg == WireFormat("mxfp4", ScaleRule.RCEIL, Rounding.STOCHASTIC, hadamard=True)
