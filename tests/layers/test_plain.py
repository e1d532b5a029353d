# SPDX-License-Identifier: Apache-2.0
"""Weights and adapters that something else computes after injection are refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import MLP, randomize_adapters_
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused_ewclora as fe

X, Y = torch.linspace(-1, 1, 30).reshape(5, 6), torch.arange(5) % 4


class Twice(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


def parametrized(name: str) -> Callable[[nn.Module], object]:
    return lambda layer: parametrize.register_parametrization(layer, name, Twice())


WRAPPERS: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "parametrize": (parametrized("weight"), lambda m: parametrize.remove_parametrizations(m, "weight")),
    "bias": (parametrized("bias"), lambda m: parametrize.remove_parametrizations(m, "bias")),
    "lora_B": (parametrized("lora_B"), lambda m: parametrize.remove_parametrizations(m, "lora_B")),
    "weight_norm": (
        parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")
    ),
    "spectral_norm": (
        parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")
    ),
    "old weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "prune": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
        lambda layer: prune.remove(layer, "weight"),
    ),
}  # fmt: skip


def adapted() -> MLP:
    torch.manual_seed(0)
    model = MLP().eval()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc1", "fc2"]))
    randomize_adapters_(model)
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_parameters_refused(kind: str, tmp_path: Path):
    """Every entry point names the layer and what undoes the wrapper, and changes nothing; once it is undone
    merging keeps the output."""
    wrap, undo = WRAPPERS[kind]
    model = adapted()
    ewc = fe.EWC(model, ewc_lambda=1.0)
    ewc.estimate_fisher([(X, Y)], F.cross_entropy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrap(model.fc1)
    before = values(model)
    calls: list[Callable[[], object]] = [
        lambda: fe.merge(model),
        lambda: fe.eject(model),
        lambda: fe.eject(model, merge=False),
        lambda: fe.EWC(model),
        ewc.consolidate,
        lambda: ewc.end_task([(X, Y)], F.cross_entropy),
        lambda: fe.save_pretrained(tmp_path / "a", model),
        lambda: fe.export_peft(model, tmp_path / "b"),
        model.fc1.merge,
    ]
    for call in calls:
        with pytest.raises(
            fe.EWCLoRAError, match=r"its (weight|bias|lora_B) is .*undo it with torch\.nn\.utils"
        ):
            call()
    for call in calls[:-1]:
        with pytest.raises(fe.EWCLoRAError, match="fc1"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert not list(tmp_path.iterdir())
    undo(model.fc1)
    if kind == "weight_norm":  # PyTorch leaves a tensor that is no parameter
        with pytest.raises(
            fe.TargetError, match=r"fc1: its weight is a plain tensor.*undo it with layer\.weight"
        ):
            fe.merge(model)
        model.fc1.weight = nn.Parameter(model.fc1.weight, requires_grad=False)
    y = model(X)
    fe.merge(model)
    torch.testing.assert_close(model(X), y)


@pytest.mark.parametrize("call", [fe.unmerge, fe.eject, lambda model: fe.disabled(model).__enter__()])
def test_wrapped_while_merged(call: Callable[[nn.Module], object]):
    """Merged adapters cannot be taken out of a weight that something else computes."""
    model = adapted()
    fe.merge(model)
    prune.l1_unstructured(model.fc1, "weight", amount=0.3)
    y = model(X)
    with pytest.raises(fe.TargetError, match=r"fc1: its weight is computed by pruning"):
        call(model)
    assert torch.equal(model(X), y) and model.fc1.merged


def test_replaced_layer():
    """An EWC says that one of its layers is no longer part of the model."""
    model = adapted()
    ewc = fe.EWC(model)
    model.fc2 = nn.Linear(10, 10)
    with pytest.raises(fe.TargetError, match=r"fc2: the adapted layer is no longer part of the model"):
        ewc.end_task([(X, Y)], F.cross_entropy)


def test_tensor_subclass():
    """A weight that stores something else than its numbers is not merged into."""

    class Stored(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            assert func is torch.ops.aten.detach.default, "the weight was used"
            return args[0]

    model = adapted()
    stored = torch.Tensor._make_wrapper_subclass(Stored, (10, 6))
    model.fc1._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
    with pytest.raises(fe.TargetError, match=r"merge: fc1: its weight is Stored, not a plain tensor"):
        fe.merge(model)
    assert not model.fc2.merged


def test_partly_on_meta():
    """A layer whose weight is on meta beside a loaded model is refused; a model that is on meta as a whole is
    injected, and loaded later."""
    model = MLP()
    model.fc1.to("meta")
    with pytest.raises(fe.TargetError, match=r"fc1: its weight is on the meta device .*offloaded"):
        fe.inject(model, fe.LoRAConfig(target_modules=["fc1", "fc2"]))
    assert not fe.adapters(model) and all(p.requires_grad for p in model.parameters())
    whole = MLP().to("meta")
    fe.inject(whole, fe.LoRAConfig(target_modules=["fc1", "fc2"]))
    with pytest.raises(fe.TargetError, match=r"merge: fc1: its weight is on the meta device"):
        fe.merge(whole)
