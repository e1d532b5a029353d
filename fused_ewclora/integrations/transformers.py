# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: its own linear layers, its packed projections, and EWC in `Trainer`.

fe.inject(model, fe.LoRAConfig(target_modules=["c_attn"], slices=("q", "v")))
trainer = Trainer(model, args, callbacks=[fe.integrations.transformers.EWCCallback(ewc)], ...)
"""

from __future__ import annotations

from ._library import require

require("transformers")

# They register their rules; after the version check.
from . import _transformers_bypasses, _transformers_experts  # noqa: E402, F401
from ._transformers_fisher import next_tokens  # noqa: E402
from ._transformers_layers import LoRAConv1D, LoRAFalconLinear  # noqa: E402
from ._transformers_layouts import targets  # noqa: E402
from ._transformers_trainer import EWCCallback  # noqa: E402

__all__ = ["EWCCallback", "LoRAConv1D", "LoRAFalconLinear", "next_tokens", "targets"]
