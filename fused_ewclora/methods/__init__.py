"""Continual-learning methods on the same kernels, behind one protocol (`Method`)."""

from __future__ import annotations

from .codyra import CoDyRA
from .ewc_lora import EWCLoRA
from .inflora import InfLoRA
from .lora import LoRA
from .method import Method
from .n_lora import NLoRA
from .o_lora import OLoRA
from .sd_lora import SDLoRA

__all__ = ["CoDyRA", "EWCLoRA", "InfLoRA", "LoRA", "Method", "NLoRA", "OLoRA", "SDLoRA"]
