"""What the tests of the MoE layer compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qcomm import reference
from qcomm.moe import MoELayer


def quantize_weights(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask the oracle's rule of FP8 groups for tiles of 128x128 instead."""
    tiles = reference.exact_values(w).unflatten(-1, (-1, 128)).unflatten(1, (-1, 128)).transpose(2, 3)
    data, sf = reference.quantize_fp8_groups(tiles.flatten(3))
    codes = data.view(torch.uint8).unflatten(3, (128, 128)).transpose(2, 3).flatten(3).flatten(1, 2)
    return codes.view(torch.float8_e4m3fn), sf


def dense_layer(
    layer: MoELayer, xs: Sequence[torch.Tensor], upstreams: Sequence[torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """Compute a layer that holds all experts in float64, without communication, and its gradients by autograd.

    Args:
        layer: with num_ranks = 1; its router chooses the experts.
        xs: tokens of every rank.
        upstreams: gradients of every rank's output.

    Returns:
        For every rank: "out" and "x" of its tokens; "w1" and "w2" of its experts, from the tokens of all ranks;
        "router.weight" and the shared expert's, from its own tokens.
    """
    config, num_ranks = layer.config, len(xs)
    w1, w2 = (p.detach().double().requires_grad_() for p in (layer.experts.gate_up, layer.experts.down))
    results: list[dict[str, torch.Tensor]] = []
    for x, upstream in zip(xs, upstreams, strict=True):
        own = {"x": x, "router.weight": layer.router.weight}
        if layer.shared is not None:
            own |= {"shared.gate_up": layer.shared.gate_up, "shared.down": layer.shared.down}
        leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in own.items()}
        logits = leaves["x"] @ leaves["router.weight"].t()
        scores = logits.sigmoid() if config.scores == "sigmoid" else logits.softmax(1)
        idx = layer.router(x)[0]
        weights = scores.gather(1, idx)
        if config.normalise:
            weights = weights / weights.sum(1, keepdim=True)
        weights = config.routed_scaling_factor * weights
        out = torch.zeros_like(leaves["x"])
        for expert in range(config.num_experts):
            token, entry = (idx == expert).nonzero(as_tuple=True)
            y = _swiglu(leaves["x"][token], w1[expert], w2[expert])
            out = out.index_add(0, token, weights[token, entry, None] * y)
        if layer.shared is not None:
            out = out + _swiglu(leaves["x"], leaves["shared.gate_up"], leaves["shared.down"])
        out.backward(upstream.double())
        results.append({"out": out.detach(), **{name: _grad(leaf) for name, leaf in leaves.items()}})
    for result, of_w1, of_w2 in zip(results, _grad(w1).chunk(num_ranks), _grad(w2).chunk(num_ranks), strict=True):
        result["w1"], result["w2"] = of_w1, of_w2
    return results


def _swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up.t()).chunk(2, dim=1)
    return (gate * gate.sigmoid() * up) @ down.t()


def _grad(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad
