"""A decoder of bytes in the manner of DeepSeek-V3, small: the model of train_moe.py.

RMSNorm, causal attention with rotary positions, a first block with a dense SwiGLU, others with an MoE layer and a
shared expert. The blocks' MoE layers exchange through one Buffer. Everything but the routed experts is the same on
every rank. Weights are BF16, but for the routers' float32.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from qcomm import Buffer
from qcomm.moe import MoEConfig, MXFP4MoELayer
from qcomm.moe.experts import Keep, Recompute

VOCABULARY = 256
ROTARY_BASE = 10000.0
HEAD_DEVIATION = 0.02
ROUTED_SCALING_FACTOR = 2.0
"""So that four experts of weight 1/4 add up to the size of one."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of the decoder; hidden is a multiple of 128 and of twice the heads."""

    hidden: int = 512
    layers: int = 6
    heads: int = 8
    experts: int = 32
    topk: int = 4
    intermediate: int = 512
    dense_intermediate: int = 2048

    def moe(self) -> MoEConfig:
        """Return the shape of a block's MoE layer."""
        return MoEConfig(
            hidden=self.hidden,
            intermediate=self.intermediate,
            num_experts=self.experts,
            num_topk=self.topk,
            routed_scaling_factor=ROUTED_SCALING_FACTOR,
            shared_intermediate=self.intermediate,
        )


class Attention(nn.Module):
    """Causal attention over `[batch, length, hidden]`, positions by rotation of pairs."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, *rotation), rotate(k, *rotation), v, is_causal=True)
        out: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """The dense block's MLP."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: torch.Tensor = self.down(F.silu(gate) * up)
        return out


class MoE(nn.Module):
    """A block's MoE layer, with random bits of its own for the wires that round stochastically."""

    def __init__(self, layer: MXFP4MoELayer, number: int) -> None:
        super().__init__()
        self.layer, self.number = layer, number

    def forward(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        out: torch.Tensor = self.layer(x, seed=(seed << 8) + self.number)
        return out


class Block(nn.Module):
    """A residual block: attention, then an MLP or an MoE layer."""

    def __init__(self, config: DecoderConfig, mlp: SwiGLU | MoE) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(config.hidden, eps=1e-6) for _ in range(2))
        self.attention, self.mlp = Attention(config), mlp

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], seed: int) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x), rotation)
        return x + self.mlp(self.norms[1](x), seed)


class Decoder(nn.Module):
    """The whole of it. Collective to make, and in every pass.

    Args:
        config: its shape.
        buffer: of that shape; the caller destroys it.
        length: tokens of a sequence at most.
        keep, recompute: see `qcomm.moe.swiglu_experts`.
        num_max_recv_tokens: rows a rank can receive without waiting for the counts; None waits.
        seed: of the initial weights.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        config: DecoderConfig,
        buffer: Buffer,
        length: int,
        *,
        keep: Keep = "mxfp4",
        recompute: Recompute = "none",
        num_max_recv_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.hidden)
        blocks = [Block(config, SwiGLU(config.hidden, config.dense_intermediate))]
        for number in range(1, config.layers):
            layer = MXFP4MoELayer(
                config.moe(),
                buffer=buffer,
                keep=keep,
                recompute=recompute,
                static=num_max_recv_tokens is not None,
                num_max_recv_tokens=num_max_recv_tokens,
                seed=64 * seed + number,
            )
            blocks.append(Block(config, MoE(layer, number)))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.head = nn.Linear(config.hidden, VOCABULARY, bias=False)
        self._draw(seed)
        cos, sin = rotary(length, config.hidden // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.to(buffer.device)

    def _draw(self, seed: int) -> None:
        """Draw what is not the MoE layers' on the CPU, so that every rank and device has the same."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                fan_in = 1.0 if isinstance(module, nn.Embedding) else module.weight.shape[1]
                # Small logits at first, so that training starts at the loss of guessing.
                deviation = HEAD_DEVIATION if module is self.head else fan_in**-0.5
                with torch.no_grad():
                    module.weight.normal_(0, deviation, generator=generator)
            if isinstance(module, (nn.Linear, nn.Embedding, nn.RMSNorm)):
                module.to(torch.bfloat16)

    def moe_layers(self) -> list[MXFP4MoELayer]:
        """Return the MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, MXFP4MoELayer)]

    def split_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters that every rank has alike, and those of this rank's experts."""
        experts = [parameter for layer in self.moe_layers() for parameter in (layer.w1, layer.w2)]
        own = {id(parameter) for parameter in experts}
        return [parameter for parameter in self.parameters() if id(parameter) not in own], experts

    def forward(self, tokens: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
        """Return float32 logits `[batch, length, 256]` of `[batch, length]` int64 bytes; every step has its seed."""
        x = self.embedding(tokens)
        rotation = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, rotation, seed)
        logits: torch.Tensor = self.head(self.norm(x)).float()
        return logits

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Move every router's bias one step towards balance. Collective."""
        for layer in self.moe_layers():
            layer.update_bias(rate)


def rotary(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine, `[length, width]` BF16, of each position's angles."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + width / 2) of `[..., length, width]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
