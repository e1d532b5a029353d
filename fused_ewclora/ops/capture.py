"""Collects the Fisher of one layer from inside the backward of its op.

Module hooks fire twice under activation checkpointing; the op's backward runs once per call of the layer in
the forward pass, whatever is recomputed. A layer called several times in one forward (weight sharing) has one
gradient per sample, the sum over its calls, so its calls are joined along the token axis before anything is
squared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError, FisherError
from . import schemas
from .dispatch import current_backend

Rows = tuple[tuple[int, int], ...]
MODES = ("sample", "batch")
REDUCTIONS = ("mean", "sum")


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class FisherCapture:
    """Accumulates the unnormalised Fisher of a layer's adapters, in place, during backward.

    Args:
        fishers: one buffer `[rows of the adapter, d_in]` per adapter, fp32 (fp64 for fp64 layers), in the
            order of the adapters.
        rows: output row ranges of each adapter, in the same order.
        mode: `"sample"` adds sum_n g_n^2 with g_n the gradient of the loss of sample n; `"batch"` adds
            n_b * (mean of g_n)^2. The caller divides by the number of samples at the end.
        reduction: how the loss that is backpropagated reduces over samples, `"mean"` or `"sum"`.
        loss_scale: factor on the loss (gradient scaling); squares are divided by its square, in fp32.
        batch_size: samples per batch; None takes the leading dimension of the layer's input. May be set
            before each batch.
    """

    def __init__(
        self,
        fishers: list[Tensor],
        rows: list[Rows],
        mode: str = "sample",
        reduction: str = "mean",
        loss_scale: float = 1.0,
        batch_size: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ArgumentError(f"mode: expected one of {MODES}, got {mode!r}")
        if reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
        if len(fishers) != len(rows):
            raise ArgumentError(f"rows: expected {len(fishers)} entries, one per Fisher, got {len(rows)}")
        self.fishers, self.rows = fishers, rows
        self.mode, self.reduction, self.loss_scale, self.batch_size = mode, reduction, loss_scale, batch_size
        self.samples = 0
        self.batches = 0
        self._calls = 0  # calls of the layer in the latest forward pass
        # That forward pass had a backward; a retained graph may have more, each with as many calls.
        self._closed = False
        self._held: list[tuple[Tensor, Tensor]] = []

    def note_forward(self) -> None:
        """Count a call of the layer, but not its recomputation under checkpointing, inside a backward."""
        if _inside_backward():
            return
        if self._held:
            self.finish()
        if self._closed:
            self._calls, self._closed = 0, False
        self._calls += 1

    def record(self, x: Tensor, dy: Tensor) -> None:
        """Take x `[..., d_in]` and dy `[..., d_out]` of one call; called from the op's backward."""
        self._held.append((self._by_sample(x), self._by_sample(dy)))
        if len(self._held) >= self._calls:
            self.finish()

    def finish(self) -> None:
        """Accumulate what is held back for calls whose output took no part in the loss; call it after the
        last backward."""
        held, self._held, self._closed = self._held, [], True
        if not held:
            return
        sizes = sorted({x.shape[0] for x, _ in held})
        if len(sizes) > 1:
            raise FisherError(
                f"batch_size: a layer was called with {sizes} samples in one forward pass; give their number"
            )
        x = held[0][0] if len(held) == 1 else torch.cat([x for x, _ in held], dim=1)
        dy = held[0][1] if len(held) == 1 else torch.cat([dy for _, dy in held], dim=1)
        self._accumulate(x, dy)

    def _by_sample(self, tensor: Tensor) -> Tensor:
        """`[N, T, d]`; extra dimensions are tokens, and samples spread over several leading rows (windows)
        are rejoined."""
        leading = tensor.shape[0] if tensor.dim() > 1 else 1
        if leading == 0:  # an empty batch adds nothing
            return tensor.reshape(0, 1, tensor.shape[-1])
        samples = self.batch_size or leading
        count = tensor.numel() // tensor.shape[-1]
        if leading % samples:
            raise FisherError(
                f"batch_size: {samples} samples do not divide the {leading} leading rows of a layer's input; "
                "the tokens of one sample must arrive in one batch, samples first"
            )
        return tensor.reshape(samples, count // samples, tensor.shape[-1])

    def _factor(self, samples: int) -> float:
        if self.mode == "sample":
            factor = float(samples) ** 2 if self.reduction == "mean" else 1.0
        else:
            factor = float(samples) if self.reduction == "mean" else 1.0 / samples
        return factor / self.loss_scale**2

    def _accumulate(self, x: Tensor, dy: Tensor) -> None:
        samples = x.shape[0]
        if samples == 0:
            return
        for index, ranges in enumerate(self.rows):
            parts = [dy[..., start:stop] for start, stop in ranges]
            dy_rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            self._add(index, x, dy_rows, self._factor(samples))
        self.samples += samples
        self.batches += 1

    def _add(self, index: int, x: Tensor, dy: Tensor, weight: float) -> None:
        self._accumulate_into(self.fishers[index], x, dy, weight)

    def _accumulate_into(self, fisher: Tensor, x: Tensor, dy: Tensor, weight: float) -> None:
        schemas.fisher_accumulate_(fisher, x, dy, self.mode, weight, None, current_backend())
