"""Layers with adapters: the layer classes, which modules become one, and how they are injected."""

from __future__ import annotations

from .linear import LoRALinear
from .slices import AdapterSlice, fingerprint, fisher_key

__all__ = ["AdapterSlice", "LoRALinear", "fingerprint", "fisher_key"]
