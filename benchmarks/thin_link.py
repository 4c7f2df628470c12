"""Two nodes on one machine: network namespaces joined by a veth pair whose rate `tc` limits, each with a host name.

Needs root, `ip` and `tc` (iproute2). Ranks are started by torchrun, one launcher per node, as on two real hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

DEVICE = "qlink"
_NETWORK = "10.213.57"
_PORT = 29571
# One rank's message may stand in the queue whole; the bucket is what a timer tick lets through at a few Gbit/s.
_LATENCY, _BURST = "400ms", "128kb"
_AS_HOST = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'


class ThinLinkError(RuntimeError):
    """A command of the link's set-up failed; the message has its output."""


class ThinLink:
    """Two nodes of a context; `rate` as `tc` reads it, such as "200mbit".

    Args:
        rate: of each direction.
    """

    def __init__(self, rate: str) -> None:
        self.rate = rate
        self.nodes = tuple(f"qcomm-{os.getpid()}-{letter}" for letter in "ab")

    def __enter__(self) -> ThinLink:
        try:
            for node in self.nodes:
                _run("ip", "netns", "add", node)
            first, second = self.nodes
            peer = ["peer", "name", DEVICE, "netns", second]
            _run("ip", "link", "add", DEVICE, "netns", first, "type", "veth", *peer)
            for number, node in enumerate(self.nodes):
                _run("ip", "-n", node, "address", "add", f"{_NETWORK}.{number + 1}/24", "dev", DEVICE)
                _run("ip", "-n", node, "link", "set", "lo", "up")
                _run("ip", "-n", node, "link", "set", DEVICE, "up")
                limit = ["tbf", "rate", self.rate, "burst", _BURST, "latency", _LATENCY]
                _run("tc", "-n", node, "qdisc", "add", "dev", DEVICE, "root", *limit)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the nodes, and with them the link."""
        for node in self.nodes:
            subprocess.run(["ip", "netns", "delete", node], capture_output=True, check=False)

    def set(self, state: str) -> None:
        """Cut ("down") or mend ("up") the link."""
        _run("ip", "-n", self.nodes[0], "link", "set", DEVICE, state)

    def sent_bytes(self) -> tuple[int, ...]:
        """Read the bytes that each node has sent over the link, headers included."""
        found = []
        for node in self.nodes:
            (link,) = json.loads(_run("ip", "-n", node, "-s", "-j", "link", "show", "dev", DEVICE))
            found.append(int(link["stats64"]["tx"]["bytes"]))
        return tuple(found)

    @contextlib.contextmanager
    def start(self, ranks_per_node: int, program: Path, *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
        """Start a Python program on so many ranks of both nodes; yield the nodes' launchers, which end with the block.

        Standard output of the ranks is the launchers', errors go where this process's do.
        """
        environ = os.environ | {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        launchers: list[subprocess.Popen[str]] = []
        with tempfile.TemporaryDirectory(prefix="qcomm-thin-link-") as logs:
            try:
                for number, node in enumerate(self.nodes):
                    command = ["ip", "netns", "exec", node, "unshare", "--uts", "sh", "-c", _AS_HOST, node]
                    command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
                    command += ["--node-rank", str(number), "--nproc-per-node", str(ranks_per_node)]
                    command += ["--master-addr", f"{_NETWORK}.1", "--master-port", str(_PORT)]
                    command += ["--log-dir", logs, str(program), *arguments]
                    launchers.append(
                        subprocess.Popen(
                            command, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
                        )
                    )
                yield launchers
            finally:
                for launcher in launchers:
                    _end(launcher)


def obstacle() -> str | None:
    """Say why no such link can be made here, None if one can."""
    missing = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        with ThinLink("200mbit"):
            return None
    except ThinLinkError as error:
        return f"no rights, or not in this kernel: {error}"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ThinLinkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _end(launcher: subprocess.Popen[str]) -> None:
    """End a launcher, which takes its ranks along."""
    if launcher.poll() is None:
        launcher.terminate()
        try:
            launcher.wait(timeout=20)
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.wait()
    if launcher.stdout is not None:
        launcher.stdout.close()
