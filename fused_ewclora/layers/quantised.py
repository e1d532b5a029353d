# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight another library stores in a few bits: adapters beside the library's own product,
and what merging and consolidation mean for such a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol

import torch
from torch import Tensor, nn

from .. import functional as FE
from ..config import QUANTISED_MERGES
from ..errors import ArgumentError, TargetError, warn
from .adapted import AdaptedLinear, Updates
from .finite import check_finite

RESIDUAL = "lora_residual"  # the buffer, and its name among the tensors of a checkpoint
BEFORE_MERGE = "rows_before_merge"
CHOICES = (
    '"requantise" (add in fp32, quantise again) or "residual" (keep the sum of all updates in bf16 beside it)'
)
HOW = (
    f"choose quantised_merge of LoRAConfig, or of attach_ewc for PEFT, {CHOICES}; where adapters are present "
    "already, set layer.quantised_merge of all fe.adapters(model).values()"
)
# A rounding error above this part of an update leaves little of what was trained.
LARGEST_SHARE = 0.5


class Quantisation(Protocol):
    """How a library stores and multiplies the weight of a module. Nothing here changes the module."""

    def product(self, module: Any, x: Tensor) -> Tensor:
        """The library's own x W^T + bias, with its own backward."""

    def stored(self, module: Any) -> dict[str, Tensor]:
        """The tensors that determine the numbers, by name, in their own memory."""

    def numbers(self, module: Any, dtype: torch.dtype, stored: Mapping[str, Tensor] | None = None) -> Tensor:
        """W `[out_features, in_features]`, or what it would be with these tensors in place of its own."""

    def quantised(self, module: Any, new: Tensor) -> dict[str, Tensor]:
        """`stored` of the weight `new`, quantised with the settings of the present one."""

    def kind(self, module: Any) -> str:
        """The name of the kind of weight, such as "nf4"."""

    def dtype(self, module: Any) -> torch.dtype:
        """The dtype of the numbers: fp32, or fp64 where the library has such weights."""


@dataclass(frozen=True)
class Rounding:
    """Norms of an update that was rounded to the bits of a weight, and of what the rounding changed."""

    update: float
    error: float

    @property
    def share(self) -> float:
        """The error as a part of the update."""
        return self.error / self.update if self.update else 0.0


class QuantisedLinear(AdaptedLinear):
    """Base class of adapted layers whose weight is quantised.

    The product with the weight, and its backward, are the library's own; what the adapters add and the
    collection of the Fisher are one autograd node. `quantised_merge` decides what merging and consolidation
    do: "requantise" dequantises, adds in fp32 and quantises again; "residual" adds to a bf16 buffer,
    `lora_residual`, which the forward multiplies too; None refuses. Adapters are fp32.
    """

    quantisation: ClassVar[Quantisation]

    quantised_merge: str | None
    rounding: Rounding | None  # of the latest update in mode "requantise"

    @property
    def storage(self) -> nn.Module:
        """The module of the library that stores the weight."""
        return self.weight_place()[0]

    @property
    def residual(self) -> Tensor | None:
        """The sum of the updates beside the weight; None as long as there is none."""
        return self._buffers.get(RESIDUAL)

    @property
    def base_weight(self) -> Tensor:
        """The dequantised weight plus the residual, a new tensor `[out_features, in_features]`."""
        numbers = self.quantisation.numbers(self.storage, self.dtype)
        return numbers if self.residual is None else numbers + self.residual.to(numbers.dtype)

    @property
    def dtype(self) -> torch.dtype:
        wide = any(parameter.dtype == torch.float64 for _, parameter in self.named_lora_parameters())
        return torch.float64 if wide else self.quantisation.dtype(self.storage)

    @property
    def weight_kind(self) -> str:
        """How the weight is quantised, in words."""
        return self.quantisation.kind(self.storage)

    def base_forward(self, x: Tensor) -> Tensor:
        """The library's product, and that with the residual."""
        y = self.quantisation.product(self.storage, x)
        return y if self.residual is None else FE.add_low_rank(y, x, [], self.residual)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]` -> y `[..., out_features]`; without adapters while merged or disabled."""
        adapters = self.active()
        if adapters is None:
            return self.base_forward(x)
        return FE.add_low_rank(
            self.quantisation.product(self.storage, x),
            x,
            adapters,
            self.residual,
            dropout_p=self.dropout_p,
            training=self.training,
            capture=self.fisher_capture,
        )

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Raises `TargetError`: replicas get copies of tensors, without what their numbers mean."""
        raise TargetError(
            f"nn.DataParallel: expected weights that are plain tensors, got {self.weight_kind}, whose copies "
            "in replicas would not be known to be quantised; use DistributedDataParallel, or one device"
        )

    def weight_state(self) -> dict[str, Tensor]:
        """The tensors of the library that determine the numbers, and the residual."""
        residual = {} if self.residual is None else {RESIDUAL: self.residual}
        return {**self.quantisation.stored(self.storage), **residual}

    def state_like(self, parts: Iterable[str]) -> dict[str, Tensor]:
        """A residual is expected where the parts have one."""
        stored = self.quantisation.stored(self.storage)
        return {**stored, RESIDUAL: self._empty_residual("meta")} if RESIDUAL in parts else stored

    def state_updates(self, state: Mapping[str, Tensor]) -> Updates:
        """Without a residual in `state`, one that exists becomes 0."""
        if RESIDUAL in state:
            self._with_residual()
        now = self.weight_state()
        zero = {} if self.residual is None else {RESIDUAL: torch.zeros_like(self.residual)}
        return [(now[name], value) for name, value in {**zero, **state}.items()]

    def not_writable(self) -> str | None:
        if self.weight.is_meta:
            return super().not_writable()
        if self.quantised_merge is None:
            return f"its weight is quantised, and nothing says how to add to it; {HOW}"
        return None

    def not_ejectable(self, merge: bool) -> str | None:
        if merge and self.quantised_merge == "residual":
            return (
                f"{self.plain.__name__} cannot hold the residual of merged adapters; set "
                'layer.quantised_merge = "requantise" to round it into the weight'
            )
        if not merge and (self._residual_before_merge() if self.merged else self.residual is not None):
            return (
                f"{self.plain.__name__} cannot hold the residual of earlier tasks, which would be lost; "
                'eject with merge=True and layer.quantised_merge = "requantise"'
            )
        return None

    @torch.no_grad()
    def weight_updates(self, new: Tensor) -> Updates:
        """As in `AdaptedLinear`, in the way of `quantised_merge`; raises `TargetError` without a choice."""
        if self.quantised_merge not in QUANTISED_MERGES:
            raise TargetError(
                f"quantised_merge: expected one of {QUANTISED_MERGES}, got {self.quantised_merge!r}; {HOW}"
            )
        numbers = self.quantisation.numbers(self.storage, self.dtype)
        update = new.to(numbers.dtype) - numbers
        if self.quantised_merge == "residual":
            self.rounding = None
            residual = self._with_residual()
            return [(residual, update.to(residual.dtype))]
        norm = float(torch.linalg.vector_norm(update))
        if norm == 0.0:  # quantising again need not give the same bits
            self.rounding = Rounding(0.0, 0.0)
            return self.state_updates({})
        if not math.isfinite(norm):  # libraries may quantise that to finite numbers
            stored = self.quantisation.stored(self.storage)
            floats = {name: tensor for name, tensor in stored.items() if tensor.is_floating_point()}
            return self.state_updates({name: torch.full_like(t, math.nan) for name, t in floats.items()})
        state = self.quantisation.quantised(self.storage, new)
        change = self.quantisation.numbers(self.storage, self.dtype, state) - numbers
        self.rounding = Rounding(norm, float(torch.linalg.vector_norm(change - update)))
        return self.state_updates(state)

    def merge(self) -> None:
        """As in `AdaptedLinear`, in the way of `quantised_merge`; what it changes is kept whole."""
        if self.merged:
            return
        self._check_plain("merge")
        before = self._bits()
        had_residual = self.residual is not None
        updates = self.weight_updates(self.consolidated_weight())
        try:
            values = {f"W + B diag(s) A, tensor {i}": value for i, (_, value) in enumerate(updates)}
            check_finite(values, "merge", ArgumentError)
        except BaseException:
            if not had_residual:
                self._buffers.pop(RESIDUAL, None)
            raise
        self.register_buffer(BEFORE_MERGE, before, persistent=False)
        self._copy(updates)
        self.merged = True

    def unmerge(self) -> None:
        """Restore what `merge` kept, bit for bit; a no-op when not merged."""
        if not self.merged:
            return
        self._check_plain("unmerge")
        if not self._residual_before_merge():
            self._buffers.pop(RESIDUAL, None)
        done = 0
        for tensor in self.weight_state().values():
            size = tensor.numel() * tensor.element_size()
            bits = self.rows_before_merge[done : done + size]
            self._copy([(tensor, bits.clone().view(tensor.dtype).view(tensor.shape))])
            done += size
        del self.rows_before_merge
        self.merged = False

    @torch.no_grad()
    def _copy(self, updates: Updates) -> None:
        for target, value in updates:
            target.copy_(value)

    def _bits(self) -> Tensor:
        """The bits of `weight_state`, one tensor after the other."""
        parts = (tensor.detach().contiguous().reshape(-1) for tensor in self.weight_state().values())
        return torch.cat([part.view(torch.uint8) for part in parts])

    def _residual_before_merge(self) -> bool:
        stored = self.quantisation.stored(self.storage).values()
        return self.rows_before_merge.numel() > sum(t.numel() * t.element_size() for t in stored)

    def _empty_residual(self, device: torch.device | str) -> Tensor:
        return torch.zeros(self.out_features, self.in_features, dtype=torch.bfloat16, device=device)

    def _with_residual(self) -> Tensor:
        """The residual; where there was none it is 0, which changes no number of the weight."""
        if self.residual is None:
            self.register_buffer(RESIDUAL, self._empty_residual(self.weight.device))
        return self._buffers[RESIDUAL]  # type: ignore[return-value]

    def _add_adapters(self, *args: Any) -> None:
        self.quantised_merge, self.rounding = None, None
        super()._add_adapters(*args)

    def _drop_adapters(self) -> None:
        super()._drop_adapters()
        self._buffers.pop(RESIDUAL, None)
        for name in ("quantised_merge", "rounding"):
            self.__dict__.pop(name, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}{RESIDUAL}" in state_dict:
            self._with_residual()
        super()._load_from_state_dict(state_dict, prefix, *args)


def warn_of_rounding(action: str, layers: Mapping[str, AdaptedLinear]) -> None:
    """Warns of layers in which quantising again has changed a large part of an update."""
    shares = {
        name: layer.rounding.share
        for name, layer in layers.items()
        if isinstance(layer, QuantisedLinear) and layer.rounding is not None
    }
    lost = [name for name, share in shares.items() if share > LARGEST_SHARE]
    if lost:
        worst = max(lost, key=shares.__getitem__)
        warn(
            f"{action}: quantising again changed more than {LARGEST_SHARE:.0%} of the update of "
            f"{len(lost)} of {len(shares)} layers ({worst}: the error is {shares[worst]:.0%} of the update), "
            'so little is left of what was trained; quantised_merge="residual" keeps it. fe.rounding(model) '
            "lists all layers"
        )
