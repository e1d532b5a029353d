"""Which implementation layers run on, and whether they run at all."""

from __future__ import annotations

import pytest
import torch
from models import (
    BypassAttention,
    X,
    injected,
)

import fused_ewclora as fe


def test_a_bypassed_layer_is_named_with_its_mend():
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


def test_verify_forward_leaves_modes_and_counts_alone():
    model = injected().train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    model(X)
    assert fe.verify_forward(model, (X,)) == fe.verify_forward(model, {"x": X})
    assert [module.training for module in model.modules()] == modes
    assert [layer.forward_calls for layer in fe.adapters(model).values()] == [3, 3]


def test_explain_names_the_backend_of_every_layer():
    model = injected()
    with fe.use_backend("reference"):
        report = fe.explain(model)
    assert [row["backend"] for row in report.rows] == ["reference", "reference"]
    assert all(row["name"] in str(report) for row in report.rows)
    fe.merge(model)
    assert {row["algorithm"] for row in fe.explain(model).rows} == {"linear (merged)"}


def test_explain_says_why_faster_implementations_do_not_serve(monkeypatch: pytest.MonkeyPatch):
    answers = [("cuda", "tensor cores", "no GPU"), ("cpu", "vectors", "fp8"), ("reference", "plain", None)]
    asked = []

    def answer(op: str, call: object) -> list[tuple[str, str, str | None]]:
        asked.append((op, call))
        return answers

    monkeypatch.setattr("fused_ewclora.ops._dispatch.explain", answer)
    model = injected()
    row = fe.explain(model).rows[0]
    assert (row["backend"], row["algorithm"]) == ("reference", "plain")
    assert row["why_not_faster"] == "cuda tensor cores: no GPU; cpu vectors: fp8"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fe.explain(model).rows[0]["dtype"] == "bfloat16"
    assert asked[0] == ("lora_linear", ("cpu", torch.float32))
    answers.pop()
    row = fe.explain(model).rows[0]
    assert row["backend"] is None and "fp8" in row["why_not_faster"]
