# SPDX-License-Identifier: Apache-2.0
"""Continual-learning methods on the same kernels, behind one protocol (`Method`)."""

from __future__ import annotations

from .cl_lora import CLLoRA
from .codyra import CoDyRA
from .ewc_lora import EWCLoRA
from .factor_ewc import FactorEWC
from .iel import IEL
from .inflora import InfLoRA
from .ita import ITA
from .keep_lora import KeepLoRA
from .lora import LoRA
from .method import Method
from .n_lora import NLoRA
from .o_lora import OLoRA
from .perturb_and_merge import PerturbAndMerge
from .sd_lora import SDLoRA

__all__ = [
    "IEL",
    "ITA",
    "CLLoRA",
    "CoDyRA",
    "EWCLoRA",
    "FactorEWC",
    "InfLoRA",
    "KeepLoRA",
    "LoRA",
    "Method",
    "NLoRA",
    "OLoRA",
    "PerturbAndMerge",
    "SDLoRA",
]
