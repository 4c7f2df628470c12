"""Accept a machine for the nvshmem backend: every mode against the oracle, bit by bit. Ends in PASS or FAIL.

On one host split into virtual nodes of two GPUs:

    QCOMM_RANKS_PER_NODE=2 torchrun --nproc-per-node 4 tools/accept_multinode.py

On two hosts, with GPU-driven RDMA where there is InfiniBand:

    NVSHMEM_IB_ENABLE_IBGDA=1 torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        tools/accept_multinode.py
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from qcomm import Buffer, Received, WireFormat, WirePrecision, reference_exchange, tuning
from qcomm.bootstrap import process_group

BF16, FP8, MXFP4 = WireFormat("bf16"), WireFormat("fp8"), WireFormat("mxfp4")
WIRES = ((MXFP4, BF16), (FP8, MXFP4), (BF16, FP8))
HIDDEN, TOPK, LOCAL_EXPERTS, TOKENS = 1024, 4, 4, 64
ROUNDS = 20
"""Calls in a row of each kind, so that memory is used again and again."""


def main() -> None:
    with process_group(use_cuda=True) as launch:
        problems = []
        for name, decode_tokens in (("throughput", 0), ("decode", TOKENS)):
            for dispatch_wire, combine_wire in WIRES:
                try:
                    with tuning.force(decode_tokens=decode_tokens):
                        found = list(run(launch.rank, dispatch_wire, combine_wire))
                except Exception:
                    found = [traceback.format_exc()]
                problems += [f"{name}, {dispatch_wire.kind} and {combine_wire.kind}: {problem}" for problem in found]
        gathered: list[list[str]] = [[] for _ in range(launch.num_ranks)]
        dist.all_gather_object(gathered, problems)
        if launch.rank == 0:
            for rank, each in enumerate(gathered):
                for problem in each:
                    print(f"rank {rank}: {problem}")
            print("FAIL" if any(gathered) else "PASS")
    sys.exit(any(map(len, gathered)))


def run(rank: int, dispatch_wire: WireFormat, combine_wire: WireFormat) -> Iterator[str]:
    """Dispatch, replay and combine, with the host's help and statically; yields what the oracle contradicts."""
    num_ranks = dist.get_world_size()
    experts = LOCAL_EXPERTS * num_ranks
    generator = torch.Generator().manual_seed(0)
    tokens = [max(0, TOKENS - 7 * r) for r in range(num_ranks)]
    xs = [torch.randn(n, HIDDEN, generator=generator).bfloat16() for n in tokens]
    idxs = [torch.rand(n, experts, generator=generator).argsort(1)[:, :TOPK].contiguous() for n in tokens]
    weights = [torch.rand(n, TOPK, generator=generator) for n in tokens]
    wants = reference_exchange.dispatch(
        xs, idxs, weights, num_experts=experts, wire=dispatch_wire, recv_layout="expert_major", recv_dtype="bf16"
    )
    want, rows = wants[rank], [each.rows for each in wants]
    precision = WirePrecision(dispatch_wire, combine_wire, dispatch_wire, combine_wire)
    shape: dict[str, Any] = {
        "num_experts": experts,
        "num_topk": TOPK,
        "hidden": HIDDEN,
        "num_max_tokens_per_rank": TOKENS,
    }
    with Buffer(backend="nvshmem", precision=precision, **shape) as buffer:
        if rank == 0:
            print(f"{buffer.topology}: {buffer.backend_reason}", flush=True)
        common: dict[str, Any] = {"wire": combine_wire, "weighted": True}
        ys, device = [each.x for each in wants], buffer.device
        x, idx, weight = xs[rank].to(device), idxs[rank].to(device), weights[rank].to(device)
        for i in range(ROUNDS):
            recv, handle = buffer.dispatch(x, idx, weight, recv_dtype="bf16", static=i % 2 == 1)
            yield from differences(f"dispatch {i}", recv, want)
            again, _ = buffer.dispatch(x, handle=handle, recv_dtype="bf16")
            yield from differences(f"replay {i}", again, want)
            out = buffer.combine(recv.x, handle)
            forwarded = handle.forward is not None
            each = buffer.topology.ranks_per_node if forwarded else 1
            nodes: dict[str, Any] = {"ranks_per_node": each, "rounds_inside": forwarded}
            sums = reference_exchange.combine(ys, rows, tokens, ranks=[rank], **nodes, **common)[0]
            if not torch.equal(out.cpu(), sums):
                yield f"combine {i} differs in {int((out.cpu() != sums).any(1).sum())} of {len(sums)} tokens"
            buffer.check()


def differences(name: str, recv: Received, want: reference_exchange.ExpectedReceived) -> Iterator[str]:
    """Yield whether what came is not what must come."""
    count = len(want.x)
    if len(recv.x) < count or not torch.equal(recv.x[:count].cpu(), want.x):
        yield f"{name}: rows differ"
    if not torch.equal(recv.src[:count].cpu(), want.src):
        yield f"{name}: sources differ"


if __name__ == "__main__":
    main()
