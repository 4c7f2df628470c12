"""DeepEP as a peer in the benchmarks, stood in for: how it is called, and what is said where it is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from commands import mpirun, start

from qcomm import resources
from qcomm.records import RecordLayout

sys.path.insert(0, str(resources.find("benchmarks")))

import deep_ep_baseline
import plot_exchange

TINY = ["--tokens", "24", "--hidden", "512", "--experts", "8", "--topk", "2", "--iterations", "2", "--wire", "mxfp4"]
# Does what DeepEP does by collecting everything from everyone, and asks of its arguments what DeepEP asks.
FAKE = """
import json, sys, types
import torch
import torch.distributed as dist
import deep_ep_baseline

CALLS = []

def gather(group, value):
    everyone = [None] * group.size()
    dist.all_gather_object(everyone, value, group=group)
    return everyone

class Config:
    def __init__(self, num_bytes):
        self.num_bytes = num_bytes
    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return self.num_bytes + hidden_bytes * num_ranks

class Buffer:
    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        CALLS.append(("Buffer", num_nvl_bytes, num_rdma_bytes))
        self.group = group

    @staticmethod
    def get_dispatch_config(num_ranks):
        return Config(1)

    @staticmethod
    def get_combine_config(num_ranks):
        return Config(2)

    def get_dispatch_layout(self, topk_idx, num_experts):
        CALLS.append(("layout", str(topk_idx.dtype), num_experts))
        ranks = self.group.size()
        experts = torch.arange(num_experts)
        chosen = (topk_idx[:, :, None] == experts).any(1)
        in_rank = chosen.view(len(topk_idx), ranks, -1).any(2)
        return in_rank.sum(0).int(), None, chosen.sum(0).int(), in_rank, None

    def dispatch(self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None,
                 is_token_in_rank=None, num_tokens_per_expert=None, topk_idx=None, topk_weights=None):
        parts = x if isinstance(x, tuple) else (x,)
        row_bytes = parts[0].shape[1] * parts[0].element_size()
        assert all(part.is_contiguous() for part in parts) and row_bytes % 32 == 0
        CALLS.append(("dispatch", str(parts[0].dtype), row_bytes, handle is not None))
        if handle is None:
            assert topk_weights.dtype == torch.float32 and num_tokens_per_rank.dtype == torch.int32
            assert int(num_tokens_per_rank[self.group.rank()]) == int(is_token_in_rank[:, self.group.rank()].sum())
        else:
            assert topk_idx is None and topk_weights is None
            is_token_in_rank = handle
        as_bytes = [part.view(torch.uint8) for part in parts]
        came = []
        for theirs, to in gather(self.group, (as_bytes, is_token_in_rank)):
            came.append([part[to[:, self.group.rank()]] for part in theirs])
        whole = [torch.cat(each).view(part.dtype) for each, part in zip(zip(*came), parts)]
        whole[0] = whole[0].view(torch.uint8) BROKEN
        whole[0] = whole[0].view(parts[0].dtype)
        received = tuple(whole) if isinstance(x, tuple) else whole[0]
        return received, None, None, None, None if handle is not None else is_token_in_rank, None

    def combine(self, x, handle):
        assert x.dtype == torch.bfloat16
        CALLS.append(("combine", list(x.shape)))
        out = torch.zeros(len(handle), x.shape[1])
        me = self.group.rank()
        for theirs, to in zip(gather(self.group, x), range(self.group.size())):
            starts = gather(self.group, int(handle[:, to].sum()))
            begin = sum(starts[:me])
            out[handle[:, to]] += theirs[begin : begin + starts[me]].float()
        return out.bfloat16(), None, None

sys.modules["deep_ep"] = types.SimpleNamespace(Buffer=Buffer, topk_idx_t=torch.int64, __version__="1.2.1")
deep_ep_baseline.obstacle = lambda member: None
"""
RUN = """
import bench_{name}
code = bench_{name}.main()
print("CALLS " + json.dumps(CALLS), file=sys.stderr)
sys.exit(code)
"""


def run(name: str, path: Path, num_ranks: int, broken: str = "") -> tuple[int, str, list[list[Any]]]:
    """Run a benchmark beside a stand-in for DeepEP; returns its code, what it printed and each rank's calls."""
    script = FAKE.replace("BROKEN", broken) + RUN.format(name=name)
    done = start(*mpirun(num_ranks), sys.executable, "-c", script, *TINY, "--json", str(path))
    calls = [json.loads(line[6:]) for line in done.stderr.splitlines() if line.startswith("CALLS ")]
    return done.returncode, done.stdout + done.stderr, calls


def rows(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["call"].startswith("deep_ep")]


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_dispatch(num_ranks: int, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    code, printed, calls = run("dispatch", path, num_ranks)
    assert code == 0, printed
    assert "deep_ep: " not in printed
    fp8_bytes, mxfp4_bytes = (RecordLayout(kind, 512).num_bytes for kind in ("fp8", "mxfp4"))
    found = rows(path)
    assert [(row["call"], row["wire"], row["layout"], row["record_bytes"]) for row in found] == [
        ("deep_ep", "fp8", "-", fp8_bytes),
        ("deep_ep cached", "fp8", "-", fp8_bytes),
        ("deep_ep", "mxfp4 bytes", "-", mxfp4_bytes),
        ("deep_ep cached", "mxfp4 bytes", "-", mxfp4_bytes),
    ]
    assert all(row["p50_us"] > 0 and row["limit_ratio"] is None for row in found)
    assert all((row["remote_records"] > 0) == (num_ranks == 2) for row in found)
    # After those of gloo, whose first is what the others are compared with.
    everything = [json.loads(line)["call"] for line in path.read_text().splitlines()]
    assert everything[:7] == ["gloo", "gloo", "gloo + expand", *(row["call"] for row in found)]

    assert len(calls) == num_ranks
    for each in calls:
        assert each[0] == ["Buffer", 2 + 1024 * num_ranks, 0]
        assert each.count(["Buffer", 2 + 1024 * num_ranks, 0]) == 1
        layouts = [call for call in each if call[0] == "layout"]
        routed = [call for call in each if call[0] == "dispatch" and not call[3]]
        assert layouts == [["layout", "torch.int64", 8]] * len(routed)
        # A row of 272 bytes is padded to halves of whole vectors.
        want = {("torch.float8_e4m3fn", 512), ("torch.uint8", 288)}
        assert {(call[1], call[2]) for call in each if call[0] == "dispatch" and call[3]} == want
        assert {(call[1], call[2]) for call in routed} == want


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_combine(num_ranks: int, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    code, printed, calls = run("combine", path, num_ranks)
    assert code == 0, printed
    (row,) = rows(path)
    assert (row["call"], row["wire"], row["layout"], row["record_bytes"]) == ("deep_ep", "bf16", "-", 1024)
    assert row["p50_us"] > 0
    for each in calls:
        combined = [call for call in each if call[0] == "combine"]
        assert len(combined) == 1 + 2 + 2  # checked, warmed up and timed
        assert {call[1][1] for call in combined} == {512}


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("dispatch", "^ 1", "rank 0: deep_ep, wire fp8: rows are not those that were sent"),
        (
            "dispatch",
            "; whole = [part[1:] for part in whole]",
            "rank 0: deep_ep cached, wire fp8: rows are not those that were sent",
        ),
        ("combine", "^ 128", "rank 0: deep_ep, combine: sums are not those of what was sent"),
    ],
)
def test_a_wrong_result_ends_the_run(name: str, broken: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    code, printed, _ = run(name, path, 1, broken)
    assert code == 1
    assert message in printed
    assert "p50" not in printed
    assert not path.exists()


@pytest.mark.parametrize("name", ["dispatch", "combine"])
def test_where_it_is_not_installed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    done = start(sys.executable, "-m", "qcomm", "bench", name, *TINY, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("deep_ep: not installed") == 1
    assert rows(path) == []


def test_decode_has_no_such_peer() -> None:
    done = start(sys.executable, "-m", "qcomm", "bench", "decode", *TINY)
    assert done.returncode == 0, done.stderr
    assert "deep_ep" not in done.stdout


def test_obstacles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(device: str, num_ranks: int) -> str | None:
        member: Any = SimpleNamespace(device=torch.device(device), num_ranks=num_ranks)
        return deep_ep_baseline.obstacle(member)

    assert found("cuda", 4) == "not installed"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deep_ep.py").write_text("import deep_ep_cpp_that_is_not_there")
    assert found("cuda", 4) == "cannot be imported: No module named 'deep_ep_cpp_that_is_not_there'"
    (tmp_path / "deep_ep.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    assert found("cuda", 4) == "cannot be imported: libcuda.so.1: cannot open shared object file"
    stand_in: Any = ModuleType("deep_ep")
    monkeypatch.setitem(sys.modules, "deep_ep", stand_in)
    assert found("cuda", 4) == "has no Buffer, version unknown"
    stand_in.Buffer = object
    assert found("cpu", 4) == "runs on GPUs, not on cpu"
    assert found("cuda", 3) == "takes 2, 4, 8 ranks of a host, not 3"
    assert [found("cuda", num_ranks) for num_ranks in (2, 4, 8)] == [None] * 3


def test_its_rows_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = resources.find("benchmarks") / "results" / "dispatch-h100-x4.jsonl"
    lines = [*plot_exchange.read(path, "dispatch")]
    lines.append({**lines[0], "call": "deep_ep", "wire": "mxfp4 bytes"})
    plot_exchange.draw(lines, tmp_path / "plot.svg")
    assert "deep_ep mxfp4 bytes" in (tmp_path / "plot.svg").read_text()
