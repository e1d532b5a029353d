"""Continual-learning methods on the same kernels, behind one protocol (`Method`)."""

from __future__ import annotations

from .cl_lora import CLLoRA
from .codyra import CoDyRA
from .ewc_lora import EWCLoRA
from .inflora import InfLoRA
from .keep_lora import KeepLoRA
from .lora import LoRA
from .method import Method
from .sd_lora import SDLoRA

__all__ = ["CLLoRA", "CoDyRA", "EWCLoRA", "InfLoRA", "KeepLoRA", "LoRA", "Method", "SDLoRA"]
