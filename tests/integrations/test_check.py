# SPDX-License-Identifier: Apache-2.0
"""`python -m fused_ewclora check`: what a dry run finds in models of timm and transformers."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from timm_models import MODELS
from torch import nn
from torchvision.models import video

import fused_ewclora as fe
from fused_ewclora import __main__ as cli
from fused_ewclora.diagnostics import check
from fused_ewclora.integrations import _named, _named_torchvision


@pytest.fixture
def tiny_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named models of timm are built at the size of the tests; the class of every layer is the same."""
    create = timm.create_model
    options = {tiny.name: tiny.options for tiny in MODELS.values()}

    def small(name: str, **options_of_caller: Any) -> nn.Module:
        return create(name, **{**options[name], **options_of_caller, "num_classes": 4})

    monkeypatch.setattr(timm, "create_model", small)
    torch.set_num_threads(1)


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status = cli.main(["check", *arguments, "--json"])
    data = json.loads(capsys.readouterr().out)
    assert status == (1 if data["problems"] else 0)
    return data


@pytest.mark.usefixtures("tiny_timm")
@pytest.mark.parametrize("name", ["vit", "beit", "eva02"])
def test_timm_passes(name: str, capsys: pytest.CaptureFixture[str]):
    """A named timm model passes with its layouts."""
    tiny = MODELS[name]
    tiny.skip_if_refused()
    data = checked(capsys, tiny.name, "--target", "qkv", "--slices", "k", "v", "--rank", "2")
    assert data["problems"] == []
    assert data["library"] == f"timm {timm.__version__}"
    assert "instead of" in data["built"] and data["input"]["x"][-1] < 224
    assert bool(data["bypass_fixes"]) is tiny.bypassed
    assert data["compared_with"] == "dense model in fp64"
    assert len(data["layers"]) == 2
    for row in data["layers"]:
        assert (row["segments"], row["sizes"], row["slices"]) == (["q", "k", "v"], [16] * 3, ["k", "v"])
        assert row["calls"] == 1 and row["backend"] is not None
        assert 0 < row["gradient_error"] <= row["limit"] < 1e-4
    assert 0 < data["output_error"] <= data["output_limit"] < 1e-4


@pytest.mark.usefixtures("tiny_timm")
def test_slices_find_packed(capsys: pytest.CaptureFixture[str]):
    """Slices alone find the packed projections."""
    data = checked(capsys, MODELS["pvtv2"].name, "--slices", "v", "--rank", "2")
    assert [row["name"] for row in data["layers"]] == [f"stages.{i}.blocks.0.attn.kv" for i in range(2)]
    assert cli.main(["check", MODELS["pvtv2"].name, "--slices", "q"]) == 1
    assert "no known packed projection with ['q']" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_timm")
def test_readable_table(capsys: pytest.CaptureFixture[str]):
    """The table for people says what was run."""
    assert cli.main(["check", MODELS["vit"].name, "--rank", "2"]) == 0
    text = capsys.readouterr().out
    for part in ("blocks.1.mlp.fc2", "56 x 56 instead of 224 x 224", "dense model in fp64", "all layers run"):
        assert part in text


@pytest.mark.parametrize(
    ("name", "arguments", "first", "sizes"),
    [
        ("bert", ["--target", "query", "value"], "encoder.layer.0.attention.self.query", None),
        ("gpt2", ["--slices", "k", "v"], "h.0.attn.c_attn", [16, 16, 16]),
    ],
)
def test_transformers_passes(name, arguments, first, sizes, tmp_path, capsys):
    """A model of transformers passes."""
    widths = {
        "bert": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16},
        "gpt2": {"n_embd": 16, "n_head": 2},
    }
    transformers.AutoConfig.for_model(name, **widths[name]).save_pretrained(tmp_path)
    torch.set_num_threads(1)
    data = checked(capsys, str(tmp_path / "config.json"), "--rank", "2", *arguments)
    assert data["problems"] == []
    assert data["layers"][0]["name"] == first and data["layers"][0]["sizes"] == sizes
    assert "num_hidden_layers=2" in data["built"] and "vocab_size=1024" in data["built"]
    assert all(0 < row["gradient_error"] <= row["limit"] for row in data["layers"])


SMALL = {
    "swin_t": (torchvision.models.SwinTransformer, ([4, 4], 8, [2], [2], [4, 4])),
    "swin3d_t": (video.swin_transformer.SwinTransformer3d, ([2, 4, 4], 8, [2], [2], [2, 4, 4])),
}


@pytest.fixture
def tiny_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named models of torchvision are built at the size of the tests, of the same classes."""

    def small(name: str, weights: None, image_size: int = 0) -> nn.Module:
        if name.startswith("vit"):
            return torchvision.models.VisionTransformer(image_size, int(name[-2:]), 2, 2, 16, 16)
        kind, arguments = SMALL[name]
        return kind(*arguments)

    monkeypatch.setattr(torchvision.models, "get_model", small)
    torch.set_num_threads(1)


@pytest.mark.usefixtures("tiny_torchvision")
@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("torchvision/vit_l_16", [], [2, 3, 48, 48]),
        ("vit_h_14", ["--library", "torchvision"], [2, 3, 126, 126]),
        ("swin_t", ["--slices", "k", "v"], [2, 3, 56, 56]),
        ("torchvision/vit_b_32", ["--slices", "q", "v"], [2, 3, 32, 32]),
        ("swin3d_t", [], [2, 3, 4, 56, 56]),
        ("vit_b_32", ["--library", "torchvision", "--full"], [2, 3, 224, 224]),
    ],
)
def test_torchvision_passes(name, arguments, shape, monkeypatch, capsys):
    """A named model of torchvision passes, with its layouts."""
    data = checked(capsys, name, "--rank", "2", *arguments)
    assert data["problems"] == [] and data["layers"] and data["input"]["x"] == shape
    assert data["library"] == f"torchvision {torchvision.__version__}" and "get_model" in data["built"]
    assert all(0 < row["gradient_error"] <= row["limit"] for row in data["layers"])
    if "--slices" in arguments:
        names = [row["name"] for row in data["layers"]]
        assert {tuple(row["segments"]) for row in data["layers"]} == {("q", "k", "v")}
        packed = {"swin_t": "attn.qkv", "torchvision/vit_b_32": "self_attention.in_proj"}[name]
        assert len(names) == 2 and all(name.endswith(packed) for name in names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet18", "fc: output head (target_modules=['fc'] adapts it all the same)"),
        ("torchvision/squeezenet1_1", "target_modules can name them: features.0, features.3.squeeze, "),
        (
            "torchvision/vit_b_1",
            "expected a classification model of torchvision, got 'vit_b_1'; similar names:",
        ),
        ("torchvision/fcn_resnet50", "expected a classification model of torchvision"),
    ],
)
def test_nothing_to_adapt(name: str, message: str, capsys: pytest.CaptureFixture[str]):
    """A model without linear layers, or with a head alone, is refused with what there is."""
    assert cli.main(["check", name]) in (1, 2)
    assert message in capsys.readouterr().err


def test_torchvision_models():
    """All classification models are known, of images and of videos, and the size of what they see."""
    names = _named_torchvision.names()
    assert {"vit_h_14", "maxvit_t", "resnet50", "mvit_v2_s", "swin3d_b"} <= set(names)
    assert not {"fcn_resnet50", "raft_large", "quantized_resnet50"} & set(names)
    assert all(min(_named_torchvision.native_size(name)) >= 112 for name in names)


def test_transformers_type_name():
    """A model type of transformers is found by its name."""
    assert _named._knows("transformers", "bert") and not _named._knows("timm", "bert")
    assert _named._knows("timm", "vit_tiny_patch16_224") and not _named._knows("transformers", "vit_tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_tinny_patch16_224"], "vit_tiny_patch16_224 (timm)"),
        (["berd"], "bert (transformers)"),
        (["bert", "--library", "timm"], "expected a name of timm, got 'bert'"),
        (["whisper"], "takes input_features"),
    ],
)
def test_unknown_model(arguments, message, capsys):
    """An unknown model is refused, with the closest names."""
    assert cli.main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_timm")
def test_unknown_target(capsys: pytest.CaptureFixture[str]):
    """An unknown target is refused just as `inject` refuses it."""
    assert cli.main(["check", MODELS["vit"].name, "--target", "qvk"]) == 1
    assert "did you mean 'qkv'?" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_timm")
def test_wrong_gradient(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A wrong gradient is reported as a problem."""
    measure = check._measure
    backends = []

    def wrong(model: nn.Module, sample: Any) -> check.Measured:
        measured = measure(model, sample)
        if not backends:  # the first pass is the one on the backends that serve the model
            measured.gradients["blocks.1.attn.qkv.lora_A"].mul_(1 + 1e-4)
        backends.append(fe.ops.dispatch.current_backend())
        return measured

    monkeypatch.setattr(check, "_measure", wrong)
    data = checked(capsys, MODELS["vit"].name, "--target", "qkv", "--rank", "2")
    assert backends[1] == "reference" != backends[0]
    assert [problem.partition(":")[0] for problem in data["problems"]] == ["blocks.1.attn.qkv"]


def test_nudged_decisions():
    """Noise inside of a model decides between equal inputs of a pooling anew, and is gone afterwards."""
    model, x = nn.Sequential(nn.Identity(), nn.MaxPool1d(2, return_indices=True)), torch.ones(1, 64)
    before = model(x)[1]
    with check._nudged(model):
        assert not torch.equal(model(x)[1], before)
    assert torch.equal(model(x)[1], before)


@pytest.mark.usefixtures("tiny_timm")
def test_decided_by_rounding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """An error that noise in the exact model has as well is none."""
    measure = check._measure
    measured: list[check.Measured] = []

    def wrong(model: nn.Module, sample: Any) -> check.Measured:
        measured.append(measure(model, sample))
        if len(measured) == 1:
            measured[0].gradients["blocks.1.attn.qkv.lora_A"].mul_(1 + 1e-4)
        return measured[-1]

    @contextlib.contextmanager
    def sensitive(model: nn.Module) -> Iterator[None]:
        handle = model.blocks[1].mlp.register_forward_hook(lambda module, args, output: 1.001 * output)
        yield
        handle.remove()

    monkeypatch.setattr(check, "_measure", wrong)
    monkeypatch.setattr(check, "_nudged", sensitive)
    data = checked(capsys, MODELS["vit"].name, "--target", "qkv", "--rank", "2")
    assert data["problems"] == [] and len(measured) == 2


@pytest.mark.usefixtures("tiny_timm")
def test_nan_gradient(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A gradient that is NaN is reported as a problem."""
    compared = check._compared

    def with_nan(*arguments: Any) -> dict[str, float]:
        return compared(*arguments) | {"blocks.1.attn.qkv": math.nan}

    monkeypatch.setattr(check, "_compared", with_nan)
    data = checked(capsys, MODELS["vit"].name, "--target", "qkv", "--rank", "2")
    assert [problem.partition(":")[0] for problem in data["problems"]] == ["blocks.1.attn.qkv"]


@pytest.mark.usefixtures("tiny_timm")
def test_unknown_bypass(monkeypatch, capsys: pytest.CaptureFixture[str]):
    """A bypass that no rule knows is reported as a problem."""
    MODELS["beit"].skip_if_refused()
    monkeypatch.setattr(fe.integrations.timm, "_BYPASSING", set())
    data = checked(capsys, MODELS["beit"].name, "--target", "qkv", "--rank", "2")
    assert any("never ran" in problem and "qkv_bias_separate" in problem for problem in data["problems"])
    assert "blocks.0.attn.qkv: relative error 1, more than 0.000977" in data["problems"]


@pytest.mark.usefixtures("tiny_timm")
def test_missing_library(monkeypatch, capsys: pytest.CaptureFixture[str]):
    """A missing library is reported with the name of the extra to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert cli.main(["check", "vit_tiny_patch16_224"]) == 1
    assert "fused-ewclora[timm]" in capsys.readouterr().err
