"""Quantized tensors: plain pairs of data and scales."""

from __future__ import annotations

import dataclasses

import torch

from qcomm.formats import BLOCK_SIZE, COLUMN_MAJOR_ROW_MULTIPLE, FP8_GROUP_SIZE, ScaleLayout

_GROUPS_PER_WORD = 4


@dataclasses.dataclass(frozen=True, eq=False)
class MXFP4Tensor:
    """An MXFP4 tensor of logical shape `[..., K]`.

    Args:
        qdata: `[..., K // 2]` uint8: element 2i in the low nibble of byte i, element 2i + 1 in the high one.
        sf: `[..., K // 32]` uint8: E8M0 scale bytes, linear (unswizzled).
        hadamard: whether each 32-block holds rotated values (see `qcomm.reference.hadamard32`).
        hadamard_signs: 32-bit mask of the elements of a block that were negated before the rotation (bit i: element i).
        prescaled: whether the values were multiplied by 3/4 first (`Rounding.UNBIASED`).

    Raises:
        TypeError: a part that is not uint8.
        ValueError: shapes that do not belong together, parts on two devices, or signs without a rotation.
    """

    qdata: torch.Tensor
    sf: torch.Tensor
    hadamard: bool = False
    hadamard_signs: int = 0
    prescaled: bool = False

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
        if not 0 <= self.hadamard_signs < 2**BLOCK_SIZE or (self.hadamard_signs and not self.hadamard):
            raise ValueError(f"hadamard_signs must be in [0, 2**32), and 0 without hadamard, got {self.hadamard_signs}")

    @property
    def is_plain(self) -> bool:
        """Whether an element is just its code times its scale."""
        return not self.hadamard and not self.prescaled

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
    """An E4M3 tensor of shape `[rows, K]` with one scale per 1x128.

    Args:
        data: `[rows, K]` torch.float8_e4m3fn.
        sf: `[rows, K // 128]` float32, any strides; value is data * sf. Powers of two where qcomm made it. Or int32
            `[rows, ceil(K / 512)]`, four exponent bytes a word (`ScaleLayout.PACKED_UE8M0`).

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not belong together, or parts on two devices.
    """

    data: torch.Tensor
    sf: torch.Tensor

    def __post_init__(self) -> None:
        if self.data.dtype != torch.float8_e4m3fn:
            raise TypeError(f"data must be torch.float8_e4m3fn, got {self.data.dtype}")
        if self.sf.dtype not in (torch.float32, torch.int32):
            raise TypeError(f"sf must be torch.float32 or torch.int32, got {self.sf.dtype}")
        if self.data.dim() != 2:
            raise ValueError(f"data must have 2 dimensions, got shape {tuple(self.data.shape)}")
        num_groups = self.data.shape[1] // FP8_GROUP_SIZE
        want = (self.data.shape[0], -(-num_groups // _GROUPS_PER_WORD) if self.is_packed else num_groups)
        if self.data.shape[1] % FP8_GROUP_SIZE or tuple(self.sf.shape) != want:
            raise ValueError(
                f"sf must be {want} for data {tuple(self.data.shape)} with K a multiple of {FP8_GROUP_SIZE}, "
                f"got {tuple(self.sf.shape)}"
            )
        if self.data.device != self.sf.device:
            raise ValueError(f"sf must be on {self.data.device}, got {self.sf.device}")

    @property
    def is_packed(self) -> bool:
        """Whether the scales are packed exponent bytes."""
        return self.sf.dtype == torch.int32

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


@dataclasses.dataclass(frozen=True, eq=False)
class FP8ColumnwiseTensor:
    """Groups of rows, each transposed to a `[K, rows_e]` block of E4M3 with one float32 scale per 128x1.

    What DeepGEMM's k-grouped wgrad product reads. A tile is 128 rows of a group; a group's last one may have fewer.

    Args:
        data: `[rows * K]` torch.float8_e4m3fn: the groups' blocks one after the other; group e starts at element
            group_offsets[e] * K.
        sf: `[tiles, K]` float32, powers of two: the groups' tiles in order. With `group_offsets` on a device there may
            be more rows than tiles; those past the last tile are unspecified.
        group_offsets: `[num_groups + 1]` int32 on data's device: first row of each group, and the end of the last.

    Raises:
        TypeError: wrong dtypes.
        ValueError: parts on two devices.
    """

    data: torch.Tensor
    sf: torch.Tensor
    group_offsets: torch.Tensor

    def __post_init__(self) -> None:
        dtypes = {"data": torch.float8_e4m3fn, "sf": torch.float32, "group_offsets": torch.int32}
        for name, dtype in dtypes.items():
            part = getattr(self, name)
            if part.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {part.dtype}")
            if part.device != self.data.device:
                raise ValueError(f"{name} must be on {self.data.device}, got {part.device}")

    @property
    def device(self) -> torch.device:
        """Device of all parts."""
        return self.data.device

    @property
    def num_bytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.numel() + self.sf.numel() * 4


def scales_shape(rows: int, num_groups: int, layout: ScaleLayout) -> tuple[int, int]:
    """Return the shape of the scales of `[rows, 128 * num_groups]` in the given storage."""
    packed = layout is ScaleLayout.PACKED_UE8M0
    return rows, -(-num_groups // _GROUPS_PER_WORD) if packed else num_groups


def empty_scales(
    rows: int, num_groups: int, layout: ScaleLayout, device: torch.device | str | None = None
) -> torch.Tensor:
    """Allocate scales of `[rows, 128 * num_groups]` in the given storage, uninitialised."""
    rows, width = scales_shape(rows, num_groups, layout)
    dtype = torch.int32 if layout is ScaleLayout.PACKED_UE8M0 else torch.float32
    if layout is ScaleLayout.ROW_MAJOR:
        return torch.empty(rows, width, dtype=dtype, device=device)
    padded = -(-rows // COLUMN_MAJOR_ROW_MULTIPLE) * COLUMN_MAJOR_ROW_MULTIPLE
    return torch.empty(width, padded, dtype=dtype, device=device).t()[:rows]


def pack_scales(sf: torch.Tensor) -> torch.Tensor:
    """Pack float32 scales that are powers of two, `[rows, groups]`, four exponent bytes a word, `[rows, words]`."""
    exponents = sf.contiguous().view(torch.int32) >> 23
    padding = -sf.shape[1] % _GROUPS_PER_WORD
    parts = torch.nn.functional.pad(exponents, (0, padding)).to(torch.uint8).unflatten(-1, (-1, _GROUPS_PER_WORD))
    return parts.contiguous().view(torch.int32).squeeze(-1)
