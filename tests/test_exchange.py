"""The exchange's parts, and its oracle by hand."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import cases
import pytest
import torch
from bit_patterns import equal_bits
from cases import OPTIONS, WIRES, Case

from qcomm import FP8Tensor, MXFP4Tensor, WireFormat, exchange, reference, reference_exchange
from qcomm.formats import FLOAT_SCALE_LAYOUTS, RECV_LAYOUTS, RecvDtype, ScaleLayout, WireKind
from qcomm.options import DispatchOptions
from qcomm.records import MetadataLayout, RecordLayout, align

BF16 = WireFormat("bf16")


def _constant(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)[:, None].expand(-1, 128).contiguous()


# Two ranks, experts 0 and 1 on rank 0, 2 and 3 on rank 1.
IDX = [torch.tensor([[2, 1], [-1, 3], [-1, -1]]), torch.tensor([[1, 0]])]
WEIGHTS = [torch.tensor([[0.25, 0.5], [9.0, 2.0], [9.0, 9.0]]), torch.tensor([[3.0, 4.0]])]
XS = [_constant(1, 2, 3), _constant(10)]


def test_oracle_expert_major() -> None:
    on_0, on_1 = reference_exchange.dispatch(XS, IDX, WEIGHTS, num_experts=4, wire=BF16, recv_dtype="bf16", alignment=4)
    assert on_0.x[:, 0].tolist() == [10, 0, 0, 0, 1, 10, 0, 0]
    assert on_0.src.tolist() == [[1, 0], *[[-1, -1]] * 3, [0, 0], [1, 0], *[[-1, -1]] * 2]
    assert on_0.weights is not None
    assert on_0.weights.tolist() == [4, 0, 0, 0, 0.5, 3, 0, 0]
    assert on_0.rows.group_offsets == [0, 4, 8]
    assert on_0.rows.tokens_per_expert == [1, 2]
    assert on_1.x[:, 0].tolist() == [1, 0, 0, 0, 2, 0, 0, 0]
    assert on_1.rows.tokens_per_expert == [1, 1]


def test_oracle_token_major() -> None:
    on_0, on_1 = reference_exchange.dispatch(
        XS, IDX, WEIGHTS, num_experts=4, wire=BF16, recv_layout="token_major", recv_dtype="bf16"
    )
    assert on_0.x[:, 0].tolist() == [1, 10]
    assert on_0.topk_idx is not None
    assert on_0.topk_weights is not None
    assert on_0.topk_idx.tolist() == [[-1, 1], [1, 0]]
    assert on_0.topk_weights.tolist() == [[0, 0.5], [3, 4]]
    assert on_1.src.tolist() == [[0, 0], [0, 1]]
    assert on_0.weights is None


def test_oracle_batched() -> None:
    on_0, on_1 = reference_exchange.dispatch(
        XS, IDX, None, num_experts=4, wire=BF16, recv_layout="batched", recv_dtype="bf16", alignment=1
    )
    assert on_0.x[:, 0].tolist() == [10, 0, 1, 10]
    assert on_0.rows.needed == 2
    assert on_0.weights is not None
    assert on_0.weights.tolist() == [1, 0, 1, 1]
    assert on_1.x[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("weighted", "sums"), [(True, [[25 + 50, 80, 0], [3 * 100 + 4 * 10]]), (False, [[300, 40, 0], [110]])]
)
def test_oracle_combine(weighted: bool, sums: list[list[float]]) -> None:
    rows = [reference_exchange.arrange(rank, IDX, WEIGHTS, num_experts=4, alignment=2) for rank in range(2)]
    ys = [_constant(10, torch.nan, 200, 100), _constant(100, torch.nan, 40, torch.nan)]
    if weighted:
        ys[0][2] = 100
    out = reference_exchange.combine(ys, rows, [3, 1], wire=BF16, weighted=weighted)
    assert [o[:, 0].tolist() for o in out] == sums


def test_oracle_adds_by_rank_and_in_topk_order() -> None:
    # In float32 (2^24 + 1) + 1 = 2^24, but (1 + 1) + 2^24 = 2^24 + 2; adding -2^24 tells them apart in BF16.
    big = 2.0**24
    idx = [torch.tensor([[0, 1, 2, 3]]), torch.empty(0, 4, dtype=torch.int64)]
    rows = [reference_exchange.arrange(rank, idx, None, num_experts=8, alignment=1) for rank in range(2)]
    none = torch.empty(0, 128, dtype=torch.bfloat16)
    late = reference_exchange.combine([_constant(big, 1, 1, -big), none], rows, [1, 0], wire=BF16, weighted=False)
    early = reference_exchange.combine([_constant(1, 1, big, -big), none], rows, [1, 0], wire=BF16, weighted=False)
    assert (float(late[0][0, 0]), float(early[0][0, 0])) == (0, 2)


def test_oracle_adds_in_each_node_first() -> None:
    # Four ranks of one expert, two nodes: (2^24 + 1) + (1 - 2^24) by node, where 1 is lost in both.
    big = 2.0**24
    idx = [torch.tensor([[0, 1, 2, 3]]), *[torch.empty(0, 4, dtype=torch.int64)] * 3]
    rows = [reference_exchange.arrange(rank, idx, None, num_experts=4, alignment=1) for rank in range(4)]
    ys = [_constant(value) for value in (1.5, big, -big, 1)]
    out = [
        float(
            reference_exchange.combine(
                ys, rows, [1, 0, 0, 0], wire=BF16, weighted=False, ranks_per_node=each, rounds_inside=rounds
            )[0][0, 0]
        )
        for each, rounds in ((1, False), (2, False), (2, True))
    ]
    # By rank: ((1.5 + 2^24) - 2^24) + 1, the first sum rounded to 2^24 + 2. By node: rounded to BF16, 2^24 and -2^24.
    # By node, but the own one by rank: (1.5 + 2^24) - 2^24, for BF16 has no 1 - 2^24.
    assert out == [3, 0, 2]


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rounds", [False, True], ids=["float32", "rounded"])
def test_adding_in_each_node_stays_within_the_bound(wire: WireFormat, weighted: bool, rounds: bool) -> None:
    case = Case(combine_wire=wire, counts="uneven", routes="random", num_local_experts=2, num_topk=6, weighted=weighted)
    common: dict[str, Any] = {"wire": wire, "weighted": weighted}
    differs = False
    for seed in range(6):
        inputs = cases.make_inputs(dataclasses.replace(case, seed=seed), 4)
        rows = cases.expect_rows(case, inputs)
        ys = [y.nan_to_num(0.0) for y in cases.make_ys(dataclasses.replace(case, seed=seed), rows)]
        tokens = [len(idx) for idx in inputs.topk_idxs]
        direct, by_node = (
            reference_exchange.combine(ys, rows, tokens, seed=seed, ranks_per_node=each, rounds_inside=inside, **common)
            for each, inside in ((1, False), (2, rounds))
        )
        bounds = reference_exchange.combine_difference(ys, rows, tokens, rounds_inside=rounds, **common)
        for one, other, bound in zip(direct, by_node, bounds, strict=True):
            difference = (one.float() - other.float()).abs()
            assert bool((difference <= bound).all()), float((difference / bound).max())
            differs = differs or bool(difference.any())
    assert differs


def test_bad_routes() -> None:
    idx = torch.tensor([[0, 1], [-1, -1], [4, 0], [2, 2], [-2, 0], [-1, 3]])
    assert exchange.bad_routes(idx, 4).tolist() == [False, False, True, True, True, False]
    assert exchange.describe_bad_route(3, [2, 2], 4) == "topk_idx[3] must hold distinct experts, got [2, 2]"
    assert "expert ids in [-1, 4), got [4, 0]" in exchange.describe_bad_route(2, [4, 0], 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_route(dtype: torch.dtype) -> None:
    idx = torch.tensor([[0, 2], [3, -1], [-1, -1], [2, 3]], dtype=dtype)
    routing = exchange.route(idx, 4, 2)
    assert routing.send_slot.tolist() == [[0, 0], [-1, 1], [-1, -1], [-1, 2]]
    assert routing.tokens_per_rank.tolist() == [1, 3]
    assert routing.tokens_per_expert.tolist() == [1, 0, 2, 2]
    assert routing.ordinal[idx >= 0].tolist() == [0, 0, 0, 1, 1]
    assert exchange.tokens_by_slot(routing.send_slot, 4).tolist() == [[0, -1, -1, -1], [0, 1, 3, -1]]


def test_metadata() -> None:
    idx = torch.tensor([[0, 2], [3, -1]])
    words = exchange.metadata(exchange.route(idx, 4, 2), None, torch.tensor([1, -1, 0]), 1, 2)
    layout = MetadataLayout(2)
    assert words[:, 0].tolist() == [1, -1, 0]
    assert words[:, layout.expert].tolist() == [[1, -1], [-1, -1], [-1, 0]]
    assert words[[0, 2], layout.weight].contiguous().view(torch.float32).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("hidden", [128, 384])
@pytest.mark.parametrize("layout", list(FLOAT_SCALE_LAYOUTS), ids=lambda layout: layout.value)
def test_wire_round_trip(rows: int, hidden: int, layout: ScaleLayout) -> None:
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
    records = exchange.encode_wire(x, BF16)
    assert records.shape == (rows, RecordLayout("bf16", hidden).num_bytes)
    held = exchange.view_wire(records, BF16, hidden)
    assert isinstance(held, torch.Tensor)
    assert equal_bits(held, x)
    fp8 = reference.quantize_fp8(x)
    sf = torch.empty(hidden // 128, align(rows, 4)).t()[:rows] if layout is ScaleLayout.COLUMN_MAJOR else fp8.sf
    sf.copy_(fp8.sf)
    for given in (x, FP8Tensor(fp8.data, sf)):
        got = exchange.view_wire(exchange.encode_wire(given, WireFormat("fp8")), WireFormat("fp8"), hidden)
        assert isinstance(got, FP8Tensor)
        assert equal_bits(got.data, fp8.data)
        assert equal_bits(got.sf, fp8.sf)
    rotated = WireFormat("mxfp4", hadamard=True)
    packed = reference.quantize_mxfp4(x, hadamard=True)
    for tokens in (x, packed):
        back = exchange.view_wire(exchange.encode_wire(tokens, rotated), rotated, hidden)
        assert isinstance(back, MXFP4Tensor)
        assert back.hadamard
        assert equal_bits(back.qdata, packed.qdata)
        assert equal_bits(back.sf, packed.sf)


@pytest.mark.parametrize(("kind", "num_bytes"), [("bf16", 768), ("fp8", 400), ("mxfp4", 208)])
def test_record_bytes(kind: Any, num_bytes: int) -> None:
    assert RecordLayout(kind, 384).num_bytes == num_bytes


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_combine_subsequences_are_distinct(num_ranks: int) -> None:
    sources = torch.arange(num_ranks)
    of_combine = [exchange.combine_subsequence(sources, rank, num_ranks).tolist() for rank in range(num_ranks)]
    flat = list(itertools.chain(range(num_ranks), *of_combine))
    assert len(set(flat)) == num_ranks * (num_ranks + 1)


def _options(layout: Any, alignment: int) -> DispatchOptions:
    return dataclasses.replace(
        OPTIONS, recv_layout=layout, recv_dtype="bf16", alignment=alignment, static=True, wire=BF16
    )


@pytest.mark.parametrize("layout", RECV_LAYOUTS)
def test_worst_case_is_enough(layout: Any) -> None:
    draw = random.Random(0)
    for _ in range(200):
        num_local, num_ranks, num_tokens = draw.randint(1, 5), draw.randint(1, 4), draw.randint(1, 4)
        num_topk = draw.randint(1, num_local * num_ranks)
        alignment = draw.choice((1, 4, 128))
        experts = range(num_local * num_ranks) if draw.random() < 0.5 else range(num_local)
        width = min(num_topk, len(experts))
        idxs = [
            torch.tensor([draw.sample(experts, width) + [-1] * (num_topk - width) for _ in range(num_tokens)])
            for _ in range(num_ranks)
        ]
        rows = reference_exchange.arrange(
            0, idxs, None, num_experts=num_local * num_ranks, recv_layout=layout, alignment=alignment
        )
        options = _options(layout, alignment)
        num_rows, each = exchange.worst_case_rows(options, num_ranks * num_tokens, num_topk, num_local)
        assert rows.needed <= (each or num_rows), (num_local, num_ranks, num_tokens, num_topk, alignment)
        assert num_rows % (1 if layout == "token_major" else alignment) == 0
        exact, _ = exchange.exact_rows(options, len(rows.rows_of_token), tuple(rows.tokens_per_expert))
        assert exact == len(rows.token_of_row)


@pytest.mark.parametrize(
    ("recv_dtype", "columnwise"), [("fp8", False), ("fp8", True), ("bf16", False), ("mxfp4", False)]
)
@pytest.mark.parametrize("wire", ["bf16", "fp8", "mxfp4"])
def test_rows_are_converted_some_at_once(
    monkeypatch: pytest.MonkeyPatch, wire: WireKind, recv_dtype: RecvDtype, columnwise: bool
) -> None:
    """As together; in columns by whole groups, of which one is empty and one longer than the rest."""
    options = dataclasses.replace(
        OPTIONS,
        recv_dtype=recv_dtype,
        columnwise=columnwise,
        sf_layout=ScaleLayout.COLUMN_MAJOR,
        wire=WireFormat(wire),
    )
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp2(torch.randint(-20, 20, (700, 8), generator=generator)).repeat_interleave(32, dim=1)
    x = torch.randn(700, 256, generator=generator) * spread
    records = exchange.encode_wire(x.bfloat16(), options.wire)
    rows = torch.randperm(1280, generator=generator)[:700, None].int()
    offsets = torch.tensor([0, 128, 128, 640, 896, 1024, 1280])
    want = exchange.lay_out(records, rows, 1280, offsets, 256, options)
    monkeypatch.setattr(exchange, "_ROWS_AT_ONCE", 300)
    found = exchange.lay_out(records, rows, 1280, offsets, 256, options)
    for name, b in vars(want).items():
        a = getattr(found, name)
        assert (a is None) == (b is None), name
        if b is not None:
            assert (a.shape, a.stride()) == (b.shape, b.stride())
            assert equal_bits(a, b), name
    assert bool(want.spread_overflows.any()) == (wire == "mxfp4" and recv_dtype == "fp8")
