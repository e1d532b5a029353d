# SPDX-License-Identifier: Apache-2.0
"""What a structure of the Fisher of one's own is written with: `Structure` is the class to derive from,
`Dense`, `EightBit`, `Factored`, `Kronecker` and `Uniform` are those that exist.

A pass over the data adds to `Sums`, as `DenseSums`, `MarginalSums` and `CovarianceSums` do, and the end of a
task joins them with what is kept, by `Weights`. `docs/fishers.md` has an example.
"""

from __future__ import annotations

from .ewc.structures import Extent, Parts, Structure, Weights
from .ewc.structures.dense import Dense, EightBit
from .ewc.structures.factored import Factored, Uniform
from .ewc.structures.kronecker import Kronecker
from .fishers import Fisher
from .ops.sums import CovarianceSums, DenseSums, MarginalSums, Sums, Term

__all__ = [
    "CovarianceSums",
    "Dense",
    "DenseSums",
    "EightBit",
    "Extent",
    "Factored",
    "Fisher",
    "Kronecker",
    "MarginalSums",
    "Parts",
    "Structure",
    "Sums",
    "Term",
    "Uniform",
    "Weights",
]
