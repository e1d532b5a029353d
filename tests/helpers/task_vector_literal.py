# SPDX-License-Identifier: Apache-2.0
"""IEL and ITA written out with dense matrices and loops, in fp64, for the model of tiny_models.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from dense_tiny import Dense
from tiny_models import CLASSES, KEYS, WIDTH
from torch import Tensor, nn


class LiteralVectors(Dense):
    """One matrix per task vector; nothing is shared with what it tests but the random A of each task."""

    def __init__(self, model: nn.Module, joint: bool, strength: float, variant: str, scaling: float) -> None:
        super().__init__(model)
        self.joint, self.strength, self.variant, self.scaling = joint, strength, variant, scaling
        self.past: dict[str, list[Tensor]] = {key: [] for key in KEYS}
        self.sums: list[dict[str, Tensor]] = []  # by task, over its samples
        self.counts: list[int] = []
        self.state = "between"  # tasks; "base" without task vectors, "training"

    def own(self, key: str) -> Tensor:
        """D_t."""
        return self.scaling * self.b[key] @ self.a[key]

    def delta(self, key: str) -> Tensor:
        """What is added to W0."""
        total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        if self.state == "base":
            return total
        if self.state == "training":
            if not self.joint:
                return self.own(key)
            for vector in (*self.past[key], self.own(key)):
                total = total + vector / (len(self.past[key]) + 1)
            return total
        for vector in self.past[key]:
            total = total + vector / len(self.past[key])
        return total

    def begin(self, model: nn.Module, x: Tensor) -> None:
        """The Fisher of W0 on x: over samples and classes, p_c times the squared gradient of -log p_c."""
        self.read_adapters(model)
        self.state = "base"
        total = {key: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for key in KEYS}
        for n in range(len(x)):
            for label in range(CLASSES):
                p = self.logits(x[n : n + 1]).softmax(1)[0, label].detach()

                def loss(n: int = n, label: int = label) -> Tensor:
                    return F.cross_entropy(self.logits(x[n : n + 1]), torch.tensor([label]))

                for key, gradient in self.weight_gradients(loss).items():
                    total[key] += p * gradient.square()
        self.sums.append(total)
        self.counts.append(len(x))
        self.state = "training"

    def fisher(self, key: str) -> Tensor:
        t, ones = len(self.sums) - 1, torch.ones(WIDTH, WIDTH, dtype=torch.float64)
        if self.variant == "official" and not self.joint:
            if t == 0:
                return 1e-5 * ones
            return (1e-5 * ones + sum(s[key] for s in self.sums[:t])) / sum(self.counts[:t])
        mean: Any = sum(s[key] for s in self.sums) / sum(self.counts)
        return mean + 1e-5 * ones if self.variant == "official" else mean

    def penalty(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        t = len(self.sums)
        ratio = 0.5 if t == 1 and self.variant == "official" else 1.0 / t
        for key in KEYS:
            f, own = self.fisher(key), self.own(key)
            if not self.joint:
                total = total + self.strength / 2 * (f * own * own).sum()
                continue
            total = total + self.strength * 0.5 * (1 - ratio) * (f * own * own).sum()
            for vector in self.past[key]:
                total = total - self.strength * ratio * (f * own * vector).sum()
        return total

    def end(self) -> None:
        for key in KEYS:
            self.past[key].append(self.own(key).detach())
        self.state = "between"
