"""Fixtures: pools of ranks that live as long as the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import GPU_SIZES, NODE_GPUS, Pools, RankPool, Target


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture
def pool2(pools: Pools) -> RankPool:
    return pools.get(2)


@pytest.fixture
def pool3(pools: Pools) -> RankPool:
    return pools.get(3)


@pytest.fixture
def pool4(pools: Pools) -> RankPool:
    return pools.get(4)


@pytest.fixture(params=[pytest.param(size, id=f"gpu{size}", marks=pytest.mark.gpu) for size in GPU_SIZES])
def gpu_pool(pools: Pools, request: pytest.FixtureRequest) -> RankPool:
    return pools.get(request.param, "cuda")


@pytest.fixture
def target(pools: Pools, request: pytest.FixtureRequest) -> Target:
    device, num_ranks, backend, ranks_per_node = request.param
    num_gpus = NODE_GPUS if backend == "nvshmem" else num_ranks
    return Target(pools.get(num_ranks, device, num_gpus), backend, ranks_per_node)
