"""What the two column-wise launchers share: groups of rows, their tiles, and the tensor they fill."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from qcomm import validate
from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE
from qcomm.jit import KernelSpec
from qcomm.ops import codec
from qcomm.reference_columnwise import check_group_offsets, count_tiles
from qcomm.tensors import FP8ColumnwiseTensor

THREADS = 256
"""Of a block; also the bytes of a row that it takes."""


class ColumnwiseParams(ctypes.Structure):
    """See `ColumnwiseParams` in kernels/columnwise.cuh."""

    _fields_ = (
        ("x", ctypes.c_uint64),
        ("x_sf", ctypes.c_uint64),
        ("data", ctypes.c_uint64),
        ("out_sf", ctypes.c_uint64),
        ("group_offsets", ctypes.c_uint64),
        ("overflows", ctypes.c_uint64),
        ("sf_row_stride", ctypes.c_int64),
        ("sf_word_stride", ctypes.c_int64),
        ("num_groups", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("row_bytes", ctypes.c_int32),
        ("num_tiles", ctypes.c_int32),
        ("signs", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


def columnwise_spec(name: str, alignment: int, **constants: int) -> KernelSpec:
    """Build the spec of a column-wise kernel; one that need not look for its rows where all tiles are whole."""
    constants["whole_tiles"] = alignment % FP8_GROUP_SIZE == 0
    return KernelSpec.of(
        name, name, threads=THREADS, tiles=1, sizeof_params=ctypes.sizeof(ColumnwiseParams), **constants
    )


def launch(spec: KernelSpec, x: torch.Tensor, params: ColumnwiseParams) -> None:
    """Launch a block for every tile and piece of a row."""
    grid = params.num_tiles * -(-params.row_bytes // THREADS)
    codec.launch(spec, x, grid, params, THREADS)


GroupOffsets = Sequence[int] | torch.Tensor | None


def prepare(
    rows: int,
    columns: int,
    group_offsets: GroupOffsets,
    alignment: int,
    device: torch.device,
    out: FP8ColumnwiseTensor | None,
) -> FP8ColumnwiseTensor:
    """Check the groups, and allocate what is to be written, or check what was given.

    Raises:
        TypeError: arguments of the wrong type.
        ValueError: groups or an `out` that do not fit.
    """
    validate.multiple("alignment", alignment, BLOCK_SIZE)
    if columns % FP8_GROUP_SIZE:
        raise ValueError(f"x.shape[1] must be a multiple of {FP8_GROUP_SIZE}, got {columns}")
    if group_offsets is None:
        group_offsets = [0, rows]
    if isinstance(group_offsets, torch.Tensor):
        validate.tensor("group_offsets", group_offsets, shape=(None,), dtypes=(torch.int32,), device=device)
        if group_offsets.numel() == 0:
            raise ValueError("group_offsets must have at least 1 element, got 0")
        offsets, held = group_offsets, rows
        partial = 0 if alignment % FP8_GROUP_SIZE == 0 else group_offsets.numel() - 1
        num_tiles = rows // FP8_GROUP_SIZE + partial
    else:
        as_list = list(group_offsets)
        check_group_offsets(as_list, rows, alignment)
        offsets, held = torch.tensor(as_list, dtype=torch.int32, device=device), as_list[-1]
        num_tiles = count_tiles(as_list)
    shape = (num_tiles, columns)
    if out is None:
        data = torch.empty(held * columns, dtype=torch.float8_e4m3fn, device=device)
        return FP8ColumnwiseTensor(data, torch.empty(shape, dtype=torch.float32, device=device), offsets)
    codec.check_out("out.data", out.data, (held * columns,), torch.float8_e4m3fn, device)
    codec.check_out("out.sf", out.sf, shape, torch.float32, device)
    return FP8ColumnwiseTensor(out.data, out.sf, offsets)


def store_oracle(data: torch.Tensor, sf: torch.Tensor, out_data: torch.Tensor, out_sf: torch.Tensor) -> None:
    """Copy what the oracle made into tensors that may be larger."""
    out_data[: data.numel()].copy_(data)
    out_sf[: sf.shape[0]].copy_(sf)
