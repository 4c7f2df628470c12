"""Static steps captured in a CUDA graph, replayed with routes that change."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import pytest
import torch
from bit_patterns import equal_bits
from cases import BF16, Case
from ranks import Pools

from qcomm import (
    Buffer,
    QcommOverflowError,
)

CASE = Case(combine_wire=BF16, routes="random")
GRAPH_CAPACITY = 256
GRAPH_ROUTES = ("random", "some", "none", "half", "one", "same_rank")


class Step:
    """Dispatch, an expert and combine, on tensors whose contents change."""

    def __init__(self, rank: int, num_ranks: int, device: torch.device) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        given = cases.make_inputs(CASE, num_ranks)
        x = given.xs[rank]
        assert isinstance(x, torch.Tensor)
        assert given.topk_weights is not None
        self._x, self._idx = x.to(device), given.topk_idxs[rank].to(device)
        self._weights = given.topk_weights[rank].to(device)

    def take(self, case: Case) -> None:
        """Change the contents to those of a case."""
        given = cases.make_inputs(case, self._num_ranks)
        x = given.xs[self._rank]
        assert isinstance(x, torch.Tensor)
        assert given.topk_weights is not None
        self._x.copy_(x)
        self._idx.copy_(given.topk_idxs[self._rank])
        self._weights.copy_(given.topk_weights[self._rank])

    def run(self, buffer: Buffer, **options: Any) -> torch.Tensor:
        recv, handle = buffer.dispatch(
            self._x, self._idx, self._weights, recv_dtype="bf16", alignment=CASE.alignment, **options
        )
        return buffer.combine(recv.x * 3.0, handle)

    def capture(self, buffer: Buffer, capacity: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Capture a static step; what it launches must have run before."""
        self.run(buffer, static=True, num_max_recv_tokens=capacity)
        cases.sync(buffer)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may go on calling CUDA.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = self.run(buffer, static=True, num_max_recv_tokens=capacity)
        return graph, out


def _graph(rank: int, num_ranks: int) -> None:
    with (
        cases.make_buffer(CASE, num_ranks, "cuda", "nvlink") as buffer,
        cases.make_buffer(CASE, num_ranks, "cuda", "collective") as other,
    ):
        step = Step(rank, num_ranks, buffer.device)
        graph, out = step.capture(buffer, GRAPH_CAPACITY)
        for turn in range(20):
            routes: Any = GRAPH_ROUTES[turn % len(GRAPH_ROUTES)]
            step.take(dataclasses.replace(CASE, routes=routes, seed=100 + turn))
            out.fill_(torch.nan)
            for _ in range(50):
                graph.replay()
            cases.sync(buffer)
            got = out.clone()
            eager = step.run(buffer)
            cases.sync(buffer)
            want = step.run(other)
            assert equal_bits(got, eager), f"turn {turn}: the graph and an eager call differ"
            assert equal_bits(got, want), f"turn {turn}: the graph and the collective backend differ"
            assert (routes == "none") == (not got.any())
        torch.cuda.synchronize()
        del graph
        cases.works(buffer, CASE)


@pytest.mark.gpu
def test_a_static_step_in_a_graph(pools: Pools) -> None:
    pools.get(2, "cuda").run(_graph)


def _graph_overflow(rank: int, num_ranks: int) -> None:
    none, full = (dataclasses.replace(CASE, routes=routes) for routes in ("none", "random"))
    capacity = CASE.alignment
    with cases.make_buffer(CASE, num_ranks, "cuda", "nvlink") as buffer:
        step = Step(rank, num_ranks, buffer.device)
        step.take(none)
        graph, _ = step.capture(buffer, capacity)
        for _ in range(2):
            step.take(none)
            graph.replay()
            cases.sync(buffer)
            step.take(full)
            graph.replay()
            torch.cuda.synchronize()
            with pytest.raises(QcommOverflowError) as caught:
                buffer.check()
            needed = len(cases.expect_rows(full, cases.make_inputs(full, num_ranks))[rank].token_of_row)
            assert (caught.value.rank, caught.value.expected, caught.value.seen) == (rank, needed, capacity)
            buffer.check()
        del graph
        cases.works(buffer, CASE)


@pytest.mark.gpu
def test_an_overflow_in_a_graph_is_heard_of(pools: Pools) -> None:
    pools.get(2, "cuda").run(_graph_overflow)


# On the CPU: peers of the collective backend.
