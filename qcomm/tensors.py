"""Quantized tensors: plain pairs of data and scales."""

from __future__ import annotations

import dataclasses

import torch

from qcomm.formats import BLOCK_SIZE, COLUMN_MAJOR_ROW_MULTIPLE, FP8_GROUP_SIZE, ScaleLayout


@dataclasses.dataclass(frozen=True, eq=False)
class MXFP4Tensor:
    """An MXFP4 tensor of logical shape `[..., K]`.

    Args:
        qdata: `[..., K // 2]` uint8: element 2i in the low nibble of byte i, element 2i + 1 in the high one.
        sf: `[..., K // 32]` uint8: E8M0 scale bytes, linear (unswizzled).
        hadamard: whether each 32-block holds rotated values (see `qcomm.reference.hadamard32`).

    Raises:
        TypeError: a part that is not uint8.
        ValueError: shapes that do not belong together, or parts on two devices.
    """

    qdata: torch.Tensor
    sf: torch.Tensor
    hadamard: bool = False

    def __post_init__(self) -> None:
        for name, part in (("qdata", self.qdata), ("sf", self.sf)):
            if part.dtype != torch.uint8:
                raise TypeError(f"{name} must be torch.uint8, got {part.dtype}")
        want = (*self.qdata.shape[:-1], self.qdata.shape[-1] * 2 // BLOCK_SIZE)
        if self.qdata.shape[-1] * 2 % BLOCK_SIZE or tuple(self.sf.shape) != want:
            raise ValueError(
                f"sf must be {want} for qdata {tuple(self.qdata.shape)} with K a multiple of {BLOCK_SIZE}, "
                f"got {tuple(self.sf.shape)}"
            )
        if self.qdata.device != self.sf.device:
            raise ValueError(f"sf must be on {self.qdata.device}, got {self.sf.device}")

    @property
    def shape(self) -> torch.Size:
        """Logical shape `[..., K]`."""
        return torch.Size((*self.qdata.shape[:-1], self.qdata.shape[-1] * 2))

    @property
    def device(self) -> torch.device:
        """Device of both parts."""
        return self.qdata.device

    @property
    def num_bytes(self) -> int:
        """Bytes of data and scales."""
        return self.qdata.numel() + self.sf.numel()


@dataclasses.dataclass(frozen=True, eq=False)
class FP8Tensor:
    """An E4M3 tensor of shape `[rows, K]` with one float32 scale per 1x128.

    Args:
        data: `[rows, K]` torch.float8_e4m3fn.
        sf: `[rows, K // 128]` float32, any strides; value is data * sf. Powers of two where qcomm made it.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not belong together, or parts on two devices.
    """

    data: torch.Tensor
    sf: torch.Tensor

    def __post_init__(self) -> None:
        if self.data.dtype != torch.float8_e4m3fn:
            raise TypeError(f"data must be torch.float8_e4m3fn, got {self.data.dtype}")
        if self.sf.dtype != torch.float32:
            raise TypeError(f"sf must be torch.float32, got {self.sf.dtype}")
        if self.data.dim() != 2:
            raise ValueError(f"data must have 2 dimensions, got shape {tuple(self.data.shape)}")
        want = (self.data.shape[0], self.data.shape[1] // FP8_GROUP_SIZE)
        if self.data.shape[1] % FP8_GROUP_SIZE or tuple(self.sf.shape) != want:
            raise ValueError(
                f"sf must be {want} for data {tuple(self.data.shape)} with K a multiple of {FP8_GROUP_SIZE}, "
                f"got {tuple(self.sf.shape)}"
            )
        if self.data.device != self.sf.device:
            raise ValueError(f"sf must be on {self.data.device}, got {self.sf.device}")

    @property
    def shape(self) -> torch.Size:
        """Shape `[rows, K]`."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """Device of both parts."""
        return self.data.device

    @property
    def num_bytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.numel() + self.sf.numel() * 4


def empty_scales(
    rows: int, num_groups: int, layout: ScaleLayout, device: torch.device | str | None = None
) -> torch.Tensor:
    """Allocate float32 scales of shape `[rows, num_groups]` in the given storage, uninitialised."""
    if layout is ScaleLayout.ROW_MAJOR:
        return torch.empty(rows, num_groups, dtype=torch.float32, device=device)
    padded = -(-rows // COLUMN_MAJOR_ROW_MULTIPLE) * COLUMN_MAJOR_ROW_MULTIPLE
    return torch.empty(num_groups, padded, dtype=torch.float32, device=device).t()[:rows]
