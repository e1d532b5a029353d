# SPDX-License-Identifier: Apache-2.0
"""The Fisher of causal language models, whose labels are their own inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..ewc.estimation import IGNORED


def next_tokens(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits `[N, T, V]` and next tokens `[N, T]` of a causal language model; a `forward` for
    `EWC.estimate_fisher`.

    The model's own loss is a mean over the tokens of a batch. Long samples have more weight in it, and the
    gradient of a sample depends on the other samples. With the targets of this function the loss is
    -log p(y_n | x_n), summed over tokens and averaged over samples, as the Fisher is defined, and
    labels="sampled" draws each token from the logits that predict it. The last position, labels of -100, and
    positions that attention_mask hides (which would predict the first token after padding on the left) are
    ignored. Raises `ArgumentError` unless the batch is a mapping with "labels" `[N, T]`.

        >>> ewc.estimate_fisher(loader, forward=next_tokens)
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        got = type(batch).__name__ if labels is None else f"labels {list(getattr(labels, 'shape', []))}"
        raise ArgumentError(f'batch: expected a mapping with "labels" [N, T], got {got}')
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    nothing = labels.new_full((labels.shape[0], 1), IGNORED)
    following = torch.cat([labels[:, 1:], nothing], dim=1)
    mask = batch.get("attention_mask")
    return logits, following if mask is None else following.masked_fill(mask == 0, IGNORED)
