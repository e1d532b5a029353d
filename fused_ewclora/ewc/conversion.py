# SPDX-License-Identifier: Apache-2.0
"""What `EWC` keeps of earlier tasks, from one structure of the Fisher to another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FisherError
from ..layers.finite import nonfinite
from ..layers.index import AdapterRef
from .state import EWCState, by_fisher, flat, numbers_in, stored, wide
from .structures import Extent, Parts, Structure
from .structures.dense import Dense
from .structures.factored import Factored, Uniform, levelled


def check_convertible(old: Structure, new: Structure) -> None:
    """Raises `FisherError` where the old structure has lost what the new one needs."""
    exact = type(old) is type(new) or (type(old) is Factored and isinstance(new, Uniform))
    if not isinstance(old, Dense) and not exact:
        others = "'uniform' alone can" if type(old) is Factored else "nothing can"
        raise FisherError(
            f"convert_fisher_: fisher={old.name!r} does not have the single numbers of F, of which {others} "
            f"be made, got {new.name!r}; convert before they are lost, or start with that structure"
        )


def _of_one(old: Structure, new: Structure, parts: Parts, extent: Extent) -> Parts:
    if type(old) is type(new):
        return parts
    if isinstance(new, Uniform) and not isinstance(old, Dense):
        return levelled(parts, extent)
    return new.of_dense(_dense(old, parts, extent), extent)


def _dense(structure: Structure, parts: Parts, extent: Extent) -> Tensor:
    """F, of a Kronecker product the diagonal of F, as a new matrix, in fp32 or fp64."""
    value = structure.value(parts, extent.columns)
    return wide(value).clone() if isinstance(value, Tensor) else value.dense()


def _distance(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm; of two zeros 0."""
    size = torch.linalg.vector_norm(exact, dtype=torch.float64)
    difference = torch.linalg.vector_norm(found.to(exact.dtype) - exact, dtype=torch.float64)
    return float(difference / size) if float(size) else float(difference)


@torch.no_grad()
def converted(
    state: EWCState,
    refs: list[AdapterRef],
    old: Structure,
    new: Structure,
    dtype: torch.dtype,
    check_finite: bool,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The kept Fishers in another structure, with numbers in `dtype`, in new tensors, and by key the relative
    error in the Frobenius norm that this made; raises `FisherError` where a value is not finite."""
    kept = by_fisher(state.fishers)
    found: dict[str, Parts] = {}
    errors: dict[str, float] = {}
    for ref in refs if kept else ():
        extent = Extent.whole(ref.piece.row_count, ref.layer.in_features)
        parts = _of_one(old, new, kept[ref.key], extent)
        found[ref.key] = {part: stored(tensor, dtype) for part, tensor in parts.items()}
        exact = _dense(old, kept[ref.key], extent)
        errors[ref.key] = _distance(_dense(new, found[ref.key], extent), exact)
    fishers = flat(found)
    if check_finite and (bad := nonfinite(numbers_in(fishers))):
        raise FisherError(f"convert_fisher_: Fisher of {bad[0]}: expected finite values, got NaN or Inf")
    return fishers, errors
