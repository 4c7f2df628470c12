"""Measure activation storage on a transformer block: memory, time and gradient error; one process, one device.

    python -m qcomm bench storage
    python -m qcomm bench storage --tokens 4096 --batch 4 --hidden 4096 --iterations 20 --json storage.jsonl

The block, in BF16: RMSNorm; attention with its projections, causal, heads of 128; residual; RMSNorm; SwiGLU MLP of
`intermediate`; residual. The input is `[batch, tokens, hidden]`, all values are random.

Savings: `plain` is autograd's own. `fp8` is E4M3 with one float32 scale per 128, by a few plain PyTorch operators,
since qcomm has no kernel for it: its memory is what FP8 saving takes, its time is not the best there is. `mxfp4` is
`qcomm.storage.mxfp4_saved_tensors`; `mxfp4 mlp` is the same around the second RMSNorm and the MLP only.

Figures, of a forward and a backward pass; parameters, the input and all gradients were allocated before:
- held: bytes allocated between the passes, less those before; the output, 2 * batch * tokens * hidden, is in them. Null
  without CUDA, where no allocator tells.
- peak: the most allocated in both passes (torch.cuda.max_memory_allocated), less those before.
- stored: bytes of the tensors stored (each once) and what they are stored in, by the context's report.
- forward, total: p50 over the iterations of the time of forward alone and of both. On CUDA between events. Savings take
  turns within an iteration. Three turns come before those that count (CPU: one).
- error: 100 * sum((g - p)^2) / sum(p^2), with p plain's gradient: of the input, and of all weights together.

Checked before anything is timed; a failure ends the run with code 1: the output is that of plain, bit for bit;
gradients are finite; errors are at most ERROR_LIMITS; what is stored takes at most RATIOS of its bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import harness
import torch
from torch import nn
from torch.nn import functional as F

from qcomm import validate
from qcomm.formats import E4M3_MAX, FP8_GROUP_SIZE, FP8_MIN_SCALE_EXPONENT
from qcomm.storage import SavedTensors, StorageReport, mxfp4_saved_tensors
from qcomm.table import format_table
from qcomm.tensors import FP8Tensor

NAME = "storage"
HEAD = 128
ERROR_LIMITS = {"plain": 0.0, "fp8": 0.5, "mxfp4": 5.0, "mxfp4 mlp": 5.0}
"""Most percent of gradient error, of the input and of the weights."""
RATIOS = {"fp8": (1 + 4 / FP8_GROUP_SIZE) / 2, "mxfp4": 4.25 / 16, "mxfp4 mlp": 4.25 / 16}
"""Bytes stored over bytes before, which are BF16's, or more where a PyTorch without fused RMSNorm saves float32."""
_WARM_UP = {"cuda": 3, "cpu": 1}
_HEADERS = (
    "saving",
    "held MB",
    "peak MB",
    "stored MB",
    "of MB",
    "forward ms",
    "total ms",
    "vs plain",
    "dx error %",
    "dw error %",
)

Saving = Callable[[], contextlib.AbstractContextManager[StorageReport | None]]


class CheckError(Exception):
    """A saving broke what this benchmark states about it."""


class Fp8Codec:
    """E4M3 by plain PyTorch operators, with the smallest power of two as scale under which nothing saturates."""

    block_size = FP8_GROUP_SIZE

    def encode(self, x: torch.Tensor) -> FP8Tensor:
        groups = x.view(-1, FP8_GROUP_SIZE)
        amax = groups.abs().amax(1, keepdim=True).float()
        exponent = torch.log2(amax / E4M3_MAX).ceil().clamp_(min=FP8_MIN_SCALE_EXPONENT)
        sf = torch.exp2(exponent)
        return FP8Tensor((groups * (1 / sf).to(x.dtype)).to(torch.float8_e4m3fn), sf)

    def decode(self, encoded: FP8Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (encoded.data.to(dtype) * encoded.sf.to(dtype)).flatten()


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The block's sizes."""

    tokens: int
    batch: int
    hidden: int
    intermediate: int


@dataclasses.dataclass
class Result:
    """What was measured of one saving; bytes are None where no allocator counts them."""

    saving: str
    report: StorageReport
    held_bytes: int | None
    peak_bytes: int | None
    dx_error_percent: float
    dw_error_percent: float
    forward_ms: list[float] = dataclasses.field(default_factory=list)
    total_ms: list[float] = dataclasses.field(default_factory=list)

    def figures(self) -> dict[str, object]:
        return {
            "saving": self.saving,
            "held_bytes": self.held_bytes,
            "peak_bytes": self.peak_bytes,
            "stored_tensors": self.report.num_tensors,
            "stored_bytes_before": self.report.bytes_before,
            "stored_bytes": self.report.bytes_after,
            "forward_p50_ms": harness.percentile(self.forward_ms, 0.5),
            "total_p50_ms": harness.percentile(self.total_ms, 0.5),
            "total_p99_ms": harness.percentile(self.total_ms, 0.99),
            "dx_error_percent": self.dx_error_percent,
            "dw_error_percent": self.dw_error_percent,
        }


class Block(nn.Module):
    """A transformer block; `around_mlp` makes a context for the MLP."""

    def __init__(self, size: Geometry, device: torch.device) -> None:
        super().__init__()
        self.around_mlp: Saving = contextlib.nullcontext
        self.norms = nn.ModuleList(nn.RMSNorm(size.hidden) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(size.hidden, size.hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(size.hidden, size.intermediate, bias=False) for _ in range(2))
        self.down = nn.Linear(size.intermediate, size.hidden, bias=False)
        self.to(device, torch.bfloat16)
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norms[0](x)
        q, k, v = (p(normed).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        with self.around_mlp():
            normed = self.norms[1](x)
            return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Bench:
    """A block, its input and its output's gradient, under each saving."""

    def __init__(self, size: Geometry, device: torch.device, seed: int) -> None:
        self.device = device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.block = Block(size, device)
            shape = (size.batch, size.tokens, size.hidden)
            self.x = torch.randn(shape).to(device, torch.bfloat16).requires_grad_()
            self.grad = torch.randn(shape).to(device, torch.bfloat16)
        self.x.grad = torch.zeros_like(self.x)
        stored = functools.partial(mxfp4_saved_tensors, min_numel=1)
        self.savings: dict[str, tuple[Saving, Saving]] = {
            "plain": (contextlib.nullcontext, contextlib.nullcontext),
            "fp8": (lambda: SavedTensors(Fp8Codec(), min_numel=1).active(), contextlib.nullcontext),
            "mxfp4": (stored, contextlib.nullcontext),
            "mxfp4 mlp": (contextlib.nullcontext, stored),
        }

    def measure(self) -> list[Result]:
        """Run every saving once and check it.

        Raises:
            CheckError: a saving broke what the module's text states.
        """
        # The first pass of all allocates work spaces and loads kernels.
        for name in self.savings:
            self._pass(name)
        want = self._pass("plain")
        return [self._check(name, want) for name in self.savings]

    def time(self, results: Sequence[Result], iterations: int) -> None:
        """Add the times of each iteration to the results."""
        gc.collect()
        gc.disable()
        try:
            for iteration in range(-_WARM_UP[self.device.type], iterations):
                for result in results:
                    forward_ms, total_ms = self._time_once(result.saving)
                    if iteration >= 0:
                        result.forward_ms.append(forward_ms)
                        result.total_ms.append(total_ms)
        finally:
            gc.enable()

    def _forward(self, name: str) -> tuple[torch.Tensor, StorageReport]:
        around_all, around_mlp = self.savings[name]
        reports: list[StorageReport] = []

        @contextlib.contextmanager
        def reporting():  # type: ignore[no-untyped-def]
            with around_mlp() as report:
                yield
            reports.extend([report] if report else [])

        self.block.around_mlp = reporting
        with around_all() as report:
            y = self.block(self.x)
        reports.extend([report] if report else [])
        return y, reports[0] if reports else StorageReport()

    def _pass(self, name: str) -> tuple[Result, torch.Tensor, list[torch.Tensor]]:
        """Return what one pass measured, the output and the gradients, the input's first."""
        on_cuda = self.device.type == "cuda"
        grads = [t.grad for t in (self.x, *self.block.parameters()) if t.grad is not None]
        for grad in grads:
            grad.zero_()
        if on_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device) if on_cuda else 0
        y, report = self._forward(name)
        held = torch.cuda.memory_allocated(self.device) - before if on_cuda else None
        y.backward(self.grad)
        peak = torch.cuda.max_memory_allocated(self.device) - before if on_cuda else None
        return Result(name, report, held, peak, 0.0, 0.0), y.detach(), [grad.clone() for grad in grads]

    def _check(self, name: str, want: tuple[Result, torch.Tensor, list[torch.Tensor]]) -> Result:
        _, want_y, want_grads = want
        result, y, grads = self._pass(name)
        _require(torch.equal(y, want_y), f"{name}: the output is not that of plain")
        _require(all(torch.isfinite(grad).all() for grad in grads), f"{name}: a gradient is not finite")
        result.dx_error_percent = _error_percent(grads[:1], want_grads[:1])
        result.dw_error_percent = _error_percent(grads[1:], want_grads[1:])
        worst, limit = max(result.dx_error_percent, result.dw_error_percent), ERROR_LIMITS[name]
        # Atomic additions of attention's backward on CUDA change plain's own last bits.
        slack = 0.01 if self.device.type == "cuda" else 0.0
        _require(worst <= limit + slack, f"{name}: gradient error must be at most {limit} %, got {worst:.3f} %")
        report, limit = result.report, RATIOS.get(name, 0.0)
        within = 0 < report.bytes_after <= limit * report.bytes_before if name in RATIOS else report == StorageReport()
        _require(within, f"{name}: what is stored must take at most {limit} of its bytes, got {report}")
        return result

    def _time_once(self, name: str) -> tuple[float, float]:
        if self.device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            events[0].record()
            y, _ = self._forward(name)
            events[1].record()
            y.backward(self.grad)
            events[2].record()
            events[2].synchronize()
            return events[0].elapsed_time(events[1]), events[0].elapsed_time(events[2])
        start = time.perf_counter()
        y, _ = self._forward(name)
        middle = time.perf_counter()
        y.backward(self.grad)
        return 1e3 * (middle - start), 1e3 * (time.perf_counter() - start)


def _error_percent(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    error = energy = 0.0
    for g, p in zip(got, want, strict=True):
        error += (g.float() - p.float()).square().sum(dtype=torch.float64).item()
        energy += p.float().square().sum(dtype=torch.float64).item()
    return 100 * error / energy


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckError(problem)


def _json_lines(results: Sequence[Result], given: argparse.Namespace, size: Geometry, device: torch.device) -> str:
    about = {
        "benchmark": NAME,
        "command": shlex.join(["python", "-m", "qcomm", "bench", NAME, *sys.argv[1:]]),
        "commit": harness.commit(),
        "machine": _machine(device),
        "geometry": dataclasses.asdict(size),
        "iterations": given.iterations,
        "seed": given.seed,
    }
    return "".join(f"{json.dumps({**about, **result.figures()})}\n" for result in results)


def _machine(device: torch.device) -> dict[str, str | None]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "devices": f"1 x {name}",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def _table(results: Sequence[Result]) -> str:
    plain_ms = harness.percentile(results[0].total_ms, 0.5)
    cells = []
    for result in results:
        total_ms = harness.percentile(result.total_ms, 0.5)
        cells.append(
            (
                result.saving,
                *(_megabytes(n) for n in (result.held_bytes, result.peak_bytes)),
                *(_megabytes(n) for n in (result.report.bytes_after, result.report.bytes_before)),
                f"{harness.percentile(result.forward_ms, 0.5):.3f}",
                f"{total_ms:.3f}",
                f"{total_ms / plain_ms:.2f}x",
                f"{result.dx_error_percent:.3f}",
                f"{result.dw_error_percent:.3f}",
            )
        )
    return format_table(_HEADERS, cells)


def _megabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.1f}"


def _size(given: argparse.Namespace, device: torch.device) -> Geometry:
    """Fill in what was not given: a small block on the CPU."""
    on_cuda = device.type == "cuda"
    hidden = given.hidden or (4096 if on_cuda else 256)
    size = Geometry(
        given.tokens or (4096 if on_cuda else 128),
        given.batch,
        hidden,
        given.intermediate or hidden * 7 // 2,
    )
    for name, value in dataclasses.asdict(size).items():
        validate.multiple(name, value, 1 if name in ("tokens", "batch") else HEAD)
    return size


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m qcomm bench {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="length of a sequence; default 4096 (CPU: 128)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences; default 1")
    parser.add_argument("--hidden", type=int, metavar="N", help="default 4096 (CPU: 256)")
    parser.add_argument("--intermediate", type=int, metavar="N", help="default 3.5 times hidden")
    parser.add_argument("--iterations", type=int, default=20, metavar="N", help="default 20")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON object a row")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        validate.positive("iterations", given.iterations)
        size = _size(given, device)
    except ValueError as error:
        parser.error(str(error))
    try:
        bench = Bench(size, device, given.seed)
        results = bench.measure()
    except CheckError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    bench.time(results, given.iterations)
    title = f"[{size.batch}, {size.tokens}, {size.hidden}] of BF16, intermediate {size.intermediate}, on {device.type}"
    note = "" if device.type == "cuda" else "\nheld and peak need CUDA's allocator; stored is the context's report."
    print(f"{title}{note}\n\n{_table(results)}", flush=True)
    if given.json is not None:
        with given.json.open("a") as file:
            file.write(_json_lines(results, given, size, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
