"""The layout of symmetric memory, and that the design states its size."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda, nvlink_buffer

from qcomm.config import BufferConfig
from qcomm.formats import WirePrecision
from qcomm.records import (
    SYMMETRIC_ALIGNMENT,
    MetadataLayout,
    RecordLayout,
    SymmetricLayout,
    nodes_layout,
    symmetric_layout,
)
from qcomm.topology import Topology

REPO = Path(__file__).resolve().parents[1]
PRECISIONS = {"": WirePrecision(), "paper": WirePrecision.paper(), "aggressive": WirePrecision.aggressive()}


def config(precision: WirePrecision, *, tokens: int = 4096, hidden: int = 7168) -> BufferConfig:
    return BufferConfig(256, 8, hidden, tokens, precision, "nvlink", "torch", "cuda")


def layout(precision: WirePrecision, *, ranks: int = 4, tokens: int = 4096) -> SymmetricLayout:
    return symmetric_layout(config(precision, tokens=tokens), ranks)


def across(nodes: int, *, forwards: bool, precision: WirePrecision, tokens: int = 4096) -> SymmetricLayout:
    shaped = config(precision, tokens=tokens)
    return symmetric_layout(shaped, 8 * nodes, nodes_layout(shaped, Topology(8 * nodes, 8), forwards=forwards))


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=["default", "paper", "aggressive"])
@pytest.mark.parametrize("tokens", [1, 128, 4096])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_parts_follow_each_other(ranks: int, tokens: int, precision: WirePrecision) -> None:
    made = layout(precision, ranks=ranks, tokens=tokens)
    assert list(made.offsets) == list(made.sizes)
    places = [(offset, offset + made.sizes[name]) for name, offset in made.offsets.items()]
    assert places[0][0] == 0
    for (_, end), (start, _) in itertools.pairwise(places):
        assert end <= start < end + SYMMETRIC_ALIGNMENT
        assert start % SYMMETRIC_ALIGNMENT == 0
    assert places[-1][1] <= made.num_bytes < places[-1][1] + SYMMETRIC_ALIGNMENT


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=["default", "paper", "aggressive"])
@pytest.mark.parametrize("tokens", [1024, 4096, 32768])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_little_beside_the_records(ranks: int, tokens: int, precision: WirePrecision) -> None:
    made = layout(precision, ranks=ranks, tokens=tokens)
    records = made.sizes["dispatch_records"] + made.sizes["combine_records"]
    assert records == ranks * tokens * (made.dispatch_slot_bytes + made.combine_slot_bytes)
    assert records < made.num_bytes < 1.02 * records
    # Of what it must hold, metadata, flags, counts and alignment are little.
    held = (
        ranks
        * tokens
        * sum(
            max(RecordLayout(precision.leg(op, backward).kind, 7168).num_bytes for backward in (False, True))
            for op in ("dispatch", "combine")
        )
    )
    assert made.num_bytes < 1.05 * held


def test_a_buffer_allocates_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {"num_experts": 4, "num_topk": 2, "hidden": 256, "num_max_tokens_per_rank": 64}
    with nvlink_buffer(monkeypatch, FakeCuda(), **shape) as (buffer, _):
        shaped = BufferConfig(**shape, precision=WirePrecision(), backend="nvlink", provider="torch", device_type="cpu")
        assert buffer.symmetric_bytes == symmetric_layout(shaped, 1).num_bytes > 0


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=["default", "paper", "aggressive"])
def test_other_nodes_take_memory(precision: WirePrecision) -> None:
    assert nodes_layout(config(precision), Topology(8, 8), forwards=False) is None
    for nodes, tokens in itertools.product((2, 8), (1, 128, 4096)):
        flat, by_node = (across(nodes, forwards=value, precision=precision, tokens=tokens) for value in (False, True))
        plain = layout(precision, ranks=8 * nodes, tokens=tokens)
        slots, relayed, ends = 8 * nodes * tokens, nodes * tokens, 2 * 8 * 8 * nodes
        dispatch, combine = plain.dispatch_slot_bytes, plain.combine_slot_bytes
        assert by_node.nodes is not None
        put = by_node.nodes.put_slot_bytes
        assert dispatch + 4 * 8 * nodes - 128 < put <= dispatch + 4 * 8 * nodes + 128
        # Flags of eight bytes, outboxes of both operations; inboxes and their flags where a rank forwards.
        for made, exact in (
            (flat, 8 * slots + tokens * dispatch + slots * combine),
            (by_node, 8 * slots + tokens * put + relayed * (16 + put + 2 * combine) + ends),
        ):
            more = made.num_bytes - plain.num_bytes
            assert abs(more - exact) < len(made.sizes) * SYMMETRIC_ALIGNMENT + 4 * 8 * nodes


def test_memory_grows_with_ranks_not_with_their_square() -> None:
    for nodes in (2, 4, 8, 16, 32):
        small, large = (layout(WirePrecision(), ranks=8 * count).num_bytes for count in (nodes, 2 * nodes))
        assert large == pytest.approx(2 * small, rel=1e-3)
        for forwards in (False, True):
            few, twice = (across(n, forwards=forwards, precision=WirePrecision()).num_bytes for n in (nodes, 2 * nodes))
            assert twice < 2.1 * few


def test_a_slot_of_a_source_is_its_own() -> None:
    made = layout(WirePrecision())
    slots = made.num_ranks * made.max_tokens
    words = MetadataLayout(8)
    assert words.num_words % 4 == 0
    assert words.num_words >= 1 + 3 * 8
    assert made.dispatch_slot_bytes >= 14336 + words.num_bytes
    # Twice, for even and odd calls; each with the number of its call.
    assert made.sizes["counts"] == 2 * made.num_ranks * 8 * (2 + made.num_local_experts)
    assert made.sizes["dispatch_flags"] == made.sizes["combine_flags"] == 4 * slots


def test_the_design_states_the_size() -> None:
    text = (REPO / "docs" / "design.md").read_text()
    for name, precision in PRECISIONS.items():
        made = layout(precision)
        call = f"WirePrecision.{name}()" if name else "WirePrecision()"
        (row,) = re.findall(rf"^\| `{re.escape(call)}` [^|]*\|(.*)\|$", text, re.MULTILINE)
        mib = f"{made.num_bytes / 2**20:.1f} MiB"
        want = [str(made.dispatch_slot_bytes), str(made.combine_slot_bytes), mib]
        assert [cell.strip() for cell in row.split("|")] == want
