"""What `bench codec` measures: every kernel of the codec with its inputs, its outputs and what they must hold."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import codec_swiglu
import torch
from codec_inputs import NUM_GROUPS, Case, Entry, Inputs, Name, Tensors, bit_differences, by_rows, rows_of

import qcomm
from qcomm import reference, reference_columnwise
from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE, Rounding, ScaleLayout, ScaleRule
from qcomm.tensors import FP8ColumnwiseTensor, FP8Tensor, MXFP4Tensor, empty_scales, pack_scales

ROW_MULTIPLE, COLUMN_MULTIPLE = FP8_GROUP_SIZE, 2 * FP8_GROUP_SIZE
"""What rows and columns of a size are multiples of: tiles; and whole FP8 groups in either half of SwiGLU's input."""


def _by_groups(
    inputs: Inputs, out: FP8ColumnwiseTensor, expect: Callable[[slice], tuple[torch.Tensor, torch.Tensor]]
) -> Callable[[], list[str]]:
    columns = inputs.size.columns

    def differences() -> list[str]:
        found = []
        for a, b in itertools.pairwise(inputs.offsets):
            if a == b:
                continue
            got = {"data": out.data[a * columns : b * columns], "sf": out.sf[a // FP8_GROUP_SIZE : b // FP8_GROUP_SIZE]}
            data, sf = expect(slice(a, b))
            found += bit_differences(f"group of rows {a} to {b}", got, {"data": data, "sf": sf})
        return found

    return differences


def _quantize(
    name: Name,
    take: Callable[[Inputs], torch.Tensor | FP8Tensor],
    scale_rule: ScaleRule = ScaleRule.EVEN,
    rounding: Rounding = Rounding.NEAREST,
    hadamard: bool = False,
) -> Entry:
    def make(inputs: Inputs) -> Case:
        x = take(inputs)
        out = MXFP4Tensor(inputs.empty(torch.uint8, 2), inputs.empty(torch.uint8, BLOCK_SIZE))
        outputs = {"qdata": out.qdata, "sf": out.sf}

        def expect(rows: slice) -> Tensors:
            part = FP8Tensor(x.data[rows], x.sf[rows]) if isinstance(x, FP8Tensor) else x[rows]
            numbers = torch.arange(rows.start, rows.stop, device=inputs.device)
            q = reference.quantize_mxfp4(part, scale_rule, rounding, seed=inputs.seed, rows=numbers, hadamard=hadamard)
            return {"qdata": q.qdata, "sf": q.sf}

        options = {"scale_rule": scale_rule, "rounding": rounding, "hadamard": hadamard, "seed": inputs.seed}
        return Case(
            functools.partial(qcomm.quantize_mxfp4, x, out=out, **options),
            {"data": x.data, "sf": x.sf} if isinstance(x, FP8Tensor) else {"x": x},
            outputs,
            by_rows(inputs.size.rows, outputs, expect),
        )

    return Entry(name, make)


def _dequantize(name: Name, dtype: torch.dtype) -> Entry:
    def make(inputs: Inputs) -> Case:
        x, out = inputs.mxfp4, inputs.empty(dtype)
        return Case(
            functools.partial(qcomm.dequantize, x, dtype, out=out),
            {"qdata": x.qdata, "sf": x.sf},
            {"out": out},
            by_rows(
                inputs.size.rows,
                {"out": out},
                lambda rows: {"out": reference.dequantize_mxfp4(rows_of(x, rows), dtype)},
            ),
        )

    return Entry(name, make)


def _to_fp8(name: Name, layout: ScaleLayout) -> Entry:
    packed = layout is ScaleLayout.PACKED_UE8M0

    def make(inputs: Inputs) -> Case:
        x, (rows, columns) = inputs.mxfp4, inputs.size
        sf = empty_scales(rows, columns // FP8_GROUP_SIZE, layout, inputs.device)
        out = FP8Tensor(inputs.empty(torch.float8_e4m3fn), sf)
        outputs = {"data": out.data, "sf": out.sf}

        def expect(part: slice) -> Tensors:
            fp8, _ = reference.mxfp4_to_fp8(rows_of(x, part))
            return {"data": fp8.data, "sf": pack_scales(fp8.sf) if packed else fp8.sf}

        return Case(
            functools.partial(qcomm.mxfp4_to_fp8, x, sf_layout=layout, out=out),
            {"qdata": x.qdata, "sf": x.sf},
            outputs,
            by_rows(rows, outputs, expect),
        )

    return Entry(name, make)


def _empty_columnwise(inputs: Inputs) -> FP8ColumnwiseTensor:
    rows, columns = inputs.size
    data = torch.empty(rows * columns, dtype=torch.float8_e4m3fn, device=inputs.device)
    sf = torch.empty(rows // FP8_GROUP_SIZE, columns, dtype=torch.float32, device=inputs.device)
    return FP8ColumnwiseTensor(data, sf, inputs.group_offsets)


def _columnwise(inputs: Inputs) -> Case:
    x, out = inputs.mxfp4, _empty_columnwise(inputs)

    def expect(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        data, sf, _ = reference_columnwise.mxfp4_to_fp8_columnwise(rows_of(x, rows), [0, rows.stop - rows.start])
        return data, sf

    return Case(
        functools.partial(qcomm.mxfp4_to_fp8_columnwise, x, inputs.group_offsets, out=out),
        {"qdata": x.qdata, "sf": x.sf, "group_offsets": inputs.group_offsets},
        {"data": out.data, "sf": out.sf},
        _by_groups(inputs, out, expect),
    )


def _transpose(inputs: Inputs) -> Case:
    x, out = inputs.fp8, _empty_columnwise(inputs)

    def expect(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return reference_columnwise.fp8_transpose(FP8Tensor(x.data[rows], x.sf[rows]), [0, rows.stop - rows.start])

    return Case(
        functools.partial(qcomm.fp8_transpose, x, inputs.group_offsets, out=out),
        {"data": x.data, "sf": x.sf, "group_offsets": inputs.group_offsets},
        {"data": out.data, "sf": out.sf},
        _by_groups(inputs, out, expect),
    )


QUANTIZE, DEQUANTIZE, TO_FP8 = Name("bf16 to mxfp4"), Name("mxfp4 to bf16"), Name("mxfp4 to fp8", "row-major scales")
COLUMNWISE = Name("mxfp4 to fp8 column-wise", f"{NUM_GROUPS} groups")

ENTRIES = (
    _quantize(QUANTIZE, lambda inputs: inputs.bf16),
    _quantize(Name("bf16 to mxfp4", "hadamard"), lambda inputs: inputs.bf16, hadamard=True),
    _quantize(
        Name("bf16 to mxfp4", "stochastic"),
        lambda inputs: inputs.bf16,
        ScaleRule.RCEIL,
        Rounding.STOCHASTIC,
    ),
    _quantize(
        Name("bf16 to mxfp4", "quest, hadamard"),
        lambda inputs: inputs.bf16,
        ScaleRule.QUEST,
        hadamard=True,
    ),
    _quantize(Name("fp16 to mxfp4"), lambda inputs: inputs.values(torch.float16)),
    _quantize(Name("fp32 to mxfp4"), lambda inputs: inputs.values(torch.float32)),
    _quantize(Name("fp8 to mxfp4", "power-of-two scales"), lambda inputs: inputs.fp8),
    _quantize(Name("fp8 to mxfp4", "float32 scales"), lambda inputs: inputs.fp8_any_scale),
    _dequantize(DEQUANTIZE, torch.bfloat16),
    _dequantize(Name("mxfp4 to fp32"), torch.float32),
    _to_fp8(TO_FP8, ScaleLayout.ROW_MAJOR),
    _to_fp8(Name("mxfp4 to fp8", "column-major scales"), ScaleLayout.COLUMN_MAJOR),
    _to_fp8(Name("mxfp4 to fp8", "packed scales"), ScaleLayout.PACKED_UE8M0),
    Entry(COLUMNWISE, _columnwise),
    Entry(Name("fp8 transpose", f"{NUM_GROUPS} groups"), _transpose),
    *codec_swiglu.ENTRIES,
)
"""In the order of the report."""
