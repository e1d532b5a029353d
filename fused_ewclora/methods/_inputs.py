# SPDX-License-Identifier: Apache-2.0
"""The uncentred covariance of the inputs of adapted layers, and the sum of inputs over batches, from one pass
over data without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, TargetError
from ..ewc.estimation import Forward, evaluation_mode, limited, to_device, unwrapped
from ..ewc.fisher_pass import eager
from ..layers.adapted import AdaptedLinear
from ..layers.finite import nonfinite
from .method import Loader

Rows = Iterator[Tensor]


def _plus_products(name: str, total: Tensor | None, pieces: Rows) -> Tensor | None:
    """total + x^T x `[d_in, d_in]`: products in fp32 (fp64 for fp64), added up in fp64."""
    for rows in pieces:
        product = (rows.T @ rows).double()
        total = product if total is None else total.add_(product)
    return total


def _plus_rows(name: str, total: Tensor | None, pieces: Rows) -> Tensor | None:
    """total + x `[rows, d_in]`, in fp32 (fp64 for fp64)."""
    rows = torch.cat(list(pieces))
    if total is not None and total.shape != rows.shape:
        raise ArgumentError(
            f"loader: expected batches of one size, whose rows variant 'official' adds up, got inputs of "
            f"{name} with {total.shape[0]} and {rows.shape[0]} rows; leave the last batch out (drop_last), "
            "or take variant 'paper'"
        )
    return rows.clone() if total is None else total.add_(rows)


Add = Callable[[str, Tensor | None, Rows], Tensor | None]


@contextmanager
def _summing(layers: Mapping[str, AdaptedLinear], plus: Add) -> Iterator[dict[str, Tensor]]:
    """Every call of a layer inside the block adds its input to its sum."""
    sums: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def add(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["x"]).detach()
            with torch.autocast(x.device.type, enabled=False):
                wide = torch.promote_types(x.dtype, torch.float32)
                total = plus(name, sums.get(name), (piece.to(wide) for piece in layer.input_rows(x)))
                if total is not None:
                    sums[name] = total

        return add

    handles = [layer.register_forward_pre_hook(hook_for(n), with_kwargs=True) for n, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_covariances(
    model: nn.Module,
    layers: Mapping[str, AdaptedLinear],
    loader: Loader,
    max_batches: int | None,
    forward: Forward,
) -> dict[str, Tensor]:
    """C = sum of x^T x over all rows of a layer's inputs, `[d_in, d_in]` fp64 by name, in eval mode, of the
    data of this process.

    Nothing is kept per sample, and a packed projection is counted once for all of its adapters. Raises
    `ArgumentError` for no batches or values that are not finite, `TargetError` for layers that never ran.
    """
    sums = _gathered(model, layers, loader, max_batches, forward, _plus_products)
    for name, layer in layers.items():
        if name not in sums:  # an expert without tokens
            sums[name] = torch.zeros(
                layer.in_features, layer.in_features, dtype=torch.float64, device=layer.weight.device
            )
    return {name: sums[name] for name in layers}


@torch.no_grad()
def input_sums(
    model: nn.Module,
    layers: Mapping[str, AdaptedLinear],
    loader: Loader,
    max_batches: int | None,
    forward: Forward,
) -> dict[str, Tensor]:
    """S = sum of the inputs x `[rows, d_in]` over calls, row by row, by name, in eval mode, of the data of
    this process.

    Raises as `input_covariances`, and `ArgumentError` for calls with different numbers of rows.
    """
    sums = _gathered(model, layers, loader, max_batches, forward, _plus_rows)
    if missed := [name for name in layers if name not in sums]:
        raise TargetError(
            f"{missed[0]}: no rows reached the layer, as an expert without tokens; variant 'official' needs "
            "as many in every batch, take variant 'paper'"
        )
    return {name: sums[name] for name in layers}


def _gathered(
    model: nn.Module,
    layers: Mapping[str, AdaptedLinear],
    loader: Loader,
    max_batches: int | None,
    forward: Forward,
    plus: Add,
) -> dict[str, Tensor]:
    """The sums of the layers that had rows, after a pass in which all of them ran."""
    device = next(iter(layers.values())).weight.device
    batches, before = 0, {name: layer.forward_calls for name, layer in layers.items()}
    with eager(), evaluation_mode(model), _summing(layers, plus) as sums:
        for batch in limited(loader, max_batches, None, "Inputs"):
            forward(unwrapped(model), to_device(batch, device))
            batches += 1
    if batches == 0:
        raise ArgumentError("loader: expected at least one batch, got none; an iterator serves one pass only")
    unrun = (name for name, layer in layers.items() if layer.forward_calls == before[name])
    if missed := [name for name in unrun if name not in sums]:
        raise TargetError(
            f"{missed[0]}: the layer's forward never ran ({len(missed)} such layers), so its inputs are not "
            "known. The model reads its weight directly or skips it; leave it out with exclude_modules"
        )
    if bad := nonfinite(sums):
        raise ArgumentError(
            f"loader: expected finite inputs of {bad[0]}, got NaN or Inf; nothing was changed"
        )
    return sums
