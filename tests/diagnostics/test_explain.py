# SPDX-License-Identifier: Apache-2.0
"""Reports of the implementation of each layer, and of layers that never run."""

from __future__ import annotations

import pytest
import torch
from models import (
    BypassAttention,
    X,
    injected,
)

import fused_ewclora as fe
from fused_ewclora.ops import dispatch


def test_bypass_remedy():
    """A bypassed layer is named with the remedy."""
    model = injected(attention=BypassAttention)
    assert torch.equal(model(X), model(X))
    with pytest.raises(
        fe.TargetError, match=r"blocks.0.attn.qkv, blocks.1.attn.qkv.*qkv_bias_separate = True"
    ):
        fe.check_bypass(model)
    with pytest.raises(fe.TargetError, match="qkv_bias_separate"):
        fe.verify_forward(model, X)
    assert fe.explain(model, X).summary["bypassed"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    assert fe.verify_forward(model, X) == {"blocks.0.attn.qkv": 1, "blocks.1.attn.qkv": 1}
    fe.check_bypass(model)


def test_verify_forward_restores():
    """`verify_forward` leaves modes and counts alone."""
    model = injected().train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    model(X)
    assert fe.verify_forward(model, (X,)) == fe.verify_forward(model, {"x": X})
    assert [module.training for module in model.modules()] == modes
    assert [layer.forward_calls for layer in fe.adapters(model).values()] == [3, 3]


def test_backend_per_layer():
    """`explain` names the backend of every layer."""
    model = injected()
    with fe.use_backend("reference"):
        report = fe.explain(model)
    assert [row["backend"] for row in report.rows] == ["reference", "reference"]
    assert [row["name"] for row in report.rows] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    text = str(report)
    assert "blocks.0-1.attn.qkv" in text and max(map(len, text.splitlines())) <= 100
    fe.merge(model)
    assert {row["algorithm"] for row in fe.explain(model).rows} == {"linear (merged)"}


def test_unavailable_backend_reason(monkeypatch: pytest.MonkeyPatch):
    """`explain` says why faster implementations do not serve."""
    answers = [("cuda", "tensor cores", "no GPU"), ("cpu", "vectors", "fp8"), ("reference", "plain", None)]
    asked = []

    def answer(op: str, call: object) -> list[tuple[str, str, str | None]]:
        asked.append((op, call))
        return answers

    monkeypatch.setattr("fused_ewclora.ops.dispatch.explain", answer)
    model = injected()
    row = fe.explain(model).rows[0]
    assert (row["backend"], row["algorithm"]) == ("reference", "plain")
    assert row["why_not_faster"] == "cuda tensor cores: no GPU; cpu vectors: fp8"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fe.explain(model).rows[0]["dtype"] == "bfloat16"
    op, call = asked[0]
    assert (op, call.device, call.dtype) == ("lora_linear", "cpu", torch.float32)
    answers.pop()
    row = fe.explain(model).rows[0]
    assert row["backend"] is None and "fp8" in row["why_not_faster"]


def test_sizes_asked(monkeypatch: pytest.MonkeyPatch):
    """`explain` asks about the sizes of each layer and of the sample."""
    shapes = []

    def answer(op: str, call: dispatch.Call) -> list[tuple[str, str, str | None]]:
        shapes.append(call.shape)
        return [("reference", "plain", None)]

    monkeypatch.setattr("fused_ewclora.ops.dispatch.explain", answer)
    model = injected()
    layer = fe.adapters(model)["blocks.0.attn.qkv"]
    ranks = sum(s.r for s in layer.adapter_slices)
    rows = X.numel() // X.shape[-1]
    fe.explain(model, X)
    assert shapes[0] == (dispatch.bucket(rows), layer.in_features, layer.out_features, ranks, False)
    layer.lora_dropout = 0.5
    fe.explain(model.train())
    assert shapes[2][0] == dispatch.DEFAULT_ROWS and shapes[2].dropout and not shapes[3].dropout
    assert not layer._forward_pre_hooks


def test_algorithm_named(monkeypatch: pytest.MonkeyPatch):
    """`explain` tells apart the algorithms of the chosen backend."""
    answers = [
        ("triton", "fast", "rank 70 > 64"),
        ("triton", "good", None),
        ("triton", "slow", "modelled 9 us against 3 us of 'good'"),
        ("cpu", "vectors", "tensors are on cuda"),
        ("reference", "plain", None),
    ]
    monkeypatch.setattr("fused_ewclora.ops.dispatch.explain", lambda op, call: answers)
    row = fe.explain(injected()).rows[0]
    assert (row["backend"], row["algorithm"]) == ("triton", "good")
    assert (
        row["why_not_faster"]
        == "triton fast: rank 70 > 64; triton slow: modelled 9 us against 3 us of 'good'"
    )


def test_effective_ranks(monkeypatch: pytest.MonkeyPatch):
    """`explain` shows and asks about the ranks that actually run."""
    shapes = []

    def answer(op: str, call: dispatch.Call) -> list[tuple[str, str, str | None]]:
        shapes.append(call.shape)
        return [("reference", "plain", None)]

    monkeypatch.setattr("fused_ewclora.ops.dispatch.explain", answer)
    directions = fe.methods.SDLoRA(injected(), ranks=(4, 3))
    for task in range(2):
        directions.begin_task(task)
        for layer in directions.layers.values():
            for _, _, lora_b in layer.adapter_parameters():
                torch.nn.init.normal_(lora_b)
        directions.end_task([])
    directions.begin_task(2)
    layer = next(iter(directions.layers.values()))
    pieces = len(layer.adapter_slices)
    row = fe.explain(directions.model).rows[0]
    assert row["r"] == "+".join(["10"] * pieces)  # 4 + 3 of the past, 3 of the task that runs
    assert shapes[0].rank == 10 * pieces

    shapes.clear()
    gated = fe.methods.CoDyRA(injected())
    gated.begin_task(0)
    first, *others = [gate for key, gate in gated.gates().items() if key.startswith("blocks.0.attn.qkv")]
    with torch.no_grad():
        first[1:] = 0.0
        for gate in others:
            gate.zero_()
        for key, gate in gated.gates().items():
            if key.startswith("blocks.1.attn.qkv"):
                gate.zero_()
    gated.compact_()
    rows = fe.explain(gated.model).rows
    assert (rows[0]["r"], shapes[0].rank) == ("1", 1), "slices without ranks are not run"
    assert (rows[1]["r"], rows[1]["algorithm"]) == ("0", "linear (no ranks left)")
    assert rows[1]["backend"] == "torch" and len(shapes) == 1
