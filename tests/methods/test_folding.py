# SPDX-License-Identifier: Apache-2.0
"""Adapters that are not finite are never folded into the weights, by any method."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import adapted, assert_same, batches, data, randomise, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import CoDyRA, EWCLoRA, InfLoRA, KeepLoRA, LoRA, Method, SDLoRA

EWC: dict[str, Any] = {"ewc_lambda": 3.0, "fisher_dtype": torch.float64}
# (method, its options, the error, whether end_task passes over the data before it folds)
FOLDING: list[tuple[type[Method], dict[str, Any], type[fe.EWCLoRAError], bool]] = [
    (LoRA, {}, fe.ArgumentError, False),
    (EWCLoRA, EWC, fe.FisherError, True),
    (EWCLoRA, {**EWC, "merge_mode": "factors"}, fe.FisherError, True),
    (CoDyRA, {}, fe.ArgumentError, False),
    (CoDyRA, EWC, fe.FisherError, True),
    (InfLoRA, {"epsilon": 0.6}, fe.ArgumentError, True),
    (KeepLoRA, {"epsilon_w": 0.4, "epsilon_f": 0.6}, fe.ArgumentError, True),
]
NAMES = ["LoRA", "EWCLoRA", "EWCLoRA factors", "CoDyRA", "CoDyRA EWC", "InfLoRA", "KeepLoRA"]


def in_second_task(kind: type[Method], options: dict[str, Any]) -> Method:
    """With adapters as training leaves them."""
    torch.manual_seed(0)
    model = adapted()
    randomise(model, 0.0)
    method = kind(model, **options)
    for task in range(2):
        method.begin_task(task)
        method.prepare(batches(*data(6, seed=task), 3))
        randomise(model)
        if task == 0:
            method.end_task(batches(*data(6, seed=task), 3), F.cross_entropy)
    return method


def everything(method: Method) -> dict[str, Tensor]:
    """All tensors of the model and of the method."""
    tensors = dict(method.model.state_dict())
    if (ewc := getattr(method, "ewc", None)) is not None:
        tensors |= ewc.state_dict()["tensors"]
    tensors |= {f"subspace.{n}": used.basis for n, used in getattr(method, "subspaces", {}).items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def spoiled(parameter: nn.Parameter, value: float) -> None:
    with torch.no_grad():
        parameter[1, 0] = value


def then(loader: list[Any], action: Callable[[], None]) -> Iterator[Any]:
    """The batches, and `action` after the last one."""
    yield from loader
    action()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("kind", "options", "error", "reads"), FOLDING, ids=NAMES)
def test_nan_refused(kind, options, error, reads, bad):
    """A sum that is not finite is refused and nothing changes."""
    method = in_second_task(kind, options)
    loader, lora_b = batches(*data(6, seed=1), 3), method.model.fc.lora_B
    good = lora_b.detach().clone()
    before, counts = everything(method), [layer.consolidated_tasks for layer in method.layers.values()]
    before["fc.lora_B"][1, 0] = bad
    if reads:  # what the data shows is finite, so that only the sum is not
        spoiled_loader: Any = then(loader, lambda: spoiled(lora_b, bad))
    else:
        spoiled(lora_b, bad)
        spoiled_loader = loader
    message = r"(end_task|consolidate): W \+ B diag\(s\) A of fc: expected finite .*nothing was changed"
    with pytest.raises(error, match=message):
        method.end_task(spoiled_loader, F.cross_entropy)
    assert_same(before, everything(method))
    assert counts == [layer.consolidated_tasks for layer in method.layers.values()]
    assert method.tasks == 1
    with torch.no_grad():
        method.model.fc.lora_B.copy_(good)
    method.end_task(loader, F.cross_entropy)
    assert method.tasks == 2
    assert all(layer.consolidated_tasks == 2 for layer in method.layers.values())


@pytest.mark.parametrize(
    ("kind", "options"), [case[:2] for case in FOLDING if case[3] and "ewc_lambda" in case[1]]
)
def test_failed_fisher_discarded(kind, options):
    """A fisher of a failed attempt does not count."""
    method, twin = (in_second_task(kind, options) for _ in range(2))
    loader, lora_b = batches(*data(6, seed=1), 3), method.model.fc.lora_B
    good = lora_b.detach().clone()
    with pytest.raises(fe.FisherError):
        method.end_task(then(loader, lambda: spoiled(lora_b, math.nan)), F.cross_entropy)
    with torch.no_grad():
        method.model.fc.lora_B.copy_(good)
    for each in (method, twin):
        torch.manual_seed(3)
        each.end_task(loader, F.cross_entropy)
    assert_same(everything(method), everything(twin))
    assert method.ewc.history == twin.ewc.history and method.ewc.history[-1].samples == 6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("kind", "options"), [(LoRA, {}), (SDLoRA, {}), (SDLoRA, EWC)])
def test_nan_export_refused(kind, options, bad):
    """An export that is not finite is refused and nothing changes."""
    method = in_second_task(kind, options)
    method.end_task(batches(*data(6, seed=1), 3), F.cross_entropy)
    model = method.model
    with torch.no_grad():
        model.fc.lora_A[0, 0] = bad
    before, types = snapshot(model), [type(layer) for layer in model.modules()]
    with pytest.raises(fe.ArgumentError, match=r"fc: merge: .*expected finite .*nothing was changed"):
        method.export()
    assert_same(before, snapshot(model))
    assert types == [type(layer) for layer in model.modules()]
    with torch.no_grad():
        model.fc.lora_A[0, 0] = 0.0
    expected = copy.deepcopy(model)(data(4)[0])
    torch.testing.assert_close(method.export()(data(4)[0]), expected, rtol=1e-12, atol=1e-12)
    assert type(model.fc) is nn.Linear


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_direction_refused(bad):
    """A direction that is not finite is refused and nothing changes."""
    method = in_second_task(SDLoRA, {})
    with torch.no_grad():
        method.model.fc.lora_B[0, 0] = bad
    before = everything(method)
    with pytest.raises(fe.ArgumentError, match=r"end_task: fc: expected a finite .*nothing was changed"):
        method.end_task([])
    assert_same(before, everything(method))
    assert method.tasks == 1
