"""The experts of Hugging Face transformers over qcomm, against the same models in one process."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commands import REPO, mpirun, start
from ranks import Pools
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from qcomm import QcommOverflowError, Rounding, ScaleRule, WireFormat, WirePrecision, reference
from qcomm.formats import WireKind

NEEDS = "needs transformers >= 5.23 and accelerate (the extra 'transformers')"


def has_transformers() -> bool:
    try:
        importlib.metadata.version("accelerate")
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in found.split(".")[:2]) >= (5, 23)


needs_transformers = pytest.mark.skipif(not has_transformers(), reason=NEEDS)
KINDS = ("qwen3_moe", "deepseek_v3", "gpt_oss")
SEQUENCE, NUM_EXPERTS, NUM_TOPK = 12, 8, 2


class Shape(NamedTuple):
    """How ranks are laid out; `sequences` is what each rank's batch holds, ranks of one TP group sharing one."""

    name: str
    num_ranks: int
    ep: int
    fsdp: int
    tp: int
    sequences: tuple[int, ...]


APART = Shape("apart", 2, ep=2, fsdp=2, tp=1, sequences=(2, 2))
UNEVEN = Shape("uneven", 2, ep=2, fsdp=2, tp=1, sequences=(1, 5))
TOGETHER = Shape("together", 2, ep=2, fsdp=1, tp=2, sequences=(3,))
FOUR = Shape("four", 4, ep=4, fsdp=4, tp=1, sequences=(2, 1, 2, 1))
COPIES = Shape("copies", 4, ep=2, fsdp=4, tp=1, sequences=(2, 2, 1, 1))
BOTH = Shape("both", 4, ep=4, fsdp=2, tp=2, sequences=(2, 1))


def make_config(kind: str) -> Any:
    from transformers import DeepseekV3Config, GptOssConfig, Qwen3MoeConfig

    common: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "qwen3_moe":
        return Qwen3MoeConfig(
            hidden_size=128,
            intermediate_size=128,
            moe_intermediate_size=64,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=NUM_TOPK,
            num_key_value_heads=2,
            head_dim=32,
            norm_topk_prob=True,
            **common,
        )
    if kind == "deepseek_v3":
        return DeepseekV3Config(
            hidden_size=128,
            intermediate_size=128,
            moe_intermediate_size=64,
            n_routed_experts=NUM_EXPERTS,
            num_experts_per_tok=NUM_TOPK,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            first_k_dense_replace=0,
            num_key_value_heads=4,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=32,
            **common,
        )
    # As of the real one, its hidden size is no multiple of 128.
    return GptOssConfig(
        hidden_size=96,
        intermediate_size=64,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_TOPK,
        num_key_value_heads=2,
        head_dim=32,
        **common,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folders of tiny models with random weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")

    def save(kind: str) -> str:
        path = folder / kind
        if not path.exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(make_config(kind), dtype=torch.bfloat16)
            with torch.no_grad():
                for router in routers(model):
                    router.weight *= 30.0
            model.save_pretrained(path)
        return str(path)

    return save


def routers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "Router" in type(module).__name__]


def load(path: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def pin_routes(model: nn.Module, topk_idx: torch.Tensor) -> None:
    """Route to given experts: a near tie that rounding decides is no error of the exchange.

    Weights stay the router's, so that it has gradients.
    """

    def pin(router: nn.Module, args: object, out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, _ = out
        return logits, logits.gather(1, topk_idx).sigmoid().to(weights.dtype), topk_idx

    for router in routers(model):
        router.register_forward_hook(pin)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return reference.dequantize_mxfp4(reference.quantize_mxfp4(x), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def quantize_inputs(model: nn.Module) -> None:
    """Let experts see what an MXFP4 wire makes of their tokens."""
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda experts, args: (_Straight.apply(args[0]), *args[1:]))


def make_tokens(shape: Shape) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(64, (count, SEQUENCE), generator=generator) for count in shape.sequences]


def make_routes(shape: Shape, num_used: int = NUM_EXPERTS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [
        torch.rand(count * SEQUENCE, num_used, generator=generator).topk(NUM_TOPK).indices for count in shape.sequences
    ]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def whole(tensor: Any) -> torch.Tensor:
    """A parameter's or gradient's full tensor. Collective."""
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def loss_of(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=tokens).logits
    return logits, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@dataclasses.dataclass
class Outcome:
    logits: torch.Tensor
    grads: dict[str, torch.Tensor]


def run_alone(
    path: str, shape: Shape, num_used: int = NUM_EXPERTS, quantized: bool = False
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits by batch and gradients of the mean over batches, in one process."""
    model = load(path)
    if quantized:
        quantize_inputs(model)
    logits = []
    for tokens, routes in zip(make_tokens(shape), make_routes(shape, num_used), strict=True):
        hooks = [router._forward_hooks for router in routers(model)]
        pin_routes(model, routes)
        out, loss = loss_of(model, tokens)
        (loss / len(shape.sequences)).backward()
        logits.append(out.detach())
        for each in hooks:
            each.clear()
    return logits, {name: whole(p.grad) for name, p in model.named_parameters()}


def load_on_ranks(
    path: str,
    shape: Shape,
    settings: dict[str, Any],
    checkpointing: bool = False,
    fsdp_mixed_precision: bool = False,
    **options: Any,
) -> Any:
    from transformers.distributed import DistributedConfig

    import qcomm.integrations.transformers as integration

    integration.register("qcomm_test", **settings)
    config = DistributedConfig(
        ep_size=shape.ep,
        fsdp_size=shape.fsdp,
        tp_size=shape.tp,
        ep_implementation="qcomm_test",
        fsdp_mixed_precision=fsdp_mixed_precision,
    )
    model = load(path, distributed_config=config, **options)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def run_ranks(
    rank: int,
    num_ranks: int,
    path: str,
    shape: Shape,
    settings: dict[str, Any],
    num_used: int = NUM_EXPERTS,
    checkpointing: bool = False,
    **options: Any,
) -> Outcome:
    """This rank's logits, and on rank 0 the gradients of the mean over batches."""
    import qcomm.integrations.transformers as integration

    torch.manual_seed(rank)
    model = load_on_ranks(path, shape, settings, checkpointing, **options)
    batch = rank // shape.tp
    pin_routes(model, make_routes(shape, num_used)[batch])
    try:
        logits, loss = loss_of(model, make_tokens(shape)[batch])
        loss.backward()
        grads = {name: whole(p.grad) for name, p in model.named_parameters()}
        return Outcome(whole(logits), grads if rank == 0 else {})
    finally:
        integration.close()


WIRES: dict[WireKind, WirePrecision] = {"bf16": WirePrecision.bf16(), "mxfp4": WirePrecision()}
CASES = [
    *[(kind, shape) for kind in KINDS for shape in (APART, FOUR)],
    ("qwen3_moe", UNEVEN),
    ("qwen3_moe", TOGETHER),
    ("qwen3_moe", COPIES),
    ("qwen3_moe", BOTH),
    ("gpt_oss", TOGETHER),
]


# Logits and gradients against one process. On the bf16 wire only the order of sums differs, and where they are rounded
# to bfloat16. Quantizing the tokens of the second layer makes larger steps of such differences in the first.
TOLERANCES: dict[WireKind, tuple[float, float]] = {"bf16": (2**-6, 2**-5), "mxfp4": (2**-6, 2**-3)}


@needs_transformers
@pytest.mark.parametrize("wire", ["bf16", "mxfp4"])
@pytest.mark.parametrize(("kind", "shape"), CASES, ids=[f"{k}-{s.name}" for k, s in CASES])
def test_model_is_that_of_one_process(
    pools: Pools, saved: Callable[[str], str], kind: str, shape: Shape, wire: WireKind
) -> None:
    path = saved(kind)
    alone, grads = run_alone(path, shape, quantized=wire == "mxfp4")
    outcomes = pools.get(shape.num_ranks).run(run_ranks, path, shape, {"precision": WIRES[wire]})
    of_logits, of_gradients = TOLERANCES[wire]
    for rank, outcome in enumerate(outcomes):
        assert relative_error(outcome.logits, alone[rank // shape.tp]) < of_logits
    assert outcomes[0].grads.keys() == grads.keys()
    errors = {name: relative_error(outcomes[0].grads[name], want) for name, want in grads.items()}
    # Tensor parallelism rounds more of its own sums to bfloat16, whatever exchanges the tokens.
    assert {name: error for name, error in errors.items() if not error < min(shape.tp, 2) * of_gradients} == {}
    if wire == "mxfp4":
        unquantized, _ = run_alone(path, shape)
        for rank, outcome in enumerate(outcomes):
            exact = unquantized[rank // shape.tp]
            stated = relative_error(alone[rank // shape.tp], exact)
            assert 0.5 * stated < relative_error(outcome.logits, exact) < 1.5 * stated


def run_layer(rank: int, num_ranks: int) -> list[torch.Tensor]:
    """Run the experts of one layer on tokens of this rank: out, and gradients of tokens and weights."""
    from transformers.distributed.expert_parallel import EPImplementationInterface

    import qcomm.integrations.transformers as integration

    mesh = init_device_mesh("cpu", (num_ranks, 1), mesh_dim_names=("ep", "tp"))
    experts, count = make_experts(), NUM_EXPERTS // num_ranks
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[rank * count : (rank + 1) * count].detach())
    experts.down_proj = nn.Parameter(experts.down_proj[rank * count : (rank + 1) * count].detach())
    experts.num_experts = count
    integration.register("qcomm_test", precision=WIRES["bf16"])
    layer = EPImplementationInterface()["qcomm_test"](experts, mesh["ep"], mesh["tp"])
    try:
        return layer_gradients(layer, rank)
    finally:
        integration.close()


def make_experts() -> Any:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = make_config("qwen3_moe")
    config._experts_implementation = "grouped_mm"
    experts, generator = Qwen3MoeExperts(config), torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * parameter.shape[2] ** -0.5).bfloat16()
    return experts


def layer_gradients(layer: Callable[..., torch.Tensor], rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(20 + rank)
    tokens = torch.randn(40 + rank, 128, generator=generator).bfloat16().requires_grad_()
    routes = torch.rand(40 + rank, NUM_EXPERTS, generator=generator).topk(NUM_TOPK).indices
    weights = torch.rand(40 + rank, NUM_TOPK, generator=generator).bfloat16().requires_grad_()
    out = layer(tokens, routes, weights)
    out.backward(torch.randn(out.shape, generator=generator).bfloat16())
    assert tokens.grad is not None
    assert weights.grad is not None
    return [out.detach(), tokens.grad, weights.grad]


@needs_transformers
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_layer_on_the_bf16_wire_differs_by_roundings(pools: Pools, num_ranks: int) -> None:
    for rank, got in enumerate(pools.get(num_ranks).run(run_layer)):
        for name, a, b in zip(
            ("out", "d_tokens", "d_weights"), got, layer_gradients(make_experts(), rank), strict=True
        ):
            assert a.dtype == b.dtype
            assert relative_error(a, b) < 2**-7, name


@needs_transformers
def test_rank_without_rows(pools: Pools, saved: Callable[[str], str]) -> None:
    """Experts of the first rank get everything."""
    used = NUM_EXPERTS // 2
    for kind in ("qwen3_moe", "gpt_oss"):
        alone, grads = run_alone(saved(kind), APART, used)
        outcomes = pools.get(2).run(run_ranks, saved(kind), APART, {"precision": WIRES["bf16"]}, used)
        for outcome, want in zip(outcomes, alone, strict=True):
            assert relative_error(outcome.logits, want) < 2**-6
        for name, want in grads.items():
            assert relative_error(outcomes[0].grads[name], want) < 2**-5, name
            if ".experts." in name:
                assert (outcomes[0].grads[name][used:] == 0).all()


def same(got: list[Outcome], want: list[Outcome]) -> bool:
    """Tell whether logits have the same bits, and gradients too, but for what the product of groups of rows rounds."""
    return all(
        torch.equal(a.logits, b.logits)
        and all(relative_error(a.grads[name], b.grads[name]) < 2**-14 for name in b.grads)
        for a, b in zip(got, want, strict=True)
    )


@needs_transformers
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_static_receives_change_nothing(pools: Pools, saved: Callable[[str], str], experts: str) -> None:
    path, run = saved("qwen3_moe"), pools.get(2).run
    options: dict[str, Any] = {"experts_implementation": experts}
    want = run(run_ranks, path, UNEVEN, {}, **options)
    assert same(run(run_ranks, path, UNEVEN, {"static": True}, **options), want)
    # As many as there are: 6 sequences, to two experts each, and all could go to one rank.
    rows = sum(UNEVEN.sequences) * SEQUENCE * NUM_TOPK
    assert same(run(run_ranks, path, UNEVEN, {"num_max_recv_tokens": rows}, **options), want)


@needs_transformers
def test_checkpointing_changes_nothing(pools: Pools, saved: Callable[[str], str]) -> None:
    stochastic = WireFormat("mxfp4", ScaleRule.RCEIL, Rounding.STOCHASTIC, hadamard=True)
    for precision in (WirePrecision(), WirePrecision(dispatch_fwd=stochastic)):
        runs = [
            pools.get(2).run(run_ranks, saved("qwen3_moe"), UNEVEN, {"precision": precision}, checkpointing=each)
            for each in (False, True)
        ]
        assert same(runs[1], runs[0])


def count_questions(
    rank: int, num_ranks: int, path: str, shape: Shape, settings: dict[str, Any], checkpointing: bool
) -> tuple[list[int], list[int]]:
    """Return how often each forward and backward asked the other ranks, and the capacities of all buffers."""
    import qcomm.integrations.transformers as integration

    asked = 0
    ask = integration._Exchange._most

    def count(self: Any, num_tokens: int) -> int:
        nonlocal asked
        asked += 1
        return ask(self, num_tokens)

    model = load_on_ranks(path, shape, settings, checkpointing)
    counts = []
    integration._Exchange._most = count  # type: ignore[method-assign]
    try:
        for num_sequences in (1, 8 if rank else 1, 1):
            tokens = torch.zeros(num_sequences, SEQUENCE, dtype=torch.int64)
            _, loss = loss_of(model, tokens)
            counts.append(asked)
            loss.backward()
            counts.append(asked - counts[-1])
            asked = 0
        (exchange,) = integration._exchanges.values()
        return counts, sorted(exchange._buffers)
    finally:
        integration._Exchange._most = ask  # type: ignore[method-assign]
        integration.close()


@needs_transformers
def test_ranks_ask_each_other_once_a_pass(pools: Pools, saved: Callable[[str], str]) -> None:
    path, run = saved("qwen3_moe"), pools.get(2).run
    # Rank 1 passes up to 96 tokens, and both layers share a buffer.
    for counts, capacities in run(count_questions, path, APART, {}, checkpointing=False):
        assert counts == [1, 0, 1, 0, 1, 0]
        assert capacities == [64, 128]
    for counts, capacities in run(count_questions, path, APART, {}, checkpointing=True):
        assert counts == [1, 2, 1, 2, 1, 2]
        assert capacities == [64, 128]
    for counts, capacities in run(count_questions, path, APART, {"num_max_tokens_per_rank": 96}, checkpointing=True):
        assert counts == [0] * 6
        assert capacities == [96]


def refuse(rank: int, num_ranks: int, path: str, settings: dict[str, Any], dtype: torch.dtype) -> str:
    import qcomm.integrations.transformers as integration

    model = load_on_ranks(path, APART, settings, dtype=dtype)
    try:
        loss_of(model, torch.zeros(1, SEQUENCE, dtype=torch.int64))
    except (TypeError, ValueError) as error:
        return str(error)
    finally:
        integration.close()
    return ""


@needs_transformers
def test_what_is_refused(pools: Pools, saved: Callable[[str], str]) -> None:
    run = pools.get(2).run
    for message in run(refuse, saved("qwen3_moe"), {}, torch.float32):
        assert "hidden_states must be torch.bfloat16" in message
        assert "got torch.float32" in message
    for message in run(refuse, saved("qwen3_moe"), {"num_max_tokens_per_rank": 8}, torch.bfloat16):
        assert "at most num_max_tokens_per_rank = 8 rows, got 12" in message


def overflow(rank: int, num_ranks: int, path: str) -> str:
    import qcomm.integrations.transformers as integration

    model = load_on_ranks(path, APART, {"num_max_recv_tokens": 4})
    try:
        with torch.no_grad():
            loss_of(model, torch.zeros(1, SEQUENCE, dtype=torch.int64))
    except QcommOverflowError as error:
        return str(error)
    finally:
        integration.close()
    return ""


@needs_transformers
def test_too_small_a_static_receive_is_told_in_the_next_layer(pools: Pools, saved: Callable[[str], str]) -> None:
    messages = pools.get(2).run(overflow, saved("qwen3_moe"))
    assert any("num_max_recv_tokens gave 4" in message for message in messages)


def run_without_tokens(rank: int, num_ranks: int, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    import qcomm.integrations.transformers as integration

    model = load_on_ranks(path, APART, {})
    num_tokens = 0 if rank else 5
    x = torch.randn(num_tokens, 128).bfloat16().requires_grad_()
    try:
        routes = torch.tensor([1, NUM_EXPERTS - 1]).expand(num_tokens, NUM_TOPK)
        out = model.model.layers[0].mlp.experts(x, routes, torch.rand(num_tokens, NUM_TOPK))
        out.sum().backward()
        assert x.grad is not None
        return tuple(out.shape), tuple(x.grad.shape)
    finally:
        integration.close()


@needs_transformers
def test_rank_without_tokens(pools: Pools, saved: Callable[[str], str]) -> None:
    results = pools.get(2).run(run_without_tokens, saved("qwen3_moe"))
    assert results == [((5, 128), (5, 128)), ((0, 128), (0, 128))]


@needs_transformers
@pytest.mark.parametrize(
    ("settings", "backend", "experts", "rows", "want"),
    [
        ({}, "nvlink", "grouped_mm", 32768, (True, None)),
        ({}, "nvlink", "grouped_mm", 32769, (False, None)),
        ({}, "nvlink", "eager", 64, (False, None)),
        ({}, "collective", "grouped_mm", 64, (False, None)),
        ({"static": True}, "collective", "eager", 1 << 20, (True, None)),
        ({"static": False}, "nvlink", "grouped_mm", 64, (False, None)),
        ({"num_max_recv_tokens": 4096}, "nvlink", "grouped_mm", 1 << 20, (True, 4096)),
        ({"num_max_recv_tokens": 4096}, "nvlink", "grouped_mm", 64, (True, 64)),
    ],
)
def test_when_receives_are_static(
    settings: dict[str, Any], backend: str, experts: str, rows: int, want: tuple[bool, int | None]
) -> None:
    from qcomm.integrations.transformers import Settings, choose_static

    assert choose_static(Settings(**settings), backend, experts, rows) == want


def generate(rank: int, num_ranks: int, path: str, shape: Shape) -> list[list[int]]:
    import qcomm.integrations.transformers as integration

    model = load_on_ranks(path, shape, {})
    prompt = torch.full((1 + rank // shape.tp, 3), 5 + rank // shape.tp)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    try:
        out: list[list[int]] = model.generate(prompt, **options).tolist()
        return out
    finally:
        integration.close()


@needs_transformers
@pytest.mark.parametrize("shape", [APART, TOGETHER], ids=["apart", "together"])
def test_generates(pools: Pools, saved: Callable[[str], str], shape: Shape) -> None:
    # Together, one rank has the only token of a step, and the other none.
    first, second = pools.get(2).run(generate, saved("qwen3_moe"), shape)
    assert [len(row) for row in first + second] == [8] * (len(first) + len(second))
    if shape is TOGETHER:
        assert first == second
    else:
        assert second[0] == second[1]


@needs_transformers
def test_float32_parameters_with_mixed_precision(pools: Pools, saved: Callable[[str], str]) -> None:
    path, settings = saved("qwen3_moe"), {"precision": WIRES["bf16"]}
    alone, _ = run_alone(path, APART)
    outcomes = pools.get(2).run(run_ranks, path, APART, settings, dtype=torch.float32, fsdp_mixed_precision=True)
    for outcome, want in zip(outcomes, alone, strict=True):
        assert relative_error(outcome.logits, want) < 2**-6
    assert all(grad.dtype == torch.float32 for grad in outcomes[0].grads.values())


@needs_transformers
def test_settings_are_checked_when_registered() -> None:
    from transformers.distributed.expert_parallel import EPImplementationInterface

    from qcomm.integrations.transformers import register

    with pytest.raises(ValueError, match="num_max_recv_tokens must be None with static=False, got 64"):
        register("qcomm_wrong", static=False, num_max_recv_tokens=64)
    with pytest.raises(ValueError, match="num_max_tokens_per_rank"):
        register("qcomm_wrong", num_max_tokens_per_rank=0)
    assert "qcomm" in EPImplementationInterface()
    assert "qcomm_wrong" not in EPImplementationInterface()


@pytest.mark.parametrize(("version", "found"), [(None, "found none"), ("5.22.2", "found 5.22.2")])
def test_old_or_missing_transformers(tmp_path: Path, version: str | None, found: str) -> None:
    lines = ["import importlib.metadata, sys"]
    if version is None:
        lines += [
            "sys.modules['transformers'] = None",
            "def version(name): raise importlib.metadata.PackageNotFoundError(name)",
        ]
    else:
        (tmp_path / "transformers").mkdir()
        (tmp_path / "transformers" / "__init__.py").touch()
        lines += [f"sys.path.insert(0, {str(tmp_path)!r})", f"def version(name): return {version!r}"]
    lines += ["importlib.metadata.version = version", "import qcomm.integrations.transformers"]
    done = start(sys.executable, "-c", "\n".join(lines))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: qcomm.integrations.transformers needs transformers >= 5.23, " + found)


@needs_transformers
@pytest.mark.mpi
@pytest.mark.slow
def test_example() -> None:
    done = start(*mpirun(2), sys.executable, str(REPO / "examples/transformers_moe.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.5 * losses[0]
    assert "generated" in done.stdout
