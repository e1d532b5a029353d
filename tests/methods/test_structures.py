# SPDX-License-Identifier: Apache-2.0
"""Methods with an EWC penalty, with every structure of its Fisher."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_checks import SAMPLES, at_start, parameters, trained
from tiny_models import assert_same, batches, data
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError
from fused_ewclora.methods import CoDyRA, EWCLoRA, Method, SDLoRA

METHODS: dict[str, type[Method]] = {"EWCLoRA": EWCLoRA, "CoDyRA": CoDyRA, "SDLoRA": SDLoRA}
STRUCTURES: dict[str, dict[str, Any]] = {
    "8bit": {"fisher_dtype": "8bit"},
    **{name: {"fisher": name} for name in ("factored", "kronecker", "uniform")},
}


def task(method: Method, number: int, compact: bool = False) -> None:
    torch.manual_seed(number)
    method.begin_task(number)
    trained(method, method.model, lambda x, y: (x, y), number, compact)
    method.end_task(batches(*data(SAMPLES, seed=50 + number), 4), F.cross_entropy)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", METHODS)
def test_penalty_and_resume(name: str, structure: str):
    """The penalty is that of the structure's F, and a state that was loaded goes on bit for bit."""
    options = {"ewc_lambda": 20.0, **STRUCTURES[structure]}
    method = METHODS[name](at_start(), **options)
    task(method, 0, compact=name == "CoDyRA")
    model = copy.deepcopy(method.model.state_dict())
    saved = copy.deepcopy(method.state_dict())
    other = METHODS[name](at_start(), **options)
    if name == "EWCLoRA":
        other.model.load_state_dict(model)
        other.load_state_dict(saved)
    else:
        other.load_state_dict(saved)
        other.model.load_state_dict(model)
    for one in (method, other):
        task(one, 1)
    assert_same(parameters(method), parameters(other))
    assert method.penalty().item() == other.penalty().item()
    method.begin_task(2)
    trained(method, method.model, lambda x, y: (x, y), 2, False)
    penalty = method.penalty()
    assert penalty.item() > 0.0
    ewc = method.ewc
    fishers, lora_as, lora_bs, scales = ewc._placement.operands(ewc.fishers)
    if structure != "kronecker":  # whose penalty has entries off the diagonal
        dense = [f if isinstance(f, Tensor) else f.dense().to(torch.float64) for f in fishers]
        expected = FE.ewc_penalty(dense, lora_as, lora_bs, scales, 20.0)
        torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=0.0, check_dtype=False)


def test_refused():
    """A structure that does not exist leaves the model without adapters of CoDyRA."""
    model = at_start()
    with pytest.raises(ArgumentError, match="fisher: expected one of"):
        CoDyRA(model, ewc_lambda=1.0, fisher="diagonal")
    assert not any("gate" in name for name, _ in model.named_parameters())
