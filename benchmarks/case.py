"""What is measured: an operation at a shape, who computes it, and what it must reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .workload import Workload

Run = Callable[[], Sequence[Tensor]]

OURS = "fused_ewclora"
ROLES = ("ours", "variant", "peer", "floor")


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    role: "ours" is what targets are about; a "variant" is ours with something forced; a "floor" is work of
    equal size whose result is not the case's (a plain product, a frozen layer) and is not checked.
    rotation: the same on other buffers; timing takes turns through `run` and these, so that no buffer is
    still in cache when its turn comes.
    check: what is compared with the truth where `run` does not return it.
    """

    name: str
    run: Run
    role: str = "peer"
    backend: str = ""
    algorithm: str = ""
    rotation: Sequence[Run] = ()
    check: Run | None = None
    predicted: float | None = None  # seconds by a model, never measured


@dataclass(frozen=True)
class Target:
    """ours <= limit * peer + allowance, of the medians or another `metric` of the records; a target of "4 x
    faster" is a limit of 1/4. The peer "best peer" is the least of all peers; None leaves the allowance."""

    peer: str | None
    limit: float
    name: str
    metric: str = "p50"
    allowance: float = 0.0


@dataclass(frozen=True)
class Case:
    """`truth` gives the fp64 results that every provider must match to `tolerance` (relative, in the norm of
    each result). `floor_bytes` adds a computed floor: so many bytes at the measured copy bandwidth."""

    op: str
    shape: dict[str, int | str]
    dtype: str
    flops: float
    bytes: float
    providers: Sequence[Provider]
    truth: Callable[[], Sequence[Tensor]]
    tolerance: float
    targets: Sequence[Target] = field(default_factory=tuple)
    ours: str = OURS
    product: str = "fp32"  # which measured product rate bounds the arithmetic
    precision: str | None = None  # torch.set_float32_matmul_precision while the case runs
    floor_bytes: float | None = None

    @classmethod
    def of(
        cls,
        workload: Workload,
        *,
        providers: Sequence[Provider],
        truth: Callable[[], Sequence[Tensor]],
        tolerance: float,
        **others: Any,
    ) -> Case:
        """The case of a workload, which decides operation, shape, dtype, FLOPs and bytes; `others` are the
        remaining fields."""
        work = workload.work
        return cls(
            workload.op, workload.shape, workload.dtype, work.flops, work.bytes, providers, truth, tolerance,
            **others,
        )  # fmt: skip
