# SPDX-License-Identifier: Apache-2.0
"""Parameters that may be linear maps and get no adapters are named by the report."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_ewclora as fe


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))


class Model(nn.Module):
    """Matrices of many kinds, of which one is the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.router, self.rnn = nn.Linear(6, 6), Router(), nn.LSTM(6, 6)
        self.experts = nn.Parameter(torch.randn(3, 6, 6))
        self.cls_token, self.pos_embed = (nn.Parameter(torch.randn(1, n, 6)) for n in (1, 5))
        self.relative_bias_table = nn.Parameter(torch.randn(9, 2))
        self.scale = nn.Parameter(torch.randn(6, 1))
        self.counts = nn.Parameter(torch.ones(6, 6, dtype=torch.long), requires_grad=False)
        self.words, self.norm, self.conv = nn.Embedding(9, 6), nn.LayerNorm([5, 6]), nn.Conv1d(6, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


MATRICES = {"router.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "experts"}


def test_all_linear():
    """The target "all-linear" names the parameters that can be linear maps, and no others."""
    report = fe.inject(Model(), fe.LoRAConfig(r=2, target_modules="all-linear"))
    left_out = {n: why for n, why in report.summary["skipped"].items() if "no known layer" in why}
    assert set(left_out) == MATRICES
    assert left_out["router.weight"] == "parameters of Router, which is no known layer"
    assert report.summary["skipped"]["conv"].startswith("convolutions: ")
    assert all(name in str(report) for name in MATRICES)
    without = fe.LoRAConfig(r=2, target_modules="all-linear", exclude_modules=["router", "experts"])
    assert set(fe.inject(Model(), without).summary["skipped"]) & MATRICES == MATRICES - {
        "router.weight",
        "experts",
    }


def test_named_targets():
    """Other targets name the parameters that they select, and leave the rest unsaid."""
    report = fe.inject(Model(), fe.LoRAConfig(r=2, target_modules=["fc", "experts"]))
    assert set(report.summary["skipped"]) == {"experts"} and report.summary["unmatched"] == []
    with pytest.raises(fe.TargetError, match=r"experts: parameters of Model, which is no known layer"):
        fe.inject(Model(), fe.LoRAConfig(r=2, target_modules=["experts"]))


def test_trained_modules():
    """What modules_to_save trains is not left out."""
    config = fe.LoRAConfig(r=2, target_modules="all-linear", modules_to_save=["router"])
    assert "router.weight" not in fe.inject(Model(), config).summary["skipped"]
