# SPDX-License-Identifier: Apache-2.0
"""Subspaces of a layer's inputs: those that earlier tasks used, and the strongest directions outside of them.

DualGPM (Liang and Li, CVPR 2023) as InfLoRA (arXiv 2404.00228) uses it. C `[d, d]` is the sum of x^T x
over the inputs x `[rows, d]` of one task. "paper" works with the inputs, whose singular values are the roots
of the eigenvalues of C; "official" is the authors' code, which puts C in their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Subspace:
    """The directions that earlier tasks used, as orthonormal columns of `basis` `[d, k]`, or, with
    `complement`, those that they left unused; whichever are fewer, so that k is at most d / 2."""

    basis: Tensor
    complement: bool

    @staticmethod
    def empty(width: int, device: torch.device) -> Subspace:
        """No direction is used yet."""
        return Subspace(torch.zeros(width, 0, dtype=torch.float64, device=device), False)

    @property
    def rank(self) -> int:
        """How many directions are used."""
        d, k = self.basis.shape
        return d - k if self.complement else k

    def to(self, device: torch.device) -> Subspace:
        """The same on `device`."""
        return Subspace(self.basis.to(device), self.complement)

    def free(self) -> Tensor:
        """An orthonormal basis `[d, d - rank]` of the unused directions."""
        return self.basis if self.complement else _outside(self.basis)


def _outside(basis: Tensor) -> Tensor:
    """An orthonormal basis of the complement of the orthonormal columns of `basis`."""
    return torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]


def _ranked(covariance: Tensor, free: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """(directions `[d, k]`, energies `[k]`) of the inputs after the projection onto `free` `[d, k]`, the
    strongest first.

    "paper": singular vectors and squared singular values of the projected inputs. "official": those of the
    projected C. Rotated inside `free`, so that no direction leaves it by rounding.
    """
    if variant == "paper":
        energies, inside = torch.linalg.eigh(free.T @ covariance @ free)
        energies, inside = energies.flip(0).clamp(min=0.0), inside.flip(1)
    else:
        inside, values, _ = torch.linalg.svd(free.T @ covariance, full_matrices=False)
        energies = values.square()
    directions = free @ inside
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * torch.where(largest < 0, -1.0, 1.0), energies  # one of two signs, the same everywhere


def directions(covariance: Tensor, used: Subspace, count: int, variant: str) -> Tensor:
    """The first `count` directions of a task outside of what is used, as rows `[count, d]`; zeros where fewer
    are left. The official code scales them by 1 / sqrt 3, the norm of a Kaiming-uniform row."""
    strongest = _ranked(covariance, used.free(), variant)[0][:, :count].T
    rows = torch.zeros(count, covariance.shape[0], dtype=strongest.dtype, device=strongest.device)
    rows[: strongest.shape[0]] = strongest
    return rows if variant == "paper" else rows / 3.0**0.5


def extended(
    used: Subspace, covariance: Tensor, epsilon: float, variant: str, fewer: bool = False
) -> Subspace:
    """`used` and the fewest strongest directions of a task with which it holds the share `epsilon` of the
    task's energy; with `fewer` one less, but at least one, while nothing is used."""
    d = covariance.shape[0]
    free = used.free()
    ranked, energies = _ranked(covariance, free, variant)
    total = covariance.trace() if variant == "paper" else covariance.square().sum()
    left = energies.flip(0).cumsum(0).flip(0)  # outside of the memory before direction i is taken
    # Rounding leaves some energy outside of any subspace.
    allowed = max(1.0 - epsilon, d * torch.finfo(left.dtype).eps) * total
    count = int((left > allowed).sum())
    if fewer and used.rank == 0 and count > 1:
        count -= 1
    if used.rank + count <= d / 2:
        return Subspace(torch.cat([used.basis, ranked[:, :count]], 1), False)
    return Subspace(ranked[:, count:].clone(), True)
