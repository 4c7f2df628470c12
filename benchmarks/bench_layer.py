"""Time an MoE layer to train, forward and backward, beside the same layer over NCCL; and measure what it keeps.

Geometry: on GPUs 4096 tokens a rank of 7168, top-8 of 64 experts of 2048; on the CPU 64 of 256, top-2 of 8 of 128.
Gaussian tokens and weights, the router's choice.

    mpirun -n 4 python -m qcomm bench layer --json layer.jsonl
    mpirun -n 4 python -m qcomm bench layer --largest-batch

Layers: MXFP4MoELayer by each preset (benchmarks/presets.py), `nccl once` and `nccl pairs` (layer_nccl.py), all of the
same weights. Figures: forward; backward, over a graph that is kept; total, both in one call; host, the host's time of
total. comm: time of total without router and experts, whose outputs are constants (dispatch and combine, for NCCL with
sorting, copying rows to experts and summing), over total's; vs nccl: total of the faster NCCL layer over total.
harness.py says how calls are timed. Gradients go to the tokens, the router and the experts.

Checked before any time: output and gradients against `nccl once`, as norm of the difference over norm, at most LIMITS;
the first compared is the BF16 layer. A difference ends the run with code 1.

layer_products.py says how grouped products are timed, layer_memory.py how memory is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import harness
import layer_memory
import layer_products
import layer_report
import runner
import torch
from layer_nccl import NcclLayer
from layer_report import ONCE, PAIRS, Timed
from presets import PRESETS
from torch.autograd.function import once_differentiable
from workload import names_of

from qcomm import Buffer, combine, dispatch, validate
from qcomm.config import Member
from qcomm.formats import FP8_GROUP_SIZE
from qcomm.moe import MoEConfig, MXFP4MoELayer
from qcomm.moe.experts import RECOMPUTES, Recompute
from qcomm.moe.products import Groups

NAME = "layer"
LIMITS = {
    PAIRS: {"out": 0.01, "x": 0.02, "w1": 0.02, "w2": 0.02, "router": 0.05},
    "bf16": {"out": 0.01, "x": 0.02, "w1": 0.02, "w2": 0.02, "router": 0.05},
    "fp8": {"out": 0.1, "x": 0.12, "w1": 0.12, "w2": 0.1, "router": 0.25},
    "paper": {"out": 0.24, "x": 0.27, "w1": 0.3, "w2": 0.3, "router": 0.55},
    "aggressive": {"out": 0.24, "x": 0.45, "w1": 0.45, "w2": 0.45, "router": 0.75},
}
"""Largest relative errors: BF16 rounds sums in another order, others round operands (docs/training.md)."""
_ITERATIONS = {"cuda": 20, "cpu": 2}

Layer = Callable[[torch.Tensor], torch.Tensor]
Gradients = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of the layer; tokens are those of one rank."""

    tokens: int
    hidden: int
    topk: int
    experts: int
    intermediate: int


_SIZES = {"cuda": Geometry(4096, 7168, 8, 64, 2048), "cpu": Geometry(64, 256, 2, 8, 128)}


class Bench:
    """One rank's input, and the layers over it."""

    def __init__(self, given: argparse.Namespace, size: Geometry, member: Member) -> None:
        self.given, self.size, self.member = given, size, member
        self.config = MoEConfig(size.hidden, size.intermediate, size.experts, size.topk)
        generator = torch.Generator(member.device).manual_seed(1000 * given.seed + member.rank)
        shape = (size.tokens, size.hidden)
        x, grad = (torch.randn(shape, generator=generator, device=member.device) for _ in range(2))
        self.x, self.grad = x.to(torch.bfloat16).requires_grad_(), grad.to(torch.bfloat16)
        self.clock = harness.Clock(member, given.iterations or _ITERATIONS[member.device.type])

    @contextmanager
    def layer(
        self, preset: str, *, recompute: Recompute | None = None, tokens: int | None = None
    ) -> Iterator[MXFP4MoELayer]:
        """Make the layer of a preset. Collective."""
        size = self.size
        with Buffer(
            self.member.group,
            num_experts=size.experts,
            num_topk=size.topk,
            hidden=size.hidden,
            num_max_tokens_per_rank=tokens or size.tokens,
            precision=PRESETS[preset].precision,
            backend=self.given.backend,
            device=self.member.device,
        ) as buffer:
            keep = PRESETS[preset].keep
            recompute = recompute or self.given.recompute
            yield MXFP4MoELayer(self.config, keep=keep, recompute=recompute, buffer=buffer, seed=self.given.seed)
            buffer.check()
        harness.release(self.member)

    def times(self) -> Iterator[Timed]:
        """Check and time the NCCL layers, then those of the presets. Collective.

        Raises:
            MismatchError: a result is off.
        """
        with self.layer("bf16") as layer:
            baselines = {name: NcclLayer(layer, once=name == ONCE, eager=self.given.eager) for name in (ONCE, PAIRS)}
            want = self.gradients(baselines[ONCE], layer)
            pairs = self.compare(PAIRS, self.gradients(baselines[PAIRS], layer), want)
            # The BF16 layer is another program than the baselines: each vouches for the other.
            self.compare("bf16", self.gradients(layer, layer), want)
            for name, baseline in baselines.items():
                errors = pairs if name == PAIRS else {}
                yield self.time(name, baseline, layer, _Exchange(layer, self.x, baseline), errors)
        for preset in self.given.presets:
            with self.layer(preset) as layer:
                errors = self.compare(preset, self.gradients(layer, layer), want)
                yield self.time(preset, layer, layer, _Exchange(layer, self.x, None), errors)

    def time(
        self, name: str, layer: Layer, weights: MXFP4MoELayer, exchange: _Exchange, errors: dict[str, float]
    ) -> Timed:
        """Time a layer. Collective."""
        leaves = [self.x, weights.router.weight, weights.w1, weights.w2]
        out = layer(self.x)
        clock, grad = self.clock, self.grad
        return Timed(
            name,
            forward=clock.time(lambda: layer(self.x)),
            backward=clock.time(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)),
            total=clock.time(lambda: torch.autograd.grad(layer(self.x), leaves, grad)),
            comm_forward=clock.time(exchange),
            comm_total=clock.time(lambda: torch.autograd.grad(exchange(), exchange.leaves, grad)),
            errors=errors,
        )

    def gradients(self, layer: Layer, weights: MXFP4MoELayer) -> Gradients:
        """Return the output and all gradients."""
        out = layer(self.x)
        leaves = {"x": self.x, "router": weights.router.weight, "w1": weights.w1, "w2": weights.w2}
        grads = torch.autograd.grad(out, list(leaves.values()), self.grad)
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    def compare(self, name: str, got: Gradients, want: Gradients) -> dict[str, float]:
        """Return relative errors, the largest of the ranks. Collective.

        Raises:
            MismatchError: one is above its limit.
        """
        errors = {key: _relative(got[key], want[key]) for key in want}
        limits = LIMITS[name]
        problems = [
            f"{name}: the relative error of {key} must be at most {limits[key]}, got {error:.4f}"
            for key, error in errors.items()
            if not error <= limits[key]
        ]
        harness.require_equal(self.member, problems)
        ranks = harness.gather(self.member, errors)
        return {key: max(each[key] for each in ranks) for key in errors}

    def products(self) -> list[layer_products.Timed]:
        """Time the grouped products on the rows that the layer's dispatch delivers. Collective."""
        with self.layer("bf16") as layer, torch.no_grad():
            topk_idx, weights = layer.router(self.x)
            _, handle = layer.buffer.dispatch(self.x.detach(), topk_idx, weights, alignment=FP8_GROUP_SIZE)
            return layer_products.time(self.clock, Groups.of(handle), layer.w1.detach())

    def memory(self) -> list[dict[str, Any]]:
        """Measure what the first preset of each way of keeping keeps. Collective."""
        lines: list[dict[str, Any]] = []
        for recompute in RECOMPUTES:
            for preset in ("bf16", "fp8", "paper"):
                with self.layer(preset, recompute=recompute) as layer:
                    found = layer_memory.kept(self.member, layer, self.x)
                about = {"keep": PRESETS[preset].keep, "recompute": recompute}
                lines.append({**about, **dataclasses.asdict(found)})
        return lines

    def largest(self) -> list[dict[str, Any]]:
        """Find the largest batch of each way of keeping. Collective."""
        given, lines = self.given, []
        budget = int(given.budget_gib * 2**30)
        for preset in ("bf16", "fp8", "paper"):
            with self.layer(preset, tokens=given.most_tokens) as layer:
                tokens = layer_memory.largest_batch(
                    self.member, layer, given.most_tokens, budget, given.stack, given.seed
                )
            about = {"keep": PRESETS[preset].keep, "recompute": given.recompute, "tokens": tokens}
            lines.append({**about, "stack": given.stack, "budget": budget, "most_tokens": given.most_tokens})
        return lines


class _Exchange:
    """A layer's exchange by itself: what the router chose, and experts whose results are constants."""

    def __init__(self, layer: MXFP4MoELayer, x: torch.Tensor, nccl: NcclLayer | None) -> None:
        self._layer, self._nccl, self._x = layer, nccl, x
        with torch.no_grad():
            self._topk_idx, weights = layer.router(x)
        self._weights = weights.requires_grad_()
        self._constant: torch.Tensor | None = None
        self.leaves = [x, self._weights]

    def __call__(self) -> torch.Tensor:
        if self._nccl is not None:
            stub = lambda rows, weights, groups: self._stub(rows, weights)  # noqa: E731
            return self._nccl.exchange(self._x, self._topk_idx, self._weights, stub)
        received, handle = dispatch(
            self._x,
            self._topk_idx,
            self._weights,
            self._layer.buffer,
            recv_dtype=self._layer.keep,
            alignment=FP8_GROUP_SIZE,
        )
        carrier = received.x if received.grad_carrier is None else received.grad_carrier
        return combine(self._stub(carrier, cast(torch.Tensor, received.weights)), handle, weighted=False)

    def _stub(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self._constant is None or self._constant.shape != rows.shape:
            self._constant = torch.ones(rows.shape, dtype=torch.bfloat16, device=rows.device)
        out: torch.Tensor = _Constant.apply(rows, weights, self._constant)
        return out


class _Constant(torch.autograd.Function):
    """Takes no time: output and gradients are there."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        ctx.constant, ctx.weights = constant, weights.detach()
        return constant.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return ctx.constant, ctx.weights, None


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m qcomm bench {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(Geometry):
        default = "/".join(str(getattr(_SIZES[device], field.name)) for device in ("cuda", "cpu"))
        parser.add_argument(f"--{field.name}", type=int, metavar="N", help=f"default {default} (GPU/CPU)")
    parser.add_argument("--presets", type=names_of(list(PRESETS)), default=list(PRESETS), help="a comma list")
    parser.add_argument("--recompute", choices=RECOMPUTES, default="none")
    parser.add_argument("--backend", default="auto", help="of the qcomm layers")
    parser.add_argument("--eager", action="store_true", help="NCCL layers without torch.compile")
    parser.add_argument("--iterations", type=int, metavar="N", help="default 20/2 (GPU/CPU)")
    parser.add_argument("--skip", type=names_of(("times", "products", "memory")), default=[], help="a comma list")
    parser.add_argument("--largest-batch", action="store_true", help="find the largest batch too (CUDA only)")
    parser.add_argument("--budget-gib", type=float, default=16, metavar="X", help="of the largest batch; default 16")
    parser.add_argument("--stack", type=int, default=16, metavar="N", help="its layers; default 16")
    parser.add_argument("--most-tokens", type=int, default=16384, metavar="N", help="its upper end; default 16384")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON object a row")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _size(given: argparse.Namespace, member: Member) -> Geometry:
    named = {field.name: getattr(given, field.name) for field in dataclasses.fields(Geometry)}
    size = dataclasses.replace(
        _SIZES[member.device.type], **{name: value for name, value in named.items() if value is not None}
    )
    validate.buffer_shape(size.experts, size.topk, size.hidden, size.tokens, member.num_ranks)
    validate.multiple("intermediate", size.intermediate, FP8_GROUP_SIZE)
    if given.iterations is not None:
        validate.positive("iterations", given.iterations)
    if given.largest_batch and member.device.type != "cuda":
        raise ValueError("--largest-batch needs CUDA, whose allocator counts")
    return size


def main() -> int:
    given = _parse()
    with harness.session() as session, torch.enable_grad():
        member = session.member
        try:
            size = _size(given, member)
        except ValueError as error:
            return runner.fail(session, str(error), 2)
        machine, absent = harness.machine(member), layer_products.absent(member.device)
        about = {
            "benchmark": NAME,
            "command": harness.command(session.launch, "bench", NAME),
            "commit": harness.commit(),
            "machine": machine,
            "num_ranks": member.num_ranks,
            "geometry": dataclasses.asdict(size),
            "recompute": given.recompute,
            "seed": given.seed,
            "products": layer_products.in_use(member.device),
            "products_absent": absent,
        }

        def report(section: str, lines: list[dict[str, Any]], table: str) -> None:
            if member.rank == 0:
                print(f"\n{table}", flush=True)
                if given.json is not None:
                    with given.json.open("a") as file:
                        file.write("".join(f"{json.dumps({**about, 'section': section, **line})}\n" for line in lines))

        if member.rank == 0:
            print(
                f"{machine['devices']}, {member.num_ranks} ranks, {size.tokens} tokens a rank of {size.hidden}, top-"
                f"{size.topk} of {size.experts} experts of {size.intermediate}, torch {machine['torch']}, recompute "
                f"{given.recompute}\n{layer_report.products(layer_products.in_use(member.device), absent)}"
            )
        bench = Bench(given, size, member)
        if "times" not in given.skip:
            try:
                lines = layer_report.time_lines(list(bench.times()))
            except harness.MismatchError as error:
                return runner.fail(session, f"results differ, no times are reported:\n{error}", 1)
            report("time", lines, layer_report.time_table(lines))
        if "products" not in given.skip:
            timed = bench.products()
            report("product", [dataclasses.asdict(each) for each in timed], layer_report.product_table(timed))
        if "memory" not in given.skip:
            lines = layer_report.with_ratios(bench.memory())
            report("memory", lines, layer_report.memory_table(lines))
        if given.largest_batch:
            lines = bench.largest()
            report("largest", lines, layer_report.largest_table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
