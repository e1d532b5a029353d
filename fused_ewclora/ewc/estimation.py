"""The parts of a Fisher pass over data: forward, labels and loss of a batch, and the modes of the model."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, FisherError

LABELS = ("empirical", "sampled", "exact")
IGNORED = -100  # target that cross_entropy leaves out
Batch = Any
Forward = Callable[[nn.Module, Batch], tuple[Any, Any]]
LossFunction = Callable[[Any, Any], Tensor]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Every tensor of a batch of nested tuples, lists and mappings, moved; other values as they are."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def default_forward(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """(output, targets) of a batch: a mapping calls model(**batch) with targets batch["labels"]; (x, y) calls
    model(x)."""
    if isinstance(batch, Mapping):
        return model(**batch), batch.get("labels")
    if isinstance(batch, Tensor):
        return model(batch), None
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return model(batch[0]), None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return model(batch[0]), batch[1]
    raise ArgumentError(
        f"loader: expected batches (x, y), x or a mapping of model arguments, got {type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
        + "; give forward=lambda model, batch: (output, targets)"
    )


def default_logits(output: Any) -> Tensor:
    """The logits of a model output: the tensor itself, its `logits` attribute, or its "logits" entry."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ArgumentError(
            f"logits_fn: expected to find logits in the model's {type(output).__name__}; give logits_fn="
        )
    return logits


def negative_log_likelihood(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """-log p(targets) of logits `[N, ..., C]`, summed over the positions of a sample; a target of -100 does
    not count, as in `torch.nn.functional.cross_entropy`.

    The mean or sum is over the N samples, not over positions: log p(y_n | x_n) is a sum over its tokens.
    """
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / logits.shape[0] if reduction == "mean" else total


def default_loss(output: Any, targets: Any, reduction: str) -> Tensor:
    """The loss that the model computed itself, if any (transformers), else -log p(targets)."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    if not isinstance(targets, Tensor):
        raise ArgumentError("loader: expected targets with labels='empirical', got none")
    return negative_log_likelihood(default_logits(output), targets, reduction)


def leading_size(value: Any) -> int | None:
    """The number of samples of the first tensor (or plain sequence of numbers) found in a batch part."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    )
    for part in parts:
        if isinstance(part, (int, float)):
            return len(value)
        if (size := leading_size(part)) is not None:
            return size
    return None


def batch_size_of(batch: Batch) -> int:
    """Samples in a batch, from its targets where it has any."""
    targets = None
    if isinstance(batch, Mapping):
        targets = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        targets = batch[-1]
    size = leading_size(targets)
    size = leading_size(batch) if size is None else size
    if size is None:
        raise ArgumentError(
            "loader: cannot tell the number of samples of a batch that holds no tensor; give batch_size_fn="
        )
    return size


def sample_labels(logits: Tensor, targets: Any, generator: torch.Generator | None) -> Tensor:
    """y ~ softmax(logits) over the last dimension; positions whose given target is -100 keep it."""
    probabilities = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    flat = probabilities.flatten(0, -2)
    if not bool(torch.isfinite(flat).all()):
        raise FisherError("logits: expected finite class probabilities to sample labels from, got NaN")
    device = logits.device if generator is None else generator.device
    drawn = (
        torch.multinomial(flat.to(device), 1, generator=generator).to(logits.device).view(logits.shape[:-1])
    )
    if isinstance(targets, Tensor) and targets.shape == drawn.shape and not targets.is_floating_point():
        return torch.where(targets == IGNORED, targets, drawn)
    return drawn


def exact_terms(logits: Tensor) -> Iterator[Tensor]:
    """One scalar per class c, sum_n sqrt(p_nc) log p_nc with the weights detached.

    The gradient of sample n is sqrt(p_nc) grad log p_nc, so squares add up to sum_c p_nc (grad log p_nc)^2:
    the exact Fisher of n in C backward passes (the identity used by mammoth's second-order methods).
    """
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # [N, C]
    weights = log_p.detach().exp().sqrt()
    log_p = log_p.masked_fill(
        weights == 0, 0.0
    )  # a class masked by -inf has weight 0, and 0 * inf would be NaN
    for c in range(logits.shape[1]):
        yield (weights[:, c] * log_p[:, c]).sum()


@dataclass(frozen=True)
class LabelPolicy:
    """How the loss of a batch is formed.

    labels: `"empirical"` (the given targets), `"sampled"` (y ~ p(.|x), an unbiased estimate of the true
    Fisher) or `"exact"` (the expectation over classes, one backward pass per class; always -log p of
    `logits_fn(output)`, so `loss_fn` is not called).
    """

    labels: str
    loss_fn: LossFunction | None = None
    reduction: str = "mean"
    logits_fn: Callable[[Any], Tensor] = default_logits
    generator: torch.Generator | None = None

    @property
    def backward_reduction(self) -> str:
        """How the scalars of `passes` reduce over samples."""
        return "sum" if self.labels == "exact" else self.reduction

    def passes(self, output: Any, targets: Any) -> Iterator[tuple[Tensor, bool]]:
        """(scalar to backpropagate, whether the graph is needed again) per backward pass of one batch."""
        if self.labels == "empirical":
            loss = (
                default_loss(output, targets, self.reduction)
                if self.loss_fn is None
                else self.loss_fn(output, targets)
            )
            yield loss, False
            return
        logits = self.logits_fn(output)
        if self.labels == "sampled":
            drawn = sample_labels(logits, targets, self.generator)
            if self.loss_fn is None:
                yield negative_log_likelihood(logits, drawn, self.reduction), False
            else:
                yield self.loss_fn(output, drawn), False
            return
        if logits.dim() != 2:
            raise FisherError(
                f"logits: expected [N, C] with labels='exact', got {list(logits.shape)}; use labels='sampled'"
            )
        for c, term in enumerate(exact_terms(logits)):
            yield term, c + 1 < logits.shape[1]


def check_loss(loss: Any) -> None:
    """Raises `FisherError` unless the loss can be backpropagated."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise FisherError(f"loss_fn: expected a scalar loss per batch, got {got}")
    if not loss.requires_grad:
        raise FisherError("loss_fn: expected a loss that depends on the adapters, got one without a gradient")


def limited(loader: Iterable[Batch], max_batches: int | None, progress: bool | None) -> Iterator[Batch]:
    """At most `max_batches` batches, with a bar on stderr (progress None: only when that is a terminal)."""
    batches: Iterable[Batch] = itertools.islice(loader, max_batches)
    if sys.stderr.isatty() if progress is None else progress:
        from tqdm import tqdm

        total = len(loader) if isinstance(loader, Sized) else None
        total = max_batches if total is None else min(total, max_batches or total)
        batches = tqdm(batches, total=total, desc="Fisher", unit="batch", leave=False)
    yield from batches


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP, which would average gradients over processes, and hang when these have different
    numbers of batches."""
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    return inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; the mode of each module is restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def gradients_untouched(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Every `.grad` is None at the start of the block and restored after it, as the same tensor; yields a
    function that sets all of them to None."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]

    def clear() -> None:
        for parameter, _ in before:
            parameter.grad = None

    clear()
    try:
        yield clear
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def check_labels(labels: str, mode: str) -> None:
    """Raises `ArgumentError` for an unknown label policy, or one that the Fisher mode does not have."""
    if labels not in LABELS:
        raise ArgumentError(f"labels: expected one of {LABELS}, got {labels!r}")
    if labels == "exact" and mode != "sample":
        raise ArgumentError(
            "labels: expected 'empirical' or 'sampled' with fisher_mode='batch', got 'exact', a per-sample "
            "quantity"
        )


def check_max_batches(max_batches: int | None) -> None:
    """Raises `ArgumentError` unless it is None or at least 1."""
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise ArgumentError(f"max_batches: expected an integer >= 1 or None, got {max_batches!r}")
