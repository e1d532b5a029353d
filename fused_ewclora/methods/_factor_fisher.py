# SPDX-License-Identifier: Apache-2.0
"""The Fishers of lora_A and of lora_B, each by itself, from one pass over data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FisherError
from ..ewc.estimation import Data, LabelPolicy, batch_size_of, default_forward, run
from ..ewc.fisher_pass import FisherPass
from ..ewc.placement import LocalPlacement, sums_dtype
from ..ewc.restoring import Undo
from ..ewc.state import TaskFisher
from ..ewc.structures import Gathered, Parts
from ..ewc.structures.dense import Dense
from ..ewc.structures.structure import zeros
from ..layers.adapted import AdaptedLinear
from ..ops import schemas
from ..ops.capture import FisherCapture
from ..ops.dispatch import current_backend
from ..ops.sums import Term
from ..ops.windows import Windows
from .method import Loader, Loss

A, B = "A", "B"  # the parts of the Fisher of an adapter


class FactorSums:
    """Squared gradients of lora_A `[r, d_in]` and of lora_B `[rows, r]`.

    With dy_n the gradient of the output of sample n, they are those of two linear layers of rank r,

        dA_n = (dy_n B diag(s))^T x_n        dB_n = dy_n^T (x_n A^T diag(s)),

    so that no gradient of a sample is kept.
    """

    __slots__ = ("_b", "_left", "_name", "_parts")

    def __init__(
        self, parts: Parts, lora_a: Tensor, lora_b: Tensor, scale: float | Tensor, name: str
    ) -> None:
        dtype = parts[A].dtype
        wide_a, self._b = lora_a.detach().to(dtype), lora_b.detach().to(dtype) * scale
        self._left = wide_a.T * scale
        self._parts, self._name = parts, name

    @torch.no_grad()
    def add(self, term: Term, mode: str, weight: float) -> None:
        """Adds weight times the squares of the samples (mode "sample"), or of their sum (mode "batch")."""
        if term.dy.shape[-1] != self._b.shape[0]:
            raise FisherError(
                f"{self._name}: one call of the layer computes {term.dy.shape[-1]} of the {self._b.shape[0]} "
                "outputs of an adapter, and another one the others, so that no call has the gradient of "
                "lora_A; give each of them an adapter of its own (slices)"
            )
        if not term.dy.numel():
            return
        dtype, backend = self._b.dtype, current_backend()
        dy = term.dy.to(dtype)
        with torch.autocast(dy.device.type, enabled=False):
            inner = dy @ self._b
            if isinstance(term.x, Windows):
                windows = term.x.to(dtype)
                outer = torch.cat([x @ self._left for x, _ in windows.pieces(dy)])
                windows.accumulate_into_(self._parts[A], inner, mode, weight)
            else:
                x = term.x.to(dtype)
                outer = x @ self._left
                schemas.fisher_accumulate_(self._parts[A], x, inner, mode, weight, term.offsets, backend)
            schemas.fisher_accumulate_(self._parts[B], outer, dy, mode, weight, term.offsets, backend)


class FactorPlacement(LocalPlacement):
    """A model that is whole in this process, whose passes gather the Fishers of the factors."""

    def capture(
        self, structure: Gathered, layer: AdaptedLinear, *options: Any
    ) -> tuple[FisherCapture, list[Parts]]:
        """As `Placement.capture`; these sums depend on the adapters, of which a structure knows nothing."""
        parts, sums = [], []
        names = {ref.index: ref.key for ref in self.refs if ref.layer is layer}
        for index, (piece, lora_a, lora_b) in enumerate(layer.adapter_parameters()):
            shapes = {A: (piece.r, layer.in_features), B: (piece.row_count, piece.r)}
            own = zeros(shapes, sums_dtype(layer), layer.weight.device)
            parts.append(own)
            sums.append(FactorSums(own, lora_a, lora_b, layer.adapter_scale(piece), names[index]))
        return FisherCapture(sums, [piece.rows for piece in layer.adapter_slices], *options), parts


def factor_fisher(
    model: nn.Module,
    placement: FactorPlacement,
    loader: Loader,
    loss_fn: Loss | None,
    *,
    mode: str,
    labels: str,
    allow_empty: bool,
) -> TaskFisher:
    """Sums over the data of this process, in eval mode; errors are those of `EWC.estimate_fisher`."""
    policy = LabelPolicy(labels, loss_fn)
    device = placement.refs[0].layer.weight.device
    data = Data(loader, device, default_forward, batch_size_of, None, None)
    running = FisherPass(
        placement, Dense(), mode, policy.backward_reduction, check_samples=policy.check_samples
    )
    running.samples, running.allow_empty = 0, allow_empty
    undo = Undo()
    with torch.inference_mode(False), undo, undo:
        checks = run(model, data, policy, running, undo, True, lambda started, undone: started.start(undone))
        task = running.result(policy.labels, True)
        checks.warn()
    return task
