"""AdamW of a model whose experts are spread over the ranks and whose other weights every rank has; for train_moe.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


class ExpertParallelAdamW:
    """AdamW on float32 copies of the weights, after summing gradients over the ranks and clipping their norm.

    Gradients must be those of this rank's part of the loss. An expert's gradient is whole then, for the tokens of all
    ranks came to it; those of weights that every rank has are summed here, in float32.

    Args:
        shared: weights that every rank has alike.
        experts: weights of this rank's experts.
        weight_decay: of matrices; vectors have none.
        max_norm: of the gradient of all weights of all ranks together.
    """

    def __init__(
        self,
        shared: Sequence[nn.Parameter],
        experts: Sequence[nn.Parameter],
        *,
        weight_decay: float = 0.1,
        max_norm: float = 1.0,
    ) -> None:
        self._shared, self._experts, self._max_norm = list(shared), list(experts), max_norm
        self._weights = [*self._shared, *self._experts]
        self._masters = [weight.detach().float().clone() for weight in self._weights]
        groups = [
            {"params": [each for each in self._masters if each.dim() > 1], "weight_decay": weight_decay},
            {"params": [each for each in self._masters if each.dim() <= 1], "weight_decay": 0.0},
        ]
        fused = self._masters[0].is_cuda
        self._adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)

    @torch.no_grad()
    def gather_gradients(self) -> torch.Tensor:
        """Sum the shared weights' gradients, clip all, and hand them to the float32 copies. Collective.

        Returns:
            The norm before clipping, a scalar on the device.
        """
        of_experts = [weight.grad.float() for weight in self._experts if weight.grad is not None]
        parts = [weight.grad.float().flatten() for weight in self._shared if weight.grad is not None]
        if len(of_experts) + len(parts) != len(self._weights):
            raise ValueError(
                f"all {len(self._weights)} weights must have gradients, got {len(of_experts) + len(parts)}"
            )
        squares = torch.stack([grad.square().sum() for grad in of_experts]).sum()
        # The experts' norm travels with the gradients.
        flat = torch.cat((*parts, squares.view(1)))
        dist.all_reduce(flat)
        norm = (flat[:-1].square().sum() + flat[-1]).sqrt()
        factor = (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
        flat.mul_(factor)
        of_shared = flat[:-1].split([part.numel() for part in parts])
        for master, grad in zip(self._masters, (*of_shared, *of_experts), strict=True):
            master.grad = grad.view_as(master)
        for grad in of_experts:
            grad.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self, rate: float) -> torch.Tensor:
        """Gather gradients, take one step with this learning rate, round the weights; returns the norm. Collective."""
        norm = self.gather_gradients()
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        for weight, master in zip(self._weights, self._masters, strict=True):
            weight.copy_(master)
            weight.grad = master.grad = None
        return norm

    def gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return what `gather_gradients` made, of the shared weights and of this rank's experts."""
        grads = [master.grad for master in self._masters if master.grad is not None]
        return grads[: len(self._shared)], grads[len(self._shared) :]


def learning_rate(step: int, steps: int, peak: float, warm_up: int, floor: float = 0.1) -> float:
    """Return the rate of a step, counted from 0: linear warm-up, then a cosine down to `floor * peak`."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
