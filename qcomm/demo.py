"""`python -m qcomm demo`: an MoE layer over real text, once per wire format; under mpirun or by itself."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from qcomm import resources
from qcomm.bootstrap import Launch, process_group
from qcomm.buffer import Buffer
from qcomm.formats import WIRE_KINDS, WireKind, WirePrecision
from qcomm.handle import DispatchHandle
from qcomm.moe import MoEConfig, MoELayer
from qcomm.records import MetadataLayout, RecordLayout
from qcomm.table import format_table

_SEED = 7
_WARM_RUNS = 2
_TIMED_RUNS = 7
_CONTEXT_BYTES = 8
_HEADERS = (
    "wire",
    "bytes/token",
    "metadata/token",
    "KiB sent by rank",
    "relative error",
    "dispatch ms",
    "combine ms",
    "tokens per expert",
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the demo; `tokens` is the most a rank takes."""

    hidden: int
    tokens: int
    experts: int
    topk: int
    intermediate: int


_CPU_SIZES = Sizes(hidden=512, tokens=384, experts=32, topk=4, intermediate=256)
_CUDA_SIZES = Sizes(hidden=7168, tokens=4096, experts=256, topk=8, intermediate=256)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What one rank measured on one wire."""

    sent_bytes: int
    tokens_per_expert: tuple[int, ...]
    squared_error: float
    squared_reference: float
    dispatch_ms: float
    combine_ms: float


def run(chosen: Mapping[str, int | None]) -> None:
    """Run the layer on every wire and print, from rank 0, one table and the backend. Collective.

    Args:
        chosen: sizes by their names in Sizes; those absent or None suit the device.
    """
    with process_group() as launch:
        device = launch.device
        if device.type == "cpu":
            torch.set_num_threads(1)
        sizes = dataclasses.replace(
            _CUDA_SIZES if device.type == "cuda" else _CPU_SIZES,
            **{name: size for name, size in chosen.items() if size is not None},
        )
        with torch.no_grad():
            report = _run(sizes, launch, device)
        if launch.rank == 0:
            print(report, flush=True)


def read_text() -> bytes:
    """Return the text the demo embeds: a checkout's documentation, and the package's own source."""
    package = Path(__file__).resolve().parent
    paths = sorted(package.rglob("*.py"))
    checkout = resources.checkout()
    if checkout is not None:
        paths = [*sorted(checkout.glob("*.md")), *sorted((checkout / "docs").glob("*.md")), *paths]
    return b"\n".join(path.read_bytes() for path in paths)


def embed(text: bytes, start: int, count: int, hidden: int, device: torch.device) -> torch.Tensor:
    """Turn bytes into hidden states that look like activations.

    A token is a fading mixture of the embeddings of its byte and the bytes before it, each seen through signs
    that depend on its distance, then normalised by RMSNorm with a gain in which some channels stand out.

    Args:
        text: read as if it repeated for ever.
        start: first byte that becomes a token.
        count: how many do.
        hidden: elements in a token.
        device: where the result lives.

    Returns:
        `[count, hidden]` bfloat16.
    """
    generator = torch.Generator().manual_seed(_SEED)
    table = torch.randn(256, hidden, generator=generator)
    signs = torch.randint(0, 2, (_CONTEXT_BYTES, hidden), generator=generator) * 2.0 - 1.0
    gain = torch.exp(0.5 * torch.randn(hidden, generator=generator))
    table, signs, gain = table.to(device), signs.to(device), gain.to(device)
    ids = torch.tensor(list(text), device=device)
    position = torch.arange(start, start + count, device=device)
    mixed = torch.zeros(count, hidden, device=device)
    for distance in range(_CONTEXT_BYTES):
        mixed += 0.7**distance * signs[distance] * table[ids[(position - distance) % len(ids)]]
    return F.rms_norm(mixed, (hidden,), gain).to(torch.bfloat16)


def tokens_of(rank: int, num_ranks: int, most: int) -> int:
    """Return how many tokens a rank takes: `most` on rank 0, then ever fewer, above half on the last."""
    return most - rank * most // (2 * num_ranks)


def _run(sizes: Sizes, launch: Launch, device: torch.device) -> str:
    rank, num_ranks = launch.rank, launch.num_ranks
    config = MoEConfig(
        hidden=sizes.hidden,
        intermediate=sizes.intermediate,
        num_experts=sizes.experts,
        num_topk=sizes.topk,
        routed_scaling_factor=2.5,
    )
    layer = MoELayer(config, rank=rank, num_ranks=num_ranks, seed=_SEED, device=device)
    text = read_text()
    count = tokens_of(rank, num_ranks, sizes.tokens)
    x = embed(text, len(text) * rank // num_ranks, count, sizes.hidden, device)
    expected = MoELayer(config, seed=_SEED, device=device).forward_local(x)

    rows, backend = [], ""
    for wire in WIRE_KINDS:
        with Buffer(
            num_experts=sizes.experts,
            num_topk=sizes.topk,
            hidden=sizes.hidden,
            num_max_tokens_per_rank=sizes.tokens,
            precision=WirePrecision(dispatch_fwd=wire, combine_fwd="bf16"),
            device=device,
        ) as buffer:
            gathered: list[_Measured | None] = [None] * num_ranks
            dist.all_gather_object(gathered, _measure(layer, x, expected, buffer, wire))
            rows.append(_row(wire, sizes, [measured for measured in gathered if measured is not None]))
            backend = f"backend {buffer.backend}: {buffer.backend_reason}"
    counts = "/".join(str(tokens_of(r, num_ranks, sizes.tokens)) for r in range(num_ranks))
    title = (
        f"{num_ranks} ranks on {device.type}, {counts} tokens of {sizes.hidden}, "
        f"top-{sizes.topk} of {sizes.experts} experts\n"
        "sent: by one dispatch to other ranks, min/mean/max; error: of the layer's output; "
        "ms: p50 of the slowest rank"
    )
    return f"{title}\n\n{format_table(_HEADERS, rows)}\n\n{backend}"


def _measure(layer: MoELayer, x: torch.Tensor, expected: torch.Tensor, buffer: Buffer, wire: WireKind) -> _Measured:
    topk_idx, topk_weights = layer.router(x)
    recv, handle = buffer.dispatch(x, topk_idx, topk_weights)
    y = layer.experts(recv)
    error = layer(x, buffer).to(torch.float64) - expected.to(torch.float64)
    return _Measured(
        sent_bytes=_sent_bytes(handle, buffer, wire, x.shape[1], topk_idx.shape[1]),
        tokens_per_expert=recv.num_tokens_per_expert_list or tuple(recv.num_tokens_per_expert.tolist()),
        squared_error=float(error.square().sum()),
        squared_reference=float(expected.to(torch.float64).square().sum()),
        dispatch_ms=_p50_ms(lambda: buffer.dispatch(x, topk_idx, topk_weights), buffer.device),
        combine_ms=_p50_ms(lambda: buffer.combine(y, handle), buffer.device),
    )


def _sent_bytes(handle: DispatchHandle, buffer: Buffer, wire: WireKind, hidden: int, num_topk: int) -> int:
    """Return the bytes of the records, metadata included, that one dispatch sends to other ranks."""
    sent = (handle.send_slot >= 0).sum(0)
    sent[buffer.rank] = 0
    return int(sent.sum()) * (RecordLayout(wire, hidden).num_bytes + _metadata_bytes(num_topk))


def _metadata_bytes(num_topk: int) -> int:
    return 4 * MetadataLayout(num_topk).num_words


def _p50_ms(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_WARM_RUNS + _TIMED_RUNS):
        _settle(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[_WARM_RUNS:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def _row(wire: WireKind, sizes: Sizes, ranks: Sequence[_Measured]) -> tuple[str, ...]:
    error = sum(m.squared_error for m in ranks) / sum(m.squared_reference for m in ranks)
    return (
        wire,
        str(RecordLayout(wire, sizes.hidden).num_bytes),
        f"{_metadata_bytes(sizes.topk)}",
        _spread([m.sent_bytes / 1024 for m in ranks]),
        f"{100 * error**0.5:.3f}%",
        f"{max(m.dispatch_ms for m in ranks):.2f}",
        f"{max(m.combine_ms for m in ranks):.2f}",
        _spread([count for m in ranks for count in m.tokens_per_expert]),
    )


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.0f}/{statistics.fmean(values):.0f}/{max(values):.0f}"
