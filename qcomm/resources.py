"""Folders that ship with the package: inside it in a wheel, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

from qcomm.errors import QcommError

_PACKAGE = Path(__file__).resolve().parent


def find(name: str) -> Path:
    """Return the folder `name` of this installation: `qcomm/<name>`, or in a checkout `<name>` beside qcomm.

    Raises:
        QcommError: neither is there; names both.
    """
    places = (_PACKAGE / name, _PACKAGE.parent / name)
    # Without pyproject.toml beside it, the package stands in site-packages, where the name may be anyone's.
    candidates = places if checkout() else places[:1]
    for place in candidates:
        if place.is_dir():
            return place
    raise QcommError(
        f"the folder {name!r} must be at {places[0]} (wheel) or {places[1]} (checkout), found neither",
        phase="resources.find",
        expected=places,
    )


def checkout() -> Path | None:
    """Return the checkout this package runs from, None where it was installed from a wheel."""
    parent = _PACKAGE.parent
    return parent if (parent / "pyproject.toml").is_file() else None
