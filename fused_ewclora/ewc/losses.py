# SPDX-License-Identifier: Apache-2.0
"""Labels and loss of a batch in a Fisher pass (docs/mathematics.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError, FisherError
from ..literals import Labels
from .findings import Findings
from .known_losses import CrossEntropy, known, reduction_of, summed
from .loss_check import Watch
from .model_loss import IGNORED, ModelLoss, loss_of, paired, summed_losses

LABELS: tuple[Labels, ...] = get_args(Labels)
LossFunction = Callable[[Any, Any], Tensor]
_CHANGED = (
    "loss: the model's own loss was the mean cross entropy of its logits and labels before, and is not "
    "any more; give a loss_fn"
)
_NO_PROBABILITIES = (
    "targets: expected class probabilities, rows >= 0 that sum to 1, for floating-point targets of the "
    "shape of the logits; give a loss_fn for others"
)
_UNPLACED = (
    "targets: ignored targets (-100) have another shape than the sampled labels, so it is not known which of "
    "those to ignore; give a forward that returns both in one shape"
)


def default_logits(output: Any) -> Tensor:
    """The logits of a model output: the tensor itself, its `logits` attribute, or its "logits" entry."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ArgumentError(
            f"logits_fn: expected to find logits in the model's {type(output).__name__}; give logits_fn="
        )
    return logits


def _classes(logits: Tensor, targets: Any) -> Tensor:
    """Class indices in the shape of the logits without their last dimension."""
    if not isinstance(targets, Tensor):
        raise ArgumentError(
            "loader: expected targets with labels='empirical', got "
            + (
                "none; give batches (x, y), or mappings with \"labels\", or draw them with labels='sampled'"
                if targets is None
                else f"{type(targets).__name__}; give a loss_fn"
            )
        )
    shape = logits.shape[:-1]
    indices = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if not indices or targets.shape not in (shape, (*shape, 1)):
        raise FisherError(
            f"targets: expected class indices {list(shape)} or class probabilities {list(logits.shape)} for "
            f"logits {list(logits.shape)}, whose last dimension are the classes, got {list(targets.shape)} "
            f"{targets.dtype}; give a loss_fn, or a logits_fn that moves the classes"
        )
    return targets.reshape(shape)


def _is_soft(logits: Tensor, targets: Any) -> bool:
    return isinstance(targets, Tensor) and targets.is_floating_point() and targets.shape == logits.shape


def _soft_losses(logits: Tensor, targets: Tensor, findings: Findings) -> Tensor:
    """The sum of -sum_c y_c log p_c; a class of probability 0 may have a logit of minus infinity."""
    tolerance = max(1e-3, 8 * torch.finfo(targets.dtype).eps)
    sums = summed_rows(targets)
    findings.fault(_NO_PROBABILITIES, ((sums - 1).abs() > tolerance).any() | (targets < 0).any())
    log_p = logits.log_softmax(-1)
    return -summed((targets.to(log_p.dtype) * log_p).masked_fill(targets == 0, 0.0))


def summed_rows(targets: Tensor) -> Tensor:
    """Sums over the last dimension, in fp32 or wider."""
    return targets.sum(-1, dtype=torch.promote_types(targets.dtype, torch.float32))


def negative_log_likelihood(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """-log p(targets) of logits `[N, ..., C]`, summed over the positions of a sample; a target of -100 does
    not count, as in `torch.nn.functional.cross_entropy`.

    The mean or sum is over the N samples, not over positions: log p(y_n | x_n) is a sum over its tokens.
    """
    total, _ = summed_losses(logits, _classes(logits, targets))
    return total / logits.shape[0] if reduction == "mean" else total


def default_loss(output: Any, targets: Any, reduction: str) -> Tensor:
    """The loss without a loss function: -log p(targets), unless the model has a loss of another kind."""
    policy = LabelPolicy("empirical", reduction=reduction)
    samples = targets.shape[0] if isinstance(targets, Tensor) and targets.dim() else 1
    loss = policy.default(output, targets, samples)
    policy.findings.check()
    return loss


def sample_labels(
    logits: Tensor, targets: Any, generator: torch.Generator | None, ignored: int = IGNORED
) -> Tensor:
    """y ~ softmax(logits) over the last dimension; positions whose given target is `ignored` keep it."""
    probabilities = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    flat = probabilities.flatten(0, -2)
    if not bool(torch.isfinite(flat).all()):
        raise FisherError("logits: expected finite class probabilities to sample labels from, got NaN")
    device = logits.device if generator is None else generator.device
    drawn = (
        torch.multinomial(flat.to(device), 1, generator=generator).to(logits.device).view(logits.shape[:-1])
    )
    if isinstance(targets, Tensor) and targets.shape == drawn.shape and not targets.is_floating_point():
        return torch.where(targets == ignored, targets, drawn)
    return drawn


def exact_terms(logits: Tensor, counted: Tensor | None = None) -> Iterator[Tensor]:
    """One scalar per class c, sum_n sqrt(p_nc) log p_nc with the weights detached, over the samples that
    count (all of them, or where `counted` `[N]` is true).

    The gradient of sample n is sqrt(p_nc) grad log p_nc, so squares add up to sum_c p_nc (grad log p_nc)^2:
    the exact Fisher of n in C backward passes (the identity used by mammoth's second-order methods).
    """
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # [N, C]
    weights = log_p.detach().exp().sqrt()
    if counted is not None:
        weights = weights * counted[:, None]
    log_p = log_p.masked_fill(
        weights == 0, 0.0
    )  # a class masked by -inf has weight 0, and 0 * inf would be NaN
    for c in range(logits.shape[1]):
        yield (weights[:, c] * log_p[:, c]).sum()


@dataclass
class LabelPolicy:
    """How the loss of a batch is formed.

    labels: `"empirical"` (the given targets), `"sampled"` (y ~ p(.|x), an unbiased estimate of the true
    Fisher) or `"exact"` (the expectation over classes, one backward pass per class; always -log p of
    `logits_fn(output)`, so `loss_fn` is not called). reduction: None reads that of `loss_fn`. check_samples:
    whether each batch of a loss function that is not known is compared with one of its samples alone.

    `unproven` is true when the loss of the last batch is neither known nor was compared; `reason` says why a
    comparison was not possible.
    """

    labels: str
    loss_fn: LossFunction | None = None
    reduction: str | None = None
    logits_fn: Callable[[Any], Tensor] = default_logits
    generator: torch.Generator | None = None
    check_samples: bool = True
    findings: Findings = field(default_factory=Findings)
    unproven: bool = field(default=False, init=False)
    reason: str = field(default="", init=False)

    def __post_init__(self) -> None:
        # The exact policy does not call the loss function, and takes from it what is ignored.
        self._reduction = reduction_of(None if self.labels == "exact" else self.loss_fn, self.reduction)
        self._known = known(self.loss_fn, "sum" if self.labels == "exact" else self._reduction)
        self._model_loss = ModelLoss()
        self._turn = -1  # of the samples that are compared

    @property
    def loss_reduction(self) -> str:
        """How the loss reduces over samples."""
        return self._reduction

    @property
    def backward_reduction(self) -> str:
        """How the scalars of `passes` reduce over samples."""
        return "sum" if self.labels == "exact" else self._reduction

    @property
    def _ignored(self) -> int:
        return IGNORED if self._known is None else self._known.ignored

    def passes(self, output: Any, targets: Any, samples: int) -> Iterator[tuple[Tensor, bool]]:
        """(scalar to backpropagate, whether the graph is needed again) per backward pass of one batch."""
        self.unproven = False
        if self.labels == "exact":
            yield from self._exact(self.logits_fn(output), targets)
        elif self.loss_fn is None:
            yield self.default(output, targets, samples), False
        elif self._known is not None:
            yield self._cross_entropy(self._known, output, targets, samples), False
        else:
            labels = targets if self.labels == "empirical" else self._drawn(self.logits_fn(output), targets)
            yield from self._called(self.loss_fn, output, labels, samples)

    def alone(self, output: Any, targets: Any) -> Tensor:
        """The loss function or the model's own loss, of any number of samples."""
        if self.loss_fn is not None:
            return self.loss_fn(output, targets)
        loss = loss_of(output)
        if loss is None:
            raise FisherError("loss: expected the model to return a loss for every batch, got none")
        return loss

    def _called(
        self, loss_fn: LossFunction, output: Any, targets: Any, samples: int
    ) -> Iterator[tuple[Tensor, bool]]:
        if not self.check_samples or samples < 2:
            yield loss_fn(output, targets), False
            return
        self._turn += 1
        watch = Watch(output, samples, self._turn)
        yield loss_fn(watch.output, targets), False
        reason = watch.compare(loss_fn, targets, self._reduction)
        self.unproven, self.reason = reason is not None, reason or ""

    def _cross_entropy(self, function: CrossEntropy, output: Any, targets: Any, samples: int) -> Tensor:
        if self.labels == "sampled":
            logits = self.logits_fn(output)
            targets = self._drawn(logits.movedim(1, -1) if logits.dim() > 2 else logits, targets)
        return function(output, targets, samples, self.findings)

    def _drawn(self, logits: Tensor, targets: Any) -> Tensor:
        if isinstance(targets, Tensor) and not targets.is_floating_point():
            if targets.shape == (*logits.shape[:-1], 1):
                targets = targets.squeeze(-1)
            elif targets.shape != logits.shape[:-1]:
                self.findings.fault(_UNPLACED, (targets == self._ignored).any())
        return sample_labels(logits, targets, self.generator, self._ignored)

    def default(self, output: Any, targets: Any, samples: int) -> Tensor:
        """-log p of the samples, summed over the targets of each, where the model has no loss of its own or
        one that is a mean of them; else the model's own loss."""
        loss, form = loss_of(output), "aligned"
        if loss is not None:
            found = self._form(loss, output, targets)
            if found is None:
                if self.labels == "sampled":
                    raise FisherError(
                        "labels: the model's own loss is not a cross entropy of its logits and labels, so "
                        "'sampled' labels have no loss; give a loss_fn, or a forward that returns "
                        "(logits, targets)"
                    )
                self.unproven, self.reason = True, "the model computes its loss"
                return loss
            form = found
        logits = self.logits_fn(output)
        total = self._total(form, logits, targets, samples)
        if loss is not None and self.labels == "empirical" and self.logits_fn is default_logits:
            count = (paired(form, logits, targets)[1] != IGNORED).sum()
            changed = self._model_loss.changed(loss, total, count, logits.dtype)
            self.findings.fault(_CHANGED, changed)
        return total / samples if self._reduction == "mean" else total

    def _form(self, loss: Tensor, output: Any, targets: Any) -> str | None:
        try:
            logits = default_logits(output)
        except ArgumentError:
            return None
        return self._model_loss.form(loss, logits, targets)

    def _total(self, form: str, logits: Tensor, targets: Any, samples: int) -> Tensor:
        """The sum of -log p over the targets of all samples."""
        if logits.dim() == 0 or logits.shape[0] % samples:
            raise FisherError(
                f"logits: expected those of {samples} samples, the size of the batch, got "
                f"{list(logits.shape)}"
            )
        if self.labels == "sampled":
            if form == "shifted":
                logits, targets = paired(form, logits, targets)
            targets = self._drawn(logits, targets)
        elif _is_soft(logits, targets):
            return _soft_losses(logits, targets, self.findings)
        else:
            logits, targets = paired(form, logits, _classes(logits, targets))
        total, count = summed_losses(logits, targets)
        self.findings.targets(count)
        return total

    def _exact(self, logits: Tensor, targets: Any) -> Iterator[tuple[Tensor, bool]]:
        if logits.dim() != 2:
            raise FisherError(
                f"logits: expected [N, C] with labels='exact', got {list(logits.shape)}; use labels='sampled'"
            )
        counted = None
        indices = isinstance(targets, Tensor) and not targets.is_floating_point()
        if indices and targets.shape in ((len(logits),), (len(logits), 1)):
            counted = targets.reshape(-1) != self._ignored
            self.findings.targets(counted)
        for c, term in enumerate(exact_terms(logits, counted)):
            yield term, c + 1 < logits.shape[1]


def check_loss(loss: Any) -> None:
    """Raises `FisherError` unless the loss can be backpropagated."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise FisherError(f"loss_fn: expected a scalar loss per batch, got {got}")
    if not loss.requires_grad:
        raise FisherError("loss_fn: expected a loss that depends on the adapters, got one without a gradient")


def check_labels(labels: str, mode: str) -> None:
    """Raises `ArgumentError` for an unknown label policy, or one that the Fisher mode does not have."""
    if labels not in LABELS:
        raise ArgumentError(f"labels: expected one of {LABELS}, got {labels!r}")
    if labels == "exact" and mode != "sample":
        raise ArgumentError(
            "labels: expected 'empirical' or 'sampled' with fisher_mode='batch', got 'exact', a per-sample "
            "quantity"
        )
