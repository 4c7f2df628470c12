"""Cases of one dispatch and combine: their inputs, alike on every rank, and comparison with the oracle."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from bit_patterns import equal_bits
from ranks import device_of

from qcomm import Buffer, DispatchHandle, Received, WireFormat, WirePrecision, reference, reference_exchange, tuning
from qcomm.formats import MAXIMUM_RULES, RecvDtype, RecvLayout, Rounding, ScaleLayout, ScaleRule
from qcomm.options import DispatchOptions
from qcomm.reference_exchange import ExpectedReceived, ExpectedRows, Tokens
from qcomm.tensors import FP8Tensor, MXFP4Tensor, empty_scales

BF16 = WireFormat("bf16")
FP8 = WireFormat("fp8")
MXFP4 = WireFormat("mxfp4")
ROTATED = WireFormat("mxfp4", hadamard=True)
STOCHASTIC = WireFormat("mxfp4", ScaleRule.RCEIL, Rounding.STOCHASTIC)
ROTATED_STOCHASTIC = WireFormat("mxfp4", ScaleRule.RCEIL, Rounding.STOCHASTIC, hadamard=True)
RULES = tuple(WireFormat("mxfp4", rule) for rule in MAXIMUM_RULES)
WIRES = (BF16, FP8, *RULES, ROTATED, STOCHASTIC, ROTATED_STOCHASTIC)

XKind = Literal["bf16", "bits", "fp8", "fp8_float", "fp8_columns", "mxfp4"]
Routes = Literal["random", "some", "none", "one", "half", "same_rank"]
_COUNTS = {
    "uneven": (13, 29, 7, 20),
    "empty": (0, 17, 0, 5),
    "zero": (0, 0, 0, 0),
    "one": (1, 1, 1, 1),
    "many": (32, 9, 31, 8),
}
OPTIONS = DispatchOptions(
    recv_layout="expert_major",
    recv_dtype="fp8",
    alignment=128,
    columnwise=False,
    static=False,
    capacity=None,
    sf_layout=ScaleLayout.ROW_MAJOR,
    wire=WireFormat("mxfp4"),
    seed=0,
    async_op=False,
)
"""Of a dispatch, for tests to change."""
MAX_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """One dispatch and combine.

    Attributes:
        counts: tokens of each rank, by name.
        routes: "random" experts, "some" of them -1, "none" at all, every token to expert "one", all to the lower
            "half" of the experts, or each token to experts of the "same_rank".
        x: how the tokens are given; "bits" is bfloat16 of any bits, NaN and Inf too.
        capacity: `num_max_recv_tokens`.
        combine_wire: None tests dispatch alone.
        num_sms: with one SM, records count as many.
    """

    wire: WireFormat = MXFP4
    recv_layout: RecvLayout = "expert_major"
    recv_dtype: RecvDtype = "fp8"
    num_local_experts: int = 3
    num_topk: int = 3
    hidden: int = 128
    counts: str = "uneven"
    routes: Routes = "some"
    x: XKind = "bf16"
    alignment: int = 32
    columnwise: bool = False
    sf_layout: ScaleLayout = ScaleLayout.ROW_MAJOR
    static: bool = False
    capacity: int | None = None
    idx_dtype: torch.dtype = torch.int64
    has_weights: bool = True
    combine_wire: WireFormat | None = None
    weighted: bool = True
    backward: bool = False
    seed: int = 0
    num_sms: int | None = None

    def __str__(self) -> str:
        default = Case()
        names = [field.name for field in dataclasses.fields(self)]
        changed = [n for n in names if getattr(self, n) != getattr(default, n)]
        return "Case(" + ", ".join(f"{n}={getattr(self, n)!r}" for n in changed) + ")"

    @property
    def shape(self) -> tuple[int, int, int, WirePrecision, int | None]:
        """What needs a buffer of its own."""
        combine = self.combine_wire or BF16
        if self.backward:
            precision = WirePrecision("bf16", "bf16", self.wire, combine)
        else:
            precision = WirePrecision(self.wire, combine, "bf16", "bf16")
        return self.num_local_experts, self.num_topk, self.hidden, precision, self.num_sms


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What every rank gives to dispatch."""

    xs: list[Tokens]
    topk_idxs: list[torch.Tensor]
    topk_weights: list[torch.Tensor] | None


def make_buffer(case: Case, num_ranks: int, device: str, backend: str, /, **changes: Any) -> Buffer:
    """Make the buffer of a case on this rank."""
    num_local, num_topk, hidden, precision, num_sms = case.shape
    usual: dict[str, Any] = {
        "num_experts": num_local * num_ranks,
        "num_topk": num_topk,
        "hidden": hidden,
        "num_max_tokens_per_rank": MAX_TOKENS,
        "precision": precision,
        "device": device,
        "backend": backend,
        "num_sms": num_sms,
    }
    return Buffer(**usual | changes)


def make_inputs(case: Case, num_ranks: int) -> Inputs:
    """Make the inputs of all ranks."""
    xs, idxs, weights = [], [], []
    for rank in range(num_ranks):
        generator = torch.Generator().manual_seed(1000 * case.seed + rank)
        num_tokens = _COUNTS[case.counts][rank]
        xs.append(_make_x(case, num_tokens, generator))
        idxs.append(make_routes(case, num_tokens, case.num_local_experts * num_ranks, generator))
        weights.append(torch.randn(num_tokens, case.num_topk, generator=generator))
    return Inputs(xs, idxs, weights if case.has_weights else None)


def make_routes(case: Case, num_tokens: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Make `[num_tokens, num_topk]` experts."""
    choices = (num_experts + 1) // 2 if case.routes == "half" else num_experts
    order = torch.rand(num_tokens, choices, generator=generator).argsort(dim=1)
    idx = torch.full((num_tokens, case.num_topk), -1)
    width = min(case.num_topk, choices)
    idx[:, :width] = order[:, :width]
    if case.routes == "some":
        idx[torch.rand(idx.shape, generator=generator) < 0.3] = -1
        idx[::5] = -1
    elif case.routes == "none":
        idx[:] = -1
    elif case.routes == "same_rank":
        local = torch.rand(num_tokens, case.num_local_experts, generator=generator).argsort(dim=1)
        ranks = torch.randint(0, num_experts // case.num_local_experts, (num_tokens, 1), generator=generator)
        width = min(case.num_topk, case.num_local_experts)
        idx[:, width:] = -1
        idx[:, :width] = local[:, :width] + case.num_local_experts * ranks
    elif case.routes == "one":
        idx[:] = -1
        idx[:, -1] = num_experts - 1
    return idx.to(case.idx_dtype)


def wide_values(rows: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
    """Make bfloat16 whose 32-blocks have exponents far apart, with zeros, a zero block and a zero row."""
    x = torch.randn(rows, hidden, generator=generator)
    exponents = torch.randint(-12, 13, (rows, hidden // 32), generator=generator)
    x = x * torch.exp2(exponents.float()).repeat_interleave(32, dim=1)
    x[torch.rand(x.shape, generator=generator) < 0.05] = -0.0
    x[1::4, 32:64] = 0.0
    x[3::7] = 0.0
    return x.to(torch.bfloat16)


def _make_x(case: Case, rows: int, generator: torch.Generator) -> Tokens:
    if case.x == "bits":
        any_bits = torch.randint(0, 65536, (rows, case.hidden), generator=generator).to(torch.uint16)
        x = any_bits.view(torch.bfloat16)
        # Every fourth row stays finite.
        x[::4] = torch.where(torch.isfinite(x[::4]), x[::4], 1.0)
        return x
    x = wide_values(rows, case.hidden, generator)
    if case.x == "bf16":
        return x
    if case.x == "mxfp4":
        return reference.quantize_mxfp4(x, ScaleRule.RCEIL, hadamard=case.wire.hadamard)
    quantized = reference.quantize_fp8(x)
    sf = quantized.sf
    if case.x == "fp8_float":
        sf = sf * (0.5 + torch.rand(sf.shape, generator=generator))
    if case.x == "fp8_columns":
        sf = _by_column(sf)
    return FP8Tensor(quantized.data, sf)


def _by_column(sf: torch.Tensor) -> torch.Tensor:
    return empty_scales(sf.shape[0], sf.shape[1], ScaleLayout.COLUMN_MAJOR, sf.device).copy_(sf)


def to(x: Tokens, device: torch.device) -> Tokens:
    """Move tokens to a device; scales by column stay by column."""
    if isinstance(x, MXFP4Tensor):
        return MXFP4Tensor(x.qdata.to(device), x.sf.to(device), x.hadamard)
    if isinstance(x, FP8Tensor):
        sf = x.sf.to(device)
        return FP8Tensor(x.data.to(device), sf if x.sf.is_contiguous() else _by_column(sf))
    return x.to(device)


def sync(buffer: Buffer) -> None:
    """Wait for the device, then raise what it reported."""
    if buffer.device.type == "cuda":
        torch.cuda.synchronize(buffer.device)
    buffer.check()


def arguments(buffer: Buffer, case: Case, inputs: Inputs) -> dict[str, Any]:
    """Name what this rank gives to dispatch."""
    weights = inputs.topk_weights
    return {
        "x": to(inputs.xs[buffer.rank], buffer.device),
        "topk_idx": inputs.topk_idxs[buffer.rank].to(buffer.device),
        "topk_weights": None if weights is None else weights[buffer.rank].to(buffer.device),
        "recv_layout": case.recv_layout,
        "recv_dtype": case.recv_dtype,
        "alignment": case.alignment,
        "columnwise": case.columnwise,
        "sf_layout": case.sf_layout,
        "static": case.static,
        "num_max_recv_tokens": case.capacity,
        "seed": case.seed,
        "backward": case.backward,
    }


def dispatch(buffer: Buffer, case: Case, inputs: Inputs, **changes: Any) -> tuple[Received, DispatchHandle]:
    """Dispatch the inputs of this rank."""
    received = buffer.dispatch(**arguments(buffer, case, inputs) | changes)
    sync(buffer)
    return received[0], received[1]


def expect(case: Case, inputs: Inputs, rank: int) -> ExpectedReceived:
    """Ask the oracle what a rank receives."""
    return reference_exchange.dispatch(
        inputs.xs,
        inputs.topk_idxs,
        inputs.topk_weights,
        num_experts=case.num_local_experts * len(inputs.xs),
        wire=case.wire,
        recv_layout=case.recv_layout,
        recv_dtype=case.recv_dtype,
        alignment=case.alignment,
        columnwise=case.columnwise,
        seed=case.seed,
        ranks=[rank],
    )[0]


def expect_rows(case: Case, inputs: Inputs) -> list[ExpectedRows]:
    """Ask the oracle where every rank's rows are."""
    return [
        reference_exchange.arrange(
            rank,
            inputs.topk_idxs,
            inputs.topk_weights,
            num_experts=case.num_local_experts * len(inputs.xs),
            recv_layout=case.recv_layout,
            alignment=case.alignment,
        )
        for rank in range(len(inputs.xs))
    ]


def valid_rows(case: Case, rows: ExpectedRows, rows_per_expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the rows that a receive specifies: as it numbers them, and as the oracle does."""
    num_rows = len(rows.token_of_row)
    want = list(range(num_rows))
    if case.recv_layout != "batched":
        return torch.tensor(want, dtype=torch.int64), torch.tensor(want, dtype=torch.int64)
    each = num_rows // case.num_local_experts
    if case.static:
        want = [e * each + i for e, count in enumerate(rows.tokens_per_expert) for i in range(count)]
    got = [row // each * rows_per_expert + row % each for row in want]
    return torch.tensor(got, dtype=torch.int64), torch.tensor(want, dtype=torch.int64)


def compare(case: Case, recv: Received, handle: DispatchHandle, want: ExpectedReceived) -> list[str]:
    """Name every field of what came that the oracle contradicts."""
    problems = []
    got_rows, want_rows = valid_rows(case, want.rows, handle.rows_per_expert)
    lead = 2 if case.recv_layout == "batched" else 1
    if case.recv_layout == "batched":
        each = handle.rows_per_expert
        if tuple(recv.x.shape[:2]) != (case.num_local_experts, each):
            return [f"x.shape is {tuple(recv.x.shape)}"]
        offsets: list[int] | None = [each * i for i in range(case.num_local_experts + 1)]
    else:
        offsets = want.rows.group_offsets
    shape = tuple(recv.x.shape[:lead])
    fields = {
        "x": (recv.x, want.x, lead),
        "sf": (recv.sf, want.sf, lead),
        "src": (recv.src, want.src, 1),
        "weights": (recv.weights, want.weights, 1),
        "topk_idx": (recv.topk_idx, want.topk_idx, 1),
        "topk_weights": (recv.topk_weights, want.topk_weights, 1),
    }
    for name, (got, expected, axes) in fields.items():
        if got is None or expected is None:
            if got is not expected:
                problems.append(f"{name} is {got}, must be {expected}")
            continue
        flat = got.cpu().flatten(0, axes - 1)
        if len(flat) != recv.x.shape[:lead].numel() or (axes == lead and tuple(got.shape[:lead]) != shape):
            problems.append(f"{name}.shape is {tuple(got.shape)} for rows {shape}")
        elif not equal_bits(flat[got_rows], expected[want_rows]):
            problems.append(f"{name} {_difference(flat[got_rows], expected[want_rows])}")
    if not case.static and len(want_rows) != recv.x.shape[:lead].numel():
        problems.append(f"x has rows {shape}, must have {len(want_rows)}")
    for name, got, expected in (
        ("x_columnwise", recv.x_columnwise, want.x_columnwise),
        ("sf_columnwise", recv.sf_columnwise, want.sf_columnwise),
    ):
        if got is None or expected is None:
            if got is not expected:
                problems.append(f"{name} is {got}, must be {expected}")
            continue
        head = got.cpu()[: len(expected)] if case.static else got.cpu()
        if head.shape != expected.shape or not equal_bits(head, expected):
            problems.append(f"{name} {_difference(head, expected)}")
    counts = want.rows.tokens_per_expert
    for name, value, right in (
        ("num_tokens_per_expert", recv.num_tokens_per_expert.tolist(), counts),
        (
            "num_tokens_per_expert_list",
            recv.num_tokens_per_expert_list,
            None if case.static else tuple(counts),
        ),
        ("group_offsets", None if recv.group_offsets is None else recv.group_offsets.tolist(), offsets),
        ("spread_overflows", recv.spread_overflows.tolist(), list(want.spread_overflows)),
        ("wire", recv.wire, case.wire),
    ):
        if value != right:
            problems.append(f"{name} is {value}, must be {right}")
    if recv.sf is not None and recv.sf.dtype == torch.float32 and recv.sf.numel():
        by_column = case.sf_layout is ScaleLayout.COLUMN_MAJOR
        rows, groups = recv.x.shape[:lead].numel(), case.hidden // 128
        right_strides = (1, -(-rows // 4) * 4) if by_column else (groups, 1)
        if lead == 1 and recv.sf.stride() != right_strides:
            problems.append(f"sf.stride() is {recv.sf.stride()}, must be {right_strides}")
    return problems


def _difference(got: torch.Tensor, want: torch.Tensor) -> str:
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"is {got.dtype} {tuple(got.shape)}, must be {want.dtype} {tuple(want.shape)}"
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    different = (got.contiguous().view(width) != want.contiguous().view(width)).nonzero()
    first = tuple(different[0].tolist())
    return f"differs in {len(different)} of {got.numel()}, first at {first}: {got[first]}, must be {want[first]}"


def make_ys(case: Case, rows: Sequence[ExpectedRows], generator_seed: int = 7) -> list[torch.Tensor]:
    """Make every rank's expert outputs in the oracle's rows; padding is NaN."""
    ys = []
    for rank, here in enumerate(rows):
        generator = torch.Generator().manual_seed(1000 * case.seed + 10 * generator_seed + rank)
        y = wide_values(len(here.token_of_row), case.hidden, generator)
        # Large terms that cancel, so that the order of addition shows; other blocks stay without.
        half = y[:, : case.hidden // 2]
        large = torch.rand(half.shape, generator=generator) < 0.4
        half[large] = (2.0**24 * half[large].sign()).to(torch.bfloat16)
        y[[row for row, token in enumerate(here.token_of_row) if token is None]] = torch.nan
        ys.append(y)
    return ys


def place_y(case: Case, y: torch.Tensor, rows: ExpectedRows, recv: Received, handle: DispatchHandle) -> torch.Tensor:
    """Move the oracle's rows to where the receive has them; every other row is NaN."""
    lead = recv.x.shape[:2] if case.recv_layout == "batched" else recv.x.shape[:1]
    got_rows, want_rows = valid_rows(case, rows, handle.rows_per_expert)
    placed = torch.full((lead.numel(), case.hidden), torch.nan, dtype=torch.bfloat16)
    placed[got_rows] = y[want_rows]
    return placed.view(*lead, case.hidden).to(recv.x.device)


def expect_combined(
    case: Case,
    ys: Sequence[torch.Tensor],
    rows: Sequence[ExpectedRows],
    inputs: Inputs,
    rank: int,
    **nodes: Any,
) -> torch.Tensor:
    """Ask the oracle for the sums that come back to a rank; `nodes` as from `node_sums`."""
    return reference_exchange.combine(
        ys,
        rows,
        [len(idx) for idx in inputs.topk_idxs],
        wire=case.combine_wire or BF16,
        weighted=case.weighted,
        seed=case.seed,
        ranks=[rank],
        **nodes,
    )[0]


def node_sums(buffer: Buffer) -> dict[str, Any]:
    """Tell the oracle of which ranks the buffer's combine adds the sums before they travel, and whether rounded."""
    adds = getattr(buffer._transport, "_forwards", buffer.topology.relays)
    return {
        "ranks_per_node": buffer.topology.ranks_per_node if adds else 1,
        "rounds_inside": adds and buffer.backend == "nvshmem",
    }


def run_case(buffer: Buffer, case: Case) -> list[str]:
    """Dispatch and combine, compare both."""
    inputs = make_inputs(case, buffer.num_ranks)
    recv, handle = dispatch(buffer, case, inputs)
    problems = compare(case, recv, handle, expect(case, inputs, buffer.rank))
    if case.combine_wire is not None:
        rows = expect_rows(case, inputs)
        ys = make_ys(case, rows)
        y = place_y(case, ys[buffer.rank], rows[buffer.rank], recv, handle)
        out = buffer.combine(y, handle, weighted=case.weighted, seed=case.seed, backward=case.backward)
        sync(buffer)
        want = expect_combined(case, ys, rows, inputs, buffer.rank, **node_sums(buffer))
        if not equal_bits(out.cpu(), want):
            problems.append(f"combine {_difference(out.cpu(), want)}")
    return [f"rank {buffer.rank}: {case}: {problem}" for problem in problems]


def run_cases(rank: int, num_ranks: int, device: str, backend: str, cases: Sequence[Case]) -> list[str]:
    """Run cases on one rank, a buffer for each shape; returns what went wrong.

    On nvlink and nvshmem each runs twice: as the few tokens that they are, and as many would be.
    """
    problems = _run_cases(rank, num_ranks, device, backend, cases)
    if backend != "collective" and not problems:
        with tuning.force(decode_tokens=0):
            problems = _run_cases(rank, num_ranks, device, backend, cases)
    return problems


def _run_cases(rank: int, num_ranks: int, device: str, backend: str, cases: Sequence[Case]) -> list[str]:
    problems = []
    by_shape: dict[Any, list[Case]] = {}
    if backend == "collective":
        # It has no kernels whose SMs could be bounded.
        cases = list(dict.fromkeys(dataclasses.replace(case, num_sms=None) for case in cases))
    for case in cases:
        by_shape.setdefault(case.shape, []).append(case)
    for same in by_shape.values():
        with make_buffer(same[0], num_ranks, device, backend) as buffer:
            assert buffer.backend == backend
            assert buffer.device == device_of(device, rank)
            for case in same:
                problems += run_case(buffer, case)
    return problems


def grid(base: Case, **choices: Sequence[Any]) -> Iterator[Case]:
    """Yield every combination of the choices."""
    for values in itertools.product(*choices.values()):
        yield dataclasses.replace(base, **dict(zip(choices, values, strict=True)))


def no_problems(results: Sequence[Sequence[str]]) -> None:
    """Fail with the first of what the ranks report."""
    problems = [problem for result in results for problem in result]
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems[:20])


def works(buffer: Buffer, case: Case) -> None:
    """Require right answers of a buffer."""
    no_problems([run_case(buffer, case)])
