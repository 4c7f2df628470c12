"""SwiGLU fused with its conversions, in Triton.

A "group" is 128 neighbouring columns of one row of h or of its gradient: what one FP8 scale covers, and four MX
blocks of the gate and four of up. Groups are numbered row by row. Tensors of a program are [4 * BLOCK_GROUPS, 16]:
a row is an MX block, a column a word of two neighbouring elements, two bfloat16 in an int32 or two codes in a byte.

Grid and block of `swiglu_forward` and `swiglu_backward`: ceil(num_groups / BLOCK_GROUPS) programs, one pass, every
byte read and written once; no program reads what another writes. 64-bit addresses. Bits as in qcomm/reference.py,
but for exp and the reciprocal.
"""

import triton
import triton.language as tl
from qcomm_kernels_fp8_bits import INFINITY_BITS, as_float, bits_of, e4m3, fp8_scale
from triton.language.extra import libdevice

BLOCKS = tl.constexpr(4)
WORDS = tl.constexpr(16)
MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def _row(group, GROUPS_PER_ROW: tl.constexpr):
    return (group.to(tl.uint32) // GROUPS_PER_ROW).to(tl.int64)


@triton.jit
def _groups(num_groups, GROUPS_PER_ROW: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """Return this program's groups, their rows, and which of them exist."""
    group = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    return group, _row(group, GROUPS_PER_ROW), group < num_groups


@triton.jit
def _blocks(num_groups, GROUPS_PER_ROW: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """Return this program's blocks: their numbers in h and, of gate and up, in x; and which of them exist."""
    within = tl.arange(0, BLOCK_GROUPS * BLOCKS)
    block = tl.program_id(0).to(tl.int64) * (BLOCK_GROUPS * BLOCKS) + within
    row = _row(tl.program_id(0) * BLOCK_GROUPS + within // BLOCKS, GROUPS_PER_ROW)
    gate = block + row * (GROUPS_PER_ROW * BLOCKS)
    return block, gate, gate + GROUPS_PER_ROW * BLOCKS, block < num_groups.to(tl.int64) * BLOCKS


@triton.jit
def _words(block):
    """Return the index of each word of the blocks."""
    return block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def _columns(block):
    """Return the index of each element of the blocks."""
    return block[:, None] * (2 * WORDS) + tl.arange(0, 2 * WORDS)[None, :]


@triton.jit
def _per_block(x, BLOCK_GROUPS: tl.constexpr):
    """Repeat a value of each group for its blocks."""
    return tl.reshape(tl.broadcast_to(x[:, None], [BLOCK_GROUPS, BLOCKS]), [BLOCK_GROUPS * BLOCKS])


@triton.jit
def _amax_bits(low, high):
    """Return the bits of the larger magnitude; as integers they order like the values, with NaN above infinity."""
    return bits_of(tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _unpack(word):
    """Return the two values of a word of bfloat16."""
    return as_float(word << 16), as_float(word & -0x10000)


@triton.jit
def _code(x, factor):
    """Return a float whose lowest bits are the E2M1 code nearest to |x| * factor, which is below 8.

    The code is the least of three lines, 2y, y + 2 and y * 51 / 512 + 6, each rounded to an integer, ties to even.
    They are halved here, and rounded by an addend whose last bit is worth 1/2. With 51 / 512, y = 5 stays below half
    way and the next y of 8 bits goes above; the products are exact.
    """
    y = tl.abs(x) * factor
    return tl.minimum(tl.minimum(y + 4194304.0, tl.fma(y, 0.5, 4194305.0)), tl.fma(y, 0.0498046875, 4194307.0))


@triton.jit
def _mxfp4(word, low, high, addend):
    """Quantize words of bfloat16: codes, a byte a word, and scale bytes, one a block; low and high are the values."""
    amax = tl.max(_amax_bits(low, high), axis=1)
    finite = amax < INFINITY_BITS
    # bfloat16 magnitudes end below the scale byte 254, so that only the lower bound needs a clamp, which serves
    # zeros too, and the factor is a normal number.
    sf = tl.maximum(((amax + addend) >> 23) - 2, 0)
    factor = as_float((254 - sf) << 23)[:, None]
    codes = (bits_of(_code(high, factor)) << 4) + bits_of(_code(low, factor))
    # Signs from bits 15 and 31 to bits 3 and 7.
    signs = tl.umulhi((word & -0x7FFF8000).to(tl.uint32, bitcast=True), tl.full([1], 0x00100100, tl.uint32))
    qdata = (codes + signs.to(tl.int32, bitcast=True)).to(tl.uint8)
    return tl.where(finite[:, None], qdata, 0), tl.where(finite, sf, 255).to(tl.uint8)


@triton.jit
def _bf16(x, NATIVE: tl.constexpr):
    """Round to bfloat16, nearest even, as int16; NaN becomes 0x7FFF."""
    if NATIVE:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    bits = bits_of(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > INFINITY_BITS, 0x7FFF, rounded).to(tl.int16)


@triton.jit
def _pairs(low, high, BLOCK_GROUPS: tl.constexpr):
    """Return [4 * BLOCK_GROUPS, 32] elements in their order."""
    return tl.reshape(tl.join(low, high), [BLOCK_GROUPS * BLOCKS, 2 * WORDS])


@triton.jit
def _over_exp(x, gate, NATIVE: tl.constexpr):
    """Return x / (1 + exp(-gate)).

    The fast division takes a divisor above 2^126 for infinite and what is below 2^-126, also x, for zero; qcomm's
    oracle does the same, and so does the division that Triton's interpreter has.
    """
    divisor = 1.0 + tl.exp2(gate * MINUS_LOG2_E)
    if NATIVE:
        return libdevice.fast_dividef(x, divisor)
    quotient = x / divisor
    return tl.where((divisor > 8.507059173023462e37) | (tl.abs(quotient) < 1.1754943508222875e-38), x * 0.0, quotient)


@triton.jit(do_not_specialize=["num_groups", "addend"], do_not_specialize_on_alignment=["weights"])
def swiglu_forward(
    x,
    weights,
    h,
    h_sf,
    qdata,
    sf,
    num_groups,
    addend,
    GROUPS_PER_ROW: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Write h in FP8 and x in MXFP4; without h_sf h in bfloat16, without qdata no x."""
    group, row, group_exists = _groups(num_groups, GROUPS_PER_ROW, BLOCK_GROUPS)
    block, gate_block, up_block, exists = _blocks(num_groups, GROUPS_PER_ROW, BLOCK_GROUPS)

    gate = tl.load(x + _words(gate_block), mask=exists[:, None], other=0)
    up = tl.load(x + _words(up_block), mask=exists[:, None], other=0)
    gate_low, gate_high = _unpack(gate)
    up_low, up_high = _unpack(up)

    if qdata is not None:
        codes, scales = _mxfp4(gate, gate_low, gate_high, addend)
        tl.store(qdata + _words(gate_block), codes, mask=exists[:, None])
        tl.store(sf + gate_block, scales, mask=exists)
        codes, scales = _mxfp4(up, up_low, up_high, addend)
        tl.store(qdata + _words(up_block), codes, mask=exists[:, None])
        tl.store(sf + up_block, scales, mask=exists)

    low = _over_exp(gate_low, gate_low, NATIVE) * up_low
    high = _over_exp(gate_high, gate_high, NATIVE) * up_high
    if weights is not None:
        weight = _per_block(tl.load(weights + row, mask=group_exists, other=0.0), BLOCK_GROUPS)[:, None]
        low *= weight
        high *= weight
    if h_sf is None:
        tl.store(h + _columns(block), _bf16(_pairs(low, high, BLOCK_GROUPS), NATIVE), mask=exists[:, None])
    else:
        amax = tl.max(tl.reshape(tl.max(_amax_bits(low, high), axis=1), [BLOCK_GROUPS, BLOCKS]), axis=1)
        scale, factor = fp8_scale(amax)
        factor = _per_block(factor, BLOCK_GROUPS)[:, None]
        data = e4m3(_pairs(low * factor, high * factor, BLOCK_GROUPS), NATIVE)
        tl.store(h + _columns(block), data, mask=exists[:, None])
        tl.store(h_sf + group, scale, mask=group_exists)


@triton.jit
def _decode(byte, scale):
    """Return the two values of a byte of E2M1 codes."""
    # A nibble times 2^28 + 2^22 has the sign in bit 31 and the rest at the bottom of a float's exponent, which makes
    # the value times 2^-126; two products, because 2^126 times the scale overflows.
    low = ((byte & 0x0F) * 0x10400000) & -0x7E400000
    high = ((byte >> 4) * 0x10400000) & -0x7E400000
    return as_float(low) * 8.507059173023462e37 * scale, as_float(high) * 8.507059173023462e37 * scale


@triton.jit
def _scale(sf):
    """Return the value of scale bytes: 2^-127 is subnormal, 255 is NaN."""
    bits = tl.where(sf == 0, 0x00400000, sf << 23)
    return as_float(tl.where(sf == 255, 0x7FFFFFFF, bits))[:, None]


@triton.jit
def _load(saved, sf, block, exists):
    """Return what was saved in MXFP4; without scales, in bfloat16."""
    words = tl.load(saved + _words(block), mask=exists[:, None], other=0).to(tl.int32)
    if sf is None:
        values = _unpack(words)
    else:
        values = _decode(words, _scale(tl.load(sf + block, mask=exists, other=0).to(tl.int32)))
    return values


@triton.jit
def _gradients(grad, gate, up, NATIVE: tl.constexpr):
    """Return those of gate and up, and the one of the weight, all of them without the weight."""
    sigmoid = _over_exp(tl.full(gate.shape, 1.0, tl.float32), gate, NATIVE)
    silu = gate * sigmoid
    grad_up = grad * silu
    return grad * up * (sigmoid + silu * (1.0 - sigmoid)), grad_up, grad_up * up


@triton.jit(do_not_specialize=["num_groups"], do_not_specialize_on_alignment=["weights"])
def swiglu_backward(
    grad_h,
    saved,
    sf,
    weights,
    grad_x,
    partials,
    num_groups,
    GROUPS_PER_ROW: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Write the gradient of x; with weights also each group's sum of the gradient of its row's weight."""
    block, gate_block, up_block, exists = _blocks(num_groups, GROUPS_PER_ROW, BLOCK_GROUPS)

    grad = tl.load(grad_h + _words(block), mask=exists[:, None], other=0)
    gate_low, gate_high = _load(saved, sf, gate_block, exists)
    up_low, up_high = _load(saved, sf, up_block, exists)
    grad_low, grad_high = _unpack(grad)

    gate_low, up_low, product_low = _gradients(grad_low, gate_low, up_low, NATIVE)
    gate_high, up_high, product_high = _gradients(grad_high, gate_high, up_high, NATIVE)
    if weights is not None:
        group, row, group_exists = _groups(num_groups, GROUPS_PER_ROW, BLOCK_GROUPS)
        sums = tl.reshape(tl.sum(product_low + product_high, axis=1), [BLOCK_GROUPS, BLOCKS])
        tl.store(partials + group, tl.sum(sums, axis=1), mask=group_exists)
        weight = _per_block(tl.load(weights + row, mask=group_exists, other=0.0), BLOCK_GROUPS)[:, None]
        gate_low *= weight
        gate_high *= weight
        up_low *= weight
        up_high *= weight
    tl.store(grad_x + _columns(gate_block), _bf16(_pairs(gate_low, gate_high, BLOCK_GROUPS), NATIVE), exists[:, None])
    tl.store(grad_x + _columns(up_block), _bf16(_pairs(up_low, up_high, BLOCK_GROUPS), NATIVE), exists[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def sum_rows(partials, out, num_rows, NUM_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Add up the rows of `[num_rows, NUM_COLUMNS]`, in an order that its shape alone decides."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    mask = (row < num_rows)[:, None] & (column < NUM_COLUMNS)[None, :]
    values = tl.load(partials + row[:, None] * NUM_COLUMNS + column[None, :], mask=mask, other=0.0)
    tl.store(out + row, tl.sum(values, axis=1), mask=row < num_rows)
