# SPDX-License-Identifier: Apache-2.0
"""The section of docs/benchmarks.md about host times."""

from __future__ import annotations

from collections.abc import Sequence

from .. import collection
from ..case import OURS
from ..collection import CaseRecords, Record, digits, time_text
from ..report import DASH, case_targets, failures, fold, machine_table, summary_table, table, times
from . import captures, layers, steps

HEAD = """## The host path

What calls cost on the host, in Python and in C++, before a GPU has anything to do
(`python -m fused_ewclora bench host`).
"""
READ = f"""\
All callers of a case take turns in one thread; times are medians with the quantiles [p20, p80].

- Without a GPU the CPU stands in for one whose launches do nothing. "Ours" is Triton, up to the launch: its
  results are not computed. The backends `cpu` and `reference` and the peers do compute; they are checked
  against fp64 before. The time is CPU time of the calling thread. On a GPU everything is launched, and the
  time is that until the call returns.
- Layers have {layers.ROWS} rows, width {layers.WIDTH} and rank {layers.RANK}: their products cost a
  microsecond more than the smallest one.
- The models of the training steps have the depth and the adapted linears (qkv, proj, fc1, fc2) of ViT-B and
  ViT-L, hence as many calls, but are narrow: width {steps.WIDTH}, {steps.TOKENS} tokens,
  {steps.SAMPLES} image. At full width the arithmetic of the CPU, which a GPU does while the host goes on,
  would hide the host.
- oneDNN is switched off, since it spends 40 µs on preparing a product in bf16.
- "ours / PEFT" is the time of ours over that of PEFT's layer or model, below 1 where ours is faster; the
  other columns are read in the same way. A training step is forward, loss and backward, without the
  optimizer; under PEFT it has no penalty. PEFT adapts the whole of a packed qkv, ours k and v.
- "Launches" are those of Triton kernels per call; those of PyTorch are not counted.
- Backward passes make gradients anew, as after `zero_grad`. Fisher capture is measured without the check of
  samples, which is no part of a backward pass.
"""
HEADS = {
    "lora_linear": "One LoRA linear",
    "lora_linear_slices": "k and v of a packed qkv",
    "ewc_penalty": "Penalty with gradients",
    "fisher_accumulate": "Fisher capture",
    "merge": "Merging a model",
    "training_step": "Training steps",
}
SHORT = {"peft": "PEFT"}


def _time(record: Record | None) -> str:
    if record is None:
        return DASH
    return time_text(record["seconds"]["p50"]) if "seconds" in record else "failed"


def _over(mine: Record | None, other: Record | None) -> str:
    """Ours over another caller."""
    if other is None or mine is None or "seconds" not in mine or "seconds" not in other:
        return DASH
    return digits(mine["seconds"]["p50"] / other["seconds"]["p50"])


def _per_layer(case: CaseRecords) -> str:
    """What a capture costs more than none, per layer; a difference of medians."""
    mine, without = collection.ours(case), case.get(captures.WITHOUT)
    if mine is None or without is None or "seconds" not in mine or "seconds" not in without:
        return DASH
    more = mine["seconds"]["p50"] - without["seconds"]["p50"]
    return time_text(max(more, 0.0) / int(mine["shape"]["layers"]))


def _launches(record: Record | None) -> str:
    count = (record or {}).get("launches")
    return DASH if count is None else str(count)


def _short(name: str) -> str:
    """The name of a caller at the head of a column."""
    return SHORT.get(name, name.removeprefix(OURS).lstrip(" ,"))


def _names(cases: Sequence[CaseRecords], *roles: str) -> list[str]:
    """Callers of these roles, in order of appearance."""
    everyone = [record for case in cases for record in case.values()]
    return list(dict.fromkeys(r["provider"] for role in roles for r in everyone if r["role"] == role))


def op_table(cases: Sequence[CaseRecords]) -> list[str]:
    """Ours at every case, its launches, and its time over that of every peer and floor."""
    others = _names(cases, "peer", "floor")
    capture = any("layers" in next(iter(case.values()))["shape"] for case in cases)
    heads = ["case", "ours", "launches", *(["capture per layer"] if capture else [])]
    heads += [f"ours / {_short(name)}" for name in others]
    rows = []
    for case, label in zip(cases, collection.labels(cases), strict=True):
        mine = collection.ours(case)
        row = [label, times(mine), _launches(mine), *([_per_layer(case)] if capture else [])]
        rows.append([*row, *(_over(mine, case.get(name)) for name in others)])
    return table(heads, rows)


def time_table(cases: Sequence[CaseRecords]) -> list[str]:
    """The times of all other callers."""
    names = _names(cases, "variant", "peer", "floor")
    rows = [
        [label, *(_time(case.get(name)) for name in names)]
        for case, label in zip(cases, collection.labels(cases), strict=True)
    ]
    return ["Times of the others:", "", *table(["case", *map(_short, names)], rows)] if names else []


def section(machine: str, records: Sequence[Record], folder: str) -> list[str]:
    """The host times of one machine."""
    newest = [record for case in collection.newest(records).values() for record in case.values()]
    ops = collection.by_op(collection.newest(newest).values())
    lines = [f"### {machine[:1].upper()}{machine[1:]}", "", *summary_table(ops)]
    lines += fold("The machine and its versions", machine_table(newest, folder))
    for op, cases in ops.items():
        details = [*op_table(cases), *time_table(cases), *case_targets(cases), *failures(cases)]
        lines += fold(f"{HEADS.get(op, op)}: every case", details)
    return lines
