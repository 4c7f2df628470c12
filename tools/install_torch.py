"""Installs torch into the environment that runs this script, the CPU build where there is no GPU.

On Linux the default torch wheel depends on gigabytes of NVIDIA libraries that the CPU path never loads.
So candidates are asked for their metadata first, and the first that needs none of those is installed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import gpu_count

# (what it is, pip options), the quickest to answer first.
CANDIDATES: list[tuple[str, list[str]]] = [
    ("a wheel that pip's find-links setting offers", ["--no-index"]),
    # Short timeout and no retry: where this index is blocked, that must not cost minutes.
    (
        "PyTorch's CPU index",
        ["--index-url", "https://download.pytorch.org/whl/cpu", "--timeout", "5", "--retries", "0"],
    ),
]


def torch_requirement() -> str:
    """Reads the torch requirement from pyproject.toml, its only home (tomllib needs Python 3.11)."""
    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    match = re.search(r'"(torch[<>=!~][^"]*)"', text)
    if match is None:
        raise SystemExit("pyproject.toml must name a torch requirement, got none")
    return match.group(1)


def pip(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", *args], check=True)


def resolve(requirement: str, options: list[str]) -> list[dict[str, Any]] | None:
    """Returns the metadata of what pip would install; None where it finds nothing.

    Dependencies are left out: they are large themselves, and the metadata already names them.
    """
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--no-deps", "--report", "-"]
    result = subprocess.run([*command, *options, requirement], capture_output=True, text=True)
    if result.returncode != 0:
        return None
    return [item["metadata"] for item in json.loads(result.stdout)["install"]]


def needs_cuda(metadata: dict[str, Any]) -> bool:
    """Environment markers are not evaluated: a wheel misjudged by that is only looked for elsewhere."""
    dependencies = metadata.get("requires_dist", [])
    return any(re.match("nvidia-|cuda-|triton", dependency) for dependency in dependencies)


def main() -> None:
    # pip 26.3 reads only a wheel's metadata in a dry run, where the index serves it apart from the wheel
    # (PEP 658); 23.2 to 25.0 download the wheel all the same, and 22.0 has no --report.
    pip("pip>=26.3")
    requirement = torch_requirement()
    if resolve(requirement, ["--no-index"]) == []:
        return
    if gpu_count():
        pip(requirement)
        return

    for name, options in CANDIDATES:
        found = resolve(requirement, options)
        if found and not needs_cuda(found[0]):
            print(f"torch {found[0]['version']} from {name}")
            # torch's dependencies come with qcomm's, from the usual index: these options may not reach it.
            pip("--no-deps", *options, f"torch=={found[0]['version']}")
            return
    # The default wheel is not tried in a dry run: it is what is left, whatever it needs.
    print("no CPU build of torch within reach: installing the default one, on Linux a large download")
    pip(requirement)


if __name__ == "__main__":
    main()
