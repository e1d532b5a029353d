# SPDX-License-Identifier: Apache-2.0
"""The model inside of what runs it on several devices, or compiles it."""

from __future__ import annotations

from typing import Any

from torch import nn

_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP and `nn.DataParallel`. DDP would average gradients over processes, and hang when
    these have different numbers of batches; `nn.DataParallel` would split a batch over replicas."""
    inner: Any = getattr(model, "_orig_mod", model)  # of torch.compile
    return unwrapped(inner.module) if isinstance(inner, _PARALLEL) else model


def innermost(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DDP and `nn.DataParallel`, whose forward runs whichever of them is
    called."""
    inner: Any = getattr(model, "_orig_mod", model)
    if isinstance(inner, _PARALLEL):
        inner = inner.module
    return model if inner is model else innermost(inner)
