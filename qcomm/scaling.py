"""What an exchange among any number of nodes puts on each link, and how long that should take.

Two forms. "flat": a token goes once to each rank that holds any of its experts, over NVLink inside its node and by RDMA
to others. "hierarchical": it goes by RDMA once to each other node that has such a rank, to the GPU of its own local
index there, which forwards it over NVLink to those ranks; inside its own node it goes as in the flat form. Combine goes
the same ways back: each rank of a node sends the sum of its rows of a token to the GPU of the source's local index,
which adds these up and sends one record to the source. So a link carries in combine as many records as the opposite
one does in dispatch.

Ranks are numbered node by node, and expert e lives on rank e // (num_experts / num_ranks). A GPU has one port to the
NVLink switch of its node and one NIC; a copy to itself takes no link. Counts are of records, and exact for the routes
given. `expected_time` is a model, whose numbers `python -m qcomm simulate --calibrate` fits to measurements.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from qcomm import validate
from qcomm.formats import RecvDtype, RecvLayout, WireKind
from qcomm.records import MetadataLayout, RecordLayout, SumLayout
from qcomm.topology import Topology
from qcomm.tuning import OPS, Op

Form = Literal["flat", "hierarchical"]
FORMS: tuple[Form, ...] = ("flat", "hierarchical")
Link = Literal["nvlink", "rdma"]
CALIBRATION = Path(__file__).with_name("scaling.json")
_PORTS = ("nvlink_out", "nvlink_in", "rdma_out", "rdma_in")


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic:
    """Records of one dispatch or combine from rank (row) to rank (column), of the tokens that were looked at.

    Attributes:
        topology: of the ranks.
        form: "flat" or "hierarchical".
        direct: `[num_ranks, num_ranks]` int64: between the token's rank and a rank of its node that has its experts; on
            the diagonal those that stay.
        relayed: the same, inside a node, of tokens of other nodes: forwarded by dispatch, or brought together by
            combine; on the diagonal those that stay.
        rdma: the same, between nodes.
        rows: `[num_ranks]` int64: pairs of a token and an expert of the rank.
        tokens: `[num_ranks]` int64: tokens of the rank.
        fraction: how many of the tokens were looked at.
    """

    topology: Topology
    form: Form
    direct: torch.Tensor
    relayed: torch.Tensor
    rdma: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    fraction: float = 1.0

    @property
    def nvlink(self) -> torch.Tensor:
        """`[num_ranks, num_ranks]` int64: records over NVLink."""
        return (self.direct + self.relayed).fill_diagonal_(0)

    @property
    def by_node(self) -> torch.Tensor:
        """`[num_nodes, num_nodes]` int64: records by RDMA from node to node."""
        nodes, each = self.topology.num_nodes, self.topology.ranks_per_node
        return self.rdma.view(nodes, each, nodes, each).sum((1, 3))

    def reversed(self) -> Traffic:
        """Return the traffic of the combine that follows this dispatch, or of the dispatch before this combine."""
        back = {name: getattr(self, name).T.contiguous() for name in ("direct", "relayed", "rdma")}
        return dataclasses.replace(self, **back)

    def ports(self) -> dict[str, torch.Tensor]:
        """Return `[num_ranks]` float64 records of all tokens by port: nvlink_out, nvlink_in, rdma_out, rdma_in.

        Where a part of the tokens was looked at, the ranks differ more than all tokens would make them. The variance
        that the sample adds is taken out, supposing that records are independent, so that maxima stay right.
        """
        nvlink, rdma = self.nvlink, self.rdma
        sums = (nvlink.sum(1), nvlink.sum(0), rdma.sum(1), rdma.sum(0))
        return {name: self._of_all(each) for name, each in zip(_PORTS, sums, strict=True)}

    def arriving(self) -> torch.Tensor:
        """Return `[num_ranks]` float64 records of all tokens that come to a rank's memory, own ones included."""
        return self._of_all((self.direct + self.relayed + self.rdma).sum(0))

    def at_experts(self, op: Op) -> torch.Tensor:
        """Return `[num_ranks]` float64 records of all tokens that a rank's experts get from a dispatch, or give."""
        ends = self.direct + self.relayed + (self.rdma if self.form == "flat" else 0)
        return self._of_all(ends.sum(0 if op == "dispatch" else 1))

    def all_rows(self) -> torch.Tensor:
        """Return `[num_ranks]` float64 rows that all tokens make."""
        return self._of_all(self.rows)

    def all_tokens(self) -> torch.Tensor:
        """Return `[num_ranks]` float64 tokens, those that were not looked at too."""
        return self.tokens / self.fraction

    def standard_error(self) -> float:
        """Return the relative standard error of the busiest port's records, 0 where all tokens were looked at."""
        if self.fraction == 1:
            return 0.0
        busiest = max(float(port.max()) for port in self.ports().values()) * self.fraction
        return math.sqrt((1 - self.fraction) / busiest) if busiest else 0.0

    def _of_all(self, sampled: torch.Tensor) -> torch.Tensor:
        counts = sampled.double()
        mean, spread = counts.mean(), float(counts.var(correction=0))
        kept = 1.0
        if self.fraction < 1 and spread > 0:
            kept = min(1.0, max(self.fraction, 1 - (1 - self.fraction) * float(mean) / spread))
        return (mean + math.sqrt(kept) * (counts - mean)) / self.fraction


def count(
    topk_idx: Sequence[torch.Tensor], num_experts: int, topology: Topology, form: Form, fraction: float = 1.0
) -> Traffic:
    """Count the records of a dispatch.

    Args:
        topk_idx: of each rank, `[num_tokens, num_topk]` integers: experts, or -1.
        num_experts: of all ranks.
        topology: nodes and ranks.
        form: "flat" or "hierarchical".
        fraction: how many of the tokens these are.

    Raises:
        ValueError: the ranks, experts, form or fraction do not fit.
    """
    num_ranks, each = topology.num_ranks, topology.ranks_per_node
    validate.one_of("form", form, FORMS)
    validate.multiple("num_experts", num_experts, num_ranks)
    if len(topk_idx) != num_ranks:
        raise ValueError(f"topk_idx must have a tensor for each of the {num_ranks} ranks, got {len(topk_idx)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    to_rank = torch.zeros(num_ranks, num_ranks, dtype=torch.int64)
    to_node = torch.zeros(num_ranks, topology.num_nodes, dtype=torch.int64)
    rows = torch.zeros(num_ranks, dtype=torch.int64)
    for rank, idx in enumerate(topk_idx):
        if idx.numel() and not -1 <= int(idx.min()) <= int(idx.max()) < num_experts:
            raise ValueError(f"topk_idx[{rank}] must be in [-1, {num_experts}), got {int(idx.min())}..{int(idx.max())}")
        ranks = idx.cpu().long().div(num_experts // num_ranks, rounding_mode="floor").sort(1).values
        rows += ranks[ranks >= 0].bincount(minlength=num_ranks)
        to_rank[rank] = _distinct(ranks, num_ranks)
        to_node[rank] = _distinct(ranks.div(each, rounding_mode="floor"), topology.num_nodes)
    node = torch.arange(num_ranks) // each
    same = node[:, None] == node
    direct, remote = to_rank * same, to_rank * ~same
    relayed = torch.zeros_like(direct)
    rdma = remote
    if form == "hierarchical":
        local = torch.arange(num_ranks) % each
        # From the partner, which has the token's local index, to every rank of its node.
        for index in range(each):
            partner = node * each + index
            relayed[partner, torch.arange(num_ranks)] += remote[local == index].sum(0)
        rdma = torch.zeros_like(direct)
        partners = torch.arange(topology.num_nodes) * each + local[:, None]
        rdma.scatter_(1, partners, to_node)
        rdma *= ~same
    tokens = torch.tensor([len(idx) for idx in topk_idx])
    return Traffic(topology, form, direct, relayed, rdma, rows, tokens, fraction)


def _distinct(ids: torch.Tensor, count: int) -> torch.Tensor:
    """Count in how many rows each id is; rows are sorted, and -1 is none."""
    first = ids >= 0
    first[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    return ids[first].bincount(minlength=count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One dispatch or combine.

    Attributes:
        op: which of the two.
        wire: of its records.
        hidden, num_topk: of its tokens.
        routed: of a dispatch, whether metadata goes along, as it does but in a replay.
        recv_layout: of the experts' rows; one a record for "token_major", else one for each of its experts.
        recv_dtype: of the rows that a dispatch writes.
        rounds_inside: of a hierarchical combine, whether sums travel inside a node in the wire's format, as on nvshmem;
            else in float32, as on collective, which `memory_bytes` takes no account of.
    """

    op: Op
    wire: WireKind
    hidden: int
    num_topk: int
    routed: bool = True
    recv_layout: RecvLayout = "expert_major"
    recv_dtype: RecvDtype = "fp8"
    rounds_inside: bool = True

    @property
    def physical_bytes(self) -> int:
        """Bytes of one record of the wire, metadata included."""
        return RecordLayout(self.wire, self.hidden).num_bytes + self.metadata_bytes

    def bytes_on(self, link: Link, form: Form) -> int:
        """Return the bytes of one record on a kind of link, metadata included."""
        if link == "nvlink" and form == "hierarchical" and self.op == "combine" and not self.rounds_inside:
            return SumLayout(self.hidden).num_bytes
        return self.physical_bytes

    @property
    def metadata_bytes(self) -> int:
        """Bytes of a record's metadata."""
        return MetadataLayout(self.num_topk).num_bytes if self.op == "dispatch" and self.routed else 0

    @property
    def logical_bytes(self) -> int:
        """Bytes of the BF16 elements that a record stands for."""
        return RecordLayout("bf16", self.hidden).num_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row for the experts: written by dispatch, read by combine."""
        return RecordLayout(self.recv_dtype if self.op == "dispatch" else "bf16", self.hidden).num_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """What measurements gave for one operation.

    Attributes:
        fixed_us: microseconds of a call of hardly any token inside a node.
        memory_gbs: bandwidth at which a rank reads and writes its own memory.
        largest_error: largest relative difference of the model from the measurements.
    """

    fixed_us: float
    memory_gbs: float
    largest_error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What the model of time takes for granted; bandwidths in GB/s, for each direction.

    Attributes:
        nvlink_gbs: stores of a GPU to its peers, and nothing else.
        nvlink_efficiency: share of it that records get.
        rdma_gbs: what a NIC carries.
        nvlink_hop_us, rdma_hop_us: latency of each further hop of a call that leaves its node.
        fits: by operation.
    """

    nvlink_gbs: float
    nvlink_efficiency: float
    rdma_gbs: float
    nvlink_hop_us: float
    rdma_hop_us: float
    fits: Mapping[Op, Fit]


@functools.cache
def calibrated() -> Rates:
    """Read the rates that ship with the package, scaling.json."""
    return rates_of(json.loads(CALIBRATION.read_text()))


def rates_of(table: Mapping[str, Any]) -> Rates:
    """Read the contents of a scaling.json: rates that are assumed, and what was fitted to measurements."""
    assumed, measured = table["assumed"], table["measured"]
    links = {name: measured[name] for name in ("nvlink_gbs", "nvlink_efficiency")}
    return Rates(**assumed, **links, fits={op: Fit(**measured["fits"][op]) for op in OPS})


@dataclasses.dataclass(frozen=True)
class ExpectedTime:
    """A time of the model in microseconds: `fixed_us`, and the largest of what the busiest GPU's parts take."""

    fixed_us: float
    nvlink_us: float
    rdma_us: float
    memory_us: float

    @property
    def total_us(self) -> float:
        """Time of the call."""
        return self.fixed_us + max(self.nvlink_us, self.rdma_us, self.memory_us)

    @property
    def bound(self) -> str:
        """What takes longest: "nvlink", "rdma", "memory", or "fixed" where that is more than any of them."""
        parts = {"fixed": self.fixed_us, "rdma": self.rdma_us, "nvlink": self.nvlink_us, "memory": self.memory_us}
        return max(parts, key=lambda name: parts[name])

    def figures(self) -> dict[str, float | str]:
        """Return all of it by the names that JSON lines have."""
        parts = {f"expected_{name}": value for name, value in dataclasses.asdict(self).items()}
        return {**parts, "expected_us": self.total_us, "bound": self.bound}


def expected_time(call: Call, traffic: Traffic, rates: Rates | None = None) -> ExpectedTime:
    """Say how long a call should take.

    Args:
        call: what is called.
        traffic: of this call: for a combine, that of the dispatch `reversed`.
        rates: of the machine; those that ship with the package by default.
    """
    rates = rates or calibrated()
    fit, ports = rates.fits[call.op], traffic.ports()

    def slowest(link: Link, gbs: float) -> float:
        busiest = max(float(ports[f"{link}_{way}"].max()) for way in ("out", "in"))
        return busiest * call.bytes_on(link, traffic.form) / gbs / 1e3

    fixed_us = fit.fixed_us
    if traffic.rdma.any():
        fixed_us += rates.rdma_hop_us + (rates.nvlink_hop_us if traffic.relayed.any() else 0)
    return ExpectedTime(
        fixed_us=fixed_us,
        nvlink_us=slowest("nvlink", rates.nvlink_gbs * rates.nvlink_efficiency),
        rdma_us=slowest("rdma", rates.rdma_gbs),
        memory_us=float(memory_bytes(call, traffic).max()) / fit.memory_gbs / 1e3,
    )


def memory_bytes(call: Call, traffic: Traffic) -> torch.Tensor:
    """Return `[num_ranks]` float64 bytes that a call reads and writes in each GPU's own memory.

    Tokens in BF16 once; each row once, padding left out; each record that comes, the own ones included, once written
    and once read; each that leaves by RDMA once written, in dispatch once for all nodes, and read by the NIC each time.
    """
    tokens, rdma = traffic.all_tokens(), traffic.ports()["rdma_out"]
    staged = torch.minimum(tokens, rdma) if call.op == "dispatch" else rdma
    records = 2 * traffic.arriving() + staged + rdma
    rows = traffic.at_experts(call.op) if call.recv_layout == "token_major" else traffic.all_rows()
    return tokens * call.logical_bytes + rows * call.row_bytes + records * call.physical_bytes
