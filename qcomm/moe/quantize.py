"""BF16 to E4M3 under the scales that FP8 products take: 1x128 for rows, 128x128 for weights.

CUDA tensors run a kernel, others plain PyTorch, with the same bits.
"""

from __future__ import annotations

import dataclasses

import torch

from qcomm import validate
from qcomm.formats import E4M3_MAX, E4M3_MAX_EXPONENT, E4M3_NAN, FP8_GROUP_SIZE, FP8_MIN_SCALE_EXPONENT
from qcomm.ops import codec
from qcomm.ops.quantize_fp8 import launch_blocks, launch_rows
from qcomm.tensors import FP8Tensor

_FLOAT32_BIAS = 127
_FLOAT32_MANTISSA_BITS = 23


@dataclasses.dataclass(frozen=True, eq=False)
class FP8BlockTensor:
    """Experts' weights in E4M3, one scale per 128x128, as DeepSeek-V3 (arXiv 2412.19437) and its products have them.

    Args:
        data: `[num_experts, N, K]` torch.float8_e4m3fn, contiguous.
        sf: `[num_experts, N // 128, K // 128]` float32, contiguous, powers of two; value is data * sf.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not belong together.
    """

    data: torch.Tensor
    sf: torch.Tensor

    def __post_init__(self) -> None:
        if self.data.dtype != torch.float8_e4m3fn or self.sf.dtype != torch.float32:
            raise TypeError(f"data and sf must be float8_e4m3fn and float32, got {self.data.dtype}, {self.sf.dtype}")
        want = (*self.data.shape[:-2], *(size // FP8_GROUP_SIZE for size in self.data.shape[-2:]))
        if self.data.dim() != 3 or tuple(self.sf.shape) != want:
            raise ValueError(f"sf must be {want} for data {tuple(self.data.shape)}, got {tuple(self.sf.shape)}")

    @property
    def shape(self) -> torch.Size:
        """Shape `[num_experts, N, K]`."""
        return self.data.shape

    def transposed(self) -> FP8BlockTensor:
        """Return `[num_experts, K, N]`, the same values: a tile's scale is that of its transpose."""
        codes = self.data.view(torch.uint8).transpose(1, 2).contiguous()
        return FP8BlockTensor(codes.view(torch.float8_e4m3fn), self.sf.transpose(1, 2).contiguous())


def quantize_rows(x: torch.Tensor) -> FP8Tensor:
    """Quantize rows with 1x128 scales: the bits of `qcomm.reference.quantize_fp8`, without its float64.

    Args:
        x: `[rows, K]` bfloat16, K a multiple of 128.
    """
    if x.device.type == "cuda":
        data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        sf = torch.empty(x.shape[0], x.shape[1] // FP8_GROUP_SIZE, device=x.device)
        with torch.cuda.device(x.device):
            launch_rows(codec.flat(x), data.view(torch.uint8), sf)
        return FP8Tensor(data, sf)
    tiles = x.to(torch.float32).unflatten(-1, (-1, FP8_GROUP_SIZE))
    data, sf = _quantize_tiles(tiles, (-1,))
    return FP8Tensor(data.flatten(-2), sf.squeeze(-1))


def quantize_weights(w: torch.Tensor, *, transposed: bool = False) -> FP8BlockTensor:
    """Quantize experts' weights with 128x128 scales, each the smallest power of two with amax / scale <= 448.

    Nearest even. A tile that holds a NaN or an Inf decodes to NaN throughout; it and an all-zero tile get the scale
    2^-126. No more than one expert is held in float32 at a time.

    Args:
        w: `[num_experts, N, K]` bfloat16 or float32, N and K multiples of 128.
        transposed: return the transposes, `[num_experts, K, N]`: a tile's scale is that of its transpose.

    Raises:
        ValueError: another shape.
    """
    if w.dim() != 3:
        raise ValueError(f"w must have 3 dimensions, got shape {tuple(w.shape)}")
    for axis in (1, 2):
        validate.multiple(f"w.shape[{axis}]", w.shape[axis], FP8_GROUP_SIZE)
    count, height, width = w.shape
    if w.device.type == "cuda" and w.dtype == torch.bfloat16:
        shape = (count, width, height) if transposed else (count, height, width)
        data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=w.device)
        sf = torch.empty(count, shape[1] // FP8_GROUP_SIZE, shape[2] // FP8_GROUP_SIZE, device=w.device)
        with torch.cuda.device(w.device):
            launch_blocks(codec.flat(w), data.view(torch.uint8), sf, transposed=transposed)
        return FP8BlockTensor(data, sf)
    data = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    sf = torch.empty(count, height // FP8_GROUP_SIZE, width // FP8_GROUP_SIZE, device=w.device)
    for expert in range(count):
        tiles = w[expert].to(torch.float32).unflatten(-1, (-1, FP8_GROUP_SIZE)).unflatten(0, (-1, FP8_GROUP_SIZE))
        codes, scales = _quantize_tiles(tiles, (1, 3))
        data[expert].view(torch.uint8).copy_(codes.view(torch.uint8).flatten(2).flatten(0, 1))
        sf[expert] = scales[:, 0, :, 0]
    made = FP8BlockTensor(data, sf)
    return made.transposed() if transposed else made


def dequantize_weights(w: FP8BlockTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Decode to bfloat16 or float32: exact but past the range of the dtype."""
    tiles = w.data.to(torch.float32).unflatten(-1, (-1, FP8_GROUP_SIZE)).unflatten(1, (-1, FP8_GROUP_SIZE))
    return (tiles * w.sf[:, :, None, :, None]).flatten(3).flatten(1, 2).to(dtype)


def _quantize_tiles(values: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize float32 with a scale over some dimensions, which stay as 1 in the scales' shape."""
    amax = values.abs().amax(dims, keepdim=True)
    finite = torch.isfinite(amax)
    mantissa, exponent = torch.frexp(torch.where(finite, amax, 0.0))
    # frexp's mantissa is in [0.5, 1).
    too_large = 2 * mantissa > E4M3_MAX / 2**E4M3_MAX_EXPONENT
    exponent = exponent - 1 - E4M3_MAX_EXPONENT + too_large.to(exponent.dtype)
    exponent = torch.where(amax == 0, FP8_MIN_SCALE_EXPONENT, exponent).clamp(min=FP8_MIN_SCALE_EXPONENT)
    exponent = torch.where(finite, exponent, FP8_MIN_SCALE_EXPONENT)
    codes = (values * _pow2(-exponent)).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(finite, codes, E4M3_NAN).to(torch.uint8)
    return codes.view(torch.float8_e4m3fn), _pow2(exponent)


def _pow2(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2**exponent as float32, exact, for exponents of normal numbers."""
    bits = (exponent.to(torch.int32) + _FLOAT32_BIAS) << _FLOAT32_MANTISSA_BITS
    return bits.view(torch.float32)
