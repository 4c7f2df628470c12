"""Mixture-of-Experts layers around dispatch and combine: a router, and experts in plain PyTorch."""

from qcomm.moe.config import MoEConfig
from qcomm.moe.plain import Experts, MoELayer, SharedExpert, decode, swiglu
from qcomm.moe.router import Router

__all__ = ["Experts", "MoEConfig", "MoELayer", "Router", "SharedExpert", "decode", "swiglu"]
