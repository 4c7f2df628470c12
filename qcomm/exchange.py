"""What dispatch and combine compute on either side of the wire, in plain vectorised PyTorch.

The collective transport is these functions around an all-to-all; the CUDA kernels must give the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qcomm import reference, reference_columnwise
from qcomm.formats import WireFormat
from qcomm.options import DispatchOptions
from qcomm.records import MetadataLayout, RecordLayout, align
from qcomm.tensors import FP8Tensor, MXFP4Tensor, empty_scales

WireInput = torch.Tensor | FP8Tensor | MXFP4Tensor
_ROWS_AT_ONCE = 1 << 13
"""Rows that are converted together, for the oracle needs some 50 bytes an element meanwhile."""


class Sums(NamedTuple):
    """The result of a combine.

    Attributes:
        out: `[num_tokens, hidden]` bfloat16.
        values: `[num_tokens, num_topk]` float32: the numbers of each token's rows, which came along unrounded; None if
            none were given.
    """

    out: torch.Tensor
    values: torch.Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """Where a rank's tokens go.

    Attributes:
        topk_idx: `[num_tokens, num_topk]` int64, -1 for none.
        send_slot: `[num_tokens, num_ranks]` int32: number of earlier tokens that go to that rank, -1 if it does not.
        ordinal: `[num_tokens, num_topk]` int64: number of earlier tokens that go to the same expert.
        tokens_per_rank: `[num_ranks]` int64.
        tokens_per_expert: `[num_experts]` int64.
    """

    topk_idx: torch.Tensor
    send_slot: torch.Tensor
    ordinal: torch.Tensor
    tokens_per_rank: torch.Tensor
    tokens_per_expert: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Where a rank's incoming records go; fields as in DispatchHandle."""

    record_rows: torch.Tensor
    row_record: torch.Tensor
    row_src: torch.Tensor
    row_weights: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    group_offsets: torch.Tensor | None
    rows_needed: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Payload:
    """Received rows in their final layout; fields as in Received."""

    x: torch.Tensor
    sf: torch.Tensor | None
    x_columnwise: torch.Tensor | None
    sf_columnwise: torch.Tensor | None
    spread_overflows: torch.Tensor


def bad_routes(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Tell for each token whether it names an expert out of range, or one twice: `[num_tokens]` bool."""
    outside = ((topk_idx < -1) | (topk_idx >= num_experts)).any(1)
    ordered = topk_idx.sort(dim=1).values
    return outside | ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)


def describe_bad_route(token: int, ids: list[int], num_experts: int) -> str:
    """Say what is wrong with one token's expert ids."""
    if all(-1 <= i < num_experts for i in ids):
        return f"topk_idx[{token}] must hold distinct experts, got {ids}"
    return f"topk_idx[{token}] must hold expert ids in [-1, {num_experts}), got {ids}"


def route(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> Routing:
    """Number every token within its destination ranks and experts, in token order."""
    idx = topk_idx.to(torch.int64)
    num_tokens = idx.shape[0]
    member = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=idx.device)
    member.scatter_(1, torch.where(idx >= 0, idx, num_experts), True)
    member = member[:, :num_experts]
    expert_count = member.cumsum(0)
    ordinal = expert_count.gather(1, idx.clamp(min=0)) - 1
    to_rank = member.unflatten(1, (num_ranks, -1)).any(-1)
    return Routing(
        topk_idx=idx,
        send_slot=number(to_rank),
        ordinal=ordinal,
        tokens_per_rank=to_rank.sum(0),
        tokens_per_expert=member.sum(0),
    )


def number(goes: torch.Tensor) -> torch.Tensor:
    """Number the rows that go to each peer, in order: `[num_rows, num_peers]` bool to int32, -1 for the others."""
    return torch.where(goes, goes.cumsum(0) - 1, -1).to(torch.int32)


def tokens_by_slot(send_slot: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Invert `send_slot`: the token in each rank's slots, `[num_ranks, num_slots]` int64, -1 past the last."""
    num_tokens, num_ranks = send_slot.shape
    tokens = torch.full((num_ranks, num_slots + 1), -1, dtype=torch.int64, device=send_slot.device)
    slots = torch.where(send_slot >= 0, send_slot, num_slots).to(torch.int64)
    source = torch.arange(num_tokens, device=send_slot.device).expand(num_ranks, -1)
    return tokens.scatter_(1, slots.t(), source)[:, :num_slots]


def metadata(
    routing: Routing,
    topk_weights: torch.Tensor | None,
    tokens: torch.Tensor,
    rank: int,
    num_local_experts: int,
) -> torch.Tensor:
    """Build the metadata words of the given tokens' records for one destination rank; all -1 for token -1."""
    layout = MetadataLayout(routing.topk_idx.shape[1])
    words = torch.full((len(tokens), layout.num_words), -1, dtype=torch.int32, device=tokens.device)
    if not len(routing.topk_idx):
        return words
    idx = routing.topk_idx[tokens]
    local = (idx >= 0) & (torch.div(idx, num_local_experts, rounding_mode="floor") == rank)
    words[:, 0] = tokens.to(torch.int32)
    words[:, layout.expert] = torch.where(local, idx - rank * num_local_experts, -1).to(torch.int32)
    words[:, layout.ordinal] = torch.where(local, routing.ordinal[tokens], 0).to(torch.int32)
    weights = local.to(torch.float32) if topk_weights is None else torch.where(local, topk_weights[tokens], 0.0)
    words[:, layout.weight] = weights.view(torch.int32)
    return torch.where(tokens[:, None] >= 0, words, -1)


def narrow_metadata(
    words: torch.Tensor, rows: torch.Tensor, num_topk: int, rank: int, num_local_experts: int
) -> torch.Tensor:
    """Build the metadata of one rank of a node from that of the node, for the given rows of it; all -1 for row -1."""
    layout = MetadataLayout(num_topk)
    if not len(words):
        return words.new_full((len(rows), words.shape[1]), -1)
    narrow = words[rows]
    experts = narrow[:, layout.expert]
    local = (experts >= 0) & (torch.div(experts, num_local_experts, rounding_mode="floor") == rank)
    narrow[:, layout.expert] = torch.where(local, experts - rank * num_local_experts, -1)
    for part in (layout.ordinal, layout.weight):
        narrow[:, part] = torch.where(local, narrow[:, part], 0)
    return torch.where(rows[:, None] >= 0, narrow, -1)


def group_of(offsets: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return for each of the rows the group that it is in, which begin at `offsets`: `[num_rows]` int64."""
    ends = offsets[1:].to(torch.int64).contiguous()
    return torch.searchsorted(ends, torch.arange(num_rows, device=offsets.device), right=True)


def place(
    words: torch.Tensor,
    num_topk: int,
    record_src: torch.Tensor,
    counts: torch.Tensor,
    options: DispatchOptions,
    num_rows: int,
    rows_per_expert: int,
) -> Placement:
    """Assign rows to records: by expert, then source rank, then source token.

    Args:
        words: `[records, num_words]` int32 metadata; records that hold no token have experts of -1.
        num_topk: entries in the metadata.
        record_src: `[records]` int64 source rank, -1 for no token.
        counts: `[num_ranks, num_local_experts]` int64 tokens from each rank for each local expert.
        options: the call's options.
        num_rows: rows there are.
        rows_per_expert: rows per expert in the "batched" layout.
    """
    layout = MetadataLayout(num_topk)
    experts = words[:, layout.expert].to(torch.int64)
    num_records = len(words)
    totals = counts.sum(0)
    device = words.device
    if options.recv_layout == "token_major":
        rows = torch.where(record_src >= 0, torch.arange(num_records, device=device), -1)[:, None]
        needed = (record_src >= 0).sum()
        starts = None
    else:
        if options.recv_layout == "batched":
            starts = torch.arange(len(totals) + 1, device=device) * rows_per_expert
            limit, needed = starts[1:], totals.max()
        else:
            padded = (
                torch.div(totals + options.alignment - 1, options.alignment, rounding_mode="floor") * options.alignment
            )
            starts = torch.cat((padded.new_zeros(1), padded.cumsum(0)))
            limit, needed = torch.full_like(totals, num_rows), starts[-1]
        before = counts.cumsum(0) - counts
        local = experts.clamp(min=0)
        rows = starts[local] + before[record_src.clamp(min=0)[:, None], local] + words[:, layout.ordinal]
        rows = torch.where((experts >= 0) & (rows < limit[local]), rows, -1)
        totals = torch.minimum(totals, (limit - starts[:-1]).clamp(min=0))
        starts = starts.clamp(max=num_rows).to(torch.int32)
    rows = torch.where(rows < num_rows, rows, -1)
    spill = torch.where(rows >= 0, rows, num_rows)
    src = torch.full((num_rows + 1, 2), -1, dtype=torch.int32, device=device)
    source = torch.stack((record_src.to(torch.int32), words[:, 0]), dim=1)
    src[spill.flatten()] = source.repeat_interleave(rows.shape[1], dim=0)
    row_record = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=device)
    numbers = torch.arange(num_records, dtype=torch.int32, device=device)
    row_record[spill.flatten()] = numbers.repeat_interleave(rows.shape[1])
    weights = None
    if options.recv_layout != "token_major":
        weights = torch.zeros(num_rows + 1, dtype=torch.float32, device=device)
        weights[spill.flatten()] = words[:, layout.weight].contiguous().view(torch.float32).flatten()
        weights = weights[:num_rows]
    return Placement(
        record_rows=rows.to(torch.int32),
        row_record=row_record[:num_rows],
        row_src=src[:num_rows],
        row_weights=weights,
        num_tokens_per_expert=totals.to(torch.int32),
        group_offsets=starts,
        rows_needed=needed,
    )


def encode_wire(
    x: WireInput,
    wire: WireFormat,
    seed: int = 0,
    subsequence: int | torch.Tensor = 0,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encode rows as records of the wire format.

    Args:
        x: `[num_tokens, hidden]` bfloat16 or float32, or quantized for its own wire, or FP8Tensor for mxfp4.
        wire: the format.
        seed: as for `reference.quantize_mxfp4`, and so are the next two.
        subsequence: keeps users of one seed apart.
        rows: row numbers for the random bits.

    Returns:
        `[num_tokens, RecordLayout.num_bytes]` uint8.
    """
    num_tokens, hidden = x.shape
    layout = RecordLayout(wire.kind, hidden)
    records = torch.zeros(num_tokens, layout.num_bytes, dtype=torch.uint8, device=x.device)
    if wire.kind == "bf16":
        assert isinstance(x, torch.Tensor)
        data = x if x.dtype == torch.bfloat16 else reference.to_dtype(x, torch.bfloat16)
        records[:, : layout.data_bytes] = _bytes(data)
        return records
    if wire.kind == "fp8":
        assert not isinstance(x, MXFP4Tensor)
        quantized = x if isinstance(x, FP8Tensor) else reference.quantize_fp8(x)
        data, sf = quantized.data, quantized.sf
    elif isinstance(x, MXFP4Tensor):
        data, sf = x.qdata, x.sf
    else:
        packed = reference.quantize_mxfp4(
            x,
            wire.scale_rule,
            wire.rounding,
            seed=seed,
            subsequence=subsequence,
            rows=rows,
            hadamard=wire.hadamard,
        )
        data, sf = packed.qdata, packed.sf
    records[:, : layout.data_bytes] = _bytes(data)
    records[:, layout.data_bytes : layout.data_bytes + layout.sf_bytes] = _bytes(sf)
    return records


def view_wire(records: torch.Tensor, wire: WireFormat, hidden: int) -> WireInput:
    """Give records back as the tensor they hold."""
    layout = RecordLayout(wire.kind, hidden)
    data = records[:, : layout.data_bytes]
    sf = records[:, layout.data_bytes : layout.data_bytes + layout.sf_bytes]
    if wire.kind == "bf16":
        return data.contiguous().view(torch.bfloat16)
    if wire.kind == "fp8":
        return FP8Tensor(data.contiguous().view(torch.float8_e4m3fn), sf.contiguous().view(torch.float32))
    return MXFP4Tensor(data.contiguous(), sf.contiguous(), wire.hadamard)


def decode_wire(records: torch.Tensor, wire: WireFormat, hidden: int) -> torch.Tensor:
    """Decode records to `[num_records, hidden]` float32."""
    x = view_wire(records, wire, hidden)
    if isinstance(x, MXFP4Tensor):
        return reference.dequantize_mxfp4(x)
    return reference.dequantize_fp8(x) if isinstance(x, FP8Tensor) else x.to(torch.float32)


def lay_out(
    records: torch.Tensor,
    placement_rows: torch.Tensor,
    num_rows: int,
    group_offsets: torch.Tensor | None,
    hidden: int,
    options: DispatchOptions,
) -> Payload:
    """Write every record into its rows and convert to what the receiver asked for.

    Args:
        records: `[records, num_bytes]` uint8.
        placement_rows: `[records, width]` int32, -1 for none.
        num_rows: rows there are; those no record fills hold a zero token.
        group_offsets: needed for columnwise (its values are read on the host then).
        hidden: elements in a token.
        options: the call's options.
    """
    wire = options.wire
    padding = encode_wire(torch.zeros(1, hidden, dtype=torch.bfloat16, device=records.device), WireFormat(wire.kind))
    rows = padding.repeat(num_rows + 1, 1)
    index = torch.where(placement_rows >= 0, placement_rows, num_rows).to(torch.int64).flatten()
    rows[index] = records.repeat_interleave(placement_rows.shape[1], dim=0)
    held = view_wire(rows[:num_rows], wire, hidden)
    overflows = [torch.zeros((), dtype=torch.int64, device=records.device)] * 2
    x, sf, overflows[0] = _convert(held, options, overflows[0])
    x_columnwise = sf_columnwise = None
    if options.columnwise:
        assert group_offsets is not None
        offsets = [int(offset) for offset in group_offsets]
        x_columnwise, sf_columnwise, overflows[1] = _convert_columnwise(held, offsets, overflows[1])
    return Payload(x, sf, x_columnwise, sf_columnwise, torch.stack(overflows))


def record_values(row_values: torch.Tensor, handle_rows: torch.Tensor) -> torch.Tensor:
    """Gather the numbers of each record's rows.

    Args:
        row_values: `[rows]` float32; `[rows, num_topk]` in the "token_major" layout.
        handle_rows: `[records, width]` int32, -1 for none.

    Returns:
        `[records, num_topk]` float32, 0 where there is no row.
    """
    rows = handle_rows.to(torch.int64)
    if row_values.dim() > 1:
        rows = rows[:, 0]
    if not row_values.shape[0]:
        return row_values.new_zeros((*rows.shape, *row_values.shape[1:]))
    there = (rows >= 0).view(*rows.shape, *(1,) * (row_values.dim() - 1))
    return torch.where(there, row_values[rows.clamp(min=0)], 0.0)


def partial_sums(y: torch.Tensor, handle_rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Sum each record's rows in float32, from zero, in top-k order; products and sums rounded one by one.

    Args:
        y: `[rows, hidden]` bfloat16.
        handle_rows: `[records, width]` int32, -1 for none.
        weights: `[records, width]` float32, or None for a plain sum.

    Returns:
        `[records, hidden]` float32.
    """
    total = torch.zeros(handle_rows.shape[0], y.shape[1], dtype=torch.float32, device=y.device)
    if not y.shape[0]:
        return total
    for j in range(handle_rows.shape[1]):
        rows = handle_rows[:, j].to(torch.int64)
        term = y[rows.clamp(min=0)].to(torch.float32)
        if weights is not None:
            term = weights[:, j, None] * term
        total = torch.where(rows[:, None] >= 0, total + term, total)
    return total


def sum_parts(parts: Sequence[torch.Tensor], slot: torch.Tensor, width: int) -> torch.Tensor:
    """Sum for each row what the peers of a hop hold for it, from zero, in the order of the peers, in float32.

    Args:
        parts: for each peer `[slots, width]` float32.
        slot: `[num_rows, num_peers]` int32 place of the row among a peer's, -1 where that holds nothing.
        width: elements in a row.

    Returns:
        `[num_rows, width]` float32.
    """
    total = torch.zeros(slot.shape[0], width, dtype=torch.float32, device=slot.device)
    for peer, part in enumerate(parts):
        at = slot[:, peer].to(torch.int64)
        if part.shape[0]:
            total = torch.where(at[:, None] >= 0, total + part[at.clamp(min=0)], total)
    return total


def combine_subsequence(source: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """Keep the random bits of combine apart by sender and destination, and from those of dispatch."""
    return num_ranks * (1 + source) + rank


def worst_case_rows(
    options: DispatchOptions, num_records: int, num_topk: int, num_local_experts: int
) -> tuple[int, int]:
    """Return the rows a static receive may need with `num_records` arriving tokens, and the rows per expert."""
    if options.recv_layout == "token_major":
        return options.capacity if options.capacity is not None else num_records, 0
    if options.recv_layout == "batched":
        each = options.capacity if options.capacity is not None else align(num_records, options.alignment)
        return each * num_local_experts, each
    if options.capacity is not None:
        return options.capacity, 0
    filled = num_records * min(num_topk, num_local_experts)
    groups = min(num_local_experts, filled)
    return align(filled + groups * (options.alignment - 1), options.alignment), 0


def exact_rows(options: DispatchOptions, num_records: int, tokens_per_expert: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows a receive of known counts needs, and the rows per expert of the "batched" layout."""
    if options.recv_layout == "token_major":
        return num_records, 0
    if options.recv_layout == "batched":
        each = align(max(tokens_per_expert), options.alignment)
        return each * len(tokens_per_expert), each
    return sum(align(count, options.alignment) for count in tokens_per_expert), 0


def _bytes(x: torch.Tensor) -> torch.Tensor:
    # A contiguous tensor of one column or no row may have odd strides, through which torch views no other type.
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _rows(x: WireInput, begin: int, end: int) -> WireInput:
    if isinstance(x, FP8Tensor):
        return FP8Tensor(x.data[begin:end], x.sf[begin:end])
    if isinstance(x, MXFP4Tensor):
        return MXFP4Tensor(x.qdata[begin:end], x.sf[begin:end], x.hadamard)
    return x[begin:end]


def _convert(
    held: WireInput, options: DispatchOptions, none: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Convert rows, some at once; returns data, scales, and the number of spread overflows."""
    num_rows = held.shape[0]
    begins = range(0, max(num_rows, 1), _ROWS_AT_ONCE)
    pieces = [_convert_some(_rows(held, begin, begin + _ROWS_AT_ONCE), options, none) for begin in begins]
    data, scales, overflows = zip(*pieces, strict=True)
    sf = None if scales[0] is None else _joined(scales)
    if sf is not None and options.recv_dtype == "fp8":
        sf = empty_scales(num_rows, sf.shape[1], options.sf_layout, sf.device).copy_(sf)
    return _joined(data), sf, sum(overflows, none)


def _convert_columnwise(
    held: WireInput, offsets: list[int], none: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Transpose groups of rows, some at once; returns data, scales, and the number of spread overflows."""
    pieces, first = [], 0
    for last in range(1, len(offsets)):
        if last + 1 < len(offsets) and offsets[last + 1] - offsets[first] <= _ROWS_AT_ONCE:
            continue
        some, own = _rows(held, offsets[first], offsets[last]), [o - offsets[first] for o in offsets[first : last + 1]]
        if isinstance(some, MXFP4Tensor):
            pieces.append(reference_columnwise.mxfp4_to_fp8_columnwise(some, own))
        else:
            values = reference.dequantize_fp8(some) if isinstance(some, FP8Tensor) else some
            pieces.append((*reference_columnwise.quantize_fp8_columnwise(values, own), none))
        first = last
    data, scales, overflows = zip(*pieces, strict=True)
    return _joined(data), _joined(scales), sum(overflows, none)


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([_bytes(piece) for piece in pieces]).view(pieces[0].dtype)


def _convert_some(
    held: WireInput, options: DispatchOptions, none: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    overflows = none
    if options.recv_dtype == "bf16":
        if isinstance(held, MXFP4Tensor):
            return reference.dequantize_mxfp4(held, torch.bfloat16), None, none
        return (
            (reference.dequantize_fp8(held, torch.bfloat16) if isinstance(held, FP8Tensor) else held),
            None,
            none,
        )
    if options.recv_dtype == "mxfp4":
        packed = held if isinstance(held, MXFP4Tensor) else reference.quantize_mxfp4(held)
        return packed.qdata, packed.sf, none
    if isinstance(held, MXFP4Tensor):
        fp8, overflows = reference.mxfp4_to_fp8(held)
    else:
        fp8 = held if isinstance(held, FP8Tensor) else reference.quantize_fp8(held)
    return fp8.data, fp8.sf, overflows
