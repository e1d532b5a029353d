# SPDX-License-Identifier: Apache-2.0
"""Changes to a model that are undone when a block ends, wherever an exception or an interrupt ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn


class Undo:
    """Runs what was added to it, latest first, when its block ends.

    An interrupt (Ctrl-C) may arrive at any line. Nothing is lost if each step is added before the change that
    it takes back, may run twice, and the block is entered twice: the outer exit completes an inner one that
    was interrupted.

        with undo, undo:
            undo.add(restore)
            change()
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []
        self.aborted = False

    def add(self, step: Callable[[], None]) -> None:
        """A step that takes back a change that is about to be made; it may run more than once."""
        self._steps.append(step)

    def run(self) -> None:
        """Takes back everything, now."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def abort(self) -> None:
        """Takes back everything, from outside of the block."""
        self.aborted = True
        self.run()

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Undo, ())  # a copy of a controller has changed nothing


def enter_evaluation(model: nn.Module, undo: Undo) -> None:
    """Eval mode, until `undo` restores the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in modes:
            module.training = training

    undo.add(restore)
    model.eval()


def set_gradients_aside(model: nn.Module, undo: Undo) -> Callable[[], None]:
    """Every `.grad` is None, until `undo` restores it as the same tensor; returns a function that sets all of
    them to None again."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]

    def clear() -> None:
        for parameter, _ in before:
            parameter.grad = None

    def restore() -> None:
        for parameter, grad in before:
            parameter.grad = grad

    undo.add(restore)
    clear()
    return clear


def enable_gradients(undo: Undo) -> None:
    """Gradients are computed, until `undo` restores the mode."""
    before = torch.is_grad_enabled()
    undo.add(lambda: torch._C._set_grad_enabled(before))
    torch._C._set_grad_enabled(True)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; the mode of each module is restored after it."""
    undo = Undo()
    with undo, undo:
        enter_evaluation(model, undo)
        yield


@contextmanager
def gradients_untouched(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Every `.grad` is None at the start of the block and restored after it, as the same tensor; yields a
    function that sets all of them to None."""
    undo = Undo()
    with undo, undo:
        yield set_gradients_aside(model, undo)
