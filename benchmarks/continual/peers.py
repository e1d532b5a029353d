# SPDX-License-Identifier: Apache-2.0
"""EWC of other libraries as methods of a run, so that they learn the same stream with the same adapters.

A configuration names them by their path, "fused_ewclora.benchmarks.continual.peers:AvalancheEWC". Both
penalise the factors A and B themselves, on one adapter that is trained on from task to task and never merged;
gradients come from autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fused_ewclora.config import LoRAConfig, positive
from fused_ewclora.errors import ArgumentError, CheckpointError
from fused_ewclora.ewc.estimation import to_device
from fused_ewclora.ewc.settings import number
from fused_ewclora.methods import Method
from fused_ewclora.methods._resume import dump, parse, take_over

from .. import extras


class _Penalised(Method):
    """What the two have in common: an importance and an anchor per trained tensor of the adapters."""

    def __init__(self, model: nn.Module, config: LoRAConfig | None, ewc_lambda: float) -> None:
        super().__init__(model, config)
        self.ewc_lambda = number("ewc_lambda", ewc_lambda, 0.0, math.inf)
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{own}": parameter
            for name, layer in self.layers.items()
            for own, parameter in layer.named_lora_parameters()
            if parameter.requires_grad
        }

    def penalty(self) -> Tensor:
        """ewc_lambda sum F (theta - theta*)^2, without 1/2; 0 in the first task."""
        total = super().penalty()
        for name, parameter in self._trained().items() if self.importance else ():
            total = total + (self.importance[name] * (parameter - self.anchor[name]).square()).sum()
        return self.ewc_lambda * total

    def kept_tensors(self) -> Iterator[Tensor]:
        """Importances and anchors."""
        yield from (*self.importance.values(), *self.anchor.values())

    def state_dict(self) -> dict[str, Any]:
        """Importances and anchors; A and B are in the model's own state_dict."""
        tensors = {f"importance.{name}": value for name, value in self.importance.items()}
        tensors |= {f"anchor.{name}": value for name, value in self.anchor.items()}
        return dump(self, tensors)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()`; raises `CheckpointError` for that of another method or model."""
        tensors, config = parse(self, saved)
        loaded: dict[str, dict[str, Tensor]] = {"importance": {}, "anchor": {}}
        shapes = {name: parameter.shape for name, parameter in self._trained().items()}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            if shapes.get(name) != value.shape:
                raise CheckpointError(f"state: {name}: expected {shapes.get(name)}, got {value.shape}")
            loaded[part][name] = value.to(self._trained()[name].device)
        self.importance, self.anchor = loaded["importance"], loaded["anchor"]
        take_over(self, config)


class AvalancheEWC(_Penalised):
    """`EWCPlugin` of the installed avalanche-lib in mode "online": squared gradients of batch means, averaged
    over batches, in eval mode; F <- decay_factor F + that.

    The plugin computes the importances; of these, those of adapters are used: heads of earlier tasks are
    frozen. It takes examples in the order of the data, which is shuffled here, since batches of one class
    would make F several times too large. `begin_task` raises `ArgumentError` where it is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        ewc_lambda: float,
        decay_factor: float = 1.0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, config, ewc_lambda)
        self.decay_factor = number("decay_factor", decay_factor, 0.0, math.inf)
        self.batch_size = positive(batch_size, "batch_size")
        self.plugin: Any = None

    def _begin(self) -> None:
        """Not when it is made, so that configurations can be read where the package is missing."""
        try:
            plugins = extras.load("avalanche").training.plugins
        except extras.Unavailable as error:
            raise ArgumentError(f"begin_task: AvalancheEWC needs avalanche-lib: {error}") from error
        self.plugin = plugins.EWCPlugin(self.ewc_lambda, mode="online", decay_factor=self.decay_factor)

    def _end(self, loader: Any, loss_fn: Any) -> None:
        trained = self._trained()
        device = next(iter(trained.values())).device
        optimizer = SimpleNamespace(zero_grad=lambda: self.model.zero_grad(set_to_none=True))
        data = _WithTasks(loader.dataset)
        found = self.plugin.compute_importances(self.model, loss_fn, optimizer, data, device, self.batch_size)
        self.model.zero_grad(set_to_none=True)
        prefix = {id(p): name for name, p in self.model.named_parameters()}
        for name, parameter in trained.items():
            new = found[prefix[id(parameter)]].data
            old = self.importance.get(name)
            self.importance[name] = new if old is None else self.decay_factor * old + new
            self.anchor[name] = parameter.detach().clone()


class _Moved(tuple):  # type: ignore[type-arg]
    """Inputs of several tensors with the `to` that avalanche calls."""

    def to(self, device: torch.device) -> Any:
        return to_device(tuple(self), device)


class _WithTasks(torch.utils.data.Dataset[Any]):
    """Examples with a task label, as avalanche takes them apart."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[self.order[index]]

    def collate_fn(self, rows: list[Any]) -> tuple[Any, Tensor, Tensor]:
        inputs, labels = torch.utils.data.default_collate(rows)
        inputs = _Moved(inputs) if isinstance(inputs, (list, tuple)) else inputs
        return inputs, labels, torch.zeros(len(labels), dtype=torch.int64)


class OnlineEWC(_Penalised):
    """Online EWC as mammoth's `ewc_on` has it, written here from its formulas: per example, the squared
    gradient of log p(label) times p(label), averaged over the task; F <- gamma F + that. In eval mode, one
    example after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        ewc_lambda: float,
        gamma: float = 1.0,
    ) -> None:
        super().__init__(model, config, ewc_lambda)
        self.gamma = number("gamma", gamma, 0.0, math.inf)

    def _end(self, loader: Any, loss_fn: Any) -> None:
        trained = self._trained()
        device = next(iter(trained.values())).device
        sums = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        self.model.eval()
        count = 0
        for inputs, labels in loader:
            moved, targets = to_device(inputs, device), labels.to(device)
            for row in range(len(labels)):
                own = slice(row, row + 1)
                one = moved[own] if isinstance(moved, Tensor) else tuple(x[own] for x in moved)
                loss = loss_fn(self.model(one), targets[own])
                gradients = torch.autograd.grad(loss, list(trained.values()))
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    total.add_(gradient.square() * torch.exp(-loss.detach()))
                count += 1
        for name, parameter in trained.items():
            old = self.importance.get(name, torch.zeros_like(parameter))
            self.importance[name] = self.gamma * old + sums[name] / count
            self.anchor[name] = parameter.detach().clone()
