"""Writes the measured tables of README.md and docs/*.md: `python tools/readme_table.py [FILE] [--check]`.

FILE holds JSON lines of `python -m qcomm bench dispatch --json FILE`, in the repository; its last run is taken. Without
FILE it is the file that the table links to, or else the only one in benchmarks/results/ with lines of that benchmark.
The table of docs/formats.md is that of the last run in benchmarks/results/quality-cpu.jsonl, where that file exists;
that of docs/accuracy.md that of benchmarks/results/accuracy-cpu.jsonl; the tables of docs/performance.md, and the
README's of the codec, that of benchmarks/results/codec-h200.jsonl; the table of docs/storage.md that of
benchmarks/results/storage-h200.jsonl; those of docs/training.md that of benchmarks/results/train-h100-x2.jsonl and
benchmarks/results/layer-h100-x4.jsonl; those of docs/scaling.md that of benchmarks/results/scaling*.jsonl and of
qcomm/scaling.json.
--check writes nothing and exits with 1 if a table is out of date, or is not there though there are results.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
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

ACCURACY_PAGE, ACCURACY_RESULTS = "docs/accuracy.md", f"{RESULTS}/accuracy-cpu.jsonl"
ACCURACY_BEGIN, ACCURACY_END = "<!-- bench:accuracy -->", "<!-- /bench:accuracy -->"
ACCURACY_RUN_KEYS = ("command", "commit", "machine", "geometry", "seed")

CODEC_PAGE, CODEC_RESULTS = "docs/performance.md", f"{RESULTS}/codec-h200.jsonl"
CODEC_BEGIN, CODEC_END = "<!-- bench:codec -->", "<!-- /bench:codec -->"
# Columns of the README's table of the codec, and their digits.
HEADLINE = (("p50_us", 1), ("gbs", 0), ("share", 3))
CHAINS = ("unfused chain", "compiled unfused chain")
CODEC_RUN_KEYS = ("command", "commit", "machine", "arch", "sizes", "iterations", "seed", "ceiling_gbs")

STORAGE_PAGE, STORAGE_RESULTS = "docs/storage.md", f"{RESULTS}/storage-h200.jsonl"
STORAGE_BEGIN, STORAGE_END = "<!-- bench:storage -->", "<!-- /bench:storage -->"
STORAGE_RUN_KEYS = ("command", "commit", "machine", "geometry", "iterations", "seed")

TRAINING_PAGE = "docs/training.md"
TRAINING_RESULTS, LAYER_RESULTS = f"{RESULTS}/train-h100-x2.jsonl", f"{RESULTS}/layer-h100-x4.jsonl"
TRAINING_MARKS = "<!-- bench:training -->", "<!-- /bench:training -->"
LAYER_MARKS = "<!-- bench:layer -->", "<!-- /bench:layer -->"

SCALING_PAGE, SCALING_FIT = "docs/scaling.md", "qcomm/scaling.json"
SCALING_RESULTS = (f"{RESULTS}/scaling.jsonl", f"{RESULTS}/scaling-skewed.jsonl")
SCALING_MARKS = "<!-- bench:scaling -->", "<!-- /bench:scaling -->"
SCALING_FIT_MARKS = "<!-- bench:scaling-fit -->", "<!-- /bench:scaling-fit -->"
SCALING_RUN_KEYS = ("command", "commit", "routing", "seed")

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
    return [line for line in lines if line.get("benchmark") == "dispatch"]


def short_commit(line: Mapping[str, Any]) -> str:
    if not line["commit"]:
        return "unknown"
    sha, *dirty = line["commit"].split("-")
    return "-".join((sha[:12], *dirty))


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
        "dispatch routes, and waits on the host for the counts, whose time is in its own; static routes and does",
        "not wait; replay has the route already.",
        f"Command: `{first['command']}`,",
        f"commit {short_commit(first)}. {LINK}{name}]({name}).",
    ]
    laid_out = "".join(f"| {' | '.join(row)} |\n" for row in table)
    return f"{laid_out}\n" + "".join(f"{line}\n" for line in about)


def quality_cell(line: Line) -> str:
    overflows = line["spread_overflows"]
    return f"{line['error_percent']:.3f}" + ("" if overflows is None else f" ({overflows})")


def render_quality(path: Path) -> str:
    """Returns the block of docs/formats.md: a row a conversion, a column a source, of the last run."""
    run = read_last_run(path, QUALITY_RUN_KEYS)
    last = run[-1]
    by_name = {(line["conversion"], line["source"]): line for line in run}
    sources = list(dict.fromkeys(line["source"] for line in run))
    table = [("conversion", *sources), ("---", *("---:" for _ in sources))]
    names = dict.fromkeys(line["conversion"] for line in run)
    table += [(name, *(quality_cell(by_name[name, source]) for source in sources)) for name in names]
    machine = last["machine"]
    about = (
        f"[{last['rows']}, {last['columns']}] each, seed {last['seed']}; {machine['devices']},",
        f"torch {machine['torch']}.",
        f"Command: `{last['command']}`,",
        f"commit {short_commit(last)}. All rows: [{QUALITY_RESULTS}](../{QUALITY_RESULTS}).",
    )
    return "".join(f"| {' | '.join(row)} |\n" for row in table) + "\n" + "".join(f"{line}\n" for line in about)


def render_accuracy(lines: list[Line]) -> str:
    """Returns the block of docs/accuracy.md: a row a wire, a column a source."""
    first, by_name = lines[0], {(line["wire"], line["source"]): line for line in lines}
    sources = list(dict.fromkeys(line["source"] for line in lines))
    bits = {line["wire"]: f"{line['bits_per_element']:.2f}" for line in lines}
    rows = [(wire, bits[wire], *(accuracy_cell(by_name[wire, source]) for source in sources)) for wire in bits]
    sizes, machine = first["geometry"], first["machine"]
    about = (
        "Error in percent, and in parentheses over that of the bf16 wire.",
        f"{sizes['tokens']} tokens of {sizes['hidden']}, top-{sizes['topk']} of {sizes['experts']} experts on "
        f"{sizes['ranks']} ranks, seed {first['seed']};",
        f"{machine['devices']}, torch {machine['torch']}.",
        f"Command: `{first['command']}`,",
        f"commit {short_commit(first)}. {LINK}{ACCURACY_RESULTS}](../{ACCURACY_RESULTS}).",
    )
    return markdown(("wire", "bits", *sources), 1, rows) + "\n" + "".join(f"{line}\n" for line in about)


def accuracy_cell(line: Line) -> str:
    return f"{line['error_percent']:.3f} ({line['bf16_ratio']:.1f}x)"


def read_last_run(path: Path, keys: Sequence[str]) -> list[Line]:
    """Returns the lines of the last run; `keys` tell one run from another."""
    lines: list[Line] = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [line for line in lines if all(line[key] == lines[-1][key] for key in keys)]


def of_row(lines: list[Line], *rows: str) -> list[Line]:
    return [line for line in lines if line["row"] in rows]


def number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def size_of(line: Line) -> str:
    return f"{line['rows']}x{line['columns']}"


def markdown(headers: Sequence[str], num_texts: int, rows: Sequence[Sequence[str]]) -> str:
    """Returns a table whose first columns are texts and the others numbers."""
    rule = ["---"] * num_texts + ["---:"] * (len(headers) - num_texts)
    return "".join(f"| {' | '.join(row)} |\n" for row in (headers, rule, *rows))


def codec_about(first: Line, up: str) -> str:
    machine = first["machine"]
    lines = (
        f"{machine['devices']}, torch {machine['torch']}; p50 of {first['iterations']} calls, L2 full of clean lines",
        f"before each. Ceiling: a copy of BF16 [16384, 7168], {first['ceiling_gbs']:.0f} GB/s read and written.",
        f"Command: `{first['command']}`,",
        f"commit {short_commit(first)}. {LINK}{CODEC_RESULTS}]({up}{CODEC_RESULTS}).",
    )
    return "".join(f"{line}\n" for line in lines)


def codec_times(timed: list[Line]) -> str:
    rows = [
        (
            line["kernel"],
            line["variant"],
            f"{(line['bytes_in'] + line['bytes_out']) / 1e6:.1f}",
            *(number(line[key], digits) for key, digits in (("p50_us", 1), ("p99_us", 1), ("gbs", 0), ("share", 3))),
            number(line["target"], 2),
        )
        for line in timed
    ]
    return markdown(("kernel", "variant", "MB", "p50 us", "p99 us", "GB/s", "of ceiling", "target"), 2, rows)


def codec_small_times(timed: list[Line], sizes: list[str]) -> str:
    at = {((line["kernel"], line["variant"]), size_of(line)): line for line in timed}
    names = dict.fromkeys(name for name, _ in at)
    rows = [(*name, *(number(at[name, size]["p50_us"], 1) for size in sizes)) for name in names]
    return markdown(("kernel", "variant", *sizes), 2, rows)


def codec_baselines(slower: list[Line]) -> str:
    rows = [
        (
            line["kernel"],
            size_of(line),
            line["baseline"] + (f" ({line['failed']})" if line["failed"] else ""),
            number(line["p50_us"], 1),
            number(line["speedup"], 2, "x"),
        )
        for line in slower
    ]
    return markdown(("kernel", "size", "baseline", "p50 us", "kernel is faster by"), 3, rows)


def codec_resources(taken: list[Line]) -> str:
    keys = ("registers", "spill_bytes", "shared_bytes")
    rows = [
        (line["kernel"], line["variant"], line["function"], *(number(line[key], 0) for key in keys)) for line in taken
    ]
    return markdown(("kernel", "variant", "function", "registers", "spill bytes", "shared bytes"), 3, rows)


def render_codec(lines: list[Line], drawing: Path) -> str:
    """Returns the block of docs/performance.md: the first size, the others, baselines, registers, the plot."""
    first, *others = lines[0]["sizes"]
    timed, slower, taken = (of_row(lines, *rows) for rows in (("copy", "kernel"), ("baseline",), ("resources",)))
    parts = [f"At {first}:\n", codec_times([line for line in timed if size_of(line) == first])]
    if others:
        parts += ["p50 in us at sizes where the launch weighs most:\n", codec_small_times(timed, others)]
    if slower:
        parts += ["Baselines:\n", codec_baselines(slower)]
    if taken:
        where = f"Registers per thread, and bytes spilled per thread and shared per block, on {lines[0]['arch']}:\n"
        parts += [where, codec_resources(taken)]
    if drawing.exists():
        parts.append(f"![Share of the ceiling by kernel and size](../{RESULTS}/{drawing.name})\n")
    return "\n".join([*parts, codec_about(lines[0], "../")])


def render_codec_headline(lines: list[Line]) -> str:
    """Returns the README's block: the kernels that have a target, and the chain that one of them replaces."""
    rows = [
        (line["kernel"], line["variant"], *(number(line[key], digits) for key, digits in HEADLINE))
        for line in of_row(lines, "kernel")
        if line["target"] is not None
    ]
    size = lines[0]["sizes"][0]
    parts = [markdown(("kernel", "variant", "p50 us", "GB/s", "of copy"), 2, rows)]
    faster = [
        f"{line['kernel']} takes 1/{line['speedup']:.1f} of the time of the {line['baseline']}.\n"
        for line in of_row(lines, "baseline")
        if line["baseline"] in CHAINS and line["speedup"] and size_of(line) == size
    ]
    return "\n".join([*parts, "".join([f"BF16 size {size}.\n", *faster, codec_about(lines[0], "")])])


def render_storage(lines: list[Line]) -> str:
    """Returns the block of docs/storage.md: a row a way of saving."""
    first = lines[0]
    rows = [
        (
            line["saving"],
            f"{line['held_bytes'] / 1e6:.1f}",
            f"{line['peak_bytes'] / 1e6:.1f}",
            f"{line['total_p50_ms']:.2f}",
            f"{line['dx_error_percent']:.3f}",
            f"{line['dw_error_percent']:.3f}",
        )
        for line in lines
    ]
    sizes, machine = first["geometry"], first["machine"]
    about = (
        f"BF16 [{sizes['batch']}, {sizes['tokens']}, {sizes['hidden']}], intermediate {sizes['intermediate']};",
        f"{machine['devices']}, torch {machine['torch']}; p50 of {first['iterations']} calls, forward and backward.",
        f"Command: `{first['command']}`,",
        f"commit {short_commit(first)}. {LINK}{STORAGE_RESULTS}](../{STORAGE_RESULTS}).",
    )
    headers = ("saving", "held MB", "peak MB", "ms", "dx error %", "dw error %")
    return markdown(headers, 1, rows) + "\n" + "".join(f"{line}\n" for line in about)


def render_training(path: Path) -> str:
    """Returns the block of docs/training.md with a row a run, and the curves."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    import plot_training

    runs = plot_training.read(path)
    against = plot_training.against_bf16(runs)
    rows = []
    for name, lines in runs.items():
        end = lines[-1]
        sizes = (f"{end[key] / 1e6:.0f}" for key in ("held_bytes", "peak_bytes"))
        above = number(against.same_seed.get(name), 2)
        rows.append((name, f"{end['held_out_loss']:.4f}", above, f"{end['step_ms']:.1f}", *sizes))
    firsts = [lines[0] for lines in runs.values()]
    first, settings = firsts[0], firsts[0]["settings"]
    above_bf16: dict[str, list[float]] = {}
    for name, value in against.same_seed.items():
        above_bf16.setdefault(runs[name][0]["preset"], []).append(value)
    means = [
        f"{preset} {sum(values) / len(values):+.2f} % ({len(values)} seed{'s' * (len(values) > 1)})"
        for preset, values in above_bf16.items()
        if preset != "bf16"
    ]
    about = [
        f"Above BF16 of the same seed, on average: {', '.join(means)}.",
        f"The seeds of BF16 are {number(against.spread, 2)} % apart.",
        f"{settings['steps']} steps of {settings['batch']} x {settings['length']} bytes;",
        f"{first['machine']['devices']} a run, torch {first['machine']['torch']}.",
        "Commands:",
        *(f"`{command}`," for command in dict.fromkeys(line["command"] for line in firsts)),
        f"commit {short_commit(first)}. {LINK}{TRAINING_RESULTS}](../{TRAINING_RESULTS}).",
        "",
        f"![Losses by step](../{Path(TRAINING_RESULTS).with_suffix('.svg').as_posix()})",
    ]
    headers = ("run", "held-out loss", "vs same seed %", "step ms", "held MB", "peak MB")
    return markdown(headers, 1, rows) + "\n" + "".join(f"{line}\n" for line in about)


def render_layer(path: Path) -> str:
    """Returns the block of docs/training.md with the times, products and memory of the layer."""
    lines: list[Line] = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    by_section: dict[str, list[Line]] = {}
    for line in lines:
        by_section.setdefault(line["section"], []).append(line)
    keys = ("forward_p50_us", "backward_p50_us", "total_p50_us", "total_host_us", "comm_total_p50_us")
    times = [
        (
            line["layer"],
            *(f"{line[key] / 1e3:.2f}" for key in keys),
            f"{100 * line['comm_share']:.0f} %",
            f"{line['nccl_ratio']:.2f}x",
        )
        for line in by_section["time"]
    ]
    products = [
        (
            *(line[key] for key in ("product", "operands", "backend")),
            "yes" if line["taken"] else "",
            f"{line['timing']['p50_us']:.0f}",
            f"{line['tflops']:.0f}",
        )
        for line in by_section["product"]
    ]
    memory = [
        (
            *(line[key] for key in ("keep", "recompute")),
            *(f"{line[key] / 1e6:.0f}" for key in ("held", "peak")),
            *(f"{line[key]:.3f}" for key in ("of_bf16", "of_fp8")),
        )
        for line in by_section["memory"]
    ]
    largest = [
        (line["keep"], f"{line['tokens']}", f"{line['tokens'] / by_section['largest'][0]['tokens']:.2f}x")
        for line in by_section["largest"]
    ]
    first, most = lines[0], by_section["largest"][0]
    sizes, machine = first["geometry"], first["machine"]
    parts = [
        markdown(("layer", "forward ms", "backward", "both", "host", "exchange", "its share", "vs NCCL"), 1, times),
        markdown(("product", "operands", "by", "taken", "us", "TFLOP/s"), 4, products),
        markdown(("keep", "recompute", "held MB", "peak MB", "held of bf16's", "of fp8's"), 2, memory),
        f'Most tokens a rank with which {most["stack"]} layers, `recompute="{most["recompute"]}"`, keep at most '
        f"{most['budget'] / 2**30:g} GiB:\n",
        markdown(("keep", "tokens", "of bf16's"), 1, largest),
        f"{sizes['tokens']} tokens a rank of {sizes['hidden']}, top-{sizes['topk']} of {sizes['experts']} experts of "
        f"{sizes['intermediate']}; {machine['devices']}, torch {machine['torch']}, NCCL {machine['nccl']}.\nCommands:\n"
        + "".join(f"`{command}`,\n" for command in dict.fromkeys(line["command"] for line in lines))
        + f"commit {', '.join(dict.fromkeys(map(short_commit, lines)))}. {LINK}{LAYER_RESULTS}](../{LAYER_RESULTS}).\n",
    ]
    return "\n".join(parts)


def by_nodes(lines: list[Line], keys: Sequence[str], value: Callable[[Line], str]) -> str:
    """Returns a table of a row a number of nodes; `keys` tell the columns apart, and name them."""
    cells = {(line["num_nodes"], tuple(line[key] for key in keys)): value(line) for line in lines}
    columns = list(dict.fromkeys(column for _, column in cells))
    rows = [(str(n), *(cells[n, column] for column in columns)) for n in dict.fromkeys(n for n, _ in cells)]
    return markdown(("nodes", *(" ".join(column) for column in columns)), 1, rows)


def render_scaling(repo: Path) -> str:
    """Returns the block of docs/scaling.md: bytes and times of each routing, memory, the plots."""
    parts, keys = [], ("form", "wire")
    for name in SCALING_RESULTS:
        lines = read_last_run(repo / name, SCALING_RUN_KEYS)
        first, drawing = lines[0], Path(name).with_suffix(".svg")
        sent = [line for line in lines if line["kind"] == "traffic"]
        parts.append(f"### {first['routing'].capitalize()} routing\n")
        parts.append("MB by RDMA into or out of the busiest GPU, one dispatch with its metadata:\n")
        parts.append(by_nodes([line for line in sent if line["op"] == "dispatch"], keys, busiest_mb))
        for op in ("dispatch", "combine"):
            parts.append(f"Expected time of {op}, us:\n")
            of_op = [line for line in sent if line["op"] == op]
            parts.append(by_nodes(of_op, keys, lambda line: f"{line['expected_us']:.0f}"))
        parts.append(f"![Expected time and bytes by nodes, {first['routing']} routing](../{drawing})\n")
        sizes = first["geometry"]
        parts.append(
            f"{first['gpus_per_node']} GPUs a node, {sizes['tokens']} tokens a rank of {sizes['hidden']}, "
            f"top-{sizes['topk']}; NVLink {first['nvlink_gbs']:g} GB/s,\nRDMA {first['rdma_gbs']:g} GB/s.\n"
            f"Command: `{first['command']}`,\n"
            f"commit {short_commit(first)}. {LINK}{name}](../{name}).\n"
        )
    held = [line for line in read_last_run(repo / SCALING_RESULTS[0], SCALING_RUN_KEYS) if line["kind"] == "memory"]
    parts.append("### Memory by nodes\n\nSymmetric GiB a rank, all four legs on one wire, or those of the paper:\n")
    parts.append(by_nodes(held, ("form", "precision"), lambda line: f"{line['symmetric_bytes'] / 2**30:.2f}"))
    return "\n".join(parts)


def busiest_mb(line: Line) -> str:
    return f"{max(line['rdma_out_bytes'], line['rdma_in_bytes']) / 1e6:.1f}"


def render_scaling_fit(path: Path) -> str:
    """Returns the block of docs/scaling.md that says what was fitted."""
    found = json.loads(path.read_text())["measured"]
    rows = [
        (op, f"{each['fixed_us']:.1f}", f"{each['memory_gbs']:.0f}", f"{100 * each['largest_error']:.1f}")
        for op, each in found["fits"].items()
    ]
    links = f"`nvlink_gbs` {found['nvlink_gbs']:g}, `nvlink_efficiency` {found['nvlink_efficiency']:g}"
    return (
        markdown(("operation", "`fixed` us", "`memory_gbs`", "largest error %"), 1, rows)
        + f"\n{links}; from {', '.join(found['devices'])}, commits "
        + f"{', '.join(commit[:12] for commit in found['commits'])}.\n"
    )


def put(page: Path, repo: Path, results: str, marks: tuple[str, str], wanted: str, check: bool) -> None:
    """Writes a block of a page, or exits if it is another."""
    before, block, after = split(page, *marks)
    if not check:
        page.write_text(before + wanted + after)
    elif wanted != block:
        name = page.relative_to(repo).as_posix()
        sys.exit(f"{name} must hold the table of {repo / results}; run python tools/readme_table.py")


def update_quality(repo: Path, check: bool) -> None:
    path = repo / QUALITY_RESULTS
    if path.exists():
        marks = QUALITY_BEGIN, QUALITY_END
        put(repo / QUALITY_PAGE, repo, QUALITY_RESULTS, marks, render_quality(path), check)


def update_accuracy(repo: Path, check: bool) -> None:
    path = repo / ACCURACY_RESULTS
    if path.exists():
        wanted = render_accuracy(read_last_run(path, ACCURACY_RUN_KEYS))
        put(repo / ACCURACY_PAGE, repo, ACCURACY_RESULTS, (ACCURACY_BEGIN, ACCURACY_END), wanted, check)


def update_codec(repo: Path, check: bool) -> None:
    path = repo / CODEC_RESULTS
    if path.exists():
        lines, marks = read_last_run(path, CODEC_RUN_KEYS), (CODEC_BEGIN, CODEC_END)
        put(repo / CODEC_PAGE, repo, CODEC_RESULTS, marks, render_codec(lines, path.with_suffix(".svg")), check)
        put(repo / "README.md", repo, CODEC_RESULTS, marks, render_codec_headline(lines), check)


def update_storage(repo: Path, check: bool) -> None:
    path = repo / STORAGE_RESULTS
    if path.exists():
        wanted = render_storage(read_last_run(path, STORAGE_RUN_KEYS))
        put(repo / STORAGE_PAGE, repo, STORAGE_RESULTS, (STORAGE_BEGIN, STORAGE_END), wanted, check)


def update_training(repo: Path, check: bool) -> None:
    if (repo / TRAINING_RESULTS).exists():
        wanted = render_training(repo / TRAINING_RESULTS)
        put(repo / TRAINING_PAGE, repo, TRAINING_RESULTS, TRAINING_MARKS, wanted, check)
    if (repo / LAYER_RESULTS).exists():
        put(repo / TRAINING_PAGE, repo, LAYER_RESULTS, LAYER_MARKS, render_layer(repo / LAYER_RESULTS), check)


def update_scaling(repo: Path, check: bool) -> None:
    if all((repo / name).exists() for name in SCALING_RESULTS):
        put(repo / SCALING_PAGE, repo, SCALING_RESULTS[0], SCALING_MARKS, render_scaling(repo), check)
        fitted = render_scaling_fit(repo / SCALING_FIT)
        put(repo / SCALING_PAGE, repo, SCALING_FIT, SCALING_FIT_MARKS, fitted, check)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repo", type=Path, default=REPO, help="where README.md is (default: this checkout)")
    given = parser.parse_args()
    repo = given.repo.resolve()
    update_quality(repo, given.check)
    update_accuracy(repo, given.check)
    update_codec(repo, given.check)
    update_storage(repo, given.check)
    update_training(repo, given.check)
    update_scaling(repo, given.check)
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
