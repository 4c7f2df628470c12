"""Activation storage: what is stored, what comes back, and that gradients are those of the stored values."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import itertools
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import need_gpus
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qcomm
from qcomm import FP8ColumnwiseTensor, FP8Tensor, MXFP4Tensor, Rounding, ScaleLayout, ScaleRule, reference
from qcomm.storage import MXFP4Codec, MXFP4Stash, SavedTensors, StorageReport, mxfp4_saved_tensors

PAGE = Path(__file__).resolve().parents[1] / "docs" / "storage.md"
BITS_OF_MXFP4 = 4.25
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"hadamard": True, "scale_rule": ScaleRule.QUEST},
    {"rounding": Rounding.STOCHASTIC, "scale_rule": ScaleRule.RCEIL, "seed": 2**64 - 2},
    {"rounding": Rounding.UNBIASED, "scale_rule": ScaleRule.FLOOR, "hadamard": True, "seed": 3},
]
Made = Callable[[torch.Tensor], torch.Tensor]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def activation(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """A tensor that requires grad and is no leaf."""
    return normal(*shape, dtype=dtype, seed=seed, device=device).requires_grad_().mul(1)


def stored_value(x: torch.Tensor, number: int = 0, **options: Any) -> torch.Tensor:
    """What the number-th tensor stored becomes, on the CPU."""
    options = {**options, "seed": (options.get("seed", 0) + number) % 2**64}
    q = qcomm.quantize_mxfp4(x.detach().cpu().contiguous(), **options)
    return qcomm.dequantize(q, torch.float32).to(x.dtype)


def round_trip(x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, StorageReport]:
    hooks = SavedTensors(MXFP4Codec(**options), min_numel=1)
    return hooks.unpack(hooks.pack(x)), hooks.report


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        need_gpus(1)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "quest", "stochastic", "unbiased"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("act", "backward"),
    [(F.silu, torch.ops.aten.silu_backward), (F.gelu, torch.ops.aten.gelu_backward)],
    ids=["silu", "gelu"],
)
def test_gradients_are_those_of_the_stored_values(
    act: Made, backward: Callable[..., torch.Tensor], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    x = normal(64, 96, dtype=dtype).requires_grad_()
    w1, w2 = (nn.Parameter(normal(*shape, dtype=dtype, seed=9)) for shape in ((128, 96), (32, 128)))
    grad = normal(64, 32, dtype=dtype, seed=5)
    with mxfp4_saved_tensors(min_numel=1, **options) as report:
        h = F.linear(x, w1)
        a = act(h)
        y = F.linear(a, w2)
    assert torch.equal(y, F.linear(act(F.linear(x, w1)), w2))
    assert report.num_tensors == 3
    assert report.bytes_before == 64 * (96 + 128 + 128) * dtype.itemsize
    assert report.bytes_after == 64 * (96 + 128 + 128) * BITS_OF_MXFP4 / 8
    assert report.bytes_saved == report.bytes_before - report.bytes_after
    y.backward(grad)

    x_, h_, a_ = (stored_value(t, n, **options) for n, t in enumerate((x, h, a)))
    da = grad @ w2.detach()
    dh = backward(da, h_)
    assert w2.grad is not None
    assert w1.grad is not None
    assert x.grad is not None
    assert torch.equal(w2.grad, grad.t() @ a_)
    assert torch.equal(w1.grad, dh.t() @ x_)
    assert torch.equal(x.grad, dh @ w1.detach())


def itself(x: torch.Tensor) -> torch.Tensor:
    return x


# A view, and the exchange of dimensions that puts it in the order of memory and back.
VIEWS: dict[str, tuple[Made, Made]] = {
    "itself": (itself, itself),
    "transposed": (lambda x: x.t(), lambda x: x.t()),
    "heads": (lambda x: x.view(16, 4, 4, 32).transpose(1, 2), lambda x: x.transpose(1, 2)),
    "unsqueezed": (lambda x: x[:, None, None].transpose(0, 2), itself),
    "chunk": (lambda x: x.chunk(2, -1)[1], itself),
    "transposed chunk": (lambda x: x.chunk(2, -1)[1].t(), lambda x: x.t()),
    "rows": (lambda x: x[5:9], itself),
    "every other row": (lambda x: x[1::2], itself),
    "every other column": (lambda x: x[:, ::2], itself),
    "odd offset": (lambda x: x.flatten()[7:].as_strided((4, 32), (32, 1)), itself),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_views_keep_values_shape_and_strides(name: str, dtype: torch.dtype, device: str) -> None:
    view, swap = VIEWS[name]
    taken = view(activation(64, 128, dtype=dtype, device=device))
    got, report = round_trip(taken)
    assert (got.dtype, got.shape, got.stride(), got.device) == (dtype, taken.shape, taken.stride(), taken.device)
    assert torch.equal(got.cpu(), swap(stored_value(swap(taken))))
    assert report.num_tensors == 1
    assert report.bytes_before == taken.numel() * dtype.itemsize


KEPT: dict[str, Callable[[], torch.Tensor]] = {
    "integers": lambda: torch.arange(64).view(2, 32),
    "bytes": lambda: torch.arange(64, dtype=torch.uint8).view(2, 32),
    "bool": lambda: torch.ones(2, 32, dtype=torch.bool),
    "float64": lambda: activation(2, 32, dtype=torch.float64),
    "fp8": lambda: torch.zeros(2, 32, dtype=torch.float8_e4m3fn),
    "complex": lambda: torch.zeros(2, 32, dtype=torch.complex64),
    "no multiple of 32": lambda: activation(32, 48),
    "statistics of rows": lambda: activation(2, 32, 64).mean(-1, keepdim=True),
    "a scalar": lambda: activation(1)[0],
    "empty": lambda: activation(0, 32),
    "expanded": lambda: activation(1, 32).expand(8, 32),
    "overlapping": lambda: activation(64).as_strided((2, 32), (16, 1)),
    "no grad": lambda: normal(2, 32),
    "sparse": lambda: torch.eye(32).to_sparse().requires_grad_(),
    "meta": lambda: torch.zeros(2, 32, device="meta", requires_grad=True),
    "negated": lambda: torch._neg_view(activation(2, 32)),
    "subclass": lambda: activation(2, 32).as_subclass(Subclass),
    "parameter": lambda: nn.Parameter(normal(2, 32)),
    "transposed parameter": lambda: nn.Parameter(normal(32, 64)).t(),
    "view of a frozen parameter": lambda: nn.Parameter(normal(4, 32), requires_grad=False)[1:],
    "cast parameter": lambda: nn.Parameter(normal(4, 32)).bfloat16().t().unsqueeze(0).split(32, 1)[0],
}


class Subclass(torch.Tensor):
    """Another kind of tensor, whose memory may not be what it says."""


@pytest.mark.parametrize("name", KEPT)
def test_kept_as_it_is(name: str) -> None:
    x = KEPT[name]()
    # Only grad is for select to decide.
    hooks = SavedTensors(MXFP4Codec(), min_numel=1, select=None if name == "no grad" else lambda _: True)
    got = hooks.unpack(hooks.pack(x))
    assert hooks.report == StorageReport()
    assert isinstance(got, Subclass) is isinstance(x, Subclass)
    assert (got.dtype, got.shape, got.layout, got.device) == (x.dtype, x.shape, x.layout, x.device)
    if x.layout == torch.strided and x.device.type == "cpu":
        assert got.data_ptr() == x.data_ptr()
        assert got.stride() == x.stride()


def test_activations_that_look_like_parameters_are_stored() -> None:
    table = nn.Parameter(normal(8, 64))
    for x in (F.embedding(torch.arange(4), table), table * 2, normal(4, 64).requires_grad_()):
        assert round_trip(x)[1].num_tensors == 1


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(8,), (2, 4)], ids=str)
def test_weights_are_exact(lead: tuple[int, ...], bias: bool, amp: bool) -> None:
    layer = nn.Linear(64, 32, bias=bias)
    x = normal(*lead, 64).requires_grad_()

    def grad_of_x(context: contextlib.AbstractContextManager[Any]) -> torch.Tensor:
        with context, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = layer(x)
        return torch.autograd.grad(y.sum(), x)[0]

    storing = mxfp4_saved_tensors(min_numel=1)
    with storing as report, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        layer(x)
    assert report.num_tensors == 1
    assert torch.equal(grad_of_x(mxfp4_saved_tensors(min_numel=1)), grad_of_x(contextlib.nullcontext()))


def test_attention_stores_no_statistics() -> None:
    shapes = []

    def select(x: torch.Tensor) -> bool:
        shapes.append(tuple(x.shape))
        return x.requires_grad

    q, k, v = (normal(2, 4, 32, 32, seed=seed).requires_grad_() for seed in range(3))
    with mxfp4_saved_tensors(min_numel=1, select=select) as report:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (2, 4, 32) in shapes or (2, 4, 32, 32) in shapes
    y.sum().backward()
    with mxfp4_saved_tensors(min_numel=1) as by_default:
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert report == by_default
    assert by_default.bytes_before == 4 * q.numel() * 4


def test_min_numel_and_select() -> None:
    x = activation(4, 32)
    for min_numel, count in ((128, 1), (129, 0)):
        with mxfp4_saved_tensors(min_numel=min_numel) as report:
            x.square()
        assert report.num_tensors == count
    with mxfp4_saved_tensors(min_numel=1, select=lambda t: t.shape[0] == 8) as report:
        x.square()
        activation(8, 32).square()
    assert report.bytes_before == 8 * 32 * 4


@pytest.mark.parametrize("device", DEVICES)
def test_saved_twice_stored_once(device: str) -> None:
    x = activation(8, 64, device=device)
    with mxfp4_saved_tensors(min_numel=1) as report:
        kept = [x * x]
        assert report.num_tensors == 1
        kept += [x.square(), x.view(4, 128).square(), x.t().square(), x[None].square()]
        assert report.num_tensors == 1
        y = x.exp()  # Saves its output, and what comes next saves it as its input.
        kept += [y, y.square()]
        assert report.num_tensors == 2
        kept += [x[4:].square(), x[:, :32].square(), x[:, 32:].square()]
        assert report.num_tensors == 5
    total = torch.stack([t.sum() for t in kept]).sum()
    assert torch.isfinite(torch.autograd.grad(total, x)[0]).all()


def test_another_version_is_stored_again() -> None:
    x = activation(8, 64)
    first = x.detach().clone()
    with mxfp4_saved_tensors(min_numel=1) as report:
        a = x.square()
        with torch.no_grad():
            x.mul_(-3)
        b = x.square()
    assert report.num_tensors == 2
    assert torch.equal(torch.autograd.grad(a.sum(), x)[0], 2 * stored_value(first))
    assert torch.equal(torch.autograd.grad(b.sum(), x)[0], 2 * stored_value(-3 * first))


def test_an_address_may_come_again() -> None:
    hooks = SavedTensors(MXFP4Codec(), min_numel=1)
    memory = bytearray(32 * 32 * 4)
    packed, seen, values = [], set(), []
    # Storage after storage at one address, each gone before the next; so many that torch's own bookkeeping of a
    # storage would come at the same address too.
    for seed in range(64):
        x = torch.frombuffer(memory, dtype=torch.float32).view(32, 32)
        x.data.copy_(normal(32, 32, seed=seed))
        packed.append(hooks.pack(x.requires_grad_()))
        seen.add((x.data_ptr(), x._version))
        values.append(stored_value(x))
        del x
    assert len(seen) == 1
    assert hooks.report.num_tensors == len(hooks._stored) == 64
    for got, want in zip(packed, values, strict=True):
        assert torch.equal(hooks.unpack(got), want)


def test_a_live_view_is_no_other_tensor_at_its_address() -> None:
    hooks = SavedTensors(MXFP4Codec(), min_numel=1)
    x = activation(8, 64)
    other = x.detach().view(torch.int32).view(torch.float32).requires_grad_()
    packed = hooks.pack(x), hooks.pack(other), hooks.pack(other[:4])
    assert hooks.report.num_tensors == 2
    assert torch.equal(hooks.unpack(packed[2]), stored_value(x)[:4])


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("min_numel", [1, 10**6], ids=["stored", "kept"])
def test_memory_goes_with_the_graph(min_numel: int) -> None:
    hooks = SavedTensors(MXFP4Codec(), min_numel=min_numel)
    with hooks.active():
        h = activation(8, 64)
        y = h.exp()
        z = y.square() + h.square()
    saved, output = StorageWeakRef(h.untyped_storage()), StorageWeakRef(y.untyped_storage())
    del h
    # The graph holds the memory of what is kept as it is.
    assert saved.expired() is (min_numel == 1)
    assert len(hooks._stored) == (2 if min_numel == 1 else 0)
    del y
    assert output.expired() is (min_numel == 1)
    # A graph that held its own output would stay.
    del z
    assert saved.expired()
    assert output.expired()
    assert len(hooks._stored) == 0


def test_memory_goes_with_backward() -> None:
    hooks = SavedTensors(MXFP4Codec(), min_numel=1)
    with hooks.active():
        y = activation(8, 64).square().sum()
    assert len(hooks._stored) == 1
    y.backward()
    assert len(hooks._stored) == 0


def test_modified_in_place_after_saving() -> None:
    x = activation(8, 64)
    first = x.detach().clone()
    with mxfp4_saved_tensors(min_numel=1):
        y = x.square()
        z = x.exp()
        exp = z.detach().clone()
    with torch.no_grad():
        x.zero_()
        z.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * stored_value(first))
    assert torch.equal(torch.autograd.grad(z.sum(), x)[0], stored_value(exp))


@pytest.mark.parametrize("context", [contextlib.nullcontext, mxfp4_saved_tensors], ids=["plain", "storing"])
def test_a_kept_tensor_modified_in_place_is_refused_as_always(
    context: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:
    w = nn.Parameter(normal(32, 64))
    with context():
        y = F.linear(activation(8, 64), w).sum()
    with torch.no_grad():
        w.mul_(2)
    message = "modified by an inplace operation: .* is at version 1; expected version 0"
    with pytest.raises(RuntimeError, match=message):
        y.backward()


def test_backward_twice() -> None:
    x = activation(8, 64)
    with mxfp4_saved_tensors(min_numel=1):
        y = x.pow(3).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(first, second)
    assert torch.equal(first, 3 * stored_value(x) ** 2)
    assert torch.equal(torch.autograd.grad(second.sum(), x)[0], 6 * stored_value(x))


def test_only_within_the_context() -> None:
    x = activation(8, 64)
    storing = mxfp4_saved_tensors(min_numel=1)
    with pytest.raises(KeyError), storing:
        raise KeyError
    y = x.square()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * x)
    with mxfp4_saved_tensors(min_numel=1) as outer, mxfp4_saved_tensors(min_numel=1, hadamard=True) as inner:
        y = x.square()
    assert (outer.num_tensors, inner.num_tensors) == (0, 1)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * stored_value(x, hadamard=True))


def test_random_bits_differ_between_tensors_and_not_between_runs() -> None:
    options: dict[str, Any] = {"rounding": Rounding.STOCHASTIC, "scale_rule": ScaleRule.RCEIL, "seed": 7}

    def run() -> list[torch.Tensor]:
        same = [activation(64, 64) for _ in range(3)]
        with mxfp4_saved_tensors(min_numel=1, **options):
            ys = [x.square() for x in same]
        return [torch.autograd.grad(y.sum(), x)[0] for x, y in zip(same, ys, strict=True)]

    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_the_largest_float16_stays_finite() -> None:
    x = torch.full((1, 32), 65504.0, dtype=torch.float16).requires_grad_()
    assert torch.equal(round_trip(x)[0], x)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 32))


def gradients(layers: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(y.square().sum(), [x, *layers.parameters()]))


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_within_the_context_stores_its_input(reentrant: bool) -> None:
    layers, x = mlp(), activation(16, 64)
    with mxfp4_saved_tensors(min_numel=1) as report:
        y = checkpoint(layers, x, use_reentrant=reentrant)
    assert report.bytes_before == x.numel() * 4
    got = gradients(layers, x, y) if not reentrant else through_backward(layers, x, y)

    stored = stored_value(x).requires_grad_()
    # The gradient of the output is that of forward; the rest is computed again from the stored input.
    again = layers(stored)
    want = torch.autograd.grad(again, [stored, *layers.parameters()], 2 * y.detach())
    assert all_equal(got, list(want))


def through_backward(layers: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Reentrant checkpoints take no torch.autograd.grad."""
    x.retain_grad()
    y.square().sum().backward()
    grads = [t.grad for t in (x, *layers.parameters())]
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_context_within_a_checkpoint(reentrant: bool) -> None:
    layers, x = mlp(), activation(16, 64)
    reports = []

    def stored(x: torch.Tensor) -> torch.Tensor:
        with mxfp4_saved_tensors(min_numel=1) as report:
            y = layers(x)
        reports.append(report)
        return y

    y = checkpoint(stored, x, use_reentrant=reentrant)
    got = gradients(layers, x, y) if not reentrant else through_backward(layers, x, y)
    want = gradients(layers, x, stored(x))
    assert all_equal(got, want)
    # Without a graph (reentrant) nothing is saved before the second forward; with one nothing is left to recompute.
    assert [report.num_tensors for report in reports] == ([0, 3, 3] if reentrant else [3, 3])


class TestCompile:
    @pytest.fixture(autouse=True)
    def _reset(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_a_compiled_region_stores_what_it_saves(self) -> None:
        layers, x = mlp(), activation(16, 64)
        compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
        with mxfp4_saved_tensors(min_numel=1, select=lambda t: t.dtype == torch.float32) as report:
            y = compiled(x)
        got = gradients(layers, x, y)
        with mxfp4_saved_tensors(min_numel=1) as plain:
            y = layers(x)
        assert report == plain
        # Compiled graphs may decompose silu's backward; it must be the stored values that go through it.
        for a, b in zip(got, gradients(layers, x, y), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_the_default_warns_that_it_left_them_out(self) -> None:
        layers, x = mlp(), activation(16, 64)
        compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
        with (
            pytest.warns(UserWarning, match="16384 bytes were not stored .* 4096 were; pass select="),
            mxfp4_saved_tensors(min_numel=1) as report,
        ):
            compiled(x)
        assert report.bytes_before == x.numel() * 4

    def test_entered_in_a_compiled_function(self) -> None:
        layers, x = mlp(), activation(16, 64)

        def step(x: torch.Tensor) -> tuple[torch.Tensor, int]:
            with mxfp4_saved_tensors(min_numel=1) as report:
                y = layers(x)
            return y * 2, report.num_tensors

        y, count = torch.compile(step, backend="aot_eager")(x)
        assert count == 3
        assert all_equal(gradients(layers, x, y), gradients(layers, x, step(x)[0]))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"enter mxfp4_saved_tensors outside torch\.compile"):
            torch.compile(step, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"min_numel": 0}, ValueError, "min_numel must be positive, got 0"),
        ({"min_numel": 1.5}, TypeError, "min_numel must be an int, got float"),
        ({"select": 3}, TypeError, "select must be callable or None, got int"),
        ({"scale_rule": "EVEN"}, TypeError, "scale_rule must be a ScaleRule, got str"),
        ({"rounding": 1}, TypeError, "rounding must be a Rounding, got int"),
        ({"hadamard": 1}, TypeError, "hadamard must be a bool, got int"),
        ({"seed": -1}, ValueError, "seed must be in [0, 2**64), got -1"),
        ({"scale_rule": ScaleRule.QUEST}, ValueError, "hadamard"),
    ],
)
def test_wrong_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        mxfp4_saved_tensors(**options)


@pytest.mark.gpu
def test_another_stream_stores_its_own() -> None:
    x = activation(64, 1024, device="cuda")
    hooks = SavedTensors(MXFP4Codec())
    other = torch.cuda.Stream()
    packed = [hooks.pack(x)]
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        packed.append(hooks.pack(x))
    torch.cuda.synchronize()
    assert hooks.report.num_tensors == 2
    assert all(torch.equal(hooks.unpack(p).cpu(), stored_value(x)) for p in packed)


@pytest.mark.gpu
def test_a_thread_that_has_not_used_cuda_may_decode() -> None:
    """As autograd's own threads do."""
    x = activation(64, 1024, device="cuda")
    hooks = SavedTensors(MXFP4Codec())
    packed = hooks.pack(x)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        got = pool.submit(hooks.unpack, packed).result()
    assert torch.equal(got.cpu(), stored_value(x))


@pytest.mark.gpu
def test_less_memory_is_held() -> None:
    def held(context: contextlib.AbstractContextManager[Any]) -> int:
        x = activation(1024, 1024, dtype=torch.bfloat16, device="cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with context:
            y = x
            for _ in range(8):
                y = F.silu(y)
        return torch.cuda.memory_allocated() - before

    # A first call loads kernels.
    held(mxfp4_saved_tensors())
    plain, stored = held(contextlib.nullcontext()), held(mxfp4_saved_tensors())
    # Of the eight saved, x is alive anyway, and the output is held in both.
    assert plain - stored == pytest.approx(7 * 2 * 2**20 - 8 * 2**20 * BITS_OF_MXFP4 / 8, rel=0.01)


def equal_fp8(a: FP8Tensor | FP8ColumnwiseTensor, b: FP8Tensor | FP8ColumnwiseTensor) -> bool:
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(a.sf, b.sf)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "quest", "stochastic", "unbiased"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stash_gives_what_the_conversions_give(dtype: torch.dtype, options: dict[str, Any]) -> None:
    stash = MXFP4Stash(**options)
    stash.put("first", normal(1, 32))
    x = normal(256, 128, dtype=dtype)
    stash.put("x", x)
    q = qcomm.quantize_mxfp4(x, **{**options, "seed": (options.get("seed", 0) + 1) % 2**64})
    assert torch.equal(stash.get("x"), qcomm.dequantize(q))
    for layout in ScaleLayout:
        got = stash.get("x", "fp8", sf_layout=layout)
        assert equal_fp8(got, qcomm.mxfp4_to_fp8(q, sf_layout=layout))
        assert got.sf.stride() == qcomm.mxfp4_to_fp8(q, sf_layout=layout).sf.stride()
    assert equal_fp8(stash.get("x", "fp8"), qcomm.mxfp4_to_fp8(q))
    assert equal_fp8(stash.get("x", as_="fp8_columnwise"), qcomm.mxfp4_to_fp8_columnwise(q))
    for groups in ([0, 96, 256], torch.tensor([0, 96, 256], dtype=torch.int32)):
        got_columns = stash.get("x", "fp8_columnwise", group_offsets=groups, alignment=32)
        want = qcomm.mxfp4_to_fp8_columnwise(q, [0, 96, 256], alignment=32)
        assert torch.equal(got_columns.data.view(torch.uint8), want.data.view(torch.uint8))
        # Offsets on a device leave room for more tiles than there are.
        assert torch.equal(got_columns.sf[:3], want.sf)
        assert got_columns.group_offsets.tolist() == [0, 96, 256]
    assert stash.report == StorageReport(2, 128 + x.numel() * dtype.itemsize, 17 + x.numel() * 17 // 32)


def test_stash_holds_what_came_off_the_wire() -> None:
    stash = MXFP4Stash()
    x = normal(64, 256, dtype=torch.bfloat16)
    off_the_wire = qcomm.quantize_mxfp4(x, scale_rule=ScaleRule.RCEIL, hadamard=True, hadamard_seed=4)
    stash.put(0, off_the_wire)
    before = off_the_wire.qdata.clone()
    assert torch.equal(stash.get(0), qcomm.dequantize(off_the_wire))
    assert torch.equal(off_the_wire.qdata, before)
    assert stash.report == StorageReport(1, x.numel() * 2, off_the_wire.num_bytes)

    fp8 = reference.quantize_fp8(x)
    stash.put(1, fp8)
    assert torch.equal(stash.get(1), qcomm.dequantize(qcomm.quantize_mxfp4(fp8)))
    assert stash.report.bytes_before == x.numel() * 2 + fp8.num_bytes


@pytest.mark.parametrize("shape", [(128,), (2, 64, 128), (2, 0, 128)], ids=str)
def test_stash_makes_rows_of_other_dimensions(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    stash = MXFP4Stash()
    stash.put("x", x)
    rows = qcomm.quantize_mxfp4(x.reshape(-1, 128))
    assert stash.get("x").shape == x.shape
    assert equal_fp8(stash.get("x", "fp8"), qcomm.mxfp4_to_fp8(rows))
    if rows.shape[0] % 128 == 0:
        assert equal_fp8(stash.get("x", "fp8_columnwise"), qcomm.mxfp4_to_fp8_columnwise(rows))


def test_stash_drops() -> None:
    stash = MXFP4Stash()
    assert (len(stash), "x" in stash, stash.report) == (0, False, StorageReport())
    stash.put("x", normal(1, 32))
    assert (len(stash), "x" in stash, stash.report.num_tensors) == (1, True, 1)
    stash.drop("x")
    assert (len(stash), "x" in stash, stash.report) == (0, False, StorageReport())
    stash.put("x", normal(1, 64))
    assert stash.get("x").shape == (1, 64)


STASH_ERRORS: dict[str, tuple[Callable[[MXFP4Stash], object], type[Exception], str]] = {
    "get": (lambda s: s.get("y"), KeyError, "key must be one of ['x', 'odd'], got 'y'"),
    "drop": (lambda s: s.drop("y"), KeyError, "key must be one of ['x', 'odd'], got 'y'"),
    "put": (lambda s: s.put("x", normal(1, 32)), ValueError, "key must be new, got 'x', which is held; drop it"),
    "dtype": (lambda s: s.put("y", torch.zeros(32, dtype=torch.int64)), TypeError, "got torch.int64, for key 'y'"),
    "shape": (lambda s: s.put("y", normal(1, 48)), ValueError, "got shape (1, 48), for key 'y'"),
    "as": (lambda s: s.get("x", "fp4"), ValueError, "as_ must be one of ('bf16', 'fp8', 'fp8_columnwise')"),  # type: ignore[call-overload]
    "layout": (
        lambda s: s.get("x", "bf16", sf_layout=ScaleLayout.ROW_MAJOR),  # type: ignore[call-overload]
        ValueError,
        "sf_layout must be None for as_='bf16', got <ScaleLayout.ROW_MAJOR: 'row_major'>, for key 'x'",
    ),
    "groups": (lambda s: s.get("x", "fp8", group_offsets=[0]), ValueError, "group_offsets must be None for as_='fp8'"),  # type: ignore[call-overload]
    "alignment": (lambda s: s.get("x", "fp8", alignment=32), ValueError, "alignment must be None for as_='fp8'"),  # type: ignore[call-overload]
    "width": (lambda s: s.get("odd", "fp8"), ValueError, "a multiple of 128), got (64, 32), for key 'odd'"),
    "offsets": (lambda s: s.get("x", "fp8_columnwise", group_offsets=[0, 7]), ValueError, "[0, 7], for key 'x'"),
}


@pytest.mark.parametrize("name", STASH_ERRORS)
def test_stash_errors_name_the_key(name: str) -> None:
    wrong, kind, message = STASH_ERRORS[name]
    stash = MXFP4Stash()
    stash.put("x", normal(64, 128))
    stash.put("odd", normal(64, 32))
    with pytest.raises(kind) as caught:
        wrong(stash)
    assert message in str(caught.value.args[0])
    assert len(stash) == 2


class _GroupedLinear(torch.autograd.Function):
    """y[a:b] = x[a:b] @ w[e].t(), whose weight gradient reads the stored x column-wise."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, offsets: list[int]) -> torch.Tensor:
        ctx.stash, ctx.offsets = MXFP4Stash(), offsets
        ctx.stash.put("x", x)
        ctx.save_for_backward(w)
        return torch.cat([x[a:b] @ w[e].t() for e, (a, b) in enumerate(itertools.pairwise(offsets))])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        x = ctx.stash.get("x", "fp8_columnwise", group_offsets=ctx.offsets)
        dw, dx, tile = [], [], 0
        for e, (a, b) in enumerate(itertools.pairwise(ctx.offsets)):
            k, tiles = w.shape[-1], (b - a) // 128
            values = x.data[a * k : b * k].view(k, b - a).float()
            values = values * x.sf[tile : tile + tiles].t().repeat_interleave(128, dim=1)
            dw.append(grad[a:b].t() @ values.t())
            dx.append(grad[a:b] @ w[e])
            tile += tiles
        return torch.cat(dx), torch.stack(dw), None


@pytest.mark.usefixtures("no_collector")
def test_stash_on_ctx() -> None:
    x, w = normal(384, 128).requires_grad_(), nn.Parameter(normal(2, 64, 128, seed=1))
    y = _GroupedLinear.apply(x, w, [0, 128, 384])
    stash = weakref.ref(y.grad_fn.stash)
    grad = normal(384, 64, seed=2)
    y.backward(grad)
    values = stored_value(x)
    assert w.grad is not None
    assert torch.equal(w.grad[0], grad[:128].t() @ values[:128])
    assert torch.equal(w.grad[1], grad[128:].t() @ values[128:])
    del y
    assert stash() is None


def test_the_page_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    report = names["report"]
    assert capsys.readouterr().out.split() == [str(report.bytes_saved)]
    assert report.bytes_saved > 0
    assert isinstance(names["stash"].get("x"), torch.Tensor)
    assert isinstance(names["received"], MXFP4Tensor)
