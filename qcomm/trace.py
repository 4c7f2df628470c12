"""`python -m qcomm trace`: one dispatch and combine of every rank in a file for Perfetto or chrome://tracing."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from qcomm import validate
from qcomm.bootstrap import process_group
from qcomm.buffer import Buffer
from qcomm.config import Member, synchronize_hosts
from qcomm.formats import WireKind, WirePrecision

_WARM_RUNS = 5
_DEADLINE_S = 30.0
_PREFIX = "qcomm."
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST_TRACK = 0
_ALIGN_CYCLES = 2_000_000
Event = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the traced calls; tokens are those of one rank."""

    tokens: int
    hidden: int
    experts: int
    topk: int


_CPU_SIZES = Sizes(tokens=64, hidden=256, experts=16, topk=4)
_CUDA_SIZES = Sizes(tokens=4096, hidden=7168, experts=256, topk=8)


def run(path: Path, chosen: Mapping[str, int | None], wire: WireKind, *, static: bool) -> None:
    """Trace the calls and write the file from rank 0. Collective.

    On GPUs the file shows every kernel by its stream, and when the host made each call; on the CPU the calls alone. All
    ranks must be of one host, whose clock they share.

    Args:
        path: of the JSON file.
        chosen: sizes by their names in Sizes; those absent or None suit the device.
        wire: of dispatch; combine takes BF16.
        static: whether dispatch synchronises with the host.

    Raises:
        ValueError: sizes that no buffer can have, or a path that cannot be a file.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists, got {path}")
    with process_group() as launch, torch.no_grad():
        defaults = _CUDA_SIZES if launch.device.type == "cuda" else _CPU_SIZES
        sizes = dataclasses.replace(defaults, **{n: size for n, size in chosen.items() if size is not None})
        validate.buffer_shape(sizes.experts, sizes.topk, sizes.hidden, sizes.tokens, launch.num_ranks)
        group = dist.group.WORLD
        assert group is not None
        member = Member(group, launch.rank, launch.num_ranks, launch.device, _DEADLINE_S)
        events = _traced(member, sizes, wire, static)
        everyone: list[list[Event]] = [events] * member.num_ranks
        dist.all_gather_object(everyone, events, group=group)
        if member.rank == 0:
            path.write_text(json.dumps(merge(everyone)))
            print(f"{path}: {sum(map(len, everyone))} events of {member.num_ranks} ranks; open it in ui.perfetto.dev")


def merge(everyone: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """Join the events of all ranks, by rank, as a trace that begins at 0: a process a rank, a thread a stream."""
    start = min((event["ts"] for events in everyone for event in events), default=0)
    joined: list[Event] = []
    for rank, events in enumerate(everyone):
        joined.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
        for track in sorted({event["tid"] for event in events}):
            name = "host" if track == _HOST_TRACK else f"stream {track}"
            joined.append({"name": "thread_name", "ph": "M", "pid": rank, "tid": track, "args": {"name": name}})
        joined += ({**event, "pid": rank, "ts": event["ts"] - start} for event in events)
    return {"displayTimeUnit": "ns", "traceEvents": joined}


def select(trace: Mapping[str, Any]) -> list[Event]:
    """Keep of what torch.profiler exported the kernels, and the calls of this module; times in microseconds."""
    base = trace.get("baseTimeNanoseconds", 0) / 1e3
    kept = []
    for event in trace["traceEvents"]:
        if event.get("ph") != "X":
            continue
        on_gpu, name = event.get("cat") in _ON_GPU, event["name"]
        if on_gpu or (event.get("cat") == "user_annotation" and name.startswith(_PREFIX)):
            track = event["args"]["stream"] if on_gpu else _HOST_TRACK
            kept.append({"name": name, "ph": "X", "ts": base + event["ts"], "dur": event["dur"], "tid": track})
    return kept


def _traced(member: Member, sizes: Sizes, wire: WireKind, static: bool) -> list[Event]:
    """Make the calls, the last time under the profiler. Collective."""
    generator = torch.Generator(member.device).manual_seed(member.rank)
    x = torch.randn(sizes.tokens, sizes.hidden, generator=generator, device=member.device).to(torch.bfloat16)
    logits = torch.rand(sizes.tokens, sizes.experts, generator=generator, device=member.device)
    weights, idx = logits.topk(sizes.topk)
    on_gpu = member.device.type == "cuda"
    with Buffer(
        member.group,
        num_experts=sizes.experts,
        num_topk=sizes.topk,
        hidden=sizes.hidden,
        num_max_tokens_per_rank=sizes.tokens,
        precision=WirePrecision(dispatch_fwd=wire),
        device=member.device,
    ) as buffer:
        received, _ = buffer.dispatch(x, idx, weights, static=static)
        y = torch.zeros(*received.x.shape[:-1], sizes.hidden, dtype=torch.bfloat16, device=member.device)

        def calls() -> None:
            with record_function(f"{_PREFIX}dispatch"):
                _, handle = buffer.dispatch(x, idx, weights, static=static)
            with record_function(f"{_PREFIX}combine"):
                buffer.combine(y, handle)

        for _ in range(_WARM_RUNS):
            calls()
        _settle(member)
        with profile(activities=_activities(on_gpu)) as profiler:
            _settle(member)
            if on_gpu:
                # The ranks' devices start together, as in benchmarks/harness.py.
                torch.cuda._sleep(_ALIGN_CYCLES)
                dist.all_reduce(torch.zeros(1, device=member.device), group=member.group)
            calls()
            if on_gpu:
                torch.cuda.synchronize(member.device)
        buffer.check()
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(exported))
        return select(json.loads(exported.read_text()))


def _activities(on_gpu: bool) -> Iterable[ProfilerActivity]:
    return [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]


def _settle(member: Member) -> None:
    if member.device.type == "cuda":
        torch.cuda.synchronize(member.device)
    synchronize_hosts(member)
