# SPDX-License-Identifier: Apache-2.0
"""The benchmark of an adapted model: timm's model injected, and the same model under PEFT."""

from __future__ import annotations

import torch

from benchmarks import end_to_end, harness, models, registry, whole_models
from benchmarks.case import OURS
from benchmarks.clock import WallClock
from benchmarks.place import Place
from benchmarks.shapes import SMALL_VIT, TINY
from benchmarks.workloads import OF_TIMM, adapted_model, step


def test_peft_same_outputs():
    """PEFT computes what our implementation computes."""
    torch.manual_seed(0)
    case = end_to_end.build(adapted_model(TINY.name + OF_TIMM, 1, 2, TINY.tokens, 4), Place())
    records = {r["provider"]: r for r in harness.measure(case, 0.0, {}, WallClock(2, False))}
    assert set(records) == {OURS, registry.PEFT}
    assert not [r for r in records.values() if "failed" in r]


def test_peft_copies_values():
    """The adapters of PEFT take their values from ours."""
    base = models.of_timm(TINY, 1, 2, TINY.tokens, 4)
    ours = models.adapted(base)
    theirs = models.by_peft(base, ours)
    x = torch.randn_like(base.x)
    torch.testing.assert_close(theirs.model(x), ours.model(x))
    assert (ours.model(x) - base.model(x)).abs().max() > 0
    trained = {id(p) for p in theirs.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in theirs.leaves()}


def test_timm_training_step():
    """A training step of the timm model is right."""
    torch.manual_seed(0)
    case = end_to_end.build(step(TINY.name + OF_TIMM, 1, 2, TINY.tokens, 4), Place())
    records = harness.measure(case, 0.0, {}, WallClock(2, False))
    assert not [r for r in records if "failed" in r]


def test_vit_small_targets():
    """Both targets are about ViT-Small at batch size 16."""
    about = [
        workload
        for workload in whole_models.cpu()
        if str(workload.shape["model"]) == SMALL_VIT.name + OF_TIMM
    ]
    assert [(workload.op, workload.size("samples"), workload.size("rank")) for workload in about] == [
        ("adapted_model", 16, 16), ("training_step", 16, 16),
    ]  # fmt: skip
    with torch.device("meta"):
        model = models.of_timm(SMALL_VIT, 12, 1, SMALL_VIT.tokens, 16, "meta").model
    assert [tuple(b.attn.qkv.weight.shape) for b in model.blocks] == [(1152, 384)] * 12
