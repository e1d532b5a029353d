# SPDX-License-Identifier: Apache-2.0
"""A model whose linear maps are parameters of a module, and the same model of linear layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import randomize_adapters_
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.layers import bypass, parts
from fused_ewclora.layers.parts import Part

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


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the maps known for one test."""

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


def pair(lora_alpha: float | None = 3.0) -> tuple[Model, Dense]:
    """Both forms with equal adapters on everything; those of `model` have the names of parts."""
    torch.manual_seed(0)
    model = Model().double()
    dense = Dense(model).double()
    slices = {"slices": ("k", "v"), "layout": LAYOUT}
    for other, others in (
        (model, ["proj", *(f"expert_{e}" for e in range(E))]),
        (dense, r"proj|experts\.\d"),
    ):
        fe.inject(other, fe.LoRAConfig(r=2, lora_alpha=lora_alpha, target_modules=["kv"], **slices))
        fe.inject(other, fe.LoRAConfig(r=2, lora_alpha=lora_alpha, target_modules=others))
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
