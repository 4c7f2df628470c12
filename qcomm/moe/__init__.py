"""Mixture-of-Experts layers around dispatch and combine: one to train, and one in plain PyTorch."""

from qcomm.moe.config import MoEConfig
from qcomm.moe.experts import swiglu_experts
from qcomm.moe.layer import MXFP4MoELayer
from qcomm.moe.plain import Experts, MoELayer, SharedExpert, decode, swiglu
from qcomm.moe.products import Groups, grouped_mm, grouped_wgrad
from qcomm.moe.quantize import FP8BlockTensor, quantize_weights
from qcomm.moe.router import Router

__all__ = [
    "Experts",
    "FP8BlockTensor",
    "Groups",
    "MXFP4MoELayer",
    "MoEConfig",
    "MoELayer",
    "Router",
    "SharedExpert",
    "decode",
    "grouped_mm",
    "grouped_wgrad",
    "quantize_weights",
    "swiglu",
    "swiglu_experts",
]
