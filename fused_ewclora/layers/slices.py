"""The adapters of one layer as data: their rows and names, and a fingerprint of the base weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import QKVLayout, Rows, finite, positive, segment_names
from ..errors import LayoutError

FINGERPRINT_ROWS = 64  # enough to tell checkpoints apart, small enough to read back from a GPU


@dataclass(frozen=True)
class AdapterSlice:
    """One adapter of a layer: its segment (`""` for the whole layer), its output rows, its rank and scale."""

    name: str
    rows: Rows
    r: int
    scaling: float
    a_name: str = field(init=False, repr=False, compare=False)  # parameter names: lora_A, or lora_A_k
    b_name: str = field(init=False, repr=False, compare=False)
    scale_name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        suffix = f"_{self.name}" if self.name else ""
        for field_name, parameter in (
            ("a_name", "lora_A"),
            ("b_name", "lora_B"),
            ("scale_name", "lora_scale"),
        ):
            object.__setattr__(self, field_name, parameter + suffix)

    @property
    def row_count(self) -> int:
        """The number of rows of its lora_B."""
        return sum(stop - start for start, stop in self.rows)


def fisher_key(module_name: str, adapter: AdapterSlice) -> str:
    """The name of the Fisher of an adapter: the module's name, followed by `.k` etc. for a slice."""
    return ".".join(part for part in (module_name, adapter.name) if part)


def plan_slices(
    out_features: int,
    r: int,
    lora_alpha: float | None,
    slices: Sequence[str] | None,
    layout: QKVLayout | None,
) -> tuple[AdapterSlice, ...]:
    """The adapters of a layer; raises `LayoutError` when there are slices without a layout that fits."""
    positive(r, "r")
    scaling = 1.0 if lora_alpha is None else finite(lora_alpha, "lora_alpha") / r
    if slices is None:
        return (AdapterSlice("", ((0, out_features),), r, scaling),)
    if layout is None:
        raise LayoutError(
            f"slices: expected a layout saying which of {out_features} rows are {list(slices)}, got None.\n"
            '  Either declare it: layout=fe.QKVLayout(segments=("q", "k", "v"), sizes=(d_q, d_k, d_v),\n'
            f"    interleave=None), sizes adding up to {out_features}, interleave=heads for rows by head;\n"
            "  or leave slices out, for one adapter on all rows"
        )
    return tuple(
        AdapterSlice(n, layout.rows(n, out_features), r, scaling) for n in segment_names(slices, "slices")
    )


def fingerprint(weight: Tensor) -> str:
    """A hash of the shape and of up to 64 evenly spaced rows in bf16, equal for an fp32 weight and its bf16
    copy; `""` on the meta device."""
    if weight.is_meta:
        return ""
    rows = torch.linspace(0, weight.shape[0] - 1, min(FINGERPRINT_ROWS, weight.shape[0])).long()
    sample = weight.detach()[rows.to(weight.device)].to(torch.bfloat16).cpu().contiguous()
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
