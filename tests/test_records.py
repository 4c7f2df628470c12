"""The layout of symmetric memory, and that the design states its size."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Literal

import pytest

from qcomm.formats import WirePrecision
from qcomm.records import SYMMETRIC_ALIGNMENT, MetadataLayout, RecordLayout, SymmetricLayout, ValuesLayout

REPO = Path(__file__).resolve().parents[1]
PRECISIONS = {"": WirePrecision(), "paper": WirePrecision.paper(), "aggressive": WirePrecision.aggressive()}
OPS: dict[Literal["dispatch", "combine"], MetadataLayout | ValuesLayout] = {
    "dispatch": MetadataLayout(8),
    "combine": ValuesLayout(8),
}


def layout(precision: WirePrecision, *, ranks: int = 4, tokens: int = 4096, hidden: int = 7168) -> SymmetricLayout:
    largest = [
        max(RecordLayout(precision.leg(op, backward).kind, hidden).slot_bytes(words) for backward in (False, True))
        for op, words in OPS.items()
    ]
    return SymmetricLayout(ranks, 256 // ranks, tokens, *largest)


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
