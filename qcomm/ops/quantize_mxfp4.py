"""Quantize to MXFP4: BF16, FP16, FP32 or FP8 in, codes and scale bytes out, one pass."""

from __future__ import annotations

import ctypes
from typing import Literal, overload

import torch

from qcomm import reference, validate
from qcomm.formats import BLOCK_SIZE, Rounding, ScaleRule
from qcomm.jit import KernelSpec
from qcomm.ops import codec
from qcomm.ops.codec import Divisor, pointer
from qcomm.ops.comm import Quantizer
from qcomm.tensors import FP8Tensor, MXFP4Tensor

_RULES, _ROUNDINGS = tuple(ScaleRule), tuple(Rounding)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SOURCES = (*_DTYPES, torch.float8_e4m3fn)
"""What the kernel reads; the index is its number there."""

_THREADS = 128


def _vecs_per_thread(spec: KernelSpec) -> int:
    return dict(spec.constants)["VECS_PER_THREAD"]


class QuantizeMxfp4Params(ctypes.Structure):
    """See `QuantizeMxfp4Params` in kernels/quantize_mxfp4.cu."""

    _fields_ = (
        ("x", ctypes.c_uint64),
        ("x_sf", ctypes.c_uint64),
        ("qdata", ctypes.c_uint64),
        ("sf", ctypes.c_uint64),
        ("clipped", ctypes.c_uint64),
        ("sf_row_stride", ctypes.c_int64),
        ("sf_group_stride", ctypes.c_int64),
        ("num_vecs", ctypes.c_int32),
        ("vecs_per_row", ctypes.c_int32),
        ("by_vecs_per_row", Divisor),
        ("quantizer", Quantizer),
        ("signs", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


def quantize_mxfp4_spec(
    source: torch.dtype,
    scale_rule: ScaleRule,
    rounding: Rounding,
    *,
    hadamard: bool,
    signs: bool,
    clip_mask: bool,
    flat_scales: bool,
) -> KernelSpec:
    """Build the spec; the rules that go by the maximum share one kernel, or two where some let values pass 6."""
    stochastic = rounding is Rounding.STOCHASTIC
    clamps = stochastic and (source == torch.float8_e4m3fn or scale_rule not in (ScaleRule.RCEIL, ScaleRule.CEIL))
    # Of FP8 one block of 32 alone would be too few bytes under way, and after a rotation too little beside the work.
    rotates = hadamard and rounding is Rounding.NEAREST and scale_rule is not ScaleRule.QUEST and not clip_mask
    several = source == torch.float8_e4m3fn or (rotates and source != torch.float32)
    return KernelSpec.of(
        "quantize_mxfp4",
        "quantize_mxfp4",
        source=SOURCES.index(source),
        stochastic=rounding is not Rounding.NEAREST,
        unbiased=rounding is Rounding.UNBIASED,
        hadamard=hadamard,
        signs=signs,
        threads=_THREADS,
        vecs_per_thread=4 if several else 1,
        clamps=clamps,
        flat_scales=flat_scales,
        quest=scale_rule is ScaleRule.QUEST,
        clip_mask=clip_mask,
        sizeof_params=ctypes.sizeof(QuantizeMxfp4Params),
    )


@overload
def quantize_mxfp4(
    x: torch.Tensor | FP8Tensor,
    *,
    scale_rule: ScaleRule = ...,
    rounding: Rounding = ...,
    seed: int = ...,
    hadamard: bool = ...,
    hadamard_seed: int | None = ...,
    return_clip_mask: Literal[False] = ...,
    out: MXFP4Tensor | None = ...,
) -> MXFP4Tensor: ...


@overload
def quantize_mxfp4(
    x: torch.Tensor | FP8Tensor,
    *,
    scale_rule: ScaleRule = ...,
    rounding: Rounding = ...,
    seed: int = ...,
    hadamard: bool = ...,
    hadamard_seed: int | None = ...,
    return_clip_mask: Literal[True],
    out: MXFP4Tensor | None = ...,
) -> tuple[MXFP4Tensor, torch.Tensor]: ...


def quantize_mxfp4(
    x: torch.Tensor | FP8Tensor,
    *,
    scale_rule: ScaleRule = ScaleRule.EVEN,
    rounding: Rounding = Rounding.NEAREST,
    seed: int = 0,
    hadamard: bool = False,
    hadamard_seed: int | None = None,
    return_clip_mask: bool = False,
    out: MXFP4Tensor | None = None,
) -> MXFP4Tensor | tuple[MXFP4Tensor, torch.Tensor]:
    """Quantize to MXFP4 (OCP MX v1.0), in one pass on the current stream.

    CPU tensors run the oracle, with the same bits. Not differentiable; no host synchronisation. The first call with a
    new combination of options compiles a kernel, so make one before capturing a CUDA graph.

    Args:
        x: `[..., K]` bfloat16, float16 or float32, K a multiple of 32; copied first if it is not contiguous. Or an
            FP8Tensor with float32 scales of any strides, whose exact products are rounded once.
        scale_rule: how a block of 32 picks its scale. QUEST (arXiv 2505.14669) needs `hadamard` and NEAREST.
        rounding: NEAREST (ties to even, saturating), STOCHASTIC, or UNBIASED, which needs FLOOR.
        seed: 64 bits; the random bits of an element depend on it and on the element's position alone.
        hadamard: rotate each block by the normalised 32-point Hadamard matrix first.
        hadamard_seed: negate elements of every block at random, by this 64-bit seed, before the rotation; None negates
            none. The signs go with the result (`MXFP4Tensor.hadamard_signs`).
        return_clip_mask: also return which elements were clipped.
        out: tensors to write, contiguous and on 16-byte boundaries; its flags are not read.

    Returns:
        The MXFP4Tensor. A block with a NaN or an Inf gets scale byte 255 and codes 0. With `return_clip_mask`, also
        bool `[..., K]`: True where the (rotated) magnitude is 6 scales or more, which is where the gradient of QUEST
        is 0; all False in a block with a NaN or an Inf.

    Raises:
        TypeError: a dtype or an option of the wrong type.
        ValueError: K is no multiple of 32, options that do not go together, or an `out` that does not fit.
    """
    _check(x, scale_rule, rounding, seed, hadamard, hadamard_seed)
    signs = 0 if hadamard_seed is None else reference.hadamard_signs(hadamard_seed)
    data, x_sf = (x.data, x.sf) if isinstance(x, FP8Tensor) else (x.detach(), None)
    *lead, columns = x.shape
    if out is None:
        qdata = torch.empty(*lead, columns // 2, dtype=torch.uint8, device=x.device)
        sf = torch.empty(*lead, columns // BLOCK_SIZE, dtype=torch.uint8, device=x.device)
    else:
        qdata, sf = out.qdata, out.sf
        codec.check_out("out.qdata", qdata, (*lead, columns // 2), torch.uint8, x.device)
        codec.check_out("out.sf", sf, (*lead, columns // BLOCK_SIZE), torch.uint8, x.device)
    clipped = torch.empty(*lead, columns, dtype=torch.bool, device=x.device) if return_clip_mask else None
    numbers = _RULES.index(scale_rule), _ROUNDINGS.index(rounding)
    _quantize_mxfp4(data, x_sf, qdata, sf, clipped, *numbers, validate.signed64(seed), hadamard, signs)
    q = MXFP4Tensor(qdata, sf, hadamard, signs, rounding is Rounding.UNBIASED)
    return q if clipped is None else (q, clipped)


def _check(
    x: torch.Tensor | FP8Tensor,
    scale_rule: ScaleRule,
    rounding: Rounding,
    seed: int,
    hadamard: bool,
    hadamard_seed: int | None,
) -> None:
    if isinstance(x, FP8Tensor):
        if x.is_packed:
            raise TypeError(f"x.sf must be torch.float32, got {x.sf.dtype}")
    elif not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor or an FP8Tensor, got {type(x).__name__}")
    elif x.dtype not in _DTYPES:
        raise TypeError(f"x must be bfloat16, float16, float32 or an FP8Tensor, got {x.dtype}")
    if not x.shape or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"x.shape[-1] must be a multiple of {BLOCK_SIZE}, got shape {tuple(x.shape)}")
    validate.instance("scale_rule", scale_rule, ScaleRule)
    validate.instance("rounding", rounding, Rounding)
    validate.boolean("hadamard", hadamard)
    validate.seed(seed)
    reference.check_quantizer(scale_rule, rounding, hadamard)
    if hadamard_seed is not None:
        validate.seed(hadamard_seed, "hadamard_seed")
        if not hadamard:
            raise ValueError(f"hadamard_seed must be None without hadamard, got {hadamard_seed}")


@torch.library.custom_op("qcomm::quantize_mxfp4", mutates_args=("qdata", "sf", "clipped"))
def _quantize_mxfp4(
    x: torch.Tensor,
    x_sf: torch.Tensor | None,
    qdata: torch.Tensor,
    sf: torch.Tensor,
    clipped: torch.Tensor | None,
    scale_rule: int,
    rounding: int,
    seed: int,
    hadamard: bool,
    signs: int,
) -> None:
    rule, how = _RULES[scale_rule], _ROUNDINGS[rounding]
    seed = seed % 2**64
    if x.device.type != "cuda":
        source = x if x_sf is None else FP8Tensor(x, x_sf)
        q, mask = reference.quantize_mxfp4_clip_mask(source, rule, how, seed=seed, hadamard=hadamard, signs=signs)
        qdata.copy_(q.qdata)
        sf.copy_(q.sf)
        if clipped is not None:
            clipped.copy_(mask)
        return
    codec.check_flat("out.qdata", qdata)
    codec.check_flat("out.sf", sf)
    x = codec.flat(x)
    num_vecs, vecs_per_row = codec.count_vecs(x, BLOCK_SIZE), x.shape[-1] // BLOCK_SIZE
    row_stride, group_stride = (0, 0) if x_sf is None else x_sf.stride()
    params = QuantizeMxfp4Params(
        x.data_ptr(),
        pointer(x_sf),
        qdata.data_ptr(),
        sf.data_ptr(),
        pointer(clipped),
        row_stride,
        group_stride,
        num_vecs,
        vecs_per_row,
        Divisor.of(max(1, vecs_per_row)),
        Quantizer(rule.addend, seed & 0xFFFFFFFF, seed >> 32, 0),
        signs,
    )
    spec = quantize_mxfp4_spec(
        x.dtype,
        rule,
        how,
        hadamard=hadamard,
        signs=signs != 0,
        clip_mask=clipped is not None,
        flat_scales=x_sf is not None and x_sf.is_contiguous(),
    )
    codec.launch(spec, x, codec.blocks(num_vecs, _vecs_per_thread(spec), _THREADS), params, _THREADS)


_quantize_mxfp4.register_fake(codec.only_writes)
