"""What `bench codec` compares kernels with: the compiled oracle, and the chain that the column-wise kernel replaces.

The oracle is float64 and was written to be read; `torch.compile` of it is what plain PyTorch gives without a kernel.

The chain: MXFP4 to BF16 by qcomm's own kernel, one transposed copy, then the maximum, the power-of-two scale and the
cast of each 128 rows of a column. It leaves the groups beside each other in `[K, rows]`, which saves it a copy that the
kernel's layout would cost. It runs eagerly, and once more with all behind the first step under `torch.compile`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
from collections.abc import Callable, Iterator

import oracle
import torch
from codec_entries import COLUMNWISE, DEQUANTIZE, QUANTIZE, TO_FP8
from codec_inputs import Case, Inputs, Name, rows_of

import qcomm
from qcomm import reference
from qcomm.formats import FP8_GROUP_SIZE
from qcomm.tensors import MXFP4Tensor

ORACLE, CHAIN, COMPILED_CHAIN = "compiled oracle", "unfused chain", "compiled unfused chain"

CHAINS = (CHAIN, COMPILED_CHAIN)

Outputs = tuple[torch.Tensor, ...]


class BaselineError(Exception):
    """A baseline that cannot be timed, and why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Baseline:
    """Something slower that does the work of a kernel.

    Attributes:
        name: one of the names above.
        compiled: whether the first call compiles.
        call: allocates and returns its outputs.
        agrees: whether outputs hold what the kernel, checked before, has written.
    """

    name: str
    compiled: bool
    call: Callable[[], Outputs]
    agrees: Callable[[Outputs], bool]

    def warm_up(self, limit_s: float) -> None:
        """Call once, within a time limit if that compiles, and check the outputs.

        Raises:
            BaselineError: it failed, took too long, or gave something else.
        """
        try:
            with time_limit(limit_s if self.compiled else 0):
                made = self.call()
        except Exception as error:
            # Whatever torch.compile raises: its own errors, those of the compiler under it, and the time limit.
            lines = str(error).strip().splitlines()
            raise BaselineError(f"{type(error).__name__}: {lines[0] if lines else ''}".strip()) from error
        if not self.agrees(made):
            raise BaselineError("its result is not the kernel's")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, 0 being none; for the main thread only."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def baselines(name: Name, inputs: Inputs, case: Case, compiled: bool) -> list[Baseline]:
    """Return the baselines of a case, those that compile only if asked for."""
    made: list[Baseline] = []
    if name == COLUMNWISE:
        made.append(_chain(inputs, case, quantize_columns, CHAIN))
        if compiled:
            made.append(_chain(inputs, case, torch.compile(quantize_columns, dynamic=False), COMPILED_CHAIN))
    elif name in ORACLES and compiled:
        compiled_oracle = torch.compile(ORACLES[name], dynamic=False)
        wanted = tuple(case.outputs.values())
        read = tuple(case.inputs.values())
        made.append(Baseline(ORACLE, True, lambda: compiled_oracle(*read), lambda got: _same_bits(got, wanted)))
    return made


def quantize(x: torch.Tensor) -> Outputs:
    q = reference.quantize_mxfp4(x)
    return q.qdata, q.sf


def dequantize(qdata: torch.Tensor, sf: torch.Tensor) -> Outputs:
    return (reference.dequantize_mxfp4(MXFP4Tensor(qdata, sf), torch.bfloat16),)


def to_fp8(qdata: torch.Tensor, sf: torch.Tensor) -> Outputs:
    fp8, _ = reference.mxfp4_to_fp8(MXFP4Tensor(qdata, sf))
    return fp8.data, fp8.sf


ORACLES: dict[Name, Callable[..., Outputs]] = {QUANTIZE: quantize, DEQUANTIZE: dequantize, TO_FP8: to_fp8}


def quantize_columns(y: torch.Tensor) -> Outputs:
    """Transpose BF16 `[rows, K]`; return E4M3 `[K, rows]` and float32 scales `[K, rows // 128]`.

    The scales are those of `qcomm.reference.quantize_fp8` but for groups of zeros.
    """
    tiles = y.t().contiguous().unflatten(1, (-1, FP8_GROUP_SIZE))
    low, high = tiles.aminmax(dim=-1)
    mantissa, exponent = torch.frexp(torch.maximum(high, -low).float())
    # amax = mantissa * 2^exponent with a mantissa in [0.5, 1); 448 is 0.875 * 2^9.
    exponent = exponent - 9 + (mantissa > 0.875).to(torch.int32)
    scale = (exponent + 127 << 23).view(torch.float32)
    inverse = (127 - exponent << 23).view(torch.float32)
    data = (tiles * inverse.to(y.dtype)[..., None]).to(torch.float8_e4m3fn)
    return data.flatten(1), scale


def _chain(inputs: Inputs, case: Case, quantize_columns: Callable[[torch.Tensor], Outputs], name: str) -> Baseline:
    q, y = inputs.mxfp4, inputs.empty(torch.bfloat16)

    def call() -> Outputs:
        qcomm.dequantize(q, out=y)
        return quantize_columns(y)

    return Baseline(name, name == COMPILED_CHAIN, call, lambda made: _same_values(inputs, case, made))


def _same_bits(got: Outputs, want: Outputs) -> bool:
    pairs = zip(got, want, strict=True)
    return all(a.dtype == b.dtype and torch.equal(oracle.bits(a), oracle.bits(b)) for a, b in pairs)


def _same_values(inputs: Inputs, case: Case, made: Outputs) -> bool:
    """Whether both are the MXFP4 values exactly: the kernel's scales are those of 32 columns, the chain's of one."""
    columns = inputs.size.columns
    data, sf = made
    for a, b in itertools.pairwise(inputs.offsets):
        want = reference.dequantize_mxfp4(rows_of(inputs.mxfp4, slice(a, b)))
        tiles = slice(a // FP8_GROUP_SIZE, b // FP8_GROUP_SIZE)
        kernel = case.outputs["data"][a * columns : b * columns].view(columns, b - a).t()
        for codes, scale in ((kernel, case.outputs["sf"][tiles]), (data[:, a:b].t(), sf[:, tiles].t())):
            if not torch.equal(codes.float() * scale.repeat_interleave(FP8_GROUP_SIZE, dim=0), want):
                return False
    return True
