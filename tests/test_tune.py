"""`python -m qcomm tune`: what it tries, what it chooses, and its course where the kernels are stood in for."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import in_turn, mpirun, start
from ranks import need_gpus

from qcomm import resources, tuning
from qcomm.tuning import Tuning

sys.path.insert(0, str(resources.find("benchmarks")))

import harness
import tune

BASE = Tuning(in_flight=8, flags_together=4, decode_tokens=256, num_sms=None)
TINY = ["--tokens", "24", "--hidden", "128", "--experts", "8", "--topk", "2", "--iterations", "1"]
# The collective backend in place of the kernels, which then take the same time however they are set.
STAND_IN = """
import sys
from types import SimpleNamespace
import torch
import tune, workload
from qcomm.transport.select import Choice
make = workload.Workload.buffer
def buffer(self, precision, backend, provider="auto", num_sms=None):
    return make(self, precision, "collective")
workload.Workload.buffer = buffer
workload.backend_choice = lambda flags, work: Choice("nvlink", "torch", "stood in for")
torch.cuda.get_device_properties = lambda device: SimpleNamespace(name="Stand-in", multi_processor_count=132)
"""
# Keeps none of what it is given, which holds the process group: its threads must end before the interpreter does.
WRONG = """
import itertools
cases, calls = tune._combine_cases, itertools.count()
def wrong(*args):
    found = cases(*args)
    if next(calls):
        found["combine"].got["sum"] ^= 1
    return found
tune._combine_cases = wrong
"""
RUN = "\nsys.exit(tune.main())\n"


def measured(total_us: float, found: Tuning = BASE) -> tune.Measured:
    parts = (total_us / 4, total_us * 3 / 4)
    timings = {name: harness.Timing(part, part, part, (part,)) for name, part in zip("ab", parts, strict=True)}
    return tune.Measured("senders", "dispatch", "mxfp4", 24, found, timings)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs() -> None:
    found = [(each.in_flight, each.flags_together) for each in tune.pairs(BASE)]
    assert found[0] == (8, 4)
    assert found[1:] == sorted(found[1:])
    few = {(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)}
    assert set(found) == few | {(8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4)}
    assert len(set(found)) == len(found)
    odd = dataclasses.replace(BASE, in_flight=3, flags_together=3)
    assert tune.pairs(odd)[0] == odd
    assert len(tune.pairs(odd)) == len(found) + 1
    assert max(in_flight for in_flight, _ in found) <= tuning.MAX_IN_FLIGHT
    # What ships is tried, whatever the table in effect says.
    assert {(each.in_flight, each.flags_together) for each in tuning.current().defaults.values()} <= set(found)


def test_sm_steps() -> None:
    assert [each.num_sms for each in tune.sm_steps(BASE, 132)] == [33, 66, 99, None]
    assert [each.num_sms for each in tune.sm_steps(BASE, 3)] == [1, 2, None]


@pytest.mark.parametrize(
    ("totals", "want"),
    [
        ([100.0, 90.0, 95.0], 1),
        ([99.9, 99.5, 99.0], 0),
        ([101.1, 100.9, 100.0], 1),
        ([100.0], 0),
    ],
)
def test_best(totals: list[float], want: int) -> None:
    found = [measured(total) for total in totals]
    assert found[0].total_us == pytest.approx(totals[0])
    assert tune.best(found) is found[want]


@pytest.mark.parametrize(
    ("times", "want"),
    [
        ([(32, 10.0, 30.0), (64, 20.0, 31.0), (128, 40.0, 32.0)], 64),
        ([(128, 40.0, 32.0), (32, 10.0, 30.0), (64, 31.0, 31.0)], 64),
        ([(32, 10.0, 30.0), (64, 33.0, 31.0), (128, 10.0, 32.0)], 32),
        ([(32, 31.0, 30.0), (64, 10.0, 31.0)], 0),
        ([(32, 10.0, 30.0)], 32),
        ([], 0),
    ],
)
def test_most_decode_tokens(times: list[tuple[int, float, float]], want: int) -> None:
    assert tune.most_decode_tokens(times) == want


def test_there_is_nothing_to_tune_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    done = start(sys.executable, "-m", "qcomm", "tune", *TINY, "--update", str(path))
    assert done.returncode == 2
    assert "there is nothing to tune: the collective backend has no kernels (tensors are on the CPU)" in done.stderr
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wire", "fp5"], "got 'fp5'"),
        (["--op", "place"], "must be of dispatch, combine, got 'place'"),
        (["--hidden", "200"], "hidden must be a multiple of 128, got 200"),
        (["--decode-tokens", "8,0"], "--decode-tokens must be positive, got 0"),
        (["--update", "none/table.json"], "--update must be in a folder that is there, got none/table.json"),
        (["--update", __file__], "must be a table of tunings"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    done = in_turn("tune", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_the_scripts() -> None:
    done = in_turn("tune", "--help")
    assert done.returncode == 0
    for words in ("usage: python -m qcomm tune", "--decode-tokens", "one kernel"):
        assert words in done.stdout


@pytest.mark.mpi
def test_its_course(tmp_path: Path) -> None:
    lines, table = tmp_path / "lines.jsonl", tmp_path / "table.json"
    arguments = [*TINY, "--decode-tokens", "8,4", "--wire", "mxfp4", "--json", str(lines), "--update", str(table)]
    done = start(*mpirun(2), sys.executable, "-c", STAND_IN + RUN, *arguments)
    assert done.returncode == 0, done.stderr
    rows = tuning.read(table).rows
    assert [(row.device, row.op, row.wire, row.num_ranks) for row in rows] == [
        ("Stand-in", op, "mxfp4", 2) for op in ("dispatch", "combine")
    ]
    command = "mpirun -n 2 python -m qcomm tune --tokens 24"
    assert all(command in row.source and "commit" in row.source for row in rows)
    assert tuning.read(table).defaults == tuning.current().defaults

    found = read(lines)
    for line in found:
        assert line["benchmark"] == "tune"
        assert line["command"].startswith(command)
        assert line["machine"]["devices"]
        assert line["p50_us"] > 0
        assert len(line["rank_p50_us"]) == 2
    for row, calls in zip(rows, (["static", "replay"], ["combine"]), strict=True):
        ours = [line for line in found if line["op"] == row.op]
        assert [line["call"] for line in ours if line["sweep"] == "senders"] == 12 * calls
        assert [line["call"] for line in ours if line["sweep"] == "SMs"] == 4 * calls
        decode = [line for line in ours if line["sweep"] == "decode"]
        assert [(line["tokens"], line["decode_tokens"]) for line in decode] == [(4, 4), (4, 0), (8, 8), (8, 0)]
        best = {line["sweep"]: line for line in ours if line["best"]}
        assert best["senders"]["in_flight"] == row.tuning.in_flight
        assert best["SMs"]["num_sms"] == row.tuning.num_sms
        assert row.tuning.decode_tokens in (0, 4, 8)
    printed = done.stdout.splitlines()
    assert sum(line.startswith("senders ") for line in printed) == 2 * 12
    assert sum(line.startswith("dispatch ") for line in printed) == 1


def test_one_operation_is_put_into_a_table_that_is_there(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    other = tuning.Row(device="Other", op="combine", wire="fp8", num_ranks=2, tuning=BASE, source="there")
    table.write_text(tuning.render(tuning.merge(tuning.current(), [other])))
    arguments = [*TINY, "--decode-tokens", "8", "--wire", "fp8", "--op", "combine", "--update", str(table)]
    done = start(sys.executable, "-c", STAND_IN + RUN, *arguments)
    assert done.returncode == 0, done.stderr
    assert [(row.device, row.op, row.num_ranks) for row in tuning.read(table).rows] == [
        ("Other", "combine", 2),
        ("Stand-in", "combine", 1),
    ]


def test_a_wrong_result_ends_the_run(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    arguments = [*TINY, "--decode-tokens", "8", "--wire", "fp8", "--op", "combine", "--update", str(table)]
    done = start(sys.executable, "-c", STAND_IN + WRONG + RUN, *arguments)
    assert done.returncode == 1, done.stderr
    assert "p50" not in done.stdout
    assert "rank 0: combine of combine, wire fp8, 24 tokens, Tuning(in_flight=2" in done.stderr
    assert not table.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_on_gpus(num_ranks: int, tmp_path: Path) -> None:
    need_gpus(num_ranks)
    lines, table = tmp_path / "lines.jsonl", tmp_path / "table.json"
    arguments = ["--tokens", "512", "--hidden", "512", "--iterations", "3", "--decode-tokens", "8", "--wire", "mxfp4"]
    arguments += ["--json", str(lines), "--update", str(table)]
    done = start(*mpirun(num_ranks), sys.executable, "-m", "qcomm", "tune", *arguments, on_gpu=True)
    assert done.returncode == 0, done.stderr
    found = read(lines)
    assert {line["backend"] for line in found} == {"nvlink"}
    assert {(line["op"], line["sweep"]) for line in found} == {
        (op, sweep) for op in ("dispatch", "combine") for sweep in ("senders", "SMs", "decode")
    }
    assert [(row.op, row.wire, row.num_ranks) for row in tuning.read(table).rows] == [
        (op, "mxfp4", num_ranks) for op in ("dispatch", "combine")
    ]
