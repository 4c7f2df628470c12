"""The nvshmem backend: NVLink within a node as on the nvlink backend, NVSHMEM's puts from the device between nodes.

Everything that comes to a rank lands in its own symmetric memory as on nvlink, and is received by the same kernels. A
buffer sends in one of two ways, the same on every rank. In the throughput mode a token goes once to each other node, to
the rank of the sender's place in it, which forwards it over NVLink; in a combine that rank adds its node's sums and
puts one record back. In the decode mode, for few tokens or nodes of one rank, it goes to each rank by itself.
"""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist

from qcomm import nvshmem_build
from qcomm.config import BufferConfig, Member
from qcomm.exchange import WireInput
from qcomm.formats import WireFormat
from qcomm.handle import Addresses, DispatchHandle, Owner
from qcomm.jit import KernelSpec
from qcomm.ops import forward
from qcomm.ops.comm import Nodes, State
from qcomm.ops.dispatch import Routing
from qcomm.options import CombineOptions
from qcomm.records import NodesLayout, nodes_layout
from qcomm.topology import Topology
from qcomm.transport.calls import Call
from qcomm.transport.nvlink import NvlinkTransport
from qcomm.transport.symmetric import NvshmemMemory, SymmetricMemory
from qcomm.tuning import Tuning, Tunings

DEBUG_VARIABLE = "QCOMM_DEBUG"
"""Set to 1, kernels trap where they are about to address another node's memory themselves."""
_RECEIVERS = ("count", "dispatch_recv", "dispatch_recv_columnwise", "dispatch_recv_columnwise_mxfp4")
"""Kernels that put nothing, and are compiled without NVSHMEM."""


class NvshmemTransport(NvlinkTransport):
    """See `qcomm.transport.base.Transport`."""

    def __init__(
        self,
        config: BufferConfig,
        member: Member,
        owner: Owner,
        comm_stream: torch.cuda.Stream,
        num_sms: int | None,
        topology: Topology,
    ) -> None:
        nvshmem_build.check_host_library(nvshmem_build.find(), nvshmem_build.host_version())
        self._topology = topology
        self._forward_stream = torch.cuda.Stream(member.device, priority=-1)
        super().__init__(config, member, owner, comm_stream, num_sms, "nvshmem")

    def _tune(self, tunings: Tunings) -> Tunings:
        """Agree on a mode; one that forwards does no call by one kernel."""
        most = min(tuning.decode_tokens for (op, _), tuning in tunings.items() if op == "dispatch")
        found: list[int] = [most] * self._member.num_ranks
        dist.all_gather_object(found, most, group=self._member.group)
        self._forwards = forwards(self._topology, self._config.num_max_tokens_per_rank, min(found))
        if not self._forwards:
            return tunings
        return {key: _without_decode(tuning) for key, tuning in tunings.items()}

    def _nodes_layout(self) -> NodesLayout | None:
        return nodes_layout(self._config, self._topology, forwards=self._forwards)

    def _specialise(self, spec: KernelSpec) -> KernelSpec:
        debug = os.environ.get(DEBUG_VARIABLE, "0") != "0"
        return spec.with_constants(node_constants(spec, self._topology, forwards=self._forwards, debug=debug))

    def _allocate(self, provider: str) -> SymmetricMemory:
        return NvshmemMemory(self._layout.num_bytes, self._member, self._topology.same_node)

    def _first_state(self) -> State:
        state = super()._first_state()
        offsets = self._layout.offsets
        state.nodes = Nodes(**{name: offsets[name] for name, *_ in Nodes._fields_})
        return state

    @property
    def _forward_nodes(self) -> int:
        return self._topology.num_nodes if self._forwards else 0

    @property
    def _forward_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        if not self._forwards:
            return ()
        nodes, each = self._topology.num_nodes, 1 + self._topology.ranks_per_node
        return ("counts", (nodes,)), ("slots", (nodes, self._config.num_max_tokens_per_rank, each))

    def _send(
        self, call: Call, x: WireInput, parts: Addresses, routing: Routing | None, wire: WireFormat, seed: int
    ) -> None:
        if not self._forwards:
            return super()._send(call, x, parts, routing, wire, seed)
        # Both behind what routes. The send first: no kernel of NVSHMEM is loaded while the hop waits for records.
        with call.beside(self._forward_stream) as stream:
            super()._send(call, x, parts, routing, wire, seed)
            hidden, replays = self._config.hidden, routing is None
            forward.launch_dispatch_forward(self._launcher, stream, parts, wire, hidden, replays=replays)

    def _send_sums(
        self,
        call: Call,
        y: torch.Tensor,
        row_values: torch.Tensor | None,
        handle: DispatchHandle,
        options: CombineOptions,
    ) -> None:
        if not self._forwards:
            return super()._send_sums(call, y, row_values, handle, options)
        with call.beside(self._forward_stream) as stream:
            super()._send_sums(call, y, row_values, handle, options)
            hidden, has_values = self._config.hidden, row_values is not None
            forward.launch_combine_forward(self._launcher, stream, handle, options, hidden, has_values=has_values)


def forwards(topology: Topology, num_max_tokens_per_rank: int, decode_tokens: int) -> bool:
    """Tell whether a buffer's tokens are forwarded within nodes, which pays for many of them and nodes of several."""
    return topology.ranks_per_node > 1 and num_max_tokens_per_rank > decode_tokens


def node_constants(spec: KernelSpec, topology: Topology, *, forwards: bool, debug: bool = False) -> dict[str, int]:
    """Return what a kernel's constants are with several nodes; see kernels/layout.cuh."""
    return {
        "nodes": topology.num_nodes,
        "ranks_per_node": topology.ranks_per_node,
        "forwards": int(forwards),
        "nvshmem": int(spec.name not in _RECEIVERS),
        "debug": int(debug),
    }


def _without_decode(tuning: Tuning) -> Tuning:
    return dataclasses.replace(tuning, decode_tokens=0)
