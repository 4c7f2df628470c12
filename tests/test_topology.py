"""Which ranks share a node."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from cases import BF16, Case
from ranks import RankPool

from qcomm import QcommConfigError, QcommUnsupportedError, topology
from qcomm.topology import Place, Topology

CASE = Case(combine_wire=BF16, routes="random")


def test_numbering() -> None:
    nodes = Topology(6, 2)
    assert nodes.num_nodes == 3
    assert [nodes.node(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [nodes.local_index(rank) for rank in range(6)] == [0, 1, 0, 1, 0, 1]
    assert [nodes.rank(nodes.node(rank), nodes.local_index(rank)) for rank in range(6)] == list(range(6))
    assert (nodes.same_node(2, 3), nodes.same_node(1, 2)) == (True, False)


@pytest.mark.parametrize(
    ("hosts", "ranks_per_node", "note"),
    [
        ("a", 1, None),
        ("aaaa", 4, None),
        ("aabb", 2, "2 nodes of 2"),
        ("abc", 1, "3 nodes of 1"),
        ("aab", 1, "ranks 0, 1 on a, ranks 2 on b"),
        ("abab", 1, "ranks 0, 2 on a, ranks 1, 3 on b"),
        ("aabbaa", 1, "ranks 0, 1, 4, 5 on a, ranks 2, 3 on b"),
    ],
)
def test_nodes_are_hosts(hosts: str, ranks_per_node: int, note: str | None) -> None:
    found = topology.by_place([Place(f"{host} boot-id") for host in hosts])
    assert found.topology == Topology(len(hosts), ranks_per_node)
    assert found.note is None if note is None else note in str(found.note)


def test_hosts_of_one_name_are_several() -> None:
    assert topology.by_place([Place("a 1"), Place("a 2")]).topology == Topology(2, 1)


def test_parts_of_a_host_are_nodes() -> None:
    places = [Place("a", 0), Place("a", 0), Place("a", 1), Place("a", 1)]
    assert topology.by_place(places).topology == Topology(4, 2)
    assert "ranks 2 on a part 1" in str(topology.by_place(places[:3]).note)


def test_the_variable() -> None:
    assert topology.from_environ({}) is None
    assert topology.from_environ({topology.RANKS_PER_NODE_VARIABLE: "2"}) == 2
    for text in ("", "0", "-1", "two", "1.5"):
        with pytest.raises(ValueError, match=f"QCOMM_RANKS_PER_NODE must be a positive number, got {text!r}"):
            topology.from_environ({topology.RANKS_PER_NODE_VARIABLE: text})


def _buffers(rank: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(backend: str = "auto", **changes: Any) -> Any:
        return cases.make_buffer(CASE, num_ranks, "cpu", backend, **changes)

    with make() as buffer:
        assert buffer.topology == Topology(4, 4)
    with make("collective", ranks_per_node=2) as buffer:
        assert buffer.topology == Topology(4, 2)
        assert buffer.backend_reason == "asked for; 2 nodes of 2"
    with pytest.raises(ValueError, match="ranks_per_node must divide the 4 ranks, got 3"):
        make(ranks_per_node=3)
    with pytest.raises(TypeError, match="ranks_per_node must be an int, got str"):
        make(ranks_per_node="2")
    with pytest.raises(QcommConfigError, match=r"ranks_per_node must be the same.*rank 0: 4, rank 1: 2"):
        make(ranks_per_node=4 if rank == 0 else 2)
    with pytest.raises(QcommUnsupportedError, match="'nvlink' cannot run here"):
        make("nvlink", ranks_per_node=2)
    # As if ranks 2 and 3 were on another host.
    monkeypatch.setattr(topology, "host_id", lambda: f"host-{rank // 2} boot-id")
    with make() as buffer:
        assert buffer.topology == Topology(4, 2)
    names = r"got 4 with ranks 0, 1 on host-0, ranks 2, 3 on host-1"
    with pytest.raises(QcommConfigError, match=f"ranks_per_node must keep each node on one host, {names}"):
        make(ranks_per_node=4)


def _run_buffers(rank: int, num_ranks: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        _buffers(rank, num_ranks, monkeypatch)


def test_buffers(pool4: RankPool) -> None:
    pool4.run(_run_buffers)


def _environ(rank: int, num_ranks: int) -> None:
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 1, 2])]
    mine = groups[rank // 2]
    os.environ[topology.RANKS_PER_NODE_VARIABLE] = "2"
    try:
        with cases.make_buffer(CASE, num_ranks, "cpu", "auto") as buffer:
            assert buffer.topology == Topology(4, 2)
        # A group inside a virtual node is on one node; one that takes half of another has none of equal size.
        with cases.make_buffer(CASE, 2, "cpu", "auto", group=mine) as buffer:
            assert buffer.topology == Topology(2, 2)
        if rank < 3:
            with cases.make_buffer(CASE, 3, "cpu", "auto", group=groups[2]) as buffer:
                assert buffer.topology == Topology(3, 1)
                assert "every rank counts as a node" in buffer.backend_reason
        # The argument counts more.
        with cases.make_buffer(CASE, num_ranks, "cpu", "auto", ranks_per_node=1) as buffer:
            assert buffer.topology == Topology(4, 1)
        os.environ[topology.RANKS_PER_NODE_VARIABLE] = "1" if rank else "2"
        with pytest.raises(QcommConfigError, match="environ_ranks_per_node must be the same on every rank"):
            cases.make_buffer(CASE, num_ranks, "cpu", "auto")
    finally:
        del os.environ[topology.RANKS_PER_NODE_VARIABLE]
        for group in groups:
            if group != dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)


def _several_groups(rank: int, num_ranks: int) -> list[str]:
    """Exchange in two groups at once, each on two virtual nodes, and in the whole job between."""
    case = dataclasses.replace(CASE, routes="some")
    apart, mixed = ([dist.new_group(ranks) for ranks in layout] for layout in (APART, MIXED))
    problems = []
    everyone = cases.make_buffer(case, num_ranks, "cpu", "collective", ranks_per_node=4)
    for layout, groups in ((APART, apart), (MIXED, mixed)):
        mine = next(group for ranks, group in zip(layout, groups, strict=True) if rank in ranks)
        with cases.make_buffer(case, 4, "cpu", "collective", group=mine, ranks_per_node=2) as buffer:
            assert buffer.topology.relays
            for seed in range(3):
                problems += cases.run_case(buffer, dataclasses.replace(case, seed=seed))
            idx = torch.arange(3).repeat(4, 1)
            everyone.dispatch(torch.zeros(4, case.hidden, dtype=torch.bfloat16), idx)
            problems += cases.run_case(buffer, dataclasses.replace(case, static=True))
    everyone.destroy()
    return problems


APART, MIXED = ([0, 1, 2, 3], [4, 5, 6, 7]), ([0, 2, 4, 6], [1, 3, 5, 7])


def test_several_groups_smaller_than_the_job() -> None:
    pool = RankPool(8, "cpu")
    try:
        cases.no_problems(pool.run(_several_groups))
    finally:
        pool.close()


def test_the_variable_splits_hosts(pool4: RankPool) -> None:
    pool4.run(_environ)
