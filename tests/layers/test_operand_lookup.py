# SPDX-License-Identifier: Apache-2.0
"""The operands of a penalty are those of the layers as they are now, whatever has been replaced since."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fused_ewclora as fe
from fused_ewclora.errors import TargetError
from fused_ewclora.functional import Adapter
from fused_ewclora.layers import index
from fused_ewclora.layers.index import OperandLookup, adapter_refs


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    fe.inject(made, fe.LoRAConfig(r=2, lora_alpha=3.0, target_modules=["0", "2"]))
    return made


def lookup(made: nn.Module) -> tuple[OperandLookup, list[Any], dict[str, Any]]:
    refs = adapter_refs(fe.adapters(made))
    fishers = {ref.key: torch.rand(ref.piece.row_count, ref.layer.in_features) for ref in refs}
    return OperandLookup(refs), refs, fishers


class Doubled:
    """A composer that uses B twice."""

    def adapters(self, layer: Any) -> list[Adapter]:
        return [Adapter(a, 2 * b, 1.0, piece.rows) for piece, a, b in layer.adapter_parameters()]


def same(found: Any, expected: Any) -> bool:
    pairs = [pair for groups in zip(found, expected, strict=True) for pair in zip(*groups, strict=True)]
    return all(
        one is other or torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in pairs
    )


def assign(made: nn.Module) -> None:
    made.load_state_dict({name: t + 1.0 for name, t in made.state_dict().items()}, assign=True)


CHANGES = {
    "nothing": lambda made: None,
    "assigned": assign,
    "cast": lambda made: made.double(),
    "replaced": lambda made: setattr(made[2], "lora_A", nn.Parameter(torch.ones(2, 5))),
    "scale": lambda made: setattr(made[0], "lora_scale", nn.Parameter(torch.tensor(2.0))),
    "composer": lambda made: setattr(made[2], "composer", Doubled()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_replaced_tensors(name):
    """Parameters, learned scales and composers that came later are found."""
    made = model()
    find, refs, fishers = lookup(made)
    assert same(find(fishers), index.operands(refs, fishers)) and not find.composed
    CHANGES[name](made)
    assert same(find(fishers), index.operands(refs, fishers))
    assert find.composed == (name == "composer")


@pytest.mark.parametrize("again", [False, True])
def test_ejected_adapters(again):
    """Adapters that are gone, or others in their place, raise in every call."""
    made = model()
    find, _, fishers = lookup(made)
    find(fishers)
    fe.eject(made)
    if again:
        fe.inject(made, fe.LoRAConfig(r=3, target_modules=["0", "2"]))
    for _ in range(2):
        with pytest.raises(TargetError, match="ejec"):
            find(fishers)


def test_same_injection():
    """The same adapters injected anew are found."""
    made = model()
    find, _, fishers = lookup(made)
    find(fishers)
    fe.eject(made)
    fe.inject(made, fe.LoRAConfig(r=2, lora_alpha=3.0, target_modules=["0", "2"]))
    found = find(fishers)
    assert found[1][0] is made[0].lora_A and found[2][1] is made[2].lora_B
