# SPDX-License-Identifier: Apache-2.0
"""What EWC will take of memory, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import LoRAConfig
from ..errors import ArgumentError
from ..ewc.structures import EIGHT_BIT, NAMES, Extent, Structure, structure_of
from ..layers.inject import adapters
from ..layers.matching import plan
from ..literals import FisherDtype, StructureName
from ..report import Report


class _Adapter(NamedTuple):
    extent: Extent
    rank: int
    wide: torch.dtype  # of sums, and of A and B

    @property
    def trained_bytes(self) -> int:
        """Of A and B."""
        return self.rank * (self.extent.rows + self.extent.columns) * self.wide.itemsize


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def _adapters(model: nn.Module, config: LoRAConfig | None) -> Iterator[_Adapter]:
    if config is None:
        for layer in adapters(model).values():
            for piece in layer.adapter_slices:
                yield _Adapter(Extent.whole(piece.row_count, layer.in_features), piece.r, _wide(layer.dtype))
    else:
        for match in plan(model, config).matches:
            for piece in match.adapters:
                extent = Extent.whole(piece.row_count, match.in_features)
                yield _Adapter(extent, piece.r, _wide(match.weight.dtype))


def _kept_bytes(structure: Structure, adapter: _Adapter, dtype: torch.dtype) -> int:
    return sum(
        math.prod(shape) * (1 if part in structure.codes else dtype.itemsize)
        for part, shape in structure.kept_shapes(adapter.extent).items()
    )


def _sum_bytes(structure: Structure, adapter: _Adapter) -> int:
    shapes = structure.sum_shapes(adapter.extent).values()
    return sum(map(math.prod, shapes)) * adapter.wide.itemsize


def _row(fisher: str | Structure, fisher_dtype: torch.dtype | str, found: list[_Adapter]) -> dict[str, Any]:
    structure = structure_of(fisher, fisher_dtype)
    dtype = fisher_dtype if isinstance(fisher_dtype, torch.dtype) else torch.float32
    kept = sum(_kept_bytes(structure, adapter, dtype) for adapter in found)
    sums = sum(_sum_bytes(structure, adapter) for adapter in found)
    return {
        "fisher": structure.name,
        "fisher_dtype": EIGHT_BIT if isinstance(fisher_dtype, str) else str(dtype).removeprefix("torch."),
        "kept": kept,
        "gathering": kept + sums,
        "end_of_task": 2 * kept + sums,
        "per_weight": kept / max(sum(math.prod((a.extent.rows, a.extent.columns)) for a in found), 1),
    }


def memory(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    fisher: StructureName | Structure | None = None,
    fisher_dtype: FisherDtype = torch.float32,
) -> Report:
    """A table of the bytes that `EWC` will take for each structure of the Fisher; its rows are data. Nothing
    is allocated, so that models on the meta device do.

    kept: between tasks. gathering: with the sums of a task, unless `max_bytes` limits these. end_of_task: the
    most, while the new Fishers are made beside the old ones.

    Args:
        model: with adapters, or without where there is a config.
        config: of an injection that is still to come; None takes the adapters that the model has.
        fisher: the one structure to show, as in `EWC`; None shows all.
        fisher_dtype: as in `EWC`.

    Returns:
        The table, whose summary holds the bytes of weights and adapters.

    Raises:
        EWCLoRAError: the errors of `inject`, and `ArgumentError` for a model without adapters and no config.

    Examples:
        >>> report = fe.memory(model, config, fisher="dense")
        >>> len(report.rows)
        1
    """
    found = list(_adapters(model, config))
    if not found:
        raise ArgumentError("config: expected a LoRAConfig for a model without adapters, got None")
    if fisher is None:
        kinds: list[tuple[str | Structure, torch.dtype | str]] = [(name, torch.float32) for name in NAMES]
        kinds[1:1] = [("dense", torch.bfloat16), ("dense", EIGHT_BIT)]
    else:
        kinds = [(fisher, fisher_dtype)]
    rows = [_row(kind, dtype, found) for kind, dtype in kinds]
    own = {id(p) for layer in adapters(model).values() for _, p in layer.named_lora_parameters()}
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in own)
    trained = sum(adapter.trained_bytes for adapter in found)
    notes = (f"weights: {weights:,} bytes; adapters: {trained:,} bytes, {len(found)} of them",)
    summary = {"weights": weights, "adapters": trained, "count": len(found)}
    return Report("bytes of the Fishers of EWC", rows, notes, summary)
