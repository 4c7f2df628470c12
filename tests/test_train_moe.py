"""The training example: it learns by every preset from the same start, and ranks change nothing but roundings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import REPO, mpirun, start
from ranks import Pools

from qcomm import Buffer, resources
from qcomm.formats import WirePrecision

sys.path.insert(0, str(REPO / "examples"))
sys.path.insert(0, str(resources.find("benchmarks")))

import plot_training
from moe_decoder import Decoder, DecoderConfig
from moe_optimizer import ExpertParallelAdamW, learning_rate
from moe_text import Text

SHAPE = {"hidden": 128, "layers": 3, "heads": 2, "experts": 4, "topk": 2, "intermediate": 128}
SIZES = [
    *(word for name, size in SHAPE.items() for word in (f"--{name}", str(size))),
    *("--dense-intermediate", "128", "--batch", "4", "--length", "32", "--warm-up", "2", "--rate", "1e-2"),
]


def write_text(path: Path) -> Path:
    """Lines of few kinds, to be learnt quickly."""
    generator = torch.Generator().manual_seed(0)
    words = ["import torch\n", "def forward(self, x):\n", "    return x + 1\n", "# a comment\n"]
    data = "".join(words[i] for i in torch.randint(len(words), (4000,), generator=generator).tolist()).encode()
    path.write_bytes(data)
    path.with_suffix(".json").write_text(json.dumps({"bytes": len(data), "held_out_start": len(data) * 9 // 10}))
    return path


@pytest.mark.mpi
def test_learns_by_every_preset(tmp_path: Path) -> None:
    text, path = write_text(tmp_path / "text.bin"), tmp_path / "train.jsonl"
    names = ["bf16:0", "bf16:1", "fp8:0", "paper:0", "aggressive:0"]
    options = ["--text", str(text), "--runs", ",".join(names), "--steps", "16", "--json", str(path)]
    schedule = ["--log-every", "4", "--held-out-every", "8", "--held-out-tokens", "1024"]
    command = [sys.executable, str(REPO / "examples" / "train_moe.py"), *options, *schedule, *SIZES]
    done = start(*mpirun(2), *command)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = plot_training.read(path)
    assert list(runs) == names
    first: dict[str, float] = {}
    for name, lines in runs.items():
        kinds = [line["kind"] for line in lines]
        assert kinds == ["run", "step", "step", "step", "held_out", "step", "step", "held_out", "end"]
        assert lines[0]["held_out_tokens"] == 1024
        assert lines[0]["settings"]["hidden"] == 128
        first[name] = lines[1]["loss"]
        # Near log(256) = 5.55 at first, and as low at the end by every preset.
        assert 5.4 < first[name] < 5.7
        assert lines[-1]["held_out_loss"] < 0.75 * first[name]
        assert lines[-1]["held_out_loss"] == lines[-2]["held_out_loss"]
    # Same weights, same batch: only roundings differ, by less than another seed's start does.
    spread = max(abs(first[name] / first["bf16:0"] - 1) for name in names if name.endswith(":0"))
    assert 0 < spread < 2e-3
    assert first["bf16:1"] != first["bf16:0"]
    against = plot_training.against_bf16(runs)
    assert max(abs(percent) for percent in against.same_seed.values()) < 10
    assert done.stdout.rstrip().endswith(f"spread of the bf16 runs: {against.spread:.3f} %")


def gradients(rank: int, num_ranks: int, ranks: int) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """Gradients of the same sequences on so many ranks, of shared weights and of experts, and their norm."""
    config = DecoderConfig(dense_intermediate=128, **SHAPE)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(256, (4, 33), generator=generator)
    mine = tokens.chunk(num_ranks)[rank]
    with Buffer(
        num_experts=config.experts,
        num_topk=config.topk,
        hidden=config.hidden,
        num_max_tokens_per_rank=128,
        precision=WirePrecision.bf16(),
        device="cpu",
    ) as buffer:
        model = Decoder(config, buffer, 32, keep="bf16", seed=2)
        optimizer = ExpertParallelAdamW(*model.split_parameters(), max_norm=1e9)
        logits = model(mine[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
        (loss / num_ranks).backward()
        norm = float(optimizer.gather_gradients())
        shared, experts = optimizer.gradients()
    return [grad.clone() for grad in shared], experts, norm


def test_two_ranks_have_the_gradients_of_one(pools: Pools) -> None:
    ((shared, experts, norm),) = pools.get(1).run(gradients, 1)
    parts = pools.get(2).run(gradients, 2)
    assert parts[0][2] == pytest.approx(norm, rel=2**-8)
    whole = torch.stack([*(each.square().sum() for each in shared), *(each.square().sum() for each in experts)])
    assert float(whole.sum().sqrt()) == pytest.approx(norm, rel=1e-4)
    for index, want in enumerate(shared):
        assert torch.equal(parts[0][0][index], parts[1][0][index])
        # Sums of two halves in BF16, which rounds each to 2^-9; what a router gets is a small difference.
        assert relative_error(parts[0][0][index], want) < 2**-5, index
    for index, want in enumerate(experts):
        assert relative_error(torch.cat([part[1][index] for part in parts]), want) < 2**-6, index


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def clipped(rank: int, num_ranks: int) -> None:
    shared = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    expert = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = ExpertParallelAdamW([shared], [expert], max_norm=0.5)
    shared.grad = torch.full_like(shared, 1.0 + rank)
    expert.grad = torch.full_like(expert, 2.0 * rank)
    # Shared: 3 each, 54 in squares; experts: 0 and 4 times 4.
    assert float(optimizer.gather_gradients()) == pytest.approx(70**0.5)
    (of_shared,), (of_expert,) = optimizer.gradients()
    assert of_shared.flatten().tolist() == pytest.approx([3 * 0.5 / 70**0.5] * 6, rel=1e-4)
    assert of_expert.flatten().tolist() == pytest.approx([2 * rank * 0.5 / 70**0.5] * 4, rel=1e-4)


def test_clips_by_the_norm_of_all_ranks(pools: Pools) -> None:
    pools.get(2).run(clipped)


def small_steps(rank: int, num_ranks: int) -> None:
    shared, expert = (torch.nn.Parameter(torch.ones(1, 4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = ExpertParallelAdamW([shared], [expert], weight_decay=0.0)
    for _ in range(16):
        shared.grad, expert.grad = torch.ones_like(shared), torch.ones_like(expert)
        # Adam moves by the rate where gradients don't change: 1/16 of BF16's step below 1, lost without a float32 copy.
        optimizer.step(2.0**-12)
    for weight in (shared, expert):
        assert weight.grad is None
        assert weight.flatten().tolist() == [1 - 2**-8] * 4


def test_small_steps_add_up(pools: Pools) -> None:
    pools.get(1).run(small_steps)


def test_learning_rate() -> None:
    rates = [learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(100, 100, 2.0, 10) == pytest.approx(0.2)


def test_text(tmp_path: Path) -> None:
    text = Text(write_text(tmp_path / "text.bin"), torch.device("cpu"))
    whole = list(text.batches(3, 4, 16, 7, 0, 1))
    halves = [list(text.batches(3, 4, 16, 7, rank, 2)) for rank in range(2)]
    for step, (tokens, following) in enumerate(whole):
        assert tokens.shape == following.shape == (4, 16)
        assert torch.equal(tokens[:, 1:], following[:, :-1])
        assert torch.equal(torch.cat([half[step][0] for half in halves]), tokens)
    assert not torch.equal(whole[0][0], next(iter(text.batches(3, 4, 16, 8, 0, 1)))[0])
    batches = text.held_out_batches(10**9, 4, 16, 0, 1)
    count = (text.held_out.numel() - 1) // 16 // 4 * 4
    assert sum(len(tokens) for tokens, _ in batches) == count
    # No byte twice: together they are the held-out text but for gaps between them.
    flat = torch.cat([tokens.flatten() for tokens, _ in batches])
    assert flat.numel() == 16 * count
    assert torch.equal(flat[:16], text.held_out[:16].long())
    with pytest.raises(ValueError, match="held-out text must have at least"):
        text.held_out_batches(10**9, 10**5, 16, 0, 1)
    (tmp_path / "text.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"must have .* bytes, its manifest's, got 5"):
        Text(tmp_path / "text.bin", torch.device("cpu"))


def line(kind: str, run: str, **values: Any) -> str:
    return json.dumps({"kind": kind, "run": run, **values}) + "\n"


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, lines = tmp_path / "train.jsonl", []
    about = {"machine": {"devices": "4 x NVIDIA H200"}, "num_ranks": 4, "parameters": 140_000_000, "commit": "abcdef"}
    for preset, seed, loss in (("bf16", 0, 9.0), ("bf16", 0, 1.0), ("bf16", 1, 1.01), ("paper", 0, 1.006)):
        run = f"{preset}:{seed}"
        lines.append(line("run", run, preset=preset, seed=seed, **about))
        lines += [line("step", run, step=step, loss=loss * 4 / step) for step in (1, 2, 4)]
        lines.append(line("held_out", run, step=4, held_out_loss=loss))
        lines.append(line("end", run, held_out_loss=loss, step_ms=40.0, held_bytes=5 * 10**6, peak_bytes=None))
    lines.append(line("run", "fp8:0", preset="fp8", seed=0, **about))
    path.write_text("".join(lines))
    against = plot_training.against_bf16(plot_training.read(path))
    assert against.spread == pytest.approx(100 * 0.01 / 1.005)
    assert against.mean["paper:0"] == pytest.approx(100 * (1.006 / 1.005 - 1))
    assert against.same_seed == pytest.approx({"bf16:0": 0.0, "bf16:1": 0.0, "paper:0": 0.6})
    assert plot_training.main([str(path)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:5]
    assert [row.split()[:4] for row in rows] == [
        ["bf16:0", "1.00000", "-0.498", "+0.000"],
        ["bf16:1", "1.01000", "+0.498", "+0.000"],
        ["paper:0", "1.00600", "+0.100", "+0.600"],
    ]
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        assert plot_training.main([str(path), "--plot", str(tmp_path / name)]) == 0
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    for label in ("paper:0 (+0.10 %)", "4 x NVIDIA H200, 4 ranks, 140 M parameters", "spread of the bf16 runs 1.00 %"):
        assert label in drawn
    path.write_text(line("run", "bf16:0", preset="bf16", seed=0))
    assert plot_training.main([str(path)]) == 2
    assert "must hold runs of train_moe.py that came to their end, got none" in capsys.readouterr().err
