"""Time the kernels of the codec against a copy: one process, one GPU.

    python -m qcomm bench codec
    python -m qcomm bench codec --only stochastic --sizes 16384x7168 --no-compile
    python -m qcomm bench codec --from codec.jsonl --plot codec.svg     (no GPU)

GEOMETRY. A size is `[rows, columns]` of the BF16 (FP16, FP32) tensor; SwiGLU's input is of that size, its output half
as wide. The values are Gaussian, each block of 32 times a power of two from 2^-2 to 2^2. The column-wise kernels get 32
groups of uneven size, multiples of 128 rows, on the device.

BYTES. Each input once and each output once, per element: BF16 and FP16 2, FP32 4, MXFP4 1/2 + 1/32, FP8 1 + 4/128,
FP8 with packed scales 1 + 4/512. GB/s is their sum over p50.

METHOD. Before a call is timed it runs once over outputs full of NaN, which must then be the oracle's, bit for bit;
SwiGLU's within the bounds of benchmarks/codec_swiglu.py. In an iteration a 256 MiB buffer is read, which leaves L2 full
of clean lines; a buffer written instead would leave dirty ones, and the call would pay for writing them back.
`torch.cuda._sleep` holds the device while the host launches all below; an event is recorded, the call made, an event
recorded. If the device came to the first event before the host had recorded the last, all iterations are repeated under
a longer sleep; a call that is late even so waits for the host itself and is marked. Outputs are allocated beforehand,
but for the baselines', which come from torch's cache. Ten iterations come before those that count. p50 and p99 are
nearest-rank percentiles. The last lines that a call has written may still be in L2 when the clock stops, of the copy as
of the kernels.

CEILING. `copy_` of a BF16 tensor of [16384, 7168] to another, timed in the same run in the same way. "of ceiling" is
the share of its bandwidth, "of own copy" that of a copy of a BF16 tensor of the row's own size. Small sizes are bound
by the launch and not by the memory.

BASELINES. At every size the chain that the column-wise kernel replaces; at the first size only, because each size
compiles anew, what `torch.compile` makes of the oracle and of that chain. See benchmarks/codec_baselines.py. Each is
compared with the kernel's result before it is timed; one that fails is "-", with the reason beside it.

RESOURCES. Registers and spilled bytes of a thread and shared memory of a block: of the CUDA kernels as ptxas reports
them for this GPU, of Triton's as the driver does; those that the calls at the first size launch.
"""

from __future__ import annotations

import argparse
import gc
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import codec_report
import harness
import plot_codec
import plotting
import torch
from codec_baselines import BaselineError, baselines
from codec_entries import COLUMN_MULTIPLE, ENTRIES, ROW_MULTIPLE
from codec_inputs import Case, Entry, Inputs, Name, Size, copy_case
from codec_report import NAME, TARGET_SIZE, Ceiling, Line, Times
from codec_resources import resources

SIZES = (TARGET_SIZE, Size(512, 7168), Size(4096, 2048))
COPY = Name("copy")
_FLUSH_BYTES = 256 * 2**20
# 0.2, 0.8 and 3.2 ms at 2 GHz.
_SLEEP_CYCLES = (400_000, 1_600_000, 6_400_000)
_WARM_UP = 10

Timer = Callable[[Callable[[], object]], Times]


class Clock:
    """Times calls as METHOD says."""

    def __init__(self, device: torch.device, iterations: int) -> None:
        self._iterations = iterations
        self._clean = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._largest = torch.empty((), dtype=torch.int32, device=device)

    def time(self, call: Callable[[], object]) -> Times:
        """Time a call."""
        gc.collect()
        gc.disable()
        try:
            for cycles in _SLEEP_CYCLES:
                samples = [self._once(call, cycles) for _ in range(_WARM_UP + self._iterations)][_WARM_UP:]
                host_bound = any(late for _, late in samples)
                if not host_bound:
                    break
        finally:
            gc.enable()
        times_us = [time_us for time_us, _ in samples]
        return Times(harness.percentile(times_us, 0.5), harness.percentile(times_us, 0.99), host_bound)

    def _once(self, call: Callable[[], object], sleep_cycles: int) -> tuple[float, bool]:
        """Return the time, and whether the device came to the call before the host had launched all of it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.amax(self._clean, 0, out=self._largest)
        torch.cuda._sleep(sleep_cycles)
        start.record()
        call()
        end.record()
        late = start.query()
        end.synchronize()
        return 1e3 * start.elapsed_time(end), late


class Bench:
    """Checks and times every entry at every size.

    Args:
        timer: times a call.
        device: of all tensors.
        compile_limit_s: how long a baseline may compile; 0 leaves those that do out.
    """

    def __init__(self, timer: Timer, device: torch.device, seed: int, compile_limit_s: float) -> None:
        self._timer, self._device, self._seed, self._compile_limit_s = timer, device, seed, compile_limit_s
        self._problems: list[str] = []

    def measure(self, entries: Sequence[Entry], sizes: Sequence[Size]) -> tuple[float, list[Line]]:
        """Return the ceiling in GB/s, and the lines.

        Raises:
            harness.MismatchError: results that are not the oracle's; names all of them.
        """
        copies = {size: self._copy(size) for size in dict.fromkeys((TARGET_SIZE, *sizes))}
        ceiling_gbs = codec_report.bandwidth_gbs(*copies[TARGET_SIZE])
        lines: list[Line] = []
        slower: list[Line] = []
        for size in sizes:
            ceiling = Ceiling(ceiling_gbs, codec_report.bandwidth_gbs(*copies[size]))
            lines.append(codec_report.timed_line("copy", COPY, size, *copies[size], ceiling))
            inputs = Inputs(size, self._device, self._seed)
            for entry in entries:
                case = entry.make(inputs)
                if not self._right(entry.name, size, case):
                    continue
                line = codec_report.timed_line("kernel", entry.name, size, case, self._timer(case.call), ceiling)
                lines.append(line)
                slower += self._baselines(entry.name, inputs, case, line, compiled=size == sizes[0])
        if self._problems:
            raise harness.MismatchError("\n".join(self._problems))
        return ceiling_gbs, lines + slower

    def _copy(self, size: Size) -> tuple[Case, Times]:
        case = copy_case(size, self._device)
        self._right(COPY, size, case)
        return case, self._timer(case.call)

    def _right(self, name: Name, size: Size, case: Case) -> bool:
        found = case.problems()
        self._problems += [f"{name}, {size}, {problem}" for problem in found]
        return not found

    def _baselines(self, name: Name, inputs: Inputs, case: Case, line: Line, compiled: bool) -> list[Line]:
        made = []
        for baseline in baselines(name, inputs, case, compiled and self._compile_limit_s > 0):
            times = failed = None
            try:
                baseline.warm_up(self._compile_limit_s)
                times = self._timer(baseline.call)
            except BaselineError as error:
                failed = str(error)
            made.append(codec_report.baseline_line(line, baseline.name, times, failed))
        return made


def parse_sizes(text: str) -> list[Size]:
    """Read "ROWSxCOLUMNS,...".

    Raises:
        argparse.ArgumentTypeError: not such a list, or sizes that the kernels do not take.
    """
    sizes = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise argparse.ArgumentTypeError(f"must be ROWSxCOLUMNS,..., got {part!r}")
        size = Size(*map(int, numbers))
        for number, multiple in zip(size, (ROW_MULTIPLE, COLUMN_MULTIPLE), strict=True):
            if number <= 0 or number % multiple:
                raise argparse.ArgumentTypeError(
                    f"must have rows in multiples of {ROW_MULTIPLE} and columns of {COLUMN_MULTIPLE}, got {part!r}"
                )
        sizes.append(size)
    if len(set(sizes)) < len(sizes):
        raise argparse.ArgumentTypeError(f"must name each size once, got {text!r}")
    return sizes


def select(only: str | None) -> list[Entry]:
    """Return the entries whose names hold the text."""
    return [entry for entry in ENTRIES if only is None or only in str(entry.name)]


def about(given: argparse.Namespace, machine: dict[str, str | None], arch: str, ceiling_gbs: float) -> Line:
    """Return what every line of a run holds."""
    return {
        "benchmark": NAME,
        "command": shlex.join(["python", "-m", "qcomm", "bench", NAME, *sys.argv[1:]]),
        "commit": harness.commit(),
        "machine": machine,
        "arch": arch,
        "sizes": [str(size) for size in given.sizes],
        "iterations": given.iterations,
        "seed": given.seed,
        "ceiling_gbs": ceiling_gbs,
    }


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m qcomm bench {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ",".join(map(str, SIZES))
    parser.add_argument("--sizes", type=parse_sizes, default=default, metavar="SIZES", help=f"default {default}")
    parser.add_argument("--only", metavar="TEXT", help="only kernels whose name and variant hold it")
    parser.add_argument("--iterations", type=_positive, default=100, metavar="N", help="default 100")
    parser.add_argument("--no-compile", action="store_true", help="leave out the baselines under torch.compile")
    parser.add_argument("--compile-limit-s", type=_positive, default=90, metavar="S", help="for each; default 90")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON object a row")
    parser.add_argument(
        "--plot", type=plotting.drawing, metavar="FILE", help="draw to an .svg or .png; needs matplotlib"
    )
    parser.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="measure nothing: take FILE's last run"
    )
    given = parser.parse_args()
    if not select(given.only):
        parser.error(f"--only must be part of one of {', '.join(str(entry.name) for entry in ENTRIES)}")
    if given.source is not None and given.json is not None:
        parser.error("--json is for a run, and --from measures nothing")
    if given.plot is not None:
        try:
            plotting.require()
        except ModuleNotFoundError as error:
            parser.error(str(error))
    return given


def _run(given: argparse.Namespace) -> list[Line]:
    device = torch.device("cuda", torch.cuda.current_device())
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    entries = select(given.only)
    clock = Clock(device, given.iterations)
    limit_s = 0 if given.no_compile else given.compile_limit_s
    with torch.no_grad():
        taken = resources(entries, Inputs(given.sizes[0], device, given.seed), arch)
        ceiling_gbs, lines = Bench(clock.time, device, given.seed, limit_s).measure(entries, given.sizes)
    machine = {
        "devices": f"1 x {torch.cuda.get_device_name(device)}",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    head = about(given, machine, arch, ceiling_gbs)
    return [{**head, **line} for line in lines + taken]


def main() -> int:
    given = _arguments()
    try:
        if given.source is not None:
            lines = codec_report.read_last_run(given.source)
        elif torch.cuda.is_available():
            lines = _run(given)
        else:
            sys.stderr.write("measuring needs a CUDA GPU, and torch finds none; --from FILE shows an earlier run\n")
            return 2
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except harness.MismatchError as error:
        sys.stderr.write(f"results differ from the oracle's, no times are reported:\n{error}\n")
        return 1
    print(codec_report.tables(lines), flush=True)
    if given.json is not None:
        with given.json.open("a") as file:
            file.write(codec_report.json_lines(lines))
    if given.plot is not None:
        plot_codec.draw(lines, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
