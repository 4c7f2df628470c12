"""mxfp4_to_fp8 against the oracle, bit for bit, on the CPU and on a GPU."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from codec_cases import (
    DEVICES,
    FORMS,
    POISON,
    REARRANGEMENTS,
    Outputs,
    assert_same_bits,
    big_rows,
    gpu_only,
    misaligned,
    moved,
    slices_of,
    spread_out,
    transposed,
    wild_mxfp4,
)
from codec_truth import FEW
from hypothesis import given
from hypothesis import strategies as st

from qcomm import FP8Tensor, MXFP4Tensor, ScaleLayout, mxfp4_to_fp8, reference
from qcomm.tensors import empty_scales, pack_scales

pytestmark = pytest.mark.filterwarnings("error")

SHAPES = [(0, 256), (1, 128), (3, 640), (127, 128), (129, 384), (1000, 384), (33, 2048), (5, 7168)]


def _check(
    x: MXFP4Tensor, layout: ScaleLayout = ScaleLayout.ROW_MAJOR, oracle: str = "cpu", start: int = 5
) -> tuple[FP8Tensor, int]:
    """Compare on the device of x; also returns how many overflows were added to `start`."""
    outputs = Outputs(x.device)
    rows, columns = x.shape
    out = outputs.fp8(rows, columns, layout)
    counter = torch.tensor([start], device=x.device)
    result = mxfp4_to_fp8(x, sf_layout=layout, spread_overflows=counter, out=out)
    expected, overflows = reference.mxfp4_to_fp8(x if oracle == "same" else moved(x, "cpu"))
    assert (result.data.data_ptr(), result.sf.data_ptr()) == (out.data.data_ptr(), out.sf.data_ptr())
    assert result.sf.stride() == out.sf.stride()
    packed = layout is ScaleLayout.PACKED_UE8M0
    assert_same_bits(result.sf, pack_scales(expected.sf) if packed else expected.sf, "sf")
    assert_same_bits(result.data, expected.data, "data")
    outputs.check()
    assert counter.item() == start + overflows.item()
    return result, int(overflows)


def every_pair_of_scales(device: str, step: int = 1) -> MXFP4Tensor:
    """Rows `[65536, 128]` with all codes under each pair of scale bytes, beside zero blocks under any byte.

    The pair's places go round; step takes every step-th row.
    """
    pair = torch.arange(0, 65536, step, device=device)
    blocks = torch.stack((pair >> 8, pair & 255, pair * 7 % 256, pair * 13 % 256), dim=-1)
    codes = torch.arange(16, device=device, dtype=torch.uint8)
    qdata = (codes | codes.flip(0) << 4).expand(len(pair), 4, 16).clone()
    qdata[:, 2:] &= 0x88
    order = (torch.arange(4, device=device) + pair[:, None]) % 4
    qdata = qdata.gather(1, order[..., None].expand_as(qdata))
    return MXFP4Tensor(qdata.flatten(1), blocks.gather(1, order).to(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_every_code_under_every_pair_of_scales(device: str) -> None:
    """With one large block and one small one, distances 15 to 254 overflow, in either order."""
    step = 1 if device == "cuda" else 37
    x = every_pair_of_scales(device, step)
    _, overflows = _check(x, oracle="same")
    a, b = torch.arange(0, 65536, step) >> 8, torch.arange(0, 65536, step) & 255
    top = torch.maximum(a, b).clamp(min=7)
    counts = (a != 255) & (b != 255)
    assert overflows == ((top - torch.minimum(a, b) > 14) & counts).sum()


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_random_blocks(device: str, form: str, layout: ScaleLayout) -> None:
    _, overflows = _check(moved(wild_mxfp4(203, 896, 0, form), device), layout)
    assert (overflows > 0) == (form == "plain")


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_shape(device: str, rows: int, columns: int, layout: ScaleLayout) -> None:
    _check(moved(wild_mxfp4(rows, columns, 1), device), layout)


@gpu_only
@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("form", ["plain", "signs"])
def test_large_rows(form: str, layout: ScaleLayout) -> None:
    _check(moved(wild_mxfp4(4096, 7168, 2, form), "cuda"), layout, oracle="same")


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("device", DEVICES)
def test_allocates_the_storage_asked_for(device: str, layout: ScaleLayout) -> None:
    x = moved(wild_mxfp4(9, 640, 3), device)
    result = mxfp4_to_fp8(x, sf_layout=layout)
    sf = empty_scales(9, 5, layout, device)
    assert (result.sf.shape, result.sf.dtype, result.sf.stride()) == (sf.shape, sf.dtype, sf.stride())
    expected, _ = _check(x, layout)
    assert_same_bits(result.sf, expected.sf, "sf")
    assert_same_bits(result.data, expected.data, "data")


@pytest.mark.parametrize("device", DEVICES)
def test_overflows_accumulate(device: str) -> None:
    """Over calls and past 32 bits; a tensor without any adds nothing."""
    x = moved(wild_mxfp4(50, 256, 4), device)
    _, overflows = _check(x, start=2**40)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(3):
        mxfp4_to_fp8(x, spread_overflows=counter)
        mxfp4_to_fp8(MXFP4Tensor(x.qdata, torch.full_like(x.sf, 99)), spread_overflows=counter)
    assert counter.item() == 3 * overflows > 0


@pytest.mark.parametrize("sf", [0, 6, 7, 200, 255])
@pytest.mark.parametrize("device", DEVICES)
def test_groups_of_zeros_and_of_nan(device: str, sf: int) -> None:
    """Zeros keep their signs under 2^-126; scale byte 255 is NaN whatever the codes."""
    qdata = torch.tensor([0x80, 0x08, 0x00, 0x88], dtype=torch.uint8).repeat(2, 32)
    qdata[1] |= 0x35
    x = MXFP4Tensor(qdata, torch.full((2, 8), sf, dtype=torch.uint8))
    result, _ = _check(moved(x, device))
    assert (result.sf[0] == 2.0**-126).all()
    if sf == 255:
        assert (result.data.view(torch.uint8) == 0x7F).all()


@pytest.mark.parametrize("name", REARRANGEMENTS)
@pytest.mark.parametrize("form", ["plain", "signs"])
@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_any_strides(device: str, form: str, name: str) -> None:
    x = moved(wild_mxfp4(37, 256, 5, form), device)
    rearrange = REARRANGEMENTS[name]
    for parts in (("qdata",), ("sf",), ("qdata", "sf")):
        changed: dict[str, Any] = {part: rearrange(getattr(x, part)) for part in parts}
        _check(dataclasses.replace(x, **changed))


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data())
@FEW
def test_any_shape(device: str, data: st.DataObject) -> None:
    rows, groups = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 9))
    form = data.draw(st.sampled_from(sorted(FORMS)))
    x = moved(wild_mxfp4(rows, 128 * groups, data.draw(st.integers(0, 99)), form), device)
    start = data.draw(st.integers(0, max(rows - 1, 0)))
    part = dataclasses.replace(x, qdata=x.qdata[start:], sf=x.sf[start:])
    _check(part, data.draw(st.sampled_from(list(ScaleLayout))))


X = wild_mxfp4(2, 256, 6)


@pytest.mark.parametrize(
    ("x", "options", "kind", "message"),
    [
        (torch.zeros(2, 128), {}, TypeError, "x must be a MXFP4Tensor, got Tensor"),
        (X, {"sf_layout": "packed"}, TypeError, "sf_layout must be a ScaleLayout, got str"),
        (wild_mxfp4(2, 96, 6), {}, ValueError, "x.shape must be (rows, a multiple of 128), got (2, 96)"),
        (
            MXFP4Tensor(X.qdata[None], X.sf[None]),
            {},
            ValueError,
            "x.shape must be (rows, a multiple of 128), got (1, 2, 256)",
        ),
        (
            MXFP4Tensor(X.qdata[0], X.sf[0]),
            {},
            ValueError,
            "x.shape must be (rows, a multiple of 128), got (256,)",
        ),
        (X, {"spread_overflows": 0}, TypeError, "spread_overflows must be a torch.Tensor, got int"),
        (
            X,
            {"spread_overflows": torch.zeros(1)},
            TypeError,
            "spread_overflows must be torch.int64, got torch.float32",
        ),
        (
            X,
            {"spread_overflows": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            "spread_overflows.shape must be (1), got (2,)",
        ),
        (
            X,
            {"spread_overflows": torch.zeros(1, dtype=torch.int64, device="meta")},
            ValueError,
            "spread_overflows must be on cpu, got meta",
        ),
    ],
)
def test_argument_errors(x: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        mxfp4_to_fp8(x, **options)


def _fp8(rows: int, columns: int, layout: ScaleLayout, device: str = "cpu") -> FP8Tensor:
    data = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    return FP8Tensor(data, empty_scales(rows, columns // 128, layout, device))


@pytest.mark.parametrize(
    ("out", "layout", "kind", "message"),
    [
        (
            _fp8(3, 256, ScaleLayout.ROW_MAJOR),
            ScaleLayout.ROW_MAJOR,
            ValueError,
            "out.data.shape must be (2, 256), got (3, 256)",
        ),
        (
            _fp8(2, 128, ScaleLayout.ROW_MAJOR),
            ScaleLayout.ROW_MAJOR,
            ValueError,
            "out.data.shape must be (2, 256), got (2, 128)",
        ),
        (
            _fp8(2, 256, ScaleLayout.PACKED_UE8M0),
            ScaleLayout.ROW_MAJOR,
            TypeError,
            "out.sf must be torch.float32, got torch.int32",
        ),
        (
            _fp8(2, 256, ScaleLayout.ROW_MAJOR),
            ScaleLayout.PACKED_UE8M0,
            TypeError,
            "out.sf must be torch.int32, got torch.float32",
        ),
        (
            _fp8(2, 256, ScaleLayout.COLUMN_MAJOR),
            ScaleLayout.ROW_MAJOR,
            ValueError,
            "out.sf must be stored row_major, got strides (1, 4)",
        ),
        (
            _fp8(2, 256, ScaleLayout.ROW_MAJOR),
            ScaleLayout.COLUMN_MAJOR,
            ValueError,
            "out.sf must be stored column_major, got strides (2, 1)",
        ),
        (
            _fp8(2, 256, ScaleLayout.ROW_MAJOR, "meta"),
            ScaleLayout.ROW_MAJOR,
            ValueError,
            "out.data must be on cpu, got meta",
        ),
    ],
)
def test_out_that_does_not_fit(out: FP8Tensor, layout: ScaleLayout, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        mxfp4_to_fp8(X, sf_layout=layout, out=out)


@gpu_only
@pytest.mark.parametrize("rearrange", [misaligned, spread_out, transposed])
def test_out_that_a_kernel_cannot_write(rearrange: Any) -> None:
    x = moved(wild_mxfp4(64, 256, 7), "cuda")
    good = Outputs("cuda").fp8(64, 256, ScaleLayout.ROW_MAJOR)
    data = rearrange(good.data.view(torch.uint8)).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"out\.data must be contiguous and on a 16-byte boundary, got strides"):
        mxfp4_to_fp8(x, out=FP8Tensor(data, good.sf))
    assert (good.sf.view(torch.uint8) == POISON).all()


@gpu_only
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    columns = 7168
    rows = big_rows(columns)
    qdata = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    sf = torch.randint(100, 140, (rows, columns // 32), dtype=torch.uint8, device="cuda")
    out = FP8Tensor(
        torch.full((rows, columns), POISON, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn),
        empty_scales(rows, columns // 128, ScaleLayout.COLUMN_MAJOR, "cuda"),
    )
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    mxfp4_to_fp8(MXFP4Tensor(qdata, sf), sf_layout=ScaleLayout.COLUMN_MAJOR, spread_overflows=counter, out=out)
    for part in slices_of(rows, 64):
        expected, _ = reference.mxfp4_to_fp8(MXFP4Tensor(qdata[part], sf[part]))
        assert_same_bits(out.data[part], expected.data, f"data of {part}")
        assert_same_bits(out.sf[part], expected.sf, f"sf of {part}")
    # No block of random codes is all zero.
    top = sf.view(rows, -1, 4).amax(-1, keepdim=True)
    assert counter.item() == (top - sf.view(rows, -1, 4) > 14).sum().item()
