"""Argument checks. Every message names the argument, what it had to be and what it was; no check reads a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qcomm.errors import QcommUnsupportedError
from qcomm.formats import FP8_GROUP_SIZE, WireFormat
from qcomm.tensors import FP8Tensor, MXFP4Tensor

MIN_COMPUTE_CAPABILITY = (9, 0)


def positive(name: str, value: int) -> None:
    """Require a positive int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def multiple(name: str, value: int, of: int) -> None:
    """Require a positive multiple."""
    positive(name, value)
    if value % of:
        raise ValueError(f"{name} must be a multiple of {of}, got {value}")


def seconds(name: str, value: object, most: float) -> None:
    """Require a positive number of seconds that is at most `most`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value <= most:
        raise ValueError(f"{name} must be positive and at most {most:g}, got {value}")


def seed(value: object, name: str = "seed") -> None:
    """Require a seed of random bits: an int of at most 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 0 <= value < 2**64:
        raise ValueError(f"{name} must be in [0, 2**64), got {value}")


def signed64(value: int) -> int:
    """Return the int64 of the same 64 bits, as operators of torch take it."""
    return value - 2**64 if value >= 2**63 else value


def instance(name: str, value: object, *kinds: type) -> None:
    """Require an instance of one of the classes."""
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be a {wanted}, got {type(value).__name__}")


def boolean(name: str, value: object) -> None:
    """Require a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    """Require one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def buffer_shape(num_experts: int, num_topk: int, hidden: int, num_max_tokens_per_rank: int, num_ranks: int) -> None:
    """Require a shape that a Buffer can serve."""
    multiple("hidden", hidden, FP8_GROUP_SIZE)
    positive("num_experts", num_experts)
    positive("num_topk", num_topk)
    positive("num_max_tokens_per_rank", num_max_tokens_per_rank)
    if num_experts % num_ranks:
        raise ValueError(f"num_experts must be a multiple of the {num_ranks} ranks, got {num_experts}")
    if num_topk > num_experts:
        raise ValueError(f"num_topk must be at most num_experts = {num_experts}, got {num_topk}")


def tensor(
    name: str,
    value: object,
    *,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Require a tensor of a shape (None for any size), one of the dtypes, on a device, contiguous unless told."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {value.dtype}")
    fits = value.dim() == len(shape) and all(w is None or w == s for w, s in zip(shape, value.shape, strict=True))
    if not fits:
        want = ", ".join("*" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}.shape must be ({want}), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")


def tokens(x: object, *, num_tokens: int | None, hidden: int, wire: WireFormat, device: torch.device) -> int:
    """Require tokens that the wire can carry; returns how many there are."""
    if isinstance(x, FP8Tensor):
        if wire.kind == "bf16":
            raise ValueError("x must be bfloat16 on the bf16 wire, got FP8Tensor")
        if x.is_packed:
            raise TypeError(f"x.sf must be torch.float32, got {x.sf.dtype}")
        tensor("x.data", x.data, shape=(num_tokens, hidden), dtypes=(torch.float8_e4m3fn,), device=device)
        return x.shape[0]
    if isinstance(x, MXFP4Tensor):
        if wire.kind != "mxfp4":
            raise ValueError(
                f"x must be bfloat16{' or FP8Tensor' * (wire.kind == 'fp8')} on the {wire.kind} wire, got MXFP4Tensor"
            )
        if x.hadamard != wire.hadamard:
            raise ValueError(f"x.hadamard must be {wire.hadamard} as on the wire, got {x.hadamard}")
        if x.hadamard_signs or x.prescaled:
            raise ValueError(
                f"x must have hadamard_signs 0 and not be prescaled, got {x.hadamard_signs:#x} and {x.prescaled}"
            )
        tensor("x.qdata", x.qdata, shape=(num_tokens, hidden // 2), dtypes=(torch.uint8,), device=device)
        tensor("x.sf", x.sf, shape=(num_tokens, hidden // 32), dtypes=(torch.uint8,), device=device)
        return x.shape[0]
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, FP8Tensor or MXFP4Tensor, got {type(x).__name__}")
    tensor("x", x, shape=(num_tokens, hidden), dtypes=(torch.bfloat16,), device=device)
    return x.shape[0]


def compute_capability(capability: tuple[int, int]) -> None:
    """Require a GPU that the kernels can run on."""
    if capability < MIN_COMPUTE_CAPABILITY:
        want, got = (".".join(map(str, c)) for c in (MIN_COMPUTE_CAPABILITY, capability))
        raise QcommUnsupportedError(
            f"the nvlink backend needs compute capability {want} or newer, this GPU has {got}",
            phase="buffer.create",
            expected=MIN_COMPUTE_CAPABILITY,
            seen=capability,
        )
