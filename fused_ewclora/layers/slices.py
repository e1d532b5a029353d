# SPDX-License-Identifier: Apache-2.0
"""The adapters of one layer as data: their rows and names, and a fingerprint of the base weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import QKVLayout, Rows, finite, positive, segment_names
from ..errors import LayoutError
from .digest import digest

FINGERPRINT_ROWS = 64  # of the part that does not depend on the dtype


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
    """A hash of the shape and of up to 64 evenly spaced rows in bf16, a colon, and the exact `digest`; `""`
    on the meta device. `same_weights` compares two of them."""
    if weight.is_meta:
        return ""
    rows = torch.linspace(0, weight.shape[0] - 1, min(FINGERPRINT_ROWS, weight.shape[0])).long()
    sample = weight.detach()[rows.to(weight.device)].to(torch.bfloat16).cpu().contiguous()
    hashed = hashlib.sha256(repr(tuple(weight.shape)).encode())
    hashed.update(sample.view(torch.int16).numpy().tobytes())
    return f"{hashed.hexdigest()[:16]}:{digest(weight)}"


def exact_part(fingerprint: str) -> str:
    """The digest in a fingerprint, `""` if it is of an earlier version, which hashed only the rows."""
    return fingerprint.partition(":")[2]


def same_weights(first: object, second: object) -> bool:
    """Whether two fingerprints are of the same weight: of the same bits if both have a digest of one dtype,
    else of the same rows in bf16. A weight keeps its fingerprint in this sense when it is rounded to bf16."""
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    digests = [exact_part(fingerprint) for fingerprint in (first, second)]
    comparable = all(digests) and len({part.partition(":")[0] for part in digests}) == 1
    return first == second if comparable else first.partition(":")[0] == second.partition(":")[0]
