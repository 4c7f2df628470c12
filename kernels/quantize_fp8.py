"""BF16 to E4M3 under scales that are powers of two, in Triton: 1x128 for rows, 128x128 for weights.

One pass: every byte is read and written once, and no program reads what another writes. 64-bit addresses. Bits as in
qcomm/reference.py. A bfloat16 comes as an int16, a code goes as a byte.
"""

import triton
import triton.language as tl
from qcomm_kernels_fp8_bits import as_float, e4m3, fp8_scale

SIZE = tl.constexpr(128)


@triton.jit
def _magnitudes(values):
    """Return the bits of the magnitudes of bfloat16, as of float32; as integers they order like the values."""
    return (values & 0x7FFF).to(tl.int32) << 16


@triton.jit
def _codes(values, factor, NATIVE: tl.constexpr):
    return e4m3(as_float(values.to(tl.int32) << 16) * factor, NATIVE)


@triton.jit(do_not_specialize=["num_groups"])
def quantize_rows(x, data, sf, num_groups, BLOCK_GROUPS: tl.constexpr, NATIVE: tl.constexpr):
    """Quantize groups of 128 neighbours. Grid: ceil(num_groups / BLOCK_GROUPS) programs."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    exists = group < num_groups
    element = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    values = tl.load(x + element, mask=exists[:, None], other=0)
    scale, factor = fp8_scale(tl.max(_magnitudes(values), axis=1))
    tl.store(data + element, _codes(values, factor[:, None], NATIVE), mask=exists[:, None])
    tl.store(sf + group, scale, mask=exists)


@triton.jit(do_not_specialize=["rows", "columns"])
def quantize_blocks(w, data, sf, rows, columns, TRANSPOSED: tl.constexpr, NATIVE: tl.constexpr):
    """Quantize tiles of 128x128 of `[num, 128 * rows, 128 * columns]`, each a program, row by row.

    If TRANSPOSED, data and sf are written as those of `[num, 128 * columns, 128 * rows]`.
    """
    tile = tl.program_id(0)
    column, row = tile % columns, tile // columns % rows
    first = (tile // columns // rows).to(tl.int64) * rows * columns
    within = tl.arange(0, SIZE)
    source = first * (SIZE * SIZE) + (row * SIZE + within).to(tl.int64)[:, None] * (columns * SIZE)
    values = tl.load(w + source + (column * SIZE + within)[None, :])
    scale, factor = fp8_scale(tl.max(tl.max(_magnitudes(values), axis=1), axis=0))
    codes = _codes(values, factor, NATIVE)
    if TRANSPOSED:
        target = first * (SIZE * SIZE) + (column * SIZE + within).to(tl.int64)[:, None] * (rows * SIZE)
        tl.store(data + target + (row * SIZE + within)[None, :], tl.trans(codes))
        tl.store(sf + first + column * rows + row, scale)
    else:
        tl.store(data + source + (column * SIZE + within)[None, :], codes)
        tl.store(sf + first + row * columns + column, scale)
