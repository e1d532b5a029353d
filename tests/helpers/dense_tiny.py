# SPDX-License-Identifier: Apache-2.0
"""The model of tiny_models.py with explicit weights W + Delta W, in plain autograd: what methods are checked
against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_models import KEYS, WIDTH, Tiny
from torch import Tensor, nn
from torch.func import functional_call

ROWS = {"qkv.k": ("qkv", WIDTH), "qkv.v": ("qkv", 2 * WIDTH), "fc": ("fc", 0)}  # layer, first row


class Dense:
    """Base weights `[d_out, d_in]` by layer, a trained head, and copies of the adapters by Fisher key."""

    def __init__(self, model: nn.Module) -> None:
        self.model = Tiny().double()
        self.weights = {name: getattr(model, name).weight.detach().clone() for name in ("qkv", "fc")}
        self.constant = {f"{name}.bias": getattr(model, name).bias.detach().clone() for name in ("qkv", "fc")}
        self.head = {
            f"head.{name}": p.detach().clone().requires_grad_() for name, p in model.head.named_parameters()
        }
        self.read_adapters(model)

    def read_adapters(self, model: nn.Module) -> None:
        """New leaves with the values of lora_A, lora_B and, where there is one, lora_scale."""
        parameters = dict(model.named_parameters())
        self.a, self.b, self.w = {}, {}, {}
        for key in KEYS:
            layer, _, piece = key.partition(".")
            for table, leaf in ((self.a, "lora_A"), (self.b, "lora_B"), (self.w, "lora_scale")):
                name = f"{layer}.{leaf}" + (f"_{piece}" if piece else "")
                if name in parameters:
                    table[key] = parameters[name].detach().clone().requires_grad_()

    def delta(self, key: str) -> Tensor:
        """B diag(w) A, rank after rank."""
        a, b = self.a[key], self.b[key]
        w = self.w.get(key, torch.ones(a.shape[0], dtype=a.dtype))
        total = torch.zeros(b.shape[0], a.shape[1], dtype=a.dtype)
        for k in range(a.shape[0]):
            total = total + torch.outer(b[:, k], a[k]) * w[k]
        return total

    def weight(self, layer: str) -> Tensor:
        """W + Delta W of one layer."""
        parts = {first: self.delta(key) for key, (name, first) in ROWS.items() if name == layer}
        rows, first = [], 0
        for start, part in sorted(parts.items()):
            rows += [torch.zeros(start - first, WIDTH, dtype=part.dtype), part]
            first = start + part.shape[0]
        return self.weights[layer] + torch.cat(rows)

    def logits(self, x: Tensor) -> Tensor:
        """What the adapted model should compute."""
        weights = {f"{name}.weight": self.weight(name) for name in ("qkv", "fc")}
        return functional_call(self.model, {**weights, **self.constant, **self.head}, (x,))

    def weight_gradients(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """d loss / d Delta W by Fisher key: the rows of the gradient of W."""
        held = self.weights
        self.weights = {name: weight.clone().requires_grad_() for name, weight in held.items()}
        found = torch.autograd.grad(loss(), list(self.weights.values()))
        by_layer = dict(zip(self.weights, found, strict=True))
        self.weights = held
        return {key: by_layer[layer][first : first + WIDTH] for key, (layer, first) in ROWS.items()}

    def merge(self) -> None:
        """W <- W + Delta W."""
        self.weights = {name: self.weight(name).detach() for name in self.weights}

    def assert_is(self, model: nn.Module, atol: float = 1e-9) -> None:
        """The adapted model has the same weights, products, head and gates."""
        parameters = dict(model.named_parameters())
        for layer in ("qkv", "fc"):
            close(parameters[f"{layer}.weight"], self.weights[layer], atol, f"{layer}.weight")
            close(
                getattr(model, layer).consolidated_weight(), self.weight(layer), atol, f"{layer} as it runs"
            )
        for name, value in self.head.items():
            close(parameters[name], value, atol, name)
        for key, value in self.w.items():
            layer, _, piece = key.partition(".")
            name = f"{layer}.lora_scale" + (f"_{piece}" if piece else "")
            close(parameters[name], value, atol, name)


def close(found: Tensor, expected: Tensor, atol: float, what: str) -> None:
    """Rounding of a few dozen fp64 steps, far below anything that a wrong formula would give."""
    assert found.shape == expected.shape, what
    worst = float((found.detach() - expected.detach()).abs().max()) if found.numel() else 0.0
    assert worst <= atol, f"{what}: error {worst:.3g} > {atol:.3g}"
