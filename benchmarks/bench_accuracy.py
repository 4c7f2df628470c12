"""Measure what the wire of combine costs a layer's output: CPU, one process, plain PyTorch (qcomm.exchange).

    python -m qcomm bench accuracy
    python -m qcomm bench accuracy --tokens 64 --hidden 512 --json accuracy.jsonl

A token's output is the sum of weight * y over its experts' rows y. Each rank sums its rows of a token in float32 and
sends the sum over the wire; the token's rank adds what comes in float32 and rounds to BF16. That is what
`Buffer.combine` does. The tokens are those of one rank, and reach experts on every rank.

Geometry: 256 tokens of 2048, top-8 of 64 experts on 4 ranks. A token's experts are the largest of Gaussian logits, its
weights their softmax. Sources of y, all in BF16, one row a token and expert: `gaussian`; `swiglu`, silu(a) * b of two
Gaussians; `outliers`, a Gaussian with 1 % of its columns times 30.

Wires: `bf16`, `fp8`, `mxfp4` and `mxfp4, hadamard` are the library's. `mxfp4 twice` sends a second MXFP4 record with
what the first one leaves of the sum; it is measured with the codec, but is no wire of the library. `float32` rounds no
sum, so that its error is that of the BF16 output alone; it is no wire either. Bits: of a record, with scales and
padding, over hidden.

Error: 100 * |out - exact| / |exact|, Euclidean norms over all tokens; exact is the sum in float64, of the same y and
weights. x bf16: that error over the bf16 wire's.

Checked before anything is printed: on each wire of the library the output has the bits of
`qcomm.reference_exchange.combine`. A difference ends the run with code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import harness
import torch
from distributions import SOURCES, make_source

from qcomm import exchange, reference, reference_exchange, validate
from qcomm.formats import FP8_GROUP_SIZE, WireFormat
from qcomm.records import RecordLayout
from qcomm.table import format_table

NAME = "accuracy"


class CheckError(Exception):
    """An output is not that of the oracle."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of the combine; tokens are those of one rank."""

    tokens: int = 256
    hidden: int = 2048
    topk: int = 8
    experts: int = 64
    ranks: int = 4


@dataclasses.dataclass(frozen=True)
class Wire:
    """How a partial sum travels: as records of one format, each with what those before it leave; None is float32."""

    name: str
    format: WireFormat | None
    num_records: int = 1

    @property
    def in_library(self) -> bool:
        return self.format is not None and self.num_records == 1

    def bits_per_element(self, hidden: int) -> float:
        if self.format is None:
            return 32.0
        return 8 * self.num_records * RecordLayout(self.format.kind, hidden).num_bytes / hidden

    def carry(self, sums: torch.Tensor) -> torch.Tensor:
        """Return float32 `[records, hidden]` as they arrive."""
        if self.format is None or not len(sums):
            return sums
        came = torch.zeros_like(sums)
        for _ in range(self.num_records):
            records = exchange.encode_wire(sums - came, self.format)
            came = came + exchange.decode_wire(records, self.format, sums.shape[1])
        return came


BF16 = Wire("bf16", WireFormat("bf16"))
WIRES = (
    Wire("float32", None),
    BF16,
    Wire("fp8", WireFormat("fp8")),
    Wire("mxfp4", WireFormat("mxfp4")),
    Wire("mxfp4, hadamard", WireFormat("mxfp4", hadamard=True)),
    Wire("mxfp4 twice", WireFormat("mxfp4"), num_records=2),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """Rows of a rank's tokens on all ranks: `y` `[tokens * topk, hidden]` bfloat16, the others `[tokens, topk]`."""

    geometry: Geometry
    y: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def make_layer(geometry: Geometry, source: str, seed: int) -> Layer:
    """Draw the experts, their weights and their outputs."""
    # Another stream than that of the outputs.
    generator = torch.Generator().manual_seed((seed + 1) % 2**64)
    chosen = torch.randn(geometry.tokens, geometry.experts, generator=generator).topk(geometry.topk, dim=1)
    y = make_source(source, geometry.tokens * geometry.topk, geometry.hidden, seed)
    return Layer(geometry, y, chosen.indices, chosen.values.softmax(dim=1))


def exact(layer: Layer) -> torch.Tensor:
    """Sum in float64: `[tokens, hidden]`."""
    terms = layer.y.double().view(*layer.topk_idx.shape, -1) * layer.topk_weights.double()[..., None]
    return terms.sum(1)


def combine(layer: Layer, wire: Wire) -> torch.Tensor:
    """Combine over one wire: `[tokens, hidden]` bfloat16."""
    sizes = layer.geometry
    routing = exchange.route(layer.topk_idx, sizes.experts, sizes.ranks)
    slots = exchange.tokens_by_slot(routing.send_slot, sizes.tokens)
    rows = _rows_by_rank(layer)
    parts = []
    for rank, count in enumerate(routing.tokens_per_rank.tolist()):
        tokens = slots[rank, :count]
        sums = exchange.partial_sums(layer.y, rows[rank, tokens], layer.topk_weights[tokens])
        parts.append(wire.carry(sums))
    return reference.to_dtype(exchange.sum_parts(parts, routing.send_slot, sizes.hidden), torch.bfloat16)


def expected(layer: Layer, wire: WireFormat) -> torch.Tensor:
    """Combine by the plain loops of the oracle."""
    sizes = layer.geometry
    # The other ranks have no tokens.
    idxs = [layer.topk_idx, *[layer.topk_idx[:0]] * (sizes.ranks - 1)]
    weights = [layer.topk_weights, *[layer.topk_weights[:0]] * (sizes.ranks - 1)]
    arranged, ys = [], []
    for rank, rows in enumerate(_rows_by_rank(layer)):
        here = reference_exchange.arrange(rank, idxs, weights, num_experts=sizes.experts)
        y = torch.zeros(len(here.token_of_row), sizes.hidden, dtype=torch.bfloat16)
        for (_, token), entries in here.rows_of_token.items():
            y[[row for row, _ in entries]] = layer.y[rows[token][rows[token] >= 0].long()]
        arranged.append(here)
        ys.append(y)
    counts = [len(idx) for idx in idxs]
    (out,) = reference_exchange.combine(ys, arranged, counts, wire=wire, weighted=True, ranks=[0])
    return out


def measure(layer: Layer) -> dict[str, float]:
    """Return the error in percent on every wire.

    Raises:
        CheckError: an output is not that of the oracle.
    """
    want = exact(layer)
    errors = {}
    for wire in WIRES:
        out = combine(layer, wire)
        if wire.format is not None and wire.in_library:
            _require_oracle(wire.name, out, expected(layer, wire.format))
        errors[wire.name] = 100 * ((out.double() - want).norm() / want.norm()).item()
    return errors


def _rows_by_rank(layer: Layer) -> torch.Tensor:
    """Give the rows of each token on each rank, -1 for an expert of another: `[ranks, tokens, topk]` int32."""
    sizes = layer.geometry
    rows = torch.arange(sizes.tokens * sizes.topk, dtype=torch.int32).view(sizes.tokens, sizes.topk)
    owner = torch.div(layer.topk_idx, sizes.experts // sizes.ranks, rounding_mode="floor")
    return torch.where(owner == torch.arange(sizes.ranks)[:, None, None], rows, -1)


def _require_oracle(name: str, out: torch.Tensor, want: torch.Tensor) -> None:
    wrong = int((out.view(torch.int16) != want.view(torch.int16)).sum())
    if wrong:
        raise CheckError(f"wire {name}: {wrong} elements of {out.numel()} differ from the oracle's")


def _json_lines(found: dict[str, dict[str, float]], geometry: Geometry, seed: int) -> str:
    about = {
        **harness.about_cpu(NAME),
        "geometry": dataclasses.asdict(geometry),
        "seed": seed,
    }
    lines = [
        {
            **about,
            "source": source,
            "wire": wire.name,
            "in_library": wire.in_library,
            "bits_per_element": wire.bits_per_element(geometry.hidden),
            "error_percent": errors[wire.name],
            "bf16_ratio": errors[wire.name] / errors[BF16.name],
        }
        for source, errors in found.items()
        for wire in WIRES
    ]
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def _table(found: dict[str, dict[str, float]], hidden: int) -> str:
    cells = [
        (
            wire.name,
            source,
            f"{wire.bits_per_element(hidden):.2f}",
            f"{errors[wire.name]:.4f}",
            f"{errors[wire.name] / errors[BF16.name]:.2f}",
        )
        for source, errors in found.items()
        for wire in WIRES
    ]
    return format_table(("wire", "source", "bits", "error %", "x bf16"), cells)


def _check(geometry: Geometry, seed: int, path: Path | None) -> None:
    """Require arguments that can be measured.

    Raises:
        ValueError: names the argument.
    """
    for name, size in dataclasses.asdict(geometry).items():
        validate.positive(f"--{name}", size)
    validate.multiple("--hidden", geometry.hidden, FP8_GROUP_SIZE)
    if geometry.experts % geometry.ranks:
        raise ValueError(f"--experts must be a multiple of the {geometry.ranks} ranks, got {geometry.experts}")
    if geometry.topk > geometry.experts:
        raise ValueError(f"--topk must be at most the {geometry.experts} experts, got {geometry.topk}")
    validate.seed(seed, "--seed")
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"--json must be a file in a folder that exists, got {path}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m qcomm bench {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(Geometry):
        parser.add_argument(
            f"--{field.name}", type=int, default=field.default, metavar="N", help=f"default {field.default}"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON object a row")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    geometry = Geometry(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Geometry)})
    try:
        _check(geometry, given.seed, given.json)
    except ValueError as error:
        parser.error(str(error))
    try:
        found = {source: measure(make_layer(geometry, source, given.seed)) for source in SOURCES}
    except CheckError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    title = (
        f"{geometry.tokens} tokens of {geometry.hidden}, top-{geometry.topk} of {geometry.experts} experts on "
        f"{geometry.ranks} ranks, seed {given.seed}"
    )
    print(f"{title}\n\n{_table(found, geometry.hidden)}", flush=True)
    if given.json is not None:
        with given.json.open("a") as file:
            file.write(_json_lines(found, geometry, given.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
