"""The course of an exchange benchmark: set up, take the ceiling and the baselines, measure every wire, report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence

import baselines
import deep_ep_baseline
import harness
import links
import plot_exchange
import workload

from qcomm.buffer import Buffer
from qcomm.formats import RecvLayout, WireKind, WirePrecision
from qcomm.transport.select import Choice

Baseline = Callable[[workload.Workload, baselines.Traffic, harness.Clock], list[harness.Row]]


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What one run measures with."""

    flags: workload.Flags
    work: workload.Workload
    traffic: baselines.Traffic
    clock: harness.Clock


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What sets dispatch and combine apart.

    Attributes:
        name: as on the command line.
        precision: of the buffer for a wire.
        baselines: times what NCCL would do, in BF16 first.
        measure: checks one configuration, then times it.
        peer: times what DeepEP would do, where it is installed; None where it has no such call.
        tokens: counts to run one after the other where the command line names none; None is one run.
    """

    name: str
    precision: Callable[[WireKind], WirePrecision]
    baselines: Baseline
    measure: Callable[[Context, Buffer, WireKind, RecvLayout], list[harness.Row]]
    peer: Baseline | None = None
    tokens: tuple[int, ...] | None = None


def run(benchmark: Benchmark, flags: workload.Flags) -> int:
    """Run a benchmark, or draw an earlier run; return the exit code: 1 for a wrong result, 2 for wrong use."""
    if flags.lines is not None and flags.plot is not None:
        try:
            plot_exchange.draw(plot_exchange.read(flags.lines, benchmark.name), flags.plot)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            sys.stderr.write(f"{error}\n")
            return 2
        return 0
    with harness.session() as session:
        for one in workload.runs(flags, benchmark.tokens):
            try:
                geometry = workload.sizes(one, session.member)
            except ValueError as error:
                return fail(session, str(error), 2)
            try:
                _run(benchmark, one, session, workload.make(one, geometry, session.member))
            except harness.MismatchError as error:
                return fail(session, f"results differ from the oracle's, no times are reported:\n{error}", 1)
    return 0


def fail(session: harness.Session, message: str, code: int) -> int:
    """Say from rank 0 why the run ends, and return its exit code. Collective."""
    if session.member.rank == 0:
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
    harness.settle(session.member)
    return code


def _run(benchmark: Benchmark, flags: workload.Flags, session: harness.Session, work: workload.Workload) -> None:
    member = session.member
    choice, topology = workload.backend_choice(flags, work), workload.nodes(flags, work).topology
    machine = harness.machine(member)
    clock = harness.Clock(member, workload.iterations(flags, member))
    ceiling = harness.peer_store_gbs(clock, member, choice.provider, topology)
    context = Context(flags, work, baselines.find_traffic(work), clock)
    rows = benchmark.baselines(work, context.traffic, clock)
    nccl_us = rows[0].timing.p50_us
    notes = []
    if benchmark.peer is not None:
        obstacles = [each for each in harness.gather(member, deep_ep_baseline.obstacle(member)) if each is not None]
        notes = [f"{deep_ep_baseline.NAME}: {each}" for each in obstacles[:1]]
        rows += [] if obstacles else benchmark.peer(work, context.traffic, clock)
    for wire in flags.wires:
        precision = benchmark.precision(wire)
        with work.buffer(precision, flags.backend, flags.provider, flags.num_sms) as buffer:
            for layout in flags.recv_layouts:
                rows += benchmark.measure(context, buffer, wire, layout)
    title = "\n".join([_title(flags, work, choice, machine, ceiling), *notes])
    words = "bench", benchmark.name
    about = {"benchmark": benchmark.name, **describe(words, flags, session, work, choice), "machine": machine}
    rates = links.LinkRates(flags.nvlink_gbs or ceiling, flags.rdma_gbs)
    done = harness.Run(title, about, topology, work.geometry.hidden, ceiling, nccl_us, rates)
    harness.report(member, rows, done, flags.json)


def describe(
    words: Sequence[str],
    flags: workload.Flags,
    session: harness.Session,
    work: workload.Workload,
    choice: Choice,
) -> dict[str, object]:
    """Return what every JSON line of a run holds; `words` are those of its command."""
    return {
        "command": harness.command(session.launch, *words),
        "commit": harness.commit(),
        "num_ranks": session.member.num_ranks,
        "geometry": dataclasses.asdict(work.geometry),
        "routing": flags.routing,
        "input": work.input,
        "seed": flags.seed,
        "iterations": workload.iterations(flags, session.member),
        "num_sms": flags.num_sms,
        "backend": choice.backend,
        "backend_reason": choice.reason,
    }


def _title(
    flags: workload.Flags,
    work: workload.Workload,
    choice: Choice,
    machine: dict[str, str | None],
    ceiling: float | None,
) -> str:
    """Say in a few words what ran where."""
    sizes, num_ranks = work.geometry, work.member.num_ranks
    library = f"NCCL {machine['nccl']}" if machine["nccl"] else "gloo"
    limit = f"{ceiling:.0f} GB/s" if ceiling else "none"
    given = "" if work.input == "bf16" else f", {work.input} in"
    num_sms = f", {flags.num_sms} SMs a kernel" if flags.num_sms else ""
    return (
        f"{machine['devices']}, {num_ranks} ranks, {sizes.tokens} tokens a rank of {sizes.hidden}, top-{sizes.topk} of "
        f"{sizes.experts} experts, {flags.routing} routing, torch {machine['torch']}, {library}, "
        f"peer-store ceiling {limit}{given}{num_sms}\nbackend {choice.backend}: {choice.reason}"
    )
