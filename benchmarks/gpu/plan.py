"""A plan lists cases without allocating anything; each is built, measured and dropped in turn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fused_ewclora import available_backends

from .. import predict
from ..case import OURS, Case, Run
from ..records import key

BACKEND = "triton"
CUDA = f"{OURS} cuda"  # the CUDA backend, where it is built, beside ours in the same case
ALGORITHMS = ("full", "prologue", "addmm", "concat")
MOST_COPIES = 64
MAIN, LATER, SMALL = "main", "later", "small"  # parts of a plan: SMALL cases have few providers
AGAIN = f"{OURS}, again"  # ours beside a later part of its case: the same measurement, a second time


@dataclass(frozen=True)
class Place:
    """Where cases run. A rehearsal is small, on the CPU, with Triton's interpreter, and shows nothing but
    that everything can run."""

    device: str
    rehearsal: bool = False

    def copies(self, working_set: float) -> int:
        """How many sets of buffers hold three times the second-level cache."""
        if self.device != "cuda":
            return 1
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 26)
        return min(MOST_COPIES, max(1, math.ceil(3 * cache / max(working_set, 1.0))))

    def compiled(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile for static shapes; code of earlier cases is forgotten."""
        torch._dynamo.reset()
        return torch.compile(method, dynamic=False, backend="eager" if self.rehearsal else "inductor")


@dataclass(frozen=True)
class Planned:
    """One case to come, or a later part of one, whose records join those of the case: what takes long to get
    ready, such as a compiled peer, must not keep a case from being measured. `marker` is a provider by which
    records show that the part was done."""

    op: str
    shape: dict[str, int | str]
    dtype: str
    build: Callable[[Planned, Place], Case]
    marker: str = OURS

    @property
    def key(self) -> str:
        return key({"op": self.op, "shape": self.shape, "dtype": self.dtype})

    def done(self, found: Iterable[dict[str, Any]]) -> bool:
        """Whether records hold the outcome of this part."""
        return any(r["provider"] == self.marker and key(r) == self.key for r in found)

    def case(self, place: Place) -> Case:
        """The case, with a prediction for ours where its builder made none."""
        case = self.build(self, place)
        providers = [
            dataclasses.replace(p, predicted=predict.of_case(case))
            if p.role in ("ours", "variant") and p.predicted is None
            else p
            for p in case.providers
        ]
        return dataclasses.replace(case, providers=providers)


def part_of(planned: Planned) -> str:
    """MAIN, LATER or SMALL."""
    return str(getattr(planned.build, "keywords", {}).get("part", MAIN))


def cuda_is_built() -> bool:
    """Whether cases have the provider CUDA."""
    return available_backends()["cuda"] is None


def turns(make: Callable[[Any], Run], buffers: Sequence[Any]) -> dict[str, Any]:
    """`run` and `rotation` of a provider, over all sets of buffers."""
    first, *others = [make(one) for one in buffers]
    return {"run": first, "rotation": tuple(others)}
