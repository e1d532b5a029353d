# SPDX-License-Identifier: Apache-2.0
"""SD-LoRA's directions of one adapter: their parameters, and how a layer runs them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from ..config import Rows
from ..errors import TargetError
from ..functional import Adapter
from ..layers.adapted import AdaptedLinear
from ..layers.plain import own_tensors
from ..layers.slices import AdapterSlice
from ..literals import Magnitudes, Normalization

NORMALIZATIONS: tuple[Normalization, ...] = ("product", "factors")
MAGNITUDES: tuple[Magnitudes, ...] = ("per_adapter", "shared")


@dataclass(frozen=True)
class Shared:
    """The magnitudes of a whole network, one parameter of one of its layers.

    Only there, so that every call that replaces parameters (`.to()`, `load_state_dict(assign=True)`) leaves
    one of them, and everything that goes over the parameters of a model finds it once.
    """

    layer: AdaptedLinear
    name: str  # of the parameter

    def beside(self, layer: AdaptedLinear, name: str) -> bool:
        """Whether this is where they are."""
        return self.layer is layer and self.name == name

    def tensor(self, like: Tensor) -> Tensor:
        """On the device and in the dtype of an adapter, whose gradients add up in the parameter."""
        found = own_tensors(self.layer).get(self.name)
        if found is None:
            raise TargetError(
                f"{self.name}: expected the magnitudes of all adapters, but the layer that has them has been "
                "ejected; eject all layers together, with the whole model"
            )
        return found.to(like.device, like.dtype)


@dataclass(frozen=True)
class Directions:
    """The parameters of one adapter with D past directions, whose ranks add up to R. Slices have names with
    their suffix, lora_past_A_k."""

    lora_A: Tensor  # [r, d_in], of the current direction, trained
    lora_B: Tensor  # [rows, r], likewise
    lora_magnitudes: Tensor  # [D + 1], alpha of every direction, the current one last, trained
    lora_past_A: Tensor  # [R, d_in]
    lora_past_B: Tensor  # [rows, R]
    lora_past_scale: Tensor  # [R, D], 1 / n_k where a rank belongs to direction k, else 0
    lora_anchor: Tensor  # [D], alpha of the past directions when the last task ended

    @staticmethod
    def of(layer: AdaptedLinear, piece: AdapterSlice) -> Directions:
        """The directions of an adapter, looked up on every call: some `.to()` and load calls replace
        Parameters."""
        table, suffix = own_tensors(layer), suffix_of(piece)
        shared = _shared_by(layer)
        if shared is None:
            return Directions(*(table[name + suffix] for name in NAMES))  # type: ignore[arg-type]
        own = {name: table[name + suffix] for name in NAMES if name != "lora_magnitudes"}
        lora_a: Tensor = own["lora_A"]  # type: ignore[assignment]
        return Directions(lora_magnitudes=shared.tensor(lora_a), **own)  # type: ignore[arg-type]

    @staticmethod
    def first(lora_a: Tensor, lora_b: Tensor, alpha: float) -> Directions:
        """Only a current direction."""
        rows, columns = lora_b.shape[0], lora_a.shape[1]
        empty = [lora_a.new_empty(shape) for shape in ((0, columns), (rows, 0), (0, 0), (0,))]
        return Directions(lora_a, lora_b, lora_a.new_full((1,), alpha), *empty)

    def put(self, layer: AdaptedLinear, piece: AdapterSlice) -> None:
        """Make these the parameters of an adapter; its slice gets the rank of lora_A. Magnitudes that are
        shared are those of the adapter that has them."""
        shared, suffix = _shared_by(layer), suffix_of(piece)
        for name in NAMES:
            if name == "lora_magnitudes" and shared is not None and not shared.beside(layer, name + suffix):
                continue
            value = getattr(self, name).detach()
            parameter = nn.Parameter(value, requires_grad=name in TRAINED)
            layer.register_parameter(name + suffix, parameter)
        rank = self.lora_A.shape[0]
        if rank != piece.r:
            pieces = layer.adapter_slices
            layer.adapter_slices = tuple(replace(p, r=rank) if p is piece else p for p in pieces)
            layer.r = layer.adapter_slices[0].r

    def stacked(self, alphas: Tensor, normalization: str, rows: Rows) -> Adapter:
        """All directions as one adapter of rank R + r, with alphas `[D + 1]` as magnitudes."""
        current = alphas[-1:]
        if normalization == "product":
            current = current * inverse_norm(self.lora_A, self.lora_B)
        if self.lora_past_A.shape[0] == 0:
            return Adapter(self.lora_A, self.lora_B, current.squeeze(0), rows)
        # A product and a sum rather than indexing, whose gradient is added up in no fixed order on GPUs.
        past = (self.lora_past_scale * alphas[:-1]).sum(1)
        lora_a = torch.cat([self.lora_past_A, self.lora_A])
        lora_b = torch.cat([self.lora_past_B, self.lora_B], dim=1)
        return Adapter(lora_a, lora_b, torch.cat([past, current.expand(self.lora_A.shape[0])]), rows)


NAMES = tuple(field.name for field in fields(Directions))
TRAINED = ("lora_A", "lora_B", "lora_magnitudes")


def suffix_of(piece: AdapterSlice) -> str:
    """What the names of the parameters of a slice end with."""
    return piece.a_name.removeprefix("lora_A")


def fresh_a(layer: AdaptedLinear, like: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """A random A `[rank, d_in]` for the start of a task, in the dtype and on the device of `like`."""
    device = like.device if generator is None else generator.device
    lora_a = torch.empty(rank, layer.in_features, dtype=like.dtype, device=device)
    return lora_a.uniform_(-layer.initial_bound, layer.initial_bound, generator=generator).to(like.device)


class Stack:
    """The `Composer` of SD-LoRA: sum_k alpha_k B_k A_k / n_k in one call, without a loop over directions.

    shared: the magnitudes of all adapters, None where each has its own.
    """

    saved_by = "state_dict() of SDLoRA"  # see checkpoint.py

    def __init__(self, normalization: str, shared: Shared | None = None) -> None:
        self.normalization, self.shared = normalization, shared

    def adapters(self, layer: AdaptedLinear) -> list[Adapter]:
        """What the layer adds to its base."""
        return [now.stacked(now.lora_magnitudes, self.normalization, rows) for now, rows in _current(layer)]

    def changes(self, layer: AdaptedLinear) -> list[Adapter]:
        """The change of what the layer adds since the last task ended. Past directions are frozen, so only
        their magnitudes have changed; the current direction did not exist then."""
        return [
            now.stacked(
                now.lora_magnitudes - nn.functional.pad(now.lora_anchor, (0, 1)), self.normalization, rows
            )
            for now, rows in _current(layer)
        ]


def _shared_by(layer: AdaptedLinear) -> Shared | None:
    composer = layer.composer
    return composer.shared if isinstance(composer, Stack) else None


def _current(layer: AdaptedLinear) -> list[tuple[Directions, Rows]]:
    """The directions and the rows of every adapter of a layer."""
    return [(Directions.of(layer, piece), piece.rows) for piece in layer.adapter_slices]


def inverse_norm(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """1 / ||B A||_F, 0-d and differentiable, in fp32 (fp64 for fp64) whatever autocast says; constantly 1
    while B A cannot be told from 0 in that precision.

    ||B A||_F^2 = sum (B^T B) * (A A^T) is r x r work. B starts at zero, where the direction of B A and the
    gradient of its norm do not exist: until B has moved, the adapter is a plain one.
    """
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    with torch.autocast(lora_a.device.type, enabled=False):
        gram_a, gram_b = grams(lora_a.to(wide), lora_b.to(wide))
        square = (gram_a * gram_b).sum()
        info = torch.finfo(wide)
        # Rounding of the sum, and squares so small that they have lost digits.
        noise = info.eps * gram_a.detach().trace() * gram_b.detach().trace() + info.tiny / info.eps
        nonzero = square.detach() > noise
        # torch.where comes before rsqrt: autograd would multiply the infinite slope at 0 by 0.
        return torch.where(nonzero, square, 1.0).rsqrt()


def grams(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """A A^T and B^T B, whose elementwise product holds the inner products of the rank-1 parts of B A."""
    return lora_a @ lora_a.T, lora_b.T @ lora_b
