"""The oracle of the exchange: dispatch and combine of all ranks in one process, by plain loops.

Slow and obvious on purpose. Only the codec (`qcomm.reference`) is shared with the backends, which must give
the same bits. A static receive holds the rows of a dynamic one and differs in its unused rows alone, and the
storage of scales changes no value, so nothing here knows of either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from qcomm import reference, reference_columnwise
from qcomm.formats import BLOCK_SIZE, FP8_GROUP_SIZE, RecvDtype, RecvLayout, Rounding, WireFormat
from qcomm.records import align
from qcomm.tensors import FP8Tensor, MXFP4Tensor

Tokens = torch.Tensor | FP8Tensor | MXFP4Tensor
TokenId = tuple[int, int]
"""Source rank and source token."""
_Entries = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class ExpectedRows:
    """Which tokens one rank receives, and in which rows.

    Attributes:
        token_of_row: for each row the token in it, None for padding.
        weight_of_row: for each row its routing weight, 0 for padding; 1 where no weights were given.
        rows_of_token: for each arriving token, by source rank, then source token, its (row, weight) pairs in
            top-k order; one pair of weight 1 in the "token_major" layout.
        topk_of_token: for each arriving token the (local expert, weight) of every top-k entry, (-1, 0.0)
            where the expert is on another rank.
        tokens_per_expert: for each local expert.
        group_offsets: first row of each local expert, and the end of the last; None for "token_major".
        needed: rows a static receive needs, per expert for "batched".
    """

    token_of_row: list[TokenId | None]
    weight_of_row: list[float]
    rows_of_token: dict[TokenId, _Entries]
    topk_of_token: dict[TokenId, _Entries]
    tokens_per_expert: list[int]
    group_offsets: list[int] | None
    needed: int


@dataclasses.dataclass(frozen=True, eq=False)
class ExpectedReceived:
    """What one rank receives: fields as in `qcomm.Received`, "batched" rows flattened; `rows` says where."""

    x: torch.Tensor
    sf: torch.Tensor | None
    x_columnwise: torch.Tensor | None
    sf_columnwise: torch.Tensor | None
    weights: torch.Tensor | None
    src: torch.Tensor
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    spread_overflows: tuple[int, int]
    rows: ExpectedRows


def arrange(
    rank: int,
    topk_idxs: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor] | None,
    *,
    num_experts: int,
    recv_layout: RecvLayout = "expert_major",
    alignment: int = 128,
) -> ExpectedRows:
    """Give every token that reaches a rank its rows.

    Args:
        rank: the receiving rank.
        topk_idxs: for each rank `[num_tokens, num_topk]` experts, -1 for none.
        topk_weights: for each rank `[num_tokens, num_topk]` float32, or None.
        num_experts: experts in all.
        recv_layout: as for `Buffer.dispatch`.
        alignment: as for `Buffer.dispatch`.
    """
    num_local = num_experts // len(topk_idxs)
    arriving: dict[TokenId, _Entries] = {}
    for source, idx in enumerate(topk_idxs):
        for token, experts in enumerate(idx.tolist()):
            weights = [1.0] * len(experts) if topk_weights is None else topk_weights[source][token].tolist()
            entries = [
                (e - rank * num_local, w) if e >= 0 and e // num_local == rank else (-1, 0.0)
                for e, w in zip(experts, weights, strict=True)
            ]
            if any(e >= 0 for e, _ in entries):
                arriving[source, token] = entries
    members = [[t for t, es in arriving.items() if expert in dict(es)] for expert in range(num_local)]
    counts = [len(tokens) for tokens in members]
    if recv_layout == "token_major":
        own_row: dict[TokenId, _Entries] = {t: [(row, 1.0)] for row, t in enumerate(arriving)}
        ones = [1.0] * len(arriving)
        return ExpectedRows(list(arriving), ones, own_row, arriving, counts, None, len(arriving))
    token_of_row: list[TokenId | None] = []
    weight_of_row: list[float] = []
    row_of: dict[tuple[TokenId, int], int] = {}
    group_offsets = [0]
    for expert, tokens in enumerate(members):
        for t in tokens:
            row_of[t, expert] = len(token_of_row)
            token_of_row.append(t)
            weight_of_row.append(dict(arriving[t])[expert])
        padding = align(max(counts) if recv_layout == "batched" else len(tokens), alignment) - len(tokens)
        token_of_row += [None] * padding
        weight_of_row += [0.0] * padding
        group_offsets.append(len(token_of_row))
    rows_of_token = {t: [(row_of[t, e], w) for e, w in entries if e >= 0] for t, entries in arriving.items()}
    needed = max(counts) if recv_layout == "batched" else group_offsets[-1]
    return ExpectedRows(token_of_row, weight_of_row, rows_of_token, arriving, counts, group_offsets, needed)


def dispatch(
    xs: Sequence[Tokens],
    topk_idxs: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor] | None,
    *,
    num_experts: int,
    wire: WireFormat,
    recv_layout: RecvLayout = "expert_major",
    recv_dtype: RecvDtype = "fp8",
    alignment: int = 128,
    columnwise: bool = False,
    seed: int = 0,
    ranks: Sequence[int] | None = None,
) -> list[ExpectedReceived]:
    """Compute what the ranks receive.

    The random bits of stochastic rounding stand at row = source token, subsequence = source rank.

    Args:
        xs: for each rank its `[num_tokens, hidden]` tokens.
        topk_idxs: for each rank `[num_tokens, num_topk]` experts, -1 for none.
        topk_weights: for each rank `[num_tokens, num_topk]` float32, or None.
        num_experts: experts in all.
        wire: format the tokens travel in.
        recv_layout: as for `Buffer.dispatch`, as are the next four.
        recv_dtype: what the receivers ask for.
        alignment: multiple at which expert groups start.
        columnwise: whether the column-wise operand is wanted too.
        seed: of stochastic rounding.
        ranks: the receiving ranks to compute; None for all.
    """
    sent = [_to_wire(x, wire, seed, source, torch.arange(x.shape[0])) for source, x in enumerate(xs)]
    zero_token = torch.zeros(1, xs[0].shape[1], dtype=torch.bfloat16)
    zero = _to_wire(zero_token, WireFormat(wire.kind), 0, 0, torch.zeros(1))
    first = [sum(x.shape[0] for x in xs[:source]) for source in range(len(xs) + 1)]
    everyone = []
    for rank in range(len(xs)) if ranks is None else ranks:
        rows = arrange(
            rank,
            topk_idxs,
            topk_weights,
            num_experts=num_experts,
            recv_layout=recv_layout,
            alignment=alignment,
        )
        index = [first[-1] if t is None else first[t[0]] + t[1] for t in rows.token_of_row]
        held = _take([*sent, zero], torch.tensor(index, dtype=torch.int64), wire)
        x, sf, overflows = _convert(held, recv_dtype)
        x_columnwise = sf_columnwise = None
        overflows_columnwise = 0
        if columnwise:
            assert rows.group_offsets is not None
            if isinstance(held, MXFP4Tensor):
                x_columnwise, sf_columnwise, n = reference_columnwise.mxfp4_to_fp8_columnwise(held, rows.group_offsets)
                overflows_columnwise = int(n)
            else:
                x_columnwise, sf_columnwise = reference_columnwise.quantize_fp8_columnwise(
                    _values(held), rows.group_offsets
                )
        by_token = recv_layout == "token_major"
        shape = (len(rows.topk_of_token), topk_idxs[0].shape[1])
        topk = [entry for entries in rows.topk_of_token.values() for entry in entries]
        experts = torch.tensor([e for e, _ in topk], dtype=torch.int32).view(shape)
        weights = torch.tensor([w for _, w in topk], dtype=torch.float32).view(shape)
        src = [(-1, -1) if t is None else t for t in rows.token_of_row]
        everyone.append(
            ExpectedReceived(
                x=x,
                sf=sf,
                x_columnwise=x_columnwise,
                sf_columnwise=sf_columnwise,
                weights=None if by_token else torch.tensor(rows.weight_of_row, dtype=torch.float32),
                src=torch.tensor(src, dtype=torch.int32).view(-1, 2),
                topk_idx=experts if by_token else None,
                topk_weights=weights if by_token else None,
                spread_overflows=(overflows, overflows_columnwise),
                rows=rows,
            )
        )
    return everyone


def combine(
    ys: Sequence[torch.Tensor],
    rows: Sequence[ExpectedRows],
    nums_tokens: Sequence[int],
    *,
    wire: WireFormat,
    weighted: bool,
    seed: int = 0,
    ranks: Sequence[int] | None = None,
    ranks_per_node: int = 1,
    rounds_inside: bool = False,
) -> list[torch.Tensor]:
    """Compute the sums that come back to the tokens' ranks.

    A rank that holds rows of a token starts from zero and adds weight * row in top-k order, each product and
    each sum rounded to float32. The sum travels in the wire format, with random bits at row = source token,
    subsequence = num_ranks * (1 + source rank) + sending rank. The token's rank starts from zero, adds what
    comes by sending rank in float32, and rounds to bfloat16.

    With one rank per node the sending rank is the one that holds the rows. With more, it is the one of the source
    rank's place in its node: it starts from zero and adds the node's sums by rank, in float32. Either these come to it
    in float32; or they are rounded to the wire format before as if they went to the source, where those of the source's
    own node do go, each by itself. What other nodes send is then rounded a second time, with random bits at subsequence
    = num_ranks * (1 + num_ranks + source rank) + node.

    Args:
        ys: for each rank `[rows, hidden]` bfloat16 in the rows of its dispatch, "batched" ones flattened.
        rows: for each rank where the tokens are.
        nums_tokens: for each rank the tokens it dispatched.
        wire: format the sums travel in.
        weighted: whether to multiply by the routing weights.
        seed: of stochastic rounding.
        ranks: the tokens' ranks to compute; None for all.
        ranks_per_node: of an exchange whose sums are added in each node first; 1 of any other.
        rounds_inside: whether each rank's sums are rounded before they are added in a node, as by the nvshmem backend;
            the collective one leaves them in float32.

    Returns:
        For each of the ranks `[num_tokens, hidden]` bfloat16.
    """
    everyone = []
    for source in range(len(ys)) if ranks is None else ranks:
        out = torch.zeros(nums_tokens[source], ys[0].shape[1], dtype=torch.float32)
        for first in range(0, len(ys), ranks_per_node):
            node = range(first, first + ranks_per_node)
            parts = [_rank_sums(ys[rank], rows[rank], source, weighted) for rank in node]
            subsequence = len(ys) * (1 + source) + first + source % ranks_per_node
            if rounds_inside:
                sent = zip(node, parts, strict=True)
                parts = [_sent(sums, wire, seed, len(ys) * (1 + source) + rank) for rank, sums in sent]
                subsequence = len(ys) * (1 + len(ys) + source) + first // ranks_per_node
            if not (rounds_inside and source in node):
                parts = [_sent(_added(parts), wire, seed, subsequence)]
            for sums in parts:
                for token, value in sums.items():
                    out[token] = out[token] + value
        everyone.append(reference.to_dtype(out, torch.bfloat16))
    return everyone


def combine_difference(
    ys: Sequence[torch.Tensor],
    rows: Sequence[ExpectedRows],
    nums_tokens: Sequence[int],
    *,
    wire: WireFormat,
    weighted: bool,
    rounds_inside: bool = False,
) -> list[torch.Tensor]:
    """Bound how far a combine whose sums are added in each node first may be from one where they are not.

    Let A be the sum over the ranks of the largest magnitude of each rank's sum in a block: one element on the bf16
    wire, 128 on fp8, 32 on mxfp4. The wire rounds a block whose largest magnitude is a by at most c * a in each
    element: c is 2^-8 for bf16, 2^-4 for fp8, and for mxfp4 1/4 (half a step of 2 below 6, or saturation from below 8
    to 6, where 4 is the least that the largest magnitude may be scaled to), 1/2 with stochastic rounding (a whole
    step), times 32 under a rotation, which may gather a block in one element twice. The combine that adds nothing in
    nodes is thus within e * A of the exact sum on its wire, where e = c, plus 2^-8 * (1 + e) * A of the last rounding
    and 2^-20 * A of the additions in float32. So is the other; with e = c + c * (1 + c) where it rounds inside nodes
    too. They differ by at most both together, and 2^-120 where FP8 scales end.

    Args:
        ys: as for `combine`, as are the others.
        rows: where the tokens are.
        nums_tokens: for each rank.
        wire: format the sums travel in.
        weighted: whether to multiply by the routing weights.
        rounds_inside: whether the sums are rounded inside nodes too.

    Returns:
        For each rank `[num_tokens, hidden]` float32.
    """
    block, rounding = _wire_rounding(wire)
    both = (rounding, rounding * (2 + rounding) if rounds_inside else rounding)
    factor = sum(error + 2.0**-8 * (1 + error) + 2.0**-20 for error in both)
    everyone = []
    for source, num_tokens in enumerate(nums_tokens):
        total = torch.zeros(num_tokens, ys[0].shape[1] // block, dtype=torch.float32)
        for y, here in zip(ys, rows, strict=True):
            for token, value in _rank_sums(y, here, source, weighted).items():
                total[token] += value.abs().unflatten(0, (-1, block)).amax(-1)
        everyone.append((factor * total + 2.0**-120).repeat_interleave(block, dim=1))
    return everyone


def _wire_rounding(wire: WireFormat) -> tuple[int, float]:
    """Return the elements of a block, and what of its largest magnitude the wire may round each by."""
    if wire.kind == "bf16":
        return 1, 2.0**-8
    if wire.kind == "fp8":
        return FP8_GROUP_SIZE, 2.0**-4
    step = 0.25 if wire.rounding is Rounding.NEAREST else 0.5
    return BLOCK_SIZE, step * (BLOCK_SIZE if wire.hadamard else 1)


def _rank_sums(y: torch.Tensor, here: ExpectedRows, source: int, weighted: bool) -> dict[int, torch.Tensor]:
    """Sum the rows that one rank holds of each token of a source, in float32."""
    sums = {}
    for (of, token), entries in here.rows_of_token.items():
        if of == source:
            total = torch.zeros(y.shape[1], dtype=torch.float32)
            for row, weight in entries:
                value = y[row].to(torch.float32)
                total = total + (torch.tensor(weight, dtype=torch.float32) * value if weighted else value)
            sums[token] = total
    return sums


def _added(parts: Sequence[dict[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """Add up each token's sums, from zero, in float32."""
    added: dict[int, torch.Tensor] = {}
    for sums in parts:
        for token, total in sums.items():
            added[token] = added.get(token, torch.zeros_like(total)) + total
    return added


def _sent(sums: dict[int, torch.Tensor], wire: WireFormat, seed: int, subsequence: int) -> dict[int, torch.Tensor]:
    """Return what arrives of each token's sum."""
    if not sums:
        return {}
    came = _to_wire(torch.stack(list(sums.values())), wire, seed, subsequence, torch.tensor(list(sums)))
    return dict(zip(sums, _values(came), strict=True))


def _to_wire(x: Tokens, wire: WireFormat, seed: int, subsequence: int, tokens: torch.Tensor) -> Tokens:
    """Encode `[num_tokens, hidden]`; what is in the wire's format already stays as it is."""
    if wire.kind == "bf16":
        assert isinstance(x, torch.Tensor)
        return x if x.dtype == torch.bfloat16 else reference.to_dtype(x, torch.bfloat16)
    if isinstance(x, MXFP4Tensor) or (wire.kind == "fp8" and isinstance(x, FP8Tensor)):
        return x
    if wire.kind == "fp8":
        assert isinstance(x, torch.Tensor)
        return reference.quantize_fp8(x)
    return reference.quantize_mxfp4(
        x,
        wire.scale_rule,
        wire.rounding,
        seed=seed,
        subsequence=subsequence,
        rows=tokens,
        hadamard=wire.hadamard,
    )


def _values(x: Tokens) -> torch.Tensor:
    """Decode to float32."""
    if isinstance(x, MXFP4Tensor):
        return reference.dequantize_mxfp4(x)
    return reference.dequantize_fp8(x) if isinstance(x, FP8Tensor) else x.to(torch.float32)


def _take(xs: Sequence[Tokens], index: torch.Tensor, wire: WireFormat) -> Tokens:
    """Take rows of the concatenation."""
    if wire.kind == "bf16":
        return torch.cat([x for x in xs if isinstance(x, torch.Tensor)])[index]
    if wire.kind == "fp8":
        pairs = [x for x in xs if isinstance(x, FP8Tensor)]
        return FP8Tensor(torch.cat([x.data for x in pairs])[index], torch.cat([x.sf for x in pairs])[index])
    packed = [x for x in xs if isinstance(x, MXFP4Tensor)]
    qdata, sf = torch.cat([x.qdata for x in packed]), torch.cat([x.sf for x in packed])
    return MXFP4Tensor(qdata[index], sf[index], wire.hadamard)


def _convert(held: Tokens, dtype: RecvDtype) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Turn rows as they travelled into what the receiver asked for: data, scales, spread overflows."""
    if dtype == "bf16":
        if isinstance(held, torch.Tensor):
            return held, None, 0
        return reference.to_dtype(_values(held), torch.bfloat16), None, 0
    if dtype == "mxfp4":
        packed = held if isinstance(held, MXFP4Tensor) else reference.quantize_mxfp4(held)
        return packed.qdata, packed.sf, 0
    if isinstance(held, MXFP4Tensor):
        aligned, overflows = reference.mxfp4_to_fp8(held)
        return aligned.data, aligned.sf, int(overflows)
    fp8 = held if isinstance(held, FP8Tensor) else reference.quantize_fp8(held)
    return fp8.data, fp8.sf, 0
