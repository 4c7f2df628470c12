"""What a call put on each link, by rank and by node, and how long it should take with links of given rates.

Bytes are those that `Buffer.stats()` counted in the run, as sent (physical) and as BF16 would have been (logical);
metadata is not in them. A rank has two links: inside its node, NVLink, and between nodes, its NIC.

The time is that of the model in qcomm/scaling.py for the same routes, metadata included. Its rates of links are those
of the command line, NVLink's otherwise that of peer stores in this run; the rest of it is fitted to H100 GPUs
(qcomm/scaling.json), whatever this runs on. It knows nothing of the column-wise operand, and of no call that waits on
the host. There is none where a link that the nodes have lacks a rate, nor for a single rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import calibration

from qcomm import scaling
from qcomm.scaling import ExpectedTime, Form
from qcomm.stats import Traffic
from qcomm.table import format_table
from qcomm.topology import Topology

Line = dict[str, Any]
_KINDS = tuple(field.name for field in dataclasses.fields(Traffic))
_HEADERS = ("op", "wire", "node", "rank", "inside", "between nodes", "inside, logical", "between, logical")


@dataclasses.dataclass(frozen=True)
class Sent:
    """What every rank sent in a call, and whether records went straight to ranks or by way of relays."""

    form: Form
    ranks: tuple[Traffic, ...]

    def nodes(self, topology: Topology) -> tuple[Traffic, ...]:
        """Add up the ranks of each node."""
        each = topology.ranks_per_node
        return tuple(_sum(self.ranks[first : first + each]) for first in range(0, topology.num_ranks, each))


@dataclasses.dataclass(frozen=True)
class LinkRates:
    """Bandwidths of a GPU's links in GB/s for each direction, None where unknown."""

    nvlink_gbs: float | None = None
    rdma_gbs: float | None = None


def figures(line: Line, topology: Topology, sent: Sent | None, rates: LinkRates) -> Line:
    """Return what a line says of links and of the time expected; None of what is unknown.

    Args:
        line: the rest of it.
        topology: of the run.
        sent: by the call; None for one that is not qcomm's.
        rates: of the links.
    """
    time = None if sent is None else _expected(line, topology, sent.form, rates)
    names = ExpectedTime(0, 0, 0, 0).figures()
    return {
        "ranks_per_node": topology.ranks_per_node,
        "form": None if sent is None else sent.form,
        "rank_sent_bytes": None if sent is None else [dataclasses.asdict(each) for each in sent.ranks],
        "node_sent_bytes": None if sent is None else [dataclasses.asdict(each) for each in sent.nodes(topology)],
        **dataclasses.asdict(rates),
        **(dict.fromkeys(names) if time is None else time.figures()),
        "expected_ratio": None if time is None else line["p50_us"] / time.total_us,
    }


def table(lines: Sequence[Line]) -> str | None:
    """Lay out what each node and each rank sent, once for all calls alike; None where nobody has a peer."""
    rows: list[tuple[str, ...]] = []
    for line in lines:
        if line["rank_sent_bytes"] is None or line["num_ranks"] == 1:
            continue
        op, each = calibration.call_of(line).op, line["ranks_per_node"]
        for node, of_node in enumerate(line["node_sent_bytes"]):
            of_ranks = enumerate(line["rank_sent_bytes"][node * each : (node + 1) * each], node * each)
            of_all = [("all", of_node)] if each > 1 else []
            for rank, sent in (*of_all, *of_ranks):
                rows.append((op, line["wire"], str(node), str(rank), *_megabytes(sent)))
    if not rows:
        return None
    found = format_table(_HEADERS, list(dict.fromkeys(rows)))
    return f"MB of records sent, by each node and by each of its ranks\n\n{found}"


def _expected(line: Line, topology: Topology, form: Form, given: LinkRates) -> ExpectedTime | None:
    nvlink, rdma = topology.ranks_per_node > 1, topology.num_nodes > 1
    if not (nvlink or rdma) or (nvlink and given.nvlink_gbs is None) or (rdma and given.rdma_gbs is None):
        return None
    known = {name: gbs for name, gbs in dataclasses.asdict(given).items() if gbs is not None}
    return calibration.expected(line, topology.num_nodes, form, dataclasses.replace(scaling.calibrated(), **known))


def _sum(parts: Sequence[Traffic]) -> Traffic:
    return Traffic(**{kind: sum(getattr(part, kind) for part in parts) for kind in _KINDS})


def _megabytes(sent: Line) -> tuple[str, ...]:
    kinds = ("inside_node", "between_nodes", "inside_node_logical", "between_nodes_logical")
    return tuple(f"{sent[kind] / 1e6:.3f}" for kind in kinds)
