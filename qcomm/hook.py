"""The hook of a split call, which launches its receive."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qcomm.errors import QcommError
from qcomm.transport.streams import profiled


class RecvHook:
    """Launches the receive of one split call, once, on the stream that is then current.

    Args:
        call: what the call is called in a profile and in errors.
        rank: this rank.
        device: of the buffer.
        receive: launches what the call left.
    """

    def __init__(self, call: str, rank: int, device: torch.device, receive: Callable[[], None]) -> None:
        self._call, self._rank, self._device = call, rank, device
        self._receive: Callable[[], None] | None = receive
        self._over = "called before"

    def __call__(self) -> None:
        """Launch the receive. A hook that raises may be called again."""
        if self._receive is None:
            raise self._error(f"the hook of this {self._call} was {self._over}")
        with profiled(f"{self._call}.recv", self._device):
            self._receive()
        self._receive = None

    def drop(self, by: str) -> None:
        """Give the receive up, unless it was launched."""
        if self._receive is not None:
            self._receive, self._over = None, f"dropped by {by}"

    def require_called(self) -> None:
        """Refuse another call of the buffer while this hook is outstanding."""
        if self._receive is not None:
            raise self._error(f"the hook of the last {self._call} is outstanding; call the hook first")

    def _error(self, text: str) -> QcommError:
        return QcommError(f"rank {self._rank}: {text}", rank=self._rank, phase="buffer.hook")
