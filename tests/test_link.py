"""Two nodes of two ranks over a thin link: what holds there, and what becomes of a call when the link is cut."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

from qcomm import resources

sys.path.insert(0, str(resources.find("benchmarks")))

import thin_link

PROGRAM = Path(__file__).parent / "programs" / "exchange_until_cut.py"
DEADLINE_S = 3.0
MARGIN_S = 5.0
Line = dict[str, Any]


@pytest.fixture(scope="module")
def link() -> Iterator[thin_link.ThinLink]:
    obstacle = thin_link.obstacle()
    if obstacle is not None:
        pytest.skip(f"no link between two nodes: {obstacle}")
    with thin_link.ThinLink("100mbit") as made:
        yield made


class Lines:
    """What the ranks say, one line after the other."""

    def __init__(self, launchers: list[subprocess.Popen[str]]) -> None:
        self._queue: Queue[Line] = Queue()
        for launcher in launchers:
            threading.Thread(target=self._read, args=(launcher,), daemon=True).start()

    def _read(self, launcher: subprocess.Popen[str]) -> None:
        assert launcher.stdout is not None
        try:
            for line in launcher.stdout:
                if line.startswith("{"):
                    self._queue.put(json.loads(line))
        except ValueError:
            return

    def of_every_rank(self, key: str, timeout_s: float) -> dict[int, Line]:
        """Wait until all four ranks have said something with this key."""
        found: dict[int, Line] = {}
        end = time.monotonic() + timeout_s
        while len(found) < 4:
            try:
                line = self._queue.get(timeout=max(end - time.monotonic(), 0.0))
            except Empty:
                pytest.fail(f"of {key!r} came {found} in {timeout_s} s")
            if key in line:
                found[line["rank"]] = line
        return found


@pytest.mark.parametrize("ranks_per_node", [0, 1], ids=["relayed", "straight"])
def test_a_cut_link(link: thin_link.ThinLink, ranks_per_node: int) -> None:
    with link.start(2, PROGRAM, str(ranks_per_node), "100000", str(DEADLINE_S)) as launchers:
        lines = Lines(launchers)
        lines.of_every_rank("running", 60.0)
        link.set("down")
        try:
            errors = lines.of_every_rank("error", DEADLINE_S + MARGIN_S)
        finally:
            link.set("up")
    for rank, error in errors.items():
        assert error["error"] in ("QcommTimeoutError", "QcommPeerError"), error
        assert error["took_s"] < DEADLINE_S + MARGIN_S, error
        assert error["phase"].partition(".")[0] in ("dispatch", "combine"), error
        across = {2, 3} if rank < 2 else {0, 1}
        # A rank that waits for its mate, which waits for a rank across the link, blames the mate.
        assert error["peer"] in across | {rank ^ 1}, error
    for node in ({0, 1}, {2, 3}):
        assert any(errors[rank]["peer"] not in node for rank in node), errors


def test_the_next_job_runs(link: thin_link.ThinLink) -> None:
    link.set("down")
    link.set("up")
    before = link.sent_bytes()
    with link.start(2, PROGRAM, "0", "3", "30") as launchers:
        finished = Lines(launchers).of_every_rank("finished", 60.0)
        for launcher in launchers:
            assert launcher.wait(timeout=60) == 0
    assert [line["nodes"] for line in finished.values()] == [2] * 4
    # Most of the 64 tokens of each of two ranks go to the other node, and sums come back, three times.
    for after, was in zip(link.sent_bytes(), before, strict=True):
        assert after - was > 3 * 64 * 2 * 7168 * 2
