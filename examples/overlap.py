"""A batch in two halves: one travels while the experts work on the other. No call waits for the host.

Run it by itself or under a launcher:

    mpirun -n 4 python examples/overlap.py
    python examples/overlap.py

On the CPU nothing overlaps, and the sums are the same.
"""

from collections.abc import Callable

import torch

from qcomm import Buffer, Received
from qcomm.bootstrap import process_group
from qcomm.moe import decode

TOKENS, HIDDEN, TOPK, EXPERTS_PER_RANK = 256, 512, 4, 8
Half = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Experts = Callable[[Received], torch.Tensor]


def in_turn(buffer: Buffer, halves: list[Half], experts: Experts) -> list[torch.Tensor]:
    """Everything on one stream."""
    outs = []
    for x, idx, weights in halves:
        recv, handle = buffer.dispatch(x, idx, weights, static=True)  # room for the worst case, no host sync
        outs.append(buffer.combine(experts(recv), handle))
    return outs


def overlapped(buffer: Buffer, halves: list[Half], experts: Experts) -> list[torch.Tensor]:
    """The exchange on the buffer's own stream, the experts on the current one."""
    arriving = [buffer.dispatch(x, idx, weights, static=True, async_op=True) for x, idx, weights in halves]
    leaving = []
    for recv, handle, came in arriving:
        came.wait()  # the current stream waits, not the host; the other half may still be on its way
        leaving.append(buffer.combine(experts(recv), handle, async_op=True))
    for _, done in leaving:
        done.wait()
    return [out for out, _ in leaving]


def main() -> None:
    with process_group() as launch, torch.no_grad():
        generator = torch.Generator(launch.device).manual_seed(launch.rank)
        num_experts = EXPERTS_PER_RANK * launch.num_ranks
        x = torch.randn(TOKENS, HIDDEN, generator=generator, device=launch.device).bfloat16()
        weights, idx = torch.rand(TOKENS, num_experts, generator=generator, device=launch.device).topk(TOPK)
        matrix = torch.randn(HIDDEN, HIDDEN, device=launch.device).bfloat16() / HIDDEN**0.5

        def experts(recv: Received) -> torch.Tensor:
            return decode(recv) @ matrix  # your grouped GEMM; it reads recv.num_tokens_per_expert on the device

        halves = list(zip(x.tensor_split(2), idx.tensor_split(2), weights.tensor_split(2), strict=True))
        with Buffer(
            num_experts=num_experts,
            num_topk=TOPK,
            hidden=HIDDEN,
            num_max_tokens_per_rank=TOKENS // 2,
            device=launch.device,
        ) as buffer:
            one, other = in_turn(buffer, halves, experts), overlapped(buffer, halves, experts)
            same = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            print(f"rank {launch.rank}, {buffer.backend}: the same sums: {same}")


if __name__ == "__main__":
    main()
