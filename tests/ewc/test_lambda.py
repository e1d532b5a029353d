# SPDX-License-Identifier: Apache-2.0
"""ewc_lambda has no default: what works without it, what it may be, and how its errors read."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import adapted, batches, data, randomise

import fused_ewclora as fe

BATCHES = batches(*data(8), 4)


def second_task(**options: Any) -> fe.EWC:
    model = adapted()
    ewc = fe.EWC(model, fisher_dtype=torch.float64, **options)
    ewc.end_task(BATCHES, F.cross_entropy)
    randomise(model)
    return ewc


def test_fisher_without_lambda():
    """Fishers and weights do not depend on lambda, given or not, and it can be given later."""
    without, given_at_once = second_task(), second_task(ewc_lambda=3.0)
    assert without.ewc_lambda is None
    for key, fisher in given_at_once.fishers.items():
        assert torch.equal(without.fishers[key], fisher)
    without.ewc_lambda = 3
    assert without.ewc_lambda == 3.0 and torch.equal(without.penalty(), given_at_once.penalty())


def test_first_task_without_lambda():
    """Before the first consolidation the penalty is exactly 0, and says once that lambda is missing."""
    ewc = fe.EWC(adapted())
    with pytest.warns(fe.EWCLoRAWarning, match=r"ewc_lambda: none was given.*ewc\.ewc_lambda ="):
        assert ewc.penalty().item() == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ewc.penalty().item() == 0.0 and ewc.add_penalty_grad_().item() == 0.0


@pytest.mark.parametrize("call", [fe.EWC.penalty, fe.EWC.add_penalty_grad_])
def test_later_task_without_lambda(call: Any):
    """After it the penalty raises, and says which value belongs to which mode and how to set it."""
    with pytest.raises(fe.ArgumentError, match=r"(?s)ewc\.ewc_lambda = .*fisher_mode='batch'.*128.*78125"):
        call(second_task())


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e39, 10**400, True, "1", None.__class__])
def test_lambda_refused(value: Any):
    """Numbers that are negative, not finite in fp32, or none at all are refused, also on assignment."""
    for call in (
        lambda: fe.EWC(adapted(), ewc_lambda=value),
        lambda: setattr(fe.EWC(adapted()), "ewc_lambda", value),
        lambda: fe.convert_lambda(value, "batch", "sample", 128),
        lambda: fe.methods.CoDyRA(adapted(), ewc_lambda=value),
    ):
        with pytest.raises(fe.ArgumentError, match="ewc_lambda: expected a finite number >= 0"):
            call()


@given(st.floats(0, torch.finfo(torch.float32).max))
def test_lambda_accepted(value: float):
    """Every number that fp32 holds is kept as it is."""
    ewc = fe.EWC(adapted())
    ewc.ewc_lambda = value
    assert ewc.ewc_lambda == value


@pytest.mark.parametrize("call", ["end_task", "consolidate"])
def test_divergence_names_lambda(call: str):
    """Where training has diverged under the penalty, the error names lambda and the size of the penalty; in
    the first task it does not."""
    ewc = second_task(ewc_lambda=1e7)
    first = fe.EWC(adapted(), ewc_lambda=1e7)
    for each in (ewc, first):
        if call == "consolidate":
            each.estimate_fisher(BATCHES, F.cross_entropy)
        with torch.no_grad():
            each.model.fc.lora_B.fill_(math.nan)
    run = {
        "end_task": lambda each: each.end_task(BATCHES, F.cross_entropy),
        "consolidate": lambda each: each.consolidate(),
    }[call]
    with pytest.raises(
        fe.FisherError, match=r"lora_B of fc holds NaN.*penalty is nan with ewc_lambda=1e\+07.*max F"
    ):
        run(ewc)
    with pytest.raises(fe.FisherError) as error:
        run(first)
    assert "ewc_lambda" not in str(error.value)


def test_older_pickles():
    """The attributes that earlier versions pickled are taken over."""
    ewc = second_task(ewc_lambda=5.0)
    old = {name: value for name, value in vars(ewc).items() if name not in ("_lambda", "watch")}
    again = fe.EWC.__new__(fe.EWC)
    again.__setstate__({**old, "ewc_lambda": 5.0})
    assert again.ewc_lambda == 5.0 and torch.equal(again.penalty(), ewc.penalty())
    again.end_task(BATCHES, F.cross_entropy)
