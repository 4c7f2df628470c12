"""Calls of one buffer on CUDA streams, one after the other.

A call takes the caller's stream or, if it is async, the communication stream; and others beside it. Events are made
once and recorded again and again, because making one takes the host as long as recording it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qcomm.transport.streams import record_stream


class Calls:
    """Orders the calls, whatever streams they are on.

    Args:
        device: of the streams.
        comm_stream: of async calls.
    """

    def __init__(self, device: torch.device, comm_stream: torch.cuda.Stream) -> None:
        self._device, self._comm_stream = device, comm_stream
        self._fork, self._end = torch.cuda.Event(), torch.cuda.Event()
        self._last: torch.cuda.Event | None = None
        self._last_stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def begin(self, *inputs: object, async_op: bool = False, keeps_event: bool = False) -> Iterator[Call]:
        """Order a call after the one before it, on the stream it runs on.

        Args:
            inputs: what an async call reads.
            async_op: run it on the communication stream.
            keeps_event: whether `Call.event` is used once another call has begun.
        """
        with torch.cuda.device(self._device):
            caller = torch.cuda.current_stream()
            main = self._comm_stream if async_op else caller
            if async_op:
                main.wait_stream(caller)
                record_stream(main, *inputs)
            capturing = torch.cuda.is_current_stream_capturing()
            if self._last is not None and not capturing and self._last_stream != main:
                main.wait_event(self._last)
            # An event that is recorded in a capture cannot be waited for outside, so captured calls leave _end alone.
            event = torch.cuda.Event() if keeps_event or capturing else self._end
            call = Call(main, caller, capturing, self._fork, event)
            try:
                with torch.cuda.stream(main) if async_op else contextlib.nullcontext():
                    yield call
            finally:
                call.join()
                if not capturing:
                    self._last, self._last_stream = event, main

    def forget(self) -> None:
        """Forget the calls so far, which have ended."""
        self._last = self._last_stream = None


class Call:
    """One call in flight: its streams, and the event that ends it."""

    def __init__(
        self,
        main: torch.cuda.Stream,
        caller: torch.cuda.Stream,
        captured: bool,
        fork: torch.cuda.Event,
        event: torch.cuda.Event,
    ) -> None:
        self._main, self._caller, self._fork = main, caller, fork
        self.captured, self.event = captured, event
        self.stream = main.cuda_stream
        self._open = True
        self._beside: list[torch.cuda.Stream] = []

    @contextlib.contextmanager
    def beside(self, stream: torch.cuda.Stream) -> Iterator[int]:
        """Launch on another stream what comes next, behind what the main stream holds so far."""
        self._wait(stream, self._main)
        self._beside.append(stream)
        yield stream.cuda_stream

    def keep(self, *results: object) -> None:
        """Tell the allocator that the caller's stream uses the results of an async call."""
        if self._main != self._caller:
            record_stream(self._caller, *results)

    def follow(self, split: Call, *results: object) -> None:
        """Go on behind a split call, filling its results."""
        self._main.wait_event(split.event)
        if self._main != split._main:
            record_stream(self._main, *results)

    def join(self) -> None:
        """End the call, unless that was done: the main stream waits for the others."""
        if self._open:
            for stream in self._beside:
                self._wait(self._main, stream)
            self.event.record(self._main)
            self._open = False

    def reopen(self) -> None:
        """Say that more was launched after `join`."""
        self._open = True

    def _wait(self, waits: torch.cuda.Stream, stream: torch.cuda.Stream) -> None:
        """Make one stream wait for what another holds so far."""
        self._fork.record(stream)
        waits.wait_event(self._fork)
