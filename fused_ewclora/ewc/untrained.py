# SPDX-License-Identifier: Apache-2.0
"""Adapters that a task did not train although it trained others."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..distributed.processes import sharded
from ..layers.adapted import AdaptedLinear
from ..layers.matching import shorten


@torch.no_grad()
def untrained_message(layers: Mapping[str, AdaptedLinear]) -> str | None:
    """What to tell about layers of a first task whose lora_B is all zeros, as at its start, although other
    layers have been trained; None if there are no such layers. Adapters that are frozen do not count."""
    if sharded(layers):
        return None
    trained: dict[str, bool] = {}
    ran: dict[str, bool] = {}
    for name, layer in layers.items():
        if layer.consolidated_tasks or not any(p.requires_grad for _, p in layer.named_lora_parameters()):
            continue
        source = layer.rows_of(name)  # of the experts of a mixture some may have no rows in a whole task
        changed = any(bool(lora_b.any()) for _, _, lora_b in layer.adapter_parameters())
        trained[source] = trained.get(source, False) or changed
        ran[source] = ran.get(source, False) or layer.forward_calls > 0
    still = [source for source, changed in trained.items() if not changed]
    if not still or len(still) == len(trained):
        return None
    text = f"{shorten(still)}: lora_B is still zero although other layers have been trained"
    never = [source for source in still if not ran[source]]
    if not never:
        return f"{text}; is the adapter in the optimizer, and does the training loss depend on the layer?"
    return (
        f"{text}, and {shorten(never)} never ran (compiled calls are not counted). A model that reads the "
        "weight of a layer without calling it passes its adapter by: fe.verify_forward(model, sample) tells, "
        "fe.register_call mends it; otherwise leave the layer out with exclude_modules"
    )
