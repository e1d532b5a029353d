"""The parts of a Fisher pass over data, by the names under which programs import them."""

from __future__ import annotations

from torch import nn

from .batches import (
    Batch,
    Forward,
    batch_size_of,
    check_max_batches,
    check_samples_of,
    default_forward,
    leading_size,
    limited,
    to_device,
)
from .losses import (
    LABELS,
    LabelPolicy,
    LossFunction,
    check_labels,
    check_loss,
    default_logits,
    default_loss,
    exact_terms,
    negative_log_likelihood,
    sample_labels,
)
from .model_loss import IGNORED
from .restoring import evaluation_mode, gradients_untouched

__all__ = [
    "IGNORED",
    "LABELS",
    "Batch",
    "Forward",
    "LabelPolicy",
    "LossFunction",
    "batch_size_of",
    "check_labels",
    "check_loss",
    "check_max_batches",
    "check_samples_of",
    "default_forward",
    "default_logits",
    "default_loss",
    "evaluation_mode",
    "exact_terms",
    "gradients_untouched",
    "leading_size",
    "limited",
    "negative_log_likelihood",
    "sample_labels",
    "to_device",
    "unwrapped",
]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP, which would average gradients over processes, and hang when these have different
    numbers of batches."""
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    return inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else model
