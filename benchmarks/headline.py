# SPDX-License-Identifier: Apache-2.0
"""The cases of the picture at the top of README.md: what elastic weight consolidation costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import collection
from .case import OURS
from .collection import CaseRecords, Record


class Panel(NamedTuple):
    """A case of an operation: `model` names it; `others` are providers with the words of their bars."""

    op: str
    model: str
    title: str
    others: dict[str, str]


PANELS = (
    Panel("training_step", "ViT-B/16", "training step, ViT-B/16", {
        "explicit deltaW, eager penalty": "ΔW formed, eager penalty",
        "LoRA without EWC": "LoRA, no EWC",
    }),
    Panel("ewc_penalty", "ViT-L k,v", "penalty and gradients, ViT-L", {
        "eager autograd": "eager autograd", "torch.compile": "torch.compile",
    }),
    Panel("fisher_pass", "ViT-B/16", "per-sample Fisher, ViT-B/16", {
        "backpack": "BackPACK", "batch size 1": "batch size 1", "opacus": "Opacus",
    }),
)  # fmt: skip
RANK, FISHER = 10, "float32"  # of the penalty


def found(records: Sequence[Record]) -> list[tuple[Panel, CaseRecords]]:
    """The cases of the panels on the machine with the most of them; empty unless one has them all."""
    cpu = [
        r for r in records if not (collection.is_gpu(r) or collection.is_host(r) or collection.is_sweep(r))
    ]
    for of_machine in collection.by_machine(cpu).values():
        cases = list(collection.newest(of_machine).values())
        pairs = [(panel, case) for panel in PANELS if (case := _case(panel, cases)) is not None]
        if len(pairs) == len(PANELS):
            return pairs
    return []


def _case(panel: Panel, cases: Sequence[CaseRecords]) -> CaseRecords | None:
    for case in cases:
        first = next(iter(case.values()))
        shape = first["shape"]
        named = (first["op"], shape.get("model")) == (panel.op, panel.model)
        ranked = shape.get("rank", RANK) == RANK and FISHER in first["dtype"]
        measured = all(collection.measured(case.get(name)) for name in (OURS, *panel.others))
        if named and ranked and measured:
            return case
    return None
