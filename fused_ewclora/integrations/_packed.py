# SPDX-License-Identifier: Apache-2.0
"""A table of the packed projections of a model whose layout an integration knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import QKVLayout
from ..layers.bypass import CallRule, settings_text
from ..layers.matching import LayoutRule, ancestors, is_linear, shorten
from ..layers.parts import parts_of
from ..report import Report


def packed_projections(
    library: str, model: nn.Module, layout_of: LayoutRule, settings_of: CallRule | None = None
) -> Report:
    """One row per layer that the rule `layout_of` (of `register_layout`) knows, and per part of a module that
    is packed, such as the input projection of an `nn.MultiheadAttention`. `segments`, `sizes` and
    `interleave` are the fields of its `QKVLayout`; `notes` says how its parent bypasses it, if it does.
    settings_of: the rule of `register_call`."""
    rows: list[dict[str, Any]] = []
    for name, layer in model.named_modules():
        rows += [
            {**_row(f"{name}.{part.name}".lstrip("."), layer, part.layout), "notes": None}
            for part in parts_of(layer)
            if part.layout is not None and part.refusal is None
        ]
        for parent, path in ancestors(model, name) if is_linear(layer) else ():
            layout = layout_of(parent, path)
            if layout is None:
                continue
            note = _note(path, (settings_of(parent, path) if settings_of else None) or {})
            rows.append({**_row(name, parent, layout), "notes": note})
            break
    bypassed = [row["name"] for row in rows if row["notes"]]
    notes = (
        [f"bypassed by their parents until inject sets the attribute: {shorten(bypassed)}"]
        if bypassed
        else []
    )
    if not rows:
        notes.append("no packed projections that are known")
    return Report(f"packed projections ({library})", rows, notes, {"layers": len(rows), "bypassed": bypassed})


def _row(name: str, parent: nn.Module, layout: QKVLayout) -> dict[str, Any]:
    return {
        "name": name,
        "parent": type(parent).__name__,
        "segments": layout.segments,
        "sizes": layout.sizes,
        "interleave": layout.interleave,
    }


def _note(child: str, settings: Mapping[str, Any]) -> str | None:
    if not settings:
        return None
    return f"uses {child}.weight, calls {child} with {settings_text(settings)}"
