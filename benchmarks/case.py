"""What is measured: an operation at a shape, who computes it, and what it must reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Provider:
    """One way to compute a case. `floor` marks work of equal size whose result is not the case's (a plain
    product, a frozen layer)."""

    name: str
    run: Callable[[], Sequence[Tensor]]
    floor: bool = False
    backend: str = ""
    algorithm: str = ""


@dataclass(frozen=True)
class Target:
    """median(ours) <= limit * median(peer); a target of "4 x faster" is a limit of 1/4."""

    peer: str
    limit: float
    name: str


@dataclass(frozen=True)
class Case:
    """`truth` gives the fp64 results that every provider must match to `tolerance` (relative, in the norm of
    each result)."""

    op: str
    shape: dict[str, int | str]
    dtype: str
    flops: float
    bytes: float
    providers: Sequence[Provider]
    truth: Callable[[], Sequence[Tensor]]
    tolerance: float
    targets: Sequence[Target] = field(default_factory=tuple)
    ours: str = "fused_ewclora"
