"""The shape of an MoE layer, and where its initial weights come from."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from qcomm import validate
from qcomm.formats import FP8_GROUP_SIZE

Scores = Literal["sigmoid", "softmax"]
SCORES: tuple[Scores, ...] = ("sigmoid", "softmax")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The shape of an MoE layer.

    Args:
        hidden: elements in a token, a multiple of 128.
        intermediate: width inside an expert.
        num_experts: routed experts in all.
        num_topk: routed experts of a token.
        num_groups: groups the experts are divided into, in order; 1 for no group limit.
        num_topk_groups: groups a token's experts may come from.
        routed_scaling_factor: factor of the routing weights; where they are normalised, the sum of a token's.
        shared_intermediate: width of the expert that every token goes through; 0 for none.
        scores: how the router's logits become scores, "sigmoid" or "softmax" over all experts.
        normalise: whether a token's routing weights are divided by their sum.

    Raises:
        ValueError, TypeError: a shape no layer can have.
    """

    hidden: int
    intermediate: int
    num_experts: int
    num_topk: int
    num_groups: int = 1
    num_topk_groups: int = 1
    routed_scaling_factor: float = 1.0
    shared_intermediate: int = 0
    scores: Scores = "sigmoid"
    normalise: bool = True

    def __post_init__(self) -> None:
        validate.multiple("hidden", self.hidden, FP8_GROUP_SIZE)
        for name in ("intermediate", "num_experts", "num_topk", "num_groups", "num_topk_groups"):
            validate.positive(name, getattr(self, name))
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts must be a multiple of the {self.num_groups} groups, got {self.num_experts}")
        if self.num_topk_groups > self.num_groups:
            raise ValueError(
                f"num_topk_groups must be at most num_groups = {self.num_groups}, got {self.num_topk_groups}"
            )
        reachable = self.num_experts // self.num_groups * self.num_topk_groups
        if self.num_topk > reachable:
            raise ValueError(
                f"num_topk must be at most the {reachable} experts in num_topk_groups groups, got {self.num_topk}"
            )
        if self.shared_intermediate < 0:
            raise ValueError(f"shared_intermediate must not be negative, got {self.shared_intermediate}")
        validate.one_of("scores", self.scores, SCORES)
        validate.boolean("normalise", self.normalise)


def generator_of(seed: int, part: int, device: torch.device | str | None) -> torch.Generator:
    """Make the random numbers of one part of the layer with this seed; a CPU generator takes 32 bits."""
    return torch.Generator(device or "cpu").manual_seed((seed << 16) + part)


def normal(
    shape: tuple[int, ...], fan_in: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Draw a weight, normal with variance 1 / fan_in."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    return (values * fan_in**-0.5).to(dtype)


def expert_weights(
    config: MoEConfig, first: int, count: int, *, seed: int = 0, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the weights of experts `[first, first + count)`, each from a seed of its own.

    Returns:
        `[count, 2 * intermediate, hidden]`, gate first, and `[count, hidden, intermediate]`, bfloat16.
    """
    width, hidden = config.intermediate, config.hidden
    gate_up, down = [], []
    for expert in range(first, first + count):
        generator = generator_of(seed, 2 + expert, device)
        gate_up.append(normal((2 * width, hidden), hidden, generator, torch.bfloat16))
        down.append(normal((hidden, width), width, generator, torch.bfloat16))
    return torch.stack(gate_up), torch.stack(down)
