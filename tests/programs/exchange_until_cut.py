"""One rank of test_link: exchanges until a call fails, or so many times; prints what became of it as a JSON line."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import cases

from qcomm import Buffer, QcommError, WirePrecision, bootstrap

NUM_TOKENS, HIDDEN, NUM_EXPERTS = 64, 7168, 8


def tell(**what: object) -> None:
    # One write, for the ranks of a node share the pipe.
    os.write(1, f"{json.dumps(what)}\n".encode())


def exchange(buffer: Buffer, x: torch.Tensor, idx: torch.Tensor, times: int) -> QcommError | None:
    """Dispatch and combine, and say when a few are done; return what failed, and how long after its call began."""
    for done in range(times):
        if done == 2:
            tell(rank=buffer.rank, running=True)
        start = time.monotonic()
        try:
            recv, handle = buffer.dispatch(x, idx)
            start = time.monotonic()
            buffer.combine(recv.x, handle)
        except QcommError as error:
            took = time.monotonic() - start
            tell(rank=buffer.rank, error=type(error).__name__, peer=error.peer, phase=error.phase, took_s=took)
            return error
    return None


def main() -> None:
    torch.set_num_threads(1)
    ranks_per_node = int(sys.argv[1]) or None
    times, deadline_s = int(sys.argv[2]), float(sys.argv[3])
    case = cases.Case(combine_wire=cases.FP8)
    with bootstrap.process_group(use_cuda=False) as launch:
        problems = cases.run_cases(launch.rank, launch.num_ranks, "cpu", "collective", [case])
        assert not problems, problems
        generator = torch.Generator().manual_seed(launch.rank)
        x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator).to(torch.bfloat16)
        idx = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).topk(4, dim=1).indices
        buffer = Buffer(
            num_experts=NUM_EXPERTS,
            num_topk=4,
            hidden=HIDDEN,
            num_max_tokens_per_rank=NUM_TOKENS,
            precision=WirePrecision.bf16(),
            device="cpu",
            backend="collective",
            deadline_s=deadline_s,
            ranks_per_node=ranks_per_node,
        )
        nodes = buffer.topology.num_nodes
        if exchange(buffer, x, idx, times) is None:
            buffer.destroy()
            tell(rank=launch.rank, nodes=nodes, finished=True)
        else:
            buffer.abandon()
            # The group is beyond use, and leaving it would wait for the peers.
            os._exit(0)


if __name__ == "__main__":
    main()
