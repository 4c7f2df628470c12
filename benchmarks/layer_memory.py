"""What an MoE layer keeps between forward and backward, and how many tokens fit.

MEMORY. Bytes of a rank, the largest of the ranks, above what was allocated before: weights, their gradients, the input
and symmetric memory. held: after forward, less the output. rows: what held shrinks by when w1 is frozen, for then the
dispatched rows are not kept. input: the rest of held with `recompute="swiglu"`, where only SwiGLU's input and a few
bytes a row for routing remain. On CUDA the allocator counts what it was asked for (requested_bytes of its statistics:
its blocks are up to 1 MiB longer, by what was free); on the CPU, which has none, the tensors that autograd saves are
counted, each storage once. peak: torch.cuda.max_memory_allocated of forward and backward.

LARGEST BATCH. The most tokens a rank, in steps of 128 by bisection, with which the peak of forward and backward of a
stack of layers stays below a budget on every rank. A stage of the stack is x + layer(rms_norm(x)); all have the same
weights, for activations are what is measured.
"""

from __future__ import annotations

import dataclasses

import harness
import torch
import torch.nn.functional as F

from qcomm.config import Member
from qcomm.moe import MXFP4MoELayer

STEP = 128


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one layer keeps, in bytes; the peak is None without CUDA."""

    held: int
    rows: int
    rest: int
    peak: int | None


def kept(member: Member, layer: MXFP4MoELayer, x: torch.Tensor) -> Kept:
    """Measure one layer. Collective."""
    x = x.detach().requires_grad_()
    held = _held(member, layer, x)
    layer.w1.requires_grad_(False)
    try:
        rest = _held(member, layer, x)
    finally:
        layer.w1.requires_grad_(True)
    largest = [max(each) for each in zip(*harness.gather(member, (held, held - rest, rest)), strict=True)]
    return Kept(largest[0], largest[1], largest[2], _peak(member, layer, x, 1))


def largest_batch(member: Member, layer: MXFP4MoELayer, most: int, budget: int, stack: int, seed: int) -> int:
    """Return the most tokens a rank that fit, 0 if 128 do not; `most` if all fit that the buffer takes. Collective.

    Needs CUDA.
    """
    fits, limit = 0, most // STEP + 1
    while limit - fits > 1:
        middle = (fits + limit) // 2
        generator = torch.Generator(member.device).manual_seed(1000 * seed + member.rank)
        shape = (middle * STEP, layer.config.hidden)
        x = torch.randn(shape, generator=generator, device=member.device).to(torch.bfloat16).requires_grad_()
        peak = _peak(member, layer, x, stack)
        assert peak is not None
        fits, limit = (middle, limit) if peak <= budget else (fits, middle)
        del x
    return fits * STEP


def _held(member: Member, layer: MXFP4MoELayer, x: torch.Tensor) -> int:
    """Return what this rank holds between the passes."""
    if member.device.type == "cuda":
        layer(x)
        harness.settle(member)
        before = _requested(member.device)
        out = layer(x)
        harness.settle(member)
        return _requested(member.device) - before - out.numel() * out.element_size()
    own = {each.untyped_storage().data_ptr() for each in (x, *layer.parameters())}
    found: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        # The graph lives until the sizes are added up, so that no address is used twice.
        out = layer(x)
    total = sum(found.values())
    del out
    return total


def _requested(device: torch.device) -> int:
    """Return the bytes of all tensors on a GPU."""
    return int(torch.cuda.memory_stats(device)["requested_bytes.all.current"])


def _peak(member: Member, layer: MXFP4MoELayer, x: torch.Tensor, stack: int) -> int | None:
    """Return the peak of both passes of a stack of the layer, the largest of the ranks."""
    if member.device.type != "cuda":
        return None
    for parameter in (x, *layer.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    harness.settle(member)
    torch.cuda.reset_peak_memory_stats(member.device)
    before = torch.cuda.memory_allocated(member.device)
    out = x
    for _ in range(stack):
        out = layer(x) if stack == 1 else out + layer(F.rms_norm(out, out.shape[-1:]))
    out.backward(torch.ones_like(out))
    harness.settle(member)
    peak = torch.cuda.max_memory_allocated(member.device) - before
    for parameter in (x, *layer.parameters()):
        parameter.grad = None
    return max(harness.gather(member, peak))
