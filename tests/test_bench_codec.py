"""The codec benchmark: what it measures, how it checks, its report and its plot; all but the timing without a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import need_gpus

import qcomm
from qcomm import jit, reference, reference_columnwise, reference_swiglu, resources
from qcomm.ops import codec, swiglu
from qcomm.ops.codec import Divisor
from qcomm.ops.comm import barrier_spec

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(resources.find("benchmarks")))

import bench_codec  # noqa: E402
import codec_baselines  # noqa: E402
import codec_entries  # noqa: E402
import codec_inputs  # noqa: E402
import codec_report  # noqa: E402
import codec_resources  # noqa: E402
import codec_swiglu  # noqa: E402
import harness  # noqa: E402
import plot_codec  # noqa: E402
from codec_entries import ENTRIES  # noqa: E402
from codec_inputs import Inputs, Name, Size  # noqa: E402
from codec_report import Line, Times  # noqa: E402

CPU = torch.device("cpu")
SIZE = Size(512, 1024)
ABOUT = {
    "benchmark": "codec",
    "command": "python -m qcomm bench codec",
    "commit": "0123456789abcdef",
    "machine": {"devices": "1 x NVIDIA H200", "platform": "Linux", "torch": "2.11.0", "cuda": "13.0"},
    "arch": "sm_90",
    "sizes": [],
    "iterations": 100,
    "seed": 0,
    "ceiling_gbs": 4000.0,
}
NAMED = {"row", "kernel", "variant"}
TIMED = NAMED | {"rows", "columns", "p50_us", "p99_us", "host_bound"}
KEYS = {
    "copy": TIMED | {"bytes_in", "bytes_out", "gbs", "share", "own_share", "target"},
    "kernel": TIMED | {"bytes_in", "bytes_out", "gbs", "share", "own_share", "target"},
    "baseline": TIMED | {"baseline", "speedup", "failed"},
    "resources": NAMED | {"function", "registers", "spill_bytes", "shared_bytes"},
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "mxfp4": 1 / 2 + 1 / 32, "fp8": 1 + 4 / 128, "packed": 1 + 4 / 512}
"""Of an element, as the benchmark's text and docs/performance.md have it."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small, and the cores are shared with other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def target_size(monkeypatch: pytest.MonkeyPatch) -> Size:
    """A size at which the targets hold that a CPU can do."""
    size = Size(256, 512)
    monkeypatch.setattr(codec_report, "TARGET_SIZE", size)
    monkeypatch.setattr(bench_codec, "TARGET_SIZE", size)
    return size


def entry(kernel: str, variant: str = "-") -> codec_inputs.Entry:
    (found,) = (entry for entry in ENTRIES if entry.name == (kernel, variant))
    return found


def fixed_timer(call: Callable[[], object]) -> Times:
    call()
    return Times(100.0, 120.0, False)


def lines_of(taken: tuple[int, int, int] = (32, 0, 1024), share: float = 0.95) -> list[Line]:
    """A run at two sizes, of made-up times."""
    size, small, ceiling = codec_report.TARGET_SIZE, Size(512, 7168), codec_report.Ceiling(4000.0, 1000.0)
    about = {**ABOUT, "sizes": [str(size), str(small)]}
    lines = []
    for name, (rows, columns) in itertools.product([Name("copy"), *(entry.name for entry in ENTRIES)], (size, small)):
        num_bytes = 4 * rows * columns
        case = Bytes(num_bytes // 2, num_bytes // 2)
        p50_us = num_bytes / 4e6 / (1 if name.kernel == "copy" else share)
        row = "copy" if name.kernel == "copy" else "kernel"
        times = Times(p50_us, 1.2 * p50_us, False)
        lines.append(codec_report.timed_line(row, name, Size(rows, columns), case, times, ceiling))  # type: ignore[arg-type]
    kernel = next(line for line in lines if line["kernel"] == codec_entries.COLUMNWISE.kernel)
    slow = Times(4 * kernel["p50_us"], 5 * kernel["p50_us"], True)
    lines.append(codec_report.baseline_line(kernel, codec_baselines.CHAIN, slow, None))
    lines.append(codec_report.baseline_line(kernel, codec_baselines.COMPILED_CHAIN, None, "TimeoutError: not done"))
    lines += (codec_report.resources_line(entry.name, "function", *taken) for entry in ENTRIES)
    return [{**about, **line} for line in lines]


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Stands for a case where only its bytes count."""

    bytes_in: int
    bytes_out: int


def start(*arguments: str, on_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(REPO), **({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    command = [sys.executable, "-m", "qcomm", "bench", "codec", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_names_are_distinct_and_targets_are_measured() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert set(codec_report.TARGETS) <= set(names)
    assert all(0.8 <= share <= 0.9 for share in codec_report.TARGETS.values())
    assert codec_baselines.CHAIN in codec_baselines.CHAINS
    assert codec_report.TARGET_SIZE == bench_codec.SIZES[0] == (16384, 7168)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry.name))
def test_bytes(entry: codec_inputs.Entry) -> None:
    """Each input once and each output once, by the formula, and by the tensors that a fresh call returns."""
    case = entry.make(Inputs(SIZE, CPU, 0))
    kernel, variant = entry.name
    elements = SIZE.rows * SIZE.columns
    want_in, want_out = expected_bytes(kernel, variant)
    assert case.bytes_in == want_in * elements + extra_bytes(kernel, variant, "in")
    assert case.bytes_out == want_out * elements + extra_bytes(kernel, variant, "out")


def expected_bytes(kernel: str, variant: str) -> tuple[float, float]:
    """Bytes read and written for an element of the size."""
    source, _, made = kernel.partition(" to ")
    if kernel == "fp8 transpose":
        return BYTES["fp8"], BYTES["fp8"]
    # An element of x; h and its gradient have half as many.
    if kernel == "swiglu forward":
        return BYTES["bf16"], BYTES["fp8"] / 2 + BYTES["mxfp4"]
    if kernel == "swiglu backward":
        return BYTES["bf16"] / 2 + BYTES["mxfp4"], BYTES["bf16"]
    made = "packed" if variant.startswith("packed") else made.removesuffix(" column-wise")
    return BYTES[source], BYTES[made]


def extra_bytes(kernel: str, variant: str, way: str) -> int:
    """Bytes that do not go with the elements: 33 offsets of groups; a weight and its gradient for each row."""
    if variant == "weights" and (way == "in" or kernel == "swiglu backward"):
        return 4 * SIZE.rows
    return 4 * 33 if way == "in" and "groups" in variant else 0


@pytest.mark.parametrize("rows", [128, 512, 4096, 16384])
def test_groups(rows: int) -> None:
    offsets = codec_inputs.uneven_groups(rows)
    reference_columnwise.check_group_offsets(offsets, rows, 128)
    assert offsets[-1] == rows
    assert len(offsets) == 33
    sizes = {b - a for a, b in itertools.pairwise(offsets)}
    assert len(sizes) >= {128: 2, 512: 2, 4096: 3, 16384: 8}[rows]


def test_inputs_depend_on_the_seed_alone() -> None:
    inputs = [Inputs(Size(128, 256), CPU, seed) for seed in (1, 1, 2)]
    x, same, other = (made.bf16 for made in inputs)
    assert torch.equal(x, same)
    assert not torch.equal(x, other)
    amax = x.float().unflatten(1, (-1, 32)).abs().amax(-1)
    assert amax.max() > 20 * amax.min()
    sf = inputs[0].fp8_any_scale.sf
    assert (torch.frexp(sf)[0] != 0.5).float().mean() > 0.9


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry.name))
def test_a_wrong_bit_is_found(entry: codec_inputs.Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is; the rows are checked in pieces that do not divide them."""
    monkeypatch.setattr(codec_inputs, "_CHUNK", 200)
    case = entry.make(Inputs(Size(256, 256), CPU, 3))
    assert case.problems() == []
    for name, output in case.outputs.items():
        flat = codec_inputs.stored_bytes(output).view(-1)
        for at in (0, flat.numel() // 2, flat.numel() - 1):
            # The top byte of a float; anything less may lie within the bound of an inexact one.
            where = at // output.element_size() * output.element_size() + output.element_size() - 1
            flat[where] ^= 0x40
            assert any(f": {name} has " in problem for problem in case.differences())
            flat[where] ^= 0x40
    silent = dataclasses.replace(case, call=lambda: None)
    assert len(silent.problems()) >= len(case.outputs)


def test_bounds_of_swiglu() -> None:
    """What lies just within them is right, and what lies past them is not."""
    inputs = Inputs(Size(128, 256), CPU, 4)
    exact = reference_swiglu.product(inputs.bf16)
    for error, right in ((0.9 * 2**-16, True), (-0.9 * 2**-16, True), (2.0**-6, False)):
        made = reference.quantize_fp8((exact.double() * (1 + error)).float())
        assert (codec_swiglu.h_differences("all", made.data, made.sf, exact) == []) is right
    made = reference.quantize_fp8(exact)
    half = torch.where(torch.arange(128)[:, None] == 5, made.sf / 2, made.sf)
    doubled = (made.data.float() * (made.sf / half)).clamp(-448, 448).to(torch.float8_e4m3fn)
    problems = codec_swiglu.h_differences("all", doubled, half, exact)
    assert "all: h_sf has 1 wrong entries of 128" in problems

    x = inputs.bf16
    bits = x.view(torch.int16)
    assert codec_swiglu.grad_differences("all", (bits + 1).view(torch.bfloat16), x) == []
    assert codec_swiglu.grad_differences("all", (bits - 1).view(torch.bfloat16), x) == []
    assert codec_swiglu.grad_differences("all", (bits + 2).view(torch.bfloat16), x) != []
    zero, tiny = torch.tensor([0, -0x8000], dtype=torch.int16), torch.tensor([-0x7FFF, 1], dtype=torch.int16)
    assert codec_swiglu.grad_differences("all", zero.view(torch.bfloat16), tiny.view(torch.bfloat16)) == []

    want, magnitudes = torch.ones(4), torch.full((4,), 2.0, dtype=torch.float64)
    assert codec_swiglu.weight_differences("all", want + 2.0**-16, want, magnitudes) == []
    assert codec_swiglu.weight_differences("all", want + 2.0**-14, want, magnitudes) == [
        "all: grad_weights has 4 wrong entries of 4"
    ]
    assert codec_swiglu.weight_differences("all", want * torch.nan, want, magnitudes) != []


def test_measures_everything(target_size: Size, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [target_size, Size(128, 256)]
    ceiling, lines = bench_codec.Bench(fixed_timer, CPU, 0, 0).measure(ENTRIES, sizes)
    assert ceiling == pytest.approx(4 * 256 * 512 / 100 / 1e3)
    kernels = [line for line in lines if line["row"] == "kernel"]
    assert [(line["kernel"], line["variant"], line["rows"]) for line in kernels] == [
        (*entry.name, size.rows) for size in sizes for entry in ENTRIES
    ]
    for line in lines:
        assert line.keys() == KEYS[line["row"]]
        if line["row"] == "kernel":
            assert line["gbs"] == pytest.approx((line["bytes_in"] + line["bytes_out"]) / 1e5)
            assert line["share"] == pytest.approx(line["gbs"] / ceiling)
            own = 4 * line["rows"] * line["columns"] / 1e5
            assert line["own_share"] == pytest.approx(line["gbs"] / own)
            name = Name(line["kernel"], line["variant"])
            assert line["target"] == (codec_report.TARGETS.get(name) if line["rows"] == 256 else None)
    copies = [line for line in lines if line["row"] == "copy"]
    assert [(line["rows"], line["own_share"]) for line in copies] == [(256, 1.0), (128, 1.0)]
    slower = [(line["kernel"], line["baseline"], line["rows"]) for line in lines if line["row"] == "baseline"]
    assert slower == [("mxfp4 to fp8 column-wise", codec_baselines.CHAIN, size.rows) for size in sizes]


def test_a_wrong_result_ends_the_run(target_size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    right = qcomm.dequantize

    def wrong(*args: Any, out: torch.Tensor, **options: Any) -> None:
        right(*args, out=out, **options)
        out[-1, -1] += 1

    monkeypatch.setattr(qcomm, "dequantize", wrong)
    timed: list[object] = []

    def timer(call: Callable[[], object]) -> Times:
        timed.append(call)
        return fixed_timer(call)

    picked = [entry("bf16 to mxfp4"), entry("mxfp4 to bf16"), entry("mxfp4 to fp32")]
    with pytest.raises(harness.MismatchError) as error:
        bench_codec.Bench(timer, CPU, 0, 0).measure(picked, [target_size])
    first, second = str(error.value).splitlines()
    assert first == "mxfp4 to bf16, 256x512, rows 0 to 256: out has 1 wrong entries of 262144"
    assert second.startswith("mxfp4 to fp32, 256x512, rows 0 to 256: out has ")
    # The copy and the quantization; what is wrong is not timed.
    assert len(timed) == 2


def test_baselines_do_the_work_of_the_kernels(target_size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    picked = [entry for entry in ENTRIES if entry.name in (*codec_baselines.ORACLES, codec_entries.COLUMNWISE)]
    _, lines = bench_codec.Bench(fixed_timer, CPU, 0, 60).measure(picked, [target_size, Size(128, 256)])
    slower = [line for line in lines if line["row"] == "baseline"]
    assert all(line["failed"] is None and line["speedup"] == 1.0 for line in slower)
    at_first = [line["baseline"] for line in slower if line["rows"] == target_size.rows]
    assert at_first == [codec_baselines.ORACLE] * 3 + [codec_baselines.CHAIN, codec_baselines.COMPILED_CHAIN]
    assert [line["baseline"] for line in slower if line["rows"] == 128] == [codec_baselines.CHAIN]


def test_the_chain_quantizes_as_the_oracle() -> None:
    x = Inputs(Size(256, 256), CPU, 5).bf16
    data, sf = codec_baselines.quantize_columns(x)
    want_data, want_sf = reference_columnwise.quantize_fp8_columnwise(x, [0, 256])
    assert torch.equal(data.view(torch.uint8).flatten(), want_data.view(torch.uint8))
    assert torch.equal(sf.t(), want_sf)


def test_a_baseline_that_fails_says_why(target_size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: broken)
    picked = [entry("mxfp4 to bf16")]
    _, lines = bench_codec.Bench(fixed_timer, CPU, 0, 60).measure(picked, [target_size])
    assert lines[-1]["failed"] == "RuntimeError: no compiler"
    assert lines[-1]["p50_us"] is None

    def wrong(qdata: torch.Tensor, sf: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(made + 1 for made in codec_baselines.dequantize(qdata, sf))

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: wrong)
    _, lines = bench_codec.Bench(fixed_timer, CPU, 0, 60).measure(picked, [target_size])
    assert lines[-1]["failed"] == "its result is not the kernel's"


def test_the_chain_must_give_the_same_values() -> None:
    inputs = Inputs(Size(256, 256), CPU, 0)
    case = entry(*codec_entries.COLUMNWISE).make(inputs)
    case.call()
    (chain,) = codec_baselines.baselines(codec_entries.COLUMNWISE, inputs, case, compiled=False)
    data, sf = chain.call()
    assert chain.agrees((data, sf))
    assert not chain.agrees((data, sf * torch.tensor(2.0)))
    case.outputs["sf"][-1, -1] *= 2
    assert not chain.agrees((data, sf))


def test_time_limit() -> None:
    with pytest.raises(TimeoutError, match=r"not done after 0\.05 s"), codec_baselines.time_limit(0.05):
        time.sleep(5)
    with codec_baselines.time_limit(0):
        time.sleep(0.01)


def test_clock_sleeps_longer_for_a_late_host(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def once(self: bench_codec.Clock, call: Callable[[], object], cycles: int) -> tuple[float, bool]:
        asked.append(cycles)
        return float(len(asked)), cycles < needed

    monkeypatch.setattr(bench_codec.Clock, "_once", once)
    clock = bench_codec.Clock(CPU, 4)
    short, middle, long = bench_codec._SLEEP_CYCLES
    each = bench_codec._WARM_UP + 4
    needed = middle
    assert clock.time(lambda: None) == Times(2 * each - 2, 2 * each, False)
    assert asked == [short] * each + [middle] * each
    asked.clear()
    needed = long + 1
    assert clock.time(lambda: None).host_bound
    assert asked == [short] * each + [middle] * each + [long] * each


def test_tables() -> None:
    lines = lines_of()
    text = codec_report.tables(lines)
    assert "1 x NVIDIA H200, torch 2.11.0, 100 iterations; ceiling (copy of BF16 16384x7168) 4000 GB/s" in text
    rows = [line.split() for line in text.splitlines()]
    (row,) = (row for row in rows if row[:6] == ["bf16", "to", "mxfp4", "stochastic", "16384x7168", "234.88"])
    assert row[-4:] == ["3800", "0.950", "3.800", "0.85"]
    (row,) = (row for row in rows if "chain" in row and "compiled" not in row)
    p50_us = 4 * 4 * 16384 * 7168 / 4e6 / 0.95
    assert row[6:] == ["16384x7168", "unfused", "chain", f"{p50_us:.1f}*", f"{1.25 * p50_us:.1f}", "4.00x"]
    assert "TimeoutError: not done" in text
    assert "the device waited for the host" in text
    num_targets = len(codec_report.TARGETS) + 1 + len(ENTRIES)
    assert text.endswith(f"{num_targets} of {num_targets} targets met")


def test_verdict_names_what_was_missed() -> None:
    verdict = codec_report.verdict(lines_of(share=0.87))
    assert [line for line in verdict if line.startswith("missed: bf16 to mxfp4")] == [
        "missed: bf16 to mxfp4 at 16384x7168: 0.870 of the ceiling, target 0.9"
    ]
    assert "missed: fp8 to mxfp4, float32 scales at 16384x7168: 0.870 of the ceiling, target 0.88" in verdict
    assert "missed: bf16 to mxfp4, stochastic spills 16 bytes" in codec_report.verdict(lines_of((255, 16, 0)))
    lines = lines_of()
    for line in lines:
        if line.get("baseline") == codec_baselines.CHAIN:
            line["speedup"] = 2.9
    assert any(line.endswith("2.900 x the unfused chain, target 3") for line in codec_report.verdict(lines))


def test_json_lines_hold_runs(tmp_path: Path) -> None:
    path = tmp_path / "codec.jsonl"
    older, lines = lines_of(share=0.5), lines_of()
    for line in older:
        line["commit"] = "older"
    path.write_text(codec_report.json_lines(older) + codec_report.json_lines(lines))
    assert codec_report.read_last_run(path) == lines
    for line in lines:
        assert line.keys() == KEYS[line["row"]] | set(codec_report.RUN_KEYS)
    path.write_text('{"benchmark": "quality"}\n')
    with pytest.raises(ValueError, match="must hold lines of `bench codec`, it has none"):
        codec_report.read_last_run(path)


def test_resources_are_those_of_what_a_call_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    monkeypatch.setenv(jit.CACHE_VARIABLE, str(tmp_path))
    made = SimpleNamespace(n_regs=40, n_spills=2, metadata=SimpleNamespace(shared=512))
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            grids.append(grid)
            return lambda x, *, num_warps: made

    def call() -> None:
        swiglu.kernels().swiglu_backward[(3,)](1, num_warps=4)
        swiglu.kernels().sum_rows[(5,)](1, num_warps=4)
        codec.launch(barrier_spec(), torch.empty(0), 1, Divisor.of(1))

    monkeypatch.setattr(swiglu, "kernels", lambda: SimpleNamespace(swiglu_backward=Kernel(), sum_rows=Kernel()))
    before = swiglu.kernels, codec.launch
    launcher = codec_inputs.Entry(Name("kernel"), lambda inputs: codec_inputs.Case(call, {}, {}, list))
    cuda, *triton = codec_resources.resources([launcher], Inputs(Size(128, 256), CPU, 0), "sm_90")
    assert all(line.keys() == KEYS["resources"] for line in (cuda, *triton))
    assert cuda["function"] == "barrier"
    assert 16 <= cuda["registers"] <= 255
    assert list(tmp_path.glob("barrier-sm_90-*.cubin"))
    assert [line["function"] for line in triton] == ["swiglu_backward", "sum_rows"]
    assert (triton[0]["registers"], triton[0]["spill_bytes"], triton[0]["shared_bytes"]) == (40, 8, 512)
    assert grids == [(3,), (5,)]
    assert (swiglu.kernels, codec.launch) == before


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plot(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"codec{suffix}"
    plot_codec.draw(lines_of(), path)
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    text = path.read_text()
    for entry in ENTRIES:
        assert str(entry.name) in text
    for label in ("16384x7168", "512x7168", "target at", "1 x NVIDIA H200", "4000 GB/s"):
        assert label in text
    again = tmp_path / "again.svg"
    plot_codec.draw(lines_of(), again)
    assert again.read_text() == text


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="drawing needs matplotlib"):
        plot_codec.draw(lines_of(), tmp_path / "codec.svg")


def test_sizes_and_selection() -> None:
    assert bench_codec.parse_sizes("128x256,16384x7168") == [(128, 256), (16384, 7168)]
    assert {entry.name.variant for entry in bench_codec.select("hadamard")} == {"hadamard", "quest, hadamard"}
    assert bench_codec.select(None) == list(ENTRIES)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_codec.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        sys.exit(bench_codec.main())
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "measuring needs a CUDA GPU, and torch finds none"),
        (["--sizes", "100x256"], "must have rows in multiples of 128 and columns of 256, got '100x256'"),
        (["--sizes", "128x128"], "columns of 256, got '128x128'"),
        (["--sizes", "0x256"], "rows in multiples of 128"),
        (["--sizes", "128"], "must be ROWSxCOLUMNS,..., got '128'"),
        (["--sizes", "128x256,128x256"], "must name each size once"),
        (["--iterations", "0"], "must be positive, got 0"),
        (["--only", "fp5"], "--only must be part of one of bf16 to mxfp4, "),
        (["--plot", "codec.pdf"], "must end in one of ('.svg', '.png'), got 'codec.pdf'"),
        (["--from", "none.jsonl"], "none.jsonl"),
        (["--from", "none.jsonl", "--json", "more.jsonl"], "--json is for a run"),
        (["--no-check"], "unrecognized arguments: --no-check"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, *arguments) == 2
    caught = capsys.readouterr()
    assert message in caught.err
    assert caught.out == ""


def test_shows_an_earlier_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, drawing = tmp_path / "codec.jsonl", tmp_path / "codec.svg"
    lines = lines_of()
    path.write_text(codec_report.json_lines(lines))
    done = start("--from", str(path), "--plot", str(drawing))
    assert done.returncode == 0, done.stderr
    assert done.stdout == codec_report.tables(lines) + "\n"
    assert drawing.read_text().startswith("<?xml")


def test_tables_of_the_documents(tmp_path: Path) -> None:
    """tools/readme_table.py writes both blocks from the last run, and tells when they are out of date."""
    before, after = "Before.\n<!-- bench:codec -->\n", "<!-- /bench:codec -->\nAfter.\n"
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "performance.md"
    results = tmp_path / "benchmarks" / "results" / "codec-h200.jsonl"
    for path in (page, results):
        path.parent.mkdir(parents=True)
    readme.write_text(f"<!-- bench:dispatch -->\n<!-- /bench:dispatch -->\n{before}{after}")
    page.write_text(f"{before}{after}")

    def check() -> subprocess.CompletedProcess[str]:
        return tool("--check")

    def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPO / "tools" / "readme_table.py"), "--repo", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert check().returncode == 0
    older, lines = lines_of(share=0.5), lines_of()
    for line in older:
        line["ceiling_gbs"] = 3999.0
    results.write_text(codec_report.json_lines(older) + codec_report.json_lines(lines))
    assert "docs/performance.md must hold the table of" in check().stderr
    # The codec's blocks are written, then the dispatch table has no results here.
    assert "FILE must be given" in tool().stderr
    assert check().returncode == 0

    text = page.read_text()
    assert text.startswith(before)
    assert text.endswith(after)
    p50_us = 4 * 16384 * 7168 / 4e6 / 0.95
    small_us = 4 * 512 * 7168 / 4e6 / 0.95
    for row in (
        f"| bf16 to mxfp4 | stochastic | 469.8 | {p50_us:.1f} | {1.2 * p50_us:.1f} | 3800 | 0.950 | 0.85 |",
        f"| copy | - | 469.8 | {0.95 * p50_us:.1f} | {0.95 * 1.2 * p50_us:.1f} | 4000 | 1.000 | - |",
        f"| bf16 to mxfp4 | stochastic | {small_us:.1f} |",
        f"| mxfp4 to fp8 column-wise | 16384x7168 | unfused chain | {4 * p50_us:.1f} | 4.00x |",
        "| mxfp4 to fp8 column-wise | 16384x7168 | compiled unfused chain (TimeoutError: not done) | - | - |",
        "| mxfp4 to bf16 | - | function | 32 | 0 | 1024 |",
    ):
        assert row in text.splitlines()
    for fact in ("1 x NVIDIA H200, torch 2.11.0", "4000 GB/s", "`python -m qcomm bench codec`", "commit 0123456789ab"):
        assert fact in text
        assert fact in readme.read_text()
    assert "codec-h200.svg" not in text
    headline = [line for line in readme.read_text().splitlines() if line.startswith("| ")]
    assert len(headline) == 2 + len(codec_report.TARGETS)
    assert f"| bf16 to mxfp4 | stochastic | {p50_us:.1f} | 3800 | 0.950 |" in headline
    assert "mxfp4 to fp8 column-wise takes 1/4.0 of the time of the unfused chain.\n" in readme.read_text()

    results.with_suffix(".svg").touch()
    assert check().returncode == 1
    tool()
    assert "](../benchmarks/results/codec-h200.svg)" in page.read_text()
    readme.write_text(readme.read_text().replace("0.950", "0.951"))
    assert "README.md must hold the table of" in check().stderr


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    need_gpus(1)
    path = tmp_path / "codec.jsonl"
    done = start("--sizes", "512x512,128x256", "--iterations", "5", "--no-compile", "--json", str(path), on_gpu=True)
    assert done.returncode == 0, done.stderr
    lines = read(path)
    assert all(line.keys() == KEYS[line["row"]] | set(codec_report.RUN_KEYS) for line in lines)
    kernels = [line for line in lines if line["row"] == "kernel"]
    assert len(kernels) == 2 * len(ENTRIES)
    assert all(0 < line["p50_us"] <= line["p99_us"] and not line["host_bound"] for line in kernels)
    assert {line["kernel"] for line in lines if line["row"] == "resources"} == {entry.name.kernel for entry in ENTRIES}


@pytest.mark.gpu
def test_clock_tells_a_call_that_waits_for_the_host() -> None:
    need_gpus(1)
    device = torch.device("cuda")
    clock = bench_codec.Clock(device, 5)
    x = torch.ones(2**20, device=device)
    assert not clock.time(lambda: x.add_(1)).host_bound
    assert clock.time(lambda: x.sum().item()).host_bound
