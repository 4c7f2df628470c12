"""Start-up of the process group."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qcomm import Buffer, QcommError, QcommUnsupportedError, bootstrap

LAUNCHER_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "TORCHELASTIC_RUN_ID",
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
)


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({}, "single"),
        ({"RANK": "0"}, "single"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host"}, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "mpirun"),
        ({"PMI_SIZE": "3"}, "mpirun"),
        ({"TORCHELASTIC_RUN_ID": "none", "OMPI_COMM_WORLD_SIZE": "3"}, "torchrun"),
    ],
    ids=str,
)
def test_find_launcher(environ: dict[str, str], launcher: str) -> None:
    assert bootstrap.find_launcher(environ) == launcher


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.mark.usefixtures("no_launcher")
def test_single_process() -> None:
    for _ in range(2):
        with bootstrap.process_group(use_cuda=False) as launch:
            assert launch == bootstrap.Launch("single", 0, 1, 0, 1, torch.device("cpu"))
            total = torch.ones(3)
            dist.all_reduce(total)
            assert total.tolist() == [1, 1, 1]
        assert not dist.is_initialized()


@pytest.mark.usefixtures("no_launcher")
def test_gpus_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    wanted = "use_cuda=True needs a GPU for each of the 1 ranks of this host, found 0"
    with pytest.raises(QcommUnsupportedError, match=wanted), bootstrap.process_group(use_cuda=True):
        pass
    assert not dist.is_initialized()


@pytest.mark.usefixtures("no_launcher")
def test_a_failure_in_the_block_ends_the_group() -> None:
    with pytest.raises(KeyError), bootstrap.process_group(use_cuda=False):
        raise KeyError
    assert not dist.is_initialized()


@pytest.mark.usefixtures("no_launcher")
def test_one_process_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(bootstrap._free_port())
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, value)
    with bootstrap.process_group(use_cuda=False) as launch:
        assert launch == bootstrap.Launch("torchrun", 0, 1, 0, 1, torch.device("cpu"))


def _threads() -> int:
    """Count the threads of gloo."""
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_a_buffer_that_ended_keeps_no_thread_of_its_group() -> None:
    """A thread of gloo that lets a tensor go while the interpreter ends would abort the process."""
    buffers = []
    counts = [_threads()]
    for end in ("destroy", "destroy", "abandon"):
        with bootstrap.process_group(use_cuda=False):
            shape: dict[str, Any] = {"num_experts": 2, "num_topk": 1, "hidden": 128, "num_max_tokens_per_rank": 4}
            buffers.append(Buffer(**shape, device="cpu"))
            buffers[-1].dispatch(torch.zeros(2, 128, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64))
            # torch imports parts of itself late, and some keep the default group that there is then.
            importlib.import_module("torch._dynamo")
            getattr(buffers[-1], end)()
        counts.append(_threads())
    assert len(set(counts)) == 1, counts
    with pytest.raises(QcommError, match="destroyed"):
        _ = buffers[0].group
