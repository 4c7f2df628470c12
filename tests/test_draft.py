"""A handle in the making: its addresses are those of its tensors, and kernels are launched before these are made."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import OPTIONS
from fake_cuda import FakeCuda, nvlink_buffer

from qcomm.handle import NOT_BY_TOKEN, PARTS, Owner, addresses_of, part_shapes
from qcomm.ops import count
from qcomm.ops.comm import Launcher
from qcomm.options import DispatchOptions
from qcomm.transport.draft import Draft, make_plan

SIZES = {
    "num_tokens": 5,
    "num_topk": 3,
    "num_ranks": 4,
    "num_local_experts": 2,
    "num_records": 64,
    "num_rows": 33,
}
FORWARD = (("counts", (2,)), ("slots", (2, 16, 3)))


def make_draft(layout: Any, nodes: int) -> Draft:
    plan = make_plan(layout, nodes, FORWARD if nodes else (), **SIZES)
    return Draft(plan, SIZES["num_rows"], 0, torch.device("cpu"))


def options_of(layout: Any) -> DispatchOptions:
    return dataclasses.replace(OPTIONS, recv_layout=layout, static=True)


@pytest.mark.parametrize("nodes", [0, 2])
@pytest.mark.parametrize("layout", ["expert_major", "token_major", "batched"])
def test_addresses_are_those_of_the_tensors(layout: Any, nodes: int) -> None:
    draft = make_draft(layout, nodes)
    handle = draft.handle(Owner(1, 2), options_of(layout), has_weights=True)
    absent = NOT_BY_TOKEN if layout == "token_major" else ()
    for name, shape in part_shapes(layout, **SIZES).items():
        tensor = getattr(handle, name)
        if name in absent:
            assert tensor is None
            assert name not in draft.addresses
        else:
            assert tensor.shape == shape
            assert tensor.data_ptr() == draft.addresses[name]
            assert tensor.dtype == (torch.float32 if name.endswith("weights") else torch.int32)
    forwarded = {"counts", "slots"} if nodes else set()
    assert set(addresses_of(handle)) == {*PARTS, *forwarded} - set(absent)
    assert {name: draft.addresses[name] for name in addresses_of(handle)} == addresses_of(handle)
    if nodes:
        assert handle.forward is not None
        assert [t.shape for t in (handle.forward.node_slot, handle.forward.counts)] == [(5, 2), (2,)]
        assert handle.forward.slots.shape == (2, 16, 3)
    else:
        assert handle.forward is None


@pytest.mark.parametrize("nodes", [0, 2])
def test_no_word_is_of_two_parts(nodes: int) -> None:
    draft = make_draft("expert_major", nodes)
    handle = draft.handle(Owner(1, 2), options_of("expert_major"), has_weights=True)
    tensors = {name: getattr(handle, name) for name in PARTS}
    if handle.forward is not None:
        tensors |= vars(handle.forward)
    for number, tensor in enumerate(tensors.values()):
        tensor.view(torch.int32).fill_(number)
    for number, (name, tensor) in enumerate(tensors.items()):
        assert (tensor.view(torch.int32) == number).all(), name
    ends = {
        draft.addresses["ordinals"]: 4 * SIZES["num_tokens"] * SIZES["num_topk"],
        draft.addresses["source_starts"]: 4 * SIZES["num_ranks"] * SIZES["num_local_experts"],
    }
    for begin, length in ends.items():
        for name, tensor in tensors.items():
            first, last = (
                tensor.data_ptr(),
                tensor.data_ptr()
                + 4 * sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)),
            )
            assert last < begin or first >= begin + length, name


@pytest.mark.parametrize("static", [False, True])
def test_kernels_are_launched_before_tensors_are_made(monkeypatch: pytest.MonkeyPatch, static: bool) -> None:
    cuda, seen = FakeCuda(), []
    make = Draft.handle

    def handle(*args: Any, **kwargs: Any) -> Any:
        seen.append([launch.kernel for launch in cuda.launches])
        return make(*args, **kwargs)

    monkeypatch.setattr(Draft, "handle", handle)
    shape: dict[str, Any] = {"num_experts": 2, "num_topk": 1, "hidden": 128, "num_max_tokens_per_rank": 512}
    with nvlink_buffer(monkeypatch, cuda, **shape) as (buffer, transport):
        monkeypatch.setattr(transport, "_wait_for_counts", _no_counts)
        x, idx = torch.zeros(400, 128, dtype=torch.bfloat16), torch.zeros(400, 1, dtype=torch.int64)
        buffer.dispatch(x, idx, static=static)
        cuda.launches.clear()
        buffer.dispatch(x, idx, static=static)
    assert seen[-1] == ["route", "dispatch_send", "count", "dispatch_recv"]


def test_the_hosts_numbers_of_calls_come_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], count.launch_count

    def launch_count(
        launcher: Launcher, stream: int, placement: count.Placement, host: torch.Tensor, sequence: int, *, early: bool
    ) -> None:
        real(launcher, stream, placement, host, sequence, early=early)
        host[:] = torch.tensor([sequence, 1, -1, -1, 400, 0, 0, 400, 400, 0])
        seen.append(sequence)

    monkeypatch.setattr(count, "launch_count", launch_count)
    shape: dict[str, Any] = {"num_experts": 2, "num_topk": 1, "hidden": 128, "num_max_tokens_per_rank": 512}
    with nvlink_buffer(monkeypatch, FakeCuda(), **shape) as (buffer, transport):
        x, idx = torch.zeros(400, 128, dtype=torch.bfloat16), torch.zeros(400, 1, dtype=torch.int64)
        transport._sequence = 2**31 - 2
        for _ in range(3):
            buffer.dispatch(x, idx)
    assert seen == [2**31 - 1, 1, 2]


def _no_counts(topk_idx: torch.Tensor) -> Any:
    return SimpleNamespace(rows=(400, 0), offsets=[0, 400], per_expert=(400, 0))
