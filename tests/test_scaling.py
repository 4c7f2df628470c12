"""The simulator's counts and model of time: against messages followed one by one, real buffers and measured lines."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases import BF16, FP8, MXFP4, Case, Routes
from ranks import NODES, Target, targets

from qcomm import BufferStats, resources, scaling, stats, tuning
from qcomm.formats import WIRE_KINDS, WireFormat
from qcomm.records import MetadataLayout, RecordLayout
from qcomm.scaling import FORMS, Call, Fit, Form, Link, Rates, Traffic
from qcomm.topology import Topology
from qcomm.tuning import OPS, Op

sys.path.insert(0, str(resources.find("benchmarks")))

import calibration
import simulate
import workload

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MEASURED = [RESULTS / f"{name}-h100-x4.jsonl" for name in ("dispatch", "combine", "decode")]
TOPOLOGIES = [(1, 1), (1, 4), (4, 1), (2, 2), (3, 2), (2, 4), (4, 3)]
Hop = tuple[str, int, int]


def of_nodes(num_nodes: int, ranks_per_node: int) -> Topology:
    return Topology(num_nodes * ranks_per_node, ranks_per_node)


def routes(topology: Topology, experts_each: int, topk: int, seed: int) -> list[torch.Tensor]:
    """Uneven ranks, the first without tokens, and some entries that name no expert."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rank in range(topology.num_ranks):
        order = torch.rand(5 * rank, experts_each * topology.num_ranks, generator=generator).argsort(1)[:, :topk]
        order[torch.rand(order.shape, generator=generator) < 0.2] = -1
        found.append(order)
    return found


def hops(rank: int, experts: Sequence[int], experts_each: int, each: int, form: Form, op: Op) -> set[Hop]:
    """Follow one token: every record as (class, from, to), those that stay where they are too."""
    node, local = divmod(rank, each)
    found: set[Hop] = set()
    for to in {e // experts_each for e in experts if e >= 0}:
        partner = to // each * each + local
        if to // each == node:
            way = [("direct", rank, to)]
        elif form == "flat":
            way = [("rdma", rank, to)]
        else:
            way = [("rdma", rank, partner), ("relayed", partner, to)]
        found |= {(kind, b, a) if op == "combine" else (kind, a, b) for kind, a, b in way}
    return found


def followed(
    topk_idx: list[torch.Tensor], experts_each: int, topology: Topology, form: Form, op: Op
) -> dict[str, list[list[int]]]:
    counter: Counter[Hop] = Counter()
    for rank, idx in enumerate(topk_idx):
        for experts in idx.tolist():
            counter.update(hops(rank, experts, experts_each, topology.ranks_per_node, form, op))
    ranks = range(topology.num_ranks)
    return {kind: [[counter[kind, a, b] for b in ranks] for a in ranks] for kind in ("direct", "relayed", "rdma")}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", TOPOLOGIES, ids=str)
def test_counts_are_those_of_every_token_followed(shape: tuple[int, int], form: Form, op: Op) -> None:
    topology, experts_each = of_nodes(*shape), 3
    for topk, seed in ((1, 0), (3, 1), (8, 2)):
        topk_idx = routes(topology, experts_each, topk, seed)
        traffic = scaling.count(topk_idx, experts_each * topology.num_ranks, topology, form)
        traffic = traffic if op == "dispatch" else traffic.reversed()
        want = followed(topk_idx, experts_each, topology, form, op)
        assert {kind: getattr(traffic, kind).tolist() for kind in want} == want
        named = [e // experts_each for idx in topk_idx for e in idx.flatten().tolist() if e >= 0]
        assert traffic.rows.tolist() == [named.count(rank) for rank in range(topology.num_ranks)]
        assert traffic.tokens.tolist() == [len(idx) for idx in topk_idx]


def test_counts_worked_by_hand() -> None:
    # Nodes {0, 1} and {2, 3}, two experts a rank. Rank 0 sends to ranks 0 and 1; to 2 and 3; to 3 alone, twice named;
    # and nowhere. Rank 3 sends to 0.
    none = torch.empty(0, 4, dtype=torch.int64)
    first = torch.tensor([[0, 1, 3, -1], [4, 7, -1, -1], [-1, 6, 7, -1], [-1, -1, -1, -1]])
    topk_idx = [first, none, none, torch.tensor([[1, -1, -1, 0]], dtype=torch.int32)]
    topology = of_nodes(2, 2)
    flat, by_node = (scaling.count(topk_idx, 8, topology, form) for form in FORMS)
    assert flat.direct.tolist() == [[1, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    assert flat.rdma.tolist() == [[0, 0, 1, 2], [0] * 4, [0] * 4, [1, 0, 0, 0]]
    assert flat.relayed.sum() == 0
    assert by_node.direct.tolist() == flat.direct.tolist()
    # Two tokens of rank 0 go to node 1, to its first GPU: one stays there, both go on to the second. That of rank 3
    # comes to rank 1, which forwards it.
    assert by_node.rdma.tolist() == [[0, 0, 2, 0], [0] * 4, [0] * 4, [0, 1, 0, 0]]
    assert by_node.relayed.tolist() == [[0] * 4, [1, 0, 0, 0], [0, 0, 1, 2], [0] * 4]
    assert by_node.nvlink.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 2], [0] * 4]
    assert by_node.by_node.tolist() == [[0, 2], [1, 0]]
    assert flat.rows.tolist() == [4, 1, 1, 3]
    ports = {name: port.tolist() for name, port in by_node.reversed().ports().items()}
    assert ports["rdma_out"] == [0, 1, 2, 0]
    assert ports["nvlink_in"] == [1, 1, 2, 0]
    assert by_node.arriving().tolist() == [2, 2, 3, 2]


def test_limits() -> None:
    for shape in TOPOLOGIES:
        topology = of_nodes(*shape)
        for topk in (1, 4):
            topk_idx = routes(topology, 4, topk, 5)
            flat, by_node = (scaling.count(topk_idx, 4 * topology.num_ranks, topology, form) for form in FORMS)
            assert by_node.rdma.sum() <= flat.rdma.sum()
            assert torch.equal(by_node.direct, flat.direct)
            for op in OPS:
                sent, by_way = (t if op == "dispatch" else t.reversed() for t in (flat, by_node))
                assert torch.equal(sent.at_experts(op), by_way.at_experts(op))
            if topology.num_nodes == 1 or topology.ranks_per_node == 1:
                assert torch.equal(by_node.nvlink, flat.nvlink)
                assert torch.equal(by_node.rdma, flat.rdma)
            if topk == 1:
                assert torch.equal(by_node.by_node, flat.by_node)
            for traffic in (flat, by_node):
                ports = traffic.ports()
                assert ports["nvlink_out"].sum() == ports["nvlink_in"].sum()
                assert ports["rdma_out"].sum() == ports["rdma_in"].sum()


@dataclasses.dataclass(frozen=True)
class Reported:
    """What one rank's buffer said of a case."""

    topology: Topology
    form: Form
    stats: BufferStats


def _reported(
    rank: int,
    num_ranks: int,
    device: str,
    backend: str,
    sent: Sequence[Case],
    ranks_per_node: int | None,
    tuned: dict[str, int],
) -> list[Reported]:
    found = []
    for case in sent:
        inputs = cases.make_inputs(case, num_ranks)
        with (
            tuning.force(**tuned),
            cases.make_buffer(case, num_ranks, device, backend, ranks_per_node=ranks_per_node) as buffer,
        ):
            recv, handle = cases.dispatch(buffer, case, inputs)
            y = torch.zeros(*recv.x.shape[:-1], case.hidden, dtype=torch.bfloat16, device=buffer.device)
            buffer.combine(y, handle, weighted=case.weighted)
            form: Form = "hierarchical" if handle.relayed else "flat"
            found.append(Reported(buffer.topology, form, buffer.stats()))
    return found


def check_bytes(case: Case, backend: str, ranks: Sequence[Reported]) -> None:
    """Require that the simulator counts what the ranks did, to the byte."""
    first, num_ranks = ranks[0], len(ranks)
    topology, form, inputs = first.topology, first.form, cases.make_inputs(case, num_ranks)
    assert {(each.topology, each.form) for each in ranks} == {(topology, form)}
    assert case.combine_wire is not None
    num_experts, where = case.num_local_experts * num_ranks, f"{case}, {backend}, {form}, {topology}"
    dispatched = scaling.count(inputs.topk_idxs, num_experts, topology, form)
    legs: tuple[tuple[Op, Traffic, WireFormat, list[stats.Traffic]], ...] = (
        ("dispatch", dispatched, case.wire, [each.stats.dispatch_traffic for each in ranks]),
        ("combine", dispatched.reversed(), case.combine_wire, [each.stats.combine_traffic for each in ranks]),
    )
    for op, traffic, wire, measured in legs:
        # Statistics leave metadata out, as a call without routing does.
        call = Call(
            op=op,
            wire=wire.kind,
            hidden=case.hidden,
            num_topk=case.num_topk,
            routed=False,
            rounds_inside=backend != "collective",
        )
        simulated = simulate.figures(call, traffic, RATES)
        links: tuple[tuple[Link, str], ...] = (("nvlink", "inside_node"), ("rdma", "between_nodes"))
        for link, kind in links:
            records, found = traffic.ports()[f"{link}_out"], [getattr(each, kind) for each in measured]
            logical = [getattr(each, f"{kind}_logical") for each in measured]
            assert found == (records * call.bytes_on(link, form)).tolist(), f"{op}, {kind}: {where}"
            assert logical == (records * call.logical_bytes).tolist(), f"{op}, {kind}: {where}"
            assert max(found) == simulated[f"{link}_out_bytes"], f"{op}, {kind}: {where}"
            assert max(logical) == simulated[f"{link}_out_logical_bytes"], f"{op}, {kind}: {where}"
    if form == "flat" and topology.relays:
        return
    # A token crosses to each node that it reaches but its own, once, and its sum comes back as often.
    crossings = [
        len({topology.node(e // case.num_local_experts) for e in token if e >= 0} - {topology.node(rank)})
        for rank, idx in enumerate(inputs.topk_idxs)
        for token in idx.tolist()
    ]
    for _, _, wire, measured in legs:
        record_bytes = RecordLayout(wire.kind, case.hidden).num_bytes
        assert sum(each.between_nodes for each in measured) == sum(crossings) * record_bytes, where


@targets(4, nodes=NODES)
def test_bytes_are_those_that_buffers_report(target: Target) -> None:
    routed: tuple[Routes, ...] = ("some", "half", "one")
    wires = ((BF16, FP8), (FP8, MXFP4), (MXFP4, BF16))
    sent = [
        Case(wire=wire, combine_wire=back, routes=to, hidden=256, weighted=weighted)
        for to, weighted in zip(routed, (True, False, True), strict=True)
        for wire, back in wires
    ]
    # One host's nodes, and every rank as one. nvshmem goes by way of relays only where tokens are many.
    ways = [None, 1] if target.ranks_per_node else [None]
    modes: list[dict[str, int]] = [{}, {"decode_tokens": 0}] if target.backend == "nvshmem" else [{}]
    forms = set()
    for ranks_per_node, tuned in itertools.product(ways, modes):
        for case, *ranks in zip(sent, *target.run(_reported, sent, ranks_per_node, tuned), strict=True):
            check_bytes(case, target.backend, ranks)
            forms.add(ranks[0].form)
    assert forms == ({"flat", "hierarchical"} if (target.ranks_per_node or 1) > 1 else {"flat"})


def test_sums_inside_a_node() -> None:
    combine = Call(op="combine", wire="mxfp4", hidden=256, num_topk=1, rounds_inside=False)
    assert [combine.bytes_on(link, form) for form in FORMS for link in ("nvlink", "rdma")] == [144, 144, 1024, 144]
    rounded, dispatch = (
        dataclasses.replace(combine, **other) for other in ({"rounds_inside": True}, {"op": "dispatch"})
    )
    assert rounded.bytes_on("nvlink", "hierarchical") == 144
    assert dispatch.bytes_on("nvlink", "hierarchical") == 144 + MetadataLayout(1).num_bytes
    near = dataclasses.replace(one_to_one("hierarchical", "direct", 500), relayed=torch.zeros(4, 4, dtype=torch.int64))
    times = [scaling.expected_time(call, near, RATES).nvlink_us for call in (rounded, combine)]
    assert times == pytest.approx([500 * 144 / 200 / 1e3, 500 * 1024 / 200 / 1e3])


@pytest.mark.parametrize("wire", WIRE_KINDS)
def test_bytes_of_a_record(wire: Any) -> None:
    dispatch, combine = (Call(op=op, wire=wire, hidden=7168, num_topk=8) for op in OPS)
    record_bytes = {"bf16": 14336, "fp8": 7392, "mxfp4": 3808}[wire]
    assert combine.physical_bytes == record_bytes == RecordLayout(wire, 7168).num_bytes
    assert dispatch.physical_bytes == record_bytes + 112 == record_bytes + MetadataLayout(8).num_bytes
    assert dataclasses.replace(dispatch, routed=False).physical_bytes == record_bytes
    assert dispatch.logical_bytes == combine.logical_bytes == 14336


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("routing", ["uniform", "skewed"])
def test_a_sample_tells_what_all_tokens_do(routing: str, form: Form) -> None:
    topology, geometry = of_nodes(4, 4), workload.Geometry(2048, 128, 4, 64)
    topk_idx = calibration.routes(routing, geometry, 0, 16)
    whole = scaling.count(topk_idx, 64, topology, form)
    assert whole.standard_error() == 0
    for part in range(8):
        some = [idx[256 * part : 256 * (part + 1)] for idx in topk_idx]
        traffic = scaling.count(some, 64, topology, form, 1 / 8)
        error = traffic.standard_error()
        assert 0.001 < error < 0.05
        assert traffic.all_tokens().tolist() == [2048] * 16
        raw = {"rdma_in": 8 * traffic.rdma.sum(0), "nvlink_in": 8 * traffic.nvlink.sum(0)}
        for name, port in traffic.ports().items():
            truth = whole.ports()[name]
            assert float(port.max()) == pytest.approx(float(truth.max()), rel=4 * max(error, 0.01))
            if name in raw:
                assert port.sum() == pytest.approx(float(raw[name].sum()))
                assert float(port.max()) <= float(raw[name].max()) + 1e-6


def test_a_sample_does_not_overstate_the_busiest_port() -> None:
    # Of many ports alike, the largest of a sample lies above that of all tokens unless its spread is taken out.
    topology, geometry = of_nodes(16, 4), workload.Geometry(2048, 128, 4, 64)
    topk_idx = calibration.routes("uniform", geometry, 1, 64)
    truth = float(scaling.count(topk_idx, 64, topology, "flat").ports()["rdma_in"].max())
    some = scaling.count([idx[:64] for idx in topk_idx], 64, topology, "flat", 1 / 32)
    assert float(32 * some.rdma.sum(0).max()) > 1.04 * truth
    assert float(some.ports()["rdma_in"].max()) == pytest.approx(truth, rel=0.015)


RATES = Rates(
    nvlink_gbs=400,
    nvlink_efficiency=0.5,
    rdma_gbs=50,
    nvlink_hop_us=2,
    rdma_hop_us=5,
    fits={op: Fit(fixed_us=10, memory_gbs=2000, largest_error=0) for op in OPS},
)


def one_to_one(form: Form, kind: str, records: int) -> Traffic:
    topology = of_nodes(2, 2)
    matrices: dict[str, Any] = {name: torch.zeros(4, 4, dtype=torch.int64) for name in ("direct", "relayed", "rdma")}
    matrices[kind][0, 1 if kind == "direct" else 2] = records
    nobody = torch.zeros(4, dtype=torch.int64)
    return Traffic(topology, form, **matrices, rows=nobody, tokens=nobody)


def test_times_worked_by_hand() -> None:
    call = Call(op="combine", wire="bf16", hidden=500 * 128, num_topk=1)
    # 128,000 bytes a record: 64 MB at 200 and 50 GB/s; in memory they are written and read where they arrive, and where
    # they leave by RDMA, at 2000 GB/s.
    near = scaling.expected_time(call, one_to_one("flat", "direct", 500), RATES)
    assert dataclasses.astuple(near) == pytest.approx((10, 320, 0, 64))
    assert near.total_us == pytest.approx(330)
    assert near.bound == "nvlink"
    far = scaling.expected_time(call, one_to_one("flat", "rdma", 500), RATES)
    assert dataclasses.astuple(far) == pytest.approx((15, 0, 1280, 64))
    assert far.bound == "rdma"
    little = scaling.expected_time(call, one_to_one("flat", "direct", 1), RATES)
    assert little.bound == "fixed"
    rows = dataclasses.replace(one_to_one("flat", "direct", 1), rows=torch.tensor([0, 0, 0, 1000]))
    assert scaling.memory_bytes(call, rows).tolist() == [0, 256000, 0, 128_000_000]
    assert scaling.expected_time(call, rows, RATES).bound == "memory"


def test_times_are_monotonic() -> None:
    topology = of_nodes(4, 2)
    topk_idx = routes(topology, 4, 4, 3)
    for form, op, wire in itertools.product(FORMS, OPS, WIRE_KINDS):
        traffic = scaling.count(topk_idx, 32, topology, form)
        traffic = traffic if op == "dispatch" else traffic.reversed()
        call = Call(op=op, wire=wire, hidden=1024, num_topk=4)
        base = scaling.expected_time(call, traffic, RATES)
        assert base.fixed_us == 10 + 5 + (2 if form == "hierarchical" else 0)
        faster = scaling.expected_time(call, traffic, dataclasses.replace(RATES, rdma_gbs=100, nvlink_gbs=800))
        assert faster.rdma_us == pytest.approx(base.rdma_us / 2)
        assert faster.nvlink_us == pytest.approx(base.nvlink_us / 2)
        assert faster.total_us <= base.total_us
    times = [
        scaling.expected_time(Call(op="dispatch", wire=wire, hidden=1024, num_topk=4), traffic, RATES).rdma_us
        for wire in ("mxfp4", "fp8", "bf16")
    ]
    assert times == sorted(times)


def measured_lines() -> list[dict[str, Any]]:
    lines = [json.loads(line) for path in MEASURED for line in path.read_text().splitlines()]
    return [line for line in lines if line["layout"] != "-"]


def test_counts_are_those_of_measured_runs() -> None:
    lines = measured_lines()
    assert len(lines) > 20
    for line in lines:
        for nodes in (1, 2):
            ports = calibration.traffic_of(line, nodes).ports()
            records = ports["rdma_out"] + ports["nvlink_out"]
            assert int(records.max()) == line["remote_records"]
        call = calibration.call_of(line)
        record_bytes = call.physical_bytes - call.metadata_bytes
        assert line["remote_records"] * record_bytes == line["remote_bytes"]
    with pytest.raises(ValueError, match="remote_records, remote_records_in must be"):
        calibration.traffic_of({**lines[-1], "seed": 1, "remote_records": 1})
    with pytest.raises(ValueError, match="num_ranks must be a multiple of 3"):
        calibration.traffic_of(lines[0], 3)


def test_the_model_fits_what_was_measured() -> None:
    """The error that docs/scaling.md states, of every line that the model is fitted to."""
    points = calibration.points(measured_lines())
    assert {point.op for point in points} == set(OPS)
    for point in points:
        expected = calibration.expected(point.line).total_us
        largest = scaling.calibrated().fits[point.op].largest_error
        assert abs(expected / point.p50_us - 1) <= min(largest + 0.001, 0.15), point.line


def test_the_rates_that_ship_are_those_of_the_results() -> None:
    measured, _ = calibration.calibrate(MEASURED)
    shipped = json.loads(scaling.CALIBRATION.read_text())
    assert shipped["measured"] == measured, (
        "run python -m qcomm simulate --calibrate benchmarks/results/{dispatch,combine,decode}-h100-x4.jsonl "
        "--update qcomm/scaling.json"
    )
    assert set(shipped["assumed"]) == {"rdma_gbs", "nvlink_hop_us", "rdma_hop_us"}


def test_a_fit_finds_the_numbers_behind_its_points() -> None:
    sizes = [(0.1, 0.0001), (10, 0.001), (80, 0.02), (150, 0.05), (30, 0.4), (20, 0.2)]
    truth = {"dispatch": (25.0, 2400), "combine": (15.0, 3000)}
    points: dict[Op, list[calibration.Point]] = {
        op: [
            calibration.Point({}, op, link, memory, truth[op][0] + max(link / 0.8, 1e6 * memory / truth[op][1]))
            for link, memory in sizes
        ]
        for op in OPS
    }
    efficiency, fits = calibration.fit(points)
    assert efficiency == 0.8
    for op in OPS:
        assert (fits[op].fixed_us, fits[op].memory_gbs) == pytest.approx(truth[op])
        assert fits[op].largest_error < 1e-3
    with pytest.raises(ValueError, match="at least 4 measured calls of combine, got 1"):
        calibration.fit({**points, "combine": points["combine"][:1]})


def test_wrong_arguments() -> None:
    topology, idx = of_nodes(2, 1), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_ranks must be positive, got 0"):
        of_nodes(0, 8)
    with pytest.raises(ValueError, match="num_experts must be a multiple of 2, got 3"):
        scaling.count([idx, idx], 3, topology, "flat")
    with pytest.raises(ValueError, match="topk_idx must have a tensor for each of the 2 ranks, got 1"):
        scaling.count([idx], 4, topology, "flat")
    with pytest.raises(ValueError, match=r"topk_idx\[1\] must be in \[-1, 4\), got 4..4"):
        scaling.count([idx, idx + 4], 4, topology, "flat")
    with pytest.raises(ValueError, match="form must be one of"):
        scaling.count([idx, idx], 4, topology, "ring")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0"):
        scaling.count([idx, idx], 4, topology, "flat", 0)
