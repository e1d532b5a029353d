"""The table of packed projections that an integration knows in a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers.bypass import CallRule
from ..layers.matching import LayoutRule, ancestors, is_linear, shorten
from ..report import Report


def packed_projections(
    library: str, model: nn.Module, layout_of: LayoutRule, mend_of: CallRule | None = None
) -> Report:
    """One row per layer that `layout_of`, asked as by `register_layout`, knows: `segments`, `sizes` and
    `interleave` are the fields of its `QKVLayout`; `notes` says how its parent bypasses it, if it does."""
    rows: list[dict[str, Any]] = []
    for name, layer in model.named_modules():
        for parent, path in ancestors(model, name) if is_linear(layer) else ():
            layout = layout_of(parent, path)
            if layout is None:
                continue
            rows.append(
                {
                    "name": name,
                    "parent": type(parent).__name__,
                    "segments": layout.segments,
                    "sizes": layout.sizes,
                    "interleave": layout.interleave,
                    "notes": _note(path, (mend_of(parent, path) if mend_of else None) or {}),
                }
            )
            break
    bypassed = [row["name"] for row in rows if row["notes"]]
    notes = [f"not called by their parents until inject sets it: {shorten(bypassed)}"] if bypassed else []
    if not rows:
        notes.append("no packed projections that are known")
    return Report(f"packed projections ({library})", rows, notes, {"layers": len(rows), "bypassed": bypassed})


def _note(child: str, settings: Mapping[str, Any]) -> str | None:
    if not settings:
        return None
    text = ", ".join(f"{attribute} = {value}" for attribute, value in settings.items())
    return f"uses {child}.weight, calls {child} with {text}"
