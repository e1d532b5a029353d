# SPDX-License-Identifier: Apache-2.0
"""Scaling curves over tokens, width, rank, adapters and samples, for ours and the main peer of each op.

The shape of every record of a curve has "sweep", the name of the field that varies along the curve; the other
fields are constant. Widths are those of square layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from . import ewc_penalty, fisher_accumulate, lora_linear, registry, workloads
from .case import Case
from .collection import SWEEP
from .place import Place
from .workload import Shape, Workload

MAIN_PEER = {
    "lora_linear": registry.COMPOSITION, "ewc_penalty": "eager autograd", "fisher_accumulate": "einsum"
}  # fmt: skip
OPS = tuple(MAIN_PEER)
_BUILD = {
    "lora_linear": lora_linear.build,
    "ewc_penalty": ewc_penalty.build,
    "fisher_accumulate": fisher_accumulate.build,
}
# The values of the fields that are not swept.
_CENTRE: dict[str, Shape] = {
    "lora_linear": {"tokens": 788, "width": 768, "rank": 10},
    "ewc_penalty": {"width": 768, "rank": 10, "adapters": 4},
    "fisher_accumulate": {"samples": 4, "tokens": 197, "width": 768},
}
_CPU = {
    "tokens": (64, 256, 1024, 4096), "width": (256, 512, 1024, 2048), "rank": (4, 8, 16, 32, 64),
    "adapters": (1, 2, 6, 12, 24), "samples": (1, 4, 16, 32),
}  # fmt: skip
_QUICK: dict[str, tuple[int, ...]] = {
    "tokens": (16, 64),
    "width": (64, 128),
    "rank": (4, 8),
    "adapters": (1, 2),
    "samples": (1, 2),
}
_FULL = {
    "tokens": (16, 64, 256, 1024, 4096, 16384), "width": (256, 512, 768, 1024, 2048, 4096),
    "rank": (1, 2, 4, 8, 16, 32, 64, 128), "adapters": (1, 2, 6, 12, 24, 48),
    "samples": (1, 4, 16, 64, 128),
}  # fmt: skip
_POINTS: dict[str, dict[str, tuple[int, ...]]] = {"cpu": _CPU, "quick": _QUICK, "full": _FULL}


def _curves(op: str, preset: str) -> Iterator[Workload]:
    # Of the size of the points of a quick curve.
    small: Shape = {"tokens": 16, "width": 64, "rank": 4, "adapters": 2, "samples": 2}
    for name in _CENTRE[op]:
        for value in _POINTS[preset][name]:
            centre = _CENTRE[op] if preset != "quick" else {key: small[key] for key in _CENTRE[op]}
            shape: Shape = {SWEEP: name, **centre, name: value}
            yield Workload(op, shape, "fisher float32" if op == "ewc_penalty" else "float32")


def plan(preset: str) -> list[Workload]:
    """All points of all curves of a preset; presets for GPUs have none."""
    if preset not in _POINTS:
        return []
    return [workload for op in OPS for workload in _curves(op, preset)]


def expanded(workload: Workload) -> Workload:
    """The workload of a point with the fields of its op."""
    width, dtype = workload.size("width"), workload.dtype.removeprefix("fisher ")
    sizes = (width, width)
    if workload.op == "lora_linear":
        return workloads.linear("growth", workload.size("tokens"), sizes, workload.size("rank"), dtype)
    if workload.op == "ewc_penalty":
        return workloads.penalty("growth", sizes, workload.size("adapters"), workload.size("rank"), dtype)
    return workloads.fisher("growth", workload.size("samples"), workload.size("tokens"), sizes, dtype=dtype)


def build(workload: Workload, place: Place) -> Case:
    """A point: the case of its op with only the main peer, without targets."""
    case = _BUILD[workload.op](expanded(workload), place)
    peer = MAIN_PEER[workload.op]
    providers = [p for p in case.providers if p.role != "peer" or p.name == peer]
    return dataclasses.replace(case, shape=workload.shape, providers=providers, targets=())
