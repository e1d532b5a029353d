"""Continual-learning methods on the same kernels, behind one protocol (`Method`)."""

from __future__ import annotations

from .ewc_lora import EWCLoRA
from .lora import LoRA
from .method import Method
from .sd_lora import SDLoRA

__all__ = ["EWCLoRA", "LoRA", "Method", "SDLoRA"]
