"""The uncentred covariance of the inputs of adapted layers, from one pass over data without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


@contextmanager
def _summing(layers: Mapping[str, AdaptedLinear]) -> Iterator[dict[str, Tensor]]:
    """Every call of a layer inside the block adds x^T x `[d_in, d_in]` to its sum: products in fp32 (fp64 for
    fp64), added up in fp64."""
    sums: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def add(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["x"]).detach()
            with torch.autocast(x.device.type, enabled=False):
                for piece in layer.input_rows(x):
                    rows = piece.to(torch.promote_types(x.dtype, torch.float32))
                    product = (rows.T @ rows).double()
                    sums[name] = product if name not in sums else sums[name].add_(product)

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
    device = next(iter(layers.values())).weight.device
    batches, before = 0, {name: layer.forward_calls for name, layer in layers.items()}
    with eager(), evaluation_mode(model), _summing(layers) as sums:
        for batch in limited(loader, max_batches, False):
            forward(unwrapped(model), to_device(batch, device))
            batches += 1
    if batches == 0:
        raise ArgumentError("loader: expected at least one batch, got none; an iterator serves one pass only")
    for name, layer in layers.items():
        if name not in sums and layer.forward_calls > before[name]:  # an expert without tokens
            sums[name] = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=device)
    if missed := [name for name in layers if name not in sums]:
        raise TargetError(
            f"{missed[0]}: the layer's forward never ran ({len(missed)} such layers), so its inputs are not "
            "known. The model reads its weight directly or skips it; leave it out with exclude_modules"
        )
    if bad := nonfinite(sums):
        raise ArgumentError(
            f"loader: expected finite inputs of {bad[0]}, got NaN or Inf; nothing was changed"
        )
    return {name: sums[name] for name in layers}
