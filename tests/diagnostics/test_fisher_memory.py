# SPDX-License-Identifier: Apache-2.0
"""The bytes of Fishers that are told beforehand are those that an EWC holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Tiny, adapted, batches, data
from torch import nn

import fused_ewclora as fe

KINDS = {
    "dense": {}, "bf16": {"fisher_dtype": torch.bfloat16}, "8bit": {"fisher_dtype": "8bit"},
    "factored": {"fisher": "factored"}, "kronecker": {"fisher": "kronecker"},
    "uniform": {"fisher": "uniform"},
}  # fmt: skip


def held(ewc: fe.EWC) -> int:
    return sum(tensor.nbytes for tensor in ewc.state_dict()["tensors"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_held(kind: str):
    """After a task the Fishers take `kept`, and with the sums of the next one `gathering`."""
    model = adapted(dtype=torch.float32)
    options = {"fisher": "dense", **KINDS[kind]}
    (row,) = fe.memory(model, **options).rows
    ewc = fe.EWC(model, 1.0, **options)
    loader = batches(*data(4, dtype=torch.float32), 2)
    ewc.end_task(loader, F.cross_entropy)
    assert held(ewc) == row["kept"]
    ewc.estimate_fisher(loader, F.cross_entropy)
    assert held(ewc) == row["gathering"] == row["end_of_task"] - row["kept"]


def test_before_injection():
    """A model without adapters, of shapes alone, gives the same numbers as after injection."""
    config = fe.LoRAConfig(r=4, target_modules="all-linear")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    before = fe.memory(model, config)
    real = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    fe.inject(real, config)
    after = fe.memory(real)
    assert before.rows == after.rows and before.summary == after.summary
    assert [row["fisher"] for row in before.rows].count("dense") == 2
    adapters = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert before.summary["adapters"] == adapters
    assert all(parameter.is_meta for parameter in model.parameters())


def test_nothing_to_tell():
    """A model without adapters needs a config."""
    with pytest.raises(fe.ArgumentError, match="config: expected a LoRAConfig"):
        fe.memory(Tiny())
