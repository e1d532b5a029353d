# SPDX-License-Identifier: Apache-2.0
"""The targets of the GPU kernels, as data: ratios of values measured in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .case import OURS, Target
from .gpu_preset import OP_LAYER
from .harness import FLOOR, Record, verdict
from .place import CUDA
from .registry import COMPOSITION, EXPLICIT, FROZEN, UNSLOTH, WITHOUT
from .shapes import RELEASE, Model, Sizes
from .workloads import label_of

WGRAD = "product of equal FLOPs"  # of the Fisher: the weight gradient of the batch by cuBLAS


class Goal(NamedTuple):
    """A target for the sum over the `cases` cases of `suite` whose op and shape have the values of `where`: a
    tuple stands for any of its values, None for an absent field. `ours` is the provider that must reach
    it."""

    suite: str
    where: dict[str, object]
    cases: int
    target: Target
    ours: str = OURS


def _layers(model: Model) -> tuple[str, ...]:
    """Labels of the linears of a model."""
    return tuple(label_of(model, name) for name in model.linears())


def _both(model: Model) -> dict[str, object]:
    return {"op": "lora_linear", "pass": None, "model": _layers(model)}


def _linear(sizes: Sizes) -> list[Goal]:
    limits = {sizes.base: 1.30, sizes.large: 1.25, sizes.huge: 1.20}
    goals = []
    for model, limit in limits.items():
        what = f"{model.name} four linears, fwd+bwd"
        goals.append(Goal("lora_linear", _both(model), 4, Target(FROZEN, limit, f"{what}, x frozen")))
        peft = Target(COMPOSITION, 1 / 1.45, f"{what}, x composition (PEFT's)")
        goals.append(Goal("lora_linear", _both(model), 4, peft))
    for model in limits:
        where = {"op": "lora_linear_slices", "pass": None, "model": label_of(model, "qkv, slices k,v")}
        what = f"{model.name} k,v of qkv, x frozen qkv"
        goals.append(Goal("lora_linear", where, 1, Target(FROZEN, 1.12, what)))
    return goals


def _published(sizes: Sizes, precision: str) -> dict[str, object]:
    return {
        "op": "ewc_penalty", "model": label_of(sizes.large, "k,v"), "rank": sizes.slice_rank,
        "precision": precision, "dtype": "fisher float32",
    }  # fmt: skip


def _penalty(sizes: Sizes) -> list[Goal]:
    goals = []
    for precision in ("highest", "high"):
        where, what = _published(sizes, precision), f"{sizes.large.name} k,v, {precision}"
        goals.append(Goal("ewc_penalty", where, 1, Target(FLOOR, 1.25, f"{what}, x floor")))
        goals.append(Goal("ewc_penalty", where, 1, Target("best peer", 1 / 4, f"{what}, x best peer")))
    return goals


def _per_sample(sizes: Sizes) -> dict[str, object]:
    return {"op": "fisher_accumulate", "mode": "sample", "model": _layers(sizes.large)}


def _fisher(sizes: Sizes) -> list[Goal]:
    where, what = _per_sample(sizes), f"{sizes.large.name} linears, per sample"
    return [
        Goal("fisher_accumulate", where, 4, Target(WGRAD, 1.7, f"{what}, x cuBLAS weight gradient")),
        Goal("fisher_accumulate", where, 4, Target("best peer", 1 / 4, f"{what}, x best peer")),
        Goal("fisher_accumulate", where, 4, Target(None, 0.0, f"{what}, bytes of temporaries", "peak_bytes")),
    ]


def _step(sizes: Sizes) -> list[Goal]:
    where = {"op": "training_step", "model": sizes.large.name, "optimizer": "Adam"}
    what = f"{sizes.large.name} step"
    return [
        Goal("end_to_end", where, 1, Target(WITHOUT, 1.03, f"{what}, x without EWC")),
        Goal("end_to_end", where, 1, Target(EXPLICIT, 1 / 1.5, f"{what}, x explicit deltaW")),
        # F is allocated before the step and not part of its peak.
        Goal("end_to_end", where, 1, Target(WITHOUT, 1.02, f"{what}, peak memory beside F", "peak_bytes")),
    ]


def _cuda(sizes: Sizes) -> list[Goal]:
    """Targets of the CUDA backend, which is used where Triton is missing."""
    name, penalty = sizes.large.name, _published(sizes, "high")
    fisher, linear = _per_sample(sizes), _both(sizes.large)
    host = Target(
        None, 0.0, "48 adapters, host time of the op, CUDA / 15 us", "host_seconds", allowance=15e-6
    )
    return [
        Goal("ewc_penalty", penalty, 1, Target(FLOOR, 1.5, f"{name} k,v, high, CUDA x floor"), CUDA),
        Goal("fisher_accumulate", fisher, 4, Target(WGRAD, 2.5, f"{name}, per sample, CUDA x wgrad"), CUDA),
        Goal("lora_linear", linear, 4, Target(UNSLOTH, 1.1, f"{name}, fwd+bwd, CUDA x addmm"), CUDA),
        Goal("ewc_penalty", {"op": "ewc_penalty", "model": OP_LAYER}, 1, host, CUDA),
    ]


def goals(sizes: Sizes = RELEASE) -> list[Goal]:
    """All targets, by suite."""
    return [*_linear(sizes), *_penalty(sizes), *_fisher(sizes), *_step(sizes), *_cuda(sizes)]


def matches(record: Record, where: Mapping[str, object]) -> bool:
    fields = {"op": record["op"], "dtype": record["dtype"], **record["shape"]}
    return all(
        fields.get(name) in value if isinstance(value, tuple) else fields.get(name) == value
        for name, value in where.items()
    )


def row(goal: Goal, cases: Sequence[Mapping[str, Record]]) -> Record:
    """The verdict over the cases of the goal's suite (records by provider); "measured" is False where a case
    or a value is missing."""
    matching = [case for case in cases if matches(next(iter(case.values())), goal.where)]
    result = verdict(goal.target, matching, goal.ours)
    known = result["ratio"] == result["ratio"]  # not NaN
    return {**result, "measured": known and len(matching) == goal.cases}
