"""Which grouped products an MoE layer takes on this device, and what each that runs takes in time.

PRODUCTS. Operands are random, groups those of the layer's own dispatch, padding included. `mm` is gate and up of the
rows (`w1`), `wgrad` the gradient of w1; FP8 operands are made before the clock starts. TFLOP/s count the padded rows. A
backend that multiplies FP8 operands in BF16 decodes them within its time, as it does in the layer. Each result is
checked when it is tried (`qcomm.moe.products.probe`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import harness
import torch

from qcomm.moe import products
from qcomm.moe.quantize import quantize_rows, quantize_weights
from qcomm.ops.fp8_transpose import fp8_transpose

_KINDS: tuple[products.Product, ...] = ("mm", "wgrad")


@dataclasses.dataclass(frozen=True)
class Timed:
    """One product by one backend; `taken` where the layer takes it."""

    product: str
    operands: str
    backend: str
    taken: bool
    timing: harness.Timing
    tflops: float


def in_use(device: torch.device) -> dict[str, str]:
    """Return what the layer takes for each product and kind of operands."""
    found: dict[str, str] = {}
    for product in _KINDS:
        for fp8 in (False, True):
            found[f"{product} {'fp8' if fp8 else 'bf16'}"] = products.choose(
                product, fp8, device.type, _running(product, device)
            )
    return found


def absent(device: torch.device) -> dict[str, str]:
    """Return why those that the layer would prefer do not run here."""
    if device.type != "cuda":
        return {}
    return {f"{product} {name}": why for product in _KINDS for name, why in products.probe(product, device).items()}


def time(clock: harness.Clock, groups: products.Groups, w: torch.Tensor) -> list[Timed]:
    """Time every backend that runs on these rows and weights `[experts, N, K]`. Collective."""
    rows, (_, height, width) = groups.host()[-1], w.shape
    generator = torch.Generator(w.device).manual_seed(0)
    x, d_y = (
        torch.randn(rows, size, generator=generator, device=w.device, dtype=torch.bfloat16) for size in (width, height)
    )
    taken, shape = in_use(w.device), tuple(w.shape)
    timed = []
    for fp8 in (False, True):
        operands = "fp8" if fp8 else "bf16"
        calls: dict[products.Product, tuple[dict[products.Backend, Callable[..., Any]], tuple[Any, ...]]] = {
            "mm": (products._MM, (*((quantize_rows(x), quantize_weights(w)) if fp8 else (x, w)), groups)),
            "wgrad": (products._WGRAD, (*(_columns(each, groups, fp8) for each in (d_y, x)), groups, shape)),
        }
        for product, (table, arguments) in calls.items():
            names = [*(products.FP8_BACKENDS if fp8 else ()), *products.BF16_BACKENDS]
            running = _running(product, w.device)
            for name in names if w.is_cuda else ["reference"]:
                if name in running:
                    timing = clock.time(lambda call=table[name], given=arguments: call(*given))  # type: ignore[misc]
                    tflops = 2 * rows * height * width / timing.p50_us / 1e6
                    timed.append(Timed(product, operands, name, name == taken[f"{product} {operands}"], timing, tflops))
    return timed


def _columns(rows: torch.Tensor, groups: products.Groups, fp8: bool) -> products.Columns:
    return fp8_transpose(quantize_rows(rows), groups.argument()) if fp8 else rows


def _running(product: products.Product, device: torch.device) -> set[products.Backend]:
    if device.type != "cuda":
        return {"reference"}
    missing = products.probe(product, device)
    return {name for name in (*products.FP8_BACKENDS, *products.BF16_BACKENDS) if name not in missing}
