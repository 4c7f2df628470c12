"""README and docs: the code runs, links lead somewhere, the tree is there, the table is that of its results."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import REPO, mpirun, start

README = REPO / "README.md"
PAGES = [README, REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]
READMES = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL).findall(README.read_text())
TRAINING = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL).findall(
    (REPO / "docs" / "training.md").read_text()
)
TABLE_TOOL = REPO / "tools" / "readme_table.py"
RESULTS = REPO / "benchmarks" / "results"


def run(command: Sequence[str], code: int = 0) -> str:
    """Run a command on the CPU; returns what it printed."""
    done = start(*command)
    assert done.returncode == code, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def prose(page: Path) -> str:
    """A page without its fenced and indented blocks and code spans."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`|^ {4}.*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_has_an_example() -> None:
    assert READMES


@pytest.mark.parametrize("block", READMES, ids=[f"block{number}" for number in range(len(READMES))])
def test_readme_code(block: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(block)
    assert float(run([sys.executable, str(script)]).split()[-1]) < 0.2


def test_training_code(tmp_path: Path) -> None:
    (block,) = TRAINING
    script = tmp_path / "example.py"
    script.write_text(block)
    # The loss of an output of zeros is 1.
    lines = run([*mpirun(2), sys.executable, str(script)]).splitlines()
    losses = [float(line.split()[-1]) for line in lines if "loss" in line]
    assert len(losses) == 2
    assert max(losses) < 1.5


def check_example(lines: list[str], kib_sent: bool) -> None:
    rows = {line.split()[0]: line.split() for line in lines}
    assert list(rows) == ["bf16", "fp8", "mxfp4"]
    errors = [float(row[-1]) for row in rows.values()]
    assert errors[0] == 0
    assert 0 < errors[1] < 0.08 < errors[2] < 0.3
    assert all((float(row[5]) > 0) is kib_sent for row in rows.values())


def test_example() -> None:
    check_example(run([sys.executable, str(REPO / "examples/moe_layer.py")]).splitlines(), kib_sent=False)


@pytest.mark.mpi
def test_example_under_mpirun() -> None:
    out = run([*mpirun(2), sys.executable, str(REPO / "examples/moe_layer.py")])
    check_example([line for line in out.splitlines() if " bytes a token" in line], kib_sent=True)


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_overlap_example(num_ranks: int) -> None:
    lines = run([*mpirun(num_ranks), sys.executable, str(REPO / "examples/overlap.py")]).splitlines()
    want = [f"rank {rank}, collective: the same sums: True" for rank in range(num_ranks)]
    assert sorted(line for line in lines if "same sums" in line) == want


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.is_relative_to(REPO), f"{target} leads out of the repository"
        assert to.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(to), f"{target} has no such heading"


def test_tree() -> None:
    (tree,) = re.findall(r"^## Tree\n\n```text\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    names = [line.split()[0] for line in tree.splitlines()]
    assert len(names) > 10
    for name in names:
        assert any(REPO.glob(name.rstrip("/"))), f"{name} is not there"


@pytest.mark.parametrize("name", ["qcomm/", "kernels/", "docs/"])
def test_paths_in_design(name: str) -> None:
    """Every file the design names is there."""
    design = (REPO / "docs" / "design.md").read_text()
    for path in re.findall(rf"`({name}[\w./]*)`", design):
        assert (REPO / path).exists(), f"{path} is not there"


def test_table_is_that_of_its_results() -> None:
    if not any(RESULTS.glob("*.jsonl")):
        pytest.skip("no results in benchmarks/results")
    run([sys.executable, str(TABLE_TOOL), "--check"])


def bench_line(call: str, wire: str, layout: str, p50_us: float, **changed: object) -> str:
    line = {
        "benchmark": "dispatch",
        "command": "mpirun -n 2 python -m qcomm bench dispatch",
        "commit": "0123456789abcdef",
        "machine": {"devices": "2 x NVIDIA H200", "torch": "2.11.0", "cuda": "13.0", "nccl": "2.28.9"},
        "geometry": {"tokens": 4096, "hidden": 7168, "topk": 8, "experts": 256},
        "num_ranks": 2,
        "routing": "uniform",
        "backend": "nvlink",
        "backend_reason": "asked for",
        "ceiling_gbs": 354.4,
        "call": call,
        "wire": wire,
        "layout": layout,
        "recv_dtype": None,
        "p50_us": p50_us,
        "physical_gbs": 1000 / p50_us,
        "nccl_bf16_ratio": 200 / p50_us,
    }
    return json.dumps({**line, **changed}) + "\n"


def test_table_tool(tmp_path: Path) -> None:
    before, after = "# qcomm\n\n<!-- bench:dispatch -->\n", "<!-- /bench:dispatch -->\n\nMore.\n"
    readme = tmp_path / "README.md"
    readme.write_text(f"{before}placeholder\n{after}")
    tool = [sys.executable, str(TABLE_TOOL), "--repo", str(tmp_path)]
    run([*tool, "--check"])
    assert "FILE must be given" in run(tool, code=1)

    results = tmp_path / "benchmarks" / "results" / "h200.jsonl"
    results.parent.mkdir(parents=True)
    rows = [
        bench_line("dispatch", "mxfp4", "expert_major", 50, commit="older"),
        bench_line("nccl", "bf16", "-", 200),
        bench_line("dispatch", "mxfp4", "expert_major", 100),
        bench_line("dispatch", "fp8", "token_major", 90),
        bench_line("combine", "bf16", "expert_major", 80, benchmark="combine"),
    ]
    results.write_text("".join(rows))
    run([*tool, "--check"], code=1)
    run(tool)
    run([*tool, "--check"])
    text = readme.read_text()
    assert text.startswith(before)
    assert text.endswith(after)
    assert "placeholder" not in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[2:] == [
        "| nccl | bf16 | - | 200.0 | 5.0 | 1.00x |",
        "| dispatch | mxfp4 | expert_major | 100.0 | 10.0 | 2.00x |",
    ]
    for fact in ("2 x NVIDIA H200", "`mpirun -n 2 python -m qcomm bench dispatch`", "commit 0123456789ab", "354 GB/s"):
        assert fact in text

    results.write_text("".join(rows).replace("200", "201"))
    assert "README.md must hold the table" in run([*tool, "--check"], code=1)


def written_table(tmp_path: Path, page_name: str, block: str, results_name: str, rows: list[dict[str, object]]) -> str:
    """A page whose block is out of date, then written from these results; where no others are."""
    (tmp_path / "README.md").write_text("<!-- bench:dispatch -->\n<!-- /bench:dispatch -->\n")
    page = tmp_path / "docs" / page_name
    results = tmp_path / "benchmarks" / "results" / results_name
    page.parent.mkdir()
    results.parent.mkdir(parents=True)
    page.write_text(f"Before.\n<!-- bench:{block} -->\n<!-- /bench:{block} -->\nAfter.\n")
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tool = [sys.executable, str(TABLE_TOOL), "--repo", str(tmp_path)]
    assert f"docs/{page_name} must hold the table" in run([*tool, "--check"], code=1)
    # The dispatch table has no results here, which comes after.
    assert "FILE must be given" in run(tool, code=1)
    run([*tool, "--check"])
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    return text


def test_quality_table_tool(tmp_path: Path) -> None:
    about = {
        "benchmark": "quality",
        "command": "python -m qcomm bench quality",
        "commit": "0123456789abcdef",
        "machine": {"devices": "1 x x86_64 CPU", "torch": "2.11.0"},
        "rows": 128,
        "columns": 256,
        "seed": 0,
    }
    rows = [
        {**about, "source": source, "conversion": name, "error_percent": error, "spread_overflows": overflows}
        for source in ("gaussian", "outliers")
        for name, error, overflows in (("fp8", 0.07, None), ("mxfp4 to fp8, row", 0.0, 3))
    ]
    older = {**rows[0], "commit": "older", "error_percent": 5.0}
    text = written_table(tmp_path, "formats.md", "quality", "quality-cpu.jsonl", [older, *rows])
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        "| conversion | gaussian | outliers |",
        "| --- | ---: | ---: |",
        "| fp8 | 0.070 | 0.070 |",
        "| mxfp4 to fp8, row | 0.000 (3) | 0.000 (3) |",
    ]


def test_accuracy_table_tool(tmp_path: Path) -> None:
    about = {
        "benchmark": "accuracy",
        "command": "python -m qcomm bench accuracy",
        "commit": "0123456789abcdef",
        "machine": {"devices": "1 x x86_64 CPU", "torch": "2.11.0"},
        "geometry": {"tokens": 64, "hidden": 512, "topk": 4, "experts": 16, "ranks": 2},
        "seed": 7,
        "in_library": True,
    }
    rows: list[dict[str, object]] = [
        {**about, "source": source, "wire": wire, "bits_per_element": bits, "error_percent": error, "bf16_ratio": ratio}
        for source in ("gaussian", "outliers")
        for wire, bits, error, ratio in (("bf16", 16.0, 0.25, 1.0), ("mxfp4", 4.25, 11.2345, 44.938))
    ]
    older = {**rows[0], "commit": "older", "error_percent": 5.0}
    text = written_table(tmp_path, "accuracy.md", "accuracy", "accuracy-cpu.jsonl", [older, *rows])
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        "| wire | bits | gaussian | outliers |",
        "| --- | ---: | ---: | ---: |",
        "| bf16 | 16.00 | 0.250 (1.0x) | 0.250 (1.0x) |",
        "| mxfp4 | 4.25 | 11.235 (44.9x) | 11.235 (44.9x) |",
    ]
    for fact in ("64 tokens of 512, top-4 of 16 experts on 2 ranks, seed 7", "1 x x86_64 CPU", "commit 0123456789ab."):
        assert fact in text


def test_storage_table_tool(tmp_path: Path) -> None:
    plain = {
        "benchmark": "storage",
        "command": "python -m qcomm bench storage",
        "commit": "0123456789abcdef-dirty",
        "machine": {"devices": "1 x NVIDIA H200", "torch": "2.11.0"},
        "geometry": {"tokens": 4096, "batch": 2, "hidden": 512, "intermediate": 1024},
        "iterations": 20,
        "seed": 0,
        "saving": "plain",
        "held_bytes": 700_000_000,
        "peak_bytes": 900_000_000,
        "total_p50_ms": 10.0,
        "dx_error_percent": 0.0,
        "dw_error_percent": 0.0,
    }
    saved = {"saving": "mxfp4", "held_bytes": 200_000_000, "total_p50_ms": 12.5, "dw_error_percent": 2.25}
    rows = [{**plain, "commit": "older"}, plain, {**plain, **saved}]
    text = written_table(tmp_path, "storage.md", "storage", "storage-h200.jsonl", rows)
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        "| saving | held MB | peak MB | ms | dx error % | dw error % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| plain | 700.0 | 900.0 | 10.00 | 0.000 | 0.000 |",
        "| mxfp4 | 200.0 | 900.0 | 12.50 | 0.000 | 2.250 |",
    ]
    assert "commit 0123456789ab-dirty" in text


def test_training_table_tool(tmp_path: Path) -> None:
    about = {
        "command": "mpirun -n 2 python examples/train_moe.py",
        "commit": "0123456789abcdef",
        "machine": {"devices": "2 x NVIDIA H200", "torch": "2.11.0"},
        "settings": {"steps": 1200, "batch": 64, "length": 512},
        "parameters": 140_000_000,
    }
    rows: list[dict[str, object]] = []
    for preset, seed, loss in (
        ("bf16", 0, 0.8),
        ("bf16", 1, 0.9),
        ("paper", 0, 0.804),
        ("paper", 1, 0.9),
        ("fp8", 0, 1),
    ):
        run_name = f"{preset}:{seed}"
        end = {"held_out_loss": loss, "step_ms": 50.0, "held_bytes": 2e9, "peak_bytes": 3e9}
        rows.append({"kind": "run", "run": run_name, "preset": preset, "seed": seed, **about})
        rows.append({"kind": "end", "run": run_name, **end})
    text = written_table(tmp_path, "training.md", "training", "train-h100-x2.jsonl", rows)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[2] == "| bf16:0 | 0.8000 | 0.00 | 50.0 | 2000 | 3000 |"
    assert table[4] == "| paper:0 | 0.8040 | 0.50 | 50.0 | 2000 | 3000 |"
    for fact in ("paper +0.25 % (2 seeds), fp8 +25.00 % (1 seed)", "are 11.76 % apart", "2 x NVIDIA H200 a run"):
        assert fact in text


def test_layer_table_tool(tmp_path: Path) -> None:
    about = {
        "command": "mpirun -n 4 python -m qcomm bench layer",
        "commit": "0123456789abcdef",
        "machine": {"devices": "4 x NVIDIA H200", "torch": "2.11.0", "nccl": "2.28.9"},
        "geometry": {"tokens": 4096, "hidden": 7168, "topk": 8, "experts": 64, "intermediate": 2048},
        "recompute": "swiglu",
    }
    times = dict.fromkeys(("forward_p50_us", "backward_p50_us", "total_p50_us", "total_host_us"), 2500.0)
    time = {"section": "time", "layer": "paper", **times, "comm_total_p50_us": 500.0, "comm_share": 0.2}
    product = {"product": "mm", "operands": "fp8", "backend": "loop", "timing": {"p50_us": 90.4}, "tflops": 800.4}
    kept = {"section": "memory", "keep": "mxfp4", "held": 5e6, "peak": 7e6, "of_bf16": 0.266, "of_fp8": 0.5154}
    most = {"section": "largest", "stack": 16, "budget": 2**34}
    rows = [
        {**about, **time, "nccl_ratio": 1.5},
        {**about, "section": "product", **product, "taken": True},
        {**about, "section": "product", **product, "taken": False},
        {**about, **kept},
        {**about, **most, "keep": "bf16", "tokens": 1000},
        {**about, **most, "keep": "mxfp4", "tokens": 2100},
    ]
    text = written_table(tmp_path, "training.md", "layer", "layer-h100-x4.jsonl", rows)
    for row in (
        "| paper | 2.50 | 2.50 | 2.50 | 2.50 | 0.50 | 20 % | 1.50x |",
        "| mm | fp8 | loop | yes | 90 | 800 |",
        "| mm | fp8 | loop |  | 90 | 800 |",
        "| mxfp4 | swiglu | 5 | 7 | 0.266 | 0.515 |",
        "| mxfp4 | 2100 | 2.10x |",
    ):
        assert row in text.splitlines()
    for fact in ("16 layers", "16 GiB", "top-8 of 64 experts of 2048; 4 x NVIDIA H200", "commit 0123456789ab"):
        assert fact in text
