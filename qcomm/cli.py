"""The command line: `python -m qcomm info | demo | trace | bench | tune | simulate`."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from qcomm import resources
from qcomm.errors import QcommError
from qcomm.formats import WIRE_KINDS

_BENCH_PREFIX = "bench_"
_SCRIPTS = {
    "tune": "measure how the kernels are best set here; start it with mpirun",
    "simulate": "count what the exchange puts on each link at any number of nodes, and say how long that should take",
}
_SIZES = (
    ("hidden", "elements in a token"),
    ("tokens", "most tokens of a rank; ranks take different numbers of them"),
    ("experts", "experts in all"),
    ("topk", "experts of a token"),
    ("intermediate", "width inside an expert"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; wrong usage exits with code 2.

    Args:
        argv: arguments after the program's name; None takes them from sys.argv.
    """
    parser = argparse.ArgumentParser(prog="python -m qcomm", description="Quantized MoE dispatch and combine.")
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="say what this machine has and which backend it would take")
    info.add_argument("--json", action="store_true", help="print a JSON object instead of a table")

    demo = commands.add_parser("demo", help="run an MoE layer on real text, once per wire; start it with mpirun")
    for flag, what in _SIZES:
        demo.add_argument(f"--{flag}", type=int, metavar="N", help=f"{what} (default: by device)")

    trace = commands.add_parser("trace", help="write a trace of one dispatch and combine of every rank, for Perfetto")
    trace.add_argument("--out", type=Path, default=Path("trace.json"), metavar="FILE", help="default trace.json")
    trace.add_argument("--wire", choices=WIRE_KINDS, default="mxfp4", help="of dispatch (default mxfp4)")
    trace.add_argument("--static", action="store_true", help="dispatch without host synchronisation")
    for flag, _ in _SIZES[:-1]:
        trace.add_argument(f"--{flag}", type=int, metavar="N", help="default: by device, as in bench dispatch")

    bench = commands.add_parser("bench", help="run a benchmark; without a name, list them")
    bench.add_argument("name", nargs="?", metavar="NAME")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the benchmark")

    # Their flags are those of the script, --help too.
    for script, what in _SCRIPTS.items():
        commands.add_parser(script, add_help=False, help=what)

    options, rest = parser.parse_known_args(argv)
    if options.command in _SCRIPTS:
        return _script(options.command, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "info":
        from qcomm.info import show

        show(as_json=options.json)
        return 0
    if options.command == "demo":
        from qcomm.demo import run

        run({flag: getattr(options, flag) for flag, _ in _SIZES})
        return 0
    if options.command == "trace":
        from qcomm import trace as tracing

        sizes = {flag: getattr(options, flag) for flag, _ in _SIZES[:-1]}
        try:
            tracing.run(options.out, sizes, options.wire, static=options.static)
        except ValueError as error:
            trace.error(str(error))
        return 0
    return _bench(options.name, options.arguments)


def _bench(name: str | None, arguments: list[str]) -> int:
    folder = _benchmarks()
    if folder is None:
        return 2
    scripts = {path.stem.removeprefix(_BENCH_PREFIX): path for path in sorted(folder.glob(f"{_BENCH_PREFIX}*.py"))}
    if name is None or name not in scripts:
        what = "bench needs a NAME" if name is None else f"NAME must be a benchmark in {folder}, got {name!r}"
        sys.stderr.write(f"{what}; there are: {', '.join(scripts) or 'none'}\n")
        return 2
    _run_script(scripts[name], arguments)
    return 0


def _script(name: str, arguments: list[str]) -> int:
    folder = _benchmarks()
    if folder is None:
        return 2
    _run_script(folder / f"{name}.py", arguments)
    return 0


def _benchmarks() -> Path | None:
    """Return the folder of scripts; None if there is none, which is said."""
    try:
        return resources.find("benchmarks")
    except QcommError as error:
        sys.stderr.write(f"{error}\n")
        return None


def _run_script(script: Path, arguments: list[str]) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` would: its own sys.argv, its folder first on sys.path."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
