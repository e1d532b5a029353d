# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is loaded only onto the tensors that it was saved with, to the last bit, and holds all that
training may have changed."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import adapted, assert_same, controller, snapshot, two_tasks, whole
from torch import nn

import fused_ewclora as fe
from fused_ewclora.checkpoints import files
from fused_ewclora.errors import CheckpointError

TABLE = 1 << 15  # of int32: more than the size up to which buffers are saved


class Frozen(nn.Module):
    """Two adapted layers among frozen tensors of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(3, 8))
        self.fc = nn.Linear(8, 100)
        self.norm = nn.LayerNorm(100)
        self.out = nn.Linear(100, 4)
        self.register_buffer("table", torch.arange(TABLE, dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.out(self.norm(self.fc(x + self.embed[0])))


def plain(change: Callable[[Frozen], None] | None = None) -> Frozen:
    torch.manual_seed(0)
    model = Frozen()
    if change is not None:
        with torch.no_grad():
            change(model)
    return model


def injected(change: Callable[[Frozen], None] | None = None) -> Frozen:
    model = plain(change)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc", "out"]))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = injected()
    with torch.no_grad():
        model.fc.lora_B.normal_()
    fe.save_pretrained(folder, model)
    return folder


@pytest.mark.parametrize(
    "name", ["fc.weight", "fc.bias", "out.weight", "out.bias", "norm.weight", "embed", "table"]
)
@settings(max_examples=5)
@given(data_=st.data())
def test_changed_elements(saved, name, data_):
    """Any changed bit of any tensor that is not in the checkpoint is found, and named."""

    def change(model: Frozen) -> None:
        tensor = model.get_submodule(name.rpartition(".")[0]).__getattr__(name.rpartition(".")[2])
        bits = tensor.detach().view(-1).view(torch.int32)
        at, bit = data_.draw(st.integers(0, bits.numel() - 1)), data_.draw(st.integers(0, 31))
        bits[at] ^= (1 << bit) if bit < 31 else -(2**31)

    model = injected(change)
    before = snapshot(model)
    with pytest.raises(
        CheckpointError, match=rf"^{name}: the checkpoint belongs to other.*it differs.*othing"
    ):
        fe.load_pretrained(saved, model)
    assert_same(before, snapshot(model))
    with pytest.warns(UserWarning, match=rf"^{name}: .*will not compute what was saved"):
        fe.load_pretrained(saved, model, strict=False)
    assert model.fc.lora_B.any()


def test_several_named(saved):
    """The first few of many differences are named, and all are counted."""
    model = injected(lambda model: [p.mul_(2.0) for p in model.parameters()])
    with pytest.raises(
        CheckpointError, match=r"^fc.weight, out.weight, embed, \.\.\.: .*\(7 differ\)|\(6 differ\)"
    ):
        fe.load_pretrained(saved, model)


def test_same_model_loads(saved):
    """The same model loads without a warning; what training changes comes back, what is not saved stays."""
    model = injected(lambda model: model.cache.fill_(7.0))
    model.seen.fill_(5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.load_pretrained(saved, model)
    assert not model.seen.any() and model.cache[0] == 7.0


def test_buffers_restored(tmp_path):
    """Small buffers of any module are restored."""
    model = injected()
    model(torch.randn(2, 8))
    fe.save_pretrained(tmp_path, model)
    other = injected()
    fe.load_pretrained(tmp_path, other)
    assert_same(snapshot(model), snapshot(other))
    assert other.seen.tolist() == [1.0, 1.0, 1.0]


def test_other_modules(tmp_path, saved):
    """Frozen tensors that only one of both has are found; a new trainable head is none of them."""

    def added(model: Frozen) -> None:
        model.extra = nn.Linear(2, 2)

    with pytest.raises(CheckpointError, match=r"extra.weight \(not in the checkpoint\)"):
        fe.load_pretrained(saved, injected(added))
    model = injected(added)
    model.extra.requires_grad_(True)
    fe.load_pretrained(saved, model)
    fe.save_pretrained(tmp_path, injected(added))
    with pytest.raises(CheckpointError, match=r"extra.weight \(not in the model\)"):
        fe.load_pretrained(tmp_path, injected())
    with pytest.raises(CheckpointError, match=r"seen \(of another shape\)"):
        fe.load_pretrained(saved, injected(lambda model: model.register_buffer("seen", torch.zeros(4))))


def test_frozen_after_training(tmp_path):
    """A head that was trained and is frozen while the model is saved is not in the checkpoint."""
    model = injected()
    with torch.no_grad():
        model.norm.weight.add_(1.0)
    fe.save_pretrained(tmp_path / "frozen", model)
    with pytest.raises(CheckpointError, match=r"norm.weight.*What was frozen when it was saved"):
        fe.load_pretrained(tmp_path / "frozen", injected())
    model.norm.requires_grad_(True)
    model.fc.bias.requires_grad_(True).data.add_(1.0)
    fe.save_pretrained(tmp_path / "trained", model)
    other = injected()
    fe.load_pretrained(tmp_path / "trained", other)
    assert_same(snapshot(model), snapshot(other))


def test_other_dtypes(saved):
    """Weights that were rounded to another dtype differ."""
    low = plain().bfloat16()
    fe.inject(low, fe.LoRAConfig(r=2, target_modules=["fc", "out"]))
    with pytest.raises(
        CheckpointError, match=r"fc.weight \('float32' in the checkpoint, bfloat16 in the model\)"
    ):
        fe.load_pretrained(saved, low)
    with pytest.warns(UserWarning, match="fc"):
        fe.load_pretrained(saved, low, strict=False)
    assert low.fc.lora_B.any()


def test_cast_not_consolidated(tmp_path):
    """Rounding all of a model after injection is no change of its base weights."""
    model = injected().bfloat16()
    fe.export_peft(model, tmp_path / "peft")
    fe.save_pretrained(tmp_path / "own", model)
    fe.load_pretrained(tmp_path / "own", injected().bfloat16())


@settings(max_examples=4)
@given(row=st.integers(0, 17), column=st.integers(0, 5))
def test_rows_beside_adapters(tmp_path_factory, row, column):
    """After consolidation, rows without an adapter are checked, and those with one come back."""
    folder = tmp_path_factory.mktemp("rows")
    model, ewc = two_tasks()
    fe.save_pretrained(folder, model, ewc)
    other = adapted()
    with torch.no_grad():
        other.qkv.weight[row, column] += 1e-9
    if row < 6:
        with pytest.raises(CheckpointError, match=r"qkv.weight: .*other base weights"):
            fe.load_pretrained(folder, other, controller(other))
    else:
        fe.load_pretrained(folder, other, controller(other))
        assert torch.equal(other.qkv.weight, model.qkv.weight)


def test_changed_before_save(tmp_path):
    """A base weight that was changed where no adapter is cannot be had from the checkpoint, which says so."""
    model, ewc = two_tasks()
    with torch.no_grad():
        model.qkv.weight[0, 0] += 1e-9
    fe.save_pretrained(tmp_path, model, ewc)
    other = adapted()
    with pytest.raises(CheckpointError, match="qkv"):
        fe.load_pretrained(tmp_path, other, controller(other))


def earlier(folder: Path) -> None:
    """The manifest as earlier versions wrote it: fingerprints of 64 rows and no digests."""
    config = json.loads((folder / files.MANIFEST).read_text())
    contents = {name: (folder / name).read_bytes() for name in config["files"]}
    for key in ("files", "checksum", "frozen"):
        del config[key]
    for entry in config["layers"].values():
        entry["fingerprint"] = entry["fingerprint"][:16]
        del entry["weight"]
    files.write_files(folder, contents, config)


def test_earlier_checkpoints(tmp_path):
    """Checkpoints of earlier versions load as they did."""
    model, ewc = two_tasks()
    fe.save_pretrained(tmp_path, model, ewc)
    earlier(tmp_path)
    other = adapted()
    again = controller(other)
    fe.load_pretrained(tmp_path, other, again)
    assert_same(whole(model, ewc), whole(other, again))
    with pytest.raises(CheckpointError, match=r"qkv.weight, fc.weight: .*other base weights"):
        fe.load_pretrained(tmp_path, adapted(seed=1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_refused(tmp_path, value):
    """NaN and Inf in adapters are refused by name, unless the EWC does not check."""
    model = adapted()
    with torch.no_grad():
        model.fc.lora_A[1, 2] = value
    fe.save_pretrained(tmp_path, model, controller(model))
    other = adapted()
    before = snapshot(other)
    for ewc in (None, controller(other)):
        with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: fc.lora_A: expected finite"):
            fe.load_pretrained(tmp_path, other, ewc)
    assert_same(before, snapshot(other))
    fe.load_pretrained(tmp_path, other, controller(other, check_finite=False))
    assert not torch.isfinite(other.fc.lora_A).all()


@pytest.mark.parametrize("key", ["fc.lora_B.weight", "out.lora_A.weight", "norm.bias"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e300])
def test_peft_nonfinite_refused(tmp_path, key, value):
    """NaN, Inf, and what is Inf in the dtype of the model are refused by name; the model stays plain."""
    model = injected()
    model.norm.requires_grad_(True)
    fe.export_peft(model, tmp_path)
    path = tmp_path / files.ADAPTER
    tensors = {name: tensor.double() for name, tensor in safetensors.torch.load_file(path).items()}
    tensors[f"base_model.model.{key}"].view(-1)[0] = value
    safetensors.torch.save_file(tensors, path)
    target = plain()
    target.requires_grad_(False)
    before = snapshot(target)
    with pytest.raises(CheckpointError, match=rf"{key.removesuffix('.weight')}: expected finite.*float32"):
        fe.import_peft(tmp_path, target)
    assert_same(before, snapshot(target))
    assert type(target.fc) is nn.Linear and not any(p.requires_grad for p in target.parameters())


def test_state_of_later_tasks(tmp_path):
    """A run that goes on from the files equals the one that was not cut, buffers included."""
    runs = []
    for cut in (False, True):
        model = injected()
        ewc = fe.EWC(model, 10.0, fisher_mode="sample")
        for task in range(3):
            torch.manual_seed(task)
            batch = (torch.randn(4, 8), torch.randint(0, 4, (4,)))
            ewc.end_task([batch], F.cross_entropy)
            if cut and task == 1:
                fe.save_pretrained(tmp_path, model, ewc)
                model = injected()
                ewc = fe.EWC(model, 10.0, fisher_mode="sample")
                fe.load_pretrained(tmp_path, model, ewc)
        runs.append(whole(model, ewc))
    assert_same(*runs)
