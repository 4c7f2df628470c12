"""What the launchers of the codec share: kernels per device, flat aligned inputs, division, `out=`."""

from __future__ import annotations

import ctypes
import functools

import torch

from qcomm import validate
from qcomm.formats import ScaleLayout
from qcomm.jit import Kernel, KernelLoader, KernelSpec
from qcomm.tensors import scales_shape

THREADS = 256
"""Of a block, but for quantize_mxfp4."""
VEC = 16
"""Elements that a thread takes at a time, but for quantize_mxfp4, which takes a block."""
_ALIGNMENT = 16
MAX_VECS = 2**31 - 2**12
"""A kernel numbers vectors in an int, and may go past the last by a block."""


class Divisor(ctypes.Structure):
    """Division of a 32-bit number by a constant without a division; see `Divisor` in kernels/codec.cuh.

    With s the smallest such that 2^s >= d and m = floor(2^32 (2^s - d) / d) + 1, n / d is
    (umulhi(n, m) + n) >> s for every n below 2^31 (Granlund and Montgomery, PLDI 1994).
    """

    _fields_ = (("multiplier", ctypes.c_uint32), ("shift", ctypes.c_uint32))

    @classmethod
    def of(cls, divisor: int) -> Divisor:
        """Build the division by a positive number."""
        shift = (divisor - 1).bit_length()
        return cls((2**32 * (2**shift - divisor)) // divisor + 1, shift)

    def divide(self, number: int) -> int:
        """Divide as the kernel does."""
        return ((number * self.multiplier >> 32) + number) >> self.shift


@functools.cache
def _loader(index: int) -> KernelLoader:
    return KernelLoader(torch.device("cuda", index), waits=False)


def launch(spec: KernelSpec, x: torch.Tensor, grid: int, params: ctypes.Structure, threads: int = THREADS) -> None:
    """Launch on the current stream of x's device; an empty grid is no launch.

    Raises:
        QcommUnsupportedError: the kernel cannot be compiled or launched on this GPU.
    """
    if grid == 0:
        return
    with torch.cuda.device(x.device):
        kernel: Kernel = _loader(x.device.index).get(_identity, spec)
        kernel.launch(grid, threads, 0, torch.cuda.current_stream().cuda_stream, params)


def _identity(spec: KernelSpec) -> KernelSpec:
    return spec


def flat(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy of it, contiguous and on a 16-byte boundary."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def pointer(x: torch.Tensor | None) -> int:
    """Return a tensor's address, 0 for None."""
    return 0 if x is None else x.data_ptr()


def check_out(name: str, out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Require a part of `out=` of one shape, dtype and device.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
    """
    if out.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {out.dtype}")
    if tuple(out.shape) != shape:
        raise ValueError(f"{name}.shape must be {shape}, got {tuple(out.shape)}")
    if out.device != device:
        raise ValueError(f"{name} must be on {device}, got {out.device}")


def check_scales(
    name: str, sf: torch.Tensor, rows: int, num_groups: int, layout: ScaleLayout, device: torch.device
) -> None:
    """Require scales of `[rows, 128 * num_groups]` in the given storage.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, storage or device.
    """
    shape = scales_shape(rows, num_groups, layout)
    check_out(name, sf, shape, torch.int32 if layout is ScaleLayout.PACKED_UE8M0 else torch.float32, device)
    fits = sf.is_contiguous() if layout is ScaleLayout.ROW_MAJOR else sf.stride(0) == 1 or rows <= 1
    if not fits:
        raise ValueError(f"{name} must be stored {layout.value}, got strides {sf.stride()}")


def check_counter(counter: torch.Tensor | None, device: torch.device) -> None:
    """Require a counter of spread overflows, or None."""
    if counter is not None:
        validate.tensor("spread_overflows", counter, shape=(1,), dtypes=(torch.int64,), device=device)


def check_flat(name: str, out: torch.Tensor) -> None:
    """Require a tensor that a kernel can write in 16-byte pieces.

    Raises:
        ValueError: it is not contiguous, or not on a 16-byte boundary.
    """
    if not out.is_contiguous() or out.data_ptr() % _ALIGNMENT:
        at = out.data_ptr() % _ALIGNMENT
        raise ValueError(f"{name} must be contiguous and on a 16-byte boundary, got strides {out.stride()} at {at}")


def count_vecs(x: torch.Tensor, vec: int = VEC) -> int:
    """Return the number of threads' parts of a tensor.

    Raises:
        ValueError: more than a kernel can number.
    """
    num_vecs = x.numel() // vec
    if num_vecs > MAX_VECS:
        raise ValueError(f"x must have at most {MAX_VECS * vec} elements, got {x.numel()}")
    return num_vecs


def blocks(num_vecs: int, vecs_per_thread: int, threads: int = THREADS) -> int:
    """Return the grid of a kernel whose threads take so many vectors."""
    return -(-num_vecs // (threads * vecs_per_thread))


def only_writes(*_args: object, **_options: object) -> None:
    """Fake implementation of an operator that returns nothing: the shapes of what it writes are given."""
