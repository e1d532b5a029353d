# SPDX-License-Identifier: Apache-2.0
"""EWC over a PEFT model trains as on an injected model, and each loads the checkpoints of the other."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from models import MLP
from peft_models import TARGETS, inputs, lora_config, peft_model, randomise
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification
from transformers.pytorch_utils import Conv1D

import fused_ewclora as fe
from fused_ewclora.integrations._peft_layers import FusedPeftLinear
from fused_ewclora.integrations.peft import accelerate_, attach_ewc, restore_

# Both say what they think of settings that are meant here.
pytestmark = pytest.mark.filterwarnings("ignore::Warning:peft", "ignore::FutureWarning:transformers")

WIDE = torch.float64


def data(seed: int, samples: int = 12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator, dtype=WIDE)
    return x, torch.randint(0, 4, (samples,), generator=generator)


def loader(seed: int):
    x, y = data(seed)
    return list(zip(x.split(5), y.split(5), strict=True))


def both(modules_to_save=("head",), **options):
    """(PEFT model, its EWC, natively injected model, its EWC) with the same weights and adapters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = MLP().to(WIDE)
    native = copy.deepcopy(base)
    live = peft.get_peft_model(base, lora_config(modules_to_save=list(modules_to_save)))
    fe.inject(native, fe.LoRAConfig(r=2, lora_alpha=3, target_modules=list(TARGETS)))
    native.head.requires_grad_(True)
    with torch.no_grad():
        for name in TARGETS:
            ours, theirs = native.get_submodule(name), live.base_model.model.get_submodule(name)
            ours.lora_A.copy_(theirs.lora_A["default"].weight)
    options = {"ewc_lambda": 20.0, "fisher_dtype": WIDE, **options}
    make = [{**options, "generator": torch.Generator().manual_seed(1)} for _ in range(2)]
    return live, attach_ewc(live, **make[0]), native, fe.EWC(native, **make[1])


def train(model, ewc, task: int, steps: int = 4):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for step in range(steps):
        x, y = data(100 * task + step)
        optimizer.zero_grad()
        penalty = ewc.penalty()
        (F.cross_entropy(model(x), y) + penalty).backward()
        optimizer.step()
    ewc.end_task(loader(task), F.cross_entropy)
    return float(penalty.detach())


def assert_equal_models(live, ewc, native, other):
    """Weights, adapters, Fishers and penalty agree to 1e-9."""
    x = inputs()
    for a, b in [(live(x), native(x)), (ewc.penalty(), other.penalty())]:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert list(ewc.fishers) == list(other.fishers) == list(TARGETS)
    for name in TARGETS:
        torch.testing.assert_close(ewc.fishers[name], other.fishers[name], rtol=1e-9, atol=1e-12)
        theirs, ours = ewc.layers[name], native.get_submodule(name)
        torch.testing.assert_close(theirs.base_weight, ours.base_weight, rtol=1e-9, atol=1e-12)
        for (_, a), (_, b) in zip(theirs.named_lora_parameters(), ours.named_lora_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"fisher_mode": "sample"}, {"fisher_mode": "batch", "gamma": 0.5}, {"merge_mode": "factors"}]
)
def test_matches_injected_model(options):
    """Tasks train as on an injected model."""
    live, ewc, native, other = both(**options)
    for task in (1, 2, 3):
        penalties = [train(model, controller, task) for model, controller in ((live, ewc), (native, other))]
        assert (task == 1) == (penalties[0] == 0.0)
        assert penalties[0] == pytest.approx(penalties[1], rel=1e-9)
    randomise(live, 5)
    with torch.no_grad():
        for name in TARGETS:
            native.get_submodule(name).lora_B.copy_(ewc.layers[name].lora_B["default"].weight)
    assert_equal_models(live, ewc, native, other)
    assert ewc.penalty() > 0
    for controller in (ewc, other):
        controller.add_penalty_grad_()
    for name in TARGETS:
        ours = native.get_submodule(name)
        torch.testing.assert_close(ewc.layers[name].lora_B["default"].weight.grad, ours.lora_B.grad)


def test_consolidation_restarts_adapter():
    """Consolidation keeps the function and restarts the adapter."""
    live, ewc, *_ = both()
    randomise(live)
    before = live(inputs())
    ewc.end_task(loader(1), F.cross_entropy)
    torch.testing.assert_close(live(inputs()), before, rtol=1e-13, atol=1e-13)
    for layer in ewc.layers.values():
        a, b = (table[name] for table, name in layer.parameter_locations(layer.adapter_slices[0]))
        assert not b.any() and 0 < a.abs().max() <= 1 / layer.in_features**0.5
    with live.disable_adapter():
        torch.testing.assert_close(live(inputs()), before, rtol=1e-13, atol=1e-13)
    plain = live.merge_and_unload()
    torch.testing.assert_close(plain(inputs()), before, rtol=1e-13, atol=1e-13)
    assert "fc1.weight" in plain.state_dict()


def test_gaussian_restart():
    """A Gaussian adapter starts anew as a Gaussian."""
    net = nn.Sequential(nn.Linear(400, 8))
    model = peft_model(net, r=4, target_modules=["0"], init_lora_weights="gaussian")
    ewc = attach_ewc(model, generator=torch.Generator().manual_seed(2), fisher_dtype=WIDE)
    batch = torch.randn(3, 400, dtype=WIDE), torch.tensor([0, 1, 2])
    ewc.end_task([batch], F.cross_entropy)
    a = ewc.layers["0"].lora_A["default"].weight
    # 1,600 draws: the deviation is known to 1 / sqrt(3200) of itself; a uniform one would be 0.029.
    assert abs(float(a.detach().std()) * 4 - 1) < 5 / 3200**0.5


def test_transposed_weight():
    """A transposed base weight is consolidated in place."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = Conv1D(4, 6)

        def forward(self, x):
            return self.fc1(x)

    model = peft_model(Net(), target_modules=["fc1"], fan_in_fan_out=True)
    ewc = attach_ewc(model, fisher_dtype=WIDE, ewc_lambda=2.0)
    weight = model.base_model.model.fc1.base_layer.weight
    before, expected = model(inputs()), weight + model.base_model.model.fc1.get_delta_weight("default")
    ewc.end_task(loader(1), F.cross_entropy)
    torch.testing.assert_close(model(inputs()), before, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(weight, expected, rtol=1e-13, atol=1e-13)
    assert ewc.fishers["fc1"].shape == (4, 6) and weight.shape == (6, 4)


def fresh():
    live, ewc, native, other = both()
    return {"peft": (live, ewc), "injected": (native, other)}


@pytest.mark.parametrize("saver", ["peft", "injected"])
@pytest.mark.parametrize("reader", ["peft", "injected"])
def test_checkpoints_interchange(tmp_path, saver, reader):
    """Checkpoints are read by either kind of model."""
    model, ewc = fresh()[saver]
    train(model, ewc, 1)
    train(model, ewc, 2)
    randomise(model)
    fe.save_pretrained(tmp_path, model, ewc)
    other, controller = fresh()[reader]
    fe.load_pretrained(tmp_path, other, controller)
    assert torch.equal(model(inputs()), other(inputs()))
    assert torch.equal(ewc.penalty(), controller.penalty()) and controller.tasks == 2
    for trained, trained_ewc in ((model, ewc), (other, controller)):
        trained_ewc.generator = torch.Generator().manual_seed(7)
        train(trained, trained_ewc, 3)
    torch.testing.assert_close(model(inputs()), other(inputs()), rtol=1e-12, atol=1e-12)


def test_checkpoint_before_consolidation(tmp_path):
    """A checkpoint saved before consolidation can be loaded by PEFT itself."""
    live, ewc, *_ = both()
    randomise(live)
    with torch.no_grad():
        live.base_model.model.head.modules_to_save["default"].weight.mul_(2.0)
    fe.save_pretrained(tmp_path, live, ewc)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(MLP().to(WIDE), tmp_path)
    torch.testing.assert_close(again(inputs()), live(inputs()), rtol=1e-13, atol=1e-13)


def test_controller_round_trip():
    """The state of the controller survives a round trip."""
    live, ewc, *_ = both()
    train(live, ewc, 1)
    randomise(live)
    other = attach_ewc(copy.deepcopy(live), ewc_lambda=20.0, fisher_dtype=WIDE)
    other.load_state_dict(ewc.state_dict())
    assert torch.equal(other.penalty(), ewc.penalty()) and ewc.penalty() > 0


def gpt2(*targets):
    """(the names of its modules, a PEFT model with a head that is trained whole, a batch)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    plain = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=3, pad_token_id=0)).double()
    names = {name for name, _ in plain.named_modules()}
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=list(targets), fan_in_fan_out=True)
    model = peft.get_peft_model(plain, config)
    randomise(model)
    batch = {"input_ids": torch.randint(1, 11, (4, 5)), "labels": torch.tensor([0, 1, 2, 0])}
    return names, model.eval(), batch


def test_fisher_plain_names():
    """Fishers carry the names of the plain model."""
    names, model, batch = gpt2("c_attn", "c_proj")
    ewc = attach_ewc(model, fisher_dtype=WIDE)
    before = model(**batch).logits
    ewc.end_task([batch])
    targets = {f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")}
    assert set(ewc.fishers) == targets <= names
    assert all(float(fisher.sum()) > 0 for fisher in ewc.fishers.values())
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-12, atol=1e-12)


def test_activation_checkpointing_counts_once():
    _, model, batch = gpt2("c_fc")
    fishers = []
    for checkpointed in (False, True):
        live = copy.deepcopy(model)
        if checkpointed:
            live.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ewc = attach_ewc(live, fisher_dtype=WIDE)
        with ewc.accumulate_fisher():
            live.train()  # transformers checkpoints in training only
            torch.manual_seed(3)
            live(**batch).loss.backward()
        ewc.consolidate()
        fishers.append(ewc.fishers["transformer.h.0.mlp.c_fc"])
    torch.testing.assert_close(*fishers, rtol=1e-12, atol=1e-15)


def refused(case: str):
    model = peft_model(**({"use_dora": True} if case == "variant" else {}))
    options = {"fisher_dtype": WIDE}
    if case == "adapters":
        model.add_adapter("other", lora_config())
    elif case == "merged":
        model.merge_adapter()
    elif case == "kwargs":
        options["gamma"] = 2.0
    elif case == "plain":
        return model.unload(), options, "found none"
    return model, options, {
        "variant": "variants of LoRA", "adapters": r"\['default', 'other'\]", "merged": "unmerge_adapter",
        "kwargs": "gamma",
    }[case]  # fmt: skip


@pytest.mark.parametrize("case", ["variant", "adapters", "merged", "kwargs", "plain"])
def test_refusal_changes_nothing(case):
    """A refusal leaves the model as it was."""
    model, options, message = refused(case)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(fe.EWCLoRAError, match=message):
        attach_ewc(model, **options)
    assert [type(module) for module in model.modules()] == classes


def test_second_adapter():
    """A second adapter stops the controller before anything changes."""
    live, ewc, *_ = both(modules_to_save=())
    train(live, ewc, 1)
    randomise(live)
    live.add_adapter("other", lora_config())
    ewc.estimate_fisher(loader(2), F.cross_entropy)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    with pytest.raises(fe.TargetError, match="other"):
        ewc.consolidate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())
    live.set_adapter("other")
    for call in (ewc.penalty, ewc.add_penalty_grad_, lambda: ewc.estimate_fisher(loader(2), F.cross_entropy)):
        with pytest.raises(fe.TargetError, match=r"set_adapter\('default'\)"):
            call()
    live.delete_adapter("other")
    live.set_adapter("default")
    assert ewc.penalty() > 0
    ewc.consolidate()
    assert ewc.tasks == 2


def test_unserved_calls():
    """A Fisher pass refuses calls that the fused op does not serve."""
    live, ewc, *_ = both()
    handle = live.base_model.model.fc1.base_layer.register_forward_hook(lambda *a: None)
    with pytest.raises(fe.TargetError, match="hooks"):
        ewc.estimate_fisher(loader(1), F.cross_entropy)
    handle.remove()
    ewc.estimate_fisher(loader(1), F.cross_entropy)


def test_restore_keeps_weights():
    """Restoring ends the controller and keeps the weights."""
    live, ewc, *_ = both()
    train(live, ewc, 1)
    randomise(live)
    y = live(inputs())
    assert restore_(live) == 2
    assert not any(isinstance(module, FusedPeftLinear) for module in live.modules())
    torch.testing.assert_close(live(inputs()), y, rtol=1e-13, atol=1e-13)
    accelerate_(live)
    torch.testing.assert_close(live(inputs()), y, rtol=1e-13, atol=1e-13)
