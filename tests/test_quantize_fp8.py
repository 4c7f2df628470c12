"""BF16 to FP8 rows and weights by the Triton kernels, bit for bit as plain PyTorch and the oracle.

The kernels run on a GPU, and without one in Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from bit_patterns import all_bf16, equal_bits
from codec_cases import gpu_only, wild
from moe_truth import quantize_weights as oracle_of_weights
from triton_cases import compile_for_hopper
from triton_cases import outcomes as interpreted_outcomes

from qcomm import reference
from qcomm.moe.quantize import quantize_rows, quantize_weights
from qcomm.ops.quantize_fp8 import launch_blocks, launch_rows
from qcomm.ops.triton_kernels import load

Result = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Call:
    """Rows, or weights and whether their transposes are wanted."""

    x: torch.Tensor
    transposed: bool = False


def run_kernel(call: Call, *, native: bool) -> Result:
    """Launch the kernel on poisoned outputs; returns codes and scales."""
    x, shape = call.x, call.x.shape
    if call.transposed:
        shape = torch.Size((shape[0], shape[2], shape[1]))
    data = torch.full(shape, 0xAA, dtype=torch.uint8, device=x.device)
    height = shape[-2] // 128 if x.dim() == 3 else shape[0]
    sf = torch.full((*shape[:-2], height, shape[-1] // 128), torch.nan, device=x.device)
    if x.dim() == 3:
        launch_blocks(x, data, sf, transposed=call.transposed, native=native)
    else:
        launch_rows(x, data, sf, native=native, block_groups=16 if native else 64)
    return data, sf


def run_interpreted(call: Call) -> Result:
    """Launch the kernel in Triton's interpreter."""
    return run_kernel(call, native=False)


def _calls() -> dict[str, Call]:
    every = all_bf16().view(-1, 256)
    weights = torch.cat([wild((1, 256, 384), torch.bfloat16, 1), torch.randn(2, 256, 384).bfloat16()])
    weights[1, :128, :128] = 0.0
    weights[2, 130, 5] = torch.nan
    made = {
        f"rows {rows}x{columns}": Call(wild((rows, columns), torch.bfloat16, rows))
        for rows, columns in ((0, 128), (1, 128), (33, 384), (130, 256))
    }
    made["every value"] = Call(every)
    for transposed in (False, True):
        made[f"weights, {transposed}"] = Call(weights, transposed)
        made[f"one tile, {transposed}"] = Call(wild((1, 128, 128), torch.bfloat16, 7), transposed)
        made[f"no weights, {transposed}"] = Call(torch.empty(0, 128, 256, dtype=torch.bfloat16), transposed)
    return made


CALLS = _calls()


def _check(got: Result, call: Call) -> None:
    data, sf = got
    if call.x.dim() == 2:
        want = reference.quantize_fp8(call.x)
        want_data, want_sf = want.data.view(torch.uint8), want.sf
    else:
        x = call.x.transpose(1, 2) if call.transposed else call.x
        codes, want_sf = oracle_of_weights(x)
        want_data = codes.view(torch.uint8)
    assert equal_bits(sf.cpu(), want_sf)
    assert equal_bits(data.cpu(), want_data)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return interpreted_outcomes("test_quantize_fp8", CALLS, tmp_path_factory.mktemp("quantize_fp8"))


@pytest.mark.parametrize("name", CALLS)
def test_kernels_in_the_interpreter(name: str, interpreted: dict[str, Result]) -> None:
    _check(interpreted[name], CALLS[name])


@gpu_only
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_kernels_on_a_gpu(name: str, native: bool) -> None:
    call = dataclasses.replace(CALLS[name], x=CALLS[name].x.cuda())
    _check(run_kernel(call, native=native), CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str) -> None:
    call = CALLS[name]
    for x in (call.x, call.x.cuda()) if torch.cuda.is_available() else (call.x,):
        made = quantize_rows(x) if x.dim() == 2 else quantize_weights(x, transposed=call.transposed)
        _check((made.data.view(torch.uint8), made.sf), call)


@pytest.mark.parametrize("name", ["quantize_rows", "quantize_blocks", "quantize_blocks, transposed"])
def test_compiled_for_hopper(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """16-byte accesses, the GPU's own conversion, nothing in local memory."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"NATIVE": True, "BLOCK_GROUPS": 16} if name == "quantize_rows" else {"NATIVE": True}
    if name != "quantize_rows":
        constants["TRANSPOSED"] = name.endswith("transposed")
    kernel = getattr(load("quantize_fp8"), name.split(",")[0])
    pointers = {"x": "*i16", "w": "*i16", "data": "*u8", "sf": "*fp32"}
    warps = 4 if name == "quantize_rows" else 8
    ptx: str = compile_for_hopper(kernel, pointers, constants, warps).asm["ptx"]
    elements = 16 * 128 if name == "quantize_rows" else 128 * 128
    assert ptx.count("ld.global.v4.b32") == elements * 2 // (32 * warps * 16)
    assert ptx.count("st.global.v4.b32") == elements // (32 * warps * 16)
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert ".local" not in ptx
