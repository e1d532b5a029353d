# SPDX-License-Identifier: Apache-2.0
"""Cross entropies of PyTorch, whose mean over the targets that count is turned into a mean over samples, and
how a loss function says that it reduces."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, FisherError
from .findings import Findings

REDUCTIONS = ("mean", "sum")
_FUNCTIONS = (F.cross_entropy, F.nll_loss)
_MODULES = {nn.CrossEntropyLoss: F.cross_entropy, nn.NLLLoss: F.nll_loss}
_OPTIONS = ("weight", "ignore_index", "label_smoothing")
_RAGGED = (
    "loss_fn: samples have different numbers of targets that count, and a mean over all of them is no "
    "mean over samples; use reduction='sum', for -log p of a whole sample, or leave loss_fn out where the "
    "classes are the last dimension of the logits"
)


def reduction_of(loss_fn: Any, given: str | None) -> str:
    """How the loss reduces over samples: as given, or as the loss function says, else "mean".

    Raises `ArgumentError` when both are known and differ, and for a loss that is not reduced.
    """
    if given is not None and given not in REDUCTIONS:
        raise ArgumentError(f"reduction: expected one of {REDUCTIONS} or None, got {given!r}")
    told = _told(loss_fn)
    if told == "none":
        raise ArgumentError(
            "loss_fn: expected a loss that reduces over samples, got one with reduction 'none'; make it with "
            "reduction='mean' or 'sum'"
        )
    told = "mean" if told == "batchmean" else told
    if told in REDUCTIONS and given is not None and given != told:
        raise ArgumentError(
            f"reduction: expected {told!r}, the reduction of loss_fn, got {given!r}; leave it out"
        )
    return given or (told if told in REDUCTIONS else "mean")


def _told(loss_fn: Any) -> str | None:
    """The attribute `reduction` of a module, or the value that a function takes for its argument."""
    told = getattr(loss_fn, "reduction", None)
    if isinstance(told, str) or loss_fn is None or isinstance(loss_fn, nn.Module):
        return told if isinstance(told, str) else None
    try:
        argument = inspect.signature(loss_fn).parameters.get("reduction")
    except (TypeError, ValueError):
        return None
    return argument.default if argument is not None and isinstance(argument.default, str) else None


def summed(losses: Tensor) -> Tensor:
    """Their sum, in fp32 or wider: one of thousands of tokens overflows fp16."""
    return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))


@dataclass(frozen=True)
class CrossEntropy:
    """`F.cross_entropy` or `F.nll_loss` with its options; the classes are dimension 1 of the logits."""

    function: Callable[..., Tensor]
    reduction: str
    options: dict[str, Any]

    @property
    def ignored(self) -> int:
        """The target that does not count."""
        index: int = self.options.get("ignore_index", -100)
        return index

    def __call__(self, logits: Any, targets: Any, samples: int, findings: Findings) -> Tensor:
        """The mean or the sum of the losses of the samples.

        The loss of a sample is the sum or, for "mean", the mean over its targets that count; 0 without any.
        """
        self._check_tensors(logits, targets)
        if targets.is_floating_point():
            return self._soft(logits, targets)
        self._check_indices(logits, targets, samples)
        counted = (targets != self.ignored).reshape(samples, -1).sum(1)
        findings.targets(counted)
        total = summed(self.function(logits, targets, reduction="none", **self.options))
        if self.reduction == "sum":
            return total
        largest = counted.max()
        findings.fault(_RAGGED, ((counted != largest) & (counted != 0)).any())
        return total / (largest.clamp(min=1) * samples)

    def _soft(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != logits.shape or self.function is F.nll_loss:
            raise FisherError(
                "loss_fn: expected class indices, or for cross_entropy probabilities "
                f"{list(logits.shape)}, got floating-point targets {list(targets.shape)}"
            )
        return self.function(logits, targets, reduction=self.reduction, **self.options)

    def _check_tensors(self, logits: Any, targets: Any) -> None:
        for name, value in (("the output of the model", logits), ("targets", targets)):
            if not isinstance(value, Tensor):
                raise FisherError(
                    f"loss_fn: expected {name} to be a tensor for cross_entropy, got {type(value).__name__}; "
                    "give a loss_fn or a forward that picks it"
                )

    def _check_indices(self, logits: Tensor, targets: Tensor, samples: int) -> None:
        expected = [*logits.shape[:1], *logits.shape[2:]]
        if logits.dim() < 2 or list(targets.shape) != expected or targets.dtype == torch.bool:
            raise FisherError(
                f"loss_fn: expected class indices {expected} for logits {list(logits.shape)} with the "
                f"classes as dimension 1, got targets {list(targets.shape)} {targets.dtype}"
            )
        if targets.shape[0] % samples:
            raise FisherError(
                f"loss_fn: expected targets of {samples} samples, the size of the batch, got {len(targets)}"
            )


def known(loss_fn: Any, reduction: str) -> CrossEntropy | None:
    """The cross entropy that `loss_fn` is, also a `functools.partial` of one; None for other losses.

    Raises `ArgumentError` for a mean with class weights, which is a mean over the weights of the batch.
    """
    function, options = _unpacked(loss_fn)
    if function is None or set(options) - {*_OPTIONS, "reduction"}:
        return None
    options = {name: options[name] for name in _OPTIONS if name in options}
    if options.get("weight") is not None and reduction == "mean":
        raise ArgumentError(
            "loss_fn: class weights with reduction 'mean' divide by the weights of the batch, so that the "
            "loss of a sample depends on the others; use reduction='sum', where it is weight[y] times "
            "-log p(y)"
        )
    return CrossEntropy(function, reduction, options)


def _unpacked(loss_fn: Any) -> tuple[Callable[..., Tensor] | None, dict[str, Any]]:
    if isinstance(loss_fn, functools.partial):
        function, options = _unpacked(loss_fn.func)
        return (None, {}) if loss_fn.args else (function, {**options, **loss_fn.keywords})
    if type(loss_fn) in _MODULES:
        options = {name: getattr(loss_fn, name) for name in _OPTIONS if hasattr(loss_fn, name)}
        return _MODULES[type(loss_fn)], options
    return next((function for function in _FUNCTIONS if loss_fn is function), None), {}
