"""How the nvlink backend's kernels are set for a machine: a table that ships with the package, and the choice from it.

The table, tuning.json, has the defaults of each operation, and rows that `python -m qcomm tune` measured. A row is for
one device, operation, wire and number of ranks. It is taken on that device, for that operation and wire, and nowhere
else; of several, the one with the nearest number of ranks by ratio is, of two as near the one with fewer. Where there
is none, the operation's default is taken. $QCOMM_TUNING names a file to read in place of the table that ships.

A rank may be set otherwise than its peers: nothing that one rank's kernels expect of another's depends on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from qcomm import validate
from qcomm.formats import WIRE_KINDS, WireKind

Op = Literal["dispatch", "combine"]
OPS: tuple[Op, ...] = ("dispatch", "combine")
TABLE_VARIABLE = "QCOMM_TUNING"
MAX_IN_FLIGHT = 16
"""A sender keeps the flags of so many records in shared memory, beside the records."""
_MOST_TIMES = 4
"""Each of fewer SMs has at most so many times as much under way."""
_SHIPPED = Path(__file__).with_name("tuning.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the kernels of one operation are set; none of it changes a result.

    Attributes:
        in_flight: records of a sending warp whose copies may be under way.
        flags_together: records whose flags a sending warp raises behind one fence; divides in_flight.
        decode_tokens: most tokens of a rank for which one kernel does a whole call, because it takes less time to
            begin; 0 for none.
        num_sms: SMs that each kernel takes; None for all.

    Raises:
        ValueError, TypeError: a value that no kernel can be set to.
    """

    in_flight: int
    flags_together: int
    decode_tokens: int
    num_sms: int | None

    def __post_init__(self) -> None:
        validate.positive("in_flight", self.in_flight)
        if self.in_flight > MAX_IN_FLIGHT:
            raise ValueError(f"in_flight must be at most {MAX_IN_FLIGHT}, got {self.in_flight}")
        validate.positive("flags_together", self.flags_together)
        if self.in_flight % self.flags_together:
            raise ValueError(f"flags_together must divide in_flight = {self.in_flight}, got {self.flags_together}")
        if self.decode_tokens != 0:
            validate.positive("decode_tokens", self.decode_tokens)
        if self.num_sms is not None:
            validate.positive("num_sms", self.num_sms)

    def is_few(self, num_tokens: int) -> bool:
        """Tell whether one kernel does a call of so many tokens of a rank, perhaps of none."""
        return 0 < self.decode_tokens >= num_tokens

    def on(self, num_sms: int | None, device_sms: int) -> Tuning:
        """Return what suits so many of a device's SMs: the fewer send, the more each must have under way."""
        if num_sms is None:
            return self
        share, times = min(self.num_sms or device_sms, device_sms) // num_sms, 1
        while 2 * times <= min(share, _MOST_TIMES, MAX_IN_FLIGHT // self.in_flight):
            times *= 2
        in_flight, flags_together = times * self.in_flight, max(1, times // 2) * self.flags_together
        return dataclasses.replace(self, in_flight=in_flight, flags_together=flags_together, num_sms=num_sms)

    @property
    def constants(self) -> dict[str, int]:
        """What sending kernels are compiled with."""
        return {"in_flight": self.in_flight, "flags_together": self.flags_together}


Tunings = Mapping[tuple[Op, WireKind], Tuning]
"""What one rank takes, by operation and wire."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table.

    Attributes:
        device: name of the GPU, as torch gives it.
        op, wire, num_ranks: what was measured.
        tuning: the best there.
        source: the machine, command and commit of the measurement.
    """

    device: str
    op: Op
    wire: WireKind
    num_ranks: int
    tuning: Tuning
    source: str

    def __post_init__(self) -> None:
        validate.instance("device", self.device, str)
        validate.one_of("op", self.op, OPS)
        validate.one_of("wire", self.wire, WIRE_KINDS)
        validate.positive("num_ranks", self.num_ranks)
        validate.instance("source", self.source, str)

    @property
    def key(self) -> tuple[str, int, int, int]:
        """What there is one row of, in the order of a table."""
        return self.device, OPS.index(self.op), WIRE_KINDS.index(self.wire), self.num_ranks


@dataclasses.dataclass(frozen=True)
class Table:
    """Defaults, and rows in the order of their keys."""

    defaults: Mapping[Op, Tuning]
    rows: tuple[Row, ...]


def current_path() -> Path:
    """Return the table that is in effect: $QCOMM_TUNING, or the one that ships."""
    given = os.environ.get(TABLE_VARIABLE)
    return Path(given) if given else _SHIPPED


def current() -> Table:
    """Return the table that is in effect; it is read once.

    Raises:
        ValueError, OSError: as for `read`.
    """
    return _read_once(current_path())


def read(file: Path) -> Table:
    """Read a table.

    Raises:
        ValueError: it is none; names the file and what is wrong in it.
        OSError: it cannot be read.
    """
    where = "the file"
    try:
        found = json.loads(file.read_text())
        where = "its top"
        _exactly(found, ("defaults", "rows"))
        where = "defaults"
        _exactly(found["defaults"], OPS)
        defaults = {}
        for op in OPS:
            where = f"defaults.{op}"
            defaults[op] = _tuning(found["defaults"][op])
        rows = []
        for number, row in enumerate(found["rows"]):
            where = f"rows[{number}]"
            names = [field.name for field in dataclasses.fields(Row) if field.name != "tuning"]
            _exactly(row, (*names, *_SETTINGS))
            tuning = _tuning({name: row[name] for name in _SETTINGS})
            rows.append(Row(**{name: row[name] for name in names}, tuning=tuning))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} must be a table of tunings, {where} is wrong: {error}") from error
    return merge(Table(defaults, ()), rows)


def render(table: Table) -> str:
    """Return the text of a table, a line for each row."""
    defaults = ",\n".join(f"    {json.dumps(op)}: {json.dumps(dataclasses.asdict(table.defaults[op]))}" for op in OPS)
    rows = ",\n".join(f"    {json.dumps(_flat(row))}" for row in table.rows)
    return f'{{\n  "defaults": {{\n{defaults}\n  }},\n  "rows": [{f"{chr(10)}{rows}{chr(10)}  " if rows else ""}]\n}}\n'


def merge(table: Table, rows: Iterable[Row]) -> Table:
    """Return a table with these rows, each in place of one that it had for the same."""
    merged = {row.key: row for row in (*table.rows, *rows)}
    return Table(table.defaults, tuple(merged[key] for key in sorted(merged)))


def choose(table: Table, *, device: str, op: Op, wire: WireKind, num_ranks: int) -> Tuning:
    """Return the tuning of the nearest row, as the module says, or the default."""
    rows = [row for row in table.rows if (row.device, row.op, row.wire) == (device, op, wire)]
    if not rows:
        return table.defaults[op]

    def distance(row: Row) -> tuple[float, int]:
        return max(row.num_ranks, num_ranks) / min(row.num_ranks, num_ranks), row.num_ranks

    return min(rows, key=distance).tuning


def choose_all(device: str, device_sms: int, num_ranks: int, num_sms: int | None) -> Tunings:
    """Return what a rank takes of the table in effect; `num_sms`, where given, whatever that says of it."""
    forced = dict(_forced) if num_sms is None else {**_forced, "num_sms": num_sms}
    chosen = {}
    for op in OPS:
        for wire in WIRE_KINDS:
            found = choose(current(), device=device, op=op, wire=wire, num_ranks=num_ranks)
            given = _tuning({**dataclasses.asdict(found), **forced})
            if not forced.keys() & {"in_flight", "flags_together"}:
                given = dataclasses.replace(given, **found.on(given.num_sms, device_sms).constants)
            chosen[op, wire] = given
    return chosen


@contextlib.contextmanager
def force(**changes: int | None) -> Iterator[None]:
    """Set fields of `Tuning` for every buffer made inside, whatever the table says; for measurements and tests."""
    usual = dict(_forced)
    _forced.update(changes)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(usual)


_SETTINGS = tuple(field.name for field in dataclasses.fields(Tuning))
_forced: dict[str, int | None] = {}


@functools.cache
def _read_once(file: Path) -> Table:
    return read(file)


def _tuning(values: Mapping[str, Any]) -> Tuning:
    _exactly(values, _SETTINGS)
    return Tuning(**values)


def _flat(row: Row) -> dict[str, object]:
    """Return a row as a table holds it: its tuning between what was measured and where."""
    fields = dataclasses.asdict(row)
    tuning, source = fields.pop("tuning"), fields.pop("source")
    return {**fields, **tuning, "source": source}


def _exactly(value: object, names: Iterable[str]) -> None:
    """Require an object with these names and no others."""
    if not isinstance(value, dict) or set(value) != set(names):
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"it must be an object of {', '.join(names)}, got {got}")
