"""Expert parallelism of Hugging Face transformers over qcomm.

Importing registers "qcomm" with transformers' `EPImplementationInterface`, so that any model whose plan has
`ep_dispatch_experts` takes it from `DistributedConfig(ep_size=..., ep_implementation="qcomm")`.

Needs transformers >= 5.23, the first with that registry.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.metadata
import itertools
import logging
import re
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qcomm import validate
from qcomm.buffer import Buffer
from qcomm.formats import FP8_GROUP_SIZE, Rounding, WireFormat, WirePrecision
from qcomm.functional import combine, dispatch
from qcomm.handle import Received

MIN_TRANSFORMERS = (5, 23)


def _advice() -> str | None:
    """Say what is wrong with the transformers that is installed; None where its version is good enough."""
    needs = f"qcomm.integrations.transformers needs transformers >= {'.'.join(map(str, MIN_TRANSFORMERS))}"
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return f"{needs}, found none: pip install 'qcomm[transformers]'"
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    return None if numbers >= MIN_TRANSFORMERS else f"{needs}, found {found}: pip install 'qcomm[transformers]'"


try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError as error:
    if (advice := _advice()) is None:
        raise
    raise ImportError(advice) from error

STATIC_ROWS = 32768
"""Most rows of a static receive that is not asked for: 256 tokens from each of 16 ranks to 8 experts of one."""
_MIN_CAPACITY = 64
_logger = logging.getLogger(__name__)
_orders = itertools.count()


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a registered implementation exchanges tokens.

    Args:
        precision: wire format of each leg; None is WirePrecision(), MXFP4 to the experts and BF16 elsewhere.
        num_max_tokens_per_rank: most tokens a rank passes to a layer. None asks the other ranks, by an all-reduce that
            the host waits for: once in a forward pass of a model and once for each layer that backward recomputes, but
            not where all ranks hold the same batch.
        static: whether receives do not synchronise with the host. None does so on the nvlink backend, where the
            experts do not synchronise either (any `experts_implementation` but "eager") and the worst case has at most
            STATIC_ROWS rows.
        num_max_recv_tokens: rows that a static receive has, instead of the worst case; more are an error. Implies
            `static`.
        backend: as for Buffer, as are the next three.
        provider: symmetric memory of the nvlink backend.
        deadline_s: seconds any wait for a peer may take.
        num_sms: SMs each communication kernel may occupy.

    Raises:
        ValueError, TypeError: settings that contradict each other, or are none.
    """

    precision: WirePrecision | None = None
    num_max_tokens_per_rank: int | None = None
    static: bool | None = None
    num_max_recv_tokens: int | None = None
    backend: str = "auto"
    provider: str = "auto"
    deadline_s: float = 30.0
    num_sms: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_max_tokens_per_rank", "num_max_recv_tokens"):
            if getattr(self, name) is not None:
                validate.positive(name, getattr(self, name))
        if self.static is not None:
            validate.boolean("static", self.static)
        if self.num_max_recv_tokens is not None and self.static is False:
            raise ValueError(f"num_max_recv_tokens must be None with static=False, got {self.num_max_recv_tokens}")


def register(name: str = "qcomm", **settings: Any) -> None:
    """Let `DistributedConfig(ep_implementation=name)` mean qcomm with these settings.

    Args:
        name: to register under; models made before keep what the name meant then.
        **settings: those of `Settings`.

    Raises:
        ValueError, TypeError: as `Settings`.
    """
    held = Settings(**settings)
    EPImplementationInterface.register(name, type("QcommEP", (QcommEP,), {"settings": held}))


def close() -> None:
    """Destroy the buffers of all models. Collective; before the process groups are destroyed. They come back when used.

    Optional: at the end of a process what is left is abandoned.
    """
    for exchange in _exchanges.values():
        exchange.destroy()
    _exchanges.clear()


def choose_static(settings: Settings, backend: str, experts: str, rows: int) -> tuple[bool, int | None]:
    """Choose whether a receive leaves the host out of it; the same on every rank.

    Args:
        settings: of the implementation.
        backend: of the buffer.
        experts: the model's `experts_implementation`.
        rows: the worst case.

    Returns:
        Whether, and the rows to receive into if not the worst case.
    """
    if settings.num_max_recv_tokens is not None:
        return True, min(settings.num_max_recv_tokens, rows)
    if settings.static is not None:
        return settings.static, None
    return backend == "nvlink" and experts != "eager" and rows <= STATIC_ROWS, None


class QcommEP(EPImplementation):
    """The exchange of one layer's experts.

    Tokens go out in bfloat16 or what `settings.precision` makes of them, come in by expert as bfloat16, run through
    the module's own forward whatever `experts_implementation` it has, and come back summed with float32 routing
    weights. Ranks that share a batch (tensor parallelism) each exchange a slice of it.

    A hidden size that is no multiple of 128 is padded with zeros, which travel too.
    """

    settings = Settings()

    def __init__(self, experts: torch.nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self._config = getattr(experts, "config", None)
        self._order = next(_orders)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sums of the experts' outputs. Collective, in the backward pass too.

        Args:
            hidden_states: `[num_tokens, hidden]` bfloat16.
            top_k_index: `[num_tokens, num_topk]` experts of all ranks, -1 for none.
            top_k_weights: `[num_tokens, num_topk]` of any floating dtype.

        Returns:
            `[num_tokens, hidden]` bfloat16.

        Raises:
            TypeError: the model is not in bfloat16.
            As `qcomm.dispatch` and `qcomm.combine`.
        """
        if hidden_states.dtype != torch.bfloat16:
            raise TypeError(
                "hidden_states must be torch.bfloat16 for ep_implementation 'qcomm' (dtype=torch.bfloat16, or "
                f"fsdp_mixed_precision=True), got {hidden_states.dtype}"
            )
        if self.tp_mesh.size() == 1:
            return self._exchange(hidden_states, top_k_index, top_k_weights, None)
        group, num_tokens = self.tp_mesh.get_group(), len(hidden_states)
        x, idx, weights = (_Slice.apply(each, group) for each in (hidden_states, top_k_index, top_k_weights))
        most = _slice_rows(num_tokens, group) if self.shares_batch else None
        out: torch.Tensor = _Gather.apply(self._exchange(x, idx, weights, most), num_tokens, group)
        return out

    def _exchange(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, most: int | None
    ) -> torch.Tensor:
        hidden, num_topk = x.shape[1], topk_idx.shape[1]
        padded = hidden + -hidden % FP8_GROUP_SIZE
        num_experts = self.num_local_experts * self.ep_mesh.size()
        key = _Key(self.ep_mesh.get_group(), self.settings, num_experts, num_topk, padded, x.device)
        exchange = _exchanges.setdefault(key, _Exchange(key))
        buffer, capacity = exchange.buffer(self._config, self._order, len(x), most)
        rows = capacity * buffer.num_ranks * min(num_topk, self.num_local_experts)
        experts = getattr(self._config, "_experts_implementation", "eager")
        static, num_max_recv_tokens = choose_static(self.settings, buffer.backend, experts, rows)
        seed = _seed(self.settings.precision)
        received, handle = dispatch(
            F.pad(x, (0, padded - hidden)).contiguous(),
            topk_idx.contiguous(),
            topk_weights.to(torch.float32).contiguous(),
            buffer,
            recv_dtype="bf16",
            alignment=1,
            static=static,
            num_max_recv_tokens=num_max_recv_tokens,
            seed=seed,
        )
        y = self._run_experts(received, hidden, static)
        out = combine(F.pad(y, (0, padded - hidden)), handle, seed=seed)
        # Never a view, on which FSDP cannot hook what is done in place.
        return out if padded == hidden else out[:, :hidden].contiguous()

    def _run_experts(self, received: Received, hidden: int, static: bool) -> torch.Tensor:
        """Run the experts on rows that each belong to one of them; rows past the last group to none."""
        assert received.group_offsets is not None
        x = received.x[:, :hidden]
        num_rows = len(x)
        if num_rows == 0:
            # A row of zeros, so that the experts' parameters and what is sent back stay in the graph.
            x = F.pad(x, (0, 0, 0, 1))
        ends = received.group_offsets[1:]
        rows = torch.arange(len(x), dtype=ends.dtype, device=x.device)
        expert = torch.searchsorted(ends, rows, right=True).unsqueeze(1)
        if num_rows == 0:
            expert = torch.zeros_like(expert)
        elif static:
            x = torch.where(expert < self.num_local_experts, x, 0)
        y: torch.Tensor = self.experts_forward(x, expert, torch.ones_like(expert, dtype=x.dtype))
        return y[:num_rows]


@dataclasses.dataclass(frozen=True)
class _Key:
    """What layers have in common that share buffers."""

    group: dist.ProcessGroup
    settings: Settings
    num_experts: int
    num_topk: int
    hidden: int
    device: torch.device


class _Exchange:
    """The buffers of one group and shape, by capacity, a power of two where no bound is set."""

    def __init__(self, key: _Key) -> None:
        self._key = key
        self._buffers: dict[int, Buffer] = {}
        self._capacity = 0
        self._last: tuple[object, int] | None = None

    def buffer(self, config: object, order: int, num_tokens: int, most: int | None) -> tuple[Buffer, int]:
        """Return the buffer for a layer's call, and its capacity. Every rank makes the same choice.

        Args:
            config: of the model the layer belongs to, None if unknown.
            order: layers are made, and in a forward pass called, by ascending order.
            num_tokens: that this rank passes.
            most: what any rank of the group passes at most, where they know without asking.
        """
        bound = self._key.settings.num_max_tokens_per_rank
        if bound is not None:
            self._capacity = bound
        elif most is not None:
            self._capacity = _power_of_two(most)
        else:
            # A layer that backward recomputes may belong to any forward pass.
            in_backward = torch._C._current_graph_task_id() != -1
            if in_backward or not self._same_pass(config, order):
                self._capacity = _power_of_two(self._most(num_tokens))
            self._last = None if in_backward else (config, order)
        if self._capacity not in self._buffers:
            self._buffers[self._capacity] = self._make()
        return self._buffers[self._capacity], self._capacity

    def destroy(self) -> None:
        """Destroy the buffers. Collective."""
        while self._buffers:
            self._buffers.popitem()[1].destroy()

    def abandon(self) -> None:
        """Stop using the buffers without waiting for anyone."""
        while self._buffers:
            self._buffers.popitem()[1].abandon()

    def _same_pass(self, config: object, order: int) -> bool:
        """Tell whether a call belongs to the forward pass of the last one, whose first layer has asked the others."""
        return config is not None and self._last is not None and self._last[0] is config and order > self._last[1]

    def _most(self, num_tokens: int) -> int:
        most = torch.tensor(num_tokens, device=self._key.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._key.group)
        return int(most)

    def _make(self) -> Buffer:
        key = self._key
        buffer = Buffer(
            key.group,
            num_experts=key.num_experts,
            num_topk=key.num_topk,
            hidden=key.hidden,
            num_max_tokens_per_rank=self._capacity,
            precision=key.settings.precision,
            backend=key.settings.backend,
            provider=key.settings.provider,
            device=key.device,
            deadline_s=key.settings.deadline_s,
            num_sms=key.settings.num_sms,
        )
        if buffer.rank == 0:
            why = f"{buffer.backend} backend ({buffer.backend_reason})"
            _logger.info("qcomm: buffer of %d tokens a rank of %d, %s", self._capacity, key.hidden, why)
        return buffer


_exchanges: dict[_Key, _Exchange] = {}


@atexit.register
def _abandon() -> None:
    for exchange in _exchanges.values():
        exchange.abandon()


class _Slice(torch.autograd.Function):
    """This rank's slice of rows that a group holds in common; their gradients, of all of them, backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.num_rows = group, len(x)
        return _slice(x, group).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gather(grad, ctx.num_rows, ctx.group), None


class _Gather(torch.autograd.Function):
    """All rows from the slices of a group; this rank's slice of their gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, num_rows: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _gather(x, num_rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _slice(grad, ctx.group), None, None


def _slice_rows(num_rows: int, group: dist.ProcessGroup) -> int:
    """Return the rows of every slice but the last ones, which may be shorter or empty."""
    return -(-num_rows // dist.get_world_size(group))


def _slice(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    rows, rank = _slice_rows(len(x), group), dist.get_rank(group)
    return x[rank * rows : (rank + 1) * rows]


def _gather(x: torch.Tensor, num_rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    rows = _slice_rows(num_rows, group)
    out = x.new_empty(rows * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(out, F.pad(x, (0, 0, 0, rows - len(x))).contiguous(), group=group)
    return out if len(out) == num_rows else out[:num_rows].clone()


def _power_of_two(num_tokens: int) -> int:
    return max(_MIN_CAPACITY, 1 << (num_tokens - 1).bit_length())


def _seed(precision: WirePrecision | None) -> int:
    """Draw random bits where a leg rounds by them; checkpoints keep torch's generator, and recompute with the same."""
    legs = [] if precision is None else [getattr(precision, field.name) for field in dataclasses.fields(precision)]
    if not any(isinstance(leg, WireFormat) and leg.rounding is Rounding.STOCHASTIC for leg in legs):
        return 0
    return int(torch.randint(1 << 62, ()))


register()
