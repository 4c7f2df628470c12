"""The launcher of ranks."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, RankPool


def _sum_of_ranks(rank: int, num_ranks: int, device: str) -> torch.Tensor:
    total = torch.tensor([rank, 1], device=device)
    dist.all_reduce(total)
    return total


def _raise_on(rank: int, num_ranks: int, bad: int) -> int:
    if rank == bad:
        raise ValueError(f"rank {rank} gives up")
    return os.getpid()


def _miss_a_collective(rank: int, num_ranks: int) -> None:
    if rank == 0:
        raise ValueError("left early")
    time.sleep(60)


def test_results_come_by_rank(pool3: RankPool) -> None:
    for total in pool3.run(_sum_of_ranks, "cpu"):
        assert total.tolist() == [3, 3]


@pytest.mark.gpu
def test_tensors_come_back_on_the_cpu(gpu_pool: RankPool) -> None:
    for total in gpu_pool.run(_sum_of_ranks, "cuda"):
        assert total.device.type == "cpu"
        assert int(total[1]) == gpu_pool.num_ranks


def test_a_failed_rank_serves_the_next_run(pool3: RankPool) -> None:
    before = pool3.run(_raise_on, -1)
    with pytest.raises(RankError, match=r"rank 1 of 3 failed(.|\n)*ValueError: rank 1 gives up"):
        pool3.run(_raise_on, 1)
    assert pool3.run(_raise_on, -1) == before


def test_a_pool_that_does_not_answer_starts_anew() -> None:
    pool = RankPool(2)
    try:
        before = pool.run(_raise_on, -1)
        with pytest.raises(RankError, match="left early"):
            pool.run_for(1.0, _miss_a_collective)
        after = pool.run(_raise_on, -1)
        assert not set(before) & set(after)
    finally:
        pool.close()
