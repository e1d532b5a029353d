# SPDX-License-Identifier: Apache-2.0
"""The sweep over architectures (`make sweep`): a few of its rows, and errors that are planted are found."""

from __future__ import annotations

import pytest
import torch
from sweep import checks, listed, table
from torch import nn

import fused_ewclora as fe

QUICK = (
    ("timm", "vit_base_patch16_224"),
    ("torch", "TransformerDecoderLayer, batch first"),
    ("transformers", "bert SequenceClassification"),
)
SMALLEST = QUICK[0]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads


def statuses(key: tuple[str, str]) -> dict[str, str]:
    return {
        name: check["status"] for name, check in checks.run(listed.find(*key)).to_dict()["checks"].items()
    }


@pytest.mark.parametrize("key", QUICK, ids=lambda key: key[0])
def test_quick_rows(key):
    """Every check of a quick architecture is right."""
    assert set(statuses(key).values()) == {"right"} and set(statuses(key)) == set(table.CHECKS)


def test_enough_listed():
    """At least 40 architectures of timm and of transformers are listed, under different names."""
    keys = [(one.library, one.name) for one in listed.ARCHITECTURES]
    assert len(set(keys)) == len(keys)
    assert min(sum(library == name for library, _ in keys) for name in ("timm", "transformers")) >= 40


def test_doubled_fisher_found(monkeypatch):
    """A Fisher that is twice as large is wrong, and nothing else is."""
    fishers = fe.EWC.fishers.fget
    doubled = property(lambda ewc: {name: 2 * fisher for name, fisher in fishers(ewc).items()})
    monkeypatch.setattr(fe.EWC, "fishers", doubled)
    found = statuses(SMALLEST)
    wrong = {"fisher_sample", "fisher_own_loss", "fisher_batch"}
    assert {name for name, status in found.items() if status == "WRONG"} == wrong


def test_missing_adapters_found(monkeypatch):
    """Layers that leave their adapters out are wrong in the output."""
    monkeypatch.setattr(fe.LoRALinear, "forward", lambda layer, x: layer.base_forward(x))
    found = statuses(SMALLEST)
    assert found["forward"] == found["gradients"] == "WRONG"


def test_lost_merge_found(monkeypatch):
    """A merge that leaves the weight as it is shows in the output after the task."""
    monkeypatch.setattr(
        fe.LoRALinear, "consolidated_weight", lambda layer: layer.base_weight.detach().clone()
    )
    ended = fe.EWC.consolidate

    def consolidate(ewc, gamma=None):
        before = {name: layer.weight.detach().clone() for name, layer in ewc.layers.items()}
        ended(ewc, gamma)
        with torch.no_grad():
            for name, layer in ewc.layers.items():
                layer.weight.copy_(before[name])

    monkeypatch.setattr(fe.EWC, "consolidate", consolidate)
    assert statuses(SMALLEST)["merge"] == "WRONG"


def test_mixed_samples_found(monkeypatch):
    """A model whose samples see each other is never right per sample."""
    forward = nn.LayerNorm.forward
    monkeypatch.setattr(
        nn.LayerNorm, "forward", lambda norm, x: forward(norm, x + 0.5 * x.mean(0, keepdim=True))
    )
    assert statuses(("transformers", "bert SequenceClassification"))["fisher_sample"] != "right"
