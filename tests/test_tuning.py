"""The table of tunings: what it may hold, which row is taken, and how rows are put into it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qcomm import tuning
from qcomm.formats import WIRE_KINDS, WireKind
from qcomm.tuning import Op, Row, Table, Tuning

DISPATCH = Tuning(in_flight=2, flags_together=1, decode_tokens=256, num_sms=None)
COMBINE = Tuning(in_flight=8, flags_together=4, decode_tokens=256, num_sms=None)
EMPTY = Table({"dispatch": DISPATCH, "combine": COMBINE}, ())


def row(
    num_ranks: int,
    in_flight: int = 4,
    device: str = "A",
    op: Op = "dispatch",
    wire: WireKind = "mxfp4",
    source: str = "",
) -> Row:
    found = dataclasses.replace(DISPATCH, in_flight=in_flight)
    return Row(device=device, op=op, wire=wire, num_ranks=num_ranks, tuning=found, source=source)


@pytest.fixture
def table_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is in effect."""
    path = tmp_path / "table.json"
    monkeypatch.setenv(tuning.TABLE_VARIABLE, str(path))
    return path


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"in_flight": 0}, ValueError, "in_flight must be positive, got 0"),
        ({"in_flight": 17}, ValueError, "in_flight must be at most 16, got 17"),
        ({"in_flight": 2.0}, TypeError, "in_flight must be an int, got float"),
        ({"flags_together": 3}, ValueError, "flags_together must divide in_flight = 8, got 3"),
        ({"flags_together": 16}, ValueError, "flags_together must divide in_flight = 8, got 16"),
        ({"flags_together": 0}, ValueError, "flags_together must be positive, got 0"),
        ({"decode_tokens": -1}, ValueError, "decode_tokens must be positive, got -1"),
        ({"decode_tokens": None}, TypeError, "decode_tokens must be an int, got NoneType"),
        ({"num_sms": 0}, ValueError, "num_sms must be positive, got 0"),
    ],
)
def test_what_no_kernel_can_be_set_to(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(COMBINE, **changes)


def test_the_table_that_ships() -> None:
    shipped = tuning.read(tuning._SHIPPED)
    assert shipped.defaults == {
        "dispatch": dataclasses.replace(DISPATCH, in_flight=1, flags_together=1),
        "combine": dataclasses.replace(COMBINE, in_flight=2, flags_together=2),
    }
    # A row is of a run, which it names.
    assert all(found.source for found in shipped.rows)
    assert tuning._SHIPPED.read_text() == tuning.render(shipped)


def test_the_nearest_row() -> None:
    table = tuning.merge(
        EMPTY,
        [
            row(2, in_flight=1),
            row(4, in_flight=4),
            row(16, in_flight=16),
            row(8, in_flight=8, device="B"),
            row(8, in_flight=8, wire="fp8"),
            row(8, in_flight=8, op="combine"),
        ],
    )

    def chosen(num_ranks: int, device: str = "A", op: Op = "dispatch", wire: WireKind = "mxfp4") -> Tuning:
        return tuning.choose(table, device=device, op=op, wire=wire, num_ranks=num_ranks)

    found = {num_ranks: chosen(num_ranks).in_flight for num_ranks in (1, 2, 3, 4, 6, 7, 8, 9, 16)}
    # By ratio 3 is nearer to 4 than to 2; 8 is as near to 4 as to 16, and takes the row of fewer.
    assert found == {1: 1, 2: 1, 3: 4, 4: 4, 6: 4, 7: 4, 8: 4, 9: 16, 16: 16}
    assert chosen(4, device="B").in_flight == chosen(4, wire="fp8").in_flight == 8
    assert chosen(4, op="combine").in_flight == 8
    # Another device's row, or another wire's, is no better than the default.
    assert chosen(8, device="C") == chosen(8, wire="bf16") == DISPATCH
    assert chosen(8, op="combine", wire="fp8") == COMBINE


def test_merging() -> None:
    old, other = row(4, source="old"), row(2)
    table = tuning.merge(EMPTY, [old, other, row(4, op="combine"), row(4, wire="bf16"), row(1, device="0")])
    new = row(4, in_flight=1, source="new")
    merged = tuning.merge(table, [new])
    assert set(merged.rows) == set(table.rows) - {old} | {new}
    assert [found.key for found in merged.rows] == sorted(found.key for found in table.rows)
    assert merged.defaults == EMPTY.defaults
    assert tuning.merge(table, []) == table


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    rows = [row(4, source='2 x "GPU"'), row(2), row(8, op="combine")]
    few = dataclasses.replace(rows[0], num_ranks=3, tuning=dataclasses.replace(DISPATCH, num_sms=24))
    for table in (EMPTY, tuning.merge(EMPTY, [*rows, few])):
        path.write_text(tuning.render(table))
        assert tuning.read(path) == table
        assert tuning.render(tuning.read(path)) == path.read_text()
    # One line a row, so that a change of one shows as one.
    assert path.read_text().count('"device"') == sum('"device"' in line for line in path.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda found: found.pop("rows"),
            r"its top is wrong: it must be an object of defaults, rows, got \['defaults'\]",
        ),
        (lambda found: found["defaults"].pop("combine"), r"defaults is wrong: .*, got \['dispatch'\]"),
        (
            lambda found: found["defaults"]["combine"].update(in_flight=6),
            "defaults.combine is wrong: flags_together must",
        ),
        (lambda found: found["rows"][1].pop("num_sms"), r"rows\[1\] is wrong: it must be an object of"),
        (lambda found: found["rows"][0].update(note="?"), r"rows\[0\] is wrong: it must be an object of"),
        (lambda found: found["rows"][0].update(op="place"), r"rows\[0\] is wrong: op must be one of"),
        (lambda found: found["rows"][0].update(wire="fp4"), r"rows\[0\] is wrong: wire must be one of"),
        (
            lambda found: found["rows"][0].update(num_ranks="4"),
            r"rows\[0\] is wrong: num_ranks must be an int, got str",
        ),
        (lambda found: found.update(rows=None), "must be a table of tunings"),
    ],
)
def test_what_is_no_table(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    found = json.loads(tuning.render(tuning.merge(EMPTY, [row(2), row(4)])))
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message) as caught:
        tuning.read(path)
    assert str(path) in str(caught.value)


def test_no_json(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("rows: []")
    with pytest.raises(ValueError, match=r"table\.json must be a table of tunings, the file is wrong"):
        tuning.read(path)
    with pytest.raises(FileNotFoundError):
        tuning.read(tmp_path / "none.json")


def test_what_a_rank_takes(table_file: Path) -> None:
    few = dataclasses.replace(row(4), tuning=dataclasses.replace(DISPATCH, num_sms=64))
    table_file.write_text(tuning.render(tuning.merge(EMPTY, [few])))
    taken = tuning.choose_all("A", 132, 4, None)
    assert set(taken) == {(op, wire) for op in tuning.OPS for wire in WIRE_KINDS}
    assert taken["dispatch", "mxfp4"] == few.tuning
    assert taken["dispatch", "fp8"] == DISPATCH
    assert taken["combine", "mxfp4"] == COMBINE
    # What the caller of Buffer asks for goes before the table.
    assert {found.num_sms for found in tuning.choose_all("A", 132, 4, 132).values()} == {132}


@pytest.mark.parametrize(
    ("pair", "of", "num_sms", "want"),
    [
        ((1, 1), None, 24, (4, 2)),  # more than four times as many would hold each other up
        ((1, 1), None, 66, (2, 1)),
        ((1, 1), None, 67, (1, 1)),
        ((2, 2), None, 24, (8, 4)),
        ((8, 2), None, 24, (16, 2)),
        ((1, 1), 48, 24, (2, 1)),
        ((1, 1), 24, 48, (1, 1)),
        ((1, 1), None, 1000, (1, 1)),
    ],
)
def test_fewer_sms_have_more_under_way(
    pair: tuple[int, int], of: int | None, num_sms: int, want: tuple[int, int]
) -> None:
    usual = dataclasses.replace(DISPATCH, in_flight=pair[0], flags_together=pair[1], num_sms=of)
    in_flight, flags_together = want
    assert usual.on(num_sms, 132) == dataclasses.replace(
        usual, in_flight=in_flight, flags_together=flags_together, num_sms=num_sms
    )
    assert usual.on(None, 132) is usual


def test_fewer_sms_of_the_table_in_effect(table_file: Path) -> None:
    table_file.write_text(tuning.render(EMPTY))
    found = tuning.choose_all("A", 132, 4, 24)["dispatch", "mxfp4"]
    assert found == DISPATCH.on(24, 132) != DISPATCH
    # What is forced is taken as it is.
    with tuning.force(in_flight=4, num_sms=24):
        found = tuning.choose_all("A", 132, 4, None)["dispatch", "mxfp4"]
    assert found == dataclasses.replace(DISPATCH, in_flight=4, num_sms=24)
    with tuning.force(decode_tokens=0):
        found = tuning.choose_all("A", 132, 4, 24)["dispatch", "mxfp4"]
    assert found == dataclasses.replace(DISPATCH.on(24, 132), decode_tokens=0)
    with pytest.raises(ValueError, match="num_sms"), tuning.force(num_sms=0):
        tuning.choose_all("A", 132, 4, None)


def test_forcing(table_file: Path) -> None:
    table_file.write_text(tuning.render(EMPTY))
    usual = tuning.choose_all("A", 132, 4, None)
    with tuning.force(in_flight=16, flags_together=8):
        with tuning.force(in_flight=8, decode_tokens=0, num_sms=3):
            want = Tuning(in_flight=8, flags_together=8, decode_tokens=0, num_sms=3)
            assert set(tuning.choose_all("A", 132, 4, None).values()) == {want}
            assert {found.num_sms for found in tuning.choose_all("A", 132, 4, 5).values()} == {5}
        assert {found.in_flight for found in tuning.choose_all("A", 132, 4, None).values()} == {16}
        assert tuning.choose_all("A", 132, 4, None)["combine", "bf16"].decode_tokens == 256
    assert tuning.choose_all("A", 132, 4, None) == usual
    with pytest.raises(ValueError, match="flags_together must divide"), tuning.force(flags_together=3):
        tuning.choose_all("A", 132, 4, None)
    assert tuning.choose_all("A", 132, 4, None) == usual
