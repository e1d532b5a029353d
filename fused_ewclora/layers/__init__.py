# SPDX-License-Identifier: Apache-2.0
"""Layers with adapters: their classes, the rules that select modules, and injection."""

from __future__ import annotations

from . import attention, conv, torch_encoder  # noqa: F401  (they register rules for modules of PyTorch)
from .linear import LoRALinear
from .slices import AdapterSlice, fingerprint, fisher_key

__all__ = ["AdapterSlice", "LoRALinear", "fingerprint", "fisher_key"]
