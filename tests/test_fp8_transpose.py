"""fp8_transpose against the oracle, bit for bit, on the CPU and on a GPU."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from codec_cases import (
    DEVICES,
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
    wild_fp8,
    wild_mxfp4,
)
from codec_truth import FEW, random_float32
from hypothesis import given
from hypothesis import strategies as st

from qcomm import (
    FP8ColumnwiseTensor,
    FP8Tensor,
    ScaleLayout,
    fp8_transpose,
    mxfp4_to_fp8,
    mxfp4_to_fp8_columnwise,
    reference_columnwise,
)
from qcomm.tensors import empty_scales

pytestmark = pytest.mark.filterwarnings("error")


def _check(
    x: FP8Tensor, offsets: list[int], alignment: int = 32, as_tensor: bool = False, oracle: str = "cpu"
) -> FP8ColumnwiseTensor:
    """Compare on the device of x; "same" lets the oracle run there too, for large inputs."""
    outputs = Outputs(x.device)
    held, tiles = columnwise_tiles(x.shape[0], offsets, alignment, as_tensor)
    out = outputs.columnwise(held, tiles, x.shape[1])
    result = fp8_transpose(x, given_offsets(offsets, as_tensor, x.device), alignment=alignment, out=out)
    data, sf = reference_columnwise.fp8_transpose(x if oracle == "same" else moved(x, "cpu"), offsets)
    assert (result.data.data_ptr(), result.sf.data_ptr()) == (out.data.data_ptr(), out.sf.data_ptr())
    assert_same_columnwise(result, data, sf, offsets)
    outputs.check()
    return result


@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
@pytest.mark.parametrize(("offsets", "alignment"), GROUPS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_grouping(device: str, offsets: list[int], alignment: int, as_tensor: bool) -> None:
    """Rows past the last group are left out, and theirs in the output untouched."""
    for columns in (128, 640):
        for powers_of_two in (False, True):
            x = moved(wild_fp8(offsets[-1] + 33, columns, 0, powers_of_two), device)
            _check(x, offsets, alignment, as_tensor)


@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("columns", [128, 256, 384, 896, 2048, 7168])
@pytest.mark.parametrize("device", DEVICES)
def test_every_width(device: str, columns: int, powers_of_two: bool) -> None:
    _check(moved(wild_fp8(160, columns, 1, powers_of_two), device), [0, 128, 160])


@gpu_only
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_large_rows(powers_of_two: bool, as_tensor: bool) -> None:
    """Many groups of many sizes."""
    sizes = torch.randint(0, 9, (64,), generator=torch.Generator().manual_seed(2)) * 32
    offsets = [0, *sizes.cumsum(0).tolist()]
    x = moved(wild_fp8(offsets[-1], 2048, 2, powers_of_two), "cuda")
    _check(x, offsets, 32, as_tensor, oracle="same")


def _every_distance(device: str, step: int = 1) -> tuple[FP8Tensor, list[int]]:
    """Tiles `[128, 256]` with every code in each row: row r of a tile of top 2^e has scale 2^(e - r), or 0 or below.

    step takes every step-th top from 2^127 down to 2^-126.
    """
    tops = torch.arange(127, -127, -step, device=device)
    order = (torch.arange(128, device=device) + 5 * tops[:, None]) % 128
    exponents = (tops[:, None] - order).clamp(min=-149).flatten()
    sf = torch.from_numpy(np.ldexp(np.float32(1), exponents.cpu().numpy())).to(device)
    codes = torch.arange(256, device=device).to(torch.uint8).roll(7).repeat(len(sf), 1)
    return FP8Tensor(codes.view(torch.float8_e4m3fn), sf[:, None].repeat(1, 2)), [0, len(sf)]


@pytest.mark.parametrize("device", DEVICES)
def test_every_code_at_every_distance(device: str) -> None:
    x, offsets = _every_distance(device, 1 if device == "cuda" else 23)
    _check(x, offsets, 128, oracle="same")


@pytest.mark.parametrize("device", DEVICES)
def test_every_code_under_random_scales(device: str) -> None:
    """Any float32 beside a near one, so that no exponent is left out and not all codes end at 0."""
    tiles = 600 if device == "cuda" else 20
    rng = np.random.default_rng(3)
    top = np.abs(random_float32(rng, (tiles, 1)))
    with np.errstate(over="ignore", under="ignore"):
        sf = (top * np.exp2(rng.uniform(-24, 0, (tiles, 128)))).astype(np.float32)
    codes = np.stack([rng.permutation(256) for _ in range(tiles * 128)]).astype(np.uint8)
    data = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    x = FP8Tensor(data, torch.from_numpy(sf.reshape(-1, 1).repeat(2, 1)))
    _check(moved(x, device), [0, tiles * 128], 128, oracle="same")


@pytest.mark.parametrize("device", DEVICES)
def test_products_at_and_near_ties(device: str) -> None:
    """Scales for which a code's product lies on the middle of two E4M3 values, and one float32 beside it."""
    mantissas = torch.arange(8, 16).double() / 8
    middles = torch.arange(17, 32, 2).double() / 16
    near = (middles[:, None] / mantissas).flatten().float().numpy()
    near = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(9))])
    rows = len(near) // 64 * 64
    sf = torch.from_numpy(near[:rows]) * 2.0 ** -(torch.arange(rows) % 15)
    codes = torch.arange(256).to(torch.uint8).repeat(rows, 1).view(torch.float8_e4m3fn)
    _check(moved(FP8Tensor(codes, sf[:, None].repeat(1, 2)), device), [0, rows])


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 2.0**-126, 1.0, 3.4e38, torch.inf, torch.nan])
@pytest.mark.parametrize("device", DEVICES)
def test_scales_of_every_kind(device: str, value: float) -> None:
    """In one row of a tile, in all rows of another; rows of zeros never count."""
    codes = torch.arange(256).to(torch.uint8).repeat(384, 1)
    codes[130:] = torch.where(codes[130:] & 0x7F == 0x7F, 0x31, codes[130:])
    codes[::3, :128] &= 0x80
    sf = torch.full((384, 2), 0.75 * 2.0**-20)
    sf[5], sf[9, 1] = value, value
    sf[128:256] = value
    sf[::3, 0] = 2.0**100
    _check(moved(FP8Tensor(codes.view(torch.float8_e4m3fn), sf), device), [0, 256, 384])


@pytest.mark.parametrize("device", DEVICES)
def test_transposes_what_the_alignment_of_rows_gave(device: str) -> None:
    """MXFP4 near enough to be exact both ways: rows first and then columns decode to what columns at once do."""
    x = moved(wild_mxfp4(256, 256, 4), device)
    x = dataclasses.replace(x, sf=x.sf % 7 + 120)
    through = fp8_transpose(mxfp4_to_fp8(x))
    direct = mxfp4_to_fp8_columnwise(x)
    values = []
    for result in (through, direct):
        codes = result.data.double().view(256, 256)
        values.append(codes * result.sf.double().t().repeat_interleave(128, dim=1))
    assert torch.equal(*values)


@pytest.mark.parametrize("device", DEVICES)
def test_scales_of_any_storage(device: str) -> None:
    x = moved(wild_fp8(160, 640, 5), device)
    column_major = empty_scales(160, 5, ScaleLayout.COLUMN_MAJOR, device).copy_(x.sf)
    for sf in (column_major, *(rearrange(x.sf) for rearrange in REARRANGEMENTS.values()), x.sf[:1].expand(160, 5)):
        _check(FP8Tensor(x.data, sf), [0, 96, 160])


@pytest.mark.parametrize("name", REARRANGEMENTS)
@pytest.mark.parametrize("device", DEVICES)
def test_data_of_any_strides(device: str, name: str) -> None:
    x = moved(wild_fp8(160, 256, 6), device)
    data = REARRANGEMENTS[name](x.data.view(torch.uint8)).view(torch.float8_e4m3fn)
    _check(FP8Tensor(data, x.sf), [0, 96, 160])
    _check(FP8Tensor(x.data[32:], x.sf[32:]), [0, 128])


@pytest.mark.parametrize("device", DEVICES)
def test_none_is_one_group_of_all_rows(device: str) -> None:
    x = moved(wild_fp8(256, 128, 7), device)
    assert_same_columnwise(fp8_transpose(x), *reference_columnwise.fp8_transpose(moved(x, "cpu"), [0, 256]), [0, 256])


@pytest.mark.parametrize("device", DEVICES)
@given(groups=group_offsets(), columns=st.sampled_from([128, 256, 640]), data=st.data())
@FEW
def test_any_groups(device: str, groups: tuple[list[int], int, int], columns: int, data: st.DataObject) -> None:
    offsets, alignment, extra = groups
    x = wild_fp8(offsets[-1] + extra, columns, data.draw(st.integers(0, 99)), data.draw(st.booleans()))
    _check(moved(x, device), offsets, alignment, data.draw(st.booleans()))


X = wild_fp8(256, 128, 8)


@pytest.mark.parametrize(
    ("x", "groups", "options", "kind", "message"),
    [
        (torch.zeros(2, 128), None, {}, TypeError, "x must be a FP8Tensor, got Tensor"),
        (
            FP8Tensor(X.data, torch.zeros(256, 1, dtype=torch.int32)),
            None,
            {},
            TypeError,
            "x.sf must be torch.float32, got torch.int32",
        ),
        (X, [0, 96], {}, ValueError, "from 0 to at most 256 in multiples of 128, got [0, 96]"),
        (X, [0, 16], {"alignment": 32}, ValueError, "from 0 to at most 256 in multiples of 32, got [0, 16]"),
        (X, [0, 384], {}, ValueError, "from 0 to at most 256 in multiples of 128, got [0, 384]"),
        (X, [0, 256, 128], {}, ValueError, "must rise from 0 to at most 256 in multiples of 128, got [0, 256, 128]"),
        (X, None, {"alignment": 16}, ValueError, "alignment must be a multiple of 32, got 16"),
        (X, None, {"alignment": "a"}, TypeError, "alignment must be an int, got str"),
        (X, torch.zeros(3).long(), {}, TypeError, "group_offsets must be torch.int32, got torch.int64"),
        (X, torch.zeros(0).int(), {}, ValueError, "group_offsets must have at least 1 element, got 0"),
        (X, torch.zeros(3, device="meta").int(), {}, ValueError, "group_offsets must be on cpu, got meta"),
    ],
)
def test_argument_errors(x: Any, groups: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        fp8_transpose(x, groups, **options)


@pytest.mark.parametrize(
    ("held", "tiles", "columns", "message"),
    [
        (255, 2, 128, "out.data.shape must be (32768,), got (32640,)"),
        (256, 3, 128, "out.sf.shape must be (2, 128), got (3, 128)"),
        (128, 2, 256, "out.sf.shape must be (2, 128), got (2, 256)"),
    ],
)
def test_out_that_does_not_fit(held: int, tiles: int, columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fp8_transpose(X, out=Outputs("cpu").columnwise(held, tiles, columns))


@gpu_only
@pytest.mark.parametrize("rearrange", [misaligned, spread_out])
@pytest.mark.parametrize("part", ["data", "sf"])
def test_out_that_a_kernel_cannot_write(part: str, rearrange: Any) -> None:
    good = Outputs("cuda").columnwise(256, 2, 128)
    ints = rearrange(getattr(good, part).view(torch.uint8 if part == "data" else torch.int32))
    out = dataclasses.replace(good, **{part: ints.view(getattr(good, part).dtype)})
    with pytest.raises(ValueError, match=rf"out\.{part} must be contiguous and on a 16-byte boundary, got strides"):
        fp8_transpose(moved(X, "cuda"), out=out)
    assert (good.data.view(torch.uint8) == POISON).all()


@gpu_only
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """In one group, so that a column's rows are far apart, behind a small one."""
    columns = 7168
    rows = big_rows(columns, multiple=128)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    sf = torch.exp2(torch.randint(-9, 3, (rows, columns // 128), device="cuda").float())
    offsets = [0, 128, rows]
    data = torch.full((rows * columns,), POISON, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scales = torch.full((rows // 128, columns), torch.nan, device="cuda")
    out = FP8ColumnwiseTensor(data, scales, torch.tensor(offsets, dtype=torch.int32, device="cuda"))
    fp8_transpose(FP8Tensor(codes, sf), offsets, out=out)
    for tile in (0, 1, rows // 256, rows // 128 - 1):
        part = slice(128 * tile, 128 * tile + 128)
        expected, scale = reference_columnwise.fp8_transpose(FP8Tensor(codes[part], sf[part]), [0, 128])
        first = 0 if tile == 0 else 128
        group = data[: 128 * columns] if tile == 0 else data[128 * columns :]
        found = group.view(torch.uint8).view(columns, -1)[:, part.start - first : part.stop - first]
        assert_same_bits(found, expected.view(torch.uint8).view(columns, 128), f"data of tile {tile}")
        assert_same_bits(scales[tile : tile + 1], scale, f"sf of tile {tile}")
