# SPDX-License-Identifier: Apache-2.0
"""Layers of transformers models whose parents use the weight without calling the layer, so that an adapter
would have no effect. They are refused by name."""

from __future__ import annotations

from torch import nn

from ..layers.bypass import register_refusal

# With their fused kernels the mixers of Mamba read these weights in training; PEFT refuses them too.
_MAMBA = ("x_proj", "dt_proj", "out_proj")
_MAMBA2 = ("out_proj",)

# The children that the forward of a class reads, by the name of the class.
_READ: dict[str, tuple[str, ...]] = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": _MAMBA2,
    "BambaMixer": _MAMBA2,
    "NemotronHMamba2Mixer": _MAMBA2,
    "Zamba2MambaMixer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
}
# Bloom reads these weights slice by slice when it imitates tensor parallelism.
_READ_IN_SLICES = {"BloomAttention": "dense", "BloomMLP": "dense_4h_to_h"}


@register_refusal
def bypassed(parent: nn.Module, child: str) -> str | None:
    """The reason why a class of transformers would bypass the adapter of its child, or None."""
    for base in type(parent).__mro__:
        if not base.__module__.startswith("transformers."):
            continue
        if child in _READ.get(base.__name__, ()):
            return (
                f"{base.__name__} uses its weight without calling it, so that an adapter would have no effect"
            )
        if child == _READ_IN_SLICES.get(base.__name__) and _in_slices(parent):
            return f"{base.__name__} with slow_but_exact uses slices of its weight without calling it"
    return None


def _in_slices(parent: nn.Module) -> bool:
    return getattr(parent, "pretraining_tp", 1) > 1 and bool(getattr(parent, "slow_but_exact", False))
