# SPDX-License-Identifier: Apache-2.0
"""The input projections of `nn.MultiheadAttention`: rows of one weight for q, k and v, or three weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FE
from ..config import QKVLayout
from ..ops.capture import RowsCapture
from .parts import LoRAPart, Part

PACKED = "in_proj"
SEGMENTS = ("q", "k", "v")
SEPARATE = tuple(f"{segment}_proj" for segment in SEGMENTS)


class LoRAInProjection(LoRAPart):
    """The adapters on the packed input projection of an attention, which may compute some of its rows alone.

    Where query, key and value are one tensor, a call computes all rows; otherwise one call for each tensor
    computes the rows of what is projected from it, with the rows of the adapters that belong to these.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, start: int | None = None
    ) -> Tensor:
        """x `[..., in_features]` -> y `[..., rows of weight]`; weight and bias are those of the rows from
        `start` on, None if they are all rows."""
        if start is None:
            return super().forward(x, weight, bias)
        adapters = within(self.active() or (), start, start + weight.shape[0])
        if not adapters:
            return F.linear(x, weight, bias)
        capture = self.fisher_capture
        call = None if capture is None else RowsCapture(capture, start)
        return self.apply_adapters(x, weight, bias, adapters, call)

    def concerns(self, start: int, stop: int) -> bool:
        """Whether adapters have some of the rows from `start` to before `stop`."""
        ranges = (rows for piece in self.adapter_slices for rows in piece.rows)
        return any(a < stop and start < b for a, b in ranges)


def within(adapters: Iterable[FE.Adapter], start: int, stop: int) -> list[FE.Adapter]:
    """The adapters on the rows `start` to `stop` of a layer alone, which are counted from `start`."""
    found = []
    for adapter in adapters:
        rows, pieces, first = [], [], 0
        for a, b in adapter.rows:
            low, high = max(a, start), min(b, stop)
            if low < high:
                rows.append((low - start, high - start))
                pieces.append(adapter.lora_b[first + low - a : first + high - a])
            first += b - a
        if rows:
            lora_b = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            found.append(adapter._replace(lora_b=lora_b, rows=tuple(rows)))
    return found


def input_projections(attention: nn.MultiheadAttention, refusal: str | None) -> Iterator[Part]:
    """The parts of an attention: one for a packed weight, else three."""
    d = attention.embed_dim
    if attention._qkv_same_embed_dim:
        layout = QKVLayout(SEGMENTS, (d,) * 3)
        yield Part(
            PACKED, "in_proj_weight", d, 3 * d, "in_proj_bias", layout=layout, refusal=refusal,
            adapted=LoRAInProjection,
        )  # fmt: skip
        return
    widths = (d, attention.kdim, attention.vdim)
    for name, segment, width in zip(SEPARATE, SEGMENTS, widths, strict=True):
        yield Part(name, f"{name}_weight", width, d, "in_proj_bias", segment=segment, refusal=refusal)
