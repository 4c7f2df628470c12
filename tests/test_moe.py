"""The MoE layer: router properties, and the layer through dispatch and combine against the layer without."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Pools

from qcomm import Buffer, WirePrecision, reference
from qcomm.formats import WireKind
from qcomm.moe import MoEConfig, MoELayer, Router, swiglu

CONFIG = MoEConfig(hidden=256, intermediate=128, num_experts=16, num_topk=4)
GROUPED = MoEConfig(
    hidden=256,
    intermediate=128,
    num_experts=16,
    num_topk=4,
    num_groups=4,
    num_topk_groups=2,
    routed_scaling_factor=2.5,
    shared_intermediate=64,
)
NUM_TOKENS = 96


class Outcome(NamedTuple):
    out: torch.Tensor
    expected: torch.Tensor
    again: torch.Tensor


def tokens(count: int, rank: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(count, CONFIG.hidden, generator=generator).to(torch.bfloat16)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def run_layer(
    rank: int, num_ranks: int, config: MoEConfig, wire: WireKind, num_tokens: tuple[int, ...], static: bool = False
) -> Outcome:
    x = tokens(num_tokens[rank], rank)
    layer = MoELayer(config, rank=rank, num_ranks=num_ranks, seed=3)
    with Buffer(
        num_experts=config.num_experts,
        num_topk=config.num_topk,
        hidden=config.hidden,
        num_max_tokens_per_rank=max(num_tokens),
        precision=WirePrecision(dispatch_fwd=wire, combine_fwd="bf16"),
        device="cpu",
    ) as buffer:
        out = layer(x, buffer)
        recv, handle = buffer.dispatch(x, *layer.router(x), static=static)
        again = buffer.combine(layer.experts(recv), handle)
    if layer.shared is not None:
        again = again + layer.shared(x)
    return Outcome(out, MoELayer(config, seed=3).forward_local(x), again)


@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["plain", "grouped"])
def test_weights_are_normalised(config: MoEConfig) -> None:
    idx, weights = Router(config)(tokens(NUM_TOKENS))
    assert idx.shape == weights.shape == (NUM_TOKENS, config.num_topk)
    assert idx.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.full((NUM_TOKENS,), config.routed_scaling_factor))
    assert all(len(set(row)) == config.num_topk for row in idx.tolist())


def test_topk_has_the_largest_scores() -> None:
    router, x = Router(CONFIG), tokens(NUM_TOKENS)
    scores = torch.sigmoid(x.float() @ router.weight.t())
    assert torch.equal(router(x)[0], scores.topk(CONFIG.num_topk).indices)


def test_bias_selects_but_does_not_weigh() -> None:
    router, x = Router(CONFIG), tokens(NUM_TOKENS)
    before = router(x)
    router.bias += 5.0
    after = router(x)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])

    router.bias[7] += 2.0
    idx, weights = router(x)
    assert (idx == 7).any(1).all()
    chosen = torch.sigmoid(x.float() @ router.weight.t()).gather(1, idx)
    torch.testing.assert_close(weights, chosen / chosen.sum(1, keepdim=True))


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_router_is_plain_torch(scores: Literal["sigmoid", "softmax"], normalise: bool) -> None:
    config = dataclasses.replace(GROUPED, num_groups=1, num_topk_groups=1, scores=scores, normalise=normalise)
    router, x = Router(config), tokens(NUM_TOKENS).requires_grad_()
    router.bias += 0.1 * torch.randn(config.num_experts, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(NUM_TOKENS, config.num_topk, generator=torch.Generator().manual_seed(2))

    logits = torch.nn.functional.linear(x.float(), router.weight)
    values = logits.sigmoid() if scores == "sigmoid" else logits.softmax(-1)
    want_idx = (values + router.bias).topk(config.num_topk).indices
    want = values.gather(1, want_idx)
    want = 2.5 * (want / want.sum(1, keepdim=True) if normalise else want)
    want_grads = torch.autograd.grad(want, (x, router.weight), upstream)

    idx, weights = router(x)
    assert torch.equal(idx, want_idx)
    torch.testing.assert_close(weights, want)
    grads = torch.autograd.grad(weights, (x, router.weight), upstream)
    torch.testing.assert_close(grads, want_grads)


def test_router_in_bfloat16_computes_in_float32() -> None:
    router, x = Router(CONFIG), tokens(NUM_TOKENS)
    with torch.no_grad():
        router.weight.copy_(router.weight.bfloat16())
    want_idx, want = router(x)
    narrow = Router(CONFIG).bfloat16()
    narrow.bias = narrow.bias.float()
    idx, weights = narrow(x)
    assert torch.equal(idx, want_idx)
    assert torch.equal(weights, want)
    (grad,) = torch.autograd.grad(weights.square().sum(), narrow.weight)
    assert grad.dtype == torch.bfloat16


def test_router_keeps_no_float32_copy_of_the_tokens() -> None:
    router, x = Router(CONFIG), tokens(NUM_TOKENS).requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        router(x)
    wide = [saved for saved in kept if saved.shape == x.shape]
    assert [saved.dtype for saved in wide] == [torch.bfloat16]


def update_in_group(rank: int, num_ranks: int) -> torch.Tensor:
    router = Router(CONFIG)
    load = torch.full((CONFIG.num_experts,), 10)
    load[rank] += 4
    router.update_bias(load, rate=0.5, group=dist.group.WORLD)
    assert load[rank] == 14
    return router.bias


def test_update_bias_sums_over_the_group(pools: Pools) -> None:
    for bias in pools.get(2).run(update_in_group):
        assert bias[:2].tolist() == [-0.5, -0.5]
        assert (bias[2:] == 0.5).all()


def test_update_bias_moves_against_the_load() -> None:
    router = Router(CONFIG)
    load = torch.full((CONFIG.num_experts,), 10)
    load[2], load[5] = 14, 6
    router.update_bias(load, rate=0.5)
    assert router.bias.nonzero().flatten().tolist() == [2, 5]
    assert router.bias[[2, 5]].tolist() == [-0.5, 0.5]


def test_loads_are_counted_in_float32() -> None:
    """In bfloat16 1025 and 1023 would be 1024 as well."""
    router = Router(MoEConfig(hidden=128, intermediate=128, num_experts=4, num_topk=2)).to(torch.bfloat16)
    router.update_bias(torch.tensor([1025, 1023, 1024, 1024]), rate=1.0)
    assert router.bias.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_update_bias_balances() -> None:
    router, x = Router(CONFIG), tokens(1024)
    with torch.no_grad():
        router.weight[3] += 0.5 * x.float().mean(0) / x.float().mean(0).norm()
        router.weight[:4] *= 2.0

    def load() -> torch.Tensor:
        return torch.bincount(router(x)[0].flatten(), minlength=CONFIG.num_experts)

    before = load()
    for _ in range(200):
        router.update_bias(load(), rate=2e-3)
    assert load().double().std() < before.double().std() / 4


def test_group_limit() -> None:
    router, x = Router(GROUPED), tokens(NUM_TOKENS)
    size = GROUPED.num_experts // GROUPED.num_groups
    idx, _ = router(x)
    assert all(len({expert // size for expert in row}) <= 2 for row in idx.tolist())
    unlimited, _ = Router(CONFIG)(x)
    assert any(len({expert // size for expert in row}) > 2 for row in unlimited.tolist())
    scores = torch.sigmoid(x.float() @ router.weight.t()).unflatten(1, (GROUPED.num_groups, size))
    best = scores.topk(2, dim=2).values.sum(2).topk(2, dim=1).indices
    for groups, row in zip(best.tolist(), idx.tolist(), strict=True):
        assert {expert // size for expert in row} <= set(groups)


def test_shards_hold_the_same_experts() -> None:
    whole = MoELayer(CONFIG, seed=3)
    shard = MoELayer(CONFIG, rank=1, num_ranks=4, seed=3)
    assert len(shard.experts) == 4
    assert torch.equal(shard.experts.gate_up, whole.experts.gate_up[4:8])
    assert torch.equal(shard.experts.down, whole.experts.down[4:8])
    assert torch.equal(shard.router.weight, whole.router.weight)
    assert not torch.equal(whole.experts.down, MoELayer(CONFIG, seed=4).experts.down)


@torch.no_grad()
def test_forward_local_is_the_weighted_sum() -> None:
    layer, x = MoELayer(GROUPED, seed=3), tokens(5)
    idx, weights = layer.router(x)
    out = layer.forward_local(x)
    assert out.dtype == torch.float32
    assert layer.shared is not None
    for token in range(5):
        row = x[token : token + 1]
        want = layer.shared(row).float()
        for expert, weight in zip(idx[token].tolist(), weights[token], strict=True):
            want += weight * swiglu(row, layer.experts.gate_up[expert], layer.experts.down[expert]).float()
        # One row and many may take different BF16 matrix products.
        assert relative_error(out[token : token + 1], want) < 2**-7


def test_gradients_reach_every_used_expert() -> None:
    layer, x = MoELayer(CONFIG, seed=3), tokens(NUM_TOKENS)
    layer.forward_local(x).square().sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().sum() > 0
    assert layer.experts.down.grad is not None
    used = layer.router(x)[0].unique()
    assert (layer.experts.down.grad.float().abs().sum((1, 2))[used] > 0).all()


@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["plain", "grouped-shared"])
@pytest.mark.parametrize("num_tokens", [(NUM_TOKENS,), (NUM_TOKENS, 33), (40, 0)], ids=str)
def test_bf16_wire_loses_one_rounding_per_rank(pools: Pools, config: MoEConfig, num_tokens: tuple[int, ...]) -> None:
    for result in pools.get(len(num_tokens)).run(run_layer, config, "bf16", num_tokens):
        assert result.out.dtype == torch.bfloat16
        assert result.out.shape == result.expected.shape
        assert torch.equal(result.out, result.again)
        if len(result.out):
            # The sums of each rank, their total and the shared expert's addition round to 2^-9 at worst.
            assert 0 < relative_error(result.out, result.expected) < 2**-8


@pytest.mark.parametrize("wire", ["fp8", "mxfp4"])
def test_quantized_wire_error_follows_from_the_input_error(pools: Pools, wire: WireKind) -> None:
    (result,) = pools.get(1).run(run_layer, CONFIG, wire, (NUM_TOKENS,))
    x = tokens(NUM_TOKENS)
    if wire == "fp8":
        decoded = reference.dequantize_fp8(reference.quantize_fp8(x))
    else:
        decoded = reference.dequantize_mxfp4(reference.quantize_mxfp4(x))
    input_error = relative_error(decoded, x)
    # SwiGLU multiplies two projections of x whose errors are independent: about sqrt(2) of one, and more for silu.
    assert input_error < relative_error(result.out, result.expected) < 2 * input_error


def test_static_receive_gives_the_same_output(pools: Pools) -> None:
    for result in pools.get(2).run(run_layer, CONFIG, "mxfp4", (NUM_TOKENS, 33), static=True):
        assert torch.equal(result.out, result.again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 100}, "hidden must be a multiple of 128, got 100"),
        ({"num_groups": 3}, "num_experts must be a multiple of the 3 groups, got 16"),
        ({"num_groups": 2, "num_topk_groups": 3}, "num_topk_groups must be at most num_groups = 2, got 3"),
        ({"num_groups": 8}, "num_topk must be at most the 2 experts in num_topk_groups groups, got 4"),
        ({"shared_intermediate": -1}, "shared_intermediate must not be negative, got -1"),
        ({"scores": "relu"}, r"scores must be one of \('sigmoid', 'softmax'\), got 'relu'"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    shape: dict[str, Any] = {"hidden": 256, "intermediate": 128, "num_experts": 16, "num_topk": 4}
    with pytest.raises(ValueError, match=message):
        MoEConfig(**(shape | changes))


def test_layer_errors() -> None:
    with pytest.raises(ValueError, match="num_experts must be a multiple of the 3 ranks, got 16"):
        MoELayer(CONFIG, num_ranks=3)
    with pytest.raises(ValueError, match=r"needs all 16 experts on this rank .* got 8"):
        MoELayer(CONFIG, num_ranks=2).forward_local(tokens(1))
