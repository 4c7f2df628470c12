"""Grouped products of experts and their FP8 operands: against the oracle, and which backend is chosen."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection

import fake_products
import pytest
import torch
from bit_patterns import equal_bits
from moe_truth import quantize_weights as oracle_of_weights

from qcomm import fp8_transpose, reference
from qcomm.handle import DispatchHandle
from qcomm.moe import Groups, grouped_mm, grouped_wgrad, products, quantize_weights
from qcomm.moe.products import BF16_BACKENDS, FP8_BACKENDS, Backend, Product, choose, decode_columns
from qcomm.moe.quantize import FP8BlockTensor, dequantize_weights, quantize_rows
from qcomm.tensors import FP8ColumnwiseTensor

SPANS = (0, 256, 256, 384, 768)
HEIGHT, WIDTH = 256, 384


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-20, 20, shape, generator=generator))
    return x.to(torch.bfloat16)


def specials() -> torch.Tensor:
    x = values(256, WIDTH, seed=1)
    x[0, 0], x[1, 130], x[2, 300] = float("nan"), float("inf"), -float("inf")
    x[3, :128], x[130] = 0.0, -0.0
    x[4:40, 128:256] *= 2.0**-120
    x[41, 128:256], x[42, 256:] = 448 * 2.0**-100, 449.0
    return x


def test_rows_are_the_oracles() -> None:
    got, want = quantize_rows(specials()), reference.quantize_fp8(specials())
    assert equal_bits(got.data, want.data)
    assert equal_bits(got.sf, want.sf)


def test_rows_that_were_fp8_are_not_rounded_again() -> None:
    once = reference.dequantize_fp8(quantize_rows(specials()), torch.bfloat16)
    assert equal_bits(reference.dequantize_fp8(quantize_rows(once), torch.bfloat16), once)


def test_weights_are_the_oracles() -> None:
    w = torch.stack((specials(), values(256, WIDTH, seed=2), torch.zeros(256, WIDTH, dtype=torch.bfloat16)))
    got, (data, sf) = quantize_weights(w), oracle_of_weights(w)
    assert equal_bits(got.data, data)
    assert equal_bits(got.sf, sf)
    # A transposed tensor has the scales of the tensor, transposed.
    back, there = got.transposed(), quantize_weights(w.transpose(1, 2))
    assert equal_bits(back.data, there.data)
    assert equal_bits(back.sf, there.sf)
    decoded = data[1].float() * sf[1].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(dequantize_weights(got)[1], decoded.to(torch.bfloat16))


def test_weights_errors() -> None:
    with pytest.raises(ValueError, match=r"w.shape\[2\] must be a multiple of 128, got 100"):
        quantize_weights(torch.zeros(2, 128, 100))
    with pytest.raises(ValueError, match=r"sf must be \(2, 1, 2\) for data \(2, 128, 256\), got \(2, 1, 1\)"):
        FP8BlockTensor(torch.zeros(2, 128, 256).to(torch.float8_e4m3fn), torch.zeros(2, 1, 1))


def operands(seed: int = 0) -> tuple[Groups, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, d_y, w = (
        torch.randn(shape, generator=generator).to(torch.bfloat16)
        for shape in ((SPANS[-1], WIDTH), (SPANS[-1], HEIGHT), (len(SPANS) - 1, HEIGHT, WIDTH))
    )
    return Groups(torch.tensor(SPANS, dtype=torch.int32), SPANS), x, d_y, w


def columns(x: torch.Tensor) -> FP8ColumnwiseTensor:
    return fp8_transpose(quantize_rows(x), list(SPANS))


@pytest.mark.parametrize("fp8", [False, True])
def test_products_are_those_of_the_decoded_operands(fp8: bool) -> None:
    groups, x, d_y, w = operands()
    rows, weights = (quantize_rows(x), quantize_weights(w)) if fp8 else (x, w)
    if fp8:
        x = reference.dequantize_fp8(reference.quantize_fp8(x), torch.bfloat16)
        w = dequantize_weights(quantize_weights(w))
    y = grouped_mm(rows, weights, groups)
    assert y.dtype == torch.bfloat16
    for expert, (a, b) in enumerate(itertools.pairwise(SPANS)):
        assert torch.equal(y[a:b], (x[a:b].float() @ w[expert].float().t()).to(torch.bfloat16))

    left, right = (columns(each) if fp8 else each for each in (d_y, x))
    d_y, x = decode_columns(left, HEIGHT, groups), decode_columns(right, WIDTH, groups)
    for on_host in (SPANS, None):
        got = grouped_wgrad(left, right, Groups(groups.offsets, on_host), tuple(w.shape))
        for expert, (a, b) in enumerate(itertools.pairwise(SPANS)):
            assert torch.equal(got[expert], d_y[a:b].float().t() @ x[a:b].float())
        assert (got[1] == 0).all()


def test_columns_decode_to_the_rows() -> None:
    groups, x, _, _ = operands()
    rows = quantize_rows(x)
    # Scales of a tile are within a few binades here, so the shift rounds little.
    decoded, want = decode_columns(columns(x), WIDTH, groups), reference.dequantize_fp8(rows, torch.bfloat16)
    assert float((decoded.double() - want.double()).norm() / want.double().norm()) < 2**-8


@pytest.mark.parametrize("product", ["mm", "wgrad"])
@pytest.mark.parametrize("backend", BF16_BACKENDS)
@pytest.mark.parametrize("fp8", [False, True])
def test_bf16_backends_agree_with_the_reference(product: Product, backend: Backend, fp8: bool) -> None:
    groups, x, d_y, w = operands()
    shape = tuple(w.shape)
    if product == "mm":
        a, b = (quantize_rows(x), quantize_weights(w)) if fp8 else (x, w)
        got, want = (products._MM[name](a, b, groups) for name in (backend, "reference"))
    else:
        left, right = (columns(each) if fp8 else each for each in (d_y, x))
        got, want = (products._WGRAD[name](left, right, groups, shape) for name in (backend, "reference"))
    assert float((got.double() - want.double()).norm() / want.double().norm()) < 2**-8


def test_no_rows() -> None:
    w = torch.ones(2, HEIGHT, WIDTH, dtype=torch.bfloat16)
    groups = Groups(torch.zeros(3, dtype=torch.int32), (0, 0, 0))
    rows = quantize_rows(torch.zeros(0, WIDTH, dtype=torch.bfloat16))
    assert grouped_mm(rows, quantize_weights(w), groups).shape == (0, HEIGHT)
    empty = [fp8_transpose(quantize_rows(torch.zeros(0, size).bfloat16()), [0, 0, 0]) for size in (HEIGHT, WIDTH)]
    assert torch.equal(grouped_wgrad(empty[0], empty[1], groups, tuple(w.shape)), torch.zeros_like(w))


def test_operands_of_two_kinds_are_refused() -> None:
    groups, x, _, w = operands()
    with pytest.raises(TypeError, match="both operands must be bfloat16 or both FP8, got FP8Tensor and Tensor"):
        grouped_mm(quantize_rows(x), w, groups)


@pytest.mark.parametrize(
    ("product", "fp8", "device_type", "runs", "want"),
    [
        ("mm", True, "cpu", FP8_BACKENDS, "reference"),
        ("mm", False, "cpu", (), "reference"),
        ("mm", True, "cuda", ("torch_bf16", "deep_gemm", "torch_fp8"), "torch_fp8"),
        ("mm", True, "cuda", ("torch_bf16", "deep_gemm"), "deep_gemm"),
        ("mm", True, "cuda", ("torch_bf16", "torch_fp8_loop"), "torch_fp8_loop"),
        ("mm", True, "cuda", ("torch_bf16",), "torch_bf16"),
        ("mm", True, "cuda", (), "loop"),
        ("mm", False, "cuda", ("torch_bf16", "deep_gemm", "torch_fp8"), "torch_bf16"),
        ("mm", False, "cuda", ("deep_gemm",), "loop"),
        ("wgrad", True, "cuda", ("torch_bf16", "deep_gemm", "torch_fp8_loop"), "torch_fp8_loop"),
        ("wgrad", True, "cuda", ("torch_bf16", "deep_gemm"), "deep_gemm"),
    ],
)
def test_choice(product: Product, fp8: bool, device_type: str, runs: Collection[Backend], want: Backend) -> None:
    assert choose(product, fp8, device_type, runs) == want


def test_a_backend_that_raises_or_is_wrong_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "probe", products.probe.__wrapped__)
    monkeypatch.setitem(products._MM, "deep_gemm", lambda x, w, groups: 1.1 * products._MM["reference"](x, w, groups))
    absent = products.probe("mm", torch.device("cpu"))
    assert "NotImplementedError" in absent["torch_fp8"]
    assert absent["deep_gemm"] == "a relative error of 0.1 in a product that was tried"
    assert not set(absent) & set(BF16_BACKENDS)


@pytest.mark.parametrize("product", ["mm", "wgrad"])
def test_fp8_backends_are_given_what_they_take(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_products.install(monkeypatch)
    absent = products.probe.__wrapped__(product, torch.device("cpu"))
    assert set(absent) <= ({"torch_fp8"} if product == "wgrad" else set()), absent


def test_rows_past_the_last_group_are_of_no_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_products.install(monkeypatch)
    _, x, _, w = operands()
    groups = Groups(torch.tensor((0, 256, 256, 384, 512), dtype=torch.int32))
    rows, weights = quantize_rows(x), quantize_weights(w)
    want = products._MM["reference"](rows, weights, groups)[:512]
    for backend in FP8_BACKENDS:
        assert torch.equal(products._MM[backend](rows, weights, groups)[:512], want)


def test_falling_back_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dict.fromkeys(FP8_BACKENDS, "not here")
    monkeypatch.setattr(products, "probe", lambda product, device: absent)
    products._notice.cache_clear()
    device = torch.device("cuda", 0)
    with pytest.warns(
        UserWarning, match=r"no FP8 product \(mm\) runs on cuda:0, .* by torch_bf16. torch_fp8: not here"
    ):
        assert products._pick("mm", True, device) == "torch_bf16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert products._pick("mm", True, device) == "torch_bf16"
        assert products._pick("mm", False, device) == "torch_bf16"


@pytest.mark.gpu
@pytest.mark.parametrize("product", ["mm", "wgrad"])
def test_probe_on_a_gpu(product: Product) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    absent = products.probe(product, torch.device("cuda", 0))
    assert not set(absent) & set(BF16_BACKENDS), absent
    groups, x, d_y, w = operands()
    on_gpu = Groups(groups.offsets.cuda(), groups.on_host)
    if product == "mm":
        got = grouped_mm(quantize_rows(x.cuda()), quantize_weights(w.cuda()), on_gpu)
        want = grouped_mm(quantize_rows(x), quantize_weights(w), groups)
    else:
        shape = tuple(w.shape)
        got = grouped_wgrad(columns(d_y.cuda()), columns(x.cuda()), on_gpu, shape)
        want = grouped_wgrad(columns(d_y), columns(x), groups, shape)
    assert float((got.cpu().double() - want.double()).norm() / want.double().norm()) < 2**-6


def test_groups_of_a_handle() -> None:
    class Handle:
        group_offsets = torch.tensor((0, 128, 128, 384), dtype=torch.int32)
        num_tokens_per_expert_list: tuple[int, ...] | None = (3, 0, 129)
        alignment = 128

    handle: DispatchHandle = Handle()  # type: ignore[assignment]
    assert Groups.of(handle).spans() == [(0, 128), (128, 128), (128, 384)]
    assert Groups.of(handle).argument() == [0, 128, 128, 384]
    Handle.num_tokens_per_expert_list = None
    assert Groups.of(handle).argument() is Handle.group_offsets
    assert Groups.of(handle).host() == (0, 128, 128, 384)
