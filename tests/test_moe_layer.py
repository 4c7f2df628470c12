"""The layer to train: against a dense layer, against itself on one rank, in training, and what it keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bit_patterns import equal_bits
from moe_truth import dense_layer
from ranks import Pools, RankPool, Target, device_of, targets
from torch.utils.checkpoint import checkpoint

from qcomm import Buffer, WirePrecision
from qcomm.moe import MoEConfig, MoELayer, MXFP4MoELayer
from qcomm.moe.config import expert_weights
from qcomm.moe.experts import KEEPS, RECOMPUTES, Keep, Recompute
from qcomm.moe.layer import WEIGHTS_IN, WeightsIn

CONFIG = MoEConfig(hidden=256, intermediate=128, num_experts=8, num_topk=2, routed_scaling_factor=2.0)
SHARED = dataclasses.replace(CONFIG, shared_intermediate=64, scores="softmax", normalise=False)
COUNTS = {"uneven": (48, 29, 17, 5), "empty": (40, 0, 40, 0), "nothing": (0, 0, 0, 0)}
WIRES = {"bf16": WirePrecision.bf16(), "fp8": WirePrecision.fp8(), "mxfp4": WirePrecision.paper()}

Gradients = dict[str, torch.Tensor]


def tokens(counts: tuple[int, ...], rank: int, hidden: int = CONFIG.hidden) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a rank's tokens, and the gradients of what the layer makes of them."""
    generator = torch.Generator().manual_seed(100 + rank)
    x, upstream = (torch.randn(counts[rank], hidden, generator=generator).to(torch.bfloat16) for _ in range(2))
    return x, upstream


def make(
    config: MoEConfig, rank: int, num_ranks: int, device: str = "cpu", backend: str = "auto", **kwargs: Any
) -> MXFP4MoELayer:
    """Make a layer whose weights do not depend on the device."""
    on = device_of(device, rank)
    layer = MXFP4MoELayer(config, num_max_tokens_per_rank=64, device=on, backend=backend, seed=3, **kwargs)
    plain = MoELayer(config, rank=rank, num_ranks=num_ranks, seed=3)
    with torch.no_grad():
        layer.router.weight.copy_(plain.router.weight)
        layer.w1.copy_(plain.experts.gate_up)
        layer.w2.copy_(plain.experts.down)
        if layer.shared is not None and plain.shared is not None:
            layer.shared.load_state_dict(plain.shared.state_dict())
    return layer


def step(layer: MXFP4MoELayer, x: torch.Tensor, upstream: torch.Tensor) -> Gradients:
    """Return output and gradients of one step, on the CPU."""
    x = x.to(layer.w1.device).requires_grad_()
    out = layer(x)
    out.backward(upstream.to(out.device))
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    assert len(grads) == len(list(layer.parameters()))
    return {name: value.cpu() for name, value in ({"out": out.detach(), "x": x.grad} | grads).items()}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    norm = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / norm if norm else float(got.double().norm())


def against_dense(
    rank: int, num_ranks: int, device: str, backend: str, config: MoEConfig, counts: tuple[int, ...], weights: WeightsIn
) -> dict[str, float]:
    layer = make(config, rank, num_ranks, device, backend, precision=WIRES["bf16"], keep="bf16", weights_in=weights)
    got = step(layer, *tokens(counts, rank))
    layer.destroy()
    pairs = [tokens(counts, each) for each in range(num_ranks)]
    want = dense_layer(MoELayer(config, seed=3), [x for x, _ in pairs], [upstream for _, upstream in pairs])[rank]
    assert set(got) == set(want)
    return {name: relative_error(got[name], want[name]) for name in want}


@targets(1, 2)
@pytest.mark.parametrize("weights", WEIGHTS_IN)
@pytest.mark.parametrize("config", [CONFIG, SHARED], ids=["plain", "shared-softmax"])
@pytest.mark.parametrize("counts", COUNTS)
def test_bf16_is_the_dense_layer(target: Target, config: MoEConfig, counts: str, weights: WeightsIn) -> None:
    for errors in target.run(against_dense, config, COUNTS[counts], weights):
        # Every tensor between is rounded to 2^-9 at worst; sums of a few such errors.
        assert max(errors.values()) < 2**-7, errors


def gradients_of(
    rank: int, num_ranks: int, counts: tuple[int, ...], keep: Keep, recompute: Recompute, weights: WeightsIn
) -> Gradients:
    layer = make(CONFIG, rank, num_ranks, precision=WIRES[keep], keep=keep, recompute=recompute, weights_in=weights)
    x, upstream = tokens(counts, rank)
    if num_ranks == 1:
        pairs = [tokens(counts, each) for each in range(2)]
        x, upstream = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
        layer.destroy()
        layer = make(CONFIG, 0, 1, precision=WIRES[keep], keep=keep, recompute=recompute, weights_in=weights)
    grads = step(layer, x, upstream)
    layer.destroy()
    return grads


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("weights", WEIGHTS_IN)
def test_two_ranks_have_the_bits_of_one(pools: Pools, keep: Keep, weights: WeightsIn) -> None:
    for recompute in RECOMPUTES:
        counts = (30, 21)
        (whole,) = pools.get(1).run(gradients_of, counts, keep, recompute, weights)
        parts = pools.get(2).run(gradients_of, counts, keep, recompute, weights)
        for name in ("w1", "w2"):
            # Rows come to the experts in the order of the tokens, whichever ranks they are from.
            assert equal_bits(torch.cat([part[name] for part in parts]), whole[name])
        for name in ("out", "x"):
            # A rank's sum is rounded to the wire before it meets the other's.
            error = relative_error(torch.cat([part[name] for part in parts]), whole[name])
            assert error < (2**-8 if keep == "bf16" or name == "out" else 2**-4)
        # A rank's share of the router's gradient needs all tokens, so the ranks' are summed.
        total = sum(part["router.weight"].double() for part in parts)
        assert isinstance(total, torch.Tensor)
        assert relative_error(total, whole["router.weight"]) < 2**-6


def against_bf16(
    rank: int, num_ranks: int, device: str, backend: str, keep: Keep, recompute: Recompute, weights: WeightsIn
) -> dict[str, float]:
    results = []
    for kept in ("bf16", keep):
        layer = make(
            CONFIG, rank, num_ranks, device, backend, precision=WIRES[kept], keep=kept, recompute=recompute,
            weights_in=weights,
        )  # fmt: skip
        results.append(step(layer, *tokens(COUNTS["uneven"], rank)))
        layer.destroy()
    assert all(bool(torch.isfinite(value).all()) for result in results for value in result.values())
    return {name: relative_error(results[1][name], results[0][name]) for name in results[0]}


# An operand in MXFP4 is off by 0.115 of a Gaussian's norm, one in FP8 by 0.026. A product adds the squares of its
# operands' errors, SwiGLU about doubles them. The router's gradient is a difference: of normalised weights only ratios
# count.
BOUNDS: dict[Keep, dict[str, float]] = {
    "fp8": {"out": 0.09, "x": 0.1, "w1": 0.1, "w2": 0.09, "router.weight": 0.2},
    "mxfp4": {"out": 0.22, "x": 0.24, "w1": 0.27, "w2": 0.27, "router.weight": 0.5},
}


@targets(2)
@pytest.mark.parametrize("keep", ["fp8", "mxfp4"])
def test_quantized_gradients_are_near(target: Target, keep: Keep) -> None:
    for recompute in RECOMPUTES:
        for weights in WEIGHTS_IN:
            for errors in target.run(against_bf16, keep, recompute, weights):
                for name, bound in BOUNDS[keep].items():
                    assert 0 < errors[name] < bound, (recompute, weights, errors)


def unused_experts(rank: int, num_ranks: int, keep: Keep) -> None:
    layer = make(CONFIG, rank, num_ranks, precision=WIRES[keep], keep=keep)
    # Every token to the last two experts: nothing comes to rank 0.
    layer.router.bias[-2:] += 100.0
    grads = step(layer, *tokens(COUNTS["uneven"], rank))
    layer.destroy()
    assert all(bool(torch.isfinite(value).all()) for value in grads.values())
    used = [bool((grad != 0).any()) for name in ("w1", "w2") for grad in grads[name]]
    assert used == ([False] * 8 if rank == 0 else [False, False, True, True] * 2)
    assert layer.tokens_per_expert.tolist() == [0] * 6 + [COUNTS["uneven"][rank]] * 2


@pytest.mark.parametrize("keep", KEEPS)
def test_experts_without_tokens(pool2: RankPool, keep: Keep) -> None:
    pool2.run(unused_experts, keep)


def kept_of_layer(rank: int, num_ranks: int, keep: Keep) -> tuple[list[str], int]:
    layer = make(CONFIG, rank, num_ranks, precision=WIRES[keep], keep=keep, recompute="swiglu")
    held: dict[int, torch.Tensor] = {}
    parameters = {p.data_ptr() for p in layer.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in parameters and x.numel() >= 4096:
            held[x.data_ptr()] = x
        return x

    x = tokens((64, 64), rank)[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x)
    layer.destroy()
    names = sorted(f"{str(saved.dtype).removeprefix('torch.')} {saved.shape[1]}" for saved in held.values())
    return names, sum(saved.untyped_storage().nbytes() for saved in held.values())


def test_nothing_else_is_kept(pool2: RankPool) -> None:
    # The router keeps the layer's input; the experts their rows and SwiGLU's input, and scales.
    (names, num_bytes), _ = pool2.run(kept_of_layer, "mxfp4")
    assert names == ["bfloat16 256", "uint8 128", "uint8 128", "uint8 8", "uint8 8"]
    (bf16_names, bf16_bytes), _ = pool2.run(kept_of_layer, "bf16")
    assert bf16_names == ["bfloat16 256"] * 3
    own_input = 64 * 256 * 2
    assert (num_bytes - own_input) / (bf16_bytes - own_input) <= 0.28


def train(rank: int, num_ranks: int, keep: Keep) -> list[float]:
    config = MoEConfig(hidden=128, intermediate=128, num_experts=4, num_topk=2)
    teacher = MoELayer(config, seed=9)
    layer = make(config, rank, num_ranks, precision=WIRES[keep], keep=keep)
    optimizer = torch.optim.Adam(layer.parameters(), lr=4e-3)
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)
    with torch.no_grad():
        target = teacher.forward_local(x)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (layer(x).float() - target).square().mean()
        loss.backward()
        assert layer.router.weight.grad is not None
        dist.all_reduce(layer.router.weight.grad)
        optimizer.step()
        layer.update_bias()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / num_ranks)
    bias = layer.router.bias.clone()
    dist.all_reduce(bias)
    assert torch.allclose(bias, num_ranks * layer.router.bias)
    assert (bias != 0).any()
    layer.destroy()
    return losses


def test_training_lowers_the_loss_alike(pool2: RankPool) -> None:
    bf16, recipe = (pool2.run(train, keep)[0] for keep in ("bf16", "mxfp4"))
    for losses in (bf16, recipe):
        assert losses[-1] < 0.3 * losses[0], losses
    assert recipe[-1] < 1.5 * bf16[-1], (bf16[-1], recipe[-1])


def static_and_not(rank: int, num_ranks: int, device: str, backend: str, keep: Keep, weights: WeightsIn) -> None:
    results = []
    for static in (False, True):
        layer = make(
            CONFIG,
            rank,
            num_ranks,
            device,
            backend,
            precision=WIRES[keep],
            keep=keep,
            weights_in=weights,
            static=static,
            num_max_recv_tokens=1024 if static else None,
        )
        results.append(step(layer, *tokens(COUNTS["uneven"], rank)))
        layer.destroy()
    for name, want in results[0].items():
        if device == "cpu":
            assert equal_bits(results[1][name], want), name
        else:
            # A product may add in another order.
            assert relative_error(results[1][name], want) < 2**-6, name


@targets(2)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("weights", WEIGHTS_IN)
def test_static_gives_the_same(target: Target, keep: Keep, weights: WeightsIn) -> None:
    target.run(static_and_not, keep, weights)


def checkpointed(rank: int, num_ranks: int, keep: Keep) -> None:
    results = []
    for recomputes in (False, True):
        layer = make(CONFIG, rank, num_ranks, precision=WIRES[keep], keep=keep)
        x, upstream = tokens(COUNTS["uneven"], rank)
        x.requires_grad_()
        out = checkpoint(layer, x, use_reentrant=False) if recomputes else layer(x)
        out.backward(upstream)
        results.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
        layer.destroy()
    assert all(equal_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("keep", KEEPS)
def test_checkpointing_gives_the_same(pool2: RankPool, keep: Keep) -> None:
    pool2.run(checkpointed, keep)


def compiled(rank: int, num_ranks: int, device: str, backend: str, compiler: str, keep: Keep, static: bool) -> None:
    torch.compiler.reset()
    rows = 1024 if static else None
    layer = make(
        CONFIG,
        rank,
        num_ranks,
        device,
        backend,
        precision=WIRES[keep],
        keep=keep,
        static=static,
        num_max_recv_tokens=rows,
    )
    given = tokens(COUNTS["uneven"], rank)
    eager = step(layer, *given)
    layer.zero_grad()
    layer.compile(backend=compiler)
    result = step(layer, *given)
    layer.destroy()
    for name, want in eager.items():
        got = result[name]
        if device == "cpu" and compiler == "aot_eager":
            assert equal_bits(got, want), name
        else:
            # A compiler adds in another order and rounds less in between.
            assert relative_error(got, want) < 2**-7, name
    assert layer.tokens_per_expert.sum() == 2 * CONFIG.num_topk * COUNTS["uneven"][rank]


@targets(2)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("static", [True, False])
def test_compiling_gives_the_same(target: Target, compiler: str, static: bool) -> None:
    for keep in KEEPS if compiler == "aot_eager" else ("mxfp4",):
        target.run(compiled, compiler, keep, static)


def under_autocast(rank: int, num_ranks: int, keep: Keep) -> None:
    results = []
    for enabled in (False, True):
        layer = make(CONFIG, rank, num_ranks, precision=WIRES[keep], keep=keep)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(step(layer, *tokens(COUNTS["uneven"], rank)))
        layer.destroy()
    assert all(equal_bits(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("keep", KEEPS)
def test_autocast_changes_nothing(pool2: RankPool, keep: Keep) -> None:
    pool2.run(under_autocast, keep)


def shared_buffer(rank: int, num_ranks: int) -> None:
    with Buffer(
        num_experts=8, num_topk=2, hidden=256, num_max_tokens_per_rank=64, precision=WIRES["mxfp4"], device="cpu"
    ) as buffer:
        layers = [MXFP4MoELayer(CONFIG, buffer=buffer, seed=seed) for seed in range(2)]
        x, upstream = tokens(COUNTS["uneven"], rank)
        x = x.unflatten(0, (1, -1)).requires_grad_()
        out = x
        for layer in layers:
            out = out + layer(out)
        assert out.shape == x.shape
        out.backward(upstream.view(out.shape))
        assert all(p.grad is not None for layer in layers for p in layer.parameters())
        # The buffer is the caller's.
        layers[0].destroy()
        layers[1].eval()
        before = layers[1].tokens_per_expert.clone()
        with torch.no_grad():
            layers[1](x)
        assert torch.equal(layers[1].tokens_per_expert, before)
        assert "tokens_per_expert" not in layers[1].state_dict()
        w1, w2 = expert_weights(CONFIG, 4 * rank, 4, seed=1)
        assert torch.equal(layers[1].w1, w1)
        assert torch.equal(layers[1].w2, w2)


def test_layers_share_a_buffer(pool2: RankPool) -> None:
    pool2.run(shared_buffer)


def refused(rank: int, num_ranks: int) -> None:
    narrow = dataclasses.replace(CONFIG, intermediate=64)
    todo: list[tuple[MoEConfig, dict[str, Any], str]] = [
        (CONFIG, {}, "num_max_tokens_per_rank must be given unless buffer is, got None"),
        (CONFIG, {"keep": "fp4"}, "keep must be one of"),
        (CONFIG, {"recompute": "all"}, "recompute must be one of"),
        (CONFIG, {"weights_in": "router"}, "weights_in must be one of"),
        (narrow, {}, "intermediate must be a multiple of 128, got 64"),
    ]
    for config, kwargs, message in todo:
        with pytest.raises(ValueError, match=message):
            MXFP4MoELayer(config, device="cpu", **kwargs)
    with Buffer(num_experts=8, num_topk=2, hidden=256, num_max_tokens_per_rank=64, device="cpu") as buffer:
        with pytest.raises(ValueError, match="must be 'auto' and device its own, cpu, got 'nvlink'"):
            MXFP4MoELayer(CONFIG, buffer=buffer, backend="nvlink")
        with pytest.raises(ValueError, match="precision and num_max_tokens_per_rank must be None with a buffer"):
            MXFP4MoELayer(CONFIG, buffer=buffer, num_max_tokens_per_rank=64)
        with pytest.raises(ValueError, match=r"buffer must be of num_experts=16, .* got num_experts=8"):
            MXFP4MoELayer(dataclasses.replace(CONFIG, num_experts=16), buffer=buffer)


def test_arguments(pool2: RankPool) -> None:
    pool2.run(refused)
