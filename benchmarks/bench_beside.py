"""Time a matrix product beside exchanges, and exchanges beside it: what `num_sms` leaves to the product.

Geometry: on GPUs 4096 tokens a rank of 7168, top-8 of 256 experts, BF16 in; on the CPU 64 of 256, top-4 of 16, where
nothing runs beside anything. The route is known; rows arrive by expert as FP8, or BF16 on the bf16 wire; sums go back
on the wire named too.

    mpirun -n 4 python -m qcomm bench beside --num-sms 24
    mpirun -n 4 python -m qcomm bench beside --num-sms 24 --wire mxfp4 --json beside.jsonl

Calls: `gemm` is four products of [tokens, hidden] by [hidden, hidden] in BF16, one after the other, alone; `dispatch`
and `combine` one exchange alone; `gemm beside dispatch` and `gemm beside combine` the same four products while
exchanges run one after the other on the buffer's stream, twice as many as fit the time of the products; they are a
CUDA graph, so that it is not the host that the products wait for. The product loses 1 - gemm / (gemm beside ...),
printed below the table's rows.

Results are checked first: the products beside exchanges have the bits of those alone, and the last exchange beside them
those of one alone, which `bench dispatch` and `bench combine` compare with the oracle. A difference ends the run with
code 1. harness.py says how calls are timed, baselines.py what NCCL does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import baselines
import harness
import oracle
import runner
import torch
import workload

from qcomm.buffer import Buffer
from qcomm.formats import RecvLayout, WireKind, WirePrecision
from qcomm.handle import Event

NAME = "beside"
_PRODUCTS = 4

Exchange = Callable[[], tuple[torch.Tensor, Event]]


def main() -> int:
    flags = workload.parse(NAME, __doc__ or "", ("expert_major",), dispatch=False)
    return runner.run(runner.Benchmark(NAME, _precision, baselines.dispatch, _measure), flags)


def _precision(wire: WireKind) -> WirePrecision:
    return WirePrecision(dispatch_fwd=wire, combine_fwd=wire)


def _measure(context: runner.Context, buffer: Buffer, wire: WireKind, layout: RecvLayout) -> list[harness.Row]:
    """Check, then time the calls of one wire. Collective."""
    work, member = context.work, context.work.member
    hidden = work.geometry.hidden
    generator = torch.Generator(member.device).manual_seed(context.flags.seed)
    weight = (torch.randn(hidden, hidden, generator=generator, device=member.device) / hidden**0.5).to(torch.bfloat16)
    received, handle = buffer.dispatch(work.x, work.topk_idx, work.topk_weights, recv_layout=layout)
    shape = (*received.x.shape[:-1], hidden)
    y = torch.randn(shape, generator=generator, device=member.device, dtype=torch.bfloat16)

    def products() -> torch.Tensor:
        out = work.x
        for _ in range(_PRODUCTS):
            out = torch.nn.functional.linear(out, weight)
        return out

    def dispatch() -> tuple[torch.Tensor, Event]:
        again, _, came = buffer.dispatch(work.x, handle=handle, async_op=True)
        return again.x, came

    def combine() -> tuple[torch.Tensor, Event]:
        return buffer.combine(y, handle, weighted=layout != "token_major", async_op=True)

    exchanges: dict[str, Exchange] = {"dispatch": dispatch, "combine": combine}
    product = products()
    alone = {name: _wait(exchange()) for name, exchange in exchanges.items()}
    timings = {"gemm": context.clock.time(products)}
    for name, exchange in exchanges.items():
        timings[name] = context.clock.time(lambda exchange=exchange: _wait(exchange()))  # type: ignore[misc]
        repeats = _repeats(timings["gemm"].p50_us, timings[name].p50_us)
        exchanging, last = context.clock.captured(lambda: [_wait(exchange()) for _ in range(repeats)][-1])  # noqa: B023
        beside = _Beside(products, exchanging, member.device)
        out = beside.start()
        beside.finish()
        problems = oracle.differing(
            f"beside {name}, wire {wire}",
            {"product": oracle.bits(out), "exchange": oracle.bits(last)},
            {"product": oracle.bits(product), "exchange": oracle.bits(alone[name])},
        )
        harness.require_equal(member, problems)
        timings[f"gemm beside {name}"] = context.clock.time(beside.start, beside.finish)
        beside.finish()
        buffer.check()
    if member.rank == 0:
        for name in exchanges:
            loses = loss(timings["gemm"].p50_us, timings[f"gemm beside {name}"].p50_us)
            print(f"wire {wire}: beside {name} the product loses {100 * loses:.1f} % of its rate")
    return [harness.Row(name, wire, layout, timing, 0, 0, 0) for name, timing in timings.items()]


def loss(alone_us: float, beside_us: float) -> float:
    """Return the part of its rate that work loses whose time grows from `alone_us` to `beside_us`."""
    return 1 - alone_us / beside_us


def _repeats(products_us: float, exchange_us: float) -> int:
    """Return how many exchanges run beside the products: twice as many as fit their time."""
    return max(1, math.ceil(2 * products_us / exchange_us))


def _wait(started: tuple[torch.Tensor, Event]) -> torch.Tensor:
    out, done = started
    done.wait()
    return out


class _Beside:
    """Products on the current stream, and exchanges on another one at the same time."""

    def __init__(
        self, products: Callable[[], torch.Tensor], exchanging: Callable[[], object], device: torch.device
    ) -> None:
        self._products, self._exchanging = products, exchanging
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def start(self) -> torch.Tensor:
        """Start both; the current stream does not wait for the exchanges."""
        if self._stream is None:
            self._exchanging()
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._exchanging()
        return self._products()

    def finish(self) -> None:
        """Wait for the exchanges."""
        if self._stream is not None:
            self._stream.synchronize()


if __name__ == "__main__":
    sys.exit(main())
