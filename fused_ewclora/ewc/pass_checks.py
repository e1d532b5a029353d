# SPDX-License-Identifier: Apache-2.0
"""What is checked of a Fisher pass beside its values: the loss, its targets, and the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import warn
from ..layers.adapted import AdaptedLinear
from ..ops.capture import CallIndex, FisherCapture, Source
from .batches import Batch, Forward, take_sample, take_samples
from .findings import ClassOrder
from .loss_check import Comparison, flat, judge
from .losses import LabelPolicy
from .placement import LocalPlacement, Placement

_COMPARED = 3  # samples; two alone may look like a sum by accident
_TRIED = 9  # samples, until a few together have a finite loss
# Forward passes of one and of two samples differ by the rounding of all layers, with TF32 about 1e-3 of it.
_MODEL_TOLERANCE = 1e-2


class Projection(FisherCapture):
    """In place of squares sums dy^T (x r), r random: linear in the gradient of the layer, whatever the order
    of its rows."""

    def __init__(self, columns: int) -> None:
        super().__init__([], [])
        self.total = torch.zeros(columns, dtype=torch.float64)
        self.eps = 0.0

    def note_forward(self, x: Tensor) -> None:
        """Nothing is held back."""

    def note_routed(self, source: Source, rows: Tensor) -> None:
        """Nothing is held back."""

    def record(self, x: Tensor, dy: Tensor, index: CallIndex = None, start: int | None = None) -> None:
        """Take x `[..., d_in]` and dy `[..., d_out]` of one call, whichever samples its rows belong to; dy
        may have only the columns from `start` on."""
        self.eps = max(self.eps, torch.finfo(dy.dtype).eps)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(x.shape[-1], generator=generator, dtype=torch.float64).to(x.device)
        rows, grads = x.detach().reshape(-1, x.shape[-1]), dy.detach().reshape(-1, dy.shape[-1])
        product = grads.double().T @ (rows.double() @ direction)
        self.total = self.total.to(product.device)
        self.total[start or 0 :][: len(product)] += product


class ModelCheck:
    """Compares the loss of a few samples of a batch with the losses of each, where the output of the model
    does not tell: by the gradients that arrive at the adapted layers, in forward and backward passes of their
    own.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, AdaptedLinear],
        forward: Forward,
        loss: Callable[[Any, Any], Tensor],
        reduction: str,
        clear_gradients: Callable[[], None],
        size_of: Callable[[Any], int],
    ) -> None:
        self._model, self._layers, self._forward, self._loss = model, layers, forward, loss
        self._reduction, self._clear, self._size_of = reduction, clear_gradients, size_of
        self._tolerance = _MODEL_TOLERANCE

    def fault(self, batch: Batch, samples: int) -> str | None:
        """Raises `FisherError` when the loss is no mean (sum) over samples; the reason why it cannot be told,
        or None."""
        try:
            size = self._size_of(take_samples(batch, slice(0, 2), samples))
        except Exception as error:
            return f"two samples cut from a batch cannot be counted: {error}"
        if size != 2:
            return f"two samples cut from a batch count as {size}"
        for start in range(0, min(samples - 1, _TRIED), _COMPARED):
            try:
                compared = self._compared(batch, slice(start, min(start + _COMPARED, samples)), samples)
            except Exception as error:
                return f"the loss of a few samples raises {type(error).__name__}: {error}"
            if compared:
                judge(compared, self._reduction, self._tolerance)
                return None
        return "the losses of the first samples are not finite, or have no gradient"

    def _compared(self, batch: Batch, rows: slice, samples: int) -> list[Comparison]:
        """The first two, three, ... of some samples together, and each alone; of those with a finite loss.

        A sample alone without a finite loss, as of ignored targets, in a batch that has one shows that the
        loss is no mean over samples.
        """
        singles = [self._gradient(take_sample(batch, i, samples)) for i in range(rows.start, rows.stop)]
        compared = []
        for count in range(2, len(singles) + 1):
            together = self._gradient(take_samples(batch, slice(rows.start, rows.start + count), samples))
            alone = torch.stack(singles[:count]).sum(0)
            if bool(torch.isfinite(together).all()) and bool(together.any() | alone.any()):
                compared.append(Comparison(together, alone, count))
        return compared

    def _gradient(self, batch: Batch) -> Tensor:
        """The projected gradients of all layers; NaN for a loss that is not finite."""
        before = {layer: layer.fisher_capture for layer in self._layers.values()}
        probes = {layer: Projection(layer.out_features) for layer in before}
        try:
            for layer, probe in probes.items():
                layer.fisher_capture = probe
            output, targets = self._forward(self._model, batch)
            loss = self._loss(output, targets)
            loss.backward()
        finally:
            for layer, capture in before.items():
                layer.fisher_capture = capture
            self._clear()
        self._tolerance = max([_MODEL_TOLERANCE, *(16 * probe.eps for probe in probes.values())])
        gradient = flat([probe.total for probe in probes.values()])
        return gradient if bool(torch.isfinite(loss)) else torch.full_like(gradient, torch.nan)


class PassChecks:
    """The checks of `EWC.estimate_fisher`, batch by batch.

    Flags on the device are read after batches 1, 2, 4, 8, ... and at the end of the pass.
    """

    def __init__(
        self, policy: LabelPolicy, placement: Placement, compare: ModelCheck, in_order: bool
    ) -> None:
        self._policy, self._findings, self._placement = policy, policy.findings, placement
        self._compare, self._compared = compare, not policy.check_samples
        self._order = ClassOrder() if in_order else None

    def at_end(self) -> None:
        """Raises `FisherError` for what the flags of all batches say."""
        self._findings.check()
        self._findings.check_counted()

    def after(self, batch: Batch, targets: Any, samples: int) -> None:
        """To be called after the backward passes of a batch."""
        number = self._findings.end_batch()
        if number & (number - 1) == 0:
            self._placement.agree(self._findings.check)
        if self._order is not None:
            self._order.note(targets)
        if self._policy.unproven and not self._compared and samples > 1:
            self._compared = True
            reason = "parameters are sharded"
            if isinstance(self._placement, LocalPlacement):
                reason = self._compare.fault(batch, samples) or ""
            if reason:
                warn(
                    f"loss_fn: it was not checked that the loss is a mean (or sum) over samples: {reason}. "
                    "If it is not, F is wrong. check_samples=False silences this"
                )

    def warn(self) -> None:
        """Warns when mode "batch" has seen the classes one after the other."""
        if self._order is not None and self._order.sorted():
            warn(
                "loader: every batch holds samples of a single class, another one than other batches. With "
                "fisher_mode='batch' F is then too large, up to several times; shuffle the loader"
            )
