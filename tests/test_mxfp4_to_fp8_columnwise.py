"""mxfp4_to_fp8_columnwise against the oracle, bit for bit, on the CPU and on a GPU."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from codec_cases import (
    DEVICES,
    FORMS,
    GROUPS,
    POISON,
    REARRANGEMENTS,
    Outputs,
    assert_same_bits,
    assert_same_columnwise,
    big_rows,
    columnwise_tiles,
    given_offsets,
    gpu_only,
    group_offsets,
    misaligned,
    moved,
    spread_out,
    wild_mxfp4,
)
from codec_truth import FEW
from hypothesis import given
from hypothesis import strategies as st

from qcomm import FP8ColumnwiseTensor, MXFP4Tensor, mxfp4_to_fp8_columnwise, reference_columnwise

pytestmark = pytest.mark.filterwarnings("error")


def _check(
    x: MXFP4Tensor, offsets: list[int], alignment: int = 32, as_tensor: bool = False, oracle: str = "cpu"
) -> int:
    """Compare on the device of x; returns how many overflows were counted."""
    outputs = Outputs(x.device)
    held, tiles = columnwise_tiles(x.shape[0], offsets, alignment, as_tensor)
    out = outputs.columnwise(held, tiles, x.shape[1])
    counter = torch.tensor([7], device=x.device)
    groups = given_offsets(offsets, as_tensor, x.device)
    result = mxfp4_to_fp8_columnwise(x, groups, alignment=alignment, spread_overflows=counter, out=out)
    source = x if oracle == "same" else moved(x, "cpu")
    data, sf, overflows = reference_columnwise.mxfp4_to_fp8_columnwise(source, offsets)
    assert (result.data.data_ptr(), result.sf.data_ptr()) == (out.data.data_ptr(), out.sf.data_ptr())
    assert_same_columnwise(result, data, sf, offsets)
    outputs.check()
    assert counter.item() == 7 + overflows.item()
    return int(overflows)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
@pytest.mark.parametrize(("offsets", "alignment"), GROUPS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_grouping(device: str, offsets: list[int], alignment: int, as_tensor: bool) -> None:
    """Rows past the last group are left out, and theirs in the output untouched."""
    for columns in (128, 640):
        x = moved(wild_mxfp4(offsets[-1] + 33, columns, 0), device)
        assert _check(x, offsets, alignment, as_tensor) > 0 or offsets[-1] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_form(device: str, form: str) -> None:
    x = moved(wild_mxfp4(480, 384, 1, form), device)
    assert (_check(x, [0, 160, 160, 448]) > 0) == (form == "plain")


@pytest.mark.parametrize("columns", [128, 384, 512, 896, 2048, 7168])
@pytest.mark.parametrize("device", DEVICES)
def test_every_width(device: str, columns: int) -> None:
    _check(moved(wild_mxfp4(160, columns, 2), device), [0, 128, 160])


@gpu_only
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
@pytest.mark.parametrize("form", ["plain", "signs"])
def test_large_rows(form: str, as_tensor: bool) -> None:
    """Many groups of many sizes."""
    sizes = torch.randint(0, 9, (64,), generator=torch.Generator().manual_seed(3)) * 32
    offsets = [0, *sizes.cumsum(0).tolist()]
    _check(moved(wild_mxfp4(offsets[-1], 2048, 3, form), "cuda"), offsets, 32, as_tensor, oracle="same")


def _every_pair_of_scales(device: str, step: int = 1) -> MXFP4Tensor:
    """Three tiles of 128 rows: block column t holds, in each tile, byte t and every byte up to it, with all codes.

    step takes every step-th block column, padded to whole groups of four.
    """
    top = torch.arange(0, 256, step, device=device)
    top = top[: len(top) // 4 * 4]
    row = torch.arange(384, device=device)
    others = (row // 128 * 127 + row % 128 - 1)[:, None] % (top + 1)
    place = (top * 5 % 128)[None]
    sf = torch.where((row % 128)[:, None] == place, top, others)
    codes = torch.arange(16, dtype=torch.uint8, device=device)
    qdata = torch.stack([(codes | codes.flip(0) << 4).roll(shift) for shift in range(16)])
    return MXFP4Tensor(qdata[row % 16].repeat(1, len(top)), sf.to(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_every_code_under_every_pair_of_scales(device: str) -> None:
    x = _every_pair_of_scales(device, 1 if device == "cuda" else 20)
    overflows = _check(x, [0, 384], 128, oracle="same")
    tiles = x.sf.view(3, 128, -1).long()
    top = torch.where(tiles == 255, 0, tiles).amax(1, keepdim=True).clamp(min=7)
    assert overflows == ((top - tiles > 14) & (tiles != 255)).sum()


@pytest.mark.parametrize("sf", [0, 6, 7, 200, 255])
@pytest.mark.parametrize("device", DEVICES)
def test_tiles_of_zeros_and_of_nan(device: str, sf: int) -> None:
    qdata = torch.tensor([0x80, 0x08, 0x00, 0x88], dtype=torch.uint8).repeat(160, 32)
    qdata[128:] |= 0x35
    x = MXFP4Tensor(qdata, torch.full((160, 8), sf, dtype=torch.uint8))
    _check(moved(x, device), [0, 160])


@pytest.mark.parametrize("name", REARRANGEMENTS)
@pytest.mark.parametrize("form", ["plain", "signs"])
@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_any_strides(device: str, form: str, name: str) -> None:
    x = moved(wild_mxfp4(160, 256, 4, form), device)
    rearrange = REARRANGEMENTS[name]
    for parts in (("qdata",), ("sf",), ("qdata", "sf")):
        changed: dict[str, Any] = {part: rearrange(getattr(x, part)) for part in parts}
        _check(dataclasses.replace(x, **changed), [0, 96, 160])


@pytest.mark.parametrize("device", DEVICES)
def test_none_is_one_group_of_all_rows(device: str) -> None:
    x = moved(wild_mxfp4(256, 128, 5), device)
    result = mxfp4_to_fp8_columnwise(x)
    assert_same_columnwise(
        result, *reference_columnwise.mxfp4_to_fp8_columnwise(moved(x, "cpu"), [0, 256])[:2], [0, 256]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_overflows_accumulate(device: str) -> None:
    x = moved(wild_mxfp4(256, 128, 6), device)
    overflows = _check(x, [0, 256], 128)
    counter = torch.full((1,), 2**40, dtype=torch.int64, device=device)
    for _ in range(3):
        mxfp4_to_fp8_columnwise(x, spread_overflows=counter)
    assert counter.item() == 2**40 + 3 * overflows > 2**40


@pytest.mark.parametrize("device", DEVICES)
@given(groups=group_offsets(), columns=st.sampled_from([128, 256, 640]), data=st.data())
@FEW
def test_any_groups(device: str, groups: tuple[list[int], int, int], columns: int, data: st.DataObject) -> None:
    offsets, alignment, extra = groups
    form = data.draw(st.sampled_from(["plain", "signs, prescaled"]))
    x = moved(wild_mxfp4(offsets[-1] + extra, columns, data.draw(st.integers(0, 99)), form), device)
    _check(x, offsets, alignment, data.draw(st.booleans()))


X = wild_mxfp4(256, 128, 7)


@pytest.mark.parametrize(
    ("x", "groups", "options", "kind", "message"),
    [
        (torch.zeros(2, 128), None, {}, TypeError, "x must be a MXFP4Tensor, got Tensor"),
        (wild_mxfp4(128, 96, 7), None, {}, ValueError, "x.shape[1] must be a multiple of 128, got 96"),
        (MXFP4Tensor(X.qdata[None], X.sf[None]), None, {}, ValueError, "x must have 2 dimensions, got shape (1, 256"),
        (X, [0, 96], {}, ValueError, "from 0 to at most 256 in multiples of 128, got [0, 96]"),
        (X, [0, 160], {"alignment": 64}, ValueError, "from 0 to at most 256 in multiples of 64, got [0, 160]"),
        (X, [0, 384], {}, ValueError, "from 0 to at most 256 in multiples of 128, got [0, 384]"),
        (X, [128, 256], {}, ValueError, "must rise from 0 to at most 256 in multiples of 128, got [128, 256]"),
        (X, [0, 256, 128], {}, ValueError, "must rise from 0 to at most 256 in multiples of 128, got [0, 256, 128]"),
        (X, [], {}, ValueError, "must rise from 0 to at most 256 in multiples of 128, got []"),
        (wild_mxfp4(200, 128, 7), None, {}, ValueError, "from 0 to at most 200 in multiples of 128, got [0, 200]"),
        (X, None, {"alignment": 48}, ValueError, "alignment must be a multiple of 32, got 48"),
        (X, None, {"alignment": 0}, ValueError, "alignment must be positive, got 0"),
        (X, None, {"alignment": 32.0}, TypeError, "alignment must be an int, got float"),
        (X, torch.zeros(3), {}, TypeError, "group_offsets must be torch.int32, got torch.float32"),
        (X, torch.zeros(1, 3).int(), {}, ValueError, "group_offsets.shape must be (*), got (1, 3)"),
        (X, torch.zeros(0).int(), {}, ValueError, "group_offsets must have at least 1 element, got 0"),
        (X, torch.zeros(3, device="meta").int(), {}, ValueError, "group_offsets must be on cpu, got meta"),
        (X, torch.zeros(6).int()[::2], {}, ValueError, "group_offsets must be contiguous, got strides (2,)"),
        (X, None, {"spread_overflows": 0}, TypeError, "spread_overflows must be a torch.Tensor, got int"),
        (
            X,
            None,
            {"spread_overflows": torch.zeros(1).int()},
            TypeError,
            "spread_overflows must be torch.int64, got torch.int32",
        ),
    ],
)
def test_argument_errors(x: Any, groups: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        mxfp4_to_fp8_columnwise(x, groups, **options)


@pytest.mark.parametrize(
    ("held", "tiles", "columns", "device", "message"),
    [
        (255, 2, 128, "cpu", "out.data.shape must be (32768,), got (32640,)"),
        (256, 3, 128, "cpu", "out.sf.shape must be (2, 128), got (3, 128)"),
        (128, 2, 256, "cpu", "out.sf.shape must be (2, 128), got (2, 256)"),
        (256, 2, 128, "meta", "out.data must be on cpu, got meta"),
    ],
)
def test_out_that_does_not_fit(held: int, tiles: int, columns: int, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mxfp4_to_fp8_columnwise(X, out=Outputs(device).columnwise(held, tiles, columns))


@gpu_only
@pytest.mark.parametrize("rearrange", [misaligned, spread_out])
@pytest.mark.parametrize("part", ["data", "sf"])
def test_out_that_a_kernel_cannot_write(part: str, rearrange: Any) -> None:
    good = Outputs("cuda").columnwise(256, 2, 128)
    ints = rearrange(getattr(good, part).view(torch.uint8 if part == "data" else torch.int32))
    out = dataclasses.replace(good, **{part: ints.view(getattr(good, part).dtype)})
    with pytest.raises(ValueError, match=rf"out\.{part} must be contiguous and on a 16-byte boundary, got strides"):
        mxfp4_to_fp8_columnwise(moved(X, "cuda"), out=out)
    assert (good.data.view(torch.uint8) == POISON).all()


@gpu_only
@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "signs"])
def test_more_than_2_to_the_31_elements(form: str) -> None:
    """In one group, so that a column's rows are far apart, behind a small one."""
    columns = 7168
    rows = big_rows(columns, multiple=128)
    qdata = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    sf = torch.randint(100, 140, (rows, columns // 32), dtype=torch.uint8, device="cuda")
    offsets = [0, 128, rows]
    data = torch.full((rows * columns,), POISON, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scales = torch.full((rows // 128, columns), torch.nan, device="cuda")
    out = FP8ColumnwiseTensor(data, scales, torch.tensor(offsets, dtype=torch.int32, device="cuda"))
    mxfp4_to_fp8_columnwise(MXFP4Tensor(qdata, sf, **FORMS[form]), offsets, out=out)
    for tile in (0, 1, rows // 256, rows // 128 - 1):
        part = slice(128 * tile, 128 * tile + 128)
        x = MXFP4Tensor(qdata[part], sf[part], **FORMS[form])
        expected, scale, _ = reference_columnwise.mxfp4_to_fp8_columnwise(x, [0, 128])
        first = 0 if tile == 0 else 128
        group = data[: 128 * columns] if tile == 0 else data[128 * columns :]
        found = group.view(torch.uint8).view(columns, -1)[:, part.start - first : part.stop - first]
        assert_same_bits(found, expected.view(torch.uint8).view(columns, 128), f"data of tile {tile}")
        assert_same_bits(scales[tile : tile + 1], scale, f"sf of tile {tile}")
