"""dequantize against the oracle, bit for bit, on the CPU and on a GPU."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from codec_cases import (
    DEVICES,
    FORMS,
    REARRANGEMENTS,
    Outputs,
    assert_same_bits,
    big_rows,
    gpu_only,
    misaligned,
    moved,
    poison,
    slices_of,
    spread_out,
    transposed,
    wild_mxfp4,
)
from codec_truth import FEW, strided
from hypothesis import given
from hypothesis import strategies as st

from qcomm import MXFP4Tensor, dequantize, quantize_mxfp4, reference

pytestmark = pytest.mark.filterwarnings("error")

DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(0, 128), (1, 32), (3, 64), (127, 128), (129, 160), (1000, 384), (33, 2048), (5, 7168)]


def _check(x: MXFP4Tensor, dtype: torch.dtype, oracle: str = "cpu") -> torch.Tensor:
    """Compare on the device of x; "same" lets the oracle run there too, for large inputs."""
    outputs = Outputs(x.device)
    out = outputs.empty(tuple(x.shape), dtype)
    result = dequantize(x, dtype, out=out)
    assert result is out
    assert_same_bits(result, reference.dequantize_mxfp4(x if oracle == "same" else moved(x, "cpu"), dtype), "values")
    outputs.check()
    return result


def _every_code_and_scale(form: str) -> MXFP4Tensor:
    """Each of the 256 data bytes beside each of the 256 scale bytes."""
    qdata = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(256, 1)
    sf = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None].repeat(1, 16)
    return MXFP4Tensor(qdata, sf, **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_code_under_every_scale(device: str, dtype: torch.dtype, form: str) -> None:
    out = _check(moved(_every_code_and_scale(form), device), dtype)
    assert out[255].isnan().all()
    assert not out[:250].isnan().any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_random_blocks(device: str, dtype: torch.dtype, form: str) -> None:
    rows = 4096 if device == "cuda" else 200
    _check(moved(wild_mxfp4(rows, 1024, 0, form), device), dtype, oracle="same")


@pytest.mark.parametrize("form", ["plain", "signs, prescaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_shape(device: str, rows: int, columns: int, dtype: torch.dtype, form: str) -> None:
    _check(moved(wild_mxfp4(rows, columns, 1, form), device), dtype)


@gpu_only
@pytest.mark.parametrize("form", ["plain", "signs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_rows(dtype: torch.dtype, form: str) -> None:
    _check(moved(wild_mxfp4(1000, 7168, 2, form), "cuda"), dtype, oracle="same")


@pytest.mark.parametrize("lead", [(), (1,), (4, 3), (2, 0, 5), (2, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions(device: str, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, 96, generator=torch.Generator().manual_seed(3)).to(device)
    q = quantize_mxfp4(x)
    assert _check(q, torch.bfloat16).shape == x.shape
    assert_same_bits(dequantize(q), dequantize(q, torch.bfloat16), "values of the default dtype")


@pytest.mark.parametrize("name", REARRANGEMENTS)
@pytest.mark.parametrize("form", ["plain", "signs"])
@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_any_strides(device: str, form: str, name: str) -> None:
    x = moved(wild_mxfp4(37, 256, 4, form), device)
    rearrange = REARRANGEMENTS[name]
    for parts in (("qdata",), ("sf",), ("qdata", "sf")):
        changed: dict[str, Any] = {part: rearrange(getattr(x, part)) for part in parts}
        _check(dataclasses.replace(x, **changed), torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_larger_tensor(device: str) -> None:
    x = moved(wild_mxfp4(64, 160, 5), device)
    for rows in (slice(1, 64), slice(3, 4), slice(5, 60, 3), slice(7, 7)):
        _check(MXFP4Tensor(x.qdata[rows], x.sf[rows]), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data())
@FEW
def test_any_shape_and_strides(device: str, data: st.DataObject) -> None:
    q = quantize_mxfp4(data.draw(strided(32)).to(device))
    form = FORMS[data.draw(st.sampled_from(sorted(FORMS)))]
    arrange = data.draw(st.sampled_from([misaligned, spread_out]))
    _check(MXFP4Tensor(arrange(q.qdata), arrange(q.sf), **form), data.draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (torch.zeros(2, 32), torch.bfloat16, "x must be a MXFP4Tensor, got Tensor"),
        (wild_mxfp4(2, 32, 6), torch.float16, r"dtype must be torch\.bfloat16 or torch\.float32, got torch\.float16"),
        (wild_mxfp4(2, 32, 6), "bfloat16", r"dtype must be torch\.bfloat16 or torch\.float32, got bfloat16"),
    ],
)
def test_argument_errors(x: Any, dtype: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        dequantize(x, dtype)


@pytest.mark.parametrize(
    ("out", "kind", "message"),
    [
        (torch.zeros(2, 64), TypeError, "out must be torch.bfloat16, got torch.float32"),
        (torch.zeros(3, 64).bfloat16(), ValueError, "out.shape must be (2, 64), got (3, 64)"),
        (torch.zeros(2, 32).bfloat16(), ValueError, "out.shape must be (2, 64), got (2, 32)"),
        (torch.zeros(2, 64, device="meta").bfloat16(), ValueError, "out must be on cpu, got meta"),
    ],
)
def test_out_that_does_not_fit(out: torch.Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        dequantize(wild_mxfp4(2, 64, 7), out=out)


@gpu_only
@pytest.mark.parametrize("rearrange", [misaligned, spread_out, transposed])
def test_out_that_a_kernel_cannot_write(rearrange: Any) -> None:
    x = moved(wild_mxfp4(64, 256, 8), "cuda")
    out = rearrange(torch.full((64, 256), torch.nan, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(ValueError, match="out must be contiguous and on a 16-byte boundary, got strides"):
        dequantize(x, out=out)
    assert out.isnan().all()


@gpu_only
@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "signs, prescaled"])
def test_more_than_2_to_the_31_elements(form: str) -> None:
    columns = 7168
    rows = big_rows(columns)
    qdata = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    sf = torch.randint(0, 256, (rows, columns // 32), dtype=torch.uint8, device="cuda")
    x = MXFP4Tensor(qdata, sf, **FORMS[form])
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
    poison(out)
    dequantize(x, out=out)
    for part in slices_of(rows, 64):
        expected = reference.dequantize_mxfp4(dataclasses.replace(x, qdata=qdata[part], sf=sf[part]), torch.bfloat16)
        assert_same_bits(out[part], expected, f"values of {part}")
