"""What a user of DeepEP would run instead, where it is installed.

DEEPEP. The normal-mode kernels of DeepEP 1.x for one host, with the configuration and as many SMs as it takes by
itself. `deep_ep` routes, waits on the host for the counts, and moves each token once to each rank that holds any of
its experts; `deep_ep cached` follows the route of a handle. Tokens come packed by rank, as in "token_major", and are
not converted: FP8 has its scales beside it, "mxfp4 bytes" are rows of as many bytes as an MXFP4 record, of which DeepEP
knows nothing. They are quantized before the clock starts, and nothing is dequantized after it. Its combine adds up BF16
sums that are ready. What came is compared with what was sent first, in any order of rows.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import harness
import torch
from baselines import Traffic
from workload import Workload

from qcomm.config import Member
from qcomm.formats import FP8_GROUP_SIZE, WireKind
from qcomm.records import RecordLayout, align

NAME = "deep_ep"
_NUM_RANKS = (2, 4, 8)
_ROW_BYTES = 32
"""DeepEP moves either half of a row by itself, in vectors of 16 bytes."""
_ROWS_AT_ONCE = 1024

Payload = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def obstacle(member: Member) -> str | None:
    """Say why this rank cannot run DeepEP, None if it can."""
    try:
        found = importlib.import_module(NAME)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == NAME else f"cannot be imported: {error}"
    except ImportError as error:
        return f"cannot be imported: {error}"
    if not hasattr(found, "Buffer"):
        return f"has no Buffer, version {getattr(found, '__version__', 'unknown')}"
    if member.device.type != "cuda":
        return f"runs on GPUs, not on {member.device}"
    if member.num_ranks not in _NUM_RANKS:
        return f"takes {', '.join(map(str, _NUM_RANKS))} ranks of a host, not {member.num_ranks}"
    return None


def dispatch(work: Workload, traffic: Traffic, clock: harness.Clock) -> list[harness.Row]:
    """Check and time dispatch of FP8, and of rows as large as MXFP4 records. Collective.

    Raises:
        harness.MismatchError: some rank received what was not sent to it.
    """
    exchange = _Exchange(work)
    kinds: tuple[tuple[str, WireKind, Payload], ...] = (
        ("fp8", "fp8", _fp8(work)),
        ("mxfp4 bytes", "mxfp4", _opaque(work)),
    )
    rows = []
    for wire, kind, payload in kinds:
        routed = functools.partial(exchange.dispatch, payload)
        cached = functools.partial(exchange.replay, payload, routed()[4])
        sent = _sent_here(work, payload)
        problems = []
        for name, call in (("deep_ep", routed), ("deep_ep cached", cached)):
            if not torch.equal(_digests(call()[0]).sort().values.cpu(), sent):
                problems.append(f"{name}, wire {wire}: rows are not those that were sent")
        harness.require_equal(work.member, problems)
        record_bytes = RecordLayout(kind, work.geometry.hidden).num_bytes
        for name, call in (("deep_ep", routed), ("deep_ep cached", cached)):
            timing = clock.time(call)
            rows.append(harness.Row(name, wire, "-", timing, record_bytes, traffic.remote_out, traffic.remote_in))
    return rows


def combine(work: Workload, traffic: Traffic, clock: harness.Clock) -> list[harness.Row]:
    """Check and time combine in BF16. Collective.

    Raises:
        harness.MismatchError: some rank's sums are wrong.
    """
    exchange, payload = _Exchange(work), _fp8(work)
    came = exchange.dispatch(payload)
    y, handle = came[0][0].to(torch.bfloat16), came[4]
    # Every rank that had a token gives it back as it came, so the sum is a multiple of it, rounded once.
    want = payload[0].float() * _ranks_of(work).sum(dim=1, keepdim=True)
    right = torch.equal(exchange.combine(y, handle)[0], want.to(torch.bfloat16))
    harness.require_equal(work.member, [] if right else [f"{NAME}, combine: sums are not those of what was sent"])
    timing = clock.time(lambda: exchange.combine(y, handle))
    record_bytes = RecordLayout("bf16", work.geometry.hidden).num_bytes
    return [harness.Row(NAME, "bf16", "-", timing, record_bytes, traffic.remote_in, traffic.remote_out)]


class _Exchange:
    """A buffer of DeepEP for one workload. Collective to make and to let go of."""

    def __init__(self, work: Workload) -> None:
        deep_ep: Any = importlib.import_module(NAME)
        member, self._work = work.member, work
        configs = [
            get(member.num_ranks) for get in (deep_ep.Buffer.get_dispatch_config, deep_ep.Buffer.get_combine_config)
        ]
        hints = [config.get_nvl_buffer_size_hint(2 * work.geometry.hidden, member.num_ranks) for config in configs]
        self._buffer = deep_ep.Buffer(member.group, max(hints), 0)
        self._topk_idx = work.topk_idx.to(getattr(deep_ep, "topk_idx_t", torch.int64))

    def dispatch(self, payload: Payload) -> Any:
        per_rank, _, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(
            self._topk_idx, self._work.geometry.experts
        )
        return self._buffer.dispatch(
            payload,
            topk_idx=self._topk_idx,
            topk_weights=self._work.topk_weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )

    def replay(self, payload: Payload, handle: object) -> Any:
        return self._buffer.dispatch(payload, handle=handle)

    def combine(self, y: torch.Tensor, handle: object) -> Any:
        return self._buffer.combine(y, handle)


def _fp8(work: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """Make FP8 tokens, and scales of which nobody asks whether they are theirs."""
    scales = torch.rand(work.geometry.tokens, work.geometry.hidden // FP8_GROUP_SIZE, device=work.member.device)
    return work.x.to(torch.float8_e4m3fn), scales


def _opaque(work: Workload) -> torch.Tensor:
    num_bytes = align(RecordLayout("mxfp4", work.geometry.hidden).num_bytes, _ROW_BYTES)
    shape = work.geometry.tokens, num_bytes
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=work.member.device)


def _ranks_of(work: Workload) -> torch.Tensor:
    """Tell which ranks a token goes to: `[tokens, num_ranks]` bool."""
    ranks = torch.arange(work.member.num_ranks, device=work.member.device)
    # Of an expert below zero, which is none, the quotient is below zero too.
    rank_of = work.topk_idx // (work.geometry.experts // work.member.num_ranks)
    return (rank_of[:, :, None] == ranks).any(dim=1)


def _sent_here(work: Workload, payload: Payload) -> torch.Tensor:
    """Return the digests of all rows sent to this rank, sorted. Collective."""
    everyone = harness.gather(work.member, (_digests(payload).cpu(), _ranks_of(work).cpu()))
    return torch.cat([digests[to[:, work.member.rank]] for digests, to in everyone]).sort().values


def _digests(payload: Payload) -> torch.Tensor:
    """Sum each row's bytes, each with a factor of its own, into an int64."""
    parts: Sequence[torch.Tensor] = payload if isinstance(payload, tuple) else (payload,)
    total = torch.zeros(len(parts[0]), dtype=torch.int64, device=parts[0].device)
    for number, part in enumerate(parts, 1):
        rows = part.contiguous().view(torch.uint8)
        factors = torch.arange(1, rows.shape[1] + 1, device=rows.device) * (0x9E3779B1 * number) % 2**31
        total += torch.cat([(some.to(torch.int64) * factors).sum(dim=1) for some in rows.split(_ROWS_AT_ONCE)])
    return total
