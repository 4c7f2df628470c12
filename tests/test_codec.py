"""What holds for each of the codec's functions: operators of torch, streams, graphs, devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from bit_patterns import equal_bits
from codec_cases import DEVICES, FORMS, assert_same_bits, gpu_only, moved, poison, wild, wild_fp8, wild_mxfp4
from torch._subclasses.fake_tensor import FakeTensorMode

from qcomm import (
    FP8Tensor,
    MXFP4Tensor,
    Rounding,
    ScaleLayout,
    ScaleRule,
    dequantize,
    fp8_transpose,
    mxfp4_to_fp8,
    mxfp4_to_fp8_columnwise,
    quantize_mxfp4,
    reference,
    reference_columnwise,
)
from qcomm.tensors import empty_scales

ROWS, COLUMNS = 256, 384


class Inputs(NamedTuple):
    """One of each kind; groups of rows on the device."""

    dense: torch.Tensor
    fp8: FP8Tensor
    mxfp4: MXFP4Tensor
    rotated: MXFP4Tensor
    group_offsets: torch.Tensor
    counter: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """All that a function reads, in order."""
        mxfp4 = [part for q in (self.mxfp4, self.rotated) for part in (q.qdata, q.sf)]
        return [self.dense, self.fp8.data, self.fp8.sf, *mxfp4, self.group_offsets]


def make_inputs(seed: int, device: torch.device | str) -> Inputs:
    return Inputs(
        wild((ROWS, COLUMNS), torch.bfloat16, seed).to(device),
        moved(wild_fp8(ROWS, COLUMNS, seed), device),
        moved(wild_mxfp4(ROWS, COLUMNS, seed), device),
        moved(wild_mxfp4(ROWS, COLUMNS, seed, "signs"), device),
        torch.tensor([0, 128, 128, 256], dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def _quantize(x: Inputs) -> tuple[torch.Tensor, ...]:
    q = quantize_mxfp4(x.dense)
    return q.qdata, q.sf


def _quantize_fp8(x: Inputs) -> tuple[torch.Tensor, ...]:
    q = quantize_mxfp4(x.fp8, scale_rule=ScaleRule.RCEIL, rounding=Rounding.STOCHASTIC, seed=2**63 + 9)
    return q.qdata, q.sf


def _quest(x: Inputs) -> tuple[torch.Tensor, ...]:
    q, clipped = quantize_mxfp4(
        x.dense, scale_rule=ScaleRule.QUEST, hadamard=True, hadamard_seed=5, return_clip_mask=True
    )
    return q.qdata, q.sf, clipped


def _dequantize(x: Inputs) -> tuple[torch.Tensor, ...]:
    return dequantize(x.mxfp4), dequantize(x.rotated, torch.float32)


def _align(x: Inputs) -> tuple[torch.Tensor, ...]:
    fp8 = mxfp4_to_fp8(x.mxfp4, sf_layout=ScaleLayout.PACKED_UE8M0, spread_overflows=x.counter)
    return fp8.data, fp8.sf, x.counter


def _align_columns(x: Inputs) -> tuple[torch.Tensor, ...]:
    fp8 = mxfp4_to_fp8_columnwise(x.mxfp4, x.group_offsets, spread_overflows=x.counter)
    return fp8.data, fp8.sf, x.counter


def _transpose(x: Inputs) -> tuple[torch.Tensor, ...]:
    fp8 = fp8_transpose(x.fp8, x.group_offsets)
    return fp8.data, fp8.sf


CALLS: dict[str, Callable[[Inputs], tuple[torch.Tensor, ...]]] = {
    "quantize_mxfp4": _quantize,
    "quantize_mxfp4 of fp8": _quantize_fp8,
    "quantize_mxfp4 by quest": _quest,
    "dequantize": _dequantize,
    "mxfp4_to_fp8": _align,
    "mxfp4_to_fp8_columnwise": _align_columns,
    "fp8_transpose": _transpose,
}
"""Each function once or more; the results fill whole tiles, so that every element is defined."""
CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def _assert_same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for number, (found, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(found, wanted, f"result {number}")


def _expected(call: Callable[[Inputs], tuple[torch.Tensor, ...]], seed: int) -> tuple[torch.Tensor, ...]:
    """The results on the CPU, where the functions run the oracle."""
    return call(make_inputs(seed, "cpu"))


@CALL
@pytest.mark.parametrize("device", DEVICES)
def test_inputs_stay_as_they_are(device: str, call: Callable[[Inputs], tuple[torch.Tensor, ...]]) -> None:
    x, before = make_inputs(0, device), make_inputs(0, device)
    _assert_same(call(x), _expected(call, 0))
    _assert_same(tuple(x.tensors()), tuple(before.tensors()))


@CALL
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_results_without_data(kind: str, call: Callable[[Inputs], tuple[torch.Tensor, ...]]) -> None:
    expected = _expected(call, 0)
    if kind == "meta":
        found = call(make_inputs(0, "meta"))
    else:
        real = make_inputs(0, "cpu")
        with FakeTensorMode() as mode:
            found = call(_map(real, mode.from_tensor))
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _map(x: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    def changed(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return change(part)
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        return dataclasses.replace(part, **{k: change(v) for k, v in fields.items() if isinstance(v, torch.Tensor)})

    return Inputs(*(changed(part) for part in x))


def _operator_calls(device: str) -> list[tuple[Any, tuple[Any, ...]]]:
    x = make_inputs(1, device)

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    codes = empty(ROWS, COLUMNS // 2), empty(ROWS, COLUMNS // 32)
    e4m3, floats = torch.float8_e4m3fn, torch.float32
    data, sf = empty(ROWS, COLUMNS, dtype=e4m3), empty(ROWS, COLUMNS // 128, dtype=floats)
    packed_sf = empty_scales(ROWS, COLUMNS // 128, ScaleLayout.PACKED_UE8M0, device).zero_()
    columns, tiles = empty(ROWS * COLUMNS, dtype=e4m3), empty(ROWS // 128, COLUMNS, dtype=floats)
    clipped = empty(ROWS, COLUMNS, dtype=torch.bool)
    ops = torch.ops.qcomm
    row_major, packed = (list(ScaleLayout).index(n) for n in (ScaleLayout.ROW_MAJOR, ScaleLayout.PACKED_UE8M0))
    even, quest = list(ScaleRule).index(ScaleRule.EVEN), list(ScaleRule).index(ScaleRule.QUEST)
    return [
        (ops.quantize_mxfp4, (x.dense, None, *codes, None, even, 0, 0, False, 0)),
        (ops.quantize_mxfp4, (x.dense, None, *codes, clipped, quest, 0, 0, True, 77)),
        (ops.quantize_mxfp4, (x.fp8.data, x.fp8.sf, *codes, None, even, 1, -5, False, 0)),
        (ops.dequantize, (x.mxfp4.qdata, x.mxfp4.sf, empty(ROWS, COLUMNS, dtype=torch.bfloat16), True, 77, False)),
        (ops.mxfp4_to_fp8, (x.mxfp4.qdata, x.mxfp4.sf, data, sf, x.counter, row_major, False, 0, False)),
        (ops.mxfp4_to_fp8, (x.mxfp4.qdata, x.mxfp4.sf, data, packed_sf, None, packed, False, 0, True)),
        (
            ops.mxfp4_to_fp8_columnwise,
            (x.mxfp4.qdata, x.mxfp4.sf, columns, tiles, x.group_offsets, 128, x.counter, False, 0, False),
        ),
        (ops.fp8_transpose, (x.fp8.data, x.fp8.sf, columns, tiles, x.group_offsets, 128)),
    ]


OPERATOR_CALL = pytest.mark.parametrize("number", range(len(_operator_calls("meta"))))


@OPERATOR_CALL
@pytest.mark.parametrize("device", DEVICES)
def test_operators_work_under_torch_transforms(device: str, number: int) -> None:
    """Autograd registration, fake tensors, tracing with dynamic shapes."""
    operator, args = _operator_calls(device)[number]
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # torch's checker of schemas cannot compare float8; the next test does what it does.
    if not any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float8_e4m3fn for arg in args):
        checks.append("test_schema")
    torch.library.opcheck(operator.default, args, test_utils=checks)


@OPERATOR_CALL
@pytest.mark.parametrize("device", DEVICES)
def test_operators_change_what_their_schemas_say(device: str, number: int) -> None:
    operator, args = _operator_calls(device)[number]
    before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    assert operator.default(*args) is None
    declared, changed = set(), set()
    for argument, old, new in zip(operator.default._schema.arguments, before, args, strict=True):
        if isinstance(new, torch.Tensor):
            if argument.alias_info is not None and argument.alias_info.is_write:
                declared.add(argument.name)
            if not equal_bits(old, new):
                changed.add(argument.name)
    assert changed == declared


def _everything(x: Inputs) -> tuple[torch.Tensor, ...]:
    return tuple(part for call in CALLS.values() for part in call(x))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device: str) -> None:
    """With what the functions check and allocate; a second input compiles nothing anew."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    torch.compiler.reset()
    compiled = torch.compile(_everything, fullgraph=True, backend=backend)
    for seed in (2, 3):
        with torch.compiler.set_stance("fail_on_recompile" if seed == 3 else "default"):
            _assert_same(compiled(make_inputs(seed, device)), _expected(_everything, seed))


def _overwrite(x: Inputs, fresh: Inputs) -> None:
    for old, new in zip(x.tensors(), fresh.tensors(), strict=True):
        old.copy_(new)


@gpu_only
@CALL
def test_runs_on_the_current_stream(call: Callable[[Inputs], tuple[torch.Tensor, ...]]) -> None:
    """Data that a busy stream writes late is seen by a call on that stream."""
    x, fresh = make_inputs(4, "cuda"), make_inputs(5, "cuda")
    call(x)
    x.counter.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        _overwrite(x, fresh)
        result = call(x)
    assert not stream.query(), "the call waited for its stream"
    stream.synchronize()
    _assert_same(result, _expected(call, 5))


@gpu_only
@CALL
def test_replays_a_graph_with_new_data(call: Callable[[Inputs], tuple[torch.Tensor, ...]]) -> None:
    x = make_inputs(6, "cuda")
    call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(x)
    for seed in (7, 8):
        _overwrite(x, make_inputs(seed, "cuda"))
        x.counter.zero_()
        for part in result:
            if part is not x.counter:
                poison(part)
        graph.replay()
        torch.cuda.synchronize()
        _assert_same(result, _expected(call, seed))


@gpu_only
@CALL
def test_runs_on_the_device_of_its_input(call: Callable[[Inputs], tuple[torch.Tensor, ...]]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, found {torch.cuda.device_count()}")
    result = call(make_inputs(9, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(part.device == torch.device("cuda:1") for part in result)
    _assert_same(result, _expected(call, 9))


@gpu_only
@pytest.mark.parametrize("form", FORMS)
def test_oracle_has_the_same_bits_on_a_gpu(form: str) -> None:
    """What lets large tests run it there."""

    def results(x: Inputs, q: MXFP4Tensor) -> tuple[torch.Tensor, ...]:
        offsets = [0, 96, 256]
        parts: list[torch.Tensor] = []
        for rule in ScaleRule:
            quest = rule is ScaleRule.QUEST
            made, mask = reference.quantize_mxfp4_clip_mask(x.dense, rule, hadamard=quest, signs=99 * quest)
            parts += [made.qdata, made.sf, mask]
        for how, rule in ((Rounding.STOCHASTIC, ScaleRule.RCEIL), (Rounding.UNBIASED, ScaleRule.FLOOR)):
            for source in (x.dense, x.fp8):
                made = reference.quantize_mxfp4(source, rule, how, seed=2**63 + 1, hadamard=True, signs=3)
                parts += [made.qdata, made.sf]
        for dtype in (torch.bfloat16, torch.float32):
            parts.append(reference.dequantize_mxfp4(q, dtype))
        rows, count = reference.mxfp4_to_fp8(q)
        return (
            *parts,
            rows.data,
            rows.sf,
            count,
            *reference_columnwise.mxfp4_to_fp8_columnwise(q, offsets),
            *reference_columnwise.fp8_transpose(x.fp8, offsets),
        )

    q = wild_mxfp4(ROWS, COLUMNS, 10, form)
    on_cpu = results(make_inputs(10, "cpu"), q)
    _assert_same(results(make_inputs(10, "cuda"), moved(q, "cuda")), on_cpu)
