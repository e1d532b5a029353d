# SPDX-License-Identifier: Apache-2.0
"""What quantising again has made of the updates that were merged into quantised weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.inject import adapters
from ..layers.quantised import QuantisedLinear
from ..report import Report


def rounding(model: nn.Module) -> Report:
    """A table of the adapted layers with quantised weights; its rows are data.

    update and error are Frobenius norms of what the latest merge or consolidation in mode "requantise" added
    to the weight, and of what quantising the sum again changed; share is error / update. They are None where
    nothing was rounded, as in mode "residual".

    Args:
        model: with adapters.

    Returns:
        The table; empty without quantised weights.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> len(fe.rounding(model).rows)
        0
    """
    rows: list[dict[str, Any]] = []
    for name, layer in adapters(model).items():
        if isinstance(layer, QuantisedLinear):
            found = layer.rounding
            norms = (None, None, None) if found is None else (found.update, found.error, found.share)
            row = {"name": name, "weight": layer.weight_kind, "merge": layer.quantised_merge}
            rows.append({**row, **dict(zip(("update", "error", "share"), norms, strict=True))})
    notes = () if rows else ("no adapted layers with quantised weights",)
    return Report("updates rounded into quantised weights", rows, notes, {"layers": len(rows)})
