# SPDX-License-Identifier: Apache-2.0
"""How the Fisher of an adapter is gathered and kept: dense, in 8 bits, factored, Kronecker, uniform."""

from __future__ import annotations

import torch

from ...errors import ArgumentError, DtypeError
from .dense import Dense, EightBit
from .factored import Factored, Uniform
from .kronecker import Kronecker
from .structure import Extent as Extent
from .structure import Gathered as Gathered
from .structure import Parts as Parts
from .structure import Structure as Structure
from .structure import Weights as Weights
from .structure import part_key as part_key
from .structure import split_key as split_key

EIGHT_BIT = "8bit"
_BY_NAME: dict[str, type[Structure]] = {
    kind.name: kind for kind in (Dense, EightBit, Factored, Kronecker, Uniform)
}
NAMES = tuple(name for name in _BY_NAME if name != EightBit.name)


def check_mode(structure: Structure, fisher_mode: str) -> None:
    """Raises `ArgumentError` for a mode in which the structure has no meaning."""
    if fisher_mode not in structure.modes:
        raise ArgumentError(
            f"fisher_mode: expected one of {structure.modes} with fisher={structure.name!r}, which has no "
            f"exact meaning otherwise, got {fisher_mode!r}"
        )


def structure_of(fisher: str | Structure, fisher_dtype: torch.dtype | str) -> Structure:
    """The structure that the arguments of `EWC` name; raises `ArgumentError` or `DtypeError`."""
    if isinstance(fisher, Structure):
        return fisher
    if not isinstance(fisher, str) or fisher not in NAMES:
        raise ArgumentError(f"fisher: expected one of {NAMES} or a Structure, got {fisher!r}")
    if isinstance(fisher_dtype, str):
        if fisher_dtype != EIGHT_BIT:
            raise DtypeError(f"fisher_dtype: expected a torch.dtype or {EIGHT_BIT!r}, got {fisher_dtype!r}")
        if fisher != Dense.name:
            raise DtypeError(f"fisher_dtype: expected fp32 with fisher={fisher!r}, got {EIGHT_BIT!r}")
        return EightBit()
    return _BY_NAME[fisher]()
