# SPDX-License-Identifier: Apache-2.0
"""The task vectors of one adapter: their factors, and the mean of some of them in one call of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, CheckpointError
from ..functional import Adapter
from ..layers.adapted import AdaptedLinear
from ..layers.plain import own_tensors
from ..layers.slices import AdapterSlice
from ._directions import grams, suffix_of


@dataclass(frozen=True)
class Vectors:
    """The factors of D_k = scaling B_k A_k of one adapter, all of rank r, T of them of tasks that have ended.
    Slices have names with their suffix, lora_past_A_k."""

    lora_A: Tensor  # [r, d_in], of the current task, trained
    lora_B: Tensor  # [rows, r], likewise
    lora_past_A: Tensor  # [T r, d_in]
    lora_past_B: Tensor  # [rows, T r]
    lora_past_scale: Tensor  # [T r + r], with which all of them together are D_t less the mean of the past D

    @staticmethod
    def of(layer: AdaptedLinear, piece: AdapterSlice) -> Vectors:
        """The factors of an adapter, looked up on every call: some `.to()` and load calls replace
        Parameters."""
        table, suffix = own_tensors(layer), suffix_of(piece)
        return Vectors(*(table[name + suffix] for name in NAMES))  # type: ignore[arg-type]

    @staticmethod
    def stacked(scaling: float, lora_a: Tensor, lora_b: Tensor, past_a: Tensor, past_b: Tensor) -> Vectors:
        """A current task vector and past ones."""
        past, r = past_a.shape[0], lora_a.shape[0]
        scale = lora_a.new_full((past + r,), scaling)
        scale[:past] = -scaling * r / max(past, 1)
        return Vectors(lora_a, lora_b, past_a, past_b, scale)

    @staticmethod
    def first(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Vectors:
        """Only a current task vector."""
        past_a, past_b = lora_a.new_empty(0, lora_a.shape[1]), lora_b.new_empty(lora_b.shape[0], 0)
        return Vectors.stacked(scaling, lora_a, lora_b, past_a, past_b)

    def ended(self, new_a: Tensor, scaling: float) -> Vectors:
        """After a task: its vector is a past one, the next one is 0 with A = new_a."""
        past_a = torch.cat([self.lora_past_A, self.lora_A])
        past_b = torch.cat([self.lora_past_B, self.lora_B], 1)
        return Vectors.stacked(scaling, new_a, torch.zeros_like(self.lora_B), past_a, past_b)

    def put(self, layer: AdaptedLinear, piece: AdapterSlice) -> None:
        """Make these the parameters of an adapter."""
        for name in NAMES:
            parameter = nn.Parameter(getattr(self, name).detach(), requires_grad=name in TRAINED)
            layer.register_parameter(name + suffix_of(piece), parameter)

    def parts(self, tasks: tuple[int, ...], current: bool) -> tuple[Tensor, Tensor]:
        """A and B of the sum of some task vectors."""
        r = self.lora_A.shape[0]
        if len(tasks) * r == self.lora_past_A.shape[0]:
            lora_as, lora_bs = [self.lora_past_A] if tasks else [], [self.lora_past_B] if tasks else []
        else:
            lora_as = [self.lora_past_A[k * r : (k + 1) * r] for k in tasks]
            lora_bs = [self.lora_past_B[:, k * r : (k + 1) * r] for k in tasks]
        if current:
            lora_as, lora_bs = [*lora_as, self.lora_A], [*lora_bs, self.lora_B]
        if len(lora_as) == 1:
            return lora_as[0], lora_bs[0]
        return torch.cat(lora_as), torch.cat(lora_bs, 1)

    def norms(self, scaling: float) -> tuple[float, ...]:
        """||D_k||_F of the tasks that have ended, from r x r products."""
        r = self.lora_A.shape[0]
        gram_a, gram_b = grams(self.lora_past_A.detach().double(), self.lora_past_B.detach().double())
        squares = (gram_a * gram_b).split(r)
        return tuple(
            abs(scaling) * float(rows[:, k * r : (k + 1) * r].sum().clamp(min=0.0).sqrt())
            for k, rows in enumerate(squares if gram_a.numel() else ())
        )

    def square(self, scaling: float) -> Tensor:
        """||D_t||_F^2, 0-d and differentiable, in fp32 (fp64 for fp64) whatever autocast says."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.autocast(self.lora_A.device.type, enabled=False):
            gram_a, gram_b = grams(self.lora_A.to(wide), self.lora_B.to(wide))
            return scaling**2 * (gram_a * gram_b).sum()

    def check_finite(self, key: str) -> None:
        """Raises `ArgumentError` when the current factors are not finite."""
        if not bool(torch.isfinite(self.lora_A).all() & torch.isfinite(self.lora_B).all()):
            raise ArgumentError(f"end_task: {key}: expected a finite task vector B A, got NaN or Inf")


NAMES = tuple(field.name for field in fields(Vectors))
TRAINED = ("lora_A", "lora_B")
STORED = tuple(name for name in NAMES if name != "lora_past_scale")  # the rest follows from it


def parsed(tensors: Mapping[str, Tensor], key: str, piece: AdapterSlice, now: Vectors, tasks: int) -> Vectors:
    """The saved factors of one adapter; raises `CheckpointError`."""
    rows, r, columns = piece.row_count, piece.r, now.lora_A.shape[1]
    shapes = ((r, columns), (rows, r), (tasks * r, columns), (rows, tasks * r))
    values = []
    for name, shape in zip(STORED, shapes, strict=True):
        value = tensors.get(f"{key}.{name}")
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"state: {key}.{name}: expected shape {list(shape)}, got {got}")
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"state: {key}.{name}: expected finite values, got NaN or Inf")
        values.append(value.detach().to(now.lora_A.device, now.lora_A.dtype, copy=True))
    return Vectors.stacked(piece.scaling, *values)


class Mean:
    """The `Composer` of task vectors: the mean of some of them in one call, however many there are."""

    saved_by = "state_dict() of its method"  # see checkpoint.py

    def __init__(self, mean_of_past: bool) -> None:
        self.mean_of_past = mean_of_past  # whether `changes` are from the mean of the past task vectors
        self.tasks: tuple[int, ...] = ()  # of the past task vectors in the mean
        self.current = False  # whether the current one is in it
        self.left_out = False  # whether the layers compute without any of them, for a while

    def adapters(self, layer: AdaptedLinear) -> list[Adapter]:
        """What the layer adds to its base; nothing when no task vector is chosen."""
        count = len(self.tasks) + self.current
        if not count or self.left_out:
            return []
        found = []
        for piece in layer.adapter_slices:
            lora_a, lora_b = Vectors.of(layer, piece).parts(self.tasks, self.current)
            found.append(Adapter(lora_a, lora_b, piece.scaling / count, piece.rows))
        return found

    def changes(self, layer: AdaptedLinear) -> list[Adapter]:
        """What is penalised: D_t, less the mean of the past task vectors with `mean_of_past`."""
        found = []
        for piece in layer.adapter_slices:
            now = Vectors.of(layer, piece)
            if self.mean_of_past and now.lora_past_A.shape[0]:
                tasks = tuple(range(now.lora_past_A.shape[0] // now.lora_A.shape[0]))
                found.append(Adapter(*now.parts(tasks, True), now.lora_past_scale, piece.rows))
            else:
                found.append(Adapter(now.lora_A, now.lora_B, piece.scaling, piece.rows))
        return found
