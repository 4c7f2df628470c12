"""The kernels without a GPU: they compile, fit beside each other on an SM, and take what their launchers give them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from cases import OPTIONS
from fake_cuda import Asked, kernel_that

from qcomm import FP8Tensor, MXFP4Tensor, QcommUnsupportedError, Rounding, WireFormat, jit, tuning, validate
from qcomm.exchange import WireInput
from qcomm.formats import MAXIMUM_RULES, RECV_DTYPES, WIRE_KINDS, WIRE_ROUNDINGS, ScaleRule
from qcomm.handle import DispatchHandle, Owner, addresses_of
from qcomm.jit import KernelSpec, ResourceUsage
from qcomm.ops import codec, columnwise, combine, comm, count, dispatch, dispatch_decode, forward, peer_store, route
from qcomm.ops.catalog import all_specs, codec_specs
from qcomm.options import CombineOptions
from qcomm.records import RecordLayout
from qcomm.table import format_table

quantize_mxfp4, dequantize, mxfp4_to_fp8 = (
    sys.modules[f"qcomm.ops.{name}"] for name in ("quantize_mxfp4", "dequantize", "mxfp4_to_fp8")
)
ARCH = "sm_90"
SHAPES = ((7168, 8), (128, comm.MAX_TOPK))
WIRES = [
    WireFormat("bf16"),
    WireFormat("fp8"),
    *(WireFormat("mxfp4", ScaleRule.RCEIL, r, hadamard=h) for r in WIRE_ROUNDINGS for h in (False, True)),
]

SM_REGISTERS = 65536
SM_THREADS = 2048

SPILLS = {
    "dispatch_recv_columnwise bf16->fp8": (64, "four rows of 16 floats; spilling costs less than a second pass"),
    "combine_decode rotated mxfp4": (68, "56 registers leave room for a second one; the rotation's partners"),
    "combine_decode rotated stochastic mxfp4": (68, "56 registers leave room for a second one; as above"),
    **{
        f"dispatch_decode {bits}-bit top-8 {source}->{wire}->{dtype}": (8, "48 registers leave room for a second one")
        for bits in (32, 64)
        for source in ("bf16", "fp8")
        for wire, dtype in (
            ("stochastic mxfp4", "fp8"),
            ("stochastic mxfp4", "mxfp4"),
            ("rotated stochastic mxfp4", "mxfp4"),
        )
    },
}
"""Bytes a kernel may spill, and why; every other kernel may spill none."""


def label(spec: KernelSpec) -> str:
    """Name a specialisation, without the size of its tokens."""
    c = dict(spec.constants)
    words = [spec.name]
    if "INDEX_BYTES" in c:
        words.append(f"{8 * c['INDEX_BYTES']}-bit top-{c['NUM_TOPK']}")
    elif spec.name == "count":
        words.append(f"top-{c['NUM_TOPK']}")
    if "WIRE" in c:
        wire = "rotated " * c["HADAMARD"] + "stochastic " * c["STOCHASTIC"] + WIRE_KINDS[c["WIRE"]]
        source = f"{WIRE_KINDS[c['INPUT']]}->" if "INPUT" in c else ""
        words.append(source + wire + (f"->{WIRE_KINDS[c['RECV']]}" if "RECV" in c else ""))
        words += ["placing"] * c.get("PLACES", 0) if spec.name == "dispatch_recv" else []
    return " ".join(words)


@pytest.fixture(scope="module")
def usage() -> dict[KernelSpec, ResourceUsage]:
    """What every kernel takes; NVRTC works without the interpreter's lock."""
    pytest.importorskip("cuda.core")
    specs = list(dict.fromkeys(spec for shape in SHAPES for spec in all_specs(*shape, tuning.current().defaults)))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(specs, pool.map(lambda spec: jit.resource_usage(spec, ARCH), specs), strict=True))


def test_every_kernel_is_listed_once() -> None:
    specs = all_specs(7168, 8, tuning.current().defaults)
    labels = [label(spec) for spec in specs]
    assert len(set(labels)) == len(labels) == len(set(specs))
    count = {name: sum(spec.name == name for spec in specs) for name in dict.fromkeys(spec.name for spec in specs)}
    assert count == {
        "barrier": 1,
        "peer_store": 1,
        "route": 2,
        "count": 1,
        "dispatch_send": 3 + 2 + 1 + 3 * 2,  # three more variants of mxfp4, from bf16 and from fp8
        "dispatch_recv": 2 * (3 * 3 + 3),  # with and without placing
        "dispatch_recv_columnwise": 2 + 1,
        "dispatch_recv_columnwise_mxfp4": 1,
        "dispatch_decode": 2 * (1 + 2 + 3 * 2 + 2 + 2 * 2 + 2),  # rotated records are delivered as they came
        "combine_send": 3 + 3,
        "combine_recv": 3 + 1,
        "combine_decode": 3 + 3,
    }


def test_no_kernel_spills(usage: dict[KernelSpec, ResourceUsage]) -> None:
    rows, bad = [], []
    for spec, taken in usage.items():
        assert 16 <= taken.registers <= 255, f"{label(spec)}: {taken}"
        limit, reason = SPILLS.get(label(spec), (0, ""))
        if taken.spill_bytes > limit:
            bad.append(f"{label(spec)} spills {taken.spill_bytes} bytes, may spill {limit}")
        if taken.spill_bytes:
            hidden = str(dict(spec.constants).get("HIDDEN", ""))
            rows.append([label(spec), hidden, str(taken.spill_bytes), str(limit), reason])
    print(format_table(["kernel", "hidden", "spills", "may", "because"], rows))
    assert not bad, "\n".join(bad)


def test_no_kernel_of_the_codec_spills() -> None:
    pytest.importorskip("cuda.core")
    specs = codec_specs()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        usage = dict(zip(specs, pool.map(lambda spec: jit.resource_usage(spec, ARCH), specs), strict=True))
    assert {spec: taken.spill_bytes for spec, taken in usage.items() if taken.spill_bytes} == {}
    assert max(taken.static_shared_bytes for taken in usage.values()) <= 48 * 1024


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 128, 224, 448, 2**16 - 1, 2**30 + 1, 2**31 - 1])
def test_divisor(divisor: int) -> None:
    by = codec.Divisor.of(divisor)
    assert 0 < by.multiplier < 2**32
    edges = {k * divisor + e for k in (1, 2, 3, 1000, (2**31 - 1) // divisor) for e in (-1, 0, 1)}
    for number in sorted(edges | set(range(0, 2**31, 2**31 // 997))):
        if 0 <= number < 2**31:
            assert by.divide(number) == number // divisor


class Launch(NamedTuple):
    """What a launcher asked for."""

    spec: KernelSpec
    grid: int
    threads: int
    shared_bytes: int
    alone: bool


class Recorder:
    """Stands for a KernelLoader; notes launches instead."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def get(self, make_spec: Callable[..., KernelSpec], *args: Any) -> Any:
        def note(asked: Asked) -> None:
            self.launches.append(Launch(make_spec(*args), asked.grid, asked.threads, asked.shared_bytes, asked.alone))

        return kernel_that(note)


def tokens(kind: str, wire: WireFormat, hidden: int) -> WireInput:
    if kind == "bf16":
        return torch.zeros(1, hidden, dtype=torch.bfloat16)
    if kind == "fp8":
        return FP8Tensor(torch.zeros(1, hidden, dtype=torch.float8_e4m3fn), torch.ones(1, hidden // 128))
    codes, scales = (torch.zeros(1, hidden // n, dtype=torch.uint8) for n in (2, 32))
    return MXFP4Tensor(codes, scales, wire.hadamard)


def one_record(num_topk: int) -> DispatchHandle:
    words = torch.zeros(8, dtype=torch.int32)
    by_topk = torch.zeros(1, num_topk, dtype=torch.int32)
    return DispatchHandle(
        owner=Owner(0, 0),
        num_tokens=1,
        recv_layout="expert_major",
        alignment=128,
        static=False,
        num_rows=128,
        rows_per_expert=0,
        has_weights=True,
        send_slot=words[:1, None],
        recv_offsets=words[:2],
        record_src_token=words[:1],
        record_topk_idx=by_topk,
        record_topk_weights=by_topk.float(),
        record_rows=by_topk,
        row_record=words,
        row_src=words[:2, None],
        row_weights=None,
        num_tokens_per_expert=words[:1],
        num_tokens_per_expert_list=(1,),
        group_offsets=words[:2],
        send_counts=None,
        recv_counts=None,
    )


def carries(wire: WireFormat, x: WireInput, hidden: int) -> bool:
    with contextlib.suppress(ValueError):
        validate.tokens(x, num_tokens=1, hidden=hidden, wire=wire, device=torch.device("cpu"))
        return True
    return False


def make_launcher(kernels: Any, num_sms: int | None = None, num_experts: int = 256, num_topk: int = 8) -> comm.Launcher:
    """A launcher of two ranks as on a device that no row of the table is for."""
    structure = comm.Comm(num_ranks=2, num_experts=num_experts, num_local_experts=num_experts // 2)
    return comm.Launcher(kernels, structure, num_topk, 132, tuning.choose_all("none", 132, 2, num_sms))


def launches(hidden: int, num_topk: int, num_sms: int | None = None) -> list[Launch]:
    """Drive every launcher with everything that a Buffer may pass it."""
    recorder = Recorder()
    launcher = make_launcher(recorder, num_sms, num_topk=num_topk)
    handle = one_record(num_topk)
    parts = {**addresses_of(handle), "ordinals": 0}
    y = torch.zeros(128, hidden, dtype=torch.bfloat16)
    overflows = torch.zeros(2, dtype=torch.int64)
    comm.launch_barrier(launcher, 0, overflows)
    for dtype in (torch.int32, torch.int64):
        idx = torch.zeros(4096, num_topk, dtype=dtype)
        route.launch_route(launcher, 0, idx, parts)
    placement = count.Placement()
    count.launch_count(launcher, 0, placement, None, 1)
    for wire in WIRES:
        for x in (tokens(kind, wire, hidden) for kind in WIRE_KINDS):
            if carries(wire, x, hidden):
                dispatch.launch_send(launcher, 0, x, parts, None, wire, 0)
        for dtype_name in RECV_DTYPES:
            for by_column in (False, True) if dtype_name == "fp8" else (False,):
                options = dataclasses.replace(OPTIONS, recv_dtype=dtype_name, columnwise=by_column, wire=wire)
                for places in (False, True):
                    receive = dispatch.Receive(launcher, placement, options, hidden, overflows, places=places)
                    receive.launch(0, 128, 0)
                static = dataclasses.replace(options, static=True)
                if not dispatch_decode.suits(launcher, static, 1, hidden):
                    continue
                _, params = receive.prepare(128, 0)
                for x in (tokens(kind, wire, hidden) for kind in WIRE_KINDS):
                    for dtype in (torch.int32, torch.int64) if carries(wire, x, hidden) else ():
                        routing = dispatch.Routing(torch.zeros(1, num_topk, dtype=dtype), None)
                        dispatch_decode.launch_decode(launcher, 0, x, parts, routing, params, static)
        sums = combine.allocate(handle, hidden, True)
        sent = CombineOptions(wire, weighted=True, seed=0, async_op=False, split=False)
        combine.launch_decode(launcher, 0, y, handle, sent, sums)
        combine.launch_send(launcher, 0, y, None, handle, sent)
        combine.launch_recv(launcher, 0, handle, wire, sums)
    return recorder.launches


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_that_is_launched_is_listed(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    recorder: Any = Recorder()
    peer_store.launch_peer_store(recorder, 0, torch.zeros(16, dtype=torch.uint8), [16])
    launched = {launch.spec for launch in launches(*shape) + recorder.launches}
    listed = set(all_specs(*shape, tuning.current().defaults))
    assert {label(spec) for spec in launched ^ listed} == set()


def pairs(found: list[Launch]) -> Iterator[tuple[Launch, Launch]]:
    """Yield the sends and receives that run together: all of one operation on one kind of wire."""
    found = list(dict.fromkeys(launch for launch in found if "WIRE" in dict(launch.spec.constants)))
    for send in found:
        operation, kind = send.spec.name.removesuffix("_send"), dict(send.spec.constants)["WIRE"]
        if operation != send.spec.name:
            for recv in found:
                if recv.spec.name == f"{operation}_recv" and dict(recv.spec.constants)["WIRE"] == kind:
                    yield send, recv


def taken_of(launch: Launch, static_shared_bytes: int) -> int:
    """Return the shared memory that a block takes of an SM."""
    taken = launch.shared_bytes + static_shared_bytes
    return max(taken, jit.MORE_THAN_HALF if launch.alone else 0) + jit.RESERVED_SHARED_BYTES


def assert_fit(pair: tuple[Launch, Launch], usage: dict[KernelSpec, ResourceUsage]) -> None:
    names = " and ".join(label(launch.spec) for launch in pair)
    # The warps of a block are spread over the four parts of an SM, which have a quarter of the registers each.
    warps = [4 * -(-launch.threads // 128) for launch in pair]
    each = [32 * 8 * -(-usage[launch.spec].registers // 8) for launch in pair]
    registers = sum(a * b for a, b in zip(warps, each, strict=True))
    shared = sum(taken_of(launch, usage[launch.spec].static_shared_bytes) for launch in pair)
    threads = sum(launch.threads for launch in pair)
    assert registers <= SM_REGISTERS, f"{names} take {registers} registers of an SM"
    assert shared <= jit.SM_SHARED_BYTES, f"{names} take {shared} bytes of an SM"
    assert threads <= SM_THREADS, f"{names} take {threads} threads of an SM"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_waiting_receiver_leaves_room_for_the_sender(
    shape: tuple[int, int], usage: dict[KernelSpec, ResourceUsage]
) -> None:
    together = list(pairs(launches(*shape)))
    assert len({recv.spec for _, recv in together}) == 2 * 12 + 4
    for pair in together:
        assert_fit(pair, usage)


def test_the_most_records_in_flight_leave_room_too(usage: dict[KernelSpec, ResourceUsage]) -> None:
    with tuning.force(in_flight=tuning.MAX_IN_FLIGHT, flags_together=1):
        found = launches(7168, 8)
    plain = [launch for launch in found if dict(launch.spec.constants).get("HADAMARD") == 0]
    senders = {launch.spec for launch in plain if launch.spec.name.endswith("_send")}
    senders |= {next(launch.spec for launch in plain if launch.spec.name == "dispatch_decode")}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        taken = dict(zip(senders, pool.map(lambda spec: jit.resource_usage(spec, ARCH), senders), strict=True))
    # The file of combine is specialised as one, so its receivers are other kernels than before, which take the same.
    receivers = {label(spec): use for spec, use in usage.items() if dict(spec.constants).get("HIDDEN", 7168) == 7168}
    together = [(send, recv) for send, recv in pairs(plain) if send.spec in taken]
    assert len({send.spec for send, _ in together}) == len(senders) - 1
    for send, recv in together:
        assert_fit((send, recv), {send.spec: taken[send.spec], recv.spec: receivers[label(recv.spec)]})
    for spec, use in {**usage, **taken}.items():
        if spec.name == "dispatch_decode":
            assert use.static_shared_bytes <= dispatch_decode._STATIC_SHARED_BYTES


def test_what_sends_is_alone_on_an_sm() -> None:
    alone = {launch.spec.name for launch in launches(7168, 8) if launch.alone}
    shared = {launch.spec.name for launch in launches(7168, 8) if not launch.alone}
    assert alone == {"dispatch_send", "combine_send"}
    assert not alone & shared


def test_as_many_blocks_as_are_asked_for() -> None:
    alone = ("barrier", "route", "count")
    for num_sms, want in ((None, 132), (24, 24), (1000, 132)):
        grids = {launch.grid for launch in launches(128, 8, num_sms) if launch.spec.name not in alone}
        assert grids == {want}


def test_few_tokens_take_one_kernel() -> None:
    options = dataclasses.replace(OPTIONS, recv_layout="batched", static=True)
    kernels, record = None, one_record(8)
    launcher = make_launcher(kernels)
    assert dispatch_decode.suits(launcher, options, 256, 7168)
    assert combine.is_decode(launcher, record, options.wire)
    assert not dispatch_decode.suits(launcher, options, 257, 7168)
    assert not dispatch_decode.suits(launcher, dataclasses.replace(options, static=False), 1, 7168)
    with tuning.force(decode_tokens=0):
        launcher = make_launcher(kernels)
    assert not any(dispatch_decode.suits(launcher, options, num_tokens, 7168) for num_tokens in (0, 1))
    assert not combine.is_decode(launcher, record, options.wire)
    # However many tokens the table allows, two such kernels must fit an SM with their tables of experts.
    with tuning.force(decode_tokens=100_000):
        launcher = make_launcher(kernels)
    assert dispatch_decode.suits(launcher, options, 512, 7168)
    assert not dispatch_decode.suits(launcher, options, 2048, 7168)
    with tuning.force(decode_tokens=256):
        assert dispatch_decode.suits(make_launcher(kernels, num_experts=512), options, 256, 7168)
        assert not dispatch_decode.suits(make_launcher(kernels, num_experts=2048), options, 256, 7168)


WAIT = {
    "a receiver": (("dispatch_recv", "combine_recv"), ("dispatch_send",)),
    "a receiver of combine": (("combine_recv",), ("combine_send", "dispatch_decode", "combine_decode")),
    "a call of one kernel": (
        ("dispatch_decode", "combine_decode"),
        ("dispatch_decode", "combine_decode", "dispatch_send"),
    ),
}
"""Kernels that may sit on every SM while a rank is late, and what of another buffer's must fit beside, besides what
every call begins with: ranks may begin the calls of two buffers in different orders, and each waits for the other."""


@pytest.mark.parametrize("what", WAIT)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_waits_leaves_room_for_another_buffers_call_to_begin(
    shape: tuple[int, int], what: str, usage: dict[KernelSpec, ResourceUsage]
) -> None:
    found = list(dict.fromkeys(launches(*shape)))

    def named(names: tuple[str, ...]) -> list[Launch]:
        those = [launch for launch in found if launch.spec.name in names]
        assert {launch.spec.name for launch in those} == set(names)
        return those

    waiting, others = WAIT[what]
    first = named(("barrier", "route", "count"))
    assert len({launch.spec for launch in first}) == 4
    for one in named(waiting):
        for other in (*first, *named(others)):
            assert_fit((one, other), usage)


def inbox_bytes(spec: KernelSpec) -> int:
    """Return the size of the `Inbox` of kernels/receiver.cuh, which is all that `dispatch_recv` declares."""
    if spec.name != "dispatch_recv":
        return 0
    constants = dict(spec.constants)
    depth, item, barriers = 4, 4 + 4 * constants["NUM_TOPK"], 3 * 8
    return constants["TEAMS"] * depth * (item + barriers)


def test_what_a_receiver_declares(usage: dict[KernelSpec, ResourceUsage]) -> None:
    for spec, used in usage.items():
        if spec.name == "dispatch_recv":
            assert inbox_bytes(spec) <= used.static_shared_bytes <= inbox_bytes(spec) + 255


@pytest.mark.parametrize("num_topk", [1, 8, 32])
@pytest.mark.parametrize("hidden", [128, 384, 896, 1024, 2048, 3968, 4096, 5120, 6144, 7168, 7552, 8192, 16384, 24576])
def test_the_budgets_hold_for_any_hidden(hidden: int, num_topk: int) -> None:
    for pair in pairs(launches(hidden, num_topk)):
        shared = sum(taken_of(launch, inbox_bytes(launch.spec)) for launch in pair)
        assert shared <= jit.SM_SHARED_BYTES, f"{[label(launch.spec) for launch in pair]} take {shared} bytes of an SM"


STRUCTURES: dict[str, tuple[type[ctypes.Structure], ...]] = {
    "layout.cuh": (comm.Report, comm.HostReports, comm.Nodes, comm.State, comm.Comm),
    "quantize.cuh": (comm.Quantizer,),
    "barrier.cu": (comm.BarrierParams,),
    "route.cu": (route.RouteParams,),
    "place.cuh": (count.Placement,),
    "count.cu": (count.CountParams,),
    "dispatch_send.cuh": (dispatch.DispatchSendParams,),
    "dispatch_recv.cuh": (dispatch.DispatchRecvParams,),
    "dispatch_decode.cu": (dispatch_decode.DispatchDecodeParams,),
    "dispatch_forward.cu": (forward.DispatchForwardParams,),
    "combine_forward.cu": (forward.CombineForwardParams,),
    "combine_send.cuh": (combine.CombineSendParams,),
    "combine.cu": (combine.CombineRecvParams, combine.CombineDecodeParams),
    "peer_store.cu": (peer_store.PeerStoreParams,),
    "codec.cuh": (codec.Divisor,),
    "quantize_mxfp4.cu": (quantize_mxfp4.QuantizeMxfp4Params,),
    "dequantize.cu": (dequantize.DequantizeParams,),
    "mxfp4_to_fp8.cu": (mxfp4_to_fp8.Mxfp4ToFp8Params,),
    "columnwise.cuh": (columnwise.ColumnwiseParams,),
}


@pytest.mark.parametrize(("file", "structure"), [(f, s) for f, group in STRUCTURES.items() for s in group])
def test_structures_have_the_same_fields(file: str, structure: type[ctypes.Structure]) -> None:
    """Sizes are compared by the compiler; the order of fields of one size is not."""
    sizes = {"uint32_t": 4, "int32_t": 4, "uint64_t": 8, "int64_t": 8}
    sizes |= {s.__name__: ctypes.sizeof(s) for group in STRUCTURES.values() for s in group}
    text = re.sub(r"//[^\n]*", "", (jit.kernels_dir() / file).read_text())
    body = re.search(rf"struct {structure.__name__} {{(.*?)\n}};", text, re.DOTALL)
    assert body is not None
    members = body[1].partition("__device__")[0]
    fields = re.findall(r"(?:const )?(\w+)(\*?)\s+(\w+)(\[kMaxRanks\])?;", members)
    want = [
        (name, (8 if star else sizes[kind]) * (comm.MAX_RANKS if array else 1)) for kind, star, name, array in fields
    ]
    assert len(want) == members.count(";")
    assert [(name, getattr(structure, name).size) for name, *_ in structure._fields_] == want


def test_a_structure_of_another_size_does_not_compile() -> None:
    pytest.importorskip("cuda.core")
    spec = comm.barrier_spec()
    constants = {**dict(spec.constants), "SIZEOF_COMM": ctypes.sizeof(comm.Comm) - 8}
    with pytest.raises(QcommUnsupportedError, match=r"holds the same structure"):
        jit.compile_cubin(dataclasses.replace(spec, constants=tuple(constants.items())), ARCH)


HIDDENS = [128, 512, 1024, 2880 // 128 * 128, 4096, 7168, 7296, 8192, 16384, 24576, 40960]


def check_team(team: comm.Teams, hidden: int, budget: comm.Budget) -> None:
    """No more warps than the record has work for, and none idle in every step but the last."""
    steps = -(-hidden // 512)
    per_warp = -(-steps // team.warps)
    assert team.warps == -(-steps // per_warp) <= budget.team_warps
    assert team.warps * team.count <= budget.warps
    assert 1 <= team.stages <= budget.stages


@pytest.mark.parametrize("budget", [dispatch._RECV, dispatch._RECV_FLOATS])
@pytest.mark.parametrize("hidden", HIDDENS)
def test_recv_teams(hidden: int, budget: comm.Budget) -> None:
    for kind in WIRE_KINDS:
        shared = comm.recv_teams(hidden, RecordLayout(kind, hidden).num_bytes, budget)
        check_team(shared, hidden, budget)
        assert shared.warps == 1 or shared.count <= 15
        assert shared.count * shared.stages == 1 or shared.shared_bytes <= budget.shared_bytes
    assert comm.recv_teams(7168, 3808, dispatch._RECV) == comm.Teams(
        7, 3, 8, 3808, chunks=0, senders=0, helpers=3, rings=3
    )


SENDING = [
    (dispatch._SEND, dispatch._SENDERS, 0),
    (dispatch_decode._BUDGET, dispatch_decode._SENDERS, 0),
    (combine._SEND, 2, combine._MAX_CHUNKS),
    (combine._SEND_STOCHASTIC, 1, combine._MAX_CHUNKS),
    (combine._DECODE, 1, combine._MAX_CHUNKS),
]


@pytest.mark.parametrize(
    ("budget", "senders", "chunks"),
    SENDING,
    ids=["dispatch", "dispatch_decode", "combine", "combine_stochastic", "combine_decode"],
)
@pytest.mark.parametrize("hidden", HIDDENS)
def test_send_teams(hidden: int, budget: comm.Budget, senders: int, chunks: int) -> None:
    for kind in WIRE_KINDS:
        shared = comm.send_teams(hidden, RecordLayout(kind, hidden).slot_bytes(), budget, senders, chunks)
        check_team(shared, hidden, budget)
        # A team that waits for a stage that another one holds must not hold one that it waits for.
        assert shared.count <= shared.stages
        assert shared.senders == min(senders, shared.stages)
        assert shared.helpers == shared.senders + min(chunks, 1)
        # A stage has one sender, and no team gets so far ahead of one that a barrier's phases look alike.
        assert shared.stages % shared.senders == 0
        assert chunks or shared.count * shared.senders <= shared.stages
        assert shared.threads == 32 * (shared.warps * shared.count + shared.helpers) <= 544
        assert shared.stages == 1 or shared.shared_bytes <= budget.shared_bytes
        assert min(chunks, 1) <= shared.chunks <= chunks
    make, rest = comm.send_teams, {"rings": 1, "senders": 2, "helpers": 2}
    assert make(7168, 3968, dispatch._SEND, 2) == comm.Teams(14, 1, 12, 3968, chunks=0, **rest)
    assert make(1024, 640, dispatch._SEND, 2) == comm.Teams(2, 6, 12, 640, chunks=0, **rest)
    rest = {"rings": 1, "senders": 1, "helpers": 1}
    assert make(40960, 81920, dispatch._SEND, 2) == comm.Teams(14, 1, 1, 81920, chunks=0, **rest)
    # A stage past the budget is there as a whole.
    whole = make(24576, 98432, dispatch_decode._BUDGET, 2)
    assert (whole.stages, whole.shared_bytes) == (1, 98432)
    rest = {"rings": 1, "senders": 2, "helpers": 3}
    assert make(7168, 14336, combine._SEND, 2, 24) == comm.Teams(14, 1, 4, 14336, chunks=8, **rest)


def test_recv_stage_bytes() -> None:
    # Whole lines: copies that begin amid one are slow.
    assert [dispatch.recv_stage_bytes(dtype, 7168) for dtype in WIRE_KINDS] == [14336, 7424, 3840]
    assert [dispatch.recv_stage_bytes(dtype, 128) for dtype in WIRE_KINDS] == [256, 256, 128]


def test_route_chunk() -> None:
    assert [route.route_chunk(n) for n in (0, 1, 2048, 2049, 4096, 4097, 8192)] == [32, 32, 32, 64, 64, 96, 128]
    for num_tokens in range(0, 100_000, 97):
        chunk = route.route_chunk(num_tokens)
        assert chunk % 32 == 0
        assert -(-num_tokens // chunk) <= route.MAX_CHUNKS


@pytest.mark.parametrize(
    ("layout", "static", "want"),
    [
        ("expert_major", False, True),
        ("expert_major", True, True),
        ("token_major", False, False),
        ("token_major", True, False),
        ("batched", False, True),
        ("batched", True, False),
    ],
)
def test_pads(layout: Any, static: bool, want: bool) -> None:
    options = dataclasses.replace(OPTIONS, recv_layout=layout, static=static)
    assert dispatch.pads(options) == want


def test_options_that_do_not_change_a_kernel_make_no_new_one() -> None:
    rotated = WireFormat("mxfp4", ScaleRule.CEIL, Rounding.STOCHASTIC, hadamard=True)
    assert comm.encoding(rotated, "mxfp4") == WireFormat("mxfp4")
    assert comm.encoding(rotated, "bf16") == WireFormat("mxfp4", rounding=Rounding.STOCHASTIC, hadamard=True)
    assert comm.decoding(rotated) == WireFormat("mxfp4", hadamard=True)
    for simplify in (lambda wire: comm.encoding(wire, "bf16"), comm.decoding):
        assert len({simplify(WireFormat("mxfp4", rule)) for rule in MAXIMUM_RULES}) == 1


@pytest.mark.parametrize(
    ("num_bytes", "peers", "text"),
    [
        (16, [], "peers must be 1 to 16 addresses, got 0"),
        (16, [16] * 17, "peers must be 1 to 16 addresses, got 17"),
        (24, [16], "source must be a multiple of 16 bytes, got 24"),
    ],
)
def test_peer_store_refuses(num_bytes: int, peers: list[int], text: str) -> None:
    recorder: Any = Recorder()
    with pytest.raises(ValueError, match=text):
        peer_store.launch_peer_store(recorder, 0, torch.zeros(num_bytes, dtype=torch.uint8), peers)
    assert not recorder.launches
