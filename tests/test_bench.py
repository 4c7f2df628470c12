"""The dispatch and combine benchmarks, as a user starts them, and their parts."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from commands import in_turn, mpirun, start
from ranks import RankPool, need_gpus

from qcomm import reference_exchange, resources, scaling
from qcomm.config import Member
from qcomm.formats import RecvLayout, WirePrecision
from qcomm.jit import compile_cubin
from qcomm.ops import peer_store
from qcomm.records import MetadataLayout, RecordLayout
from qcomm.stats import Traffic
from qcomm.topology import Topology

sys.path.insert(0, str(resources.find("benchmarks")))

import bench_beside
import calibration
import harness
import links
import oracle
import plot_exchange
import workload

TINY = ["--tokens", "24", "--hidden", "128", "--experts", "8", "--topk", "2", "--iterations", "2"]
KEYS = {
    "benchmark",
    "command",
    "commit",
    "machine",
    "num_ranks",
    "geometry",
    "routing",
    "input",
    "seed",
    "iterations",
    "num_sms",
    "backend",
    "backend_reason",
    "ceiling_gbs",
    "call",
    "wire",
    "layout",
    "recv_dtype",
    "record_bytes",
    "rank_p50_us",
    "p50_us",
    "p99_us",
    "host_us",
    "slowest_rank",
    "remote_records",
    "remote_records_in",
    "remote_bytes",
    "remote_metadata_bytes",
    "physical_gbs",
    "logical_gbs",
    "limit_ratio",
    "nccl_bf16_ratio",
    "ranks_per_node",
    "form",
    "rank_sent_bytes",
    "node_sent_bytes",
    "nvlink_gbs",
    "rdma_gbs",
    "expected_fixed_us",
    "expected_nvlink_us",
    "expected_rdma_us",
    "expected_memory_us",
    "expected_us",
    "bound",
    "expected_ratio",
}
WRONG_ORACLE = """
import sys
import oracle, bench_dispatch
right = oracle.expected_dispatch
def wrong(*args):
    want = dict(right(*args))
    want["x"] = want["x"] ^ 1
    return want
oracle.expected_dispatch = wrong
sys.exit(bench_dispatch.main())
"""


def bench(*arguments: str, launcher: tuple[str, ...] = (), on_gpu: bool = False) -> list[list[str]]:
    """Run a benchmark; returns the cells of each row of its first table."""
    return cells(shown(*arguments, launcher=launcher, on_gpu=on_gpu), "call ")


def shown(*arguments: str, launcher: tuple[str, ...] = (), on_gpu: bool = False) -> str:
    """Run a benchmark; returns what it printed."""
    command = [*launcher, sys.executable, "-m", "qcomm", "bench", *arguments]
    done = start(*command, on_gpu=on_gpu)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def cells(printed: str, header: str) -> list[list[str]]:
    """Split the rows of the first table whose headers begin so."""
    lines = printed.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows = itertools.takewhile(bool, lines[head + 2 :])
    return [line.replace(" + expand", "+expand").split() for line in rows]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.mpi
def test_dispatch(tmp_path: Path) -> None:
    path = tmp_path / "dispatch.jsonl"
    rows = bench("dispatch", *TINY, "--json", str(path), launcher=mpirun(2))
    calls = ("dispatch", "replay", "static", "columnwise")
    want = [["gloo", "bf16", "-"], ["gloo", "fp8", "-"], ["gloo+expand", "bf16", "expert_major"]]
    for wire in ("mxfp4", "fp8", "bf16"):
        want += [[call, wire, "expert_major"] for call in calls[: 3 if wire == "bf16" else 4]]
        want += [[call, wire, "token_major"] for call in calls[:3]]
    assert [row[:3] for row in rows] == want
    found = read(path)
    assert [[line["call"].replace(" ", ""), line["wire"], line["layout"]] for line in found] == want
    for line in found:
        assert line.keys() == KEYS
        assert line["record_bytes"] == RecordLayout(line["wire"], 128).num_bytes
        assert line["remote_bytes"] == line["remote_records"] * line["record_bytes"]
        assert 0 < line["remote_records"] <= 24
        routed = line["call"] in ("dispatch", "static")
        words = MetadataLayout(2).num_words
        assert line["remote_metadata_bytes"] == (4 * words * line["remote_records"] if routed else 0)
        assert 0 < line["p50_us"] <= line["p99_us"]
        assert max(line["rank_p50_us"]) == line["p50_us"] == line["rank_p50_us"][line["slowest_rank"]]
        assert line["num_ranks"] == 2
    assert found[0]["nccl_bf16_ratio"] == 1.0


@pytest.mark.mpi
def test_combine(tmp_path: Path) -> None:
    path = tmp_path / "combine.jsonl"
    rows = bench("combine", *TINY, "--routing", "skewed", "--json", str(path), launcher=mpirun(2))
    want = [["gloo", "bf16", "-"], ["gloo", "fp8", "-"]]
    want += [["combine", wire, "expert_major"] for wire in ("mxfp4", "fp8", "bf16")]
    assert [row[:3] for row in rows] == want
    found = read(path)
    assert len(found) == len(want)
    for line in found:
        assert line.keys() == KEYS
        assert line["routing"] == "skewed"
        assert line["command"].startswith("mpirun -n 2 python -m qcomm bench combine --tokens 24")


@pytest.mark.mpi
def test_decode_runs_every_count(tmp_path: Path) -> None:
    path = tmp_path / "decode.jsonl"
    bench("decode", *TINY, "--tokens", "1,5", "--wire", "mxfp4", "--json", str(path), launcher=mpirun(2))
    found = read(path)
    assert [line["geometry"]["tokens"] for line in found] == [1] * 5 + [5] * 5
    ours = [(line["call"], line["wire"], line["layout"]) for line in found if line["layout"] == "batched"]
    assert ours == 2 * [("dispatch", "mxfp4", "batched"), ("combine", "mxfp4", "batched")]
    for line in found:
        assert line.keys() == KEYS
    dispatch, combine = (line for line in found[5:] if line["layout"] == "batched")
    assert dispatch["remote_records"] == combine["remote_records_in"]
    assert dispatch["remote_metadata_bytes"] == dispatch["remote_records"] * 4 * MetadataLayout(2).num_words
    assert (combine["remote_metadata_bytes"], combine["record_bytes"]) == (0, 80)


def check_links(lines: Sequence[dict[str, Any]], printed: str, rates: dict[str, Any]) -> None:
    """Require the bytes and times that the simulator has for the same routes, on two nodes of two ranks."""
    ours = [line for line in lines if line["rank_sent_bytes"] is not None]
    assert len(ours) < len(lines)
    assert {line["call"].partition(" ")[0] for line in lines if line not in ours} == {"gloo"}
    rows = cells(printed, "op ")
    for line in ours:
        assert (line["ranks_per_node"], line["form"], line["backend"]) == (2, "hierarchical", "collective")
        assert {name: line[name] for name in rates} == rates
        call, traffic = calibration.call_of(line), calibration.traffic_of(line, 2, "hierarchical")
        ports, plain = traffic.ports(), dataclasses.replace(call, routed=False)
        ranks, nodes = line["rank_sent_bytes"], line["node_sent_bytes"]
        for link, kind in (("nvlink", "inside_node"), ("rdma", "between_nodes")):
            records = ports[f"{link}_out"]
            record_bytes = plain.bytes_on("rdma" if link == "rdma" else "nvlink", "hierarchical")
            assert [each[kind] for each in ranks] == (records * record_bytes).tolist()
            assert [each[f"{kind}_logical"] for each in ranks] == (256 * records).tolist()
            assert [each[kind] for each in nodes] == (records.view(2, 2).sum(1) * record_bytes).tolist()
            assert [each[f"{kind}_logical"] for each in nodes] == (256 * records.view(2, 2).sum(1)).tolist()
        busiest = max(float(ports[f"rdma_{way}"].max()) for way in ("out", "in"))
        assert line["expected_rdma_us"] == pytest.approx(busiest * call.physical_bytes / rates["rdma_gbs"] / 1e3)
        whole = dataclasses.replace(scaling.calibrated(), **rates)
        assert line["expected_us"] == pytest.approx(scaling.expected_time(call, traffic, whole).total_us)
        assert line["expected_ratio"] == pytest.approx(line["p50_us"] / line["expected_us"])
        (cell,) = {
            row[-3] for row in cells(printed, "call ") if row[:3] == [line["call"], line["wire"], line["layout"]]
        }
        assert cell == f"{line['expected_us']:.1f}"
        told = [
            ("all", nodes[0]),
            ("0", ranks[0]),
            ("1", ranks[1]),
            ("all", nodes[1]),
            ("2", ranks[2]),
            ("3", ranks[3]),
        ]
        for (rank, sent), row in zip(told, [r for r in rows if r[:2] == [call.op, line["wire"]]], strict=True):
            kinds = ("inside_node", "between_nodes", "inside_node_logical", "between_nodes_logical")
            assert row[3:] == [rank, *(f"{sent[kind] / 1e6:.3f}" for kind in kinds)]


@pytest.mark.mpi
def test_links_of_dispatch(tmp_path: Path) -> None:
    path, rates = tmp_path / "lines.jsonl", {"nvlink_gbs": 0.02, "rdma_gbs": 0.001}
    given = ["--nvlink-gbs", "0.02", "--rdma-gbs", "0.001", "--ranks-per-node", "2", "--recv-layout", "token_major"]
    printed = shown("dispatch", *TINY, *given, "--tokens", "200", "--json", str(path), launcher=mpirun(4))
    lines = read(path)
    check_links(lines, printed, rates)
    assert {line["bound"] for line in lines} == {"rdma", None}


@pytest.mark.mpi
def test_links_of_combine_with_nodes_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMM_RANKS_PER_NODE", "2")
    path, rates = tmp_path / "lines.jsonl", {"nvlink_gbs": 0.001, "rdma_gbs": 40.0}
    given = ["--nvlink-gbs", "0.001", "--rdma-gbs", "40"]
    printed = shown("combine", *TINY, *given, "--tokens", "200", "--json", str(path), launcher=mpirun(4))
    lines = read(path)
    check_links(lines, printed, rates)
    assert {line["bound"] for line in lines} == {"nvlink", None}


@pytest.mark.mpi
def test_a_sweep(tmp_path: Path) -> None:
    path, plot = tmp_path / "lines.jsonl", tmp_path / "lines.svg"
    swept = ["--hidden", "128,256", "--tokens", "3,5", "--ranks-per-node", "2,1", "--wire", "fp8", "--nvlink-gbs", "9"]
    shown("combine", *TINY, *swept, "--json", str(path), launcher=mpirun(2))
    ours = [line for line in read(path) if line["layout"] == "expert_major"]
    runs = [(line["geometry"]["hidden"], line["geometry"]["tokens"], line["ranks_per_node"]) for line in ours]
    assert runs == list(itertools.product((128, 256), (3, 5), (2, 1)))
    for line in ours:
        assert line.keys() == KEYS
        # Between nodes there is no rate.
        assert (line["expected_us"] is None) == (line["ranks_per_node"] == 1)
        (quiet,) = {"between_nodes", "inside_node"} - {
            "inside_node" if line["ranks_per_node"] == 2 else "between_nodes"
        }
        assert all(each[quiet] == 0 for each in line["rank_sent_bytes"])
    if importlib.util.find_spec("matplotlib"):
        with pytest.raises(ValueError, match=r"one number of hidden, got \[128, 256\]"):
            plot_exchange.draw(ours, plot)
        with pytest.raises(ValueError, match=r"one number of ranks per node, got \[1, 2\]"):
            plot_exchange.draw(ours[:2], plot)


def test_no_time_is_expected_without_rates() -> None:
    sent = links.Sent("flat", (Traffic(1, 2, 3, 4),) * 2)
    for topology, rates in (
        (Topology(2, 2), links.LinkRates(rdma_gbs=1.0)),
        (Topology(2, 1), links.LinkRates(nvlink_gbs=1.0)),
        (Topology(1, 1), links.LinkRates(1.0, 1.0)),
    ):
        found = links.figures({}, topology, sent, rates)
        assert [found[name] for name in ("expected_us", "bound", "expected_ratio")] == [None] * 3
        assert {name for name in found if name.startswith("expected")} == {name for name in KEYS if "expected" in name}
    assert links.Sent("flat", tuple(Traffic(n, 0, 10 * n, 0) for n in range(6))).nodes(Topology(6, 3)) == (
        Traffic(3, 0, 30, 0),
        Traffic(12, 0, 120, 0),
    )


def _what_nvshmem_must_give(rank: int, num_ranks: int) -> list[bool]:
    """Ask the benchmarks' oracle for what nvshmem's combine gives, with relays and without."""
    group = dist.group.WORLD
    assert group is not None
    member = Member(group, rank, num_ranks, torch.device("cpu"), 30.0)
    geometry = workload.Geometry(tokens=9, hidden=128, topk=3, experts=8)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(9, 128, generator=generator).bfloat16()
    idx = workload.make_routing("uniform", geometry, 0, rank, num_ranks)
    work = workload.Workload(member, geometry, x, idx, torch.rand(9, 3, generator=generator), ranks_per_node=2)
    measured: Any = SimpleNamespace(backend="nvshmem", topology=Topology(4, 2))
    inputs = harness.gather(member, (idx, work.topk_weights))
    rows = [
        reference_exchange.arrange(
            each,
            [i for i, _ in inputs],
            [w for _, w in inputs],
            num_experts=8,
            recv_layout="expert_major",
            alignment=128,
        )
        for each in range(num_ranks)
    ]
    found = []
    for ranks_per_node in (2, 1):
        there = dataclasses.replace(work, ranks_per_node=ranks_per_node)
        with there.buffer(WirePrecision(combine_fwd="mxfp4"), "collective") as buffer:
            received, handle = buffer.dispatch(x, idx, work.topk_weights, recv_layout="expert_major")
            y = torch.randn(*received.x.shape[:-1], 128, generator=generator).bfloat16()
            by_collective = buffer.combine(y, handle)
        got = oracle.expected_combine(measured, work, y, handle, "mxfp4", True)
        (want,) = reference_exchange.combine(
            harness.gather(member, y),
            rows,
            [9] * num_ranks,
            wire=cases.MXFP4,
            weighted=True,
            ranks=[rank],
            ranks_per_node=ranks_per_node,
            rounds_inside=ranks_per_node == 2,
        )
        found += [torch.equal(got, want), torch.equal(got, by_collective)]
    return found


def test_the_oracle_of_nvshmem(pool4: RankPool) -> None:
    # With relays its sums are rounded twice, those of collective once; without, both are alike.
    assert pool4.run(_what_nvshmem_must_give) == [[True, False, True, True]] * 4


def test_the_ceiling_is_that_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of two nodes of two stores to rank 0 alone, whose bytes it looks at."""
    member: Any = SimpleNamespace(rank=1, num_ranks=4, device=torch.device("cpu"))
    topology, freed, asked, stored = Topology(4, 2), [], [], []
    monkeypatch.setattr(harness, "_PEER_BYTES", 1024)
    local = torch.ones(4 * 1024, dtype=torch.uint8)
    memory = SimpleNamespace(local=local, peers=[4096, 0, 0, 0], free=lambda: freed.append(True))

    def allocate(*arguments: object) -> Any:
        asked.append(arguments)
        return memory

    def launch(kernels: object, stream: int, source: torch.Tensor, peers: Sequence[int]) -> None:
        stored.append(list(peers))
        local[:1024] = harness._pattern(0, member.device)

    def time_once(call: Callable[[], object]) -> harness.Timing:
        call()
        return harness.Timing(0.5, 0.5, 0.5, (0.5,))

    clock: Any = SimpleNamespace(time=time_once)
    monkeypatch.setattr(harness, "allocate", allocate)
    monkeypatch.setattr(harness, "launch_peer_store", launch)
    monkeypatch.setattr(harness, "settle", lambda member: None)
    monkeypatch.setattr(harness, "KernelLoader", lambda device, waits: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    assert harness.peer_store_gbs(clock, member, "nvshmem", topology) == pytest.approx(1024 / 0.5 / 1e3)
    assert asked == [("nvshmem", 4096, member, topology.same_node)]
    assert stored == [[4096 + 1024]]
    assert freed
    assert harness.peer_store_gbs(clock, member, "nvshmem", Topology(4, 1)) is None


@pytest.mark.mpi
def test_overlap() -> None:
    rows = bench("overlap", *TINY, "--wire", "mxfp4,bf16", launcher=mpirun(2))
    calls = ("exchange", "experts", "in turn", "overlapped")
    want = [[*call.split(), wire] for wire in ("mxfp4", "bf16") for call in calls]
    assert [row[: len(words)] for row, words in zip(rows[3:], want, strict=True)] == want


@pytest.mark.mpi
def test_beside() -> None:
    rows = bench("beside", *TINY, "--wire", "mxfp4,bf16", launcher=mpirun(2))
    calls = ("gemm", "dispatch", "gemm beside dispatch", "combine", "gemm beside combine")
    want = [[*call.split(), wire] for wire in ("mxfp4", "bf16") for call in calls]
    assert [row[: len(words)] for row, words in zip(rows[3:], want, strict=True)] == want


def test_loss() -> None:
    assert bench_beside.loss(100.0, 125.0) == pytest.approx(0.2)
    assert [bench_beside._repeats(*times) for times in ((100.0, 1000.0), (100.0, 30.0))] == [1, 7]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = resources.find("benchmarks") / "results" / "decode-h100-x4.jsonl"
    lines = plot_exchange.read(path, "decode")
    assert {line["geometry"]["tokens"] for line in lines} == {1, 8, 32, 128}
    for name in ("one.svg", "two.svg"):
        plot_exchange.draw(lines, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    for label in ("dispatch mxfp4 batched", "combine bf16 batched", "nccl bf16", "4 x NVIDIA H100 80GB HBM3", "128"):
        assert label in text


def test_plot_takes_the_last_run(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    runs = [("a", "1"), ("b", "1"), ("a", "2")]
    lines = [{"benchmark": "combine", "command": command, "commit": commit} for command, commit in runs]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (*lines, {**lines[0], "benchmark": "dispatch"})))
    assert plot_exchange.read(path, "combine") == lines[2:]
    with pytest.raises(ValueError, match="must hold lines of bench decode, got none"):
        plot_exchange.read(path, "decode")


def test_single_process_appends(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for _ in range(2):
        rows = bench("combine", *TINY, "--wire", "fp8,bf16", "--routing", "one-expert", "--json", str(path))
        assert [row[1] for row in rows] == ["bf16", "fp8", "fp8", "bf16"]
    found = read(path)
    assert len(found) == 8
    assert all(line["remote_bytes"] == 0 and line["limit_ratio"] is None for line in found)


def test_batched_layout_and_other_formats() -> None:
    rows = bench("dispatch", *TINY, "--wire", "mxfp4", "--recv-layout", "batched", "--recv-dtype", "mxfp4")
    assert [row[:3] for row in rows[3:]] == [[call, "mxfp4", "batched"] for call in ("dispatch", "replay", "static")]


def test_tokens_in_fp8(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    rows = bench("dispatch", *TINY, "--input", "fp8", "--recv-layout", "expert_major", "--json", str(path))
    calls = ("dispatch", "replay", "static", "columnwise")
    assert [row[:2] for row in rows[3:]] == [[call, wire] for wire in ("mxfp4", "fp8") for call in calls]
    assert {line["input"] for line in read(path)} == {"fp8"}


def test_a_wrong_result_ends_the_run() -> None:
    done = start(sys.executable, "-c", WRONG_ORACLE, *TINY, "--wire", "fp8")
    assert done.returncode == 1
    assert "p50" not in done.stdout
    for call in ("dispatch", "replay", "static", "columnwise"):
        assert f"rank 0: {call}, wire fp8, expert_major, fp8: x has" in done.stderr
    assert "sf has" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wire", "fp8,fp5"], "got 'fp5'"),
        (["--hidden", "200"], "hidden must be a multiple of 128, got 200"),
        (["--iterations", "0"], "must be positive, got 0"),
        (["--rdma-gbs", "0"], "must be positive, got 0.0"),
        (["--ranks-per-node", "0"], "ranks_per_node must be positive, got 0"),
        (["--ranks-per-node", "3"], "ranks_per_node must divide the 1 ranks, got 3"),
        (["--tokens", "1,x"], "must be integers with commas between, got '1,x'"),
        (["--tokens", "4,0"], "got 0"),
        (["--plot", "a.svg"], "--from FILE and --plot FILE go together"),
        (["--from", "none.jsonl", "--plot", "a.pdf"], "must end in one of"),
        (["--from", "none.jsonl", "--plot", "a.svg"], "none.jsonl"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    done = in_turn("bench", "combine", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", ["dispatch", "combine", "decode", "overlap", "beside"])
def test_on_gpus(name: str, num_ranks: int, tmp_path: Path) -> None:
    need_gpus(num_ranks)
    path = tmp_path / "lines.jsonl"
    arguments = [name, "--tokens", "256", "--hidden", "512", "--iterations", "5", "--json", str(path)]
    bench(*arguments, launcher=mpirun(num_ranks), on_gpu=True)
    found = read(path)
    assert {line["backend"] for line in found} == {"nvlink"}
    assert all((line["ceiling_gbs"] is None) == (num_ranks == 1) for line in found)


def test_percentile() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert [harness.percentile(values, f) for f in (0.0, 0.01, 0.5, 0.99, 1.0)] == [1.0, 1.0, 50.0, 99.0, 100.0]
    assert harness.percentile([7.0], 0.99) == 7.0
    assert harness.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    with pytest.raises(ValueError, match="values must not be empty"):
        harness.percentile([], 0.5)


def test_figures() -> None:
    timing = harness.Timing(100.0, 120.0, 50.0, (90.0, 100.0, 80.0, 100.0))
    row = harness.Row("dispatch", "fp8", "token_major", timing, 10_000, 1000, 900, metadata_bytes=20)
    rates = links.LinkRates()
    run = harness.Run("", {}, Topology(4, 4), hidden=7168, ceiling_gbs=200.0, nccl_us=250.0, rates=rates)
    found = harness.figures(row, run)
    assert found["remote_bytes"] == 10_000_000
    assert found["physical_gbs"] == pytest.approx(100.0)
    assert found["logical_gbs"] == pytest.approx(143.36)
    assert found["limit_ratio"] == pytest.approx(2.0)
    hot = harness.figures(dataclasses.replace(row, remote_records_in=2000), run)
    assert hot["limit_ratio"] == pytest.approx(1.0)
    assert hot["remote_bytes"] == 10_000_000
    assert found["nccl_bf16_ratio"] == pytest.approx(2.5)
    assert found["remote_metadata_bytes"] == 20_000
    assert found["slowest_rank"] == 1
    # The ceiling is that of NVLink, over which only a part goes then.
    assert harness.figures(row, dataclasses.replace(run, topology=Topology(4, 2)))["limit_ratio"] is None


@pytest.mark.parametrize("routing", workload.ROUTINGS)
def test_routing(routing: str) -> None:
    geometry = workload.Geometry(tokens=500, hidden=128, topk=4, experts=32)
    idx = workload.make_routing(routing, geometry, seed=3, rank=1, num_ranks=4)
    assert idx.shape == (500, 4)
    assert torch.equal(idx, workload.make_routing(routing, geometry, seed=3, rank=1, num_ranks=4))
    if routing == "one-expert":
        assert idx[:, 0].eq(0).all()
        assert idx[:, 1:].eq(-1).all()
        return
    assert not torch.equal(idx, workload.make_routing(routing, geometry, seed=3, rank=0, num_ranks=4))
    assert idx.min() >= 0
    assert idx.max() < 32
    ordered = idx.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    counts = idx.flatten().bincount(minlength=32)
    if routing == "uniform":
        assert counts.max() < 2 * counts.min()
    elif routing == "hot-rank":
        by_rank = counts.view(4, 8).sum(1)
        assert 1.5 < by_rank[0] / by_rank[1:].max() < by_rank[0] / by_rank[1:].min() < 2.2
    else:
        assert counts.max() > 10 * counts.min()
        other = workload.make_routing(routing, geometry, seed=3, rank=0, num_ranks=4).flatten().bincount(minlength=32)
        assert counts.argmax() == other.argmax()


@pytest.mark.parametrize(
    ("layout", "end", "want"),
    [("token_major", 3, [0, 1, 2]), ("expert_major", 4, [0, 1, 2, 3]), ("batched", 8, [0, 4, 5, 6])],
)
def test_valid_rows(layout: RecvLayout, end: int, want: list[int]) -> None:
    assert oracle._valid_rows(layout, end, torch.tensor([1, 3])).tolist() == want


def test_differing() -> None:
    x = torch.arange(6, dtype=torch.uint8).view(2, 3)
    assert oracle.differing("call", {"x": x, "sf": None}, {"x": x.clone(), "sf": x}) == []
    assert oracle.differing("call", {"x": x}, {"x": x ^ 1}) == ["call: x has 6 wrong entries of 6"]
    assert "of shape (1, 3), got (2, 3)" in oracle.differing("call", {"x": x}, {"x": x[:1]})[0]
    assert "of shape None" in oracle.differing("call", {"x": x}, {"x": None})[0]


def test_peer_store_compiles() -> None:
    pytest.importorskip("cuda.core")
    assert compile_cubin(peer_store.peer_store_spec(), "sm_90")


def test_peer_store_refuses_before_it_launches() -> None:
    kernels: Any = None
    with pytest.raises(ValueError, match="peers must be 1 to 16 addresses, got 0"):
        peer_store.launch_peer_store(kernels, 0, torch.empty(16, dtype=torch.uint8), [])
    with pytest.raises(ValueError, match="source must be a multiple of 16 bytes, got 8"):
        peer_store.launch_peer_store(kernels, 0, torch.empty(8, dtype=torch.uint8), [16])
