"""SwiGLU and its gradients in BF16 against the oracle: the same bits or a neighbour's.

The kernels run on a GPU, and without one in Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from bit_patterns import all_bf16
from codec_cases import DEVICES, REARRANGEMENTS, Outputs, gpu_only, wild
from test_swiglu import POINTERS, SHAPES, check_gradients, check_neighbours, some_weights
from triton_cases import compile_for_hopper
from triton_cases import outcomes as interpreted_outcomes

from qcomm import reference
from qcomm import reference_swiglu as oracle
from qcomm.formats import ScaleRule
from qcomm.ops import swiglu
from qcomm.ops.swiglu import Tile, swiglu_backward, swiglu_bf16

MOST_UNEQUAL = 3e-3
Outcome = tuple[torch.Tensor, torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of `swiglu_bf16`, or with `grad_h` of `swiglu_backward`."""

    x: torch.Tensor
    grad_h: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def to(self, device: str) -> Call:
        grad_h = None if self.grad_h is None else self.grad_h.to(device)
        return Call(self.x.to(device), grad_h, None if self.weights is None else self.weights.to(device))

    def run(self) -> Outcome:
        """Run the public function."""
        if self.grad_h is None:
            return swiglu_bf16(self.x, weights=self.weights), None
        return swiglu_backward(self.grad_h, self.x, weights=self.weights)


def run_kernels(call: Call, tile: Tile | None = None) -> Outcome:
    """Launch the kernels by the way that the interpreter can go, on poisoned outputs."""
    outputs, (rows, columns) = Outputs(call.x.device), call.x.shape
    if call.grad_h is None:
        h = outputs.empty((rows, columns // 2), torch.bfloat16)
        swiglu.launch_forward(call.x, call.weights, h, None, None, None, ScaleRule.EVEN, native=False, tile=tile)
        outcome: Outcome = h, None
    else:
        grad_x = outputs.empty((rows, columns), torch.bfloat16)
        grad_weights = None if call.weights is None else outputs.empty((rows,), torch.float32)
        swiglu.launch_backward(call.grad_h, call.x, None, call.weights, grad_x, grad_weights, native=False, tile=tile)
        outcome = grad_x, grad_weights
    outputs.check()
    return outcome


def run_interpreted(call: Call) -> Outcome:
    """Launch the kernels in Triton's interpreter, by few programs, the last of them mostly not full."""
    num_groups = call.x.numel() // 256
    return run_kernels(call, Tile(min(512, 1 << max(0, num_groups.bit_length() - 1)), 1))


def calls() -> dict[str, Call]:
    """Everything that the interpreter runs too."""
    gate = all_bf16().view(-1, 128)
    pairs = torch.cat([torch.cat((gate, torch.full_like(gate, up)), 1) for up in (1.0, -3e-3, 1e30)])
    made = {
        "every gate": Call(pairs),
        "gradients at every gate": Call(pairs, wild((len(pairs), 128), torch.bfloat16, 9)),
    }
    for seed, (rows, columns) in enumerate(SHAPES):
        for name, x, grad in (
            ("", 4 * torch.randn(rows, 2 * columns), torch.randn(rows, columns)),
            ("wild ", wild((rows, 2 * columns), torch.bfloat16, seed), wild((rows, columns), torch.bfloat16, seed)),
        ):
            weights = some_weights(rows, seed) if (seed + len(name)) % 2 else None
            made[f"{name}forward {rows} x {columns}"] = Call(x.bfloat16(), None, weights)
            made[f"{name}backward {rows} x {columns}"] = Call(x.bfloat16(), grad.bfloat16(), weights)
    return made


torch.manual_seed(0)
CALLS = calls()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return interpreted_outcomes("test_swiglu_bf16", CALLS, tmp_path_factory.mktemp("swiglu_bf16"))


def check(outcome: Outcome, call: Call) -> None:
    """Compare with the oracle."""
    if call.grad_h is None:
        want = reference.to_dtype(oracle.product(call.x, call.weights), torch.bfloat16)
        check_neighbours(outcome[0], want, MOST_UNEQUAL)
    else:
        check_gradients(outcome, call.grad_h, call.x, call.weights, MOST_UNEQUAL)


@pytest.mark.parametrize("name", CALLS)
def test_kernels_in_the_interpreter(name: str, interpreted: dict[str, Outcome]) -> None:
    check(interpreted[name], CALLS[name])


@pytest.mark.parametrize("name", CALLS)
@gpu_only
def test_kernels(name: str) -> None:
    """As they are, and by the way of the interpreter."""
    call = CALLS[name].to("cuda")
    check(call.run(), call)
    check(run_kernels(call), call)


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_any_strides(device: str) -> None:
    x, grad = wild((37, 512), torch.bfloat16, 3).to(device), wild((37, 256), torch.bfloat16, 4).to(device)
    weights = some_weights(37, 3).to(device)
    for rearrange in REARRANGEMENTS.values():
        for call in (Call(rearrange(x), None, weights), Call(rearrange(x), rearrange(grad), weights)):
            check(call.run(), call)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    x, h = wild((5, 256), torch.bfloat16, 1).to(device), torch.empty(5, 128, dtype=torch.bfloat16, device=device)
    grad_x = torch.empty_like(x)
    torch.library.opcheck(swiglu._swiglu_bf16, (x, None, h))
    torch.library.opcheck(swiglu._swiglu_backward, (h.fill_(1), x, None, None, grad_x, None))


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("name", ["swiglu_forward", "swiglu_backward"])
def test_compiled_for_hopper(name: str, with_weights: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """16-byte accesses alone, nothing in local memory."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forward = name == "swiglu_forward"
    per_warp = swiglu.WEIGHTED_GROUPS_PER_WARP if forward and with_weights else swiglu.FORWARD_GROUPS_PER_WARP
    warps = 4 if forward else 2
    kernel = getattr(swiglu.kernels(), name)
    missing = {"h_sf", "qdata", "sf", *(() if with_weights else ("weights", "partials"))}
    constants = {"GROUPS_PER_ROW": 56, "BLOCK_GROUPS": warps * per_warp, "NATIVE": True}
    constants |= {n: None for n in kernel.arg_names if n in missing}
    compiled = compile_for_hopper(kernel, {**POINTERS, "h": "*i16", "saved": "*i32"}, constants, warps)
    ptx: str = compiled.asm["ptx"]
    # A warp reads gate and up, and backward their gradient; it writes h, or backward the gradients of both.
    assert ptx.count("ld.global.v4.b32") == (2 if forward else 3) * per_warp // 2
    assert ptx.count("st.global.v4.b32") == (1 if forward else 2) * per_warp // 2
    assert ".local" not in ptx
