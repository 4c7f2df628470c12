"""SwiGLU fused with its conversions: BF16 to FP8 and MXFP4 forward, from MXFP4 backward; in BF16 too. By Triton."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import torch

from qcomm import reference, reference_swiglu, validate
from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE, MAXIMUM_RULES, ScaleRule
from qcomm.ops import codec
from qcomm.ops.triton_kernels import load
from qcomm.tensors import FP8Tensor, MXFP4Tensor

MAX_GROUPS = 2**30
"""Kernels number groups of 128 in an int, and may go past the last by a tile."""
FORWARD_GROUPS_PER_WARP = 4
"""A thread has 16 elements of h: its FP8 codes are one 16-byte store."""
WEIGHTED_GROUPS_PER_WARP = 8
"""With weights twice as many, so that as many loads are under way while the weights come."""
BACKWARD_GROUPS_PER_WARP = 4
_WARPS = 4
_BACKWARD_WARPS = 2
_PROGRAMS_TO_FILL = 256
"""Below so many programs of `_WARPS` warps, programs are of one, to reach more SMs."""
_SUM_TILE = 1024


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program takes: groups of 128 elements of h, by so many warps."""

    groups: int
    num_warps: int


def pick_tile(num_groups: int, groups_per_warp: int, num_warps: int = _WARPS) -> Tile:
    """Pick the tile, of so many warps if enough programs remain; results do not depend on it."""
    fills = num_groups >= _PROGRAMS_TO_FILL * _WARPS * groups_per_warp
    num_warps = num_warps if fills else 1
    return Tile(groups_per_warp * num_warps, num_warps)


def sum_tile(groups_per_row: int) -> tuple[int, int]:
    """Pick rows and columns of a program that adds up rows; a function of the columns alone, as is the order."""
    columns = 1 << (groups_per_row - 1).bit_length()
    return max(1, _SUM_TILE // columns), columns


def swiglu_forward(
    x: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    scale_rule: ScaleRule = ScaleRule.EVEN,
    out: tuple[FP8Tensor, MXFP4Tensor] | None = None,
) -> tuple[FP8Tensor, MXFP4Tensor]:
    """SwiGLU in FP8 for the next product, and its input in MXFP4 for the backward pass; one pass on the current stream.

    h = silu(gate) * up, times the row's weight where there are weights, in float32, in that order. CPU tensors run the
    oracle. Not differentiable; no host synchronisation. The first call with new F, or with or without weights, compiles
    a kernel, as may the first with few or many rows, so make one of the same shape before capturing a CUDA graph.

    The MXFP4 tensor has the oracle's bits, `quantize_mxfp4(x)`. h differs from the oracle's by a relative error of
    2^-16, because exp and the quotient are approximate, and is then converted exactly: less than one code in a thousand
    is the neighbour of the oracle's, and a scale is half or twice the oracle's only where the maximum is that near to
    where the scale steps. A silu below 2^-126 counts as 0, and so does that of every gate of -87.5 and less.

    Args:
        x: `[rows, 2 * F]` bfloat16, gate then up, F a multiple of 128; copied first if it is not contiguous.
        weights: `[rows]` float32.
        scale_rule: how a block of 32 of x picks its scale; not QUEST.
        out: tensors to write, contiguous and on 16-byte boundaries; the FP8 scales are ROW_MAJOR.

    Returns:
        h, `[rows, F]`, scales powers of two; a group of 128 with a NaN or an Inf is NaN throughout. And x,
        `[rows, 2 * F]`; a block with a NaN or an Inf gets scale byte 255 and codes 0.

    Raises:
        TypeError: a dtype or an option of the wrong type.
        ValueError: a shape, a rule or an `out` that does not fit.
        QcommUnsupportedError: a CUDA tensor where Triton is not installed.
    """
    _check_columns("x", x, 2)
    rows, columns = x.shape[0], x.shape[1] // 2
    _check_weights(weights, rows, x.device)
    validate.instance("scale_rule", scale_rule, ScaleRule)
    validate.one_of("scale_rule", scale_rule, MAXIMUM_RULES)
    if out is None:
        h = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
        h_sf = torch.empty(rows, columns // FP8_GROUP_SIZE, dtype=torch.float32, device=x.device)
        qdata = torch.empty(rows, columns, dtype=torch.uint8, device=x.device)
        sf = torch.empty(rows, 2 * columns // BLOCK_SIZE, dtype=torch.uint8, device=x.device)
    else:
        (h, h_sf), (qdata, sf) = (out[0].data, out[0].sf), (out[1].qdata, out[1].sf)
        codec.check_out("out[0].data", h, (rows, columns), torch.float8_e4m3fn, x.device)
        codec.check_out("out[0].sf", h_sf, (rows, columns // FP8_GROUP_SIZE), torch.float32, x.device)
        codec.check_out("out[1].qdata", qdata, (rows, columns), torch.uint8, x.device)
        codec.check_out("out[1].sf", sf, (rows, 2 * columns // BLOCK_SIZE), torch.uint8, x.device)
    # As bytes, because torch's checks of operators compute with what they get.
    codes = h.view(torch.uint8)
    _swiglu_forward(x.detach(), _detach(weights), codes, h_sf, qdata, sf, MAXIMUM_RULES.index(scale_rule))
    return FP8Tensor(h, h_sf), MXFP4Tensor(qdata, sf)


def swiglu_bf16(x: torch.Tensor, *, weights: torch.Tensor | None = None) -> torch.Tensor:
    """SwiGLU in BF16, without any conversion, by the kernel of `swiglu_forward`, whose notes hold here too.

    Args:
        x: `[rows, 2 * F]` bfloat16, gate then up, F a multiple of 128; copied first if it is not contiguous.
        weights: `[rows]` float32.

    Returns:
        h, `[rows, F]` bfloat16: the oracle's or a neighbour.

    Raises:
        TypeError, ValueError, QcommUnsupportedError: as `swiglu_forward`.
    """
    _check_columns("x", x, 2)
    _check_weights(weights, x.shape[0], x.device)
    h = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.bfloat16, device=x.device)
    _swiglu_bf16(x.detach(), _detach(weights), h)
    return h


def swiglu_backward(
    grad_h: torch.Tensor,
    saved: MXFP4Tensor | torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of SwiGLU at the input that was saved in MXFP4 or BF16, in one pass on the current stream.

    gate and up are decoded exactly, the maths is float32. CPU tensors run the oracle. Not differentiable; no host
    synchronisation; compiles when `swiglu_forward` would. The same input gives the same bits, and those of a row do not
    depend on the others.

    grad_x is the oracle's or a neighbouring bfloat16. A gradient of a weight differs from the oracle's by at most 2^-16
    of the sum of the magnitudes that it adds up.

    Args:
        grad_h: `[rows, F]` bfloat16, F a multiple of 128; copied first if it is not contiguous.
        saved: of shape `[rows, 2 * F]`; an MXFP4Tensor, neither rotated nor prescaled, or bfloat16. Parts that are not
            contiguous are copied first.
        weights: `[rows]` float32, those of the forward pass.
        out: tensors to write, contiguous and on 16-byte boundaries; the second is None without weights.

    Returns:
        grad_x, `[rows, 2 * F]` bfloat16, and with weights their gradient, `[rows]` float32: the sum of
        grad_h * silu(gate) * up over the row.

    Raises:
        TypeError: a dtype of the wrong type, or `saved` is no tensor.
        ValueError: a shape or an `out` that does not fit, or a rotated or prescaled `saved`.
        QcommUnsupportedError: a CUDA tensor where Triton is not installed.
    """
    _check_columns("grad_h", grad_h, 1)
    rows, columns = grad_h.shape
    kept, kept_sf = _saved(saved, (rows, columns), grad_h.device)
    _check_weights(weights, rows, grad_h.device)
    if out is None:
        grad_x = torch.empty(rows, 2 * columns, dtype=torch.bfloat16, device=grad_h.device)
        grad_weights = None if weights is None else torch.empty(rows, dtype=torch.float32, device=grad_h.device)
    else:
        grad_x, grad_weights = out
        codec.check_out("out[0]", grad_x, (rows, 2 * columns), torch.bfloat16, grad_h.device)
        if (grad_weights is None) != (weights is None):
            want, got = ("a tensor", "None") if grad_weights is None else ("None without weights", "a tensor")
            raise ValueError(f"out[1] must be {want}, got {got}")
        if grad_weights is not None:
            codec.check_out("out[1]", grad_weights, (rows,), torch.float32, grad_h.device)
    _swiglu_backward(grad_h.detach(), kept, kept_sf, _detach(weights), grad_x, grad_weights)
    return grad_x, grad_weights


def _saved(
    saved: MXFP4Tensor | torch.Tensor, shape: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check what was saved and take it apart; `shape` is that of h, and of the codes."""
    validate.instance("saved", saved, MXFP4Tensor, torch.Tensor)
    if isinstance(saved, torch.Tensor):
        whole = (shape[0], 2 * shape[1])
        validate.tensor("saved", saved, shape=whole, dtypes=(torch.bfloat16,), device=device, contiguous=False)
        return saved.detach(), None
    if not saved.is_plain:
        raise ValueError(
            f"saved must be neither rotated nor prescaled, got hadamard={saved.hadamard}, prescaled={saved.prescaled}"
        )
    codec.check_out("saved.qdata", saved.qdata, shape, torch.uint8, device)
    return saved.qdata, saved.sf


def _check_columns(name: str, x: torch.Tensor, halves: int) -> None:
    validate.instance(name, x, torch.Tensor)
    if x.dtype != torch.bfloat16:
        raise TypeError(f"{name} must be torch.bfloat16, got {x.dtype}")
    multiple = halves * FP8_GROUP_SIZE
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % multiple:
        raise ValueError(f"{name}.shape must be (rows, a positive multiple of {multiple}), got {tuple(x.shape)}")
    if x.numel() // multiple > MAX_GROUPS:
        raise ValueError(f"{name} must have at most {MAX_GROUPS * multiple} elements, got {x.numel()}")


def _check_weights(weights: torch.Tensor | None, rows: int, device: torch.device) -> None:
    if weights is not None:
        validate.tensor("weights", weights, shape=(rows,), dtypes=(torch.float32,), device=device, contiguous=False)


def _detach(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


def kernels() -> ModuleType:
    """Load kernels/swiglu.py, and Triton with it; raises as `load`."""
    return load("swiglu")


def launch_forward(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    h: torch.Tensor,
    h_sf: torch.Tensor | None,
    qdata: torch.Tensor | None,
    sf: torch.Tensor | None,
    scale_rule: ScaleRule,
    *,
    native: bool = True,
    tile: Tile | None = None,
) -> None:
    """Launch the forward kernel on the current stream of the current device; all tensors are flat.

    h is FP8 codes, or without `h_sf` bfloat16.

    With `native` by the GPU's own conversions and fast division, which Triton's interpreter does not have; `tile` is
    `pick_tile`'s unless given.
    """
    groups_per_row = h.shape[1] // FP8_GROUP_SIZE
    num_groups = h.shape[0] * groups_per_row
    if num_groups == 0:
        return
    tile = tile or pick_tile(num_groups, FORWARD_GROUPS_PER_WARP if weights is None else WEIGHTED_GROUPS_PER_WARP)
    kernels().swiglu_forward[(-(-num_groups // tile.groups),)](
        x.view(torch.int32),
        weights,
        h if h_sf is not None else h.view(torch.int16),
        h_sf,
        qdata,
        sf,
        num_groups,
        scale_rule.addend,
        GROUPS_PER_ROW=groups_per_row,
        BLOCK_GROUPS=tile.groups,
        NATIVE=native,
        num_warps=tile.num_warps,
    )


def launch_backward(
    grad_h: torch.Tensor,
    saved: torch.Tensor,
    sf: torch.Tensor | None,
    weights: torch.Tensor | None,
    grad_x: torch.Tensor,
    grad_weights: torch.Tensor | None,
    *,
    native: bool = True,
    tile: Tile | None = None,
) -> None:
    """Launch the backward kernel, and with weights the one that adds up its sums; as `launch_forward`.

    `saved` is MXFP4 codes, or without `sf` bfloat16.
    """
    rows, groups_per_row = grad_h.shape[0], grad_h.shape[1] // FP8_GROUP_SIZE
    num_groups = rows * groups_per_row
    if num_groups == 0:
        return
    tile = tile or pick_tile(num_groups, BACKWARD_GROUPS_PER_WARP, _BACKWARD_WARPS)
    partials = None
    if grad_weights is not None:
        partials = torch.empty(rows, groups_per_row, dtype=torch.float32, device=grad_h.device)
    kernels().swiglu_backward[(-(-num_groups // tile.groups),)](
        grad_h.view(torch.int32),
        saved if sf is not None else saved.view(torch.int32),
        sf,
        weights,
        grad_x.view(torch.int16),
        partials,
        num_groups,
        GROUPS_PER_ROW=groups_per_row,
        BLOCK_GROUPS=tile.groups,
        NATIVE=native,
        num_warps=tile.num_warps,
    )
    if grad_weights is not None:
        block_rows, block_columns = sum_tile(groups_per_row)
        kernels().sum_rows[(-(-rows // block_rows),)](
            partials,
            grad_weights,
            rows,
            NUM_COLUMNS=groups_per_row,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=_WARPS,
        )


@torch.library.custom_op("qcomm::swiglu_forward", mutates_args=("h", "h_sf", "qdata", "sf"))
def _swiglu_forward(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    h: torch.Tensor,
    h_sf: torch.Tensor,
    qdata: torch.Tensor,
    sf: torch.Tensor,
    scale_rule: int,
) -> None:
    rule = MAXIMUM_RULES[scale_rule]
    if x.device.type != "cuda":
        fp8, saved = reference_swiglu.swiglu_forward(x, weights, rule)
        h.copy_(fp8.data.view(torch.uint8))
        h_sf.copy_(fp8.sf)
        qdata.copy_(saved.qdata)
        sf.copy_(saved.sf)
        return
    for name, part in (("out[0].data", h), ("out[0].sf", h_sf), ("out[1].qdata", qdata), ("out[1].sf", sf)):
        codec.check_flat(name, part)
    with torch.cuda.device(x.device):
        launch_forward(codec.flat(x), _contiguous(weights), h, h_sf, qdata, sf, rule)


_swiglu_forward.register_fake(codec.only_writes)


@torch.library.custom_op("qcomm::swiglu_bf16", mutates_args=("h",))
def _swiglu_bf16(x: torch.Tensor, weights: torch.Tensor | None, h: torch.Tensor) -> None:
    if x.device.type != "cuda":
        h.copy_(reference.to_dtype(reference_swiglu.product(x, weights), torch.bfloat16))
        return
    with torch.cuda.device(x.device):
        launch_forward(codec.flat(x), _contiguous(weights), h, None, None, None, ScaleRule.EVEN)


_swiglu_bf16.register_fake(codec.only_writes)


@torch.library.custom_op("qcomm::swiglu_backward", mutates_args=("grad_x", "grad_weights"))
def _swiglu_backward(
    grad_h: torch.Tensor,
    saved: torch.Tensor,
    sf: torch.Tensor | None,
    weights: torch.Tensor | None,
    grad_x: torch.Tensor,
    grad_weights: torch.Tensor | None,
) -> None:
    if grad_h.device.type != "cuda":
        x = saved if sf is None else reference.dequantize_mxfp4(MXFP4Tensor(saved, sf))
        of_x, of_weights = reference_swiglu.gradients(grad_h, x, weights)
        grad_x.copy_(of_x)
        if grad_weights is not None and of_weights is not None:
            grad_weights.copy_(of_weights)
        return
    codec.check_flat("out[0]", grad_x)
    if grad_weights is not None:
        codec.check_flat("out[1]", grad_weights)
    with torch.cuda.device(grad_h.device):
        flat_sf = None if sf is None else codec.flat(sf)
        launch_backward(codec.flat(grad_h), codec.flat(saved), flat_sf, _contiguous(weights), grad_x, grad_weights)


_swiglu_backward.register_fake(codec.only_writes)


def _contiguous(weights: torch.Tensor | None) -> torch.Tensor | None:
    return None if weights is None else weights.contiguous()
