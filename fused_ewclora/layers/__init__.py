"""Layers with adapters: their classes, the rules that select modules, and injection."""

from __future__ import annotations

from .linear import LoRALinear
from .slices import AdapterSlice, fingerprint, fisher_key

__all__ = ["AdapterSlice", "LoRALinear", "fingerprint", "fisher_key"]
