"""Adapters on linear maps that are no layers: parameters, and slices of parameters, of other modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import randomize_adapters_
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.layers import bypass, parts
from fused_ewclora.layers.parts import Part
from fused_ewclora.layers.slices import fingerprint

D, E = 6, 3
LAYOUT = fe.QKVLayout(("k", "v"), (D, D))


class Maps(nn.Module):
    """Three kinds of linear maps: packed with a bias, transposed, and slices of a 3-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_weight = nn.Parameter(torch.randn(2 * D, D) / D**0.5)
        self.kv_bias = nn.Parameter(torch.randn(2 * D))
        self.down = nn.Parameter(torch.randn(2 * D, D) / D)  # [in, out]
        self.experts = nn.Parameter(torch.randn(E, D, D) / D)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.kv_weight, self.kv_bias)) @ self.down
        return x + sum(F.linear(x, expert) for expert in self.experts).tanh()


class CallingMaps(Maps):
    """The same, through adapted parts where there are any."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self._call("kv", x, self.kv_weight, self.kv_bias))
        x = self._call("proj", x, self.down.t())
        return x + sum(self._call(f"expert_{e}", x, self.experts[e]) for e in range(E)).tanh()

    def _call(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        part = self._modules.get(name)
        return F.linear(x, weight, bias) if part is None else part(x, weight, bias)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maps, self.head = Maps(), nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x))


class Dense(nn.Module):
    """The same function of plain linear layers, which are adapted as ever."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.kv, self.proj = nn.Linear(D, 2 * D), nn.Linear(2 * D, D, bias=False)
        self.experts = nn.ModuleList([nn.Linear(D, D, bias=False) for _ in range(E)])
        self.head = copy.deepcopy(model.head)
        self.kv.weight, self.kv.bias = copied(model.maps.kv_weight), copied(model.maps.kv_bias)
        self.proj.weight = copied(model.maps.down.t())
        for expert, weight in zip(self.experts, model.maps.experts, strict=True):
            expert.weight = copied(weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(torch.tanh(self.kv(x)))
        return self.head(x + sum(expert(x) for expert in self.experts).tanh())


def copied(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(module: nn.Module) -> list[Part]:
        if not isinstance(module, Maps):
            return []
        return [
            Part("kv", "kv_weight", D, 2 * D, "kv_bias", layout=LAYOUT),
            Part("proj", "down", 2 * D, D, transposed=True),
            *(Part(f"expert_{e}", "experts", D, D, index=e, in_all=False) for e in range(E)),
        ]

    def calls(parent: nn.Module, child: str) -> dict[str, type] | None:
        return {bypass.CLASS: CallingMaps} if type(parent) is Maps else None

    monkeypatch.setattr(parts, "_rules", [found])
    monkeypatch.setattr(bypass, "_call_rules", [calls])


def pair(**options) -> tuple[Model, Dense]:
    """Both forms with equal adapters on everything; those of `model` have the names of parts."""
    torch.manual_seed(0)
    model = Model().double()
    dense = Dense(model).double()
    slices = {"slices": ("k", "v"), "layout": LAYOUT}
    for other, names in (
        (model, ["proj", *(f"expert_{e}" for e in range(E))]),
        (dense, ["proj", "experts.*"]),
    ):
        fe.inject(other, fe.LoRAConfig(r=2, lora_alpha=3.0, target_modules=["kv"], **slices, **options))
        pattern = names if other is model else r"proj|experts\.\d"
        fe.inject(other, fe.LoRAConfig(r=2, lora_alpha=3.0, target_modules=pattern, **options))
        randomize_adapters_(other)
    for ours, theirs in zip(layers(model), layers(dense), strict=True):
        for (_, p), (_, q) in zip(ours.named_lora_parameters(), theirs.named_lora_parameters(), strict=True):
            q.data.copy_(p.data)
    return model, dense


def layers(model: nn.Module) -> list[fe.LoRALinear]:
    """In one order for both forms."""
    return sorted(
        fe.adapters(model).values(),
        key=lambda layer: (layer.out_features, layer.in_features),
    )


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, D, dtype=torch.float64, generator=generator), torch.arange(5) % 4


def loss(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.mean(1), y)


def test_tasks_equal_layers():
    """Outputs, gradients, Fishers, penalty and weights over three tasks equal those of linear layers."""
    models = pair()
    ewcs = [fe.EWC(m, ewc_lambda=10.0, generator=torch.Generator().manual_seed(0)) for m in models]
    for task in range(3):
        x, y = data(task)
        values = []
        for model, ewc in zip(models, ewcs, strict=True):
            total = loss(model(x), y) + ewc.penalty()
            total.backward()
            grads = [p.grad for layer in layers(model) for _, p in layer.named_lora_parameters()]
            values.append([total, *grads])
            with torch.no_grad():
                for layer in layers(model):
                    for _, p in layer.named_lora_parameters():
                        p -= 0.1 * p.grad
                        p.grad = None
            ewc.estimate_fisher([(x, y)], loss)
            ewc.consolidate()
        torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
        ours, theirs = (sorted((tuple(f.shape), f.sum()) for f in ewc.fishers.values()) for ewc in ewcs)
        torch.testing.assert_close([s for _, s in ours], [s for _, s in theirs], rtol=1e-9, atol=0)
        for layer, other in zip(layers(models[0]), layers(models[1]), strict=True):
            torch.testing.assert_close(layer.base_weight, other.base_weight, rtol=1e-12, atol=1e-12)


def test_keys_and_eject():
    """The keys of the base model stay, and eject leaves the model as it was, adapters folded in."""
    model, dense = pair()
    keys = set(Model().state_dict())
    adapted = {key for key in model.state_dict() if ".lora_" in key}
    assert set(model.state_dict()) - adapted == keys
    x, _ = data(0)
    expected = dense(x)
    fe.eject(model)
    assert type(model.maps) is Maps and set(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_merge_and_copies():
    """merge, unmerge, disabled, deepcopy and pickle do with parts what they do with layers."""
    model, dense = pair()
    x, _ = data(0)
    y = model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with fe.disabled(model), fe.disabled(dense):
        torch.testing.assert_close(model(x), dense(x), rtol=1e-12, atol=1e-12)
    fe.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    fe.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        fe.merge(other)
        part = other.maps.proj
        assert part.owner is other.maps and part.weight is other.maps.down
        assert torch.equal(model(x), y)


def test_checkpoints(tmp_path):
    """A checkpoint restores weights, Fishers and adapters of parts."""
    model, _ = pair()
    ewc = fe.EWC(model, ewc_lambda=1.0)
    ewc.end_task([data(0)], loss)
    randomize_adapters_(model)
    fe.save_pretrained(tmp_path, model, ewc)
    other, _ = pair()
    new = fe.EWC(other, ewc_lambda=1.0)
    fe.load_pretrained(tmp_path, other, new)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    assert all(torch.equal(f, ewc.fishers[key]) for key, f in new.fishers.items())


def test_base_state_loads():
    """A state_dict of the base model is the new base of the parts; into merged parts it is refused."""
    model, _ = pair()
    other = Model().double()
    model.load_state_dict(other.state_dict(), strict=False)
    assert model.maps.proj.origin_fingerprint == fingerprint(other.maps.down.t())
    fe.merge(model)
    merged = model.maps.down.clone()
    with pytest.raises(RuntimeError, match=r"maps.down: the adapters are merged into this weight"):
        model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(model.maps.down, merged)
    assert len(model.maps._load_state_dict_pre_hooks) == 2 + E
    fe.eject(model)
    assert not model.maps._load_state_dict_pre_hooks


def test_selection():
    """The owner's name selects all parts, a part's its own; "all-linear" those that a rule says."""

    def names(**config) -> list[str]:
        model = Model()
        fe.inject(model, fe.LoRAConfig(r=2, **config))
        return list(fe.adapters(model))

    assert len(names(target_modules=["maps"])) == 2 + E
    assert names(target_modules=["expert_1"]) == ["maps.expert_1"]
    assert names(target_modules="all-linear") == ["maps.kv", "maps.proj", "head"]
    assert len(names(target_modules=["maps"], exclude_modules=["kv"])) == 1 + E


def test_unfit_parts():
    """What cannot be adapted is refused by name, before anything changes."""
    config = fe.LoRAConfig(r=2, target_modules=["proj"])
    model = Model()
    model.maps.forward = model.maps.forward
    with pytest.raises(fe.TargetError, match=r"maps.proj: the forward of its Maps has been replaced"):
        fe.inject(model, config)
    model = Model()
    model.maps.down = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(fe.TargetError, match=r"maps.proj: its down has shape \[3, 3\], not \[12, 6\]"):
        fe.inject(model, config)
    model = Model()
    fe.inject(model, config)
    with pytest.raises(fe.TargetError, match=r"maps.proj: has adapters already"):
        fe.inject(model, config)


def test_tied_parts():
    """A weight that is shared with another parameter is never merged."""
    model = Model()
    model.maps.other = model.maps.down
    with pytest.warns(fe.EWCLoRAWarning, match=r"weight of 'maps.proj' is also maps.other"):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["proj"]))
    with pytest.raises(fe.TargetError, match=r"maps.other"):
        fe.merge(model)


def test_ewc_after_eject():
    """An EWC of ejected parts says so."""
    model, _ = pair()
    ewc = fe.EWC(model, ewc_lambda=1.0)
    ewc.end_task([data(0)], loss)
    fe.eject(model)
    with pytest.raises(fe.TargetError, match="make a new EWC"):
        ewc.penalty()
