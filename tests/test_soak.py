"""Calls for a while: the same bits at the end as at the start, and no more memory. QCOMM_SOAK_S makes it longer."""

from __future__ import annotations

import dataclasses
import os
import resource
import time

import cases
import pytest
import torch
from bit_patterns import equal_bits
from cases import FP8, MXFP4, Case
from ranks import Target, targets

SECONDS = "QCOMM_SOAK_S"
_WARM_ROUNDS = 20
_GROWTH_BYTES = 8 * 2**20
BASE = Case(wire=MXFP4, combine_wire=FP8, routes="random", hidden=256)
CASES = [
    BASE,
    dataclasses.replace(BASE, seed=1, recv_layout="batched", static=True),
    dataclasses.replace(BASE, seed=2, recv_layout="token_major", counts="empty"),
]


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _soak(rank: int, num_ranks: int, device: str, backend: str, seconds: float) -> tuple[int, int, int]:
    """Return the rounds made, and how much the process and the device's allocator hold more than at the start."""
    inputs = [cases.make_inputs(case, num_ranks) for case in CASES]
    first: list[torch.Tensor] = []
    with cases.make_buffer(BASE, num_ranks, device, backend) as buffer:
        on_gpu = buffer.device.type == "cuda"

        def held() -> tuple[int, int]:
            return _resident_bytes(), torch.cuda.memory_allocated(buffer.device) if on_gpu else 0

        rounds, start, end, before = 0, 0.0, False, (0, 0)
        while not end:
            for number, (case, given) in enumerate(zip(CASES, inputs, strict=True)):
                recv, handle = cases.dispatch(buffer, case, given)
                y = torch.ones(*recv.x.shape[:-1], case.hidden, dtype=torch.bfloat16, device=buffer.device)
                for call in (handle, cases.dispatch(buffer, case, given)[1]):
                    out = buffer.combine(y, call, weighted=case.recv_layout != "token_major")
                if len(first) <= number:
                    first.append(out.clone())
                elif not equal_bits(out, first[number]):
                    raise AssertionError(f"rank {rank}: {case} gave other sums in round {rounds}")
            rounds += 1
            if rounds == _WARM_ROUNDS:
                start, before = time.monotonic(), held()
            # All ranks stop in the same round.
            ended = rounds > _WARM_ROUNDS and time.monotonic() - start > seconds
            votes = torch.tensor([int(ended)], device=buffer.device)
            torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
            end = bool(votes.item())
        cases.sync(buffer)
        after = held()
    return rounds - _WARM_ROUNDS, after[0] - before[0], after[1] - before[1]


@targets(2)
@pytest.mark.timeout(300 + float(os.environ.get(SECONDS, 0)))
def test_soak(target: Target) -> None:
    seconds = float(os.environ.get(SECONDS, 5 if target.pool.device == "cuda" else 1))
    for rounds, process, device in target.pool.run_for(
        seconds + 120, _soak, target.pool.device, target.backend, seconds
    ):
        assert rounds > 0
        assert process < _GROWTH_BYTES, f"the process grew by {process} bytes in {rounds} rounds"
        assert device <= 0, f"tensors grew by {device} bytes in {rounds} rounds"
