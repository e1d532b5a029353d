# SPDX-License-Identifier: Apache-2.0
"""The mean gradient of the weights over the data of a task, gathered by a Fisher pass without squares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layers.adapted import AdaptedLinear
from ..ops.sums import GradientSums
from . import estimation as passes
from .fisher_pass import FisherPass
from .placement import LocalPlacement
from .restoring import Undo
from .structures import Extent


class Gradients:
    """dL/dW of the rows of an adapter, `[rows, d_in]`, L the sum of the losses of samples."""

    quantity: ClassVar[str] = "gradient"
    by_rows: ClassVar[frozenset[str]] = frozenset({""})

    def sum_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """The gradient."""
        return {"": (extent.count, extent.columns)}

    def sums(self, parts: Mapping[str, Tensor]) -> GradientSums:
        """The gradient."""
        return GradientSums(parts[""])


def gradient_sums(
    model: nn.Module,
    layers: dict[str, AdaptedLinear],
    loader: Iterable[Any],
    loss_fn: passes.LossFunction | None = None,
    *,
    forward: passes.Forward = passes.default_forward,
    max_batches: int | None = None,
    allow_empty: bool = False,
) -> tuple[dict[str, Tensor], int]:
    """(sum over samples of dL_n/dW at W + B diag(s) A, by Fisher key, `[rows, d_in]` in fp32, fp64 beside
    fp64 layers; the number of samples), in eval mode, of the data of this process.

    loader, loss_fn, forward, max_batches and allow_empty are those of `EWC.estimate_fisher`, whose checks of
    the loss, of batches and of layers that no gradient reaches apply, and whose errors are raised. The order
    of rows has no influence, so that it is not looked for.
    """
    policy = passes.LabelPolicy("empirical", loss_fn)
    device = next(iter(layers.values())).weight.device
    data = passes.Data(loader, device, forward, passes.batch_size_of, max_batches, False)
    running = FisherPass(
        LocalPlacement(model, layers), Gradients(), "gradient", policy.backward_reduction, check_samples=False
    )
    running.samples, running.allow_empty = 0, allow_empty
    undo = Undo()
    with torch.inference_mode(False), undo, undo:
        passes.run(model, data, policy, running, undo, True, _start)
        found = running.result(policy.labels, True)
    return found.buffers, found.samples


def _start(running: FisherPass, undo: Undo) -> None:
    running.start(undo)
