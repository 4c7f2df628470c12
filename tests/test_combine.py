"""Combine, bit by bit against the oracle; padding rows of its input are NaN throughout."""

from __future__ import annotations

import dataclasses
import os
import random

import cases
import pytest
import torch
from bit_patterns import equal_bits
from cases import BF16, FP8, MXFP4, ROTATED_STOCHASTIC, STOCHASTIC, WIRES, Case, XKind, grid
from ranks import NODES, Target, targets

from qcomm.formats import FLOAT_SCALE_LAYOUTS, RECV_DTYPES, RECV_LAYOUTS, WireFormat

KIND_WIRES = (BF16, FP8, MXFP4)
BY_EXPERT = ("expert_major", "batched")
RANDOM_CASES = "QCOMM_RANDOM_CASES"
# A cheap dispatch.
BASE = Case(wire=BF16, recv_dtype="bf16", combine_wire=BF16, routes="some")


@targets(2, 3, 4, nodes=NODES)
def test_wires_and_layouts(target: Target) -> None:
    todo = [
        *grid(BASE, combine_wire=WIRES, recv_layout=BY_EXPERT, weighted=(False, True), static=(False, True)),
        *grid(BASE, combine_wire=WIRES, recv_layout=("token_major",), weighted=(False,), static=(False, True)),
    ]
    cases.no_problems(target.run(cases.run_cases, todo))


@targets(3, nodes=NODES)
def test_sizes(target: Target) -> None:
    todo = [
        *grid(BASE, combine_wire=KIND_WIRES, hidden=(128, 384, 1024), alignment=(1, 32, 128)),
        *grid(BASE, combine_wire=KIND_WIRES, num_topk=(1, 8), num_local_experts=(8,), recv_layout=BY_EXPERT),
        *grid(BASE, combine_wire=KIND_WIRES, num_topk=(1,), num_local_experts=(1,)),
        # Teams of one warp and of several, one part a thread and several, for many records and for few.
        *grid(BASE, combine_wire=WIRES, hidden=(128, 1024, 7168, 8192), num_sms=(None, 1)),
    ]
    cases.no_problems(target.run(cases.run_cases, todo))


@targets(2, 3, nodes=NODES)
def test_order_of_addition(target: Target) -> None:
    base = dataclasses.replace(BASE, num_topk=8, num_local_experts=8)
    todo = grid(
        base, routes=("random", "same_rank"), recv_layout=BY_EXPERT, weighted=(False, True), combine_wire=KIND_WIRES
    )
    cases.no_problems(target.run(cases.run_cases, list(todo)))


@targets(3, nodes=NODES)
def test_routes(target: Target) -> None:
    choices = {"routes": ("random", "none", "one", "half"), "counts": ("uneven", "empty", "zero", "one")}
    todo = [
        *grid(BASE, recv_layout=BY_EXPERT, static=(False, True), **choices),
        *grid(BASE, recv_layout=("token_major",), weighted=(False,), static=(False, True), **choices),
        *grid(BASE, has_weights=(False,), recv_layout=BY_EXPERT, weighted=(False, True)),
    ]
    cases.no_problems(target.run(cases.run_cases, todo))


@targets(3, nodes=NODES)
def test_backward_leg(target: Target) -> None:
    todo = grid(BASE, backward=(True,), wire=KIND_WIRES, combine_wire=(*KIND_WIRES, ROTATED_STOCHASTIC))
    cases.no_problems(target.run(cases.run_cases, list(todo)))


def _seeds(rank: int, num_ranks: int, device: str, backend: str, wire: WireFormat) -> tuple[bool, bool]:
    case = dataclasses.replace(BASE, combine_wire=wire, routes="random")
    inputs = cases.make_inputs(case, num_ranks)
    with cases.make_buffer(case, num_ranks, device, backend) as buffer:
        recv, handle = cases.dispatch(buffer, case, inputs)
        y = torch.linspace(-3, 3, recv.x.numel(), device=buffer.device).view(recv.x.shape).to(torch.bfloat16)
        first, again, other = (buffer.combine(y, handle, seed=seed) for seed in (5, 5, 6))
        cases.sync(buffer)
    return equal_bits(first, again), equal_bits(first, other)


@targets(3, nodes=NODES)
@pytest.mark.parametrize("wire", [STOCHASTIC, ROTATED_STOCHASTIC], ids=["plain", "rotated"])
def test_seed_decides_the_bits(target: Target, wire: WireFormat) -> None:
    assert target.run(_seeds, wire) == [(True, False)] * target.pool.num_ranks


def _two_handles(rank: int, num_ranks: int, device: str, backend: str) -> list[str]:
    problems = []
    first = dataclasses.replace(BASE, combine_wire=FP8)
    second = dataclasses.replace(first, recv_layout="batched", alignment=1, routes="half", seed=3, static=True)
    with cases.make_buffer(first, num_ranks, device, backend) as buffer:
        made, nodes = [], cases.node_sums(buffer)
        for case in (first, second):
            inputs = cases.make_inputs(case, num_ranks)
            recv, handle = cases.dispatch(buffer, case, inputs)
            rows = cases.expect_rows(case, inputs)
            made.append((case, inputs, recv, handle, rows, cases.make_ys(case, rows)))
        for case, inputs, recv, handle, rows, ys in (*made, *made):
            for weighted in (False, True):
                wanted = dataclasses.replace(case, weighted=weighted)
                y = cases.place_y(case, ys[rank], rows[rank], recv, handle)
                out = buffer.combine(y, handle, weighted=weighted, seed=case.seed)
                cases.sync(buffer)
                if not equal_bits(out.cpu(), cases.expect_combined(wanted, ys, rows, inputs, rank, **nodes)):
                    problems.append(f"rank {rank}: {wanted}")
    return problems


@targets(3, nodes=NODES)
def test_handles_serve_any_number_of_combines_in_any_order(target: Target) -> None:
    cases.no_problems(target.run(_two_handles))


KINDS: dict[str, tuple[XKind, ...]] = {
    "bf16": ("bf16", "bits"),
    "fp8": ("bf16", "bits", "fp8", "fp8_float", "fp8_columns"),
    "mxfp4": ("bf16", "bits", "fp8_float", "mxfp4"),
}


_TOGETHER = 40


def _random_cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    drawn = []
    for _ in range(-(-count // 8)):
        num_local = draw.randint(1, 9)
        base = Case(
            num_local_experts=num_local,
            num_topk=draw.randint(1, min(num_local, 8)),
            hidden=128 * draw.randint(1, 6),
            wire=draw.choice(WIRES),
            combine_wire=draw.choice(WIRES),
            backward=draw.random() < 0.3,
            num_sms=draw.choice((None, 1, 24)),
        )
        for _ in range(8):
            layout = draw.choice(RECV_LAYOUTS)
            dtype = draw.choice(RECV_DTYPES)
            alignment = draw.choice((1, 2, 24, 32, 128, 256))
            wide = layout == "expert_major" and dtype == "fp8" and alignment % 128 == 0
            case = dataclasses.replace(
                base,
                recv_layout=layout,
                recv_dtype=dtype,
                alignment=alignment,
                columnwise=wide and draw.random() < 0.7,
                sf_layout=draw.choice(list(FLOAT_SCALE_LAYOUTS)),
                static=draw.random() < 0.4,
                counts=draw.choice(("uneven", "uneven", "empty", "one", "zero")),
                routes=draw.choice(("random", "some", "some", "none", "one", "half", "same_rank")),
                x=draw.choice(KINDS[base.wire.kind]),
                idx_dtype=draw.choice((torch.int32, torch.int64)),
                has_weights=draw.random() < 0.7,
                weighted=layout != "token_major" and draw.random() < 0.7,
                seed=draw.randrange(1 << 20),
            )
            drawn.append(case)
    return drawn[:count]


@targets(3, 4, nodes=NODES)
def test_random_cases(target: Target) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    count = int(os.environ.get(RANDOM_CASES, 300 if target.pool.device == "cuda" else 40))
    todo = _random_cases(count, seed)
    for first in range(0, count, _TOGETHER):
        cases.no_problems(target.run(cases.run_cases, todo[first : first + _TOGETHER]))
