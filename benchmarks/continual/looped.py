# SPDX-License-Identifier: Apache-2.0
"""SD-LoRA as its official code runs it: a Python loop over the directions of earlier tasks in every layer.

The peer of `costs`, in plain PyTorch, without the file access and the rebuilding of layers in the official
code. It is built from an `SDLoRA(normalization="factors")` and computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.errors import ArgumentError
from fused_ewclora.layers.adapted import AdaptedLinear
from fused_ewclora.layers.slices import AdapterSlice
from fused_ewclora.methods import SDLoRA
from fused_ewclora.methods._directions import Directions


class LoopedAdapter(nn.Module):
    """alpha_t x (B_t A_t)^T + sum_i alpha_i x (B_i A_i)^T / (||B_i|| ||A_i||), on the rows [start, stop)."""

    def __init__(self, layer: AdaptedLinear, piece: AdapterSlice) -> None:
        super().__init__()
        ((self.start, self.stop),) = piece.rows
        now = Directions.of(layer, piece)
        # A column of lora_past_scale is nonzero at the ranks of its direction.
        ranks = [int(column.count_nonzero()) for column in now.lora_past_scale.T]
        self.past_a = _frozen(now.lora_past_A.split(ranks))
        self.past_b = _frozen(now.lora_past_B.split(ranks, dim=1))
        self.a, self.b = (nn.Parameter(value.detach().clone()) for value in (now.lora_A, now.lora_B))
        self.alphas = nn.ParameterList(nn.Parameter(alpha.detach().clone()) for alpha in now.lora_magnitudes)

    def forward(self, x: Tensor) -> Tensor:
        total = self.alphas[-1] * F.linear(F.linear(x, self.a), self.b)
        # The last alpha belongs to self.a.
        for alpha, a, b in zip(self.alphas, self.past_a, self.past_b, strict=False):
            total = total + alpha * F.linear(F.linear(x, a), b) / (b.norm() * a.norm())
        return total


class LoopedLinear(nn.Module):
    """A frozen linear and its adapters, each added to its rows."""

    def __init__(self, layer: AdaptedLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.adapters = nn.ModuleList(LoopedAdapter(layer, piece) for piece in layer.adapter_slices)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        for adapter in self.adapters:
            y[..., adapter.start : adapter.stop] += adapter(x)
        return y


def unstack_(method: SDLoRA) -> nn.Module:
    """Replaces the layers of the method's model and returns it; the method cannot be used afterwards.

    Raises `ArgumentError` for other normalizations, whose norms the loop lacks, for shared magnitudes and for
    a penalty.
    """
    if method.normalization != "factors":
        raise ArgumentError(f"normalization: expected 'factors', got {method.normalization!r}")
    if method.magnitudes != "per_adapter":
        raise ArgumentError(f"magnitudes: expected 'per_adapter', got {method.magnitudes!r}")
    if method.ewc is not None:
        raise ArgumentError("ewc_lambda: expected None, the loop has no penalty")
    for name, layer in fe.adapters(method.model).items():
        method.model.set_submodule(name, LoopedLinear(layer))
    return method.model


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters of the adapters of a looped model, including frozen directions and magnitudes."""
    for module in model.modules():
        if isinstance(module, LoopedAdapter):
            yield from module.parameters()


def _frozen(values: tuple[Tensor, ...]) -> nn.ParameterList:
    return nn.ParameterList(
        nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
        for value in values
    )
