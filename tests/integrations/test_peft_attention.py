# SPDX-License-Identifier: Apache-2.0
"""PEFT and `nn.MultiheadAttention`: configurations that name one, and the files of adapted ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import assert_same, fingerprint
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

import fused_ewclora as fe

pytestmark = pytest.mark.filterwarnings("ignore::Warning:peft")


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.fc(x + self.cross(x, x.flip(1), x.flip(1), need_weights=False)[0])


def model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"first": Block(**options), "second": Block()})


def theirs(config: peft.LoraConfig) -> dict[str, tuple[int, float]]:
    """(r, scaling) of every adapter that PEFT makes, by our names."""
    made = peft.get_peft_model(model(), config).base_model.model
    names = {}
    for name, layer in made.named_modules():
        if isinstance(layer, LoraLayer):
            attention = isinstance(layer.base_layer, nn.MultiheadAttention)
            own = name.replace(".base_layer", "") + (".in_proj" if attention else "")
            names[own] = layer.r["default"], layer.scaling["default"]
    return names


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["attn", "fc"]},
        {"target_modules": ["first.cross"], "lora_alpha": 4},
        {"target_modules": r"second\.(attn|fc)|first\.cross"},
        {"target_modules": ["attn", "cross"], "exclude_modules": ["second.attn"]},
        {
            "target_modules": ["attn", "cross"],
            "rank_pattern": {"first.attn": 3, ".*proj": 5},
            "alpha_pattern": {"attn": 7},
        },
        {"target_modules": "all-linear"},
        {"target_modules": ["fc"]},
    ],
)
def test_same_adapters(options: dict[str, Any]):
    """A configuration that names an attention adapts both of its projections, by the values of its name."""
    config = peft.LoraConfig(r=2, **options)
    ours = model()
    fe.inject(ours, config)
    pieces = {name: layer.adapter_slices[0] for name, layer in fe.adapters(ours).items()}
    assert {name: (piece.r, piece.scaling) for name, piece in pieces.items()} == theirs(config)


@pytest.mark.parametrize(
    ("options", "made", "word"),
    [
        ({"lora_dropout": 0.1}, {}, r"first\.attn: .*got lora_dropout=0\.1"),
        ({}, {"kdim": 6, "vdim": 6}, r"first\.attn: .*got weights of their own for q, k and v"),
        ({"exclude_modules": ["out_proj"]}, {}, r"first\.attn: .*got exclude_modules for its out_proj alone"),
    ],
)
def test_refused(options: dict[str, Any], made: dict[str, int], word: str):
    """What PEFT does not apply to an attention is refused by name."""
    plain = model(**made)
    before = fingerprint(plain)
    with pytest.raises(fe.NotExactlyRepresentable, match=word):
        fe.inject(plain, peft.LoraConfig(r=2, target_modules=["first.attn"], **options))
    assert_same(before, fingerprint(plain))


def test_files_refused(tmp_path: Path):
    """PEFT's files of an attention are not imported, and none is exported."""
    made = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["attn"]))
    made.save_pretrained(tmp_path / "theirs")
    plain = model()
    before = fingerprint(plain)
    with pytest.raises(fe.NotExactlyRepresentable, match=r"attn: the scale that PEFT gives to its out_proj"):
        fe.import_peft(tmp_path / "theirs", plain)
    assert_same(before, fingerprint(plain))
    fe.inject(plain, fe.LoRAConfig(r=2, target_modules=["attn"]))
    with pytest.raises(fe.NotExactlyRepresentable, match=r"attn\.in_proj: its weight, .*in_proj_weight"):
        fe.export_peft(plain, tmp_path / "ours")
    fe.save_pretrained(tmp_path / "own", plain)
    assert '"FUSED_EWCLORA"' in (tmp_path / "own" / "adapter_config.json").read_text()


def test_left_to_peft():
    """The layers of PEFT stay as they are, an EWC over them is refused, and both say what to do instead."""
    made = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["attn", "fc"]))
    report = fe.integrations.peft.accelerate_(made)
    assert report.summary["layers"] == 2 and "fe.inject" in report.summary["skipped"]["first.attn"]
    with pytest.raises(
        fe.TargetError, match=r"first\.attn: .*adds? the adapter of its out_proj twice; fe\.inject"
    ):
        fe.integrations.peft.attach_ewc(made)
