"""Train a small MoE decoder on bytes of real text with expert parallelism, by one or several presets in turn.

    python tools/gather_text.py text.bin
    mpirun -n 4 python examples/train_moe.py --text text.bin --json train.jsonl \
        --runs bf16:0,bf16:1,fp8:0,paper:0,aggressive:0 --steps 1200
    python benchmarks/plot_training.py train.jsonl --plot train.svg

A run is PRESET:SEED (benchmarks/presets.py). Runs of one seed have the same initial weights and the same batches,
whatever the preset and the number of ranks. Experts are spread over the ranks; everything else is data-parallel, its
gradients summed in float32. AdamW keeps float32 weights; the rate warms up and then falls by a cosine. Routers are
balanced by their biases, without an auxiliary loss.

The defaults: hidden 512, a dense block and 5 with 32 experts of 512, top-4, and a shared one, about 140 M parameters;
64 sequences of 512 bytes a step over all ranks; held-out loss over 2^20 bytes.

JSON lines, `kind`: "run" says what runs where. "step" has the mean loss since the last such line, the wall-clock time
of a step in between (held-out passes are left out), tokens/s of all ranks, and of the step itself memory of the rank
with most: `held_bytes` between forward and backward and `peak_bytes` at most, each less what was allocated before the
step (weights, optimizer, text), and `allocated_peak_bytes` in all; null without CUDA. "held_out" has the held-out loss
after a step, "end" the last one, the median step and the last step's memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from moe_decoder import Decoder, DecoderConfig
from moe_optimizer import ExpertParallelAdamW, learning_rate
from moe_text import Text
from torch.nn import functional as F

from qcomm import Buffer, resources
from qcomm.bootstrap import Launch, process_group
from qcomm.config import Member
from qcomm.formats import FP8_GROUP_SIZE

sys.path.insert(0, str(resources.find("benchmarks")))

import harness
import layer_products
import plot_training
from presets import PRESETS

Batch = tuple[torch.Tensor, torch.Tensor]


class Memory:
    """What the allocator counts in a step, above what was there before it; nothing without CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._before = self._held = 0
        self._measures = False

    def start(self, measures: bool) -> None:
        """Begin a step; the counters are read in those that are logged only, for reading them takes host time."""
        self._measures = measures and self._device is not None
        if self._measures:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def after_forward(self) -> None:
        if self._measures:
            self._held = torch.cuda.memory_allocated(self._device) - self._before

    def figures(self, member: Member) -> dict[str, int | None]:
        """Return the largest of the ranks. Collective."""
        names = ("held_bytes", "peak_bytes", "allocated_peak_bytes")
        if self._device is None:
            return dict.fromkeys(names)
        peak = torch.cuda.max_memory_allocated(self._device)
        ranks = harness.gather(member, (self._held, peak - self._before, peak))
        return dict(zip(names, map(max, zip(*ranks, strict=True)), strict=True))


class Trainer:
    """One run: a model, its optimizer and what of a step is written down. Collective throughout."""

    def __init__(self, given: argparse.Namespace, member: Member, buffer: Buffer, preset: str, seed: int) -> None:
        self._given, self._member, self._seed = given, member, seed
        rows = None
        if given.capacity is not None:
            mean = given.batch * given.length * given.topk / member.num_ranks
            rows = math.ceil(given.capacity * mean / FP8_GROUP_SIZE) * FP8_GROUP_SIZE
        self.model = Decoder(
            decoder_config(given),
            buffer,
            given.length,
            keep=PRESETS[preset].keep,
            recompute=given.recompute,
            num_max_recv_tokens=rows,
            seed=seed,
        )
        self.optimizer = ExpertParallelAdamW(*self.model.split_parameters())
        self.memory = Memory(member.device)

    def num_parameters(self) -> int:
        """Count the parameters of all ranks together."""
        shared, experts = self.model.split_parameters()
        count = sum(weight.numel() for weight in shared)
        return count + self._member.num_ranks * sum(weight.numel() for weight in experts)

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """Return the mean loss of this rank's sequences."""
        tokens, following = batch
        return F.cross_entropy(self.model(tokens, seed=step).flatten(0, 1), following.flatten())

    def step(self, batch: Batch, step: int) -> torch.Tensor:
        """Take a step; returns this rank's loss before it."""
        given = self._given
        loss = self.loss(batch, step)
        self.memory.after_forward()
        # A rank's part of the mean over all ranks' tokens.
        (loss / self._member.num_ranks).backward()
        self.optimizer.step(learning_rate(step - 1, given.steps, given.rate, given.warm_up))
        self.model.balance(given.balance)
        return loss.detach()

    @torch.no_grad()
    def held_out(self, batches: list[Batch]) -> float:
        """Return the mean loss of all ranks' held-out batches."""
        total = torch.zeros((), dtype=torch.float64, device=self._member.device)
        for batch in batches:
            total += self.loss(batch, 0)
        dist.all_reduce(total)
        return float(total) / len(batches) / self._member.num_ranks


def train(given: argparse.Namespace, member: Member, text: Text, preset: str, seed: int, write: Writer) -> None:
    """Do one run. Collective."""
    device, num_ranks = member.device, member.num_ranks
    batches = text.batches(given.steps, given.batch, given.length, seed, member.rank, num_ranks)
    held_out = text.held_out_batches(given.held_out_tokens, given.batch, given.length, member.rank, num_ranks)
    tokens = given.batch * given.length
    with Buffer(
        num_experts=given.experts,
        num_topk=given.topk,
        hidden=given.hidden,
        num_max_tokens_per_rank=tokens // num_ranks,
        precision=PRESETS[preset].precision,
        device=device,
    ) as buffer:
        trainer = Trainer(given, member, buffer, preset, seed)
        write(
            "run",
            backend=buffer.backend,
            parameters=trainer.num_parameters(),
            products=layer_products.in_use(device),
            held_out_tokens=len(held_out) * tokens,
        )
        total, count, times_ms = torch.zeros((), device=device), 0, []
        loss = math.nan
        harness.settle(member)
        start = time.perf_counter()
        for step, batch in enumerate(batches, 1):
            logged = step == 1 or step % given.log_every == 0 or step == given.steps
            trainer.memory.start(logged)
            total += trainer.step(batch, step)
            count += 1
            if logged:
                dist.all_reduce(total)
                mean = float(total) / count / num_ranks
                step_ms = 1e3 * (time.perf_counter() - start) / count
                times_ms.append(step_ms)
                memory = trainer.memory.figures(member)
                write("step", step=step, loss=mean, step_ms=step_ms, tokens_per_s=1e3 * tokens / step_ms, **memory)
                if not math.isfinite(mean):
                    raise SystemExit(f"{preset}:{seed}: the loss is {mean} in the steps up to {step}")
                total.zero_()
                count = 0
                if step % given.held_out_every == 0 or step == given.steps:
                    loss = trainer.held_out(held_out)
                    write("held_out", step=step, held_out_loss=loss)
                harness.settle(member)
                start = time.perf_counter()
        buffer.check()
        # The first interval compiles kernels.
        median_ms = statistics.median(times_ms[1:] or times_ms)
        write("end", step=given.steps, held_out_loss=loss, step_ms=median_ms, **trainer.memory.figures(member))
    del trainer
    gc.collect()
    harness.release(member)


@dataclasses.dataclass
class Writer:
    """Writes JSON lines of one run from rank 0, and says the same in short."""

    path: Path | None
    rank: int
    run: str
    about: dict[str, object]

    def __call__(self, kind: str, **values: object) -> None:
        if self.rank:
            return
        if self.path is not None:
            more = self.about if kind == "run" else {}
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, "run": self.run, **more, **values}) + "\n")
        shown = {name: value for name, value in values.items() if value is not None and name != "products"}
        words = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
        ]
        print(f"{self.run} {kind}: {', '.join(words)}", flush=True)


def decoder_config(given: argparse.Namespace) -> DecoderConfig:
    """Return the model's shape."""
    return DecoderConfig(**{field.name: getattr(given, field.name) for field in dataclasses.fields(DecoderConfig)})


def about(
    given: argparse.Namespace, launch: Launch, member: Member, text: Text, preset: str, seed: int
) -> dict[str, object]:
    """Return what a run's first line says. Collective."""
    starts = {
        "mpirun": ["mpirun", "-n", str(launch.num_ranks), "python"],
        "torchrun": ["torchrun", "--nproc-per-node", str(launch.num_ranks)],
        "single": ["python"],
    }
    settings = {name: value for name, value in vars(given).items() if name not in ("text", "json", "runs")}
    return {
        "preset": preset,
        "seed": seed,
        "command": shlex.join([*starts[launch.launcher], "examples/train_moe.py", *sys.argv[1:]]),
        "commit": harness.commit(),
        "machine": harness.machine(member),
        "num_ranks": launch.num_ranks,
        "settings": settings,
        "text": {name: value for name, value in text.manifest.items() if name not in ("files", "roots")},
    }


def runs(text: str) -> list[tuple[str, int]]:
    """Read the command line's list of runs."""
    found = []
    for word in text.split(","):
        preset, _, seed = word.partition(":")
        if preset not in PRESETS or not (seed or "0").isdecimal():
            raise argparse.ArgumentTypeError(f"must be PRESET:SEED with PRESET of {', '.join(PRESETS)}, got {word!r}")
        found.append((preset, int(seed or 0)))
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="of tools/gather_text.py")
    parser.add_argument("--runs", type=runs, metavar="PRESET:SEED[,...]", help="in turn; instead of --preset, --seed")
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append JSON lines")
    for name, default, what in (
        ("steps", 1200, "of each run"),
        ("batch", 64, "sequences a step, over all ranks"),
        ("length", 512, "bytes of a sequence"),
        ("warm-up", 100, "steps of linear warm-up"),
        ("log-every", 20, "steps"),
        ("held-out-every", 300, "steps, those that are logged"),
        ("held-out-tokens", 2**20, "bytes of the held-out loss"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default {default}")
    for field in dataclasses.fields(DecoderConfig):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=field.default, metavar="N", help=f"default {field.default}")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak of the learning rate; default 1e-3")
    parser.add_argument("--balance", type=float, default=1e-3, help="step of the routers' biases; default 1e-3")
    parser.add_argument("--recompute", choices=("none", "swiglu"), default="none")
    parser.add_argument(
        "--capacity",
        type=float,
        metavar="X",
        help="receive at most X times the mean rows and do not wait for the counts; more ends the run (default: wait, "
        "which FP8 products that need the counts on the host do anyway)",
    )
    given = parser.parse_args(arguments)
    given.runs = given.runs or [(given.preset, given.seed)]
    return given


def main() -> None:
    given = parse()
    with process_group() as launch:
        if given.batch % launch.num_ranks or given.experts % launch.num_ranks:
            raise SystemExit(f"--batch and --experts must be multiples of {launch.num_ranks} ranks")
        if launch.device.type == "cpu":
            torch.set_num_threads(1)
        group = dist.group.WORLD
        assert group is not None
        member = Member(group, launch.rank, launch.num_ranks, launch.device, deadline_s=30.0)
        text = Text(given.text, launch.device)
        for preset, seed in given.runs:
            said = about(given, launch, member, text, preset, seed)
            train(given, member, text, preset, seed, Writer(given.json, launch.rank, f"{preset}:{seed}", said))
        if launch.rank == 0 and given.json is not None:
            print(plot_training.table(plot_training.read(given.json)))


if __name__ == "__main__":
    main()
