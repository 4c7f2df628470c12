"""Streams and events that only note what is ordered after what, for calls of the nvlink backend without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from qcomm import Buffer
from qcomm import buffer as buffer_module
from qcomm.bootstrap import process_group
from qcomm.config import BufferConfig, Member
from qcomm.handle import Owner
from qcomm.jit import KernelSpec
from qcomm.transport import calls, nvlink
from qcomm.transport.nvlink import NvlinkTransport

_NUM_SMS = 132


class FakeStream:
    """Stands for a torch.cuda.Stream.

    Attributes:
        before: the launches that end before the next one here begins, unless it is early.
        running: those of them that do not end before an early one begins.
    """

    def __init__(self, number: int, cuda: FakeCuda) -> None:
        self.cuda_stream, self.cuda = number, cuda
        self.before: frozenset[int] = frozenset()
        self.running: frozenset[int] = frozenset()

    def wait_event(self, event: FakeEvent) -> None:
        # CUDA knows no event of a capture outside of it, nor one of outside in a capture.
        assert event.captured is self.cuda.capturing
        self.before |= event.before

    def wait_stream(self, other: FakeStream) -> None:
        self.before |= other.before


class FakeEvent:
    """Stands for a torch.cuda.Event."""

    def __init__(self) -> None:
        self.before: frozenset[int] = frozenset()
        self.captured = False

    def record(self, stream: FakeStream) -> None:
        self.before, self.captured = stream.before, stream.cuda.capturing


class Asked(NamedTuple):
    """What a launcher asks of a kernel."""

    grid: int
    threads: int
    shared_bytes: int
    stream: int
    early: bool
    alone: bool


def kernel_that(note: Callable[[Asked], None]) -> Any:
    """Make what stands for a loaded kernel: it only notes what it is asked."""

    def launch(
        grid: int,
        threads: int,
        shared_bytes: int,
        stream: int,
        params: ctypes.Structure,
        *,
        early: bool = False,
        alone: bool = False,
    ) -> None:
        assert isinstance(params, ctypes.Structure)
        note(Asked(grid, threads, shared_bytes, stream, early, alone))

    return SimpleNamespace(launch=launch)


class Launch(NamedTuple):
    """A kernel's launch: its stream, its number, and the numbers of the launches that end before it begins."""

    kernel: str
    stream: FakeStream
    number: int
    after: frozenset[int]
    early: bool


_LETS_BEGIN = {
    "route": ("dispatch_send",),
    "barrier": ("dispatch_send", "combine_send"),
    "dispatch_send": ("count", "dispatch_recv"),
    "count": ("dispatch_recv",),
    "combine_send": ("combine_recv",),
}
"""Kernels that let the next one begin before they end, and those that bear it."""


class FakeCuda:
    """Stands for torch.cuda in the nvlink backend, and for its loader of kernels: launches are noted.

    Attributes:
        current: the stream that is current.
        capturing: whether it is being captured.
        launches: all of them.
        users: streams of which the allocator was told that they use results.
    """

    def __init__(self) -> None:
        self.Stream, self.Event = self.make_stream, FakeEvent
        self._streams: list[FakeStream] = []
        self.current = self.make_stream()
        self.capturing = False
        self.launches: list[Launch] = []
        self.users: list[FakeStream] = []

    def make_stream(self, device: object = None, priority: int = 0) -> FakeStream:
        self._streams.append(FakeStream(len(self._streams), self))
        return self._streams[-1]

    def current_stream(self) -> FakeStream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        usual, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = usual

    def device(self, device: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def get_device_properties(self, device: object) -> Any:
        return SimpleNamespace(name="a GPU", multi_processor_count=_NUM_SMS)

    def synchronize(self, device: object) -> None:
        pass

    def record_stream(self, stream: FakeStream, *values: object) -> None:
        self.users.append(stream)

    def get(self, make_spec: Callable[..., KernelSpec], *args: Any) -> Any:
        def note(asked: Asked) -> None:
            name, on, number = make_spec(*args).name, self._streams[asked.stream], len(self.launches)
            if asked.early:
                last = [launch for launch in self.launches if launch.stream is on][-1]
                assert name in _LETS_BEGIN[last.kernel]
            else:
                on.running = frozenset()
            self.launches.append(Launch(name, on, number, on.before - on.running, asked.early))
            on.before |= {number}
            # What a sender lets begin begins behind what routed; what count lets begin, beside the sender too.
            on.running = frozenset({number}) | (on.running if name == "count" else frozenset())

        return kernel_that(note)


class _Torch:
    """torch, with another CUDA and no pinned memory."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **kwargs)


@contextlib.contextmanager
def nvlink_buffer(
    monkeypatch: pytest.MonkeyPatch,
    cuda: FakeCuda,
    make: Callable[[BufferConfig, Member, Owner, Any], NvlinkTransport] | None = None,
    **shape: Any,
) -> Iterator[tuple[Buffer, Any]]:
    """Make a buffer of one rank on the CPU whose calls go to the nvlink backend; yields it and the backend.

    `make` makes another backend that is built on it.
    """

    def allocate(provider: str, num_bytes: int, member: Member) -> Any:
        local = torch.zeros(num_bytes, dtype=torch.uint8)
        return SimpleNamespace(local=local, peers=[local.data_ptr()], settle=lambda: None, free=lambda: None)

    def create(choice: object, config: BufferConfig, member: Member, owner: Owner, *_: object) -> NvlinkTransport:
        stream: Any = cuda.make_stream()
        if make is not None:
            return make(config, member, owner, stream)
        return NvlinkTransport(config, member, owner, stream, None, "torch")

    monkeypatch.setattr(nvlink, "torch", _Torch(cuda))
    monkeypatch.setattr(calls, "torch", _Torch(cuda))
    monkeypatch.setattr(nvlink, "allocate", allocate)
    monkeypatch.setattr(calls, "record_stream", cuda.record_stream)
    monkeypatch.setattr(nvlink, "KernelLoader", lambda *_, **__: cuda)
    monkeypatch.setattr(buffer_module, "create", create)
    with process_group(use_cuda=False) as launch, Buffer(device=launch.device, **shape) as buffer:
        yield buffer, buffer._transport
