"""Rows between ranks of a process group, by message to each peer on the CPU and by collectives on GPUs.

gloo's collectives do not say whom they waited for when a deadline passes; a message does. NCCL's end by the process
group's own timeout.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from qcomm.config import Member
from qcomm.errors import QcommPeerError, QcommTimeoutError

_TAG = 0x71C0
"""Keeps these messages apart from those of others on the same group."""


class Messages:
    """Exchanges of one rank with peers; every rank of a call takes part with the same numbers of rows."""

    def __init__(self, member: Member) -> None:
        self._member = member

    def gather(self, mine: torch.Tensor, phase: str) -> torch.Tensor:
        """Gather a vector from every rank: `[num_ranks, *mine.shape]`."""
        member = self._member
        everyone = mine.new_empty((member.num_ranks, *mine.shape))
        if mine.is_cuda:
            work = dist.all_gather_into_tensor(everyone, mine.contiguous(), group=member.group, async_op=True)
            self._finish(work, phase)
        else:
            ranks = range(member.num_ranks)
            self._pass(ranks, [mine.contiguous()] * member.num_ranks, list(everyone), phase)
        return everyone

    def exchange(
        self,
        rows: torch.Tensor,
        peers: Sequence[int],
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        phase: str,
    ) -> torch.Tensor:
        """Send each peer its rows, which follow one another, and return those that came, by peer.

        Args:
            rows: `[sum(send_counts), width]`.
            peers: ranks; this one may be among them.
            send_counts: rows to each peer.
            recv_counts: rows from each.
            phase: what for, as an error says it.

        Raises:
            QcommTimeoutError: the first of the peers that did not come before the deadline.
            QcommPeerError: a connection broke.
        """
        came = rows.new_empty((sum(recv_counts), rows.shape[1]))
        rows = rows.contiguous()
        if rows.is_cuda:
            send, recv = ([0] * self._member.num_ranks for _ in range(2))
            for peer, out, back in zip(peers, send_counts, recv_counts, strict=True):
                send[peer], recv[peer] = out, back
            group = self._member.group
            self._finish(dist.all_to_all_single(came, rows, recv, send, group=group, async_op=True), phase)
        else:
            self._pass(peers, rows.split(list(send_counts)), came.split(list(recv_counts)), phase)
        return came

    def _pass(
        self, peers: Sequence[int], out: Sequence[torch.Tensor], into: Sequence[torch.Tensor], phase: str
    ) -> None:
        """Send to and receive from every peer; empty messages too, so that each hears of each."""
        member = self._member
        pending: list[tuple[int, dist.Work]] = []
        sends: list[tuple[int, dist.Work]] = []
        end = time.monotonic() + member.deadline_s
        for peer, given, taken in zip(peers, out, into, strict=True):
            if peer == member.rank:
                taken.copy_(given)
                continue
            try:
                pending.append((peer, member.group.recv([taken], peer, _TAG)))
                sends.append((peer, member.group.send([given], peer, _TAG)))
            except RuntimeError as error:
                raise self._failure(phase, str(error), peer) from error
        for peer, work in (*pending, *sends):
            left = max(end - time.monotonic(), 1e-3)
            try:
                work.wait(datetime.timedelta(seconds=left))
            except RuntimeError as error:
                raise self._failure(phase, str(error), peer) from error

    def _finish(self, work: dist.Work | None, phase: str) -> None:
        assert work is not None
        try:
            work.wait()
        except RuntimeError as error:
            raise self._failure(phase, str(error), None) from error

    def _failure(self, phase: str, text: str, peer: int | None) -> QcommTimeoutError | QcommPeerError:
        member = self._member
        late = "imed out" in text or "imeout" in text
        kind = QcommTimeoutError if late else QcommPeerError
        whom = "" if peer is None else f" with rank {peer}"
        within = f" within {member.deadline_s} s" if late and peer is not None else ""
        return kind(
            f"rank {member.rank}: {phase}{whom} failed{within}: {text}", rank=member.rank, peer=peer, phase=phase
        )
