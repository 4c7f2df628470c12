"""Which backend and provider a buffer takes, and what it says of those that cannot run."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from cases import BF16, Case
from ranks import RankPool

from qcomm import (
    QcommConfigError,
    QcommUnsupportedError,
    WirePrecision,
)
from qcomm.config import BufferConfig, Member
from qcomm.topology import Topology
from qcomm.transport import select, symmetric
from qcomm.transport.select import Capability, Choice

CASE = Case(combine_wire=BF16, routes="random")


def _nvlink_on_the_cpu(rank: int, num_ranks: int) -> None:
    with pytest.raises(QcommUnsupportedError, match="'nvlink' cannot run here: tensors are on the CPU") as caught:
        cases.make_buffer(CASE, num_ranks, "cpu", "nvlink")
    assert (caught.value.rank, caught.value.phase) == (rank, "buffer.create")
    with cases.make_buffer(CASE, num_ranks, "cpu", "auto") as buffer:
        assert buffer.backend_reason == "tensors are on the CPU"
        cases.works(buffer, CASE)


def test_nvlink_on_the_cpu(pool2: RankPool) -> None:
    pool2.run(_nvlink_on_the_cpu)


def _providers_that_differ(rank: int, num_ranks: int) -> None:
    with pytest.raises(QcommConfigError, match=r"provider must be the same.*rank 0: nvshmem, rank 1: torch"):
        cases.make_buffer(CASE, num_ranks, "cpu", "auto", provider=symmetric.PROVIDERS[rank])
    with pytest.raises(ValueError, match="provider must be one of"):
        cases.make_buffer(CASE, num_ranks, "cpu", "auto", provider="nccl")
    with cases.make_buffer(CASE, num_ranks, "cpu", "auto", provider="torch") as buffer:
        cases.works(buffer, CASE)


def test_providers_that_differ(pool2: RankPool) -> None:
    pool2.run(_providers_that_differ)


BOTH = Capability(True, "fine", ("nvshmem", "torch"))
TORCH = Capability(True, "fine", ("torch",))
NO_CUPY = Capability(False, "not installed: cupy-cuda13x", ())


def seats(num_ranks: int = 3, **of_the_last: Any) -> list[select._Seat]:
    """Make ranks that can run the nvlink backend, the last one changed."""
    uuids = tuple(f"GPU-{rank}" for rank in range(num_ranks))
    made = [select._Seat(BOTH, "host", uuid, uuids, None, uuids) for uuid in uuids]
    return [*made[:-1], dataclasses.replace(made[-1], **of_the_last)]


@pytest.mark.parametrize(
    ("found", "want"),
    [
        (seats(), None),
        (seats(1), None),
        (seats(host="other"), "ranks are on several hosts"),
        (seats(device_uuid="GPU-0"), "ranks 0 and 2 share a GPU"),
        (seats(reachable_uuids=("GPU-0", "GPU-2")), "the GPU of rank 2 cannot reach that of rank 1"),
        (seats(reachable_uuids=("GPU-2",), visible_uuids=("GPU-2",)), None),
        (seats(capability=NO_CUPY), "rank 2: not installed: cupy-cuda13x"),
        (seats(1, capability=NO_CUPY), "not installed: cupy-cuda13x"),
        (seats(capability=NO_CUPY, host="other", device_uuid="GPU-0"), "rank 2: not installed: cupy-cuda13x"),
        (seats(host="other", device_uuid="GPU-0"), "ranks are on several hosts"),
    ],
)
def test_obstacles(found: list[select._Seat], want: str | None) -> None:
    assert select._obstacle(found) == want


@pytest.mark.parametrize(
    ("changes", "num_ranks", "want"),
    [
        ({}, 16, None),
        ({}, 17, "ranks of at most 16, got 17"),
        ({"num_topk": 33}, 4, "num_topk of at most 32, got 33"),
        ({"hidden": 41088}, 4, "hidden of at most 40960, got 41088"),
        ({"num_max_tokens_per_rank": 1 << 20}, 4, "num_experts 272 and num_max_tokens_per_rank 1048576 need 566352"),
    ],
)
def test_limits(changes: dict[str, int], num_ranks: int, want: str | None) -> None:
    shape = {"num_experts": 272, "num_topk": 32, "hidden": 40960, "num_max_tokens_per_rank": 4096} | changes
    config = BufferConfig(**shape, precision=WirePrecision(), backend="nvlink", provider="auto", device_type="cuda")
    limit = select._limit(config, num_ranks)
    assert limit is None if want is None else want in str(limit)


def choose(
    monkeypatch: pytest.MonkeyPatch, found: list[select._Seat], backend: str, provider: str, ranks_per_node: int = 3
) -> Choice:
    """Choose as rank 0 of ranks that told this."""

    def all_gather_object(into: list[select._Seat], mine: select._Seat, group: object) -> None:
        assert mine is found[0]
        into[:] = found

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(select, "_seat", lambda *_: found[0])
    config = BufferConfig(3, 1, 128, 8, WirePrecision(), backend, provider, "cuda")
    group: Any = None
    topology = Topology(len(found), ranks_per_node)
    return select.choose(config, Member(group, 0, len(found), torch.device("cuda", 0), 1.0), topology)


@pytest.mark.parametrize(
    ("found", "backend", "provider", "want"),
    [
        (seats(), "auto", "auto", ("nvlink", "nvshmem", "every rank reaches every GPU")),
        (seats(), "nvlink", "torch", ("nvlink", "torch", "asked for; symmetric memory from torch")),
        (seats(), "collective", "auto", ("collective", None, "asked for")),
        (seats(capability=TORCH), "auto", "auto", ("nvlink", "torch", "from torch")),
        (seats(capability=TORCH), "auto", "nvshmem", ("collective", None, "'nvshmem'")),
        (seats(host="other"), "auto", "auto", ("collective", None, "several hosts")),
        # NVSHMEM runs on some of the ranks only.
        (seats(nvshmem=(0, 1)), "auto", "auto", ("nvlink", "torch", "from torch")),
    ],
)
def test_choices(
    monkeypatch: pytest.MonkeyPatch,
    found: list[select._Seat],
    backend: str,
    provider: str,
    want: tuple[str, str | None, str],
) -> None:
    choice = choose(monkeypatch, found, backend, provider)
    assert (choice.backend, choice.provider) == want[:2]
    assert want[2] in choice.reason


@pytest.mark.parametrize(
    ("found", "provider", "text"),
    [
        (seats(host="other"), "auto", "several hosts"),
        (seats(capability=NO_CUPY), "auto", "rank 2: not installed: cupy-cuda13x"),
        (seats(capability=TORCH), "nvshmem", "provider 'nvshmem'"),
        (seats(nvshmem=(0, 1)), "nvshmem", "provider 'nvshmem'"),
    ],
)
def test_nvlink_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, found: list[select._Seat], provider: str, text: str
) -> None:
    with pytest.raises(QcommUnsupportedError, match=text) as caught:
        choose(monkeypatch, found, "nvlink", provider)
    assert "backend 'nvlink' cannot run here" in str(caught.value)
    assert caught.value.phase == "buffer.create"
    assert caught.value.seen


def test_several_nodes_take_nvshmem(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(monkeypatch, seats(4, nvshmem_build="by NVRTC"), "auto", "auto", ranks_per_node=2)
    assert (choice.backend, choice.provider) == ("nvshmem", "nvshmem")
    assert choose(monkeypatch, seats(4), "nvshmem", "nvshmem", ranks_per_node=2).backend == "nvshmem"
    # GPUs of other nodes need not be within reach.
    alone = seats(2, reachable_uuids=("GPU-1",), host="other")
    assert choose(monkeypatch, alone, "auto", "auto", ranks_per_node=1).backend == "nvshmem"
    with pytest.raises(QcommUnsupportedError, match="'nvlink' cannot run here: ranks are on 2 nodes"):
        choose(monkeypatch, seats(4), "nvlink", "auto", ranks_per_node=2)


@pytest.mark.parametrize(
    ("last", "provider", "reason"),
    [
        ({"nvshmem_obstacle": "not installed: nvshmem4py-cu13"}, "auto", "rank 3: not installed: nvshmem4py-cu13"),
        ({"reachable_uuids": ("GPU-3",)}, "auto", "the GPU of rank 3 cannot reach that of rank 2"),
        ({"capability": NO_CUPY}, "auto", "rank 3: not installed: cupy-cuda13x"),
        ({"nvshmem": (3, 8)}, "auto", "NVSHMEM runs as (PE, number of PEs) [None, None, None, (3, 8)]"),
        ({}, "torch", "provider 'torch' serves one node"),
    ],
)
def test_what_keeps_from_nvshmem(
    monkeypatch: pytest.MonkeyPatch, last: dict[str, Any], provider: str, reason: str
) -> None:
    found = seats(4, **last)
    choice = choose(monkeypatch, found, "auto", provider, ranks_per_node=2)
    assert (choice.backend, choice.reason) == ("collective", reason)
    with pytest.raises(QcommUnsupportedError) as caught:
        choose(monkeypatch, found, "nvshmem", provider, ranks_per_node=2)
    assert str(caught.value).startswith(f"backend 'nvshmem' cannot run here: {reason}")


def test_one_node_is_not_for_nvshmem(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QcommUnsupportedError, match="ranks are on one node; backend 'nvlink' serves it"):
        choose(monkeypatch, seats(3), "nvshmem", "auto")


@pytest.mark.parametrize(
    ("running", "want"),
    [
        ([None, None], True),
        ([(0, 2), (1, 2)], True),
        ([(1, 2), (0, 2)], True),
        ([(0, 2), None], False),
        ([(0, 4), (1, 4)], False),
        ([(0, 1), (0, 1)], False),
        ([(0, 2)], False),
    ],
)
def test_nvshmem_of_one_group(running: list[tuple[int, int] | None], want: bool) -> None:
    assert select._one_nvshmem(running) is want


def test_what_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    capability = (9, 0)
    installed = {"cupy", "cuda.core", "cuda.bindings"}
    providers: tuple[str, ...] = ("torch",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(select, "_importable", lambda module: module in installed)
    monkeypatch.setattr(symmetric, "available_providers", lambda: providers)
    assert select.local_capability(device) == Capability(
        True, "Hopper or newer, symmetric memory from torch", ("torch",)
    )
    providers = ()
    assert "no provider" in select.local_capability(device).reason
    installed = {"cuda.core"}
    assert select.local_capability(device) == Capability(False, "not installed: cupy-cuda13x, cuda-bindings", ())
    capability = (8, 6)
    lacks = select.local_capability(device)
    assert not lacks.supported
    assert "9.0 or newer, this GPU has 8.6" in lacks.reason
    assert select.local_capability(torch.device("cpu")) == Capability(False, "tensors are on the CPU", ())


def test_packages_that_are_missing() -> None:
    assert select._importable("torch.distributed")
    assert not select._importable("torch.no_such_module")
    assert not select._importable("no_such_package.module")


def test_nvshmem_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nvshmem.core", raising=False)
    assert symmetric.running_nvshmem() is None
    # Imported, and started by whoever imported it.
    package, core = ModuleType("nvshmem"), ModuleType("nvshmem.core")
    status = 0
    for name, value in {"init_status": lambda: status, "my_pe": lambda: 3, "n_pes": lambda: 4}.items():
        setattr(core, name, value)
    package.core = core  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvshmem", package)
    monkeypatch.setitem(sys.modules, "nvshmem.core", core)
    assert symmetric.running_nvshmem() is None
    status = 2
    assert symmetric.running_nvshmem() == (3, 4)
