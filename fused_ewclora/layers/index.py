# SPDX-License-Identifier: Apache-2.0
"""References to the adapters of a model, and the rows of a weight that an adapter acts on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..config import Rows
from ..errors import DtypeError, TargetError
from ..fishers import Fisher
from .adapted import AdaptedLinear, Location
from .slices import AdapterSlice, fisher_key

Operands = tuple[list[Fisher], list[Tensor], list[Tensor], list[float | Tensor]]


@dataclass(frozen=True)
class AdapterRef:
    """A reference to one adapter of one layer."""

    key: str  # of its Fisher
    layer: AdaptedLinear
    piece: AdapterSlice
    index: int  # of the piece in layer.adapter_slices
    locations: tuple[Location, Location]

    def parameters(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B as they are stored, looked up on every call: some `.to()` and load calls replace
        Parameters."""
        (a_table, a_name), (b_table, b_name) = self.locations
        return cast(Tensor, a_table[a_name]), cast(Tensor, b_table[b_name])

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The same as matrices, to be read and differentiated."""
        lora_a, lora_b = self.parameters()
        if self.layer.stores_matrices:
            return lora_a, lora_b
        return lora_a.flatten(1), lora_b.flatten(1)


def take_rows(weight: Tensor, rows: Rows) -> Tensor:
    """A copy of the rows that an adapter acts on, in its order: `[sum of lengths, d_in]`."""
    return torch.cat([weight.detach()[start:stop] for start, stop in rows])


def put_rows(weight: Tensor, rows: Rows, values: Tensor) -> None:
    """The inverse of `take_rows`, in place."""
    done = 0
    for start, stop in rows:
        weight[start:stop] = values[done : done + stop - start]
        done += stop - start


def adapter_refs(layers: Mapping[str, AdaptedLinear]) -> list[AdapterRef]:
    """A reference to every adapter of every layer, in order."""
    return [
        AdapterRef(fisher_key(name, piece), layer, piece, index, layer.parameter_locations(piece))
        for name, layer in layers.items()
        for index, piece in enumerate(layer.adapter_slices)
    ]


def operands(refs: Sequence[AdapterRef], fishers: Mapping[str, Fisher]) -> Operands:
    """The operands of the penalty: Fishers, and lora_As, lora_Bs and scales as the layers run them."""
    if all(ref.layer.composer is None for ref in refs):
        matrices = [ref.matrices() for ref in refs]
        scales = [ref.layer.adapter_scale(ref.piece) for ref in refs]
        return list(fishers.values()), [a for a, _ in matrices], [b for _, b in matrices], scales
    # A layer may leave out adapters of rank 0.
    layers = dict.fromkeys(ref.layer for ref in refs)
    composed = {(layer, adapter.rows): adapter for layer in layers for adapter in layer.composed()}
    pairs = [
        (fishers[ref.key], composed[ref.layer, ref.piece.rows])
        for ref in refs
        if (ref.layer, ref.piece.rows) in composed
    ]
    return (
        [fisher for fisher, _ in pairs],
        [adapter.lora_a for _, adapter in pairs],
        [adapter.lora_b for _, adapter in pairs],
        [adapter.scale for _, adapter in pairs],
    )


def check_present(refs: Iterable[AdapterRef]) -> None:
    """Raises `TargetError` when an adapter has been ejected, or replaced by a different one, since the
    references were made."""
    for ref in refs:
        pieces = vars(ref.layer).get("adapter_slices") if isinstance(ref.layer, AdaptedLinear) else ()
        if pieces is None:
            continue  # a layer whose adapters another library manages, and which checks them itself
        present = pieces[ref.index] if ref.index < len(pieces) else None
        if present is not ref.piece and present != ref.piece:
            raise TargetError(
                f"{ref.key}: expected the adapter that this EWC was made for, {ref.piece}, found {present}; "
                "after eject or another injection make a new EWC(model), which can load_state_dict() the "
                "state of this one if shapes are the same"
            )


class OperandLookup:
    """`check_present` and `operands` of the same adapters in every step of a training.

    What a layer has is looked up every time; it is examined only where it is not what was found before.
    """

    def __init__(self, refs: Sequence[AdapterRef]) -> None:
        check_present(refs)
        self._refs = refs
        self._layers = [ref.layer for ref in refs]
        self._a_places, self._b_places = ([ref.locations[i] for ref in refs] for i in (0, 1))
        self._scale_places = [(ref.layer._parameters, ref.piece.scale_name) for ref in refs]
        self._factors = [ref.piece.scaling for ref in refs]
        self._none = [None] * len(refs)
        self._views = not all(ref.layer.stores_matrices for ref in refs)
        self._found: object = None  # what `check_present` approved of

    @property
    def composed(self) -> bool:
        """Whether operands are computed from parameters: any layer has a composer, or stores no matrices."""
        return self._views or [layer.composer for layer in self._layers] != self._none

    def __call__(self, fishers: Mapping[str, Fisher]) -> Operands:
        """Raises `TargetError` as `check_present` does."""
        layers = self._layers
        kinds: list[type[AdaptedLinear]] = [*map(type, layers)]
        found = kinds, [of.get("adapter_slices") for of in map(vars, layers)]
        if found != self._found:
            check_present(self._refs)
            own = all(kind.adapter_scale is AdaptedLinear.adapter_scale for kind in kinds)
            self._found = found if own and None not in found[1] else None
        learned = True in [name in table for table, name in self._scale_places]
        if self._found is None or learned or self.composed:
            return operands(self._refs, fishers)
        lora_as = cast(list[Tensor], [table[name] for table, name in self._a_places])
        lora_bs = cast(list[Tensor], [table[name] for table, name in self._b_places])
        return list(fishers.values()), lora_as, lora_bs, [*self._factors]


def devices(refs: Iterable[AdapterRef]) -> dict[str, torch.device]:
    """The device of each adapter's layer, by Fisher key."""
    return {ref.key: ref.layer.weight.device for ref in refs}


def checked_fisher_dtype(
    refs: Iterable[AdapterRef], dtype: torch.dtype, kept: tuple[torch.dtype, ...], structure: str
) -> torch.dtype:
    """`dtype` itself; raises `DtypeError` unless it is one that the structure keeps, or, beside fp64 layers,
    fp32 or fp64."""
    wide = [ref.key for ref in refs if ref.layer.dtype == torch.float64]
    allowed = (torch.float32, torch.float64) if wide else kept
    if dtype not in allowed:
        beside = f" beside fp64 layers ({wide[0]})" if wide else ""
        of = "" if structure == "dense" else f" for fisher={structure!r}"
        raise DtypeError(f"fisher_dtype: expected one of {allowed}{of}{beside}, got {dtype}")
    return dtype
