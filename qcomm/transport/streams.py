"""Streams and the caching allocator."""

from __future__ import annotations

import dataclasses

import torch


def record_stream(stream: torch.cuda.Stream, *values: object) -> None:
    """Tell the allocator that a stream uses the tensors in these values: tensors, or dataclasses that hold some."""
    for value in values:
        if isinstance(value, torch.Tensor):
            value.record_stream(stream)
        elif dataclasses.is_dataclass(value):
            record_stream(stream, *(getattr(value, field.name) for field in dataclasses.fields(value)))
