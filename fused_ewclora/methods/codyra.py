# SPDX-License-Identifier: Apache-2.0
"""CoDyRA (arXiv 2412.01004): every rank of an adapter has a learned importance, and most become exactly 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import functional as FE
from ..config import LoRAConfig
from ..distributed.processes import sharded
from ..distributed.transaction import Transaction
from ..errors import ArgumentError, CheckpointError, TargetError
from ..ewc.controller import EWC
from ..ewc.estimation import check_labels
from ..ewc.placement import LocalPlacement
from ..ewc.settings import FISHER_MODES, checked_lambda, number, one_of
from ..ewc.state import EWCState
from ..ewc.structures import Structure
from ..layers.inject import adapters
from ..literals import FisherMode, GateInit, Labels, Schedule, StructureName, Threshold
from ..report import Report
from ._gates import add_gates, prune_, whole_ranks
from ._resume import dump, parse, take_over
from ._shares import agreed, end_task, folded
from ._start import check_plain_adapters, ejected_on_error
from .method import Loader, Loss, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GATE_INITS: tuple[GateInit, ...] = ("ones", "normal")
THRESHOLDS: tuple[Threshold, ...] = ("soft", "dead_zone")
SCHEDULES: tuple[Schedule, ...] = ("linear", "staircase")
STAIRS = 50  # levels of kappa in the official code (lambda_num)


class CoDyRA(Method):
    """`Delta W = B diag(w) A` with one trained gate w per rank (`lora_scale`), made sparse by the proximal
    step `w <- sign(w) max(|w| - kappa, 0)` after each step of the optimizer (CoDyRA, arXiv 2412.01004;
    docs/mathematics.md, section 6).

    `after_step` makes the proximal step. At the end of a task `W <- W + B diag(w) A`, and A, B and w start
    anew at full rank. Adapters are those of `inject`, not sharded.

    Args:
        model: as in `Method`.
        config: as in `Method`.
        kappa_max: kappa at the last step of a task.
        dense_fraction: share of a task's steps, in [0, 1], during which kappa is 0; then it rises linearly to
            kappa_max.
        gate_init: "ones", or "normal", the official N(0, 1), which by itself decides about half of the
            selection.
        threshold: "soft", as in the paper, or "dead_zone", as in the official code, where gates below 2 kappa
            vanish.
        schedule: "linear", as in the paper, or "staircase", as in the official code: 50 levels of kappa of
            equal length from the first step after the dense ones.
        generator: draws new gates, then new A; None is the default generator.
        ewc_lambda: adds the EWC penalty of EWC-LoRA on B diag(w) A, with gradients for w; this combination is
            ours, in no paper. None: no penalty, and `end_task` does not look at its loader.
        gamma: as in `EWC`, like the two that follow.
        fisher_mode: as there.
        fisher_dtype: as there.
        labels: as in `EWCLoRA`.
        group: as in `Method`.
        fisher: as in `EWC`.

    Raises:
        ArgumentError: for values out of range, before anything is changed.
        TargetError: for adapters that have gates or another method already, before anything is changed.
        EWCLoRAError: the errors of `Method` and of `EWC`.

    Examples:
        >>> method = methods.CoDyRA(model, config, kappa_max=0.1)
        >>> for task in range(2):
        ...     method.begin_task(task)
        ...     optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ...     for step, (inputs, labels) in enumerate(loader):
        ...         optimizer.zero_grad()
        ...         criterion(model(inputs), labels).backward()
        ...         optimizer.step()
        ...         if task == 1:
        ...             _ = method.gates()["fc"].data.copy_(torch.tensor([1.0, 0.05]))  # as if learned
        ...         method.after_step(step, total_steps=len(loader))
        ...     method.end_task(loader)
        >>> method.report().summary["tasks"]  # ranks that survived each
        [2, 1]
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        kappa_max: float = 5e-3,
        dense_fraction: float = 0.5,
        gate_init: GateInit = "ones",
        threshold: Threshold = "soft",
        schedule: Schedule = "linear",
        generator: torch.Generator | None = None,
        ewc_lambda: float | None = None,
        gamma: float = 1.0,
        fisher_mode: FisherMode = "sample",
        fisher_dtype: torch.dtype | Literal["8bit"] = torch.float32,
        labels: Labels = "empirical",
        group: ProcessGroup | None = None,
        fisher: StructureName | Structure = "dense",
    ) -> None:
        self.kappa_max = number("kappa_max", kappa_max, 0.0, math.inf)
        self.dense_fraction = number("dense_fraction", dense_fraction, 0.0, 1.0)
        self.gate_init = one_of("gate_init", gate_init, GATE_INITS)
        self.threshold = one_of("threshold", threshold, THRESHOLDS)
        self.schedule = one_of("schedule", schedule, SCHEDULES)
        self.generator, self.labels = generator, labels
        check_labels(labels, one_of("fisher_mode", fisher_mode, FISHER_MODES))
        number("gamma", gamma, 0.0, 1.0)
        if ewc_lambda is not None:
            checked_lambda(ewc_lambda)
        check_plain_adapters(adapters(model))
        self.ewc: EWC | None = None
        with ejected_on_error(model):  # a Fisher may not go with the layers or the mode
            super().__init__(model, config, group=group)
            if ewc_lambda is not None:
                options = (ewc_lambda, gamma, fisher_mode, fisher_dtype)
                self.ewc = EWC(model, *options, generator=generator, fisher=fisher)
        self._adapters = add_gates(self.layers)
        self._survivors: list[dict[str, int]] = []  # per task that has ended
        with torch.no_grad():
            for gate, value in zip(self.gates().values(), self._new_gates(generator), strict=True):
                gate.copy_(value)

    def gates(self) -> dict[str, nn.Parameter]:
        """The gates.

        Returns:
            w `[ranks]` by module name, with ".k" etc. for slices; fewer ranks than r after `compact_`.
        """
        self._check_not_exported("gates")
        return {adapter.key: adapter.gate for adapter in self._adapters}

    def penalty(self) -> Tensor:
        """The penalty `(lambda/2) sum F (B diag(w) A)^2`, with an ewc_lambda.

        Returns:
            0-d and differentiable; 0 during the first task and without an ewc_lambda.
        """
        if self.ewc is None:
            return super().penalty()
        self._check_not_exported("penalty")
        return self.ewc.penalty()

    def kappa(self, step: int, total_steps: int) -> float:
        """The shrinkage after a step.

        Args:
            step: the number of the step within the task, counted from 0.
            total_steps: how many steps the task has.

        Returns:
            kappa, from 0 to kappa_max.

        Examples:
            >>> method = methods.CoDyRA(model, config, kappa_max=0.5)
            >>> [method.kappa(step, total_steps=4) for step in range(4)]
            [0.0, 0.0, 0.25, 0.5]
        """
        dense = self.dense_fraction * total_steps
        if self.schedule == "linear":
            return self.kappa_max * (max(step + 1 - dense, 0.0) / (total_steps - dense or math.inf))
        stair = int((total_steps - dense) // STAIRS)
        if step <= dense or stair == 0:  # fewer steps than stairs: the official code never leaves the first
            return 0.0
        climbed = step // stair + (-math.ceil(dense) // stair) + 1  # multiples of stair since the dense steps
        return self.kappa_max * (min(climbed, STAIRS - 1) / (STAIRS - 1))

    @torch.no_grad()
    def compact_(self, optimizer: Optimizer | None = None) -> int:
        """Removes the ranks whose gate is exactly 0 from A, B, w and their gradients.

        The model computes the same and goes on training without them. A removed rank does not come back
        before the next task, which starts at full rank; without `compact_`, the gradient of its gate might
        make it nonzero again. Of several processes each must call this, and make its DistributedDataParallel
        afterwards.

        Args:
            optimizer: gets the new parameters, with its state (momentum, moments) cut accordingly; with None
                make one afterwards, because parameters are replaced.

        Returns:
            How many ranks were removed.

        Raises:
            TargetError: for merged or sharded layers and when processes differ in what survives; nothing is
                changed then.
            ArgumentError: for an optimizer that does not hold the adapters or whose state has another shape
                (Adafactor, LBFGS); nothing is changed then.

        Examples:
            >>> method = methods.CoDyRA(model, config)
            >>> method.begin_task(0)
            >>> optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
            >>> _ = method.gates()["fc"].data.copy_(torch.tensor([1.0, 0.0]))  # as if learned
            >>> method.compact_(optimizer)
            1
            >>> model.fc.lora_A.shape
            torch.Size([1, 8])
        """
        self._check_not_exported("compact_")
        for name, layer in self.layers.items():
            if layer.merged:
                raise TargetError(f"{name}: its adapter is merged into the base weight; call unmerge(model)")
        if names := sharded(self.layers):
            raise TargetError(f"{names[0]}: its parameters are sharded; compact before fully_shard")
        if optimizer is not None and "history_size" in optimizer.defaults:
            raise ArgumentError("optimizer: the history of LBFGS mixes all parameters; make a new one")
        agreed(self._alive(), self.group)
        return prune_(self._adapters, optimizer)

    def survivors(self) -> dict[str, int]:
        """How many gates are not 0 now.

        Returns:
            The counts by the names of `gates`.
        """
        self._check_not_exported("survivors")
        return {key: int(gate.detach().count_nonzero()) for key, gate in self.gates().items()}

    def report(self) -> Report:
        """Surviving ranks per adapter, at the end of every task and now.

        Returns:
            A printable table.

        Examples:
            >>> method = methods.CoDyRA(model, config)
            >>> method.begin_task(0)
            >>> _ = method.gates()["fc"].data.copy_(torch.tensor([1.0, 0.0]))  # as if learned
            >>> method.end_task(loader)
            >>> print(method.report())
            Surviving ranks
              adapter  r  task 0  now
              fc       2  1       2
        """
        self._check_not_exported("report")
        now = self.survivors()
        rows: list[dict[str, Any]] = []
        for adapter in self._adapters:
            row = {"adapter": adapter.key, "r": adapter.piece.r}
            row |= {f"task {t}": ranks[adapter.key] for t, ranks in enumerate(self._survivors)}
            rows.append({**row, "now": now[adapter.key]})
        full = sum(adapter.piece.r for adapter in self._adapters)
        kept = [sum(ranks.values()) for ranks in (*self._survivors, now)]
        return Report("Surviving ranks", rows, summary={"r": full, "tasks": kept[:-1], "now": kept[-1]})

    def _alive(self) -> dict[str, list[int]]:
        """Which gates are not 0."""
        return {
            f"surviving ranks of {key}": gate.detach().nonzero().flatten().tolist()
            for key, gate in self.gates().items()
        }

    def _new_gates(self, generator: torch.Generator | None) -> list[Tensor]:
        """New gates, drawn on the device of the generator so that one seed gives the same everywhere."""
        device = None if generator is None else generator.device
        values = []
        for adapter in self._adapters:
            value = torch.ones(adapter.piece.r, dtype=adapter.gate.dtype, device=device)
            values.append(value if self.gate_init == "ones" else value.normal_(generator=generator))
        return values

    def _after_step(self, step: int, total_steps: int) -> None:
        kappa = self.kappa(step, total_steps)
        gates: dict[torch.device, list[Tensor]] = {}
        for gate in self.gates().values():
            if gate.numel():
                gates.setdefault(gate.device, []).append(gate)
        for of_device in gates.values() if kappa > 0.0 else ():  # one call per device
            if self.threshold == "soft":
                FE.soft_threshold_(of_device, kappa)
            else:
                dead_zone_(of_device, kappa)

    @torch.no_grad()
    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        agreed(self._alive(), self.group)
        generator = self._drawing(self.generator)
        survivors, fresh = self.survivors(), self._new_gates(generator)
        with whole_ranks(self._adapters):
            if self.ewc is not None:
                end_task(self.ewc, loader, loss_fn, self.labels, self.group)
            else:
                self._fold(generator)
        for gate, value in zip(self.gates().values(), fresh, strict=True):
            gate.copy_(value)
        self._survivors.append(survivors)

    def _fold(self, generator: torch.Generator | None) -> None:
        placement = LocalPlacement(self.model, self.layers)
        with folded(placement, self.group) as change:
            placement.reset_adapters(change, generator)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on, between tasks. Weights, adapters and gates are in the
        model's own state_dict.

        Returns:
            {"tensors": the Fishers, "config": counts of tasks and ranks}.

        Raises:
            ArgumentError: during a task.
        """
        ewc = None if self.ewc is None else self.ewc.state_dict()
        tensors = {} if ewc is None else ewc["tensors"]
        return dump(
            self, tensors, survivors=[dict(ranks) for ranks in self._survivors], ewc=ewc and ewc["config"]
        )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of a CoDyRA on the same adapters, which may be freshly injected;
        nothing changes unless all of it fits. Load the model's own state_dict as well.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            ArgumentError: during a task.
            CheckpointError: naming what does not fit.
            FisherError: naming what does not fit of the Fishers.

        Examples:
            >>> import copy
            >>> fresh = copy.deepcopy(model)
            >>> method = methods.CoDyRA(model, config)
            >>> method.begin_task(0)
            >>> method.end_task(loader)
            >>> torch.save([model.state_dict(), method.state_dict()], "task0.pt")
            >>> weights, state = torch.load("task0.pt", weights_only=True)
            >>> later = methods.CoDyRA(fresh, config)
            >>> _ = fresh.load_state_dict(weights)
            >>> later.load_state_dict(state)
            >>> later.tasks
            1
        """
        tensors, config = parse(self, saved)
        survivors = self._checked(config.get("survivors"), config["tasks"])
        if (self.ewc is None) != (config.get("ewc") is None):
            raise CheckpointError(
                "state: one of the state and this method has an EWC penalty, the other has none; construct "
                "it with or without ewc_lambda as before"
            )
        state = self._parsed(tensors, config)
        with Transaction() as change:
            if self.ewc is not None and state is not None:
                self.ewc.take_over(state, change)
        self._survivors = survivors
        take_over(self, config)

    def _checked(self, survivors: Any, tasks: int) -> list[dict[str, int]]:
        keys = list(self.gates())
        counts = [dict(ranks) for ranks in survivors] if isinstance(survivors, list) else None
        if counts is None or any(sorted(ranks) != sorted(keys) for ranks in counts) or len(counts) != tasks:
            raise CheckpointError(
                f"state: survivors: expected {tasks} counts for {keys[:3]}, got {survivors}"
            )
        return counts

    def _parsed(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> EWCState | None:
        if self.ewc is None:
            return None
        return self.ewc.parse_state({"tensors": tensors, "config": config["ewc"]})


@torch.no_grad()
def dead_zone_(gates: list[Tensor], kappa: float) -> None:
    """The three assignments of the official code, one after the other: values between kappa and 2 kappa are
    shrunk below kappa by the first and set to 0 by the last; kappa itself stays."""
    for gate in gates:
        shrunk = torch.where(gate > kappa, gate - kappa, gate)
        shrunk = torch.where(shrunk < -kappa, shrunk + kappa, shrunk)
        gate.copy_(torch.where(shrunk.abs() < kappa, torch.zeros_like(shrunk), shrunk))
