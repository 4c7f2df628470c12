"""What the entries of `bench codec` are made of: names and sizes, inputs, cases, and their comparison.

Everything here runs on the CPU as well, where the operators are the oracle itself.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import oracle
import torch

from qcomm import reference
from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE
from qcomm.tensors import FP8Tensor, MXFP4Tensor

NUM_GROUPS = 32
# Rows that the oracle, which is float64, works on at a time.
_CHUNK = 512
_MAX_BLOCK_EXPONENT = 2

Tensors = Mapping[str, torch.Tensor]


class Size(NamedTuple):
    """Of the tensor that stands for the BF16 values."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


class Name(NamedTuple):
    """Of a kernel and of how it is called."""

    kernel: str
    variant: str = "-"

    def __str__(self) -> str:
        return self.kernel if self.variant == "-" else f"{self.kernel}, {self.variant}"


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One kernel, ready to be called.

    Attributes:
        call: writes the outputs.
        inputs, outputs: all that is read, and all that is written.
        differences: says what in the outputs is not as it must be.
    """

    call: Callable[[], object]
    inputs: Tensors
    outputs: Tensors
    differences: Callable[[], list[str]]

    @property
    def bytes_in(self) -> int:
        return sum(map(num_bytes, self.inputs.values()))

    @property
    def bytes_out(self) -> int:
        return sum(map(num_bytes, self.outputs.values()))

    def problems(self) -> list[str]:
        """Call once over poisoned outputs; say what is wrong with them."""
        for output in self.outputs.values():
            poison(output)
        self.call()
        return self.differences()


class Inputs:
    """Tensors of one size, made when first asked for.

    The values are Gaussian, each block of 32 times a power of two from 2^-2 to 2^2, so that the blocks under one FP8
    scale lie at different distances.
    """

    def __init__(self, size: Size, device: torch.device, seed: int) -> None:
        self.size, self.device, self.seed = size, device, seed
        self.offsets = uneven_groups(size.rows)

    def values(self, dtype: torch.dtype, columns: int | None = None, seed: int = 0) -> torch.Tensor:
        """Make fresh values, `[rows, columns]`."""
        generator = torch.Generator(self.device).manual_seed(self.seed + seed)
        rows, columns = self.size.rows, columns or self.size.columns
        x = torch.randn(rows, columns, dtype=torch.float32, device=self.device, generator=generator)
        low, high = -_MAX_BLOCK_EXPONENT, _MAX_BLOCK_EXPONENT + 1
        shape = rows, columns // BLOCK_SIZE, 1
        exponents = torch.randint(low, high, shape, device=self.device, generator=generator)
        return x.unflatten(1, (-1, BLOCK_SIZE)).mul_(2.0**exponents).flatten(1).to(dtype)

    @functools.cached_property
    def bf16(self) -> torch.Tensor:
        return self.values(torch.bfloat16)

    @functools.cached_property
    def mxfp4(self) -> MXFP4Tensor:
        parts = [reference.quantize_mxfp4(self.bf16[rows]) for rows in chunks(self.size.rows)]
        return MXFP4Tensor(torch.cat([part.qdata for part in parts]), torch.cat([part.sf for part in parts]))

    @functools.cached_property
    def fp8(self) -> FP8Tensor:
        """Under scales that are powers of two, as qcomm makes them."""
        parts = [reference.quantize_fp8(self.bf16[rows]) for rows in chunks(self.size.rows)]
        return FP8Tensor(torch.cat([part.data for part in parts]), torch.cat([part.sf for part in parts]))

    @functools.cached_property
    def fp8_any_scale(self) -> FP8Tensor:
        """Under scales of amax / 448, as other libraries make them."""
        groups = self.bf16.float().unflatten(1, (-1, FP8_GROUP_SIZE))
        sf = groups.abs().amax(-1) / 448
        data = (groups / sf[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        return FP8Tensor(data.flatten(1), sf)

    @functools.cached_property
    def weights(self) -> torch.Tensor:
        """One for each row, float32 in [0.5, 1)."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return 0.5 + 0.5 * torch.rand(self.size.rows, device=self.device, generator=generator)

    @functools.cached_property
    def group_offsets(self) -> torch.Tensor:
        return torch.tensor(self.offsets, dtype=torch.int32, device=self.device)

    def empty(self, dtype: torch.dtype, elements_each: int = 1) -> torch.Tensor:
        """Allocate one entry for so many elements of each row."""
        shape = self.size.rows, self.size.columns // elements_each
        return torch.empty(shape, dtype=dtype, device=self.device)


class Entry(NamedTuple):
    """A line of the report before it is measured; `make` builds its case of a size."""

    name: Name
    make: Callable[[Inputs], Case]


def uneven_groups(rows: int, num_groups: int = NUM_GROUPS) -> list[int]:
    """Split rows into groups of uneven numbers of tiles, some perhaps of none; return their offsets."""
    weights = [1 + 7 * group % num_groups for group in range(num_groups)]
    tiles, total = rows // FP8_GROUP_SIZE, sum(weights)
    return [FP8_GROUP_SIZE * (tiles * up_to // total) for up_to in itertools.accumulate(weights, initial=0)]


def chunks(rows: int) -> Iterator[slice]:
    """Yield the rows in pieces that the oracle has memory for."""
    for start in range(0, rows, _CHUNK):
        yield slice(start, min(start + _CHUNK, rows))


def num_bytes(x: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return x.numel() * x.element_size()


def stored_bytes(x: torch.Tensor) -> torch.Tensor:
    """View a tensor's elements as bytes, in either storage order."""
    return (x if x.stride(-1) == 1 else x.t()).view(torch.uint8)


def poison(x: torch.Tensor) -> None:
    """Set every byte to 255: NaN in each float format and as a scale byte, -6 and -6 as a pair of codes."""
    stored_bytes(x).fill_(255)


def bit_differences(where: str, got: Tensors, want: Tensors) -> list[str]:
    """Name the tensors that are not the wanted ones, bit for bit."""
    return oracle.differing(where, *({name: oracle.bits(x) for name, x in part.items()} for part in (got, want)))


def copy_case(size: Size, device: torch.device) -> Case:
    """Build the copy of a BF16 tensor of one size."""
    generator = torch.Generator(device).manual_seed(0)
    source = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
    copied = torch.empty_like(source)
    found, wanted = {"x": copied}, {"x": source}
    return Case(lambda: copied.copy_(source), wanted, found, lambda: bit_differences("all rows", found, wanted))


def by_rows(rows: int, outputs: Tensors, expect: Callable[[slice], Tensors]) -> Callable[[], list[str]]:
    """Return the comparison of outputs that have a row for each row of the size."""

    def differences() -> list[str]:
        found = []
        for part in chunks(rows):
            got = {name: x[part] for name, x in outputs.items()}
            found += bit_differences(f"rows {part.start} to {part.stop}", got, expect(part))
        return found

    return differences


def rows_of(x: MXFP4Tensor, rows: slice) -> MXFP4Tensor:
    """Return some rows of a tensor."""
    return MXFP4Tensor(x.qdata[rows], x.sf[rows])
