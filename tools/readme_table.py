"""Writes the measured tables of README.md and docs/formats.md: `python tools/readme_table.py [FILE] [--check]`.

FILE holds JSON lines of `python -m qcomm bench dispatch --json FILE`, in the repository; its last run is taken. Without
FILE it is the file that the table links to, or else the only one in benchmarks/results/ with lines of that benchmark.
The table of docs/formats.md is that of the last run in benchmarks/results/quality-cpu.jsonl, where that file exists.
--check writes nothing and exits with 1 if a table is out of date, or is not there though there are results.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
BEGIN, END = "<!-- bench:dispatch -->", "<!-- /bench:dispatch -->"
LINK = "All rows: ["
HEADERS = ("call", "wire", "layout", "p50 us", "physical GB/s", "vs NCCL BF16")
# What tells one run from another.
RUN_KEYS = ("command", "commit", "machine", "geometry", "num_ranks", "routing", "backend_reason", "ceiling_gbs")
WIRE = "mxfp4"

QUALITY_PAGE, QUALITY_RESULTS = "docs/formats.md", f"{RESULTS}/quality-cpu.jsonl"
QUALITY_BEGIN, QUALITY_END = "<!-- bench:quality -->", "<!-- /bench:quality -->"
QUALITY_RUN_KEYS = ("command", "commit", "machine", "rows", "columns", "seed")

Line = dict[str, Any]


def split(page: Path, begin_mark: str = BEGIN, end_mark: str = END) -> tuple[str, str, str]:
    """Returns what stands before the block, in it and after it; the markers belong to the outer parts."""
    before, begin, rest = page.read_text().partition(begin_mark + "\n")
    block, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise SystemExit(f"{page.name} must hold {begin_mark} and {end_mark}")
    return before + begin, block, end + after


def dispatch_lines(path: Path) -> list[Line]:
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [line for line in lines if line["benchmark"] == "dispatch"]


def find_results(block: str, repo: Path) -> Path | None:
    """Returns the file the block links to, or the only one there is; None where there is none."""
    if LINK in block:
        return repo / block.partition(LINK)[2].partition("]")[0]
    found = [path for path in sorted((repo / RESULTS).glob("*.jsonl")) if dispatch_lines(path)]
    if len(found) > 1:
        raise SystemExit(f"FILE must be given, there are {', '.join(path.name for path in found)}")
    return found[0] if found else None


def last_run(lines: list[Line]) -> list[Line]:
    """Returns the lines of the last run, the last of each configuration."""
    run = {key: lines[-1][key] for key in RUN_KEYS}
    rows: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        if {key: line[key] for key in RUN_KEYS} == run:
            rows[line["call"], line["wire"], line["layout"], line["recv_dtype"]] = line
    return list(rows.values())


def cells(line: Line) -> tuple[str, ...]:
    gbs, ratio = line["physical_gbs"], line["nccl_bf16_ratio"]
    numbers = (f"{line['p50_us']:.1f}", f"{gbs:.1f}", "-" if ratio is None else f"{ratio:.2f}x")
    return (line["call"], line["wire"], line["layout"], *numbers)


def render(path: Path, repo: Path) -> str:
    """Returns the block between the markers."""
    lines = dispatch_lines(path)
    if not lines:
        raise SystemExit(f"FILE must hold lines of `bench dispatch`, {path} has none")
    rows = [line for line in last_run(lines) if line["wire"] == WIRE or line["call"].startswith("nccl")]
    table = [HEADERS, ("---", "---", "---", "---:", "---:", "---:"), *map(cells, rows)]
    first, name = rows[0], path.resolve().relative_to(repo).as_posix()
    machine, sizes = first["machine"], first["geometry"]
    software = [f"torch {machine['torch']}"]
    software += [f"NCCL {machine['nccl']}"] if machine["nccl"] else []
    ceiling = first["ceiling_gbs"]
    setting = (
        f"{machine['devices']}, {', '.join(software)}, backend {first['backend']}; {first['num_ranks']} ranks, "
        f"{sizes['tokens']} tokens a rank of {sizes['hidden']}, top-{sizes['topk']} of {sizes['experts']} experts, "
        f"{first['routing']} routing."
    )
    about = [
        *textwrap.wrap(setting, 100),
        "p50: device time of the slowest rank." if machine["nccl"] else "p50: host time of the slowest rank.",
        "Physical: bytes of records sent to other ranks over p50"
        + (f" (peer stores alone: {ceiling:.0f} GB/s)." if ceiling else "."),
        "The baseline is all_to_all_single of tokens already packed by rank: one row a token and rank, which is",
        "what token_major delivers; for expert_major, one row a token and expert, it is nccl + expand.",
        "dispatch routes, and waits on the host for the counts; static routes and does not wait; replay has the",
        "route already.",
        f"Command: `{first['command']}`,",
        f"commit {first['commit'][:12] if first['commit'] else 'unknown'}. {LINK}{name}]({name}).",
    ]
    markdown = "".join(f"| {' | '.join(row)} |\n" for row in table)
    return f"{markdown}\n" + "".join(f"{line}\n" for line in about)


def quality_cell(line: Line) -> str:
    overflows = line["spread_overflows"]
    return f"{line['error_percent']:.3f}" + ("" if overflows is None else f" ({overflows})")


def render_quality(path: Path) -> str:
    """Returns the block of docs/formats.md: a row a conversion, a column a source, of the last run."""
    lines: list[Line] = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    last = lines[-1]
    run = [line for line in lines if all(line[key] == last[key] for key in QUALITY_RUN_KEYS)]
    by_name = {(line["conversion"], line["source"]): line for line in run}
    sources = list(dict.fromkeys(line["source"] for line in run))
    table = [("conversion", *sources), ("---", *("---:" for _ in sources))]
    names = dict.fromkeys(line["conversion"] for line in run)
    table += [(name, *(quality_cell(by_name[name, source]) for source in sources)) for name in names]
    machine, commit = last["machine"], last["commit"]
    about = (
        f"[{last['rows']}, {last['columns']}] each, seed {last['seed']}; {machine['devices']},",
        f"torch {machine['torch']}.",
        f"Command: `{last['command']}`,",
        f"commit {commit[:12] if commit else 'unknown'}. All rows: [{QUALITY_RESULTS}](../{QUALITY_RESULTS}).",
    )
    return "".join(f"| {' | '.join(row)} |\n" for row in table) + "\n" + "".join(f"{line}\n" for line in about)


def update_quality(repo: Path, check: bool) -> None:
    page, path = repo / QUALITY_PAGE, repo / QUALITY_RESULTS
    if not path.exists():
        return
    before, block, after = split(page, QUALITY_BEGIN, QUALITY_END)
    wanted = render_quality(path)
    if not check:
        page.write_text(before + wanted + after)
    elif wanted != block:
        sys.exit(f"{QUALITY_PAGE} must hold the table of {path}; run python tools/readme_table.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repo", type=Path, default=REPO, help="where README.md is (default: this checkout)")
    given = parser.parse_args()
    repo = given.repo.resolve()
    update_quality(repo, given.check)
    readme = repo / "README.md"
    before, block, after = split(readme)
    path = given.file or find_results(block, repo)
    if path is None:
        if not given.check:
            raise SystemExit(f"FILE must be given, {RESULTS}/ has no results of `bench dispatch`")
        return
    wanted = render(path, repo)
    if given.check:
        if wanted != block:
            sys.exit(f"README.md must hold the table of {path}; run python tools/readme_table.py {path}")
        return
    readme.write_text(before + wanted + after)


if __name__ == "__main__":
    main()
