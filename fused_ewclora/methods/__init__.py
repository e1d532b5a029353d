"""Continual-learning methods on the same kernels, behind one protocol (`Method`)."""

from __future__ import annotations

from .codyra import CoDyRA
from .ewc_lora import EWCLoRA
from .factor_ewc import FactorEWC
from .inflora import InfLoRA
from .lora import LoRA
from .method import Method
from .sd_lora import SDLoRA

__all__ = ["CoDyRA", "EWCLoRA", "FactorEWC", "InfLoRA", "LoRA", "Method", "SDLoRA"]
