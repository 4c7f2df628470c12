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
    staging_layout,
    symmetric_layout,
)

REPO = Path(__file__).resolve().parents[1]
PRECISIONS = {"": WirePrecision(), "paper": WirePrecision.paper(), "aggressive": WirePrecision.aggressive()}


def config(precision: WirePrecision, *, tokens: int = 4096, hidden: int = 7168) -> BufferConfig:
    return BufferConfig(256, 8, hidden, tokens, precision, "nvlink", "torch", "cuda")


def layout(precision: WirePrecision, *, ranks: int = 4, tokens: int = 4096) -> SymmetricLayout:
    return symmetric_layout(config(precision, tokens=tokens), ranks)


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
def test_staging_grows_with_nodes_and_tokens(precision: WirePrecision) -> None:
    assert staging_layout(config(precision), 1).num_bytes == 0
    for nodes, tokens in itertools.product((2, 8, 128), (1, 128, 4096)):
        made, flat = staging_layout(config(precision, tokens=tokens), nodes), layout(precision, tokens=tokens)
        slots = (nodes - 1) * tokens
        dispatch, combine = flat.dispatch_slot_bytes, flat.combine_slot_bytes
        exact = slots * (16 + dispatch + 2 * combine) + tokens * dispatch
        assert exact <= made.num_bytes < exact + len(made.sizes) * SYMMETRIC_ALIGNMENT
        assert next(iter(made.offsets.values())) == 0
        assert all(offset % SYMMETRIC_ALIGNMENT == 0 for offset in made.offsets.values())


def test_memory_grows_with_ranks_not_with_their_square() -> None:
    for nodes in (2, 4, 8, 16, 32):
        small, large = (layout(WirePrecision(), ranks=8 * count).num_bytes for count in (nodes, 2 * nodes))
        assert large == pytest.approx(2 * small, rel=1e-3)
        made = [staging_layout(config(WirePrecision()), nodes + more).num_bytes for more in range(3)]
        assert made[2] - made[1] == pytest.approx(made[1] - made[0], rel=1e-3)


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
