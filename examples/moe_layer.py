"""An MoE layer over qcomm, once per wire: the error against the bf16 wire, and the bytes that travelled.

Run it by itself or under a launcher:

    mpirun -n 4 python examples/moe_layer.py
    torchrun --nproc-per-node 4 examples/moe_layer.py
    python examples/moe_layer.py
"""

import torch
import torch.distributed as dist

from qcomm import Buffer, WirePrecision
from qcomm.bootstrap import process_group
from qcomm.formats import WireKind
from qcomm.moe import MoEConfig, MoELayer
from qcomm.records import RecordLayout

TOKENS, EXPERTS_PER_RANK = 256, 8


def forward(layer: MoELayer, x: torch.Tensor, wire: WireKind) -> tuple[torch.Tensor, int]:
    """Runs the layer; also returns how many tokens went to other ranks."""
    config = layer.config
    with Buffer(
        num_experts=config.num_experts,
        num_topk=config.num_topk,
        hidden=config.hidden,
        num_max_tokens_per_rank=TOKENS,
        precision=WirePrecision(dispatch_fwd=wire, combine_fwd="bf16"),
        device=x.device,
    ) as buffer:
        experts, weights = layer.router(x)  # [tokens, topk] each
        recv, handle = buffer.dispatch(x, experts, weights)  # recv.x [rows, hidden], by local expert
        y = layer.experts(recv)  # [rows, hidden] bfloat16
        out = buffer.combine(y, handle)  # [tokens, hidden] bfloat16
        went = (handle.send_slot >= 0).sum(0)  # [ranks]
        went[buffer.rank] = 0
        return out, int(went.sum())


def total(value: torch.Tensor) -> float:
    """Sums a value over the ranks."""
    value = value.to(torch.float64)
    dist.all_reduce(value)
    return float(value)


def main() -> None:
    with process_group() as launch, torch.no_grad():
        config = MoEConfig(hidden=512, intermediate=256, num_experts=EXPERTS_PER_RANK * launch.num_ranks, num_topk=4)
        layer = MoELayer(config, rank=launch.rank, num_ranks=launch.num_ranks, seed=1, device=launch.device)
        generator = torch.Generator(launch.device).manual_seed(launch.rank)
        x = torch.randn(TOKENS, config.hidden, generator=generator, device=launch.device).bfloat16()

        exact, _ = forward(layer, x, "bf16")
        wires: tuple[WireKind, ...] = ("bf16", "fp8", "mxfp4")
        for wire in wires:
            out, sent = forward(layer, x, wire)
            error = total((out.double() - exact.double()).square().sum()) / total(exact.double().square().sum())
            record = RecordLayout(wire, config.hidden).num_bytes
            kib = total(torch.tensor(sent * record / 1024, device=x.device))
            if launch.rank == 0:
                print(f"{wire:5}  {record:4} bytes a token, {kib:6.0f} KiB sent in all, error {error**0.5:.4f}")


if __name__ == "__main__":
    main()
