"""Streams, the caching allocator, and ranges in a profile."""

from __future__ import annotations

import contextlib
import dataclasses

import torch


def record_stream(stream: torch.cuda.Stream, *values: object) -> None:
    """Tell the allocator that a stream uses the tensors in these values: tensors, or dataclasses that hold some."""
    for value in values:
        if isinstance(value, torch.Tensor):
            value.record_stream(stream)
        elif dataclasses.is_dataclass(value):
            record_stream(stream, *(getattr(value, field.name) for field in dataclasses.fields(value)))


def profiled(name: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Mark a call on a GPU as an NVTX range, which costs little more than nothing where no profiler listens."""
    return torch.cuda.nvtx.range(f"qcomm.{name}") if device.type == "cuda" else contextlib.nullcontext()
