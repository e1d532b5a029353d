# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the training of adapters that no error would show, told once each: an optimizer that does not
hold the adapters, one that still has the moments of a task that has ended, and a task that is ended twice."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ..distributed.processes import is_dtensor
from ..errors import EWCLoRAError, warn
from .adapted import AdaptedLinear

MAX_LOOKS = 100  # steps of optimizers that decide nothing, after which it is no use to look at more

# Those that wait for the next step of an optimizer. The hook below exists while there are any.
_waiting: weakref.WeakSet[TrainingWatch] = weakref.WeakSet()
_hook: RemovableHandle | None = None


class TrainingWatch:
    """Watches how the adapters of some layers are trained, at the boundaries of tasks.

    Between them it costs nothing, but for a hook on optimizers: it is there from the end of a task to the
    first step afterwards of an optimizer that holds adapters.
    """

    _ended_with: weakref.ref[object] | None = None  # the loader of the last task

    def __init__(self, layers: Mapping[str, AdaptedLinear]) -> None:
        self._layers = layers
        self._gradients = False  # whether adapters had gradients when the Fisher pass began
        # Gradients that were there when the last task ended, and their versions: of no step since.
        self._left: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._told: set[str] = set()
        self._looks = 0

    def note_gradients(self) -> None:
        """To be called before a Fisher pass, whose own backward passes leave gradients too."""
        self._gradients = self._gradients or any(self._is_new(b.grad) for b in self._lora_bs())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_left": {}, "_ended_with": None}  # weak references cannot be copied

    def _is_new(self, grad: Tensor | None) -> bool:
        if grad is None:
            return False
        left, version = self._left.get(id(grad), (None, -1))
        return left is None or left() is not grad or grad._version != version

    def check_changed(self, call: str) -> None:
        """To be called when a task ends, before its adapters are folded in: warns when they had gradients,
        but every lora_B is still 0, which it is at the start of a task."""
        seen, self._gradients = self._gradients, False
        grads = [b.grad for b in self._lora_bs() if b.grad is not None]
        self._left = {id(grad): (weakref.ref(grad), grad._version) for grad in grads}
        if seen and not _any_nonzero(self._lora_bs()):
            self._tell(
                "unchanged",
                f"{call}: no adapter changed during this task, although they had gradients: lora_B is 0 "
                "everywhere. Was the optimizer made before inject (or before begin_task, or before .to() or "
                "load_state_dict(assign=True) replaced the parameters), or is its learning rate 0? Make it "
                "after inject, from the parameters that require gradients",
            )

    def check_repeated(self, loader: object) -> None:
        """To be called when a task is about to end: warns when its data are those of the last one, and the
        adapters have not been trained since."""
        ended_with = None if self._ended_with is None else self._ended_with()
        if ended_with is None or ended_with is not loader:
            return
        bs = self._lora_bs()
        if not any(self._is_new(b.grad) for b in bs) and not _any_nonzero(bs):
            self._tell(
                "repeated",
                "end_task: it was called with this loader before, and no adapter has been trained since, so "
                "the Fisher of one task is counted twice; call end_task once, at the end of each task",
            )

    def note_ended_with(self, loader: object) -> None:
        """To be called when a task has ended; does not keep its loader alive."""
        try:
            self._ended_with = weakref.ref(loader)
        except TypeError:  # lists and tuples, of which there are no weak references
            self._ended_with = None

    def expect_fresh_optimizer(self) -> None:
        """To be called when a task has ended: looks at the optimizer of the next step."""
        global _hook
        self._looks = 0
        _waiting.add(self)
        if _hook is None:
            _hook = register_optimizer_step_pre_hook(_before_step)

    def dismiss(self) -> None:
        """Do not look at the next step: the state of the optimizer is kept on purpose."""
        _waiting.discard(self)

    def look(self, optimizer: Optimizer) -> bool:
        """Warns of an optimizer that is about to step; returns whether nothing is left to look for."""
        self._looks += 1
        if adapters := self.check_holds(optimizer):
            if any(_has_moments(optimizer, parameter) for parameter in adapters):
                self._tell(
                    "moments",
                    "the optimizer still has the moments of the adapters of the task that has ended, which "
                    "push the new ones in its directions; after each task make a new optimizer, or call "
                    "fused_ewclora.reset_optimizer_state_(optimizer, model)",
                )
            return True
        return self._looks >= MAX_LOOKS or not self._adapted()

    def check_holds(self, optimizer: Optimizer) -> list[Tensor]:
        """The adapters that an optimizer holds; warns when it holds base weights instead."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        layers = self._adapted()
        adapters: list[Tensor] = [
            p for layer in layers for _, p in layer.named_lora_parameters() if id(p) in held
        ]
        if not adapters and any(id(_base_parameter(layer)) in held for layer in layers):
            self._tell(
                "foreign",
                "the optimizer holds the frozen weights of adapted layers and none of their adapters, so it "
                "trains none; it was made before inject, or the parameters have been replaced since. Make it "
                "after inject, from the parameters that require gradients",
            )
        return adapters

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warn(message)

    def _lora_bs(self) -> list[nn.Parameter]:
        return [b for layer in self._adapted() for _, _, b in layer.adapter_parameters()]

    def _adapted(self) -> list[AdaptedLinear]:
        """The layers that have not been ejected since."""
        return [layer for layer in self._layers.values() if isinstance(layer, AdaptedLinear)]


def _base_parameter(layer: AdaptedLinear) -> object:
    module, name = layer.weight_place()
    return module._parameters.get(name)


def local(tensor: Tensor) -> Tensor:
    """The numbers that this process holds."""
    tensor = tensor.detach()
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _any_nonzero(tensors: Iterable[Tensor]) -> bool:
    """Whether one of the tensors has an entry that is not 0, or no entries at all, as after pruning; one host
    synchronisation."""
    parts = [local(tensor) for tensor in tensors]
    if not parts or any(part.numel() == 0 or part.is_meta for part in parts):
        return True
    return bool(torch.stack([part.any().to(parts[0].device) for part in parts]).any())


def _has_moments(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether the state of a parameter is that of steps which it has taken."""
    if "history_size" in optimizer.defaults:  # LBFGS has one state for all parameters, under the first
        return any(state.get("n_iter", 0) > 0 for state in optimizer.state.values())
    state: Any = optimizer.state.get(parameter)
    if not isinstance(state, Mapping):
        return False
    if "initial_accumulator_value" in optimizer.defaults:  # Adagrad's constructor makes a state
        return bool(state.get("step", 0) > 0)
    moments = [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
    return bool(moments) and _any_nonzero(moments)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """The hook: every watch that waits looks at the optimizer."""
    if not _waiting:
        _remove_hook()
        return
    if torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    ):
        return  # reading the state would break the graph
    for watch in list(_waiting):
        try:
            done = watch.look(optimizer)
        except EWCLoRAError:  # adapters were replaced, which the next call of the EWC tells
            done = True
        if done:
            _waiting.discard(watch)
    if not _waiting:
        _remove_hook()


def _remove_hook() -> None:
    """Removes the hook while PyTorch iterates over all of them, which only the last one allows; another one
    stays, does nothing, and is asked again."""
    global _hook
    hooks = None if _hook is None else _hook.hooks_dict_ref()
    if _hook is not None and (hooks is None or next(reversed(hooks), None) == _hook.id):
        _hook.remove()
        _hook = None
