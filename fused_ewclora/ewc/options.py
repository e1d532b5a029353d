# SPDX-License-Identifier: Apache-2.0
"""The keyword arguments of `EWC`, for functions that hand them on."""

from __future__ import annotations

from typing import TypedDict

import torch

from ..literals import FisherDtype, FisherMode, MergeMode, StructureName, Update
from .structures import Structure


class FisherOptions(TypedDict, total=False):
    """How Fishers are gathered, kept and added up."""

    gamma: float
    fisher_mode: FisherMode
    fisher_dtype: FisherDtype
    check_finite: bool
    update: Update
    fisher: StructureName | Structure


class EWCOptions(FisherOptions, total=False):
    """All arguments of `EWC` but the model."""

    ewc_lambda: float | None
    merge_mode: MergeMode
    generator: torch.Generator | None
