"""Gathers text to train on from the machine: `python tools/gather_text.py OUT.bin [--root DIR ...] [--max-mb N]`.

Reads every text file under the roots, by default Python's standard library, the installed packages and /usr/share:
files of SUFFIXES or NAMES, UTF-8, of 256 bytes to 1 MB. Equal files count once. They are taken in the order of their
SHA-256, which mixes the sources and is the same every time, until --max-mb is reached.

OUT.bin holds the files' bytes, a NUL after each: first those to train on, then the held-out ones, every 20th file.
OUT.json is its manifest: bytes, where the held-out part starts, SHA-256 of OUT.bin, and each file's path, bytes and
SHA-256 in the order in which they stand.
"""

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = {".py", ".pyi", ".rst", ".md", ".txt", ".h", ".hpp", ".cuh", ".c", ".cpp", ".tex", ".html", ".pl", ".pm"}
NAMES = {"copyright", "README", "LICENSE", "NEWS", "AUTHORS", "GPL-2", "GPL-3", "Apache-2.0", "MPL-2.0"}
MIN_BYTES, MAX_BYTES = 256, 10**6
HELD_OUT_EVERY = 20
END = b"\0"


def default_roots() -> list[Path]:
    """Where a machine with Python has text."""
    return [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib")), Path("/usr/share")]


def texts(root: Path) -> Iterator[tuple[Path, bytes]]:
    """The text files below a folder, and what they hold; links are not followed."""
    for path in root.rglob("*"):
        if path.suffix not in SUFFIXES and path.name not in NAMES:
            continue
        try:
            if path.is_symlink() or not path.is_file() or not MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
                continue
            data = path.read_bytes()
            data.decode()
        except (OSError, UnicodeDecodeError):
            continue
        if END not in data:
            yield path, data


def gather(roots: Sequence[Path], max_bytes: int, out: Path) -> dict[str, object]:
    """Writes the text and its manifest; returns the manifest without its list of files."""
    found: dict[str, tuple[Path, int]] = {}
    for root in roots:
        for path, data in texts(root):
            digest = hashlib.sha256(data).hexdigest()
            # Which of two equal files is named must not hang on the order of a directory.
            found[digest] = min(found.get(digest, (path, len(data))), (path, len(data)))
    train: list[str] = []
    held_out: list[str] = []
    size = 0
    for number, digest in enumerate(sorted(found)):
        size += found[digest][1] + len(END)
        if size > max_bytes:
            break
        (held_out if number % HELD_OUT_EVERY == 0 else train).append(digest)
    if not train or not held_out:
        raise SystemExit(f"{[str(root) for root in roots]} must hold at least 2 text files, found {len(found)}")
    files, whole = [], hashlib.sha256()
    starts = {"train": 0, "held_out": 0}
    written = 0
    with out.open("wb") as file:
        for part, digests in (("train", train), ("held_out", held_out)):
            starts[part] = written
            for digest in digests:
                path, _ = found[digest]
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() != digest:
                    raise SystemExit(f"{path} changed while it was read")
                file.write(data + END)
                whole.update(data + END)
                written += len(data) + len(END)
                files.append({"path": str(path), "bytes": len(data), "sha256": digest})
    manifest: dict[str, object] = {
        "bytes": written,
        "held_out_start": starts["held_out"],
        "sha256": whole.hexdigest(),
        "num_files": len(files),
        "num_held_out_files": len(held_out),
        "roots": [str(root) for root in roots],
    }
    out.with_suffix(".json").write_text(json.dumps({**manifest, "files": files}, indent=1) + "\n")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.bin")
    parser.add_argument("--root", type=Path, action="append", metavar="DIR", help="repeatable; instead of the defaults")
    parser.add_argument("--max-mb", type=float, default=64, metavar="N", help="most text, in 10^6 bytes; default 64")
    given = parser.parse_args()
    if given.out.suffix == ".json":
        parser.error(f"OUT.bin must not end in .json, the manifest's suffix, got {given.out}")
    manifest = gather(given.root or default_roots(), int(given.max_mb * 10**6), given.out)
    print("\n".join(f"{name}: {value}" for name, value in manifest.items()))


if __name__ == "__main__":
    main()
