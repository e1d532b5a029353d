# SPDX-License-Identifier: Apache-2.0
"""Folders that PEFT reads and folders that PEFT wrote: the same outputs on both sides, or a refusal."""

from __future__ import annotations

import copy
import json
import re

import peft
import pytest
import torch
from models import MLP
from peft_models import TARGETS, inputs, lora_config, peft_model, randomise
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification
from transformers.pytorch_utils import Conv1D

import fused_ewclora as fe

# Both say what they think of settings that are meant here.
pytestmark = pytest.mark.filterwarnings("ignore::Warning:peft", "ignore::FutureWarning:transformers")

WIDE = torch.float64
TIGHT = {
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
    # Three layers of sums of at most 10 products, in either order.
    torch.float32: {"rtol": 0.0, "atol": 100 * torch.finfo(torch.float32).eps},
}


class Packed(nn.Module):
    """q | k | v in one projection, and names of which one is the end of another."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Linear(6, 18), nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "norm": nn.LayerNorm(6)})
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + torch.softmax(q[:, :, None] * k[:, None, :], -1).matmul(v[:, :, None])[:, :, 0]
        x = x + torch.tanh(self.fc(x))
        return self.head(self.block["norm"](x + torch.tanh(self.block["fc"](x))))


class Transposed(nn.Module):
    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.fc1 = Conv1D(10, 6)
        self.fc2 = nn.Linear(10, 4) if mixed else Conv1D(4, 10)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def base(build, dtype=WIDE):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return build().to(dtype)


def assert_peft_reads(path, model, plain, x, **tolerance):
    """PEFT gives the outputs of `model` from the folder, also with its adapters merged."""
    for merged in (False, True):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), path)
        if merged:
            loaded = loaded.merge_and_unload()
        torch.testing.assert_close(loaded(x), model(x), **tolerance)
    return loaded


def exported(tmp_path, plain, *configs, head=()):
    """A trained copy of `plain`, and its folder."""
    model = copy.deepcopy(plain)
    for config in configs:
        fe.inject(model, config)
    for name in head:
        model.get_submodule(name).requires_grad_(True)
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(2.0)
    randomise(model)
    fe.export_peft(model, tmp_path)
    return model, json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize("dtype", TIGHT, ids=str)
def test_export_same_outputs(tmp_path, dtype):
    """PEFT computes what was exported."""
    plain = base(MLP, dtype)
    options = {"rank_pattern": {"fc2": 3}, "alpha_pattern": {"fc1": 5.0}}
    config = fe.LoRAConfig(r=2, lora_alpha=3, target_modules=list(TARGETS), **options)
    model, written = exported(tmp_path, plain, config, head=["head"])
    assert written["modules_to_save"] == ["head"] and written["rank_pattern"] == {"fc2": 3}
    loaded = assert_peft_reads(tmp_path, model, plain, inputs(dtype), **TIGHT[dtype])
    assert type(loaded) is MLP


@pytest.mark.parametrize("dtype", TIGHT, ids=str)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_key_value_adapters(tmp_path, alpha, dtype):
    """Adapters on k and v become a single one that PEFT computes."""
    plain = base(Packed, dtype)
    layout = fe.QKVLayout(("q", "k", "v"))
    config = fe.LoRAConfig(r=2, lora_alpha=alpha, target_modules=["qkv"], slices=("k", "v"), layout=layout)
    model, written = exported(tmp_path, plain, config)
    assert (written["r"], written["lora_alpha"]) == (4, 4 if alpha is None else 6)
    assert_peft_reads(tmp_path, model, plain, inputs(dtype), **TIGHT[dtype])


def test_name_suffixes(tmp_path):
    """Names that end as others do are told apart."""
    plain = base(Packed)
    every = r"qkv|fc|block\.fc"
    ranks, alphas = {"^fc": 3}, {"block.fc": 5.0}
    config = fe.LoRAConfig(r=2, target_modules=every, rank_pattern=ranks, alpha_pattern=alphas)
    model, written = exported(tmp_path / "a", plain, config, head=["head", "block.norm"])
    assert {name: layer.r for name, layer in fe.adapters(model).items()} == {"qkv": 2, "fc": 3, "block.fc": 2}
    assert isinstance(written["target_modules"], str) and "^fc" in written["rank_pattern"]
    assert_peft_reads(tmp_path / "a", model, plain, inputs(), **TIGHT[WIDE])
    again = copy.deepcopy(plain)
    fe.import_peft(tmp_path / "a", again)
    torch.testing.assert_close(again(inputs()), model(inputs()), rtol=0, atol=0)
    whole, _ = exported(tmp_path / "b", plain, fe.LoRAConfig(r=2, target_modules="fc"))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "b")
    assert [name for name, _ in loaded.named_modules() if name.endswith("lora_A")] == [
        "base_model.model.fc.lora_A"
    ]
    torch.testing.assert_close(loaded(inputs()), whole(inputs()), **TIGHT[WIDE])


@pytest.mark.parametrize("mixed", [False, True])
def test_transposed_fan_in(tmp_path, mixed):
    """Transposed layers are written as `fan_in_fan_out`."""
    plain = base(lambda: Transposed(mixed))
    config = fe.LoRAConfig(r=2, lora_alpha=3, target_modules=["fc1", "fc2"])
    model, written = exported(tmp_path / "a", plain, config)
    assert written["fan_in_fan_out"] is not mixed
    assert_peft_reads(tmp_path / "a", model, plain, inputs(), **TIGHT[WIDE])
    theirs = peft_model(copy.deepcopy(plain), fan_in_fan_out=not mixed)
    theirs.save_pretrained(tmp_path / "b")
    fe.import_peft(tmp_path / "b", plain)
    torch.testing.assert_close(plain(inputs()), theirs(inputs()), **TIGHT[WIDE])


WAYS = {
    "plain": {},
    "patterns": {"rank_pattern": {"fc2": 3}, "alpha_pattern": {"fc1": 7, "fc": 1}},
    "a trained head": {"modules_to_save": ["head"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["fc2"]},
    "expression": {"target_modules": r"fc[12]"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "no init": {"init_lora_weights": False},
    "rank-stabilised": {"use_rslora": True, "r": 4},
    "rank-stabilised, odd": {"use_rslora": True, "r": 3, "rank_pattern": {"fc2": 7}},
}


@pytest.mark.parametrize("dtype", TIGHT, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_import_same_outputs(tmp_path, way, dtype):
    """An import computes what PEFT computed."""
    plain = base(MLP, dtype)
    theirs = peft_model(copy.deepcopy(plain), dtype, **WAYS[way])
    theirs.save_pretrained(tmp_path)
    fe.import_peft(tmp_path, plain)
    torch.testing.assert_close(plain(inputs(dtype)), theirs.eval()(inputs(dtype)), **TIGHT[dtype])
    assert plain.head.weight.requires_grad == (way == "a trained head")


@pytest.mark.parametrize("alpha", [3, 13])  # 13 / sqrt(3) is no number divided by 3
def test_dropout_rslora(tmp_path, alpha):
    """Dropout and the rank-stabilised scale survive a round trip."""
    theirs = peft_model(use_rslora=True, lora_dropout=0.25, r=3, lora_alpha=alpha)
    theirs.save_pretrained(tmp_path / "theirs")
    model = base(MLP)
    fe.import_peft(tmp_path / "theirs", model)
    scale = theirs.base_model.model.fc1.scaling["default"]
    assert model.fc1.lora_dropout == 0.25
    assert model.fc1.adapter_slices[0].scaling == scale  # bit for bit
    fe.export_peft(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(MLP), tmp_path / "ours").base_model.model.fc1
    assert again.scaling["default"] == scale and again.lora_dropout["default"].p == 0.25


def test_layers_by_index(tmp_path):
    """Layers chosen by index arrive."""

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 6)}) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer["fc"](x))
            return x

    class Model(nn.Module):  # PEFT 0.18 and before finds no pattern at the start of a name
        def __init__(self):
            super().__init__()
            self.body = Stack()

        def forward(self, x):
            return self.body(x)

    plain = base(Model)
    options = {"target_modules": ["fc"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}
    theirs = peft_model(copy.deepcopy(plain), **options)
    theirs.save_pretrained(tmp_path)
    fe.import_peft(tmp_path, plain)
    assert list(fe.adapters(plain)) == ["body.layers.0.fc", "body.layers.2.fc"]
    torch.testing.assert_close(plain(inputs()), theirs(inputs()), **TIGHT[WIDE])


def tiny_transformer(kind):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if kind == "bert":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        config = BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=3, **sizes)
        return BertForSequenceClassification(config).double().eval(), ["query", "value"], "classifier"
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, num_labels=3, pad_token_id=0)
    return GPT2ForSequenceClassification(config).double().eval(), ["c_attn", "c_fc"], "score"


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_transformers_both_ways(tmp_path, kind):
    """Models of transformers go both ways."""
    plain, targets, head = tiny_transformer(kind)
    tokens = torch.randint(1, 11, (3, 5))
    config = fe.LoRAConfig(r=2, lora_alpha=3, target_modules=targets)
    model, written = exported(tmp_path / "ours", plain, config, head=[head])
    assert written["fan_in_fan_out"] is (kind == "gpt2")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, **TIGHT[WIDE])
    theirs = peft.get_peft_model(
        copy.deepcopy(plain), lora_config(target_modules=targets, task_type="SEQ_CLS")
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    other = copy.deepcopy(plain)
    fe.import_peft(tmp_path / "theirs", other)
    torch.testing.assert_close(other(tokens).logits, theirs(tokens).logits, **TIGHT[WIDE])


def test_export_fused_model(tmp_path):
    """A PEFT model on the fused op is exported as PEFT would export it."""
    plain = base(MLP)
    theirs = peft_model(copy.deepcopy(plain), modules_to_save=["head"])
    with torch.no_grad():
        theirs.base_model.model.head.modules_to_save["default"].weight.mul_(2.0)
    fe.integrations.peft.accelerate_(theirs)
    fe.export_peft(theirs, tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(inputs()), theirs(inputs()), **TIGHT[WIDE])


REFUSED = {
    "DoRA": (lambda: lora_config(use_dora=True), "use_dora=True"),
    "bias of the factors": (lambda: lora_config(target_modules=["fc1"], lora_bias=True), "lora_bias=True"),
    "bias of the layers": (lambda: lora_config(bias="lora_only"), "bias='lora_only'"),
    "PiSSA": (lambda: lora_config(init_lora_weights="pissa"), "init_lora_weights='pissa' changed the base"),
    "OLoRA": (lambda: lora_config(init_lora_weights="olora"), "init_lora_weights='olora' changed the base"),
    "VeRA": (lambda: peft.VeraConfig(r=2, target_modules=["fc2"]), "peft_type='VERA'"),
    "LoHa": (lambda: peft.LoHaConfig(r=2, target_modules=list(TARGETS)), "peft_type='LOHA'"),
    "IA3": (lambda: peft.IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"]), "peft_type='IA3'"),
    "AdaLoRA": (
        lambda: peft.AdaLoraConfig(target_modules=list(TARGETS), total_step=10, tinit=1, tfinal=1),
        "peft_type='ADALORA'",
    ),
}  # fmt: skip


def refused(model, folder, message):
    """The import is refused with the reason and the model is untouched, to the classes of its modules."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(fe.NotExactlyRepresentable, match=re.escape(message)):
        fe.import_peft(folder, model)
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_variants(tmp_path, case):
    """What a plain adapter does not compute is refused."""
    config, message = REFUSED[case]
    torch.manual_seed(0)
    peft.get_peft_model(MLP(), config()).save_pretrained(tmp_path)
    refused(base(MLP), tmp_path, message)


CHANGED = [{"layer_replication": [[0, 2], [1, 3]]}, {"target_parameters": ["fc1.weight"]}]


@pytest.mark.parametrize("settings", CHANGED)
def test_model_changing_settings(tmp_path, settings):
    """Settings that change the model are refused."""
    peft_model().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    refused(base(MLP), tmp_path, next(iter(settings)))


def test_nonlinear_layers(tmp_path):
    """Adapters of layers other than linear ones and convolutions are refused."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv, self.fc1 = nn.Embedding(7, 6), nn.Conv3d(1, 1, 1), nn.Linear(6, 3)

    for targets, message in ((["words", "fc1"], "lora_embedding"), (["conv", "fc1"], "Conv3d is not")):
        peft.get_peft_model(Words(), lora_config(target_modules=targets)).save_pretrained(tmp_path)
        refused(Words(), tmp_path, message)


def test_converted_pissa(tmp_path):
    """A PiSSA adapter that PEFT converted is a plain adapter."""
    plain = base(MLP, torch.float32)
    theirs = peft.get_peft_model(copy.deepcopy(plain), lora_config(init_lora_weights="pissa"))
    theirs.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        theirs.base_model.model.fc1.lora_B["default"].weight.mul_(1.5)
    theirs.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    fe.import_peft(tmp_path, plain)
    x = inputs(torch.float32)
    torch.testing.assert_close(plain(x), theirs(x), **TIGHT[torch.float32])


def test_export_same_files(tmp_path):
    """An export is what PEFT itself would have written."""
    theirs = peft_model(modules_to_save=["head"])
    theirs.save_pretrained(tmp_path / "theirs")
    plain = base(MLP)
    fe.import_peft(tmp_path / "theirs", plain)
    fe.export_peft(plain, tmp_path / "ours")
    names = [p / "adapter_model.safetensors" for p in (tmp_path / "theirs", tmp_path / "ours")]
    ours, own = load_file(names[1]), load_file(names[0])
    assert ours.keys() == own.keys() and all(torch.equal(ours[key], own[key]) for key in own)
    known = set(peft.LoraConfig.__dataclass_fields__)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(written) <= known
