"""What the exchange benchmarks run on: their flags, routing and inputs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import plotting
import torch

from qcomm import topology, validate
from qcomm.buffer import Buffer
from qcomm.config import BufferConfig, Member
from qcomm.exchange import WireInput
from qcomm.formats import (
    RECV_DTYPES,
    RECV_LAYOUTS,
    WIRE_KINDS,
    RecvDtype,
    RecvLayout,
    WireKind,
    WirePrecision,
)
from qcomm.moe.quantize import quantize_rows
from qcomm.transport.select import BACKENDS, PROVIDERS, Choice, choose

ROUTINGS = ("uniform", "skewed", "hot-rank", "one-expert")
_WIRES: tuple[WireKind, ...] = ("mxfp4", "fp8", "bf16")
InputKind = Literal["bf16", "fp8"]
INPUT_KINDS: tuple[InputKind, ...] = ("bf16", "fp8")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of the exchange; tokens are those of one rank."""

    tokens: int
    hidden: int
    topk: int
    experts: int


_SIZES = {"cuda": Geometry(4096, 7168, 8, 256), "cpu": Geometry(64, 256, 4, 16)}
_ITERATIONS = {"cuda": 50, "cpu": 3}
_SWEPT = ("hidden", "tokens", "ranks_per_node")
_OTHER_SIZES = ("topk", "experts")


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command line; None is a default of the device.

    `sweep` has what to run one after the other by name: "hidden", "tokens" and "ranks_per_node", where they are given.
    """

    sizes: dict[str, int | None]
    sweep: dict[str, tuple[int, ...]]
    wires: tuple[WireKind, ...]
    recv_dtype: RecvDtype | None
    recv_layouts: tuple[RecvLayout, ...]
    routing: str
    backend: str
    provider: str
    iterations: int | None
    num_sms: int | None
    json: Path | None
    seed: int
    lines: Path | None
    plot: Path | None
    ranks_per_node: int | None = None
    nvlink_gbs: float | None = None
    rdma_gbs: float | None = None
    input: InputKind = "bf16"


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """One rank's part of the exchange: `x` `[tokens, hidden]` bfloat16, the next two `[tokens, topk]`.

    `given` is what dispatch gets: x, or x in FP8.
    """

    member: Member
    geometry: Geometry
    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    ranks_per_node: int | None = None
    input: InputKind = "bf16"

    @functools.cached_property
    def given(self) -> WireInput:
        return self.x if self.input == "bf16" else quantize_rows(self.x)

    def buffer(
        self, precision: WirePrecision, backend: str, provider: str = "auto", num_sms: int | None = None
    ) -> Buffer:
        """Make a buffer of this shape. Collective."""
        return Buffer(
            self.member.group,
            num_experts=self.geometry.experts,
            num_topk=self.geometry.topk,
            hidden=self.geometry.hidden,
            num_max_tokens_per_rank=self.geometry.tokens,
            precision=precision,
            backend=backend,
            provider=provider,
            device=self.member.device,
            num_sms=num_sms,
            ranks_per_node=self.ranks_per_node,
        )


def parse(
    name: str, description: str, recv_layouts: Sequence[RecvLayout], *, dispatch: bool, links: bool = False
) -> Flags:
    """Read the command line; wrong usage exits with code 2.

    Args:
        name: of the benchmark.
        description: its help text.
        recv_layouts: those of a run that names none.
        dispatch: whether the receiver's format can be chosen.
        links: whether the run says what its links should take, for which their rates can be given.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m qcomm bench {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shared_flags(parser)
    for size in ("hidden", "tokens"):
        parser.add_argument(f"--{size}", type=counts, metavar="N[,N...]", help=f"{default_size(size)}; a run for each")
    layouts = names_of(RECV_LAYOUTS)
    parser.add_argument("--recv-layout", type=layouts, action="extend", help="repeatable, or a comma list")
    if dispatch:
        parser.add_argument("--recv-dtype", choices=("auto", *RECV_DTYPES), default="auto")
        inputs = "what dispatch gets: fp8 has 1x128 scales, and leaves out the bf16 wire"
        parser.add_argument("--input", choices=INPUT_KINDS, default="bf16", help=inputs)
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--num-sms", type=_positive, metavar="N", help="SMs of each communication kernel")
    virtual = "virtual nodes; default: the hosts; a run for each"
    parser.add_argument("--ranks-per-node", type=counts, metavar="N[,N...]", help=virtual)
    if links:
        add_rate_flags(parser, nvlink="peer stores of the run, where they are measured", rdma="none")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="lines", help="read lines instead of measuring")
    parser.add_argument("--plot", type=plotting.drawing, metavar="FILE", help="draw them to an .svg or .png")
    given = parser.parse_args()
    if (given.lines is None) != (given.plot is None):
        parser.error("--from FILE and --plot FILE go together")
    recv_dtype: RecvDtype | None = given.recv_dtype if dispatch and given.recv_dtype != "auto" else None
    shared = shared_flags(given)
    if dispatch and given.input == "fp8":
        shared["wires"] = tuple(wire for wire in shared["wires"] if wire != "bf16")
    return Flags(
        **shared,
        sweep={name: getattr(given, name) for name in _SWEPT if getattr(given, name) is not None},
        recv_dtype=recv_dtype,
        recv_layouts=tuple(cast("list[RecvLayout]", given.recv_layout or recv_layouts)),
        backend=given.backend,
        num_sms=given.num_sms,
        lines=given.lines,
        plot=given.plot,
        nvlink_gbs=given.nvlink_gbs if links else None,
        rdma_gbs=given.rdma_gbs if links else None,
        input=given.input if dispatch else "bf16",
    )


def runs(flags: Flags, tokens: Sequence[int] | None) -> Iterator[Flags]:
    """Yield the flags of each run; `tokens` where the command line names none."""
    named = ({} if tokens is None else {"tokens": tuple(tokens)}) | flags.sweep
    for values in itertools.product(*named.values()):
        one: dict[str, int | None] = dict(zip(named, values, strict=True))
        ranks_per_node = one.pop("ranks_per_node", None)
        yield dataclasses.replace(flags, sizes=flags.sizes | one, ranks_per_node=ranks_per_node)


def add_rate_flags(parser: argparse.ArgumentParser, *, nvlink: str, rdma: str) -> None:
    """Add the rates of the model of time (qcomm/scaling.py); `nvlink` and `rdma` say what their defaults are."""
    parser.add_argument("--nvlink-gbs", type=_rate, metavar="GBS", help=f"of peer stores of a GPU (default: {nvlink})")
    parser.add_argument("--rdma-gbs", type=_rate, metavar="GBS", help=f"of a GPU's NIC (default: {rdma})")


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command that exchanges tokens takes; all but --tokens and --hidden."""
    for name in _OTHER_SIZES:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=default_size(name))
    parser.add_argument("--wire", type=names_of(WIRE_KINDS), action="extend", help="repeatable, or a comma list")
    parser.add_argument("--routing", choices=ROUTINGS, default=ROUTINGS[0])
    parser.add_argument("--provider", choices=PROVIDERS, default="auto", help="symmetric memory of the nvlink backend")
    parser.add_argument("--iterations", type=_positive, metavar="N", help="default 50/3 (GPU/CPU)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON object a row")
    parser.add_argument("--seed", type=int, default=0)


def shared_flags(given: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `Flags` that `add_shared_flags` is for."""
    return {
        "sizes": {name: getattr(given, name) for name in _OTHER_SIZES},
        "wires": tuple(given.wire or _WIRES),
        "routing": given.routing,
        "provider": given.provider,
        "iterations": given.iterations,
        "json": given.json,
        "seed": given.seed,
    }


def default_size(name: str) -> str:
    """Say what a size is where none is given."""
    return f"default {'/'.join(str(getattr(_SIZES[device], name)) for device in ('cuda', 'cpu'))} (GPU/CPU)"


def sizes(flags: Flags, member: Member) -> Geometry:
    """Return the sizes of the run.

    Raises:
        ValueError: no buffer can have them.
    """
    given = {name: size for name, size in flags.sizes.items() if size is not None}
    geometry = dataclasses.replace(_SIZES[member.device.type], **given)
    validate.buffer_shape(geometry.experts, geometry.topk, geometry.hidden, geometry.tokens, member.num_ranks)
    topology.check(flags.ranks_per_node, member.num_ranks)
    return geometry


def make(flags: Flags, geometry: Geometry, member: Member) -> Workload:
    """Make this rank's inputs."""
    generator = torch.Generator(member.device).manual_seed(1000 * flags.seed + member.rank)
    x = torch.randn(geometry.tokens, geometry.hidden, generator=generator, device=member.device)
    weights = torch.rand(geometry.tokens, geometry.topk, generator=generator, device=member.device)
    idx = make_routing(flags.routing, geometry, flags.seed, member.rank, member.num_ranks).to(member.device)
    return Workload(member, geometry, x.to(torch.bfloat16), idx, weights, flags.ranks_per_node, flags.input)


def iterations(flags: Flags, member: Member) -> int:
    """Return how often each call is timed."""
    return flags.iterations or _ITERATIONS[member.device.type]


def make_routing(routing: str, geometry: Geometry, seed: int, rank: int, num_ranks: int) -> torch.Tensor:
    """Draw a rank's experts: `[tokens, topk]` int64, distinct in a row.

    "uniform": any experts alike. "skewed": without replacement, the i-th most popular expert with a weight of
    1 / (i + 1) (Zipf); which is how popular is random, but the same for all ranks. "hot-rank": the experts of rank 0
    with twice the weight of the others. "one-expert": every token names expert 0 and nothing else, the other entries
    are -1.
    """
    if routing == "one-expert":
        idx = torch.full((geometry.tokens, geometry.topk), -1)
        idx[:, 0] = 0
        return idx
    weights = torch.ones(geometry.experts)
    if routing == "skewed":
        shared = torch.Generator().manual_seed(seed)
        weights = 1 / (1 + torch.randperm(geometry.experts, generator=shared))
    elif routing == "hot-rank":
        weights[: geometry.experts // num_ranks] = 2
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    # The largest of log(weight) + Gumbel noise are a sample without replacement.
    noise = -torch.log(torch.empty(geometry.tokens, geometry.experts).exponential_(generator=generator))
    return (torch.log(weights) + noise).topk(geometry.topk, dim=1).indices


def nodes(flags: Flags, work: Workload) -> topology.Found:
    """Find the nodes that a buffer will have. Collective."""
    return topology.find(_config(flags, work), work.member)


def backend_choice(flags: Flags, work: Workload) -> Choice:
    """Return the backend and provider that a buffer will take, and why. Collective."""
    found = nodes(flags, work)
    choice = choose(_config(flags, work), work.member, found.topology)
    return choice if found.note is None else dataclasses.replace(choice, reason=f"{choice.reason}; {found.note}")


def _config(flags: Flags, work: Workload) -> BufferConfig:
    return BufferConfig(
        num_experts=work.geometry.experts,
        num_topk=work.geometry.topk,
        hidden=work.geometry.hidden,
        num_max_tokens_per_rank=work.geometry.tokens,
        precision=WirePrecision.bf16(),
        backend=flags.backend,
        provider=flags.provider,
        device_type=work.member.device.type,
        ranks_per_node=work.ranks_per_node,
        environ_ranks_per_node=topology.from_environ(os.environ) if work.ranks_per_node is None else None,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def counts(text: str) -> tuple[int, ...]:
    """Read a comma list of integers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas between, got {text!r}") from None


def names_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what reads a comma list of these names."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(choices)}, got {name!r}")
        return found

    return names
