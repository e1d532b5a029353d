# SPDX-License-Identifier: Apache-2.0
"""The published formulation of LoRA: every forward pass forms dW = B A and multiplies the input by it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe


class ExplicitDelta(nn.Module):
    """A frozen linear layer that adds x dW^T, dW = B A, to the rows of each adapter: `y[rows] += x dW^T`.

    It shares weight and bias with `layer` and has trainable copies of its adapters: `pairs` holds A and B of
    each adapter in turn.
    """

    def __init__(self, layer: fe.AdaptedLinear) -> None:
        super().__init__()
        adapters = layer.adapter_parameters()
        self.weight, self.bias = layer.weight, layer.bias
        self.rows = [piece.rows[0] for piece, _, _ in adapters]
        self.pairs = nn.ParameterList(
            nn.Parameter(factor.detach().clone()) for _, a, b in adapters for factor in (a, b)
        )

    def deltas(self) -> list[Tensor]:
        """dW of every adapter."""
        return [b @ a for a, b in zip(self.pairs[0::2], self.pairs[1::2], strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]` -> `[..., out_features]`."""
        y = F.linear(x, self.weight, self.bias)
        deltas = [delta.to(x.dtype) for delta in self.deltas()]
        if len(deltas[0]) == y.shape[-1]:
            return y + F.linear(x, deltas[0])
        parts, end = [], 0
        for (start, stop), delta in zip(self.rows, deltas, strict=True):
            parts += [y[..., end:start], y[..., start:stop] + F.linear(x, delta)]
            end = stop
        return torch.cat([*parts, y[..., end:]], dim=-1)


def replace_with_explicit_(model: nn.Module, layers: Mapping[str, fe.AdaptedLinear]) -> list[ExplicitDelta]:
    """Replaces the submodules of these names by `ExplicitDelta` of these layers; returns the new layers."""
    replaced = []
    for name, layer in layers.items():
        explicit = ExplicitDelta(layer)
        model.set_submodule(name, explicit)
        replaced.append(explicit)
    return replaced
