# SPDX-License-Identifier: Apache-2.0
"""Whole models of the benchmarks: what steps compute, that ours is what users call, and breakdowns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ewclora as fe
from benchmarks import breakdowns, end_to_end, harness, lora_linear, models, registry
from benchmarks.case import OURS, Case
from benchmarks.clock import WallClock
from benchmarks.place import Place
from benchmarks.shapes import TINY, TextModel
from benchmarks.workload import SMALL, Workload
from benchmarks.workloads import fisher_pass, linear, step
from fused_ewclora.demo.explicit import ExplicitDelta
from fused_ewclora.demo.vit import Attention

TEXT = TextModel("t", {"q": (128, 128), "k": (128, 64), "v": (128, 64), "o": (128, 128),
                       "gate": (128, 32), "up": (128, 32), "down": (32, 128)}, 1, 4)  # fmt: skip
STEP = step(TINY.name, 1, 2, TINY.tokens, 4)


def test_published_formulation():
    """The published formulation computes what ours computes."""
    base = models.text(TEXT, 1, 2, 4, 3)
    ours = models.adapted(base)
    published = models.explicit(base, ours)
    assert len(ours.lora_as) == len(published.lora_as) == 2
    torch.testing.assert_close(ours.model(base.x), published.model(base.x))
    assert (ours.model(base.x) - base.model(base.x)).abs().max() > 0
    assert ours.model.blocks[0].q_proj.weight is base.model.blocks[0].q_proj.weight
    wide, held = models.in_fp64(published.model, published.pairs)
    assert held[0] is wide.blocks[0].q_proj.pairs[0] and published.pairs[0].dtype == torch.float32


def test_packed_projection_slices():
    """Explicit deltas compute the same slices of a packed projection."""
    model = torch.nn.ModuleDict({"qkv": torch.nn.Linear(4, 6)})
    layout = fe.QKVLayout(("q", "k", "v"), (2, 2, 2))
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["qkv"], slices=("k",), layout=layout))
    layer = fe.adapters(model)["qkv"]
    ((_, a, b),) = layer.adapter_parameters()
    torch.nn.init.normal_(b)
    x = torch.randn(3, 4)
    expected = F.linear(x, layer.weight, layer.bias)
    expected[:, 2:4] += x @ a.T @ b.T
    torch.testing.assert_close(ExplicitDelta(layer)(x), expected)


def test_frozen_bf16():
    """A frozen model in bf16 has adapters and a head in fp32."""
    base = models.vision(TINY, 1, 2, TINY.tokens, 3, dtype=torch.bfloat16)
    ours = models.adapted(base)
    assert ours.model.blocks[0].attn.qkv.weight.dtype == base.x.dtype == torch.bfloat16
    assert {t.dtype for t in ours.leaves()} == {torch.float32}
    assert ours.model(base.x).dtype == torch.float32


def test_attention_formula():
    """Attention computes its formula."""
    block, x = Attention(TINY.width, TINY.heads), torch.randn(2, 3, TINY.width)
    q, k, v = (t.unflatten(-1, (TINY.heads, -1)).transpose(1, 2) for t in block.qkv(x).chunk(3, -1))
    weights = (q @ k.transpose(-1, -2) * (TINY.width // TINY.heads) ** -0.5).softmax(-1)
    torch.testing.assert_close(block(x), block.proj((weights @ v).transpose(1, 2).flatten(-2)))


def measured(one: Workload, case: Case | None = None) -> dict[str, dict]:
    torch.manual_seed(0)
    case = case or end_to_end.build(one, Place())
    return {r["provider"]: r for r in harness.measure(case, 0.0, {}, WallClock(2, False))}


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_providers_correct(optimizer: str, dtype: str):
    """Every provider of a step is right."""
    found = measured(step(TINY.name, 1, 2, TINY.tokens, 4, optimizer, dtype))
    assert set(found) == {OURS, registry.EXPLICIT, registry.WITHOUT, end_to_end.FROZEN}
    assert not [r for r in found.values() if "failed" in r]


def test_run_keeps_parameters():
    """Running a step leaves the checked parameters as they were."""
    case = end_to_end.build(STEP, Place())
    before = case.providers[0].check()
    for provider in case.providers:
        provider.run()
    for old, new in zip(before, case.providers[0].check(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-9)


def test_step_pays_penalty(monkeypatch: pytest.MonkeyPatch):
    """Our step pays for the penalty of the controller."""
    penalties: list[Tensor] = []
    real = fe.EWC.penalty

    def penalty(self: fe.EWC) -> Tensor:
        penalties.append(real(self))
        return penalties[-1]

    monkeypatch.setattr(fe.EWC, "penalty", penalty)
    runs = {p.name: p.run for p in end_to_end.build(STEP, Place()).providers}
    runs[registry.WITHOUT]()
    assert not penalties
    runs[OURS]()
    assert len(penalties) == 1 and penalties[0].item() > 0.0


def test_missing_penalty_wrong():
    """A step without the penalty would be wrong."""
    case = end_to_end.build(STEP, Place())
    idle = next(p for p in case.providers if p.name == registry.WITHOUT)
    found = measured(STEP, dataclasses.replace(case, providers=[dataclasses.replace(idle, role="ours")]))
    assert "wrong" in found[registry.WITHOUT]["failed"]


def test_few_providers():
    """A step of few providers is ours with and without EWC."""
    case = end_to_end.build(dataclasses.replace(STEP, part=SMALL), Place())
    assert [p.name for p in case.providers] == [OURS, registry.WITHOUT]


def test_fisher_matches_loop():
    """Ours gathers the same Fisher as a loop."""
    found = measured(fisher_pass(TINY, 1, 2, 2, 4))
    assert {name for name, r in found.items() if "failed" not in r} >= {OURS, registry.LOOP}


def test_breakdown_attribution():
    """A breakdown attributes what ours runs to its operation."""
    case = lora_linear.build(linear("m", 7, (6, 4), 2), Place())
    shares = breakdowns.breakdown(case.providers[0].run)
    assert {"fused_ewclora.lora_linear", "fused_ewclora.lora_linear_backward"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.01)
