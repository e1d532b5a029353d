# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weight is stored in few bits, as the layers of quantisation libraries are, and its
adapted form. All of it is exact in fp64, unlike in those libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import seeding
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ewclora.layers.matching import register_adapted_class
from fused_ewclora.layers.quantised import QuantisedLinear

LEVELS = 7  # codes from -7 to 7
D_IN, HIDDEN, CLASSES = 6, 10, 4


class FewBits(nn.Linear):
    """x W^T + bias with W = codes * scales, one scale per row; the scales are no buffer, as in
    bitsandbytes."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__(d_in, d_out, bias, dtype=torch.float64)
        codes, self.scales = quantise(self.weight.detach())
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scales.to(x.dtype)[:, None], self.bias)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1).clamp(min=1e-30) / LEVELS
    return (weight / scales[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8), scales


class FewBitsQuantisation:
    """How the above are stored and multiplied."""

    def product(self, module: Any, x: Tensor) -> Tensor:
        return FewBits.forward(module, x)

    def stored(self, module: Any) -> dict[str, Tensor]:
        return {"codes": module.weight.detach(), "scales": module.scales}

    def numbers(self, module: Any, dtype: torch.dtype, stored: Mapping[str, Tensor] | None = None) -> Tensor:
        tensors = {**self.stored(module), **(stored or {})}
        return (tensors["codes"] * tensors["scales"][:, None]).to(dtype)

    def quantised(self, module: Any, new: Tensor) -> dict[str, Tensor]:
        return dict(zip(("codes", "scales"), quantise(new), strict=True))

    def kind(self, module: Any) -> str:
        return "few bits"

    def dtype(self, module: Any) -> torch.dtype:
        return torch.float64


class LoRAFewBits(QuantisedLinear, FewBits):
    """The adapted form."""

    plain = FewBits
    quantisation = FewBitsQuantisation()

    @classmethod
    def unfit(cls, module: nn.Module) -> str | None:
        return None


register_adapted_class(LoRAFewBits)


class FewBitsMLP(nn.Module):
    """Two hidden layers in few bits and a head, in fp64."""

    def __init__(self, linear: type[nn.Linear] = FewBits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = linear(D_IN, HIDDEN)
        self.fc2 = linear(HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, CLASSES, dtype=torch.float64)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def batch(seed: int, samples: int = 7, d_in: int = D_IN, dtype: torch.dtype = torch.float64):
    """(x, labels)."""
    generator = seeding.generator(seed)
    x = torch.randn(samples, d_in, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)
