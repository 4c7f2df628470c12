"""The demo, as a user starts it, and the text and activations it works on."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from commands import REPO, mpirun, start

from qcomm import demo
from qcomm.records import MetadataLayout, RecordLayout

TINY = ["--hidden", "128", "--tokens", "24", "--experts", "8", "--topk", "2", "--intermediate", "32"]


def run_demo(*launcher: str) -> list[str]:
    command = [*launcher, sys.executable, "-m", "qcomm", "demo", *TINY]
    done = start(*command)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout.splitlines()


def check_report(lines: list[str], num_ranks: int) -> None:
    assert lines[0].startswith(f"{num_ranks} ranks on cpu")
    rows = {line.split()[0]: line.split() for line in lines if re.match(r"(bf16|fp8|mxfp4)\s", line)}
    assert list(rows) == ["bf16", "fp8", "mxfp4"]
    for wire in ("bf16", "fp8", "mxfp4"):
        assert rows[wire][1:3] == [str(RecordLayout(wire, 128).num_bytes), str(MetadataLayout(2).num_words * 4)]
    errors = [float(row[4].removesuffix("%")) for row in rows.values()]
    assert 0 < errors[0] < 1 < errors[1] < 8 < errors[2] < 30
    assert lines[-1] == "backend collective: tensors are on the CPU"
    assert sum(line.startswith("backend ") for line in lines) == 1


@pytest.mark.mpi
def test_under_mpirun() -> None:
    lines = run_demo(*mpirun(2))
    check_report(lines, 2)
    assert "24/18 tokens of 128" in lines[0]


def test_single_process() -> None:
    lines = run_demo()
    check_report(lines, 1)
    assert all(line.split()[3] == "0/0/0" for line in lines if line.startswith(("bf16 ", "fp8 ", "mxfp4 ")))


def test_text_is_real() -> None:
    text = demo.read_text()
    assert b"class Buffer" in text
    assert (REPO / "CONTRIBUTING.md").read_bytes() in text


def test_ranks_take_uneven_slices() -> None:
    assert [demo.tokens_of(rank, 4, 384) for rank in range(4)] == [384, 336, 288, 240]
    assert demo.tokens_of(0, 1, 384) == 384
    assert demo.tokens_of(1, 2, 1) == 1


def test_embedding_depends_on_the_bytes_before() -> None:
    cpu = torch.device("cpu")
    text = b"the token, the token"
    x = demo.embed(text, 0, len(text), 256, cpu)
    assert x.dtype == torch.bfloat16
    assert x.shape == (len(text), 256)
    assert torch.equal(x[10:], demo.embed(text, 10, 10, 256, cpu))
    # "token" twice, each after "the ": eight bytes of context decide.
    first, second = text.index(b"token") + 4, text.rindex(b"token") + 4
    assert torch.equal(x[first], x[second])
    # The same byte, "t", in other company.
    assert not torch.equal(x[0], x[4])
    kurtosis = (x.double() ** 4).mean() / (x.double() ** 2).mean() ** 2
    assert kurtosis > 4
