"""Run-time failures, each with the values a user needs to act on it.

Wrong arguments are plain ValueError or TypeError, raised before anything is launched.
"""

from __future__ import annotations


class QcommError(RuntimeError):
    """A failure at run time.

    Attributes:
        rank: rank that reports, in the buffer's group; None outside a group.
        peer: rank it concerns, None if none.
        phase: what was going on, such as "dispatch.exchange".
        expected: what was needed there.
        seen: what was there.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        peer: int | None = None,
        phase: str | None = None,
        expected: object = None,
        seen: object = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.peer = peer
        self.phase = phase
        self.expected = expected
        self.seen = seen


class QcommTimeoutError(QcommError):
    """A wait for a peer passed its deadline."""


class QcommPeerError(QcommError):
    """A peer reported that it cannot take part in this call, or broke its connection."""


class QcommOverflowError(QcommError):
    """A static receive needed more rows than it had: `expected` rows needed, `seen` rows available."""


class QcommRoutingError(QcommError, ValueError):
    """A routing table holds an expert out of range or one expert twice for a token."""


class QcommConfigError(QcommError, ValueError):
    """Ranks disagree on a Buffer's configuration."""


class QcommUnsupportedError(QcommError):
    """This machine cannot run what was asked for."""
