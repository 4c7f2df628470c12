"""Measure how the kernels of dispatch and combine are best set on the GPUs that run this.

Geometry: 4096 tokens a rank of 7168, top-8 of 256 experts, BF16 in; for calls of few tokens 32 to 1024 of the same.

    mpirun -n 4 python -m qcomm tune
    mpirun -n 4 python -m qcomm tune --wire mxfp4 --json tune.jsonl --update tuning.json

For each operation and wire, one after the other:

1. `senders`: pairs of records in flight and flags raised together (qcomm/tuning.py says what they are), with all SMs;
   dispatch by a replay and a static call to expert-major rows, combine of such rows.
2. `SMs`: the best pair with all SMs, three quarters, half and a quarter of them.
3. `decode`: how many tokens one kernel should do, with what was best so far: static "batched" calls in a CUDA graph, as
   in `bench decode`, by one kernel and by several.

The best is what takes least time, a sum over the calls; of what is within 1 % of it the first in this order: for
senders what the table in effect has, then few in flight before many; for SMs few before many. One kernel does as many
tokens as it takes no longer for than several, at every count up to there.

Every result is compared with an oracle first, the collective backend; a difference ends the run with code 1. harness.py
says how calls are timed. --update puts the best into a table, which $QCOMM_TUNING=FILE then puts into effect; a FILE
that is not there begins as a copy of the table in effect. On a backend without kernels the run ends with code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import harness
import oracle
import runner
import torch
import workload

from qcomm import tuning
from qcomm.buffer import Buffer
from qcomm.formats import RecvLayout, WireKind, WirePrecision
from qcomm.handle import DispatchHandle, Received
from qcomm.table import format_table
from qcomm.transport.select import Choice
from qcomm.tuning import Op, Tuning

NAME = "tune"
_FEW_TOKENS = (32, 64, 128, 256, 512, 1024)
_IN_FLIGHT = (1, 2, 4, 8, 16)
_FLAGS_TOGETHER = (1, 2, 4)
_NEARLY = 1.01
_HEADERS = ("sweep", "op", "wire", "tokens", "in flight", "flags", "SMs", "one kernel", "p50 us", "sum us", "")
_BEST_HEADERS = ("op", "wire", "ranks", "in flight", "flags", "SMs", "one kernel up to")

T = TypeVar("T")


class Case(NamedTuple):
    """A call to be timed, and what it gave."""

    call: Callable[[], object]
    got: oracle.Fields


@dataclasses.dataclass(frozen=True)
class Measured:
    """One setting's times, by call."""

    sweep: str
    op: Op
    wire: WireKind
    tokens: int
    tuning: Tuning
    timings: Mapping[str, harness.Timing]

    @property
    def total_us(self) -> float:
        """What settings are compared by."""
        return sum(timing.p50_us for timing in self.timings.values())


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command line; `shared` is what the exchange benchmarks take too."""

    shared: workload.Flags
    ops: tuple[Op, ...]
    few_tokens: tuple[int, ...]
    update: Path | None


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What one run measures with."""

    flags: Flags
    session: harness.Session
    work: workload.Workload
    clock: harness.Clock

    @property
    def device(self) -> Any:
        """Properties of the GPU."""
        return torch.cuda.get_device_properties(self.session.member.device)


def pairs(base: Tuning) -> list[Tuning]:
    """List what to try of records in flight and flags raised together: first `base`, then few in flight before many."""
    tried = [
        dataclasses.replace(base, in_flight=in_flight, flags_together=together)
        for in_flight in _IN_FLIGHT
        for together in _FLAGS_TOGETHER
        if together <= in_flight
    ]
    return list(dict.fromkeys((base, *tried)))


def sm_steps(base: Tuning, num_sms: int) -> list[Tuning]:
    """List `base` with a quarter, half, three quarters and all of the SMs."""
    steps: list[int | None] = [num_sms * quarters // 4 for quarters in (1, 2, 3)]
    return [dataclasses.replace(base, num_sms=step) for step in (*(step for step in steps if step), None)]


def best(measured: Sequence[Measured]) -> Measured:
    """Return the first of those that take at most 1 % longer than the one that takes least."""
    least = min(each.total_us for each in measured)
    return next(each for each in measured if each.total_us <= _NEARLY * least)


def most_decode_tokens(times: Iterable[tuple[int, float, float]]) -> int:
    """Return the most tokens that one kernel should do, 0 for none.

    Args:
        times: tokens, and how long one kernel and several take for them, in any order.
    """
    most = 0
    for tokens, one, several in sorted(times):
        if one > several:
            break
        most = tokens
    return most


def main() -> int:
    flags = _parse()
    with harness.session() as session:
        member = session.member
        try:
            work = workload.make(flags.shared, workload.sizes(flags.shared, member), member)
            table = _table(flags.update)
        except (OSError, ValueError) as error:
            return runner.fail(session, str(error), 2)
        choice = workload.backend_choice(flags.shared, work)
        if choice.backend != "nvlink":
            why = f"there is nothing to tune: the {choice.backend} backend has no kernels ({choice.reason})"
            return runner.fail(session, why, 2)
        bench = Bench(flags, session, work, harness.Clock(member, workload.iterations(flags.shared, member)))
        try:
            rows = _run(bench, choice)
        except harness.MismatchError as error:
            return runner.fail(session, f"results differ from the oracle's, nothing is reported:\n{error}", 1)
        if flags.update is not None and member.rank == 0:
            flags.update.write_text(tuning.render(tuning.merge(table, rows)))
    return 0


def _parse() -> Flags:
    parser = argparse.ArgumentParser(
        prog=f"python -m qcomm {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    workload.add_shared_flags(parser)
    parser.add_argument("--hidden", type=int, metavar="N", help=workload.default_size("hidden"))
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens a rank of large calls (default 4096)")
    few = ",".join(map(str, _FEW_TOKENS))
    parser.add_argument(
        "--decode-tokens", type=workload.counts, default=_FEW_TOKENS, metavar="N[,N...]", help=f"default {few}"
    )
    parser.add_argument("--op", type=workload.names_of(tuning.OPS), action="extend", help="repeatable, or a comma list")
    parser.add_argument("--update", type=Path, metavar="FILE", help="put the best into a table, made if not there")
    given = parser.parse_args()
    if given.update is not None and not given.update.absolute().parent.is_dir():
        parser.error(f"--update must be in a folder that is there, got {given.update}")
    if min(given.decode_tokens) <= 0:
        parser.error(f"--decode-tokens must be positive, got {min(given.decode_tokens)}")
    shared = workload.shared_flags(given)
    shared["sizes"] |= {"tokens": given.tokens, "hidden": given.hidden}
    return Flags(
        shared=workload.Flags(
            **shared,
            sweep={},
            recv_dtype=None,
            recv_layouts=(),
            backend="auto",
            num_sms=None,
            lines=None,
            plot=None,
        ),
        ops=tuple(cast("list[Op]", given.op or tuning.OPS)),
        few_tokens=tuple(sorted(set(given.decode_tokens))),
        update=given.update,
    )


def _table(file: Path | None) -> tuning.Table:
    """Read what is to be updated, before anything is measured."""
    return tuning.current() if file is None or not file.exists() else tuning.read(file)


def _run(bench: Bench, choice: Choice) -> list[tuning.Row]:
    """Measure everything and report it; return the best as rows of a table. Collective."""
    member, shared = bench.session.member, bench.flags.shared
    machine = harness.machine(member)
    about = {"benchmark": NAME, **runner.describe((NAME,), shared, bench.session, bench.work, choice)}
    source = f"{machine['devices']}, torch {machine['torch']}; {about['command']}; commit {about['commit']}"
    measured: list[Measured] = []
    chosen: list[Measured] = []
    rows = []
    for op in bench.flags.ops:
        for wire in shared.wires:
            base = tuning.choose(
                tuning.current(), device=bench.device.name, op=op, wire=wire, num_ranks=member.num_ranks
            )
            found, taken, row = _tune(bench, op, wire, base, source)
            measured += found
            chosen += taken
            rows.append(row)
    if member.rank == 0:
        print(_title(machine, bench, choice), flush=True)
        print(f"\n{_table_of(measured, chosen)}\n\n{_table_of_best(rows)}", flush=True)
        if shared.json is not None:
            with shared.json.open("a") as file:
                file.write(json_lines(measured, chosen, {**about, "machine": machine}))
    return rows


def _tune(
    bench: Bench, op: Op, wire: WireKind, base: Tuning, source: str
) -> tuple[list[Measured], list[Measured], tuning.Row]:
    """Measure one operation on one wire; return everything, what was chosen, and the row. Collective."""
    member = bench.session.member
    # Several kernels a call, however few the tokens are.
    base = dataclasses.replace(base, num_sms=None, decode_tokens=0)
    senders = _measure(bench, bench.work, "senders", op, wire, pairs(base))
    pair = best(senders)
    fewer = _measure(bench, bench.work, "SMs", op, wire, sm_steps(pair.tuning, bench.device.multi_processor_count))
    sms = best(fewer)
    decode = []
    for tokens in bench.flags.few_tokens:
        geometry = dataclasses.replace(bench.work.geometry, tokens=tokens)
        work = workload.make(bench.flags.shared, geometry, member)
        both = [dataclasses.replace(sms.tuning, decode_tokens=most) for most in (tokens, 0)]
        decode.append(_measure(bench, work, "decode", op, wire, both))
    most = most_decode_tokens((one.tokens, one.total_us, several.total_us) for one, several in decode)
    row = tuning.Row(
        device=bench.device.name,
        op=op,
        wire=wire,
        num_ranks=member.num_ranks,
        tuning=dataclasses.replace(sms.tuning, decode_tokens=most),
        source=source,
    )
    faster = [one if one.tokens <= most else several for one, several in decode]
    return [*senders, *fewer, *(each for both in decode for each in both)], [pair, sms, *faster], row


def _measure(
    bench: Bench, work: workload.Workload, sweep: str, op: Op, wire: WireKind, tunings: Sequence[Tuning]
) -> list[Measured]:
    """Check, then time settings of one operation, wire and workload. Collective.

    Raises:
        harness.MismatchError: some rank's result differs from the oracle's.
    """
    few, provider = sweep == "decode", bench.flags.shared.provider
    cases = _dispatch_cases if op == "dispatch" else _combine_cases
    capture = bench.clock.captured if few else _at_once
    precision = WirePrecision(**{f"{op}_fwd": wire})
    if work.member.rank == 0:
        sys.stderr.write(f"{sweep}: {op}, wire {wire}, {work.geometry.tokens} tokens, {len(tunings)} settings\n")
        sys.stderr.flush()
    with work.buffer(precision, "collective") as buffer:
        want = {name: case.got for name, case in cases(buffer, work, wire, few, _at_once).items()}
    found = []
    for each in tunings:
        with tuning.force(**dataclasses.asdict(each)), work.buffer(precision, "nvlink", provider) as buffer:
            made = cases(buffer, work, wire, few, capture)
            what = f"{op}, wire {wire}, {work.geometry.tokens} tokens, {each}"
            problems = [oracle.differing(f"{name} of {what}", case.got, want[name]) for name, case in made.items()]
            harness.require_equal(work.member, [problem for some in problems for problem in some])
            harness.release(work.member)
            timings = {name: bench.clock.time(case.call) for name, case in made.items()}
            buffer.check()
        found.append(Measured(sweep, op, wire, work.geometry.tokens, each, timings))
    return found


def _at_once(call: Callable[[], T]) -> tuple[Callable[[], object], T]:
    """Stand for `harness.Clock.captured` where there is no graph."""
    return call, call()


Capture = Callable[[Callable[[], Any]], tuple[Callable[[], object], Any]]


def _dispatch_cases(
    buffer: Buffer, work: workload.Workload, wire: WireKind, few: bool, capture: Capture
) -> dict[str, Case]:
    """Make the calls of dispatch. Collective."""
    layout: RecvLayout = "batched" if few else "expert_major"

    def routed(*, static: bool) -> tuple[Received, DispatchHandle]:
        return buffer.dispatch(work.x, work.topk_idx, work.topk_weights, recv_layout=layout, static=static)

    static, came = capture(lambda: routed(static=True))
    found = {"static": Case(static, oracle.fields(*came))}
    if not few:
        _, handle = routed(static=False)

        def replay() -> tuple[Received, DispatchHandle]:
            return buffer.dispatch(work.x, handle=handle)

        call, came = capture(replay)
        found["replay"] = Case(call, oracle.fields(*came))
    return found


def _combine_cases(
    buffer: Buffer, work: workload.Workload, wire: WireKind, few: bool, capture: Capture
) -> dict[str, Case]:
    """Make the call of combine, of rows that are the same whatever the backend. Collective."""
    layout: RecvLayout = "batched" if few else "expert_major"
    received, handle = buffer.dispatch(work.x, work.topk_idx, work.topk_weights, recv_layout=layout, static=few)
    generator = torch.Generator(work.member.device).manual_seed(work.member.rank)
    shape = (*received.x.shape[:-1], work.geometry.hidden)
    y = torch.randn(shape, generator=generator, device=work.member.device, dtype=torch.bfloat16)
    call, out = capture(lambda: buffer.combine(y, handle))
    return {"combine": Case(call, {"sum": oracle.bits(out)})}


def _title(machine: Mapping[str, str | None], bench: Bench, choice: Choice) -> str:
    sizes, num_ranks = bench.work.geometry, bench.session.member.num_ranks
    return (
        f"{machine['devices']}, {num_ranks} ranks, tokens of {sizes.hidden}, top-{sizes.topk} of {sizes.experts} "
        f"experts, {bench.flags.shared.routing} routing, torch {machine['torch']}\n"
        f"backend {choice.backend}: {choice.reason}"
    )


def _table_of(measured: Sequence[Measured], chosen: Sequence[Measured]) -> str:
    lines = []
    for each in measured:
        times = ", ".join(f"{name} {timing.p50_us:.1f}" for name, timing in each.timings.items())
        cells = (each.sweep, each.op, each.wire, str(each.tokens), *_cells(each.tuning))
        lines.append((*cells, times, f"{each.total_us:.1f}", "best" if each in chosen else ""))
    return format_table(_HEADERS, lines)


def _table_of_best(rows: Sequence[tuning.Row]) -> str:
    return format_table(_BEST_HEADERS, [(row.op, row.wire, str(row.num_ranks), *_cells(row.tuning)) for row in rows])


def _cells(found: Tuning) -> tuple[str, ...]:
    sms = "all" if found.num_sms is None else str(found.num_sms)
    return str(found.in_flight), str(found.flags_together), sms, str(found.decode_tokens)


def json_lines(measured: Sequence[Measured], chosen: Sequence[Measured], about: Mapping[str, object]) -> str:
    """Render one JSON object a setting and call."""
    lines = []
    for each in measured:
        what = {"sweep": each.sweep, "op": each.op, "wire": each.wire, "tokens": each.tokens}
        settings = {**dataclasses.asdict(each.tuning), "best": each in chosen}
        lines += [
            json.dumps({**about, **what, **settings, "call": name, **dataclasses.asdict(timing)})
            for name, timing in each.timings.items()
        ]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
