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
    """Logits and next tokens of a causal language model; a `forward` for `EWC.estimate_fisher`.

    The model's own loss is a mean over the tokens of a batch. Long samples have more weight in it, and the
    gradient of a sample depends on the other samples. With the targets of this function the loss is
    -log p(y_n | x_n), summed over tokens and averaged over samples, as the Fisher is defined, and
    labels="sampled" draws each token from the logits that predict it. The last position, labels of -100, and
    positions that attention_mask hides (which would predict the first token after padding on the left) are
    ignored.

    Args:
        model: a causal language model; it is called with everything of the batch but the labels.
        batch: a mapping with "labels" `[N, T]`, int64, and the arguments of the model.

    Returns:
        The logits `[N, T, V]` and the next tokens `[N, T]`, -100 where they are ignored.

    Raises:
        ArgumentError: for any other batch.

    Examples:
        >>> import transformers
        >>> gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2))
        >>> _ = fe.inject(gpt2, fe.LoRAConfig(target_modules=["c_attn"], slices=("q", "v")))
        >>> ewc = fe.EWC(gpt2)
        >>> tokens = torch.randint(50257, (4, 16))
        >>> batches = [{"input_ids": tokens, "labels": tokens}]
        >>> ewc.estimate_fisher(batches, forward=fe.integrations.transformers.next_tokens)
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
