# SPDX-License-Identifier: Apache-2.0
"""The protocol of a continual-learning method, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..distributed.transaction import by_canonical_name
from ..errors import ArgumentError, TargetError
from ..layers.adapted import AdaptedLinear
from ..layers.from_peft import no_adapters
from ..layers.inject import adapters, eject, inject
from ..layers.watch import TrainingWatch
from ..literals import Variant
from ..progress import showing
from ._shares import drawing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Loader = Iterable[Any]
Loss = Callable[[Any, Any], Tensor]
VARIANTS: tuple[Variant, ...] = ("paper", "official")


class Method:
    """The protocol of all methods: a sequence of tasks on the adapters of a model.

    Make the optimizer after `begin_task`, because a method may replace parameters there. Heads and other
    trained parameters are the caller's. `layers` are the adapted layers by name, and `tasks` is the number of
    tasks that have ended.

    Every process of a group calls `begin_task`, `prepare` and `end_task`: what these learn from data is a sum
    over processes, what they draw is the same in all, and an error in one is raised in all.

    Args:
        model: plain, and then injected with `config`; or injected already, with config None.
        config: the `LoRAConfig` of the injection, or None.
        group: the processes that train this model together, each with its share of the data of every task;
            None is all of torch.distributed, where that is initialised. Processes that train models of their
            own need a group each.

    Raises:
        ArgumentError: for a plain model without a config.
        TargetError: for adapters of convolutions that PEFT manages.
        EWCLoRAError: the errors of `inject`.

    Examples:
        >>> method = methods.LoRA(model, config)  # or another method
        >>> for task in range(2):
        ...     method.begin_task(task)
        ...     method.prepare(loader, criterion)  # for methods that look at the data first
        ...     optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
        ...     for step, (inputs, labels) in enumerate(loader):
        ...         optimizer.zero_grad()
        ...         (criterion(model(inputs), labels) + method.penalty()).backward()
        ...         optimizer.step()
        ...         method.after_step(step, total_steps=len(loader))
        ...     method.end_task(loader, criterion)
        >>> method.tasks
        2
        >>> type(method.export().fc)
        <class 'torch.nn.modules.linear.Linear'>
    """

    # Whether the end of a task makes other adapters of those that an optimizer holds.
    starts_anew: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, config: LoRAConfig | None = None, *, group: ProcessGroup | None = None
    ) -> None:
        if config is not None:
            inject(model, config)
        elif not adapters(model):
            raise ArgumentError(f"config: expected a LoRAConfig, got None; {no_adapters(model)}")
        self.model, self.group = model, group
        self.layers: dict[str, AdaptedLinear] = by_canonical_name(adapters(model).items())
        if kernels := [name for name, layer in self.layers.items() if not layer.stores_matrices]:
            raise TargetError(
                f"{kernels[0]}: its lora_A and lora_B are convolutions of PEFT, which methods cannot use; "
                "fe.integrations.peft.attach_ewc makes an EWC over them, fe.inject adapters for methods"
            )
        self.watch = TrainingWatch(self.layers)
        self.tasks = 0  # that have ended
        self._running = self._exported = False

    def __repr__(self) -> str:
        settings = [
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "tasks" and isinstance(value, (bool, int, float, str))
        ]
        if (ewc := getattr(self, "ewc", None)) is not None:
            settings.append(f"ewc={ewc!r}")
        running = ", one running" if self._running else ""
        counts = f"{self.tasks} tasks{running}, {len(self.layers)} layers"
        return f"{type(self).__name__}({', '.join(settings)}{'; ' if settings else ''}{counts})"

    def begin_task(self, task: int) -> None:
        """Begins a task; tasks come in order, each ended before the next.

        Args:
            task: its number, counted from 0.

        Raises:
            ArgumentError: while a task is running, for another number than the next, and after `export`, as
                all that follow.
        """
        self._check_not_exported("begin_task")
        if self._running:
            raise ArgumentError(f"begin_task: task {self.tasks} has not ended; call end_task first")
        if isinstance(task, bool) or task != self.tasks:
            raise ArgumentError(f"task: expected {self.tasks}, the next one, got {task!r}")
        self._begin()
        self._running = True

    def prepare(self, loader: Loader, loss_fn: Loss | None = None, *, progress: bool | None = None) -> None:
        """Looks at the data of the task that has begun, before it is trained on; most methods do not.

        Args:
            loader: of the batches of the task.
            loss_fn: loss_fn(output, y), for methods that need gradients.
            progress: as in `end_task`.
        """
        self._check_not_exported("prepare")

    def penalty(self) -> Tensor:
        """What the method adds to the loss.

        Returns:
            0-d and differentiable; 0 for methods without a penalty.
        """
        self._check_not_exported("penalty")
        layer = next(iter(self.layers.values()))
        leaf = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return torch.zeros((), device=layer.weight.device, requires_grad=leaf)

    def after_step(self, step: int, total_steps: int) -> None:
        """What the method does after every step of the optimizer; call it there.

        Args:
            step: the number of the step within the task, counted from 0.
            total_steps: how many steps the task has.

        Raises:
            ArgumentError: for a step that is not below total_steps.
        """
        self._check_not_exported("after_step")
        if not 0 <= step < total_steps:
            raise ArgumentError(f"step: expected 0 <= step < total_steps, got {step} of {total_steps}")
        self._after_step(step, total_steps)

    def end_task(self, loader: Loader, loss_fn: Loss | None = None, *, progress: bool | None = None) -> None:
        """Ends the task: consolidates what it has learned.

        Args:
            loader: of the batches of the task, for methods that look at its data.
            loss_fn: loss_fn(output, y), for methods that need gradients.
            progress: whether a bar on stderr shows the passes over data; None shows it on a terminal after a
                second.

        Raises:
            ArgumentError: before `begin_task`.
            EWCLoRAError: what the consolidation raises; the task can then be ended again.
        """
        self._check_not_exported("end_task")
        if not self._running:
            raise ArgumentError("end_task: no task is running; call begin_task first")
        watch = self.watch if getattr(self, "ewc", None) is None else None  # an EWC has a watch of its own
        if watch is not None:
            watch.note_gradients()
            watch.check_changed("end_task")
        with showing(progress):
            self._end(loader, loss_fn)
        if watch is not None and self.starts_anew:
            watch.expect_fresh_optimizer()
        self.tasks += 1
        self._running = False

    def kept_tensors(self) -> Iterator[Tensor]:
        """What the method itself keeps from step to step, beside model and adapters.

        Yields:
            The tensors: Fishers, anchors, subspaces.
        """
        if (ewc := getattr(self, "ewc", None)) is not None:
            yield from ewc.state_dict()["tensors"].values()

    def export(self) -> nn.Module:
        """The end of training: everything learned is folded into plain layers, in place. The method cannot go
        on afterwards.

        Returns:
            The model.

        Raises:
            ArgumentError: while a task is running, and for a second time.
            EWCLoRAError: the errors of `eject`; nothing is changed then.
        """
        self._check_exportable()
        eject(self.model, merge=True)
        self._exported = True
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What the method itself remembers, for `load_state_dict` of a freshly built one; weights, heads and
        optimizers are the caller's.

        Returns:
            Tensors and plain values in dictionaries.
        """
        raise NotImplementedError

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()`, before the model's own state_dict is loaded: ranks may change.

        Args:
            saved: what `state_dict` returned, also from a file.
        """
        raise NotImplementedError

    def _check_not_exported(self, what: str) -> None:
        """Raises `ArgumentError` when the adapters that the method works on are gone. `eject` removes all or
        none, so that one layer tells."""
        if self._exported or not isinstance(next(iter(self.layers.values())), AdaptedLinear):
            raise ArgumentError(
                f"{what}: the model was exported or ejected already, and its layers have no adapters of this "
                f"method any more; make a new {type(self).__name__} to train on"
            )

    def _check_exportable(self) -> None:
        self._check_not_exported("export")
        if self._running:
            raise ArgumentError(f"export: task {self.tasks} has not ended; call end_task first")

    def _drawing(self, generator: torch.Generator | None = None) -> torch.Generator | None:
        """The source of new parameters, `generator` unless several processes must draw the same."""
        return drawing(generator, next(iter(self.layers.values())).weight.device, self.group)

    def _begin(self) -> None: ...

    def _after_step(self, step: int, total_steps: int) -> None: ...

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        raise NotImplementedError
