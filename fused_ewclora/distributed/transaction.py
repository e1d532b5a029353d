# SPDX-License-Identifier: Apache-2.0
"""Changes to many tensors of which either all happen or none, and names that do not depend on how a model is
wrapped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import TargetError
from .processes import assign_

T = TypeVar("T")

_WRAPPER_PARTS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)  # torch.compile, FSDP, checkpointing
_TRAINED_COPY = re.compile(r"\.modules_to_save\.[^.]+")  # of a module that PEFT trains as a whole
_WRAPPER_PREFIXES = ("module.", "base_model.model.")  # DDP, PEFT


def canonical_name(name: str) -> str:
    """The name of a module or tensor without what DDP, torch.compile, FSDP, activation checkpointing and PEFT
    add to it."""
    parts = [part for part in name.split(".") if part not in _WRAPPER_PARTS]
    name = _TRAINED_COPY.sub("", ".".join(parts))
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPER_PREFIXES:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    return name


def by_canonical_name(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Modules or tensors by canonical name; raises `TargetError` when two of them have the same."""
    by_name: dict[str, T] = {}
    names: dict[str, str] = {}
    for name, value in named:
        key = canonical_name(name)
        if key in by_name and by_name[key] is not value:
            raise TargetError(
                f"{names[key]} and {name}: expected names that differ by more than the prefix of a wrapper "
                "such as DistributedDataParallel; rename one of them"
            )
        by_name[key], names[key] = value, name
    return by_name


class Transaction:
    """In-place updates that are undone, bit for bit, when the block that makes them raises.

    Tensors keep their identity and storage. One old copy per changed tensor is held until the block ends.

        with Transaction() as change:
            change.copy_(weight, new_weight)
    """

    def __init__(self) -> None:
        self._old: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Transaction:
        return self

    def remember(self, target: Tensor) -> None:
        """Keeps the present value of a tensor that is about to be changed in another way."""
        self._old.append((target, target.detach().clone()))

    def copy_(self, target: Tensor, value: Tensor) -> None:
        """target <- value, rounded to the dtype of target; a sharded target takes its part of the value."""
        self.remember(target)
        assign_(target, value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with torch.no_grad():
                for target, old in reversed(self._old):
                    target.copy_(old)
        self._old.clear()


@contextmanager
def parameters_restored_on_error(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules whose own parameters are replaced in the block have the former ones again when it raises."""
    before = [(module._parameters, dict(module._parameters)) for module in modules.values()]
    try:
        yield
    except BaseException:
        for table, parameters in before:
            table.clear()
            table.update(parameters)
        raise
