"""EWC for adapters that are kept: the penalty acts on what has changed since the last task, and nothing is
folded in."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor

from ..distributed.transaction import Transaction
from ..errors import ArgumentError, FisherError, TargetError
from ..ewc.consolidate import check_ready, new_fisher
from ..ewc.controller import EWC
from ..ewc.fisher_pass import nonfinite
from ..ewc.settings import number
from ..ewc.state import EWCState, TaskRecord
from ..functional import Adapter
from ..layers.adapted import AdaptedLinear
from ..layers.index import Operands, check_present, slots_of


class _Changing(Protocol):
    def changes(self, layer: AdaptedLinear) -> list[Adapter]: ...


class AnchoredEWC(EWC):
    """(lambda/2) sum F (Delta - Delta_0)^2, Delta_0 what the adapters added when the last task ended.

    `changes` of a layer's composer gives Delta - Delta_0 as adapters. `consolidate` updates F alone; moving
    the anchor is the method's part. Arguments and errors are those of `EWC`, without merge_mode.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        if "merge_mode" in settings:
            raise ArgumentError("merge_mode: expected none, nothing is merged between tasks")
        super().__init__(*args, **settings)

    def refresh(self) -> None:
        """After ranks have changed."""
        self._slots = slots_of(self.layers)

    def shard_(self, mesh: Any = None) -> None:
        """Raises `TargetError`: composed adapters cannot be sharded."""
        raise TargetError("shard_: expected adapters of lora_A and lora_B alone, got stacked directions")

    def _operands(self) -> Operands:
        check_present(self._slots)
        self._follow()
        changes: list[Adapter] = []
        for layer in self.layers.values():
            changes += cast(_Changing, layer.composer).changes(layer)
        return (
            list(self._state.fishers.values()),
            [adapter.lora_a for adapter in changes],
            [adapter.lora_b for adapter in changes],
            [adapter.scale for adapter in changes],
        )

    def consolidate(self, gamma: float | None = None) -> None:
        """F <- gamma F + F_task. Raises `FisherError` without an estimate or for a value that is not finite,
        `TargetError` while merged, and then changes nothing."""
        self._check_placement()
        gamma = self.gamma if gamma is None else number("gamma", gamma, 0.0, 1.0)
        check_ready(self.layers)
        state, task = self._state, self._state.task
        if task is None:
            raise FisherError("consolidate: this task has no Fisher yet; call estimate_fisher first")
        fishers: dict[str, Tensor] = {
            slot.key: new_fisher(
                state.fishers.get(slot.key), task, slot.key, gamma, self.update, self.fisher_dtype
            )
            for slot in self._slots
        }
        if self.check_finite and (bad := nonfinite(fishers)):
            raise FisherError(f"consolidate: Fisher of {bad[0]}: expected finite values, got NaN or Inf")
        record = TaskRecord("+".join(task.labels), task.samples, task.batch_size, gamma)
        with Transaction() as change:
            for key, old in state.fishers.items():
                change.copy_(old, fishers[key])
            self._state = EWCState(state.fishers or fishers, {}, (*state.history, record), None)
        self._drawing = None

    def end_task(self, *args: Any, **options: Any) -> None:
        """As `EWC.end_task`; but what was estimated is discarded, too, when it raises."""
        before = self._state
        try:
            super().end_task(*args, **options)
        except BaseException:
            self._state = before
            raise
