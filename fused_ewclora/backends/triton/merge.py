# SPDX-License-Identifier: Apache-2.0
"""Host of merging and soft thresholding: tensors in groups, one launch for each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_ewclora.kernels import merge as kernels

from ...reference import arguments
from . import launch, tables
from .launch import cdiv
from .overlap import groups


def merge_(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
) -> None:
    """W_i += B_i diag(s_i) A_i in place, in the order of the entries where weights overlap."""
    arguments.merge(weights, lora_as, lora_bs, scales, scale_factors)
    for group in groups(weights):
        w, a, b = ([tensors[i] for i in group] for tensors in (weights, lora_as, lora_bs))
        s = [scales[i] for i in group]
        config = tables.lookup("merge_kernel", launch.arch(w[0]), w[0].dtype)
        tiles = max(cdiv(t.shape[0], config["BLOCK_M"]) * cdiv(t.shape[1], config["BLOCK_N"]) for t in w)
        launch.launch(
            kernels.merge_kernel, (tiles, len(group)), tuple(w), tuple(a), tuple(b), tuple(s),
            tuple(scale_factors[i] for i in group), _sizes(w, 0), _sizes(w, 1), _sizes(a, 0),
            *(_strides(tensors, dim) for tensors in (w, a, b) for dim in (0, 1)),
            tuple(t.stride(0) if t is not None and t.dim() else 0 for t in s),
            PRECISION=launch.exact(), **config,
        )  # fmt: skip


def soft_threshold_(scales: Sequence[Tensor], kappa: float) -> None:
    """s_i = sign(s_i) max(|s_i| - kappa, 0) in place, in the order of the entries where they overlap."""
    arguments.soft_threshold(scales)
    for group in groups(scales):
        given = [scales[i] for i in group]
        flat = [t.reshape(-1) for t in given]  # views where the strides allow it
        config = tables.lookup("soft_threshold_kernel", launch.arch(flat[0]), flat[0].dtype)
        blocks = max(cdiv(t.numel(), config["BLOCK"]) for t in flat)
        launch.launch(
            kernels.soft_threshold_kernel, (blocks, len(group)),
            tuple(flat), _sizes(flat, 0), _strides(flat, 0), kappa, **config,
        )  # fmt: skip
        for tensor, result in zip(given, flat, strict=True):
            if result.data_ptr() != tensor.data_ptr():
                tensor.copy_(result.view(tensor.shape))


def _sizes(tensors: Sequence[Tensor], dim: int) -> tuple[int, ...]:
    return tuple(t.shape[dim] for t in tensors)


def _strides(tensors: Sequence[Tensor], dim: int) -> tuple[int, ...]:
    return tuple(t.stride(dim) for t in tensors)
