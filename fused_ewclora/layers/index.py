"""The adapters of a model one by one, and the rows of a weight that belong to one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..config import Rows
from ..errors import DtypeError, TargetError
from .adapted import AdaptedLinear, Location
from .slices import AdapterSlice, fisher_key

Operands = tuple[list[Tensor], list[Tensor], list[Tensor], list[float | Tensor]]


@dataclass(frozen=True)
class Slot:
    """One adapter of one layer, as the Fisher key names it."""

    key: str
    layer: AdaptedLinear
    piece: AdapterSlice
    index: int  # of the piece in layer.adapter_slices
    locations: tuple[Location, Location]

    def factors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B, looked up on every call: some `.to()` and load calls replace Parameters."""
        (a_table, a_name), (b_table, b_name) = self.locations
        return cast(Tensor, a_table[a_name]), cast(Tensor, b_table[b_name])


def take_rows(weight: Tensor, rows: Rows) -> Tensor:
    """The rows of an adapter, in its order: a new `[sum of lengths, d_in]`."""
    return torch.cat([weight.detach()[start:stop] for start, stop in rows])


def put_rows(weight: Tensor, rows: Rows, values: Tensor) -> None:
    """The reverse of `take_rows`, in place."""
    done = 0
    for start, stop in rows:
        weight[start:stop] = values[done : done + stop - start]
        done += stop - start


def slots_of(layers: Mapping[str, AdaptedLinear]) -> list[Slot]:
    """Every adapter of every layer, in order."""
    return [
        Slot(fisher_key(name, piece), layer, piece, index, layer.parameter_locations(piece))
        for name, layer in layers.items()
        for index, piece in enumerate(layer.adapter_slices)
    ]


def operands(slots: Sequence[Slot], fishers: Mapping[str, Tensor]) -> Operands:
    """Fishers, lora_As, lora_Bs and scales of the penalty, as the layers run them."""
    if all(slot.layer.composer is None for slot in slots):
        factors = [slot.factors() for slot in slots]
        scales = [slot.layer.adapter_scale(slot.piece) for slot in slots]
        return list(fishers.values()), [a for a, _ in factors], [b for _, b in factors], scales
    # A layer may leave out adapters of rank 0.
    layers = dict.fromkeys(slot.layer for slot in slots)
    composed = {(layer, adapter.rows): adapter for layer in layers for adapter in layer.composed()}
    found = [
        (fishers[slot.key], composed[slot.layer, slot.piece.rows])
        for slot in slots
        if (slot.layer, slot.piece.rows) in composed
    ]
    return (
        [fisher for fisher, _ in found],
        [adapter.lora_a for _, adapter in found],
        [adapter.lora_b for _, adapter in found],
        [adapter.scale for _, adapter in found],
    )


def check_present(slots: Iterable[Slot]) -> None:
    """The adapters are still those that the slots were made of: not ejected, nor injected anew otherwise."""
    for slot in slots:
        pieces = vars(slot.layer).get("adapter_slices") if isinstance(slot.layer, AdaptedLinear) else ()
        if pieces is None:
            continue  # a layer whose adapters another library manages, and which checks them itself
        found = pieces[slot.index] if slot.index < len(pieces) else None
        if found is not slot.piece and found != slot.piece:
            raise TargetError(
                f"{slot.key}: expected the adapter that this EWC was made for, {slot.piece}, found {found}; "
                "after eject or another injection make a new EWC(model), which can load_state_dict() the "
                "state of this one if shapes are the same"
            )


def devices(slots: Iterable[Slot]) -> dict[str, torch.device]:
    """Where the layer of each adapter is."""
    return {slot.key: slot.layer.weight.device for slot in slots}


def checked_fisher_dtype(slots: Iterable[Slot], dtype: torch.dtype) -> torch.dtype:
    """fp32 or bf16, beside fp64 layers fp32 or fp64; else `DtypeError`."""
    wide = [slot.key for slot in slots if slot.layer.weight.dtype == torch.float64]
    allowed = (torch.float32, torch.float64) if wide else (torch.float32, torch.bfloat16)
    if dtype not in allowed:
        beside = f" beside fp64 layers ({wide[0]})" if wide else ""
        raise DtypeError(f"fisher_dtype: expected one of {allowed}{beside}, got {dtype}")
    return dtype
