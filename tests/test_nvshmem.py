"""The nvshmem backend without GPUs: its kernels compile, its memory has room, its calls launch what they must."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, nvlink_buffer

from qcomm import QcommUnsupportedError, WireFormat, jit, nvshmem_build, tuning
from qcomm.formats import WIRE_KINDS
from qcomm.jit import KernelSpec
from qcomm.ops import comm, dispatch_decode, forward
from qcomm.ops.catalog import all_specs
from qcomm.records import NodesLayout, SymmetricLayout
from qcomm.topology import Topology
from qcomm.transport import nvshmem
from qcomm.transport.nvshmem import NvshmemTransport, forwards, node_constants

ARCH = "sm_90"
TWO_BY_TWO = Topology(4, 2)
SHAPES = ((7168, 8), (128, comm.MAX_TOPK))
WIRES = (*map(WireFormat, WIRE_KINDS), WireFormat("mxfp4", hadamard=True))


def specs(hidden: int, num_topk: int, *, forwarding: bool) -> list[KernelSpec]:
    """Every kernel of a mode that is not that of nvlink with other strides alone."""
    defaults = tuning.current().defaults
    found = [spec for spec in all_specs(hidden, num_topk, defaults) if spec.name != "peer_store"]
    if not forwarding:
        # What else a decode mode has is as in the throughput mode, or as on nvlink.
        found = [spec for spec in found if spec.name.endswith("_decode") or spec.name == "dispatch_send"]
    else:
        found = [spec for spec in found if not spec.name.endswith("_decode")]
        found += [forward.dispatch_forward_spec(WireFormat(k), hidden, num_topk) for k in WIRE_KINDS]
        found += [forward.combine_forward_spec(wire, hidden, num_topk) for wire in WIRES]
    # One of a name, of MXFP4: to NVSHMEM wires and inputs are alike, and nvlink's kernels are compiled for all.
    # The receivers differ from nvlink's by a stride alone.
    seen: dict[str, KernelSpec] = {}
    mxfp4 = WIRE_KINDS.index("mxfp4")
    for spec in found:
        if not spec.name.startswith("dispatch_recv_") and dict(spec.constants).get("WIRE", mxfp4) == mxfp4:
            seen.setdefault(spec.name, spec)
    made = [s.with_constants(node_constants(s, TWO_BY_TWO, forwards=forwarding, debug=True)) for s in seen.values()]
    return list(dict.fromkeys(made))


def need_headers() -> nvshmem_build.Build:
    pytest.importorskip("cuda.core")
    try:
        return nvshmem_build.find()
    except QcommUnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("shape", "forwarding"), list(zip(SHAPES, (True, False), strict=True)), ids=["throughput", "decode"]
)
def test_kernels_compile(shape: tuple[int, int], forwarding: bool) -> None:
    need_headers()
    todo = specs(*shape, forwarding=forwarding)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda spec: jit.compile_cubin(spec, ARCH), todo))
    for spec, cubin in zip(todo, cubins, strict=True):
        # NVSHMEM finds its state in the module by this name; receivers have none.
        assert (b"nvshmemi_device_state_d" in cubin) == spec.uses_nvshmem


def test_the_most_puts_in_flight_keep_to_the_budget_of_one_kernel() -> None:
    need_headers()
    most = {
        op: dataclasses.replace(each, in_flight=tuning.MAX_IN_FLIGHT, flags_together=1)
        for op, each in tuning.current().defaults.items()
    }
    spec = next(spec for spec in all_specs(7168, 8, most) if spec.name == "dispatch_decode")
    usage = jit.resource_usage(spec.with_constants(node_constants(spec, TWO_BY_TWO, forwards=False)), ARCH)
    assert 6 * 1024 < usage.static_shared_bytes <= dispatch_decode._STATIC_SHARED_BYTES


def test_kernels_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvshmem_build.IBGDA_VARIABLE, "1")
    build = need_headers()
    if build.nvcc is None:
        pytest.skip(build.reason)
    for spec in (comm.barrier_spec(), forward.combine_forward_spec(WireFormat("bf16"), 7168, 8)):
        cubin = jit.compile_cubin(spec.with_constants(node_constants(spec, TWO_BY_TWO, forwards=True)), ARCH)
        assert b"nvshmemi_ibgda" in cubin


def test_one_node_has_nothing_of_several() -> None:
    for spec in all_specs(7168, 8, tuning.current().defaults):
        assert not spec.uses_nvshmem
        assert {name: dict(spec.constants)[name.upper()] for name in comm.ONE_NODE} == comm.ONE_NODE


@pytest.mark.parametrize(
    ("ranks_per_node", "max_tokens", "want"), [(2, 257, True), (2, 256, False), (1, 4096, False), (8, 4096, True)]
)
def test_when_tokens_are_forwarded(ranks_per_node: int, max_tokens: int, want: bool) -> None:
    assert forwards(Topology(16, ranks_per_node), max_tokens, 256) is want


def layout(num_ranks: int, nodes: NodesLayout | None, max_tokens: int = 100) -> SymmetricLayout:
    return SymmetricLayout(num_ranks, 4, max_tokens, dispatch_slot_bytes=3968, combine_slot_bytes=14464, nodes=nodes)


def test_memory_of_several_nodes() -> None:
    plain = layout(4, None)
    both = layout(4, NodesLayout(2, True, 4096)), layout(4, NodesLayout(2, False, 3968))
    for several in both:
        assert list(several.sizes)[: len(plain.sizes)] == list(plain.sizes)
        assert several.sizes["dispatch_records"] == plain.sizes["dispatch_records"]
        assert several.sizes["dispatch_flags"] == 2 * plain.sizes["dispatch_flags"]
        ends = [several.offsets[name] + size for name, size in several.sizes.items()]
        assert all(end <= begin for end, begin in zip(ends, [*several.offsets.values()][1:], strict=False))
        assert ends[-1] <= several.num_bytes
        assert {name for name, *_ in comm.Nodes._fields_} <= set(several.sizes)
    throughput, decode = (several.sizes for several in both)
    assert throughput["counts"] == plain.sizes["counts"] + 2 * 4 * 8
    assert decode["counts"] == plain.sizes["counts"]
    assert throughput["inbox"] == 2 * 100 * 4096
    assert throughput["combine_outbox"] == 2 * 100 * 14464
    # Behind the sums of ranks are those of nodes.
    assert throughput["combine_records"] == plain.sizes["combine_records"] + throughput["combine_outbox"]
    assert throughput["combine_flags"] == 8 * (4 + 2) * 100
    assert decode["inbox"] == 0
    assert decode["combine_records"] == plain.sizes["combine_records"]
    assert decode["combine_outbox"] == plain.sizes["combine_records"]


def test_what_to_install() -> None:
    build = nvshmem_build.Build(("/include",), "3.4.5", None, None, "")
    nvshmem_build.check_host_library(build, "3.4.5")
    with pytest.raises(QcommUnsupportedError, match=r"install nvidia-nvshmem-cu13==3.7.2"):
        nvshmem_build.check_host_library(build, "3.7.2")
    with pytest.raises(QcommUnsupportedError, match=r"nvshmem.h, found it nowhere; install nvidia-nvshmem-cu13"):
        nvshmem_build._folder_of([], "nvshmem.h")


@pytest.mark.parametrize(
    ("value", "want"), [(None, False), ("0", False), ("false", False), ("1", True), ("true", True)]
)
def test_who_asks_for_ibgda(monkeypatch: pytest.MonkeyPatch, value: str | None, want: bool) -> None:
    monkeypatch.delenv(nvshmem_build.IBGDA_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(nvshmem_build.IBGDA_VARIABLE, value)
    assert nvshmem_build._asks_for_ibgda() is want


@pytest.mark.parametrize("op", ["dispatch", "combine"])
@pytest.mark.parametrize("num_sms", [None, 1, 2, 24])
def test_forwarding_takes_a_part_of_the_blocks(num_sms: int | None, op: Any) -> None:
    tunings = tuning.choose_all("none", 132, 4, num_sms)
    launcher = comm.Launcher(None, comm.Comm(), 8, 132, tunings, 2)  # type: ignore[arg-type]
    wire = WireFormat("mxfp4")
    blocks, send, on = (f(op, wire) for f in (launcher.blocks, launcher.send_blocks, launcher.forward_blocks))
    assert send >= 1 <= on
    assert send + on == max(2, blocks)
    assert launcher._replace(forward_nodes=0).send_blocks(op, wire) == blocks


@dataclasses.dataclass(frozen=True)
class Node(Topology):
    """One rank that takes itself to be one of two nodes of two, whose other ranks are elsewhere."""

    def same_node(self, rank: int, other: int) -> bool:
        return True


@pytest.mark.parametrize("decode_tokens", [0, 256], ids=["throughput", "decode"])
def test_launches(monkeypatch: pytest.MonkeyPatch, decode_tokens: int) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(nvshmem, "torch", SimpleNamespace(cuda=cuda, Tensor=torch.Tensor))
    monkeypatch.setattr(nvshmem_build, "find", lambda: nvshmem_build.Build((), "3.4.5", None, None, ""))
    monkeypatch.setattr(nvshmem_build, "host_version", lambda: "3.4.5")

    def memory(num_bytes: int, *_: object) -> Any:
        local = torch.zeros(num_bytes, dtype=torch.uint8)
        return SimpleNamespace(local=local, peers=[local.data_ptr()], settle=lambda: None, free=lambda: None)

    monkeypatch.setattr(nvshmem, "NvshmemMemory", memory)

    def make(config: Any, member: Any, owner: Any, stream: Any) -> NvshmemTransport:
        return NvshmemTransport(config, member, owner, stream, None, Node(4, 2))

    shape: dict[str, Any] = {"num_experts": 4, "num_topk": 2, "hidden": 128, "num_max_tokens_per_rank": 8}
    with tuning.force(decode_tokens=decode_tokens), nvlink_buffer(monkeypatch, cuda, make=make, **shape) as (buffer, _):
        x, idx = torch.zeros(3, 128, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64)
        recv, handle = buffer.dispatch(x, idx, static=True)
        buffer.dispatch(x, handle=handle)
        buffer.combine(recv.x.to(torch.bfloat16), handle)
        names = [launch.kernel for launch in cuda.launches]
        # A rank without tokens forwards those of others.
        buffer.dispatch(x[:0], idx[:0], static=True)
        found = [launch.kernel for launch in cuda.launches[len(names) :]]
        assert found == (["dispatch_decode"] if decode_tokens else names[:5])
    if decode_tokens:
        assert names == ["dispatch_decode", "barrier", "dispatch_send", "dispatch_recv", "combine_decode"]
        assert handle.forward is None
        return
    assert names == [
        *("route", "dispatch_send", "dispatch_forward", "count", "dispatch_recv"),
        *("barrier", "dispatch_send", "dispatch_forward", "dispatch_recv"),
        *("barrier", "combine_send", "combine_forward", "combine_recv"),
    ]
    first = {launch.kernel: launch for launch in cuda.launches[:5]}
    # Sending, forwarding and receiving run beside each other, behind the routing; sending begins with it.
    for name in ("dispatch_forward", "count", "dispatch_recv"):
        assert first["route"].number in first[name].after
    for name in ("dispatch_send", "dispatch_forward"):
        assert first[name].number not in first["dispatch_recv"].after
    assert first["dispatch_send"].number not in first["dispatch_forward"].after
    # The next call waits for all of them.
    assert {launch.number for launch in cuda.launches[:5]} <= cuda.launches[5].after
    assert handle.forward is not None
    assert tuple(handle.forward.slots.shape) == (2, 8, 3)
    assert handle.forward.node_slot.data_ptr() == handle.send_slot.data_ptr() + 4
    assert handle.send_slot.stride() == (1 + 2, 1)
