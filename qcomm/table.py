"""Aligned plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows under headers, two spaces between columns.

    A column whose every cell starts like a number is right-aligned.

    Raises:
        ValueError: a row has another length than the headers.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"rows must have {len(headers)} cells like the headers, got {list(row)}")
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    numeric = [bool(rows) and all(_starts_like_number(row[column]) for row in rows) for column in range(len(headers))]

    def laid_out(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = ["-" * width for width in widths]
    return "\n".join(laid_out(cells) for cells in (lines[0], rule, *lines[1:]))


def _starts_like_number(cell: str) -> bool:
    return cell.lstrip("+-.")[:1].isdigit()
