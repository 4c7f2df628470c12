"""Keep activations in MXFP4 between forward and backward: saved-tensor hooks, and a stash for autograd Functions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, Literal, Protocol, TypeVar, overload

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from qcomm import reference, validate
from qcomm.formats import BLOCK_SIZE, Rounding, ScaleLayout, ScaleRule
from qcomm.ops.columnwise import GroupOffsets
from qcomm.ops.dequantize import dequantize
from qcomm.ops.mxfp4_to_fp8 import mxfp4_to_fp8
from qcomm.ops.mxfp4_to_fp8_columnwise import mxfp4_to_fp8_columnwise
from qcomm.ops.quantize_mxfp4 import quantize_mxfp4
from qcomm.tensors import FP8ColumnwiseTensor, FP8Tensor, MXFP4Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What is stored; a tensor of another dtype is kept as it is."""
MIN_NUMEL = 2**16
"""Default of `min_numel`: 128 KiB of BF16, below which a launch costs more than the memory is worth."""

As = Literal["bf16", "fp8", "fp8_columnwise"]
AS: tuple[As, ...] = ("bf16", "fp8", "fp8_columnwise")

# Nodes that compute nothing: autocast's copy of a weight, and views. Without "Backward" and a number.
_CASTS_AND_VIEWS = frozenset(
    (
        *("ToCopy", "Alias", "Clone", "AsStrided", "View", "UnsafeView", "ReshapeAlias", "Unflatten", "Flatten"),
        *("T", "Mt", "Transpose", "Permute", "Expand", "Squeeze", "Unsqueeze", "Slice", "Select", "Narrow", "Unbind"),
        *("Split", "SplitWithSizes"),
    )
)
_MOST_NODES = 16


class Encoded(Protocol):
    """A stored tensor, or what knows its size."""

    @property
    def num_bytes(self) -> int:
        """Bytes it takes."""


E = TypeVar("E", bound=Encoded)


class Codec(Protocol[E]):
    """How saved tensors are stored; `MXFP4Codec` is one."""

    @property
    def block_size(self) -> int:
        """Adjacent elements that are encoded together."""

    def encode(self, x: torch.Tensor) -> E:
        """Encode `[n]` of a dtype in DTYPES, contiguous, n a multiple of `block_size`."""

    def decode(self, encoded: E, dtype: torch.dtype) -> torch.Tensor:
        """Decode to `[n]` of the dtype, a tensor of its own."""


class MXFP4Codec:
    """MXFP4 by fixed options; every tensor gets random bits of its own.

    Args:
        scale_rule: see `qcomm.quantize_mxfp4`, as for the next two.
        rounding: how a scaled value becomes a code.
        hadamard: rotate each block first; decoding rotates back.
        seed: of STOCHASTIC and UNBIASED: the n-th tensor, from 0, is quantized with `(seed + n) % 2**64`.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: options that do not go together.
    """

    block_size = BLOCK_SIZE

    def __init__(
        self,
        scale_rule: ScaleRule = ScaleRule.EVEN,
        rounding: Rounding = Rounding.NEAREST,
        hadamard: bool = False,
        seed: int = 0,
    ) -> None:
        validate.instance("scale_rule", scale_rule, ScaleRule)
        validate.instance("rounding", rounding, Rounding)
        validate.boolean("hadamard", hadamard)
        validate.seed(seed)
        reference.check_quantizer(scale_rule, rounding, hadamard)
        self._scale_rule, self._rounding, self._hadamard = scale_rule, rounding, hadamard
        self._seed = seed

    def encode(self, x: torch.Tensor | FP8Tensor) -> MXFP4Tensor:
        """Quantize with the next seed."""
        q = quantize_mxfp4(
            x, scale_rule=self._scale_rule, rounding=self._rounding, seed=self._seed, hadamard=self._hadamard
        )
        self._seed = (self._seed + 1) % 2**64
        return q

    def decode(self, encoded: MXFP4Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Dequantize; values past float16's range become its largest."""
        if dtype != torch.float16:
            return dequantize(encoded, dtype)
        largest = torch.finfo(dtype).max
        return dequantize(encoded, torch.float32).clamp_(-largest, largest).to(dtype)


@dataclasses.dataclass
class StorageReport:
    """What storing has brought.

    Attributes:
        num_tensors: tensors stored; one that was saved several times counts once.
        bytes_before: bytes of their elements as they came.
        bytes_after: bytes they are stored in.
    """

    num_tensors: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def bytes_saved(self) -> int:
        """The difference of the two."""
        return self.bytes_before - self.bytes_after

    def add(self, bytes_before: int, bytes_after: int) -> None:
        """Count one more tensor."""
        self.num_tensors += 1
        self.bytes_before += bytes_before
        self.bytes_after += bytes_after


@torch.compiler.disable(reason="torch cannot trace saved-tensor hooks; enter mxfp4_saved_tensors outside torch.compile")
def mxfp4_saved_tensors(
    *,
    min_numel: int = MIN_NUMEL,
    select: Callable[[torch.Tensor], bool] | None = None,
    scale_rule: ScaleRule = ScaleRule.EVEN,
    hadamard: bool = False,
    rounding: Rounding = Rounding.NEAREST,
    seed: int = 0,
) -> contextlib.AbstractContextManager[StorageReport]:
    """Keep in MXFP4 what autograd saves for backward within the context; backward may run after it.

    Stored are strided tensors on CPU or CUDA of bfloat16, float16 or float32 whose innermost dimension in memory is a
    multiple of 32 and whose last is not 1 (statistics of rows), no two elements of which share memory. Never stored are
    tensor subclasses, parameters, and what is only a view or a cast of one, as autograd knows it: autocast's copies and
    their transposes too. The rest stays as it is, with autograd's check that it was not modified in place.

    Backward gets the values of the time of saving, also where the tensor was modified in place since, with dtype,
    shape and strides; it decodes anew each time it asks, so `retain_graph` works. Saving the same memory again at the
    same version, on the same stream, stores nothing more: the tensor itself, or a view of the same elements.

    Only the innermost saved-tensor hooks apply, so activation checkpointing within the context keeps its own way, and
    stores just its inputs in MXFP4. Of a compiled region called within the context, what the region saves is stored;
    that does not require grad (see `select`). Entering the context in a compiled function breaks its graph.

    Args:
        min_numel: fewer elements are kept as they are.
        select: whether to store a tensor that can be. By default one that requires grad, which leaves out tables,
            masks and statistics such as attention's logsumexp, but also the intermediates of compiled regions and
            autograd Functions. It must not modify or hold the tensor.
        scale_rule: see `qcomm.quantize_mxfp4`, as for the next two.
        hadamard: rotate each block first; decoding rotates back.
        rounding: how a scaled value becomes a code.
        seed: of STOCHASTIC and UNBIASED: the n-th tensor stored, from 0, is quantized with `(seed + n) % 2**64`, so
            seeds of steps should be further apart than a step has tensors.

    Returns:
        A context manager, which gives a StorageReport of all tensors stored in it so far.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: options that do not go together.

    Warns:
        UserWarning: at the end, if the default `select` left out more bytes than were stored.
    """
    validate.positive("min_numel", min_numel)
    if select is not None and not callable(select):
        raise TypeError(f"select must be callable or None, got {type(select).__name__}")
    codec = MXFP4Codec(scale_rule, rounding, hadamard, seed)
    return SavedTensors(codec, min_numel, select).active()


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    tensor: torch.Tensor
    version: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored(Generic[E]):
    """A stored tensor; `source` lets the storage's bytes go, but not its address, which no other can have meanwhile."""

    encoded: E
    source: StorageWeakRef


@dataclasses.dataclass(frozen=True, eq=False)
class _View(Generic[E]):
    """One of the tensors that a stored one stands for; `memory` is what `_dimensions_in_memory` returned."""

    stored: _Stored[E]
    memory: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class SavedTensors(Generic[E]):
    """The pair of hooks of `mxfp4_saved_tensors`, over any codec.

    Args:
        codec: what encodes.
        min_numel: see `mxfp4_saved_tensors`, as for the next.
        select: whether to store a tensor that can be.
    """

    def __init__(
        self, codec: Codec[E], min_numel: int = MIN_NUMEL, select: Callable[[torch.Tensor], bool] | None = None
    ) -> None:
        self.report = StorageReport()
        self._codec, self._min_numel, self._select = codec, min_numel, select
        self._left_out_bytes = 0
        # By storage address: an entry lives as long as a graph holds what was stored, which holds the address.
        self._stored: weakref.WeakValueDictionary[tuple[Any, ...], _Stored[E]] = weakref.WeakValueDictionary()

    @contextlib.contextmanager
    def active(self) -> Iterator[StorageReport]:
        """Install the hooks."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            yield self.report
        if self._left_out_bytes > self.report.bytes_before:
            warnings.warn(
                f"{self._left_out_bytes} bytes were not stored because the tensors do not require grad, "
                f"{self.report.bytes_before} were; pass select= to store what compiled regions and autograd Functions "
                "save",
                stacklevel=3,
            )

    @torch.compiler.disable
    def pack(self, x: torch.Tensor) -> _Kept | _View[E]:
        """Store what autograd saves, or keep it as it is."""
        memory = self._memory(x)
        if memory is None:
            # Not x itself: a node that saves its output would hold itself.
            return _Kept(x.detach(), x._version)
        return _View(self._store(x, memory), memory, x.dtype, x.shape, x.stride())

    @torch.compiler.disable
    def unpack(self, packed: _Kept | _View[E]) -> torch.Tensor:
        """Give back what was packed.

        Raises:
            RuntimeError: a tensor kept as it is was modified in place since.
        """
        if isinstance(packed, _Kept):
            kept = packed.tensor
            if kept._version != packed.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{kept.dtype} {tuple(kept.shape)} is at version {kept._version}; expected version {packed.version}"
                )
            return kept
        values = self._codec.decode(packed.stored.encoded, packed.dtype)
        if len(packed.memory) == 1 and packed.memory[0][1] == 1:
            return values.as_strided(packed.shape, packed.stride)
        out = torch.empty_strided(packed.shape, packed.stride, dtype=packed.dtype, device=values.device)
        sizes, strides = zip(*packed.memory, strict=True)
        out.as_strided(sizes, strides).copy_(values.view(sizes))
        return out

    def _memory(self, x: torch.Tensor) -> tuple[tuple[int, int], ...] | None:
        """Return the dimensions of x in memory, adjacent ones joined; None if x is to be kept as it is."""
        if type(x) is not torch.Tensor or x.numel() < self._min_numel or x.dtype not in DTYPES:
            return None
        if x.layout != torch.strided or x.device.type not in ("cpu", "cuda") or x.is_neg() or _is_parameter(x):
            return None
        memory = _dimensions_in_memory(x, self._codec.block_size)
        if memory is None:
            return None
        if self._select is not None:
            return memory if self._select(x) else None
        if not x.requires_grad:
            self._left_out_bytes += x.numel() * x.itemsize
            return None
        return memory

    def _store(self, x: torch.Tensor, memory: tuple[tuple[int, int], ...]) -> _Stored[E]:
        storage = x.untyped_storage()
        # Another stream might read what was stored before it is written.
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
        key = (storage._cdata, x.storage_offset(), memory, x.dtype, x._version, stream)
        stored = self._stored.get(key)
        if stored is None:
            sizes, strides = zip(*memory, strict=True)
            encoded = self._codec.encode(x.detach().as_strided(sizes, strides).reshape(-1))
            stored = self._stored[key] = _Stored(encoded, StorageWeakRef(storage))
            self.report.add(x.numel() * x.itemsize, encoded.num_bytes)
        return stored


def _dimensions_in_memory(x: torch.Tensor, block_size: int) -> tuple[tuple[int, int], ...] | None:
    """Return (size, stride) from the largest stride to the smallest, those joined that one stride can walk.

    None if elements share memory, if the innermost size is no multiple of the block, or if the last dimension is 1, as
    that of statistics of rows.
    """
    dims = sorted(((t, s) for s, t in zip(x.shape, x.stride(), strict=True) if s != 1), reverse=True)
    if not dims or x.shape[-1] == 1 or dims[-1][0] == 0 or dims[-1][1] % block_size:
        return None
    joined: list[tuple[int, int]] = []
    for stride, size in dims:
        if joined:
            outer_size, outer_stride = joined[-1]
            if outer_stride < size * stride:
                return None
            if outer_stride == size * stride:
                joined[-1] = (outer_size * size, stride)
                continue
        joined.append((size, stride))
    return tuple(joined)


def _is_parameter(x: torch.Tensor) -> bool:
    """Whether x is a parameter, a view of one, or made of one by casts and views alone."""
    if isinstance(x, torch.nn.Parameter) or isinstance(x._base, torch.nn.Parameter):
        return True
    node = x.grad_fn
    for _ in range(_MOST_NODES):
        if node is None or node.name().rstrip("0123456789").removesuffix("Backward") not in _CASTS_AND_VIEWS:
            break
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), torch.nn.Parameter)


class MXFP4Stash:
    """Holds tensors in MXFP4 by key until backward reads each as the operand it needs, in one pass.

    For a custom autograd Function, kept on its `ctx`: it goes when the graph goes. What came off the wire in MXFP4 is
    held as it is, without a second quantization. Nothing here synchronises with the host or is differentiable.

    Args:
        scale_rule: see `qcomm.quantize_mxfp4`, as for the next two.
        rounding: how a scaled value becomes a code.
        hadamard: rotate each block first. A rotated tensor read as FP8 is decoded and quantized once more.
        seed: of STOCHASTIC and UNBIASED: the n-th tensor quantized, from 0, takes `(seed + n) % 2**64`.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: options that do not go together.
    """

    def __init__(
        self,
        *,
        scale_rule: ScaleRule = ScaleRule.EVEN,
        rounding: Rounding = Rounding.NEAREST,
        hadamard: bool = False,
        seed: int = 0,
    ) -> None:
        self._codec = MXFP4Codec(scale_rule, rounding, hadamard, seed)
        self._held: dict[Hashable, tuple[MXFP4Tensor, int]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def report(self) -> StorageReport:
        """What is held now; an MXFP4Tensor that was put as it is counts as the BF16 that it stands for."""
        report = StorageReport()
        for x, bytes_before in self._held.values():
            report.add(bytes_before, x.num_bytes)
        return report

    def put(self, key: Hashable, x: torch.Tensor | FP8Tensor | MXFP4Tensor) -> None:
        """Quantize a tensor and hold it.

        Args:
            key: a new one.
            x: `[..., K]` bfloat16, float16 or float32, K a multiple of 32; an FP8Tensor with float32 scales; or an
                MXFP4Tensor of whatever options, which is held as it is and must not be written to.

        Raises:
            TypeError: what cannot be quantized.
            ValueError: a key that is held already, or K is no multiple of 32.
        """
        if key in self._held:
            raise ValueError(f"key must be new, got {key!r}, which is held; drop it first")
        if isinstance(x, MXFP4Tensor):
            self._held[key] = x, math.prod(x.shape) * torch.bfloat16.itemsize
            return
        try:
            q = self._codec.encode(x)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, for key {key!r}") from error
        self._held[key] = q, x.num_bytes if isinstance(x, FP8Tensor) else x.numel() * x.itemsize

    @overload
    def get(self, key: Hashable, as_: Literal["bf16"] = ...) -> torch.Tensor: ...

    @overload
    def get(self, key: Hashable, as_: Literal["fp8"], *, sf_layout: ScaleLayout | None = ...) -> FP8Tensor: ...

    @overload
    def get(
        self,
        key: Hashable,
        as_: Literal["fp8_columnwise"],
        *,
        group_offsets: GroupOffsets = ...,
        alignment: int | None = ...,
    ) -> FP8ColumnwiseTensor: ...

    def get(
        self,
        key: Hashable,
        as_: As = "bf16",
        *,
        sf_layout: ScaleLayout | None = None,
        group_offsets: GroupOffsets = None,
        alignment: int | None = None,
    ) -> torch.Tensor | FP8Tensor | FP8ColumnwiseTensor:
        """Read a tensor as the operand of a product; it stays held until `drop`.

        Args:
            key: what it was put under.
            as_: "bf16"; "fp8" (`qcomm.mxfp4_to_fp8`), for the product that goes by rows; or "fp8_columnwise"
                (`qcomm.mxfp4_to_fp8_columnwise`), for the weight gradient. For FP8, dimensions but the last become
                rows, and K must be a multiple of 128.
            sf_layout: of "fp8": storage of the scales; default ROW_MAJOR.
            group_offsets: of "fp8_columnwise": first row of each group and the end of the last; default all rows.
            alignment: of "fp8_columnwise": what the offsets are multiples of; default 128.

        Returns:
            bfloat16 of the shape put; an FP8Tensor `[rows, K]`; or an FP8ColumnwiseTensor.

        Raises:
            KeyError: nothing is held under the key.
            TypeError: an argument of the wrong type.
            ValueError: another `as_`, an option of another `as_`, a shape that FP8 cannot have, or groups that do not
                fit.
        """
        validate.one_of("as_", as_, AS)
        x = self._find(key)[0]
        given = {"sf_layout": sf_layout, "group_offsets": group_offsets, "alignment": alignment}
        taken = {"bf16": (), "fp8": ("sf_layout",), "fp8_columnwise": ("group_offsets", "alignment")}[as_]
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        for name in options:
            if name not in taken:
                raise ValueError(f"{name} must be None for as_={as_!r}, got {options[name]!r}, for key {key!r}")
        if as_ == "bf16":
            return dequantize(x)
        try:
            rows = _flatten_rows(x)
            return mxfp4_to_fp8(rows, **options) if as_ == "fp8" else mxfp4_to_fp8_columnwise(rows, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, for key {key!r}") from error

    def drop(self, key: Hashable) -> None:
        """Hold a tensor no longer.

        Raises:
            KeyError: nothing is held under the key.
        """
        self._find(key)
        del self._held[key]

    def _find(self, key: Hashable) -> tuple[MXFP4Tensor, int]:
        found = self._held.get(key)
        if found is None:
            raise KeyError(f"key must be one of {list(self._held)}, got {key!r}")
        return found


def _flatten_rows(x: MXFP4Tensor) -> MXFP4Tensor:
    if len(x.shape) == 2:
        return x
    rows = math.prod(x.shape[:-1])
    qdata, sf = (part.reshape(rows, part.shape[-1]) for part in (x.qdata, x.sf))
    return dataclasses.replace(x, qdata=qdata, sf=sf)
