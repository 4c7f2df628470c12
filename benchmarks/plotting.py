"""What the plots share: their files, and that matplotlib need not be there."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

COLOURS = {"mxfp4": "#2a6f97", "fp8": "#e09f3e", "bf16": "#7a9e7e"}
"""Of the wires."""
_SUFFIXES = (".svg", ".png")


def drawing(text: str) -> Path:
    """Read the path of a drawing from the command line.

    Raises:
        argparse.ArgumentTypeError: it has another suffix.
    """
    path = Path(text)
    if path.suffix not in _SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in one of {_SUFFIXES}, got {text!r}")
    return path


def require() -> None:
    """Raise unless matplotlib, which is in the dev extra only, is there.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "drawing needs matplotlib, which is not installed (it is in qcomm's dev extra); the machine that measures "
            "can do without it: write --json FILE there and draw with --from FILE elsewhere"
        )


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure; the same figure gives the same SVG."""
    import matplotlib

    # Ids by hash rather than at random, and no date.
    with matplotlib.rc_context({"svg.hashsalt": "qcomm", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
