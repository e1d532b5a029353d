# SPDX-License-Identifier: Apache-2.0
"""SD-LoRA written out with dense matrices and loops, in fp64, for the model of tiny_models.py."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import KEYS, WIDTH, Tiny, batches, data
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import SDLoRA
from fused_ewclora.methods._directions import Directions

# The options of the official code.
OFFICIAL = {
    "normalization": "factors",
    "magnitudes": "shared",
    "alpha_init": 0.8,
    "reset_alphas": True,
}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.5)


def train(method: SDLoRA, seed: int, steps: int = 2) -> None:
    optimizer = optimizer_of(method.model)
    for step in range(steps):
        x, y = data(8, seed=100 * seed + step, dtype=next(method.model.head.parameters()).dtype)
        optimizer.zero_grad()
        (F.cross_entropy(method.model(x), y) + method.penalty()).backward()
        optimizer.step()
        method.after_step(step, steps)


def run(method: SDLoRA, tasks: range, steps: int = 2) -> None:
    dtype = next(method.model.head.parameters()).dtype
    for task in tasks:
        method.begin_task(task)
        train(method, task, steps)
        method.end_task(batches(*data(6, seed=task, dtype=dtype), 4), F.cross_entropy)


def directions(model: nn.Module) -> dict[str, Directions]:
    found = [
        Directions.of(layer, piece) for layer in fe.adapters(model).values() for piece in layer.adapter_slices
    ]
    return dict(zip(KEYS, found, strict=True))


class Literal:
    """One matrix per direction; nothing is shared with what it tests but the random A of each task."""

    def __init__(
        self,
        model: Tiny,
        normalization: str = "product",
        alpha_init: float = 1.0,
        reset_alphas: bool = False,
        kd_threshold: float | None = None,
        ewc_lambda: float = 0.0,
        gamma: float = 1.0,
        magnitudes: str = "per_adapter",
    ) -> None:
        self.model, self.normalization, self.alpha_init = model, normalization, alpha_init
        self.shared = magnitudes == "shared"
        self.reset_alphas, self.threshold = reset_alphas, kd_threshold
        self.ewc_lambda, self.gamma = ewc_lambda, gamma
        self.weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        self.head = copy.deepcopy(model.head)
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        self.alphas: dict[str, list[Tensor]] = {key: [] for key in KEYS}
        self.past: dict[str, list[Tensor]] = {key: [] for key in KEYS}
        self.lengths: dict[str, list[Tensor]] = {key: [] for key in KEYS}  # to divide by in the next task
        self.residuals: dict[str, list[float]] = {key: [] for key in KEYS}
        self.fishers: dict[str, Tensor] = {}
        self.anchors: dict[str, Tensor] = {}

    def begin(self, task: int, drawn: dict[str, Any]) -> None:
        for key in KEYS:
            self.a[key] = drawn[key].lora_A.detach().clone().requires_grad_()
            # A task starts at B = 0, but for the first one, which starts with what the test put there.
            start = drawn[key].lora_B if task == 0 else torch.zeros_like(drawn[key].lora_B)
            self.b[key] = start.detach().clone().requires_grad_()
            if self.shared and key != KEYS[0]:
                self.alphas[key] = self.alphas[KEYS[0]]
                continue
            kept = [self.alpha_init if self.reset_alphas else a.item() for a in self.alphas[key]]
            self.alphas[key] = [
                torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (*kept, self.alpha_init)
            ]
        for key, lengths in self.lengths.items():
            self.past[key] = [d / n for d, n in zip(self.past[key], lengths, strict=True)]
            self.lengths[key] = [torch.ones_like(n) for n in lengths]

    def parameters(self) -> list[Tensor]:
        return [
            *self.a.values(),
            *self.b.values(),
            *(alpha for key in KEYS[: 1 if self.shared else None] for alpha in self.alphas[key]),
            *self.head.parameters(),
        ]

    def delta(self, key: str) -> Tensor:
        total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for alpha, direction in zip(self.alphas[key], self.past[key], strict=False):
            total = total + alpha * direction
        if len(self.alphas[key]) > len(self.past[key]):
            product = self.b[key] @ self.a[key]
            if self.normalization == "product" and bool(product.any()):
                product = product / product.square().sum().sqrt()
            total = total + self.alphas[key][-1] * product
        return total

    def forward(self, x: Tensor, deltas: dict[str, Tensor] | None = None) -> Tensor:
        deltas = {key: self.delta(key) for key in KEYS} if deltas is None else deltas
        nothing = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        qkv = self.weights["qkv.weight"] + torch.cat([nothing, deltas["qkv.k"], deltas["qkv.v"]])
        plain = Tiny().double()
        weights = {
            "qkv.weight": qkv,
            "qkv.bias": self.weights["qkv.bias"],
            "fc.weight": self.weights["fc.weight"] + deltas["fc"],
            "fc.bias": self.weights["fc.bias"],
            "head.weight": self.head.weight,
            "head.bias": self.head.bias,
        }
        return torch.func.functional_call(plain, weights, (x,))

    def penalty(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for key, fisher in self.fishers.items():
            total = (
                total + self.ewc_lambda / 2 * (fisher * (self.delta(key) - self.anchors[key]).square()).sum()
            )
        return total

    def end(self, loader: list[tuple[Tensor, Tensor]]) -> None:
        samples = [(x[i : i + 1], y[i : i + 1]) for x, y in loader for i in range(len(x))]
        if self.ewc_lambda:
            task = self.squared_gradients(samples)
            for key in KEYS:
                old = self.fishers.get(key, torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
                self.fishers[key] = self.gamma * old + task[key] / len(samples)
        with torch.no_grad():
            if self.shared:
                self.freeze(KEYS)
            for key in KEYS:
                if not self.shared:
                    self.freeze((key,))
                self.anchors[key] = self.delta(key)

    def squared_gradients(self, samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The sum over samples of the squared gradient of each matrix."""
        total = dict.fromkeys(KEYS, torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
        for x, y in samples:
            deltas = {key: self.delta(key).detach().requires_grad_() for key in KEYS}
            loss = F.cross_entropy(self.forward(x, deltas), y)
            gradients = torch.autograd.grad(loss, list(deltas.values()))
            total = {key: total[key] + g.square() for key, g in zip(KEYS, gradients, strict=True)}
        return total

    def freeze(self, keys: tuple[str, ...]) -> None:
        """The current direction of adapters that have one magnitude together."""
        alpha = self.alphas[keys[0]].pop()
        directions, lengths = [], []
        for key in keys:
            product = self.b[key] @ self.a[key]
            length = product.square().sum().sqrt()
            if self.normalization == "factors":
                length = self.b[key].square().sum().sqrt() * self.a[key].square().sum().sqrt()
                alpha = alpha if self.shared else alpha * length
            later = self.normalization == "factors" and self.shared
            directions.append(product if later else product / length)
            lengths.append(length if later else torch.ones_like(length))
        whole = torch.cat([d.flatten() for d in directions])
        share, coefficients = 1.0, torch.zeros(0)
        if self.past[keys[0]]:
            past = zip(*(self.past[key] for key in keys), strict=True)
            columns = torch.stack([torch.cat([d.flatten() for d in parts]) for parts in past], dim=1)
            coefficients = torch.linalg.lstsq(columns, whole[:, None]).solution[:, 0]
            left = whole - columns @ coefficients
            share = float(left.square().sum() / whole.square().sum())
        alphas, dropped = self.alphas[keys[0]], self.threshold is not None and share <= self.threshold
        if dropped:
            alphas = [a + alpha * c for a, c in zip(alphas, coefficients, strict=True)]
        else:
            alphas = [*alphas, alpha]
        for key, direction, length in zip(keys, directions, lengths, strict=True):
            self.residuals[key].append(share)
            self.alphas[key] = alphas
            if not dropped:
                self.past[key].append(direction)
                self.lengths[key].append(length)
