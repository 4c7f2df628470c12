"""The trace: what is kept of a profile, how ranks are joined, and the file that the command writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import in_turn, mpirun, start
from ranks import need_gpus

from qcomm import trace

TINY = ["--hidden", "128", "--tokens", "24", "--experts", "8", "--topk", "2"]


def command(*arguments: str, ranks: int = 1, on_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    return start(*mpirun(ranks), sys.executable, "-m", "qcomm", "trace", *arguments, on_gpu=on_gpu)


def kernel(name: str, ts: float, stream: int) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": 2.0, "args": {"stream": stream}}


def test_select_keeps_kernels_and_calls() -> None:
    call = {"ph": "X", "cat": "user_annotation", "name": "qcomm.dispatch", "ts": 1.0, "dur": 9.0, "args": {}}
    other = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::zeros", "ts": 0.5, "dur": 1.0, "args": {}},
        {"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#1", "ts": 0.5, "dur": 1.0, "args": {}},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 0.5},
        {"ph": "M", "name": "process_name", "args": {}},
    ]
    exported = {"baseTimeNanoseconds": 5000, "traceEvents": [call, kernel("route", 3.0, 7), *other]}
    assert trace.select(exported) == [
        {"name": "qcomm.dispatch", "ph": "X", "ts": 6.0, "dur": 9.0, "tid": 0},
        {"name": "route", "ph": "X", "ts": 8.0, "dur": 2.0, "tid": 7},
    ]


def test_merge_begins_at_the_first_event_of_any_rank() -> None:
    first = trace.select({"traceEvents": [kernel("route", 30.0, 7), kernel("dispatch_send", 33.0, 20)]})
    second = trace.select({"traceEvents": [kernel("route", 25.0, 7)]})
    merged = trace.merge([first, second])["traceEvents"]
    times = [(event["pid"], event["tid"], event["name"], event["ts"]) for event in merged if event["ph"] == "X"]
    assert times == [(0, 7, "route", 5.0), (0, 20, "dispatch_send", 8.0), (1, 7, "route", 0.0)]
    names = [(event["pid"], event.get("tid"), event["args"]["name"]) for event in merged if event["ph"] == "M"]
    assert names == [
        (0, None, "rank 0"),
        (0, 7, "stream 7"),
        (0, 20, "stream 20"),
        (1, None, "rank 1"),
        (1, 7, "stream 7"),
    ]
    assert trace.merge([[], []])["traceEvents"][0]["args"] == {"name": "rank 0"}


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_command(ranks: int, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    done = command("--out", str(path), *TINY, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{path}: {2 * ranks} events of {ranks} ranks" in done.stdout
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert min(event["ts"] for event in events) == 0
    for rank in range(ranks):
        dispatch, combine = sorted((e for e in events if e["pid"] == rank), key=lambda event: event["ts"])
        assert (dispatch["name"], combine["name"]) == ("qcomm.dispatch", "qcomm.combine")
        assert 0 < dispatch["dur"] <= combine["ts"] - dispatch["ts"]


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_command_on_gpus(ranks: int, tmp_path: Path) -> None:
    need_gpus(ranks)
    path = tmp_path / "trace.json"
    done = command("--out", str(path), *TINY, "--static", ranks=ranks, on_gpu=True)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    for rank in range(ranks):
        names = {event["name"] for event in events if event["pid"] == rank}
        assert {"route", "place", "dispatch_send", "dispatch_recv", "combine_send", "combine_recv"} <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "missing/trace.json"], "--out must be a file in a folder that exists, got missing/trace.json"),
        (["--hidden", "100"], "hidden must be a multiple of 128, got 100"),
        (["--wire", "fp5"], "'fp5'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    done = in_turn("trace", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
