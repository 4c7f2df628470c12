"""Calls on streams: each behind the one before it, in and out of captures, by few events."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, FakeEvent, nvlink_buffer

SHAPE: dict[str, Any] = {"num_experts": 2, "num_topk": 1, "hidden": 128, "num_max_tokens_per_rank": 512}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that are too many for one kernel, and their experts."""
    return torch.zeros(400, 128, dtype=torch.bfloat16), torch.zeros(400, 1, dtype=torch.int64)


def test_eager_calls_around_a_captured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call waits for an event of another capture, which the stand-in refuses as CUDA does."""
    cuda = FakeCuda()
    streams = [cuda.make_stream() for _ in range(3)]
    with nvlink_buffer(monkeypatch, cuda, **SHAPE) as (buffer, _):
        numbers = []
        for stream, captured in zip(streams, (False, True, False), strict=True):
            cuda.capturing = captured
            first = len(cuda.launches)
            with cuda.stream(stream):
                buffer.dispatch(*inputs(), static=True)
            numbers.append(set(range(first, len(cuda.launches))))
    before, _, after = numbers
    assert before
    assert all(before <= launch.after for launch in cuda.launches if launch.number in after)


@pytest.mark.parametrize(("kept", "made"), [({}, 0), ({"async_op": True}, 1), ({"return_recv_hook": True}, 1)])
def test_events_are_used_again(monkeypatch: pytest.MonkeyPatch, kept: dict[str, Any], made: int) -> None:
    """Only what a user keeps is an event of its own."""
    cuda = FakeCuda()
    with nvlink_buffer(monkeypatch, cuda, **SHAPE) as (buffer, _):
        buffer.dispatch(*inputs(), static=True)
        events: list[FakeEvent] = []

        def make() -> FakeEvent:
            events.append(FakeEvent())
            return events[-1]

        cuda.Event = make  # type: ignore[assignment]
        found = []
        for _ in range(2):
            found.append(buffer.dispatch(*inputs(), static=True, **kept))
            if "return_recv_hook" in kept:
                found[-1][-1]()
        assert len(events) == 2 * made
        if "async_op" in kept:
            assert [each[-1] for each in found] == events


def test_a_handle_is_cut_as_if_by_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    with nvlink_buffer(monkeypatch, FakeCuda(), **SHAPE) as (buffer, _):
        whole = buffer.dispatch(*inputs(), torch.ones(400, 1), static=True)[1]
    changes = {"num_rows": 7, "rows_per_expert": 3, "num_tokens_per_expert_list": (3, 4), "recv_counts": (7,)}
    assert whole.row_weights is not None
    views = {"row_src": whole.row_src[:7], "row_weights": whole.row_weights[:7]}
    want, found = dataclasses.replace(whole, **changes, **views), whole.cut(*changes.values())  # type: ignore[arg-type]
    for field in dataclasses.fields(whole):
        a, b = getattr(found, field.name), getattr(want, field.name)
        if field.name in views:
            assert (a.data_ptr(), a.shape, a.dtype) == (b.data_ptr(), b.shape, b.dtype)
        else:
            assert a is b or a == b, field.name
    assert whole.num_rows > 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.num_rows = 8  # type: ignore[misc]
