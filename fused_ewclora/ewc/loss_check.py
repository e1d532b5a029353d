# SPDX-License-Identifier: Apache-2.0
"""Whether a loss is the mean, or the sum, of the losses of its samples: a batch against a sample alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import FisherError
from .batches import mapped, rebuilt, take_sample, tensors_of

# A factor on the loss that is closer to 1 than this changes F by less than its own rounding in fp32 models.
_OUTPUT_TOLERANCE = 1e-4
_SMALL = 1e-3  # of the largest gradient of a batch


class Comparison(NamedTuple):
    """The gradient of one or more samples in a batch of `samples`, and the sum of those of each alone."""

    batch: Tensor
    alone: Tensor
    samples: int

    def factor(self, reduction: str) -> float:
        """alone / batch of a loss that reduces in this way."""
        return float(self.samples) if reduction == "mean" else 1.0


def judge(compared: Sequence[Comparison], reduction: str, tolerance: float) -> None:
    """Raises `FisherError` unless all gradients are those of a mean, or a sum, over samples."""
    ratios = [_ratio(one.batch * one.factor(reduction), one.alone, tolerance) for one in compared]
    other = "sum" if reduction == "mean" else "mean"
    swapped = [one.factor(reduction) / one.factor(other) for one in compared]
    if _all_near(ratios, [1.0] * len(ratios), tolerance):
        return
    if _all_near(ratios, swapped, tolerance):
        raise FisherError(
            f"reduction: the loss looks like a {other} over samples, expected a {reduction}; give "
            f"reduction={other!r}"
        )
    wrong = next(i for i, ratio in enumerate(ratios) if not _all_near([ratio], [1.0], tolerance))
    told = (
        "depends on the other samples"
        if ratios[wrong] is None
        else f"is {ratios[wrong]:.4g} times that of its own loss"
    )
    raise FisherError(
        f"loss_fn: expected a {reduction} of the losses of the samples, but in a batch of "
        f"{compared[wrong].samples} the gradient of a sample {told}. Likely causes are ignored targets, "
        "class weights, a mean over tokens, boxes or pixels, a normalisation over the batch, or a term "
        "that compares samples. Give a loss_fn that averages the losses of the samples, leave loss_fn out "
        "for -log p of the targets, or use batches of one sample; check_samples=False accepts the loss as "
        "it is"
    )


def _all_near(ratios: Sequence[float | None], expected: Sequence[float], tolerance: float) -> bool:
    pairs = zip(ratios, expected, strict=True)
    return all(ratio is not None and abs(ratio / value - 1) <= tolerance for ratio, value in pairs)


def _ratio(batch: Tensor, alone: Tensor, tolerance: float) -> float | None:
    """batch / alone where they are finite and parallel, else None; 1 where both are 0."""
    if not bool(torch.isfinite(alone).all()):
        return None
    size = float(alone.norm())
    if size == 0.0:
        return 1.0 if float(batch.norm()) == 0.0 else None
    ratio = float((batch * alone).sum()) / size**2
    return ratio if float((batch - ratio * alone).norm()) <= tolerance * float(batch.norm()) else None


class Watch:
    """Notes the gradient that a loss has at the output of the model, at two samples: where it is largest, and
    at the sample `turn`, which varies from batch to batch.

    The loss function takes `output` in place of that of the model. It is called again with a copy of each of
    the two samples alone, and never twice on the graph of the batch.
    """

    def __init__(self, output: Any, samples: int, turn: int) -> None:
        self._output, self._samples, self._turn = output, samples, turn % samples
        self._chosen: Tensor | None = None
        self._rows: dict[int, Tensor] = {}
        self._tolerance = _OUTPUT_TOLERANCE
        self._watched: set[int] = set()
        positions = itertools.count()
        # The loss gets aliases, at which only its own gradient arrives: hidden states of an output have
        # another one, by way of the logits.
        self.output = (
            mapped(output, lambda t: self._watching(t, next(positions))) if rebuilt(output) else output
        )

    def _watching(self, tensor: Tensor, position: int) -> Tensor:
        """An alias whose gradient is noted, of a tensor that has one and is per sample."""
        if not tensor.requires_grad or tensor.dim() == 0 or tensor.shape[0] != self._samples:
            return tensor
        alias = tensor.view_as(tensor)
        alias.register_hook(self._keeping(position))
        self._watched.add(position)
        self._tolerance = max(self._tolerance, 4 * torch.finfo(tensor.dtype).eps)
        return alias

    def _keeping(self, position: int) -> Callable[[Tensor], None]:
        def keep(grad: Tensor) -> None:
            grad = grad.detach()
            if self._chosen is None:
                wide = torch.promote_types(grad.dtype, torch.float32)
                norms = grad.reshape(self._samples, -1).norm(dim=1, dtype=wide)
                self._chosen = torch.stack([norms.argmax(), torch.full_like(norms.argmax(), self._turn)])
            self._rows[position] = grad.index_select(0, self._chosen.to(grad.device))

        return keep

    def compare(self, loss_fn: Callable[[Any, Any], Tensor], targets: Any, reduction: str) -> str | None:
        """Raises `FisherError` when the loss is no mean (sum) over samples; the reason why it cannot be told,
        or None. To be called after backward."""
        if self._chosen is None:
            return (
                "the loss does not depend on a tensor of the output whose leading size is that of the batch"
            )
        compared: list[Comparison] = []
        largest = None
        for place, sample in enumerate(self._chosen.tolist()):
            batch = flat([rows[place] for rows in self._rows.values()])
            largest = batch.norm() if largest is None else largest
            if not bool(torch.isfinite(batch).all()):
                return None  # a loss that is not finite is reported as such
            alone = self._alone(loss_fn, targets, sample)
            if isinstance(alone, str):
                return alone
            # Small gradients are mostly rounding; those of ignored targets, 0 here, may be 0 / 0 alone.
            comparison = Comparison(batch, alone, self._samples)
            small = _SMALL * largest
            if batch.norm() > small or alone.norm() > small * comparison.factor(reduction):
                compared.append(comparison)
        judge(compared, reduction, self._tolerance)
        return None

    def _alone(self, loss_fn: Callable[[Any, Any], Tensor], targets: Any, sample: int) -> Tensor | str:
        """The gradient of the loss of one sample at the tensors of the output that the loss depends on."""
        output, own = take_sample((self._output, targets), sample, self._samples)
        if len(list(tensors_of(output))) != len(list(tensors_of(self._output))):
            return "the output of the model is a list of samples"
        leaves: dict[int, Tensor] = {}
        output = mapped(output, self._detaching(leaves))
        used = [leaves[i] for i in self._rows]
        try:
            with _buffers_kept(loss_fn), torch.enable_grad():
                loss = loss_fn(output, own)
                grads = torch.autograd.grad(loss, used, allow_unused=True)
        except Exception as error:
            return f"the loss of one sample raises {type(error).__name__}: {error}"
        pairs = zip(used, grads, strict=True)
        return flat([torch.zeros_like(leaf) if grad is None else grad for leaf, grad in pairs])

    def _detaching(self, leaves: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
        """Detaches tensors in order; those that were watched become leaves."""
        positions = itertools.count()

        def detach(tensor: Tensor) -> Tensor:
            position = next(positions)
            if position not in self._watched:
                return tensor.detach()
            leaves[position] = tensor.detach().clone().requires_grad_()
            return leaves[position]

        return detach


def flat(tensors: list[Tensor]) -> Tensor:
    """All entries, in fp64."""
    return torch.cat([tensor.detach().flatten().double().to(tensors[0].device) for tensor in tensors])


@contextmanager
def _buffers_kept(loss_fn: Any) -> Iterator[None]:
    """A loss with running statistics keeps those of the batches."""
    buffers = list(loss_fn.buffers()) if isinstance(loss_fn, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
