"""SwiGLU's entries of `bench codec`. Its results need not be the oracle's bits but where they are MXFP4.

Bounds, those that `qcomm.ops.swiglu` states: h before its conversion lies within 2^-16 of the oracle's, relatively; an
element of grad_x is the oracle's or a neighbouring BF16; a gradient of a weight lies within 2^-16 of the sum of the
magnitudes that it adds up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from codec_inputs import Case, Entry, Inputs, Name, Tensors, bit_differences, chunks, rows_of

from qcomm import reference, reference_swiglu
from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE
from qcomm.ops import swiglu
from qcomm.reference_columnwise import round_e4m3
from qcomm.tensors import FP8Tensor, MXFP4Tensor

FORWARD, BACKWARD = "swiglu forward", "swiglu backward"
_ERROR = 2.0**-16


def h_differences(where: str, h: torch.Tensor, h_sf: torch.Tensor, exact: torch.Tensor) -> list[str]:
    """Say how many codes and scales no value within the bound of `exact`, `[rows, F]` float32, would give."""
    groups = exact.double().unflatten(1, (-1, FP8_GROUP_SIZE))
    error = _ERROR * groups.abs()
    bounds = [reference.quantize_fp8_groups(groups.abs() + sign * error)[1] for sign in (-1, 1)]
    scale = h_sf.double()[..., None]
    codes = h.float().unflatten(1, (-1, FP8_GROUP_SIZE))
    low, high = (round_e4m3((groups + sign * error) / scale).float() for sign in (-1, 1))
    good = {"h": (low <= codes) & (codes <= high), "h_sf": (h_sf == bounds[0]) | (h_sf == bounds[1])}
    return _wrong(where, good)


def grad_differences(where: str, got: torch.Tensor, want: torch.Tensor) -> list[str]:
    """Say how many BF16 gradients are neither the wanted ones nor their neighbours."""
    distance = _order(got) - _order(want)
    return _wrong(where, {"grad_x": distance.abs() <= 1})


def weight_differences(where: str, got: torch.Tensor, want: torch.Tensor, magnitudes: torch.Tensor) -> list[str]:
    """Say how many gradients of weights lie too far from the wanted ones."""
    distance = (got.double() - want.double()).abs()
    return _wrong(where, {"grad_weights": distance <= _ERROR * magnitudes})


def _order(x: torch.Tensor) -> torch.Tensor:
    """Number BF16 values in their order; both zeros are 0, and a NaN lies past the infinities."""
    bits = x.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _wrong(where: str, good: Tensors) -> list[str]:
    counts = {name: (int((~right).sum()), right.numel()) for name, right in good.items()}
    return [f"{where}: {name} has {bad} wrong entries of {total}" for name, (bad, total) in counts.items() if bad]


def _weights(inputs: Inputs, weighted: bool) -> dict[str, torch.Tensor]:
    return {"weights": inputs.weights} if weighted else {}


def _forward(inputs: Inputs, weighted: bool) -> Case:
    x, (rows, columns) = inputs.bf16, inputs.size
    weights = _weights(inputs, weighted)
    data = torch.empty(rows, columns // 2, dtype=torch.float8_e4m3fn, device=inputs.device)
    h_sf = torch.empty(rows, columns // 2 // FP8_GROUP_SIZE, dtype=torch.float32, device=inputs.device)
    out = MXFP4Tensor(inputs.empty(torch.uint8, 2), inputs.empty(torch.uint8, BLOCK_SIZE))
    saved = {"qdata": out.qdata, "sf": out.sf}

    def differences() -> list[str]:
        found = []
        for part in chunks(rows):
            where = f"rows {part.start} to {part.stop}"
            q = reference.quantize_mxfp4(x[part])
            found += bit_differences(
                where, {name: made[part] for name, made in saved.items()}, {"qdata": q.qdata, "sf": q.sf}
            )
            exact = reference_swiglu.product(x[part], weights["weights"][part] if weighted else None)
            found += h_differences(where, data[part], h_sf[part], exact)
        return found

    return Case(
        functools.partial(swiglu.swiglu_forward, x, weights=weights.get("weights"), out=(FP8Tensor(data, h_sf), out)),
        {"x": x, **weights},
        {"h": data, "h_sf": h_sf, **saved},
        differences,
    )


def _backward(inputs: Inputs, weighted: bool) -> Case:
    saved, (rows, columns) = inputs.mxfp4, inputs.size
    weights = _weights(inputs, weighted)
    grad_h = inputs.values(torch.bfloat16, columns // 2, seed=1)
    grad_x = inputs.empty(torch.bfloat16)
    grad_weights = torch.empty(rows, dtype=torch.float32, device=inputs.device) if weighted else None

    def differences() -> list[str]:
        found = []
        for part in chunks(rows):
            where, x = f"rows {part.start} to {part.stop}", rows_of(saved, part)
            of_rows = weights["weights"][part] if weighted else None
            want, want_weights = reference_swiglu.swiglu_backward(grad_h[part], x, of_rows)
            found += grad_differences(where, grad_x[part], want)
            if grad_weights is not None and want_weights is not None:
                terms = grad_h[part].double() * reference_swiglu.product(reference.dequantize_mxfp4(x))
                found += weight_differences(where, grad_weights[part], want_weights, terms.abs().sum(-1))
        return found

    outputs = {"grad_x": grad_x} if grad_weights is None else {"grad_x": grad_x, "grad_weights": grad_weights}
    return Case(
        functools.partial(
            swiglu.swiglu_backward, grad_h, saved, weights=weights.get("weights"), out=(grad_x, grad_weights)
        ),
        {"grad_h": grad_h, "qdata": saved.qdata, "sf": saved.sf, **weights},
        outputs,
        differences,
    )


def _entry(kernel: str, make: Callable[[Inputs, bool], Case], weighted: bool) -> Entry:
    name = Name(kernel, "weights") if weighted else Name(kernel)
    return Entry(name, lambda inputs: make(inputs, weighted))


ENTRIES = tuple(
    _entry(kernel, make, weighted)
    for kernel, make in ((FORWARD, _forward), (BACKWARD, _backward))
    for weighted in (False, True)
)
