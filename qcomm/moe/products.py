"""Products of groups of rows with experts' weights, by what the machine has.

Two of them: `grouped_mm`, rows times weights, for the forward pass and the gradient of rows; and `grouped_wgrad`, the
gradient of weights. Operands say what is computed: bfloat16, or FP8 with 1x128, 128x128 and 128x1 scales. Where no FP8
product runs, the same FP8 values are decoded to bfloat16, exactly, and multiplied there: slower, and the same numbers
up to the order of addition.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import warnings
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
import torch.nn.functional as F

from qcomm import reference
from qcomm.formats import FP8_GROUP_SIZE
from qcomm.handle import DispatchHandle
from qcomm.moe.quantize import FP8BlockTensor, dequantize_weights, quantize_rows, quantize_weights
from qcomm.ops.fp8_transpose import fp8_transpose
from qcomm.tensors import FP8ColumnwiseTensor, FP8Tensor

Product = Literal["mm", "wgrad"]
Backend = Literal["torch_fp8", "deep_gemm", "torch_fp8_loop", "torch_bf16", "loop", "reference"]

FP8_BACKENDS: tuple[Backend, ...] = ("torch_fp8", "deep_gemm", "torch_fp8_loop")
"""Torch's scaled grouped product, DeepGEMM, and torch's scaled product expert by expert."""
BF16_BACKENDS: tuple[Backend, ...] = ("torch_bf16", "loop")

_FP8_ORDER: dict[Product, tuple[Backend, ...]] = {
    "mm": FP8_BACKENDS,
    # DeepGEMM adds to float32 there: zeros before, rounding after, 18 bytes moved for an element that has 2.
    "wgrad": ("torch_fp8", "torch_fp8_loop", "deep_gemm"),
}
"""What is taken, the first that runs."""
_SCALES_MULTIPLE = 4
_PROBE_ERROR = 2.0**-6
"""Largest relative error of a probe's result: of bfloat16's rounding and FP8 accumulation, not of a wrong scale."""


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Which rows belong to which expert.

    Args:
        offsets: `[num_experts + 1]` int32 on the rows' device: first row of each expert, and the end of the last.
        on_host: the same on the host where it is known; where not, what needs it waits for the device.
    """

    offsets: torch.Tensor
    on_host: tuple[int, ...] | None = None

    @classmethod
    def of(cls, handle: DispatchHandle) -> Groups:
        """Return the groups of an "expert_major" dispatch."""
        assert handle.group_offsets is not None
        counts = handle.num_tokens_per_expert_list
        if counts is None:
            return cls(handle.group_offsets)
        padded = (-(-count // handle.alignment) * handle.alignment for count in counts)
        return cls(handle.group_offsets, tuple(itertools.accumulate(padded, initial=0)))

    def host(self) -> tuple[int, ...]:
        """Return the offsets on the host; waits for the device where they are not there."""
        return self.on_host if self.on_host is not None else tuple(self.offsets.tolist())

    def experts(self, num_rows: int) -> torch.Tensor:
        """Return each row's expert, `[num_rows]` int32, -1 past the last group; computed once for a number of rows."""
        if num_rows not in self._experts:
            rows = torch.arange(num_rows, dtype=torch.int32, device=self.offsets.device)
            found = torch.searchsorted(self.offsets[1:], rows, right=True, out_int32=True)
            self._experts[num_rows] = torch.where(found < self.offsets.numel() - 1, found, -1)
        return self._experts[num_rows]

    @functools.cached_property
    def _experts(self) -> dict[int, torch.Tensor]:
        return {}

    def argument(self) -> list[int] | torch.Tensor:
        """Return the offsets as the column-wise conversions take them."""
        return self.offsets if self.on_host is None else list(self.on_host)

    def spans(self) -> list[tuple[int, int]]:
        """Return first row and end of each expert's rows, on the host."""
        return list(itertools.pairwise(self.host()))


Rows = torch.Tensor | FP8Tensor
Weights = torch.Tensor | FP8BlockTensor
Columns = torch.Tensor | FP8ColumnwiseTensor


def grouped_mm(x: Rows, w: Weights, groups: Groups) -> torch.Tensor:
    """Multiply each expert's rows with its weights: `x[a:b] @ w[e].T`.

    Args:
        x: `[rows, K]` bfloat16, or an FP8Tensor with row-major float32 scales.
        w: `[num_experts, N, K]` bfloat16, or an FP8BlockTensor if x is FP8.
        groups: multiples of 128 for FP8.

    Returns:
        `[rows, N]` bfloat16; rows past the last group are unspecified.

    Raises:
        TypeError: one operand is FP8 and the other is not.
    """
    _same_kind(x, w)
    if x.shape[0] == 0:
        return torch.empty(0, w.shape[1], dtype=torch.bfloat16, device=x.device)
    backend = _pick("mm", isinstance(x, FP8Tensor), x.device)
    # Operands say what is computed, not autocast.
    with torch.autocast(x.device.type, enabled=False):
        return _MM[backend](x, w, groups)


def grouped_wgrad(d_y: Columns, x: Columns, groups: Groups, shape: tuple[int, ...]) -> torch.Tensor:
    """Compute the gradient of weights: `d_y[a:b].T @ x[a:b]` for each expert; zeros for one without rows.

    Args:
        d_y: `[rows, N]` bfloat16, or an FP8ColumnwiseTensor of these groups.
        x: `[rows, K]`, as d_y.
        groups: multiples of 128 for FP8.
        shape: `(num_experts, N, K)`.

    Returns:
        `[num_experts, N, K]` bfloat16 or float32.

    Raises:
        TypeError: one operand is FP8 and the other is not.
    """
    _same_kind(d_y, x)
    data = x.data if isinstance(x, FP8ColumnwiseTensor) else x
    if data.shape[0] == 0:
        return torch.zeros(shape, dtype=torch.bfloat16, device=data.device)
    backend = _pick("wgrad", isinstance(x, FP8ColumnwiseTensor), data.device)
    with torch.autocast(data.device.type, enabled=False):
        return _WGRAD[backend](d_y, x, groups, shape)


def choose(product: Product, fp8: bool, device_type: str, runs: Collection[Backend]) -> Backend:
    """Choose what computes a product.

    Args:
        product: which one.
        fp8: whether the operands are FP8.
        device_type: where they are.
        runs: what has been found to run there.

    Returns:
        On the CPU the reference. On CUDA the first that runs of, for FP8 operands, FP8_BACKENDS in the product's order;
        then torch's BF16 grouped product and a loop over the experts.
    """
    if device_type != "cuda":
        return "reference"
    order = (*_FP8_ORDER[product], *BF16_BACKENDS) if fp8 else BF16_BACKENDS
    return next(backend for backend in order if backend == "loop" or backend in runs)


@functools.cache
def probe(product: Product, device: torch.device) -> dict[Backend, str]:
    """Try every backend on one small product and compare; synchronises with the host, so not while capturing a graph.

    Returns:
        What does not run on this device, and why; a result that is off is a reason too.
    """
    found: dict[Backend, str] = {}
    for backend in (*FP8_BACKENDS, *BF16_BACKENDS):
        try:
            error = _probe_error(product, backend, device)
        except Exception as raised:
            found[backend] = f"{type(raised).__name__}: {raised}".split(". ")[0].splitlines()[0]
        else:
            if not error < _PROBE_ERROR:
                found[backend] = f"a relative error of {error:.3g} in a product that was tried"
    return found


def _pick(product: Product, fp8: bool, device: torch.device) -> Backend:
    if device.type != "cuda":
        return choose(product, fp8, device.type, ())
    absent = probe(product, device)
    running = [name for name in (*FP8_BACKENDS, *BF16_BACKENDS) if name not in absent]
    backend = choose(product, fp8, device.type, running)
    if fp8 and backend not in FP8_BACKENDS:
        reasons = "; ".join(f"{name}: {absent[name]}" for name in FP8_BACKENDS)
        _notice(
            f"no FP8 product ({product}) runs on {device}, its operands are multiplied in BF16 by {backend}. {reasons}"
        )
    elif backend == "loop":
        _notice(
            f"no grouped product ({product}) runs on {device}, experts are computed in turn: {absent['torch_bf16']}"
        )
    return backend


@functools.cache
def _notice(message: str) -> None:
    """Say it once."""
    warnings.warn(message, stacklevel=4)


def _same_kind(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
        raise TypeError(f"both operands must be bfloat16 or both FP8, got {type(a).__name__} and {type(b).__name__}")


def _probe_error(product: Product, backend: Backend, device: torch.device) -> float:
    """Run one backend on three experts, one of them without rows; returns the error against the reference."""
    generator = torch.Generator().manual_seed(0)
    spans, height, width = (0, 128, 128, 384), 256, 384

    def random(*shape: int) -> torch.Tensor:
        # Scales differ from tile to tile, so that one in the wrong place shows.
        sizes = torch.exp2(torch.randint(-3, 4, (*shape[:-1], shape[-1] // FP8_GROUP_SIZE), generator=generator))
        values = torch.randn(shape, generator=generator) * sizes.repeat_interleave(FP8_GROUP_SIZE, -1)
        return values.to(device, torch.bfloat16)

    groups = Groups(torch.tensor(spans, dtype=torch.int32, device=device), spans)
    x, d_y, w = random(spans[-1], width), random(spans[-1], height), random(len(spans) - 1, height, width)
    fp8 = backend in FP8_BACKENDS
    if product == "mm":
        rows, weights = (quantize_rows(x), quantize_weights(w)) if fp8 else (x, w)
        got, want = (_MM[name](rows, weights, groups) for name in (backend, "reference"))
    else:
        left, right = (fp8_transpose(quantize_rows(each), spans) if fp8 else each for each in (d_y, x))
        got, want = (_WGRAD[name](left, right, groups, tuple(w.shape)) for name in (backend, "reference"))
    return float((got.double() - want.double()).norm() / want.double().norm())


def decode_rows(x: Rows, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return rows in bfloat16 or float32; powers of two as scales make it exact."""
    return reference.dequantize_fp8(x, dtype) if isinstance(x, FP8Tensor) else x.to(dtype)


def decode_weights(w: Weights, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return weights in bfloat16 or float32."""
    return dequantize_weights(w, dtype) if isinstance(w, FP8BlockTensor) else w.to(dtype)


def decode_columns(x: Columns, width: int, groups: Groups, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return the rows `[rows, width]` that a column-wise tensor holds; those past the last group are zeros."""
    if isinstance(x, torch.Tensor):
        return x.to(dtype)
    out = torch.zeros(x.data.numel() // width, width, dtype=dtype, device=x.device)
    first = 0
    for a, b in groups.spans():
        tiles = -(-(b - a) // FP8_GROUP_SIZE)
        block = x.data[a * width : b * width].view(width, b - a).t().to(torch.float32)
        scales = x.sf[first : first + tiles].repeat_interleave(FP8_GROUP_SIZE, 0)[: b - a]
        out[a:b] = (block * scales).to(dtype)
        first += tiles
    return out


def _loop_mm(x: Rows, w: Weights, groups: Groups, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    rows, weights = decode_rows(x, dtype), decode_weights(w, dtype)
    out = torch.zeros(rows.shape[0], weights.shape[1], dtype=torch.bfloat16, device=rows.device)
    for expert, (a, b) in enumerate(groups.spans()):
        out[a:b] = rows[a:b] @ weights[expert].t()
    return out


def _loop_wgrad(
    d_y: Columns, x: Columns, groups: Groups, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    left, right = (decode_columns(each, width, groups, dtype) for each, width in zip((d_y, x), shape[1:], strict=True))
    out = torch.zeros(shape, dtype=dtype, device=left.device)
    for expert, (a, b) in enumerate(groups.spans()):
        out[expert] = left[a:b].t() @ right[a:b]
    return out


def _torch_bf16_mm(x: Rows, w: Weights, groups: Groups) -> torch.Tensor:
    return F.grouped_mm(decode_rows(x), decode_weights(w).transpose(1, 2), offs=groups.offsets[1:])


def _torch_bf16_wgrad(d_y: Columns, x: Columns, groups: Groups, shape: tuple[int, ...]) -> torch.Tensor:
    left, right = (decode_columns(each, width, groups) for each, width in zip((d_y, x), shape[1:], strict=True))
    out = F.grouped_mm(left.t(), right, offs=groups.offsets[1:])
    # It leaves what is there where an expert has no rows.
    if groups.on_host is None:
        return torch.where(groups.offsets.diff().view(-1, 1, 1) > 0, out, 0)
    for each, (a, b) in zip(out.unbind(), groups.spans(), strict=True):
        if a == b:
            each.zero_()
    return out


def _torch_fp8_mm(x: Rows, w: Weights, groups: Groups) -> torch.Tensor:
    assert isinstance(x, FP8Tensor)
    assert isinstance(w, FP8BlockTensor)
    by_row, by_block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    functional: Any = F
    return functional.scaled_grouped_mm(
        x.data,
        w.data.transpose(1, 2),
        x.sf,
        by_row,
        w.sf,
        by_block,
        offs=groups.offsets[1:],
        output_dtype=torch.bfloat16,
    )


def _torch_fp8_wgrad(d_y: Columns, x: Columns, groups: Groups, shape: tuple[int, ...]) -> torch.Tensor:
    raise NotImplementedError("torch has no scaled grouped product of transposed blocks with 128x1 scales")


def _torch_fp8_loop_mm(x: Rows, w: Weights, groups: Groups) -> torch.Tensor:
    assert isinstance(x, FP8Tensor)
    assert isinstance(w, FP8BlockTensor)
    spans = groups.spans()
    sizes = [b - a for a, b in spans]
    rest = x.shape[0] - sum(sizes)
    out = torch.empty(x.shape[0], w.shape[1], dtype=torch.bfloat16, device=x.device)
    # An expert's scales are taken by columns.
    tiles = x.sf.shape[1]
    columns = torch.empty(x.sf.shape, dtype=x.sf.dtype, device=x.device)
    scales = [columns.as_strided((b - a, tiles), (1, max(1, b - a)), a * tiles) for a, b in spans]
    torch._foreach_copy_(scales, x.sf.split([*sizes, rest])[:-1])
    # Of weights a multiple of 4 along K.
    w_scales = F.pad(w.sf, (0, -tiles % _SCALES_MULTIPLE)).transpose(1, 2).unbind()
    weights = w.data.transpose(1, 2).unbind()
    rows, results = x.data.split([*sizes, rest]), out.split([*sizes, rest])
    for expert, size in enumerate(sizes):
        if size:
            operands = rows[expert], weights[expert], scales[expert], w_scales[expert]
            _scaled_mm(*operands, F.ScalingType.BlockWise128x128, results[expert])
    return out


def _torch_fp8_loop_wgrad(d_y: Columns, x: Columns, groups: Groups, shape: tuple[int, ...]) -> torch.Tensor:
    assert isinstance(d_y, FP8ColumnwiseTensor)
    assert isinstance(x, FP8ColumnwiseTensor)
    _, height, width = shape
    out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    left, left_sf = _by_expert(d_y, height, groups)
    right, right_sf = _by_expert(x, width, groups)
    for expert, (each, (a, b)) in enumerate(zip(out.unbind(), groups.spans(), strict=True)):
        if a < b:
            operands = left[expert], right[expert].t(), left_sf[expert], right_sf[expert]
            _scaled_mm(*operands, F.ScalingType.BlockWise1x128, each)
        else:
            each.zero_()
    return out


def _by_expert(
    x: FP8ColumnwiseTensor, width: int, groups: Groups
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return the block `[width, rows]` of each expert, and its scales `[width, rows / 128]`."""
    sizes = [b - a for a, b in groups.spans()]
    rows, tiles = x.data.numel() // width, [size // FP8_GROUP_SIZE for size in sizes]
    blocks = x.data.split([*(size * width for size in sizes), (rows - sum(sizes)) * width])
    scales = x.sf.t().split([*tiles, x.sf.shape[0] - sum(tiles)], dim=1)
    return [block.view(width, size) for block, size in zip(blocks[:-1], sizes, strict=True)], scales[:-1]


def _scaled_mm(
    a: torch.Tensor, b: torch.Tensor, a_sf: torch.Tensor, b_sf: torch.Tensor, b_scaling: Any, out: torch.Tensor
) -> None:
    """What torch.nn.functional.scaled_mm calls, but into memory that is there; a has 1x128 scales."""
    by_row, none = [F.ScalingType.BlockWise1x128.value], ()
    private: Any = torch
    private._scaled_mm_v2(a, b, [a_sf], by_row, none, [b_sf], [b_scaling.value], none, None, out.dtype, none, out=out)


def _deep_gemm_mm(x: Rows, w: Weights, groups: Groups) -> torch.Tensor:
    assert isinstance(x, FP8Tensor)
    assert isinstance(w, FP8BlockTensor)
    experts = groups.experts(x.shape[0])
    out = torch.empty(x.shape[0], w.shape[1], dtype=torch.bfloat16, device=x.device)
    _deep_gemm().m_grouped_fp8_gemm_nt_contiguous((x.data, x.sf), (w.data, w.sf), out, experts)
    return out


def _deep_gemm_wgrad(d_y: Columns, x: Columns, groups: Groups, shape: tuple[int, ...]) -> torch.Tensor:
    assert isinstance(d_y, FP8ColumnwiseTensor)
    assert isinstance(x, FP8ColumnwiseTensor)
    sizes = [b - a for a, b in groups.spans()]
    total = sum(sizes)
    left, right = (
        (each.data[: total * width], each.sf[: total // FP8_GROUP_SIZE].t())
        for each, width in zip((d_y, x), shape[1:], strict=True)
    )
    # It adds to what is there.
    out = torch.zeros(shape, dtype=torch.float32, device=x.device)
    _deep_gemm().k_grouped_fp8_gemm_nt_contiguous(left, right, out, sizes, groups.offsets.diff(), out)
    return out


def _deep_gemm() -> Any:
    return importlib.import_module("deep_gemm")


_MM: dict[Backend, Callable[[Any, Any, Groups], torch.Tensor]] = {
    "torch_fp8": _torch_fp8_mm,
    "deep_gemm": _deep_gemm_mm,
    "torch_fp8_loop": _torch_fp8_loop_mm,
    "torch_bf16": _torch_bf16_mm,
    "loop": _loop_mm,
    "reference": functools.partial(_loop_mm, dtype=torch.float32),
}
_WGRAD: dict[Backend, Callable[[Any, Any, Groups, tuple[int, ...]], torch.Tensor]] = {
    "torch_fp8": _torch_fp8_wgrad,
    "deep_gemm": _deep_gemm_wgrad,
    "torch_fp8_loop": _torch_fp8_loop_wgrad,
    "torch_bf16": _torch_bf16_wgrad,
    "loop": _loop_wgrad,
    "reference": functools.partial(_loop_wgrad, dtype=torch.float32),
}
