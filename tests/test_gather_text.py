"""The text to train on: which files it takes, in which order, and what its manifest says."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from commands import REPO

TOOL = REPO / "tools" / "gather_text.py"


def gather(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def folder(where: Path, names: range) -> Path:
    (where / "sub").mkdir(parents=True)
    for number in names:
        (where / ("sub" if number % 2 else ".") / f"file{number}.py").write_text(f"# {number} é\n" * (50 + number))
    return where


def test_gathers(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", range(45))
    left_out = {
        "twin.md": (root / "file4.py").read_bytes(),
        "short.py": b"x = 1\n",
        "latin.txt": b"\xe9" * 400,
        "binary.txt": b"ab\0c" * 400,
        "huge.py": b"x" * (10**6 + 1),
        "other.so": b"text " * 400,
    }
    for name, data in left_out.items():
        (root / name).write_bytes(data)
    (root / "link.py").symlink_to(root / "short.py")
    out = tmp_path / "text.bin"
    done = gather(out, "--root", str(root))
    assert done.returncode == 0, done.stderr
    data, manifest = out.read_bytes(), json.loads(out.with_suffix(".json").read_text())
    assert manifest["bytes"] == len(data)
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    assert (manifest["num_files"], manifest["num_held_out_files"]) == (45, 3)
    pieces = data.split(b"\0")
    assert pieces.pop() == b""
    assert [hashlib.sha256(piece).hexdigest() for piece in pieces] == [each["sha256"] for each in manifest["files"]]
    assert [len(piece) for piece in pieces] == [each["bytes"] for each in manifest["files"]]
    assert all(Path(each["path"]).read_bytes() == piece for each, piece in zip(manifest["files"], pieces, strict=True))
    # The first of every 20 in the order of digests is held out.
    digests = sorted(each["sha256"] for each in manifest["files"])
    held_out = data[manifest["held_out_start"] :].split(b"\0")[:-1]
    assert [hashlib.sha256(piece).hexdigest() for piece in held_out] == digests[::20]


def test_is_the_same_wherever_the_files_came_from_first(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", range(30)), folder(tmp_path / "two", range(20, 50))
    texts = []
    for name, roots in (("a", (one, two)), ("b", (two, one))):
        arguments = [word for root in roots for word in ("--root", str(root))]
        assert gather(tmp_path / f"{name}.bin", *arguments).returncode == 0
        texts.append(((tmp_path / f"{name}.bin").read_bytes(), json.loads((tmp_path / f"{name}.json").read_text())))
    assert texts[0][0] == texts[1][0]
    assert texts[0][1]["files"] == texts[1][1]["files"]
    assert texts[0][1]["num_files"] == 50


def test_stops_at_the_limit(tmp_path: Path) -> None:
    root, out = folder(tmp_path / "root", range(60)), tmp_path / "text.bin"
    assert gather(out, "--root", str(root), "--max-mb", "0.02").returncode == 0
    assert 0.018 * 10**6 < out.stat().st_size <= 0.02 * 10**6


def test_refuses(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = gather(tmp_path / "text.bin", "--root", str(tmp_path / "empty"))
    assert done.returncode == 1
    assert "must hold at least 2 text files, found 0" in done.stderr
    assert gather(tmp_path / "text.json").returncode == 2
