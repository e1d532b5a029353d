# SPDX-License-Identifier: Apache-2.0
"""What happens to models and controllers in long runs: copied, pickled, moved, wrapped, reloaded, ejected."""

from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_models import (
    KEYS,
    Tiny,
    adapted,
    assert_same,
    batches,
    controller,
    data,
    randomise,
    snapshot,
    train,
    two_tasks,
    whole,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fused_ewclora as fe
from fused_ewclora.checkpoints import files
from fused_ewclora.errors import CheckpointError, DtypeError, TargetError


def another_task(model: nn.Module, ewc: fe.EWC, seed: int = 7, dtype: torch.dtype = torch.float64) -> None:
    """Training and the end of a task, from known random numbers."""
    torch.manual_seed(seed)
    train(model, ewc, seed)
    ewc.end_task(batches(*data(9, seed=seed, dtype=dtype), 4), F.cross_entropy)
    randomise(model)


def by_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def by_torch_save(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("merge_mode", ["delta", "factors"])
@pytest.mark.parametrize("moment", ["between tasks", "in a task", "before consolidation"])
def test_copies_train_independently(copied, merge_mode, moment):
    """Copies of model and controller train on identically and independently."""
    model, ewc = two_tasks(merge_mode=merge_mode, generator=torch.Generator().manual_seed(1))
    if moment != "between tasks":
        train(model, ewc, 2)
    if moment == "before consolidation":
        ewc.estimate_fisher([data(5)], F.cross_entropy)
    before = whole(model, ewc)
    other, other_ewc = copied((model, ewc))
    assert other_ewc.model is other and other_ewc.layers["fc"] is other.fc
    assert_same(before, whole(other, other_ewc))
    another_task(other, other_ewc)
    assert_same(before, whole(model, ewc))
    changed = whole(other, other_ewc)
    assert any(not torch.equal(before[name], changed[name]) for name in before if name in changed)
    another_task(model, ewc)
    assert_same(changed, whole(model, ewc))
    assert ewc.history == other_ewc.history


def test_controller_copies_model():
    """A copied controller brings its own model along."""
    model, ewc = two_tasks()
    before = whole(model, ewc)
    other = copy.deepcopy(ewc)
    assert other.model is not model and torch.equal(other.penalty(), ewc.penalty())
    another_task(other.model, other)
    assert_same(before, whole(model, ewc))


def test_copy_inside_pass():
    """A copy made inside a Fisher pass is not part of it."""
    model, ewc = two_tasks()
    x, y = data(5)
    with ewc.accumulate_fisher():
        other, other_ewc = copy.deepcopy((model, ewc))
        F.cross_entropy(other(x), y).backward()
        F.cross_entropy(model(x), y).backward()
    assert "task" not in other_ewc.state_dict()["config"]
    another_task(other, other_ewc)
    ewc.consolidate()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def recomputing(model: nn.Module) -> nn.Module:
    model.fc = checkpoint_wrapper(model.fc)
    return model


def all_of_them(model: nn.Module) -> nn.Module:
    return compiled(ddp(recomputing(model)))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", [ddp, compiled, recomputing, all_of_them])
def test_wrapped_bare_states(wrap, tmp_path):
    """States pass between wrapped and bare models."""
    model, ewc = two_tasks()
    train(model, ewc, 3)
    expected = whole(model, ewc)
    fe.save_pretrained(tmp_path / "bare", model, ewc)
    wrapped = wrap(adapted())
    wrapped_ewc = controller(wrapped)
    assert list(wrapped_ewc.layers) == ["qkv", "fc"]
    fe.load_pretrained(tmp_path / "bare", wrapped, wrapped_ewc)
    fe.save_pretrained(tmp_path / "wrapped", wrapped, wrapped_ewc)
    for name in ("ewc_config.json", "ewc_state.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    back = adapted()
    back_ewc = controller(back)
    fe.load_pretrained(tmp_path / "wrapped", back, back_ewc)
    assert_same(expected, whole(back, back_ewc))
    third = controller(adapted())
    third.load_state_dict(wrapped_ewc.state_dict())
    assert_same(ewc.fishers, third.fishers)
    for one, one_ewc in ((wrapped, wrapped_ewc), (model, ewc)):
        torch.manual_seed(5)
        train(one, one_ewc, 4)
    assert torch.equal(wrapped_ewc.penalty(), ewc.penalty())


def test_wrapper_prefix_clash(tmp_path):
    """ "module.fc" is what DDP calls "fc": in one model that has both they could not be told apart."""
    model = nn.ModuleDict({"fc": nn.Linear(3, 3), "module": nn.ModuleDict({"fc": nn.Linear(3, 3)})})
    fe.inject(model, fe.LoRAConfig(r=1, target_modules=["fc"]))
    for call in (lambda: fe.EWC(model), lambda: fe.save_pretrained(tmp_path / "x", model)):
        with pytest.raises(TargetError, match=r"module\.fc.*prefix"):
            call()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fisher_keeps_dtype(dtype):
    """The Fisher keeps its dtype when the model changes its own."""
    model = adapted(dtype=torch.float32)
    ewc = fe.EWC(model, ewc_lambda=20.0)
    ewc.end_task([data(6, dtype=torch.float32)], F.cross_entropy)
    randomise(model)
    fishers = ewc.fishers
    model.to(dtype)
    ewc.penalty().backward()
    assert all(ewc.fishers[k] is fisher and fisher.dtype == torch.float32 for k, fisher in fishers.items())
    delta = model.fc.lora_B.double() @ model.fc.lora_A.double()
    only_fc = fe.functional.ewc_penalty([fishers["fc"]], [model.fc.lora_A], [model.fc.lora_B])
    torch.testing.assert_close(
        only_fc.double(), (fishers["fc"].double() * delta.square()).sum() / 2, rtol=1e-5, atol=0.0
    )
    assert model.fc.lora_A.grad.dtype == dtype
    ewc.end_task([data(6, dtype=dtype)], F.cross_entropy)
    assert ewc.tasks == 2 and ewc.fishers["fc"] is fishers["fc"]


def test_fp64_fisher_fp32():
    """An fp64 Fisher beside a model that became fp32 raises an error that says so."""
    model, ewc = two_tasks()
    model.float()
    with pytest.raises(DtypeError, match=r"fishers\[0\].*float32.*float64"):
        ewc.penalty()


@pytest.mark.parametrize("merge_mode", ["delta", "factors"])
def test_state_follows_device(merge_mode):
    """On the meta device, which every machine has."""
    model, ewc = two_tasks(merge_mode=merge_mode)
    ewc.estimate_fisher([data(5)], F.cross_entropy)
    model.to("meta")
    assert ewc.penalty().device.type == "meta"
    ewc.add_penalty_grad_()
    tensors = ewc.state_dict()["tensors"]
    assert set(tensors) >= {f"{kind}.{key}" for kind in ("fisher", "task") for key in KEYS}
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}


def test_state_keeps_tensors():
    """A state that need not move keeps its tensors."""
    _, ewc = two_tasks()
    fishers = ewc.fishers
    ewc.penalty()
    assert all(ewc.fishers[key] is fisher for key, fisher in fishers.items())


def test_assigned_parameters():
    """Parameters assigned after the controller was made are followed."""
    model, ewc = two_tasks()
    twin, twin_ewc = copy.deepcopy((model, ewc))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for one, one_ewc in ((model, ewc), (twin, twin_ewc)):
        another_task(one, one_ewc)
    assert_same(whole(twin, twin_ewc), whole(model, ewc))


USES = {
    "penalty": lambda ewc: ewc.penalty(),
    "add_penalty_grad_": lambda ewc: ewc.add_penalty_grad_(),
    "estimate_fisher": lambda ewc: ewc.estimate_fisher([data(4)], F.cross_entropy),
    "consolidate": lambda ewc: ewc.consolidate(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("again", [None, {"r": 3}, {"lora_alpha": 5.0}, {"slices": None}])
def test_adapters_gone(use, again):
    """Ejected, or injected anew with another configuration."""
    model, ewc = two_tasks()
    ewc.estimate_fisher([data(4)], F.cross_entropy)
    fe.eject(model)
    if again is not None:
        layout = fe.QKVLayout(("q", "k", "v"))
        options = {"r": 2, "slices": ("k", "v"), "layout": layout} | again
        fe.inject(model, fe.LoRAConfig(target_modules=["qkv"], **options))
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc"]))
    before = snapshot(model, ewc.state_dict()["tensors"])
    with pytest.raises(TargetError, match=r"qkv.k: .*make a new EWC"):
        USES[use](ewc)
    assert_same(before, snapshot(model, ewc.state_dict()["tensors"]))


def test_reinjected_adapters():
    """The same adapters injected again continue with the same controller."""
    model, ewc = two_tasks()
    fe.eject(model)
    torch.manual_seed(0)
    layout = fe.QKVLayout(("q", "k", "v"))
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["qkv"], slices=("k", "v"), layout=layout))
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc"]))
    assert ewc.penalty().item() == 0.0  # B = 0
    another_task(model, ewc)
    assert ewc.tasks == 3


def test_ejected_state_reused():
    """An ejected model is plain, and the state of its controller serves another model."""
    model, ewc = two_tasks()
    x, _ = data(3)
    expected = model(x)
    fe.eject(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13)
    assert type(by_pickle(model).fc) is nn.Linear
    state = ewc.state_dict()
    fresh = Tiny().double()
    fresh.load_state_dict(model.state_dict())
    layout = fe.QKVLayout(("q", "k", "v"))
    fe.inject(fresh, fe.LoRAConfig(r=2, target_modules=["qkv"], slices=("k", "v"), layout=layout))
    fe.inject(fresh, fe.LoRAConfig(r=2, target_modules=["fc"]))
    other = controller(fresh)
    other.load_state_dict(state)
    assert_same(ewc.fishers, other.fishers)


def test_optimizer_resume(tmp_path):
    """Adapters, head, Fisher and moments: a run that goes on from files equals the one that was not cut."""
    model, ewc = two_tasks()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    def steps(model: nn.Module, ewc: fe.EWC, optimizer: torch.optim.Optimizer, seed: int) -> None:
        x, y = data(8, seed=seed)
        for _ in range(2):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + ewc.penalty()).backward()
            optimizer.step()

    steps(model, ewc, optimizer, 1)
    fe.save_pretrained(tmp_path, model, ewc)
    moments = copy.deepcopy(optimizer.state_dict())
    resumed = adapted()
    resumed_ewc = controller(resumed)
    fe.load_pretrained(tmp_path, resumed, resumed_ewc)
    other = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-2)
    other.load_state_dict(moments)
    runs: list[dict[str, Tensor]] = []
    for one in ((model, ewc, optimizer), (resumed, resumed_ewc, other)):
        steps(*one, 2)
        torch.manual_seed(3)
        one[1].end_task([data(6)], F.cross_entropy)
        fe.reset_optimizer_state_(one[2], one[0])
        steps(*one, 3)
        runs.append(whole(one[0], one[1]))
    assert_same(*runs)


class Dead(BaseException):
    """The process has died: no code of its own runs after it."""


def test_interrupted_first_save(tmp_path, monkeypatch):
    """Before every write, fsync, rename and removal in turn; kills over an older checkpoint are in
    test_checkpoint_files.py."""
    model, ewc = two_tasks()
    expected = whole(model, ewc)
    places = [(files, "_write"), (os, "fsync"), (os, "replace"), (Path, "unlink")]
    found = []
    for moment in range(1, 60):
        folder, calls = tmp_path / str(moment), []

        def dying(original, calls=calls, moment=moment):
            def call(*args, **kwargs):
                calls.append(1)
                if len(calls) >= moment:  # and so does whatever would clean up
                    raise Dead
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patched:
            for owner, name in places:
                patched.setattr(owner, name, dying(getattr(owner, name)))
            try:
                fe.save_pretrained(folder, model, ewc)
                died = False
            except Dead:
                died = True
        other = adapted()
        other_ewc = controller(other)
        fresh = whole(other, other_ewc)
        try:
            fe.load_pretrained(folder, other, other_ewc)
            found.append(True)
        except CheckpointError:
            found.append(False)
        assert_same(expected if found[-1] else fresh, whole(other, other_ewc))
        fe.save_pretrained(folder, model, ewc)  # and the next save finds its way
        fe.load_pretrained(folder, other, other_ewc)
        assert_same(expected, whole(other, other_ewc))
        if not died:
            break
    assert not died and len(found) > 10 and found == sorted(found) and set(found) == {False, True}
