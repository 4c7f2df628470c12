"""Every kernel that can be launched, as the launchers specialise it.

For whoever needs all of them at once: the tests, which compile each on machines without a GPU and look at the
registers and shared memory it takes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping

import torch

from qcomm.formats import (
    BLOCK_SIZE,
    FP8_GROUP_SIZE,
    RECV_DTYPES,
    WIRE_KINDS,
    WIRE_ROUNDINGS,
    Rounding,
    ScaleLayout,
    ScaleRule,
    WireFormat,
)
from qcomm.jit import KernelSpec
from qcomm.ops.combine import combine_spec
from qcomm.ops.comm import barrier_spec, decoding, encoding
from qcomm.ops.count import count_spec
from qcomm.ops.dequantize import DTYPES, dequantize_spec
from qcomm.ops.dispatch import columnwise_spec, recv_spec, send_spec, stays_in_bits
from qcomm.ops.dispatch_decode import dispatch_decode_spec
from qcomm.ops.fp8_transpose import fp8_transpose_spec
from qcomm.ops.mxfp4_to_fp8 import mxfp4_to_fp8_spec
from qcomm.ops.mxfp4_to_fp8_columnwise import mxfp4_to_fp8_columnwise_spec
from qcomm.ops.peer_store import peer_store_spec
from qcomm.ops.quantize_mxfp4 import SOURCES, quantize_mxfp4_spec
from qcomm.ops.route import route_spec
from qcomm.reference import check_quantizer
from qcomm.tuning import Op, Tuning


def all_specs(hidden: int, num_topk: int, tunings: Mapping[Op, Tuning]) -> list[KernelSpec]:
    """Return every specialisation for tokens of `hidden` elements and `num_topk` experts, each once."""
    to_dispatch, to_combine = tunings["dispatch"], tunings["combine"]
    specs = [
        barrier_spec(),
        peer_store_spec(),
        *(route_spec(num_topk, index_bytes) for index_bytes in (4, 8)),
        count_spec(num_topk),
    ]
    for wire in _wires():
        specs += (send_spec(kind, encoding(wire, kind), hidden, num_topk, to_dispatch) for kind in _inputs(wire))
        specs += (
            recv_spec(dtype, decoding(wire), hidden, num_topk, places)
            for dtype in RECV_DTYPES
            for places in (False, True)
        )
        specs.append(columnwise_spec(decoding(wire), hidden, num_topk))
        specs += (
            dispatch_decode_spec(kind, dtype, encoding(wire, kind), hidden, num_topk, index_bytes, to_dispatch)
            for kind in _inputs(wire)
            for dtype in RECV_DTYPES
            if stays_in_bits(dtype, wire)
            for index_bytes in (4, 8)
        )
        specs.append(combine_spec("combine_send", encoding(wire, "bf16"), hidden, num_topk, to_combine))
        specs.append(combine_spec("combine_recv", decoding(wire), hidden, num_topk, to_combine))
        specs.append(combine_spec("combine_decode", encoding(wire, "bf16"), hidden, num_topk, to_combine))
    return list(dict.fromkeys(specs))


def codec_specs() -> list[KernelSpec]:
    """Return every specialisation of the codec's kernels, each once."""
    alignments = BLOCK_SIZE, FP8_GROUP_SIZE
    specs = [fp8_transpose_spec(alignment) for alignment in alignments]
    for source in SOURCES:
        for rule, rounding, hadamard in _quantizers():
            options = itertools.product(
                (False, True) if hadamard else (False,),
                (False, True),
                (False, True) if source == torch.float8_e4m3fn else (False,),
            )
            specs += (
                quantize_mxfp4_spec(
                    source, rule, rounding, hadamard=hadamard, signs=signs, clip_mask=clip_mask, flat_scales=flat
                )
                for signs, clip_mask, flat in options
            )
    for hadamard, prescaled in itertools.product((False, True), repeat=2):
        specs += (dequantize_spec(dtype, hadamard, prescaled) for dtype in DTYPES)
        specs += (mxfp4_to_fp8_spec(layout, hadamard, prescaled) for layout in ScaleLayout)
        specs += (mxfp4_to_fp8_columnwise_spec(alignment, hadamard, prescaled) for alignment in alignments)
    return list(dict.fromkeys(specs))


def _quantizers() -> Iterator[tuple[ScaleRule, Rounding, bool]]:
    """Yield every rule, rounding and rotation that go together."""
    for rule, rounding, hadamard in itertools.product(ScaleRule, Rounding, (False, True)):
        with contextlib.suppress(ValueError):
            check_quantizer(rule, rounding, hadamard)
            yield rule, rounding, hadamard


def _wires() -> Iterator[WireFormat]:
    """Yield every wire format but for the scale rule, which is a parameter of the kernels."""
    for kind in WIRE_KINDS:
        for rounding, hadamard in itertools.product(WIRE_ROUNDINGS, (False, True)):
            if kind == "mxfp4" or (rounding is Rounding.NEAREST and not hadamard):
                yield WireFormat(kind, rounding=rounding, hadamard=hadamard)


def _inputs(wire: WireFormat) -> tuple[str, ...]:
    """Return the kinds of token that a wire carries: those at least as wide as it."""
    return WIRE_KINDS[: 1 + WIRE_KINDS.index(wire.kind)]
