"""The four ways to train an MoE layer that are compared: the wire of each leg, and what is kept for backward."""

from __future__ import annotations

import dataclasses

from qcomm.formats import WirePrecision
from qcomm.moe.experts import Keep


@dataclasses.dataclass(frozen=True)
class Preset:
    """Wires, and what the dispatched rows and SwiGLU's input are kept as; with it, which products run."""

    precision: WirePrecision
    keep: Keep


PRESETS = {
    "bf16": Preset(WirePrecision.bf16(), "bf16"),
    "fp8": Preset(WirePrecision.fp8(), "fp8"),
    "paper": Preset(WirePrecision.paper(), "mxfp4"),
    "aggressive": Preset(WirePrecision.aggressive(), "mxfp4"),
}
