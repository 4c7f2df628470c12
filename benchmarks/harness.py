"""What the benchmarks share: start-up, timing, the ceiling and the report.

METHOD. An iteration on CUDA: a 256 MiB buffer is read, which fills L2 with clean lines; `torch.cuda._sleep` holds the
device for about 2 ms, so that the host has launched everything below before the device comes to it; a NCCL all_reduce
of one element on the current stream lets all ranks go on together; an event is recorded, the call made, and an event
recorded. The device time is the time between the events. Ten iterations come before those that count (CPU: 2). In a
pass of its own, because a call that synchronises with the host would wait for the sleep too, the host time is taken
with `time.perf_counter` around the call, with the device idle and the ranks together before it. On the CPU the host
time is the only one. Python collects no garbage meanwhile. p50 and p99 are nearest-rank percentiles of each rank's
iterations; reported are the slowest rank's p50, the slowest p99 and the slowest host p50.

CEILING. A kernel on all SMs stores 64 MiB to each peer of the node at once, in 16-byte vectors, timed in the same run
in the same way. Its bandwidth is the remote bytes of a rank over that time.

FIGURES. remote: bytes of records that a rank sends to other ranks, of the rank that sends most; bytes of a record are
those of `qcomm.records.RecordLayout`; metadata is in the JSON lines only. physical: remote / p50. logical: the same
records at 2 * hidden bytes / p50. x limit: p50 / (bytes of the busiest rank, in or out / ceiling), on one node. vs
NCCL: p50 of all_to_all_single of the same tokens in BF16 / p50. slowest: the rank of that p50. expected, bound by,
x expected: the time of links.py, what it is the time of, and p50 over it. remote counts records that go straight to
every rank; what the ranks sent with relays is in the second table, and in the JSON lines as rank_sent_bytes and
node_sent_bytes (fields of `qcomm.stats.Traffic`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import links
import torch
import torch.distributed as dist

from qcomm import resources
from qcomm.bootstrap import Launch, process_group
from qcomm.config import Member, synchronize_hosts
from qcomm.errors import QcommError
from qcomm.handle import DispatchHandle
from qcomm.jit import KernelLoader
from qcomm.ops.peer_store import launch_peer_store
from qcomm.stats import Traffic
from qcomm.table import format_table
from qcomm.topology import Topology
from qcomm.transport.symmetric import allocate

T = TypeVar("T")

_FLUSH_BYTES = 256 * 2**20
_SLEEP_CYCLES = 4_000_000  # 2 ms at 2 GHz: longer than the host takes for a call
_WARM_UP = {"cuda": 10, "cpu": 2}
_PEER_BYTES = 64 * 2**20
_DEADLINE_S = 30.0
_HEADERS = (
    "call",
    "wire",
    "layout",
    "p50 us",
    "p99 us",
    "host us",
    "slowest",
    "remote MB",
    "physical GB/s",
    "logical GB/s",
    "x limit",
    "vs NCCL bf16",
    "expected us",
    "bound by",
    "x expected",
)


class MismatchError(Exception):
    """A result differs from the oracle's; raised on every rank."""


@dataclasses.dataclass(frozen=True)
class Session:
    """How this process was started, and its place among the ranks."""

    launch: Launch
    member: Member


@dataclasses.dataclass(frozen=True)
class Timing:
    """One call's times in microseconds: of the slowest rank, and the p50 of every rank."""

    p50_us: float
    p99_us: float
    host_us: float
    rank_p50_us: tuple[float, ...]

    @property
    def slowest_rank(self) -> int:
        """The first rank with the largest p50."""
        return self.rank_p50_us.index(max(self.rank_p50_us))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        call, wire, layout: what was timed; layout is "-" where records stay as they came.
        timing: of the call.
        record_bytes: bytes of one record.
        remote_records: records the rank that sends most sends to other ranks.
        remote_records_in: records the rank that receives most receives from other ranks.
        metadata_bytes: bytes that travel with each record besides it.
        recv_dtype: what the receiver asked for; None for combine and the baselines.
        sent: what every rank sent in a call, where the benchmark tells; None for the baselines.
    """

    call: str
    wire: str
    layout: str
    timing: Timing
    record_bytes: int
    remote_records: int
    remote_records_in: int
    metadata_bytes: int = 0
    recv_dtype: str | None = None
    sent: links.Sent | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """What all rows of one run have in common; `about` goes into every JSON line as it is."""

    title: str
    about: Mapping[str, object]
    topology: Topology
    hidden: int
    ceiling_gbs: float | None
    nccl_us: float
    rates: links.LinkRates


@contextlib.contextmanager
def session() -> Iterator[Session]:
    """Start the process group, on GPUs where there are any. Collective."""
    with process_group() as launch, torch.no_grad():
        if launch.device.type == "cpu":
            torch.set_num_threads(1)
        group = dist.group.WORLD
        assert group is not None
        yield Session(launch, Member(group, launch.rank, launch.num_ranks, launch.device, _DEADLINE_S))


def gather(member: Member, value: T) -> list[T]:
    """Collect one value from every rank, by rank. Collective."""
    gathered = [value] * member.num_ranks
    dist.all_gather_object(gathered, value, group=member.group)
    return gathered


def sent(member: Member, handle: DispatchHandle, traffic: Traffic) -> links.Sent:
    """Collect what every rank sent in a call along a handle's route. Collective."""
    return links.Sent("hierarchical" if handle.relayed else "flat", tuple(gather(member, traffic)))


def settle(member: Member) -> None:
    """Wait until every rank's device is idle. Collective."""
    if member.device.type == "cuda":
        torch.cuda.synchronize(member.device)
    synchronize_hosts(member)


def require_equal(member: Member, problems: Sequence[str]) -> None:
    """Raise on every rank if any rank has a problem. Collective.

    Raises:
        MismatchError: holds every rank's problems.
    """
    everyone = gather(member, list(problems))
    told = [f"rank {rank}: {problem}" for rank, theirs in enumerate(everyone) for problem in theirs]
    if told:
        raise MismatchError("\n".join(told))


def release(member: Member) -> None:
    """Give cached device memory back."""
    if member.device.type == "cuda":
        torch.cuda.empty_cache()


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the nearest-rank percentile: the smallest value that `fraction` of the values do not exceed."""
    if not values:
        raise ValueError("values must not be empty")
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)]


def slowest(member: Member, device_us: Sequence[float], host_us: Sequence[float]) -> Timing:
    """Join every rank's times. Collective."""
    mine = (percentile(device_us, 0.5), percentile(device_us, 0.99), percentile(host_us, 0.5))
    p50, p99, host = zip(*gather(member, mine), strict=True)
    return Timing(max(p50), max(p99), max(host), tuple(p50))


class Clock:
    """Times calls as METHOD says. Collective."""

    def __init__(self, member: Member, iterations: int) -> None:
        self._member, self._iterations = member, iterations
        self._on_cuda = member.device.type == "cuda"
        self._flush = torch.zeros(_FLUSH_BYTES if self._on_cuda else 0, dtype=torch.uint8, device=member.device)
        self._token = torch.zeros(1, device=member.device)

    def captured(self, call: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Capture a call in a CUDA graph; return what replays it, and what the call gave. On the CPU, the call."""
        if not self._on_cuda:
            return call, call()
        call()
        settle(self._member)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        graph.replay()
        settle(self._member)
        return graph.replay, result

    def time(self, call: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Timing:
        """Time a call; `prepare` runs before each, untimed."""
        once = self._device_us if self._on_cuda else self._host_us
        gc.collect()
        gc.disable()
        try:
            for _ in range(_WARM_UP[self._member.device.type]):
                prepare()
                once(call)
            times_us, host_us = [], []
            for _ in range(self._iterations):
                prepare()
                times_us.append(once(call))
            for _ in range(self._iterations if self._on_cuda else 0):
                prepare()
                host_us.append(self._host_us(call))
            host_us = host_us or times_us
        finally:
            gc.enable()
        settle(self._member)
        return slowest(self._member, times_us, host_us)

    def _host_us(self, call: Callable[[], object]) -> float:
        settle(self._member)
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)

    def _device_us(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.amax()
        torch.cuda._sleep(_SLEEP_CYCLES)
        # After the sleep, whose length in time is that of each GPU's own clock.
        dist.all_reduce(self._token, group=self._member.group)
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)


def peer_store_gbs(clock: Clock, member: Member, provider: str | None, topology: Topology) -> float | None:
    """Measure the ceiling, None where there is no symmetric memory or no peer in the node. Collective.

    Raises:
        QcommError: a peer's bytes did not arrive.
    """
    if provider is None or topology.ranks_per_node == 1:
        return None
    near = topology.same_node if topology.num_nodes > 1 else None
    memory = allocate(provider, member.num_ranks * _PEER_BYTES, member, near)
    memory.local.zero_()
    settle(member)
    source = _pattern(member.rank, member.device)
    mine = member.rank * _PEER_BYTES
    mates = [rank for rank in range(member.num_ranks) if rank != member.rank and topology.same_node(rank, member.rank)]
    peers = [memory.peers[rank] + mine for rank in mates]
    kernels = KernelLoader(member.device, waits=False)

    def store() -> None:
        launch_peer_store(kernels, torch.cuda.current_stream(member.device).cuda_stream, source, peers)

    timing = clock.time(store)
    settle(member)
    for rank, came in enumerate(memory.local.split(_PEER_BYTES)):
        if rank in mates and not torch.equal(came, _pattern(rank, member.device)):
            raise QcommError(
                f"rank {member.rank}: the bytes of rank {rank} did not arrive", rank=member.rank, peer=rank
            )
    settle(member)
    memory.free()
    return len(peers) * _PEER_BYTES / timing.p50_us / 1e3


def _pattern(rank: int, device: torch.device) -> torch.Tensor:
    return ((torch.arange(_PEER_BYTES, dtype=torch.int32, device=device) + 17 * rank) % 251).to(torch.uint8)


def figures(row: Row, run: Run) -> dict[str, float | int | None]:
    """Compute what FIGURES names; None where a divisor is missing or zero."""
    timing, remote_bytes = row.timing, row.remote_records * row.record_bytes
    busiest_bytes = max(row.remote_records, row.remote_records_in) * row.record_bytes
    limit_us = busiest_bytes / run.ceiling_gbs / 1e3 if run.ceiling_gbs and run.topology.num_nodes == 1 else None
    return {
        "p50_us": timing.p50_us,
        "p99_us": timing.p99_us,
        "host_us": timing.host_us,
        "slowest_rank": timing.slowest_rank,
        "remote_records": row.remote_records,
        "remote_records_in": row.remote_records_in,
        "remote_bytes": remote_bytes,
        "remote_metadata_bytes": row.remote_records * row.metadata_bytes,
        "physical_gbs": remote_bytes / timing.p50_us / 1e3,
        "logical_gbs": row.remote_records * 2 * run.hidden / timing.p50_us / 1e3,
        "limit_ratio": timing.p50_us / limit_us if limit_us else None,
        "nccl_bf16_ratio": run.nccl_us / timing.p50_us,
    }


def table(lines: Sequence[links.Line]) -> str:
    """Lay the calls out."""
    return format_table(
        _HEADERS,
        [
            (
                line["call"],
                line["wire"],
                line["layout"],
                *(_cell(line[name], 1) for name in ("p50_us", "p99_us", "host_us")),
                str(line["slowest_rank"]),
                f"{line['remote_bytes'] / 1e6:.3f}",
                *(_cell(line[name], 2) for name in ("physical_gbs", "logical_gbs", "limit_ratio")),
                _cell(line["nccl_bf16_ratio"], 2, "x"),
                _cell(line["expected_us"], 1),
                line["bound"] or "-",
                _cell(line["expected_ratio"], 2),
            )
            for line in lines
        ],
    )


def _cell(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def lines_of(rows: Sequence[Row], run: Run) -> list[links.Line]:
    """Return one JSON object a row."""
    lines = []
    for row in rows:
        what = {"call": row.call, "wire": row.wire, "layout": row.layout, "recv_dtype": row.recv_dtype}
        sizes = {"record_bytes": row.record_bytes, "rank_p50_us": row.timing.rank_p50_us}
        line = {**run.about, "ceiling_gbs": run.ceiling_gbs, **what, **sizes, **figures(row, run)}
        lines.append({**line, **links.figures(line, run.topology, row.sent, run.rates)})
    return lines


def report(member: Member, rows: Sequence[Row], run: Run, json_path: Path | None) -> None:
    """Print the tables from rank 0, and append the JSON lines."""
    if member.rank:
        return
    lines = lines_of(rows, run)
    print("\n\n".join(part for part in (run.title, table(lines), links.table(lines)) if part), flush=True)
    if json_path is not None:
        with json_path.open("a") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)


def about_cpu(name: str) -> dict[str, object]:
    """Return what every JSON line of a benchmark of one process on the CPU begins with."""
    machine = {
        "devices": f"1 x {platform.machine()} CPU",
        "platform": platform.platform(),
        "torch": torch.__version__,
    }
    called = shlex.join(["python", "-m", "qcomm", "bench", name, *sys.argv[1:]])
    return {"benchmark": name, "command": called, "commit": commit(), "machine": machine}


def machine(member: Member) -> dict[str, str | None]:
    """Describe the hardware and software of the run. Collective."""
    on_cuda = member.device.type == "cuda"
    name = torch.cuda.get_device_name(member.device) if on_cuda else f"{platform.machine()} CPU"
    names = collections.Counter(gather(member, name))
    return {
        "devices": ", ".join(f"{count} x {name}" for name, count in names.items()),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_cuda else None,
    }


def command(launch: Launch, *words: str) -> str:
    """Reconstruct the command line; `words` follow the program's name."""
    start = {
        "mpirun": f"mpirun -n {launch.num_ranks} python",
        "torchrun": f"torchrun --nproc-per-node {launch.num_ranks}",
        "single": "python",
    }[launch.launcher]
    return shlex.join([*start.split(), "-m", "qcomm", *words, *sys.argv[1:]])


def commit() -> str | None:
    """Return the commit of the checkout, with `-dirty` where tracked files differ from it; None outside one."""
    folder = resources.checkout()
    if folder is None:
        return None
    try:
        describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        done = subprocess.run(describe, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
