"""FP8 in bits, for kernels in Triton: what swiglu.py and quantize_fp8.py share. Bits as in qcomm/reference.py."""

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def bits_of(x):
    """Return the bits of a float32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    """Return the float32 of bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e4m3(x, NATIVE: tl.constexpr):
    """Round to E4M3 codes, nearest even, |x| <= 448 or NaN; Triton's interpreter needs the long way."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = bits_of(tl.abs(x))
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = bits_of(tl.abs(x) + 16384.0) - 0x46800000
    code = tl.where(bits < (121 << 23), subnormal, normal)
    return tl.where(bits > INFINITY_BITS, 0x7F, code | ((bits_of(x) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def fp8_scale(amax):
    """Return the scale of a group whose largest magnitude has these bits, and the factor to multiply by.

    The scale is the smallest power of two with amax / scale <= 448 = 1.75 * 2^8, at least 2^-126. Where amax is not
    finite it is 2^-126, and the factor NaN, which makes every code NaN.
    """
    finite = amax < INFINITY_BITS
    biased = tl.where(finite, tl.maximum(((amax + 0x1FFFFF) >> 23) - 8, 1), 1)
    return as_float(biased << 23), as_float(tl.where(finite, (254 - biased) << 23, 0x7FFFFFFF))
