# SPDX-License-Identifier: Apache-2.0
"""PEFT folders: what is exported computes the same in PEFT, what is imported computes what PEFT computed."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tiny_models import Tiny, adapted, assert_same, data, layers, randomise, snapshot
from torch import nn

from fused_ewclora.checkpoints import files
from fused_ewclora.checkpoints.interchange import export_peft, import_peft
from fused_ewclora.config import LoRAConfig
from fused_ewclora.errors import CheckpointError, NotExactlyRepresentable
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.layers.inject import eject, inject, merge


def bare(model: Tiny) -> Tiny:
    """The pretrained model, without adapters and with an untrained head."""
    base = copy.deepcopy(model)
    eject(base, merge=False)
    with torch.no_grad():
        base.head.weight.mul_(0.5)
    return base


@pytest.mark.parametrize("lora_alpha", [None, 3.0])
def test_slices_summed_rank(tmp_path, lora_alpha):
    """Slices export as one adapter of summed rank."""
    model = adapted(lora_alpha=lora_alpha)
    export_peft(model, tmp_path)
    config = json.loads((tmp_path / files.ADAPTER_CONFIG).read_text())
    rank = {"qkv": 4, "fc": 2}
    scaling = 1.0 if lora_alpha is None else lora_alpha / 2
    assert config["peft_type"] == "LORA" and config["modules_to_save"] == ["head"]
    for name, r in rank.items():
        assert config["rank_pattern"].get(name, config["r"]) == r
        assert config["alpha_pattern"].get(name, config["lora_alpha"]) / r == scaling
    lora_b = safetensors.torch.load_file(tmp_path / files.ADAPTER)["base_model.model.qkv.lora_B.weight"]
    assert lora_b.shape == (18, 4) and not lora_b[:6].any()  # q has no adapter
    assert not lora_b[6:12, 2:].any() and not lora_b[12:, :2].any()
    other = bare(model)
    import_peft(tmp_path, other)
    x, _ = data(4)
    torch.testing.assert_close(other(x), model(x), rtol=1e-13, atol=1e-13)


def test_round_trip_bytes(tmp_path):
    """An export of an import has the same bytes."""
    torch.manual_seed(0)
    model = Tiny()
    base = copy.deepcopy(model)
    config = LoRAConfig(r=2, lora_alpha=3.0, target_modules=["qkv", "fc"], rank_pattern={"fc": 3})
    inject(model, config)
    randomise(model)
    export_peft(model, tmp_path / "a")
    import_peft(tmp_path / "a", base)
    assert_same(snapshot(model), snapshot(base))
    export_peft(base, tmp_path / "b")
    for name in (files.ADAPTER, files.ADAPTER_CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def unlike_peft():
    consolidated, merged, learned = adapted(), adapted(), adapted()
    EWC(consolidated).end_task([data(4)], F.cross_entropy)
    merge(merged)
    learned.fc.lora_scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    return {"consolidated": consolidated, "merged": merged, "learned": learned, "no adapters": Tiny()}


@pytest.mark.parametrize("case", ["consolidated", "merged", "learned", "no adapters"])
def test_inexact_not_written(tmp_path, case):
    """What is not exact is not written."""
    with pytest.raises(NotExactlyRepresentable, match=case):
        export_peft(unlike_peft()[case], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damage(name):
    def edit_config(**values):
        def edit(folder):
            path = folder / files.ADAPTER_CONFIG
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

        return edit

    def edit_tensors(change):
        def edit(folder):
            tensors = safetensors.torch.load_file(folder / files.ADAPTER)
            change(tensors)
            (folder / files.ADAPTER).write_bytes(safetensors.torch.save(tensors))

        return edit

    key, gone = "base_model.model.fc.lora_A.weight", "base_model.model.gone.lora_A.weight"
    return {
        "DoRA": (edit_config(use_dora=True), "use_dora=True", NotExactlyRepresentable),
        "unknown": (edit_config(use_later=True), "use_later=True", NotExactlyRepresentable),
        "PiSSA": (edit_config(init_lora_weights="pissa"), "pissa.*changed the base", NotExactlyRepresentable),
        "bias": (edit_config(bias="all"), "bias='all'", NotExactlyRepresentable),
        "IA3": (edit_config(peft_type="IA3"), "peft_type.*IA3", NotExactlyRepresentable),
        "rank": (edit_config(r=5, rank_pattern={}), "expected shapes", CheckpointError),
        "alpha": (edit_config(lora_alpha="x", alpha_pattern={}), "lora_alpha of", CheckpointError),
        "no A": (edit_tensors(lambda t: t.pop(key)), "fc: expected lora_A and lora_B", CheckpointError),
        "no layer": (edit_tensors(lambda t: t.update({gone: t[key].clone()})), "gone: exp", CheckpointError),
        "foreign": (edit_tensors(lambda t: t.update(other=t[key].clone())), "fits nothing", CheckpointError),
        "cut": (lambda folder: (folder / files.ADAPTER).write_bytes(b"xx"), "safetensors", CheckpointError),
        "missing": (lambda folder: (folder / files.ADAPTER).unlink(), "adapter_model", CheckpointError),
        "no config": (lambda f: (f / files.ADAPTER_CONFIG).unlink(), "adapter_config", CheckpointError),
    }[name]  # fmt: skip


NAMES = (
    "DoRA",
    "unknown",
    "PiSSA",
    "bias",
    "IA3",
    "rank",
    "alpha",
    "no A",
    "no layer",
    "foreign",
    "cut",
    "missing",
)


@pytest.mark.parametrize("name", [*NAMES, "no config"])
def test_mismatch_leaves_plain(tmp_path, name):
    """Folders that do not fit are refused, and the model stays plain."""
    model = adapted()
    export_peft(model, tmp_path)
    change, message, error = damage(name)
    change(tmp_path)
    base = bare(model)
    before = snapshot(base)
    with pytest.raises(error, match=message):
        import_peft(tmp_path, base)
    assert_same(before, snapshot(base))
    assert type(base.fc) is nn.Linear and not layers(base)


def test_copy_failure_rollback(tmp_path, monkeypatch):
    """A failure while copying takes the adapters out again."""
    model = adapted()
    export_peft(model, tmp_path)
    base = bare(model)
    before, trainable = snapshot(base), [p.requires_grad for p in base.parameters()]
    original, calls = torch.Tensor.copy_, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", failing)
        with pytest.raises(MemoryError):
            import_peft(tmp_path, base)
    assert_same(before, snapshot(base))
    assert not layers(base) and trainable == [p.requires_grad for p in base.parameters()]


def test_adapted_model_refused(tmp_path):
    """A model with adapters is refused."""
    model = adapted()
    export_peft(model, tmp_path)
    with pytest.raises(CheckpointError, match="without adapters"):
        import_peft(tmp_path, model)
