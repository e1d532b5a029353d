"""What the GPU kernels must reach, as data: each a ratio of figures measured in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .case import OURS, Target
from .gpu.ewc_penalty import OP_LAYER
from .gpu.plan import CUDA
from .harness import FLOOR, Record, verdict
from .shapes import RELEASE, Sizes

FROZEN, PEFT, WGRAD = "frozen linear", "composition (PEFT's)", "cuBLAS weight gradient"
ADDMM = "cuBLAS addmm (Unsloth's order)"


class Goal(NamedTuple):
    """A target over the sum of the `cases` cases of `suite` whose op and shape have the values of `where`;
    `ours` is the provider that has to reach it."""

    suite: str
    where: dict[str, object]
    cases: int
    target: Target
    ours: str = OURS


def _linear(sizes: Sizes) -> list[Goal]:
    limits = {sizes.base.name: 1.30, sizes.large.name: 1.25, sizes.huge.name: 1.20}
    both = {"op": "lora_linear", "pass": "forward+backward"}
    goals = []
    for model, limit in limits.items():
        where = {**both, "model": model}
        what = f"{model} four linears, fwd+bwd"
        goals.append(Goal("lora_linear", where, 4, Target(FROZEN, limit, f"{what}, x frozen")))
        goals.append(Goal("lora_linear", where, 4, Target(PEFT, 1 / 1.45, f"{what}, x PEFT")))
    for model in limits:
        where = {**both, "op": "lora_linear_slices", "model": model}
        goals.append(Goal("lora_linear", where, 1, Target(FROZEN, 1.12, f"{model} k,v of qkv, x frozen qkv")))
    return goals


def _penalty(sizes: Sizes) -> list[Goal]:
    goals = []
    for precision in ("highest", "high"):
        where = {
            "op": "ewc_penalty", "model": sizes.large.name, "linears": "k, v", "rank": sizes.slice_rank,
            "precision": precision, "dtype": "fisher float32",
        }  # fmt: skip
        what = f"{sizes.large.name} k,v, {precision}"
        goals.append(Goal("ewc_penalty", where, 1, Target(FLOOR, 1.25, f"{what}, x floor")))
        goals.append(Goal("ewc_penalty", where, 1, Target("best peer", 1 / 4, f"{what}, x best peer")))
    return goals


def _fisher(sizes: Sizes) -> list[Goal]:
    where = {"op": "fisher_accumulate", "mode": "sample", "model": sizes.large.name}
    what = f"{sizes.large.name} linears, per sample"
    return [
        Goal("fisher_accumulate", where, 4, Target(WGRAD, 1.7, f"{what}, x cuBLAS weight gradient")),
        Goal("fisher_accumulate", where, 4, Target("best peer", 1 / 4, f"{what}, x best peer")),
        Goal("fisher_accumulate", where, 4, Target(None, 0.0, f"{what}, bytes of temporaries", "peak_bytes")),
    ]


def _step(sizes: Sizes) -> list[Goal]:
    without, explicit = "LoRA without EWC", "explicit deltaW, eager penalty"
    where = {"op": "training_step", "model": sizes.large.name, "optimizer": "Adam"}
    what = f"{sizes.large.name} step"
    return [
        Goal("training_step", where, 1, Target(without, 1.03, f"{what}, x without EWC")),
        Goal("training_step", where, 1, Target(explicit, 1 / 1.5, f"{what}, x explicit deltaW")),
        # F is allocated before the step and not part of its peak.
        Goal("training_step", where, 1, Target(without, 1.02, f"{what}, peak memory beside F", "peak_bytes")),
    ]


def _cuda(sizes: Sizes) -> list[Goal]:
    """Of the CUDA backend, where Triton is missing."""
    model = sizes.large.name
    penalty = {
        "op": "ewc_penalty", "model": model, "linears": "k, v", "rank": sizes.slice_rank, "precision": "high",
        "dtype": "fisher float32",
    }  # fmt: skip
    fisher = {"op": "fisher_accumulate", "mode": "sample", "model": model}
    linear = {"op": "lora_linear", "pass": "forward+backward", "model": model}
    host = Target(
        None, 0.0, "48 adapters, host time of the op, CUDA / 15 us", "host_seconds", allowance=15e-6
    )
    return [
        Goal("ewc_penalty", penalty, 1, Target(FLOOR, 1.5, f"{model} k,v, high, CUDA x floor"), CUDA),
        Goal("fisher_accumulate", fisher, 4, Target(WGRAD, 2.5, f"{model}, per sample, CUDA x wgrad"), CUDA),
        Goal("lora_linear", linear, 4, Target(ADDMM, 1.1, f"{model}, fwd+bwd, CUDA x addmm"), CUDA),
        Goal("ewc_penalty", {"op": "ewc_penalty", "model": OP_LAYER}, 1, host, CUDA),
    ]


def goals(sizes: Sizes = RELEASE) -> list[Goal]:
    """All targets, by suite."""
    return [*_linear(sizes), *_penalty(sizes), *_fisher(sizes), *_step(sizes), *_cuda(sizes)]


def matches(record: Record, where: Mapping[str, object]) -> bool:
    told = {"op": record["op"], "dtype": record["dtype"], **record["shape"]}
    return all(told.get(name) == value for name, value in where.items())


def row(goal: Goal, cases: Sequence[Mapping[str, Record]]) -> Record:
    """The verdict over the cases of the goal's suite (records by provider); "measured" is False where a case
    or a figure is missing."""
    found = [case for case in cases if matches(next(iter(case.values())), goal.where)]
    result = verdict(goal.target, found, goal.ours)
    known = result["ratio"] == result["ratio"]  # not NaN
    return {**result, "measured": known and len(found) == goal.cases}
