"""The router: which experts a token goes to, and with which weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from qcomm.moe.config import MoEConfig, generator_of, normal

_GROUP_SCORE_EXPERTS = 2
_MIN_WEIGHT_SUM = 1e-20


class Router(nn.Module):
    """Top-k router of DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, balanced without an auxiliary loss.

    A bias per expert is added to the scores to select experts, and only then: the weights of the selected
    experts are their plain scores, normalised over the top-k and multiplied by `routed_scaling_factor`. Softmax
    scores, and weights that are not normalised, are the config's choice.

    Args:
        config: shape of the layer.
        seed: of the initial weight; every rank needs the same.
        device: where it lives.
    """

    bias: torch.Tensor

    def __init__(self, config: MoEConfig, *, seed: int = 0, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._config = config
        generator = generator_of(seed, 0, device)
        self.weight = nn.Parameter(normal((config.num_experts, config.hidden), config.hidden, generator))
        self.register_buffer("bias", torch.zeros(config.num_experts, device=device))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts and weights in float32; weights have gradients, which reach x and `weight`.

        Args:
            x: `[num_tokens, hidden]` of any floating dtype.

        Returns:
            `[num_tokens, num_topk]` int64 experts, distinct in a row, and float32 weights.
        """
        logits = _Logits.apply(x, self.weight)
        scores = torch.sigmoid(logits) if self._config.scores == "sigmoid" else torch.softmax(logits, dim=1)
        topk_idx = self._select(scores.detach() + self.bias)
        weights = scores.gather(1, topk_idx)
        if self._config.normalise:
            weights = weights / (weights.sum(1, keepdim=True) + _MIN_WEIGHT_SUM)
        return topk_idx, weights * self._config.routed_scaling_factor

    @torch.no_grad()
    def update_bias(
        self, tokens_per_expert: torch.Tensor, rate: float = 1e-3, *, group: dist.ProcessGroup | None = None
    ) -> None:
        """Move each expert's bias one step against its load. Collective with a group.

        Args:
            tokens_per_expert: `[num_experts]` tokens of the last step, summed over all ranks; with a group those of
                this rank.
            rate: length of the step.
            group: sum over its ranks first.
        """
        load = tokens_per_expert.to(self.bias.device, torch.float32, copy=True)
        if group is not None:
            dist.all_reduce(load, group=group)
        self.bias += rate * torch.sign(load.mean() - load)

    def _select(self, biased: torch.Tensor) -> torch.Tensor:
        config = self._config
        if config.num_topk_groups < config.num_groups:
            by_group = biased.unflatten(1, (config.num_groups, -1))
            best = by_group.topk(min(_GROUP_SCORE_EXPERTS, by_group.shape[2]), dim=2).values.sum(2)
            allowed = torch.zeros_like(best, dtype=torch.bool)
            allowed.scatter_(1, best.topk(config.num_topk_groups, dim=1).indices, True)
            biased = by_group.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)
        return biased.topk(config.num_topk, dim=1).indices


class _Logits(torch.autograd.Function):
    """The product with the router's weight in float32, which keeps x as it is for backward, not its float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return x.to(torch.float32) @ weight.to(torch.float32).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            d_x = (grad @ weight.to(torch.float32)).to(x.dtype) if ctx.needs_input_grad[0] else None
            d_weight = (grad.t() @ x.to(torch.float32)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return d_x, d_weight
