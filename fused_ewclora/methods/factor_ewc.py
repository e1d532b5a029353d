# SPDX-License-Identifier: Apache-2.0
"""EWC on the factors of an adapter apart, the ablation of EWC-LoRA (arXiv 2602.17559)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..distributed.processes import several, sharded
from ..distributed.reduce import reduced
from ..errors import CheckpointError, FisherError, TargetError
from ..ewc.estimation import check_labels
from ..ewc.settings import FISHER_MODES, checked_lambda, number, one_of
from ..ewc.state import TaskFisher, TaskRecord
from ..ewc.structures import part_key
from ..layers.adapted import AdaptedLinear
from ..layers.finite import check_finite
from ..layers.inject import adapters
from ..literals import FisherMode, Labels
from ._factor_fisher import A, B, FactorPlacement, factor_fisher
from ._resume import dump, parse, take_over
from ._shares import in_all
from ._start import check_uncomposed
from .method import Loader, Loss, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FISHER, ANCHOR = "fisher", "anchor"


@dataclass(frozen=True)
class FactorState:
    """What is kept between tasks, replaced as a whole: Fishers and the values after the last task, of lora_A
    and lora_B by `part_key`."""

    fishers: dict[str, Tensor] = field(default_factory=dict)
    anchors: dict[str, Tensor] = field(default_factory=dict)
    history: tuple[TaskRecord, ...] = ()


class FactorEWC(Method):
    """EWC on the factors of one adapter that all tasks train on, the ablation that EWC-LoRA is compared with
    (arXiv 2602.17559; docs/mathematics.md, section 14).

    The penalty is

        P = (lambda/2) [sum F_A (A - A*)^2 + sum F_B (B - B*)^2],

    where A* and B* are the values after the last task and F_A, F_B the diagonal Fishers of lora_A and lora_B
    themselves, each regardless of the other: `F <- gamma F + F_task`. That of `EWCLoRA` is of the product B
    A.

    The paper does not say how its separate F_A and F_B go with merging; this is the reading in which they
    have a meaning. Between tasks nothing is folded into the base weights and A and B are not drawn anew,
    because A* and B* would belong to other parameters; `export` folds them in.

    Args:
        model: a plain model, which is injected with `config`, or one with injected adapters.
        config: of the adapters to inject; None for a model that has them.
        ewc_lambda: strength of the penalty, in the unit of that of `EWCLoRA`, but the two penalties leave out
            different cross terms.
        gamma: decay of the Fishers of earlier tasks, as in `EWC`.
        fisher_mode: "sample" or "batch", as in `EWC`.
        labels: of the Fishers, as in `EWCLoRA`.
        group: the processes that train this model together, as in `EWCLoRA`.

    Raises:
        ArgumentError: for values out of range.
        TargetError: for sharded parameters, adapters of another method and a lora_scale that is trained,
            which the penalty does not hold, before anything is changed.
        FisherError: from `end_task`, which raises the errors of `EWC.estimate_fisher`; nothing has changed
            then.

    Examples:
        >>> method = methods.FactorEWC(model, config, ewc_lambda=100.0)
        >>> method.begin_task(0)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> (criterion(model(x), y) + method.penalty()).backward()
        >>> optimizer.step()
        >>> method.end_task(loader, criterion)
        >>> list(method.fishers)
        ['fc:A', 'fc:B']
    """

    starts_anew: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        ewc_lambda: float,
        gamma: float = 1.0,
        fisher_mode: FisherMode = "sample",
        labels: Labels = "empirical",
        group: ProcessGroup | None = None,
    ) -> None:
        self.ewc_lambda = checked_lambda(ewc_lambda)
        self.gamma = number("gamma", gamma, 0.0, 1.0)
        self.fisher_mode = one_of("fisher_mode", fisher_mode, FISHER_MODES)
        check_labels(labels, fisher_mode)
        self.labels = labels
        _check_layers(adapters(model))
        super().__init__(model, config, group=group)
        self._placement = FactorPlacement(model, self.layers)
        self._state = FactorState()

    @property
    def fishers(self) -> dict[str, Tensor]:
        """F_A `[r, d_in]` and F_B `[rows, r]`, by the name of the adapter with ":A" and ":B"; empty before
        the end of the first task."""
        return dict(self._state.fishers)

    @property
    def anchors(self) -> dict[str, Tensor]:
        """A* and B*, by the same names."""
        return dict(self._state.anchors)

    @property
    def history(self) -> tuple[TaskRecord, ...]:
        """How the Fishers of each task were made."""
        return self._state.history

    def _begin(self) -> None:
        _check_layers(self.layers)

    def penalty(self) -> Tensor:
        """The penalty P, in fp32 (fp64 for fp64).

        Returns:
            A 0-d tensor, differentiable; 0 during the first task.
        """
        if not self._state.fishers:
            return super().penalty()
        self._check_not_exported("penalty")
        self._follow()
        total: Tensor | None = None
        for keys in self._by_device().values():
            own = _sum_of_squares(keys, self._parameters(), self._state)
            total = own if total is None else total + own.to(total.device)
        assert total is not None
        return 0.5 * self.ewc_lambda * total

    def _parameters(self) -> dict[str, Tensor]:
        """lora_A and lora_B by `part_key`."""
        return {
            part_key(ref.key, part): parameter
            for ref in self._placement.refs
            for part, parameter in zip((A, B), ref.parameters(), strict=True)
        }

    def _by_device(self) -> dict[torch.device, list[str]]:
        devices: dict[torch.device, list[str]] = {}
        for key, fisher in self._state.fishers.items():
            devices.setdefault(fisher.device, []).append(key)
        return devices

    def _follow(self) -> None:
        """The state follows a model that was moved to another device."""
        state, parameters = self._state, self._parameters()
        if all(fisher.device == parameters[key].device for key, fisher in state.fishers.items()):
            return
        fishers, anchors = (
            {key: tensor.to(parameters[key].device) for key, tensor in tensors.items()}
            for tensors in (state.fishers, state.anchors)
        )
        self._state = FactorState(fishers, anchors, state.history)

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        many = several(self.group)
        task = in_all(lambda: self._task_fisher(loader, loss_fn, many), self.group)
        if many:
            task = reduced(task, self._described(), self.group)
        if task.samples == 0:
            raise FisherError("end_task: the loaders of all processes were empty; no process has samples")
        self._state = in_all(lambda: self._joined(task), self.group)

    def _task_fisher(self, loader: Loader, loss_fn: Loss | None, allow_empty: bool) -> TaskFisher:
        _check_layers(self.layers)
        return factor_fisher(
            self.model,
            self._placement,
            loader,
            loss_fn,
            mode=self.fisher_mode,
            labels=self.labels,
            allow_empty=allow_empty,
        )

    @torch.no_grad()
    def _joined(self, task: TaskFisher) -> FactorState:
        """The state after the task."""
        self._follow()
        fishers = {key: sums / task.samples for key, sums in task.buffers.items()}
        if self.gamma and self._state.fishers:
            fishers = {
                key: new.add(self._state.fishers[key], alpha=self.gamma) for key, new in fishers.items()
            }
        parameters = self._parameters()
        anchors = {key: parameters[key].detach().clone() for key in fishers}
        named = {f"the Fisher of {key}": fisher for key, fisher in fishers.items()}
        check_finite({**named, **anchors}, "end_task", FisherError)
        record = TaskRecord("+".join(task.labels), task.samples, task.batch_size, self.gamma)
        return FactorState(fishers, anchors, (*self._state.history, record))

    def _described(self) -> dict[str, Any]:
        """What must be the same in all processes."""
        shapes = {key: list(parameter.shape) for key, parameter in self._parameters().items()}
        settings = {name: getattr(self, name) for name in ("ewc_lambda", "gamma", "fisher_mode", "labels")}
        return {**shapes, **settings}

    def kept_tensors(self) -> Iterator[Tensor]:
        """The Fishers of both factors, and what these are held to."""
        yield from (*self.fishers.values(), *self.anchors.values())

    def state_dict(self) -> dict[str, Any]:
        """The state of the method between tasks. Weights and adapters are in the model's own state_dict.

        Returns:
            {"tensors": Fishers and anchors, "config": how they were made}.

        Examples:
            >>> method = methods.FactorEWC(model, config, ewc_lambda=100.0)
            >>> torch.save([model.state_dict(), method.state_dict()], "task0.pt")
        """
        state = self._state
        tensors = {
            f"{kind}.{key}": tensor
            for kind, held in ((FISHER, state.fishers), (ANCHOR, state.anchors))
            for key, tensor in held.items()
        }
        history = [asdict(record) for record in state.history]
        return dump(self, tensors, fisher_mode=self.fisher_mode, history=history)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of a FactorEWC with the same fisher_mode and adapters, which may be
        freshly injected; nothing changes unless all of it fits. Load the model's own state_dict as well.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            ArgumentError: during a task.
            CheckpointError: naming what does not fit.

        Examples:
            >>> method = methods.FactorEWC(model, config, ewc_lambda=100.0)
            >>> saved = method.state_dict()
            >>> later = methods.FactorEWC(model, ewc_lambda=100.0)
            >>> later.load_state_dict(saved)
        """
        tensors, config = parse(self, saved, fisher_mode=self.fisher_mode)
        history = _history(config.get("history"), config["tasks"])
        parameters = self._parameters()
        expected = {f"{kind}.{key}" for kind in (FISHER, ANCHOR) for key in parameters} if history else set()
        if set(tensors) != expected:
            wrong = sorted(set(tensors) ^ expected)[0]
            raise CheckpointError(f"state: tensors: expected those of the model's adapters; {wrong} differs")
        fishers, anchors = (
            {key: _checked(tensors[f"{kind}.{key}"], kind, key, like) for key, like in parameters.items()}
            if history
            else {}
            for kind in (FISHER, ANCHOR)
        )
        self._state = FactorState(fishers, anchors, history)
        take_over(self, config)


def _check_layers(layers: Mapping[str, AdaptedLinear]) -> None:
    """Raises `TargetError` for adapters whose factors are not all that is trained, or not whole."""
    if names := sharded(layers):
        raise TargetError(f"{names[0]}: its parameters are sharded, which FactorEWC cannot use")
    check_uncomposed(layers)
    for name, layer in layers.items():
        for piece in layer.adapter_slices:
            scale = layer.adapter_scale(piece)
            if isinstance(scale, Tensor) and scale.requires_grad:
                raise TargetError(
                    f"{name}: its {piece.scale_name} is trained, which a penalty on lora_A and lora_B does "
                    "not hold; freeze it (requires_grad_(False))"
                )


def _sum_of_squares(keys: list[str], parameters: Mapping[str, Tensor], state: FactorState) -> Tensor:
    """sum F (p - p*)^2 of parameters on one device, of which all are flattened and joined: a few launches,
    whatever their number."""
    fishers = torch.cat([state.fishers[key].flatten() for key in keys])
    values, anchors = (
        torch.cat([held[key].flatten() for key in keys]) for held in (parameters, state.anchors)
    )
    change = values.to(fishers.dtype) - anchors.to(fishers.dtype)
    return (fishers * change * change).sum()


def _checked(tensor: Any, kind: str, key: str, like: Tensor) -> Tensor:
    """A copy on the device of the parameter `like`, of finite values in its shape, squares for Fishers."""
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or not tensor.is_floating_point():
        got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CheckpointError(f"state: {kind} of {key}: expected numbers {list(like.shape)}, got {got}")
    if not bool(tensor.isfinite().all()) or (kind == FISHER and bool((tensor < 0).any())):
        raise CheckpointError(f"state: {kind} of {key}: expected finite values, and squares for a Fisher")
    wide = torch.promote_types(like.dtype, torch.float32) if kind == FISHER else like.dtype
    return tensor.detach().to(like.device, wide, copy=True)


def _history(saved: Any, tasks: int) -> tuple[TaskRecord, ...]:
    if not isinstance(saved, list) or len(saved) != tasks:
        raise CheckpointError(f"state: history: expected a record for each of {tasks} tasks, got {saved!r}")
    try:
        return tuple(TaskRecord(**entry) for entry in saved)
    except TypeError as error:
        raise CheckpointError(f"state: history: expected records of tasks: {error}") from error
