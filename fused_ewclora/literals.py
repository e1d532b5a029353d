# SPDX-License-Identifier: Apache-2.0
"""Types of arguments that are named by strings, for annotations in programs that use the library."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

FisherMode: TypeAlias = Literal["sample", "batch"]
MergeMode: TypeAlias = Literal["delta", "factors"]
Update: TypeAlias = Literal["sum", "convex", "fixed"]
StructureName: TypeAlias = Literal["dense", "factored", "kronecker", "uniform"]
FisherDtype: TypeAlias = torch.dtype | Literal["8bit"]
Labels: TypeAlias = Literal["empirical", "sampled", "exact"]
Reduction: TypeAlias = Literal["mean", "sum"]
QuantisedMerge: TypeAlias = Literal["requantise", "residual"]
Backend: TypeAlias = Literal[
    "auto",
    "triton",
    "triton:full",
    "triton:prologue",
    "triton:addmm",
    "triton:concat",
    "cuda",
    "cpu",
    "reference",
]
Variant: TypeAlias = Literal["paper", "official"]
GateInit: TypeAlias = Literal["ones", "normal"]
Threshold: TypeAlias = Literal["soft", "dead_zone"]
Schedule: TypeAlias = Literal["linear", "staircase"]
Normalization: TypeAlias = Literal["product", "factors"]
Magnitudes: TypeAlias = Literal["per_adapter", "shared"]
Transforms: TypeAlias = Literal["eval", "train"]
Protocol: TypeAlias = Literal["class_incremental", "task_aware"]
Average: TypeAlias = Literal["sample_weighted", "task_mean"]
