# SPDX-License-Identifier: Apache-2.0
"""What O-LoRA and N-LoRA share: every task trains factors of its own, and those of earlier tasks stay in the
sum, frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..distributed.processes import sharded
from ..distributed.transaction import canonical_name
from ..errors import ArgumentError, CheckpointError, TargetError
from ..ewc.placement import check_ready
from ..layers.adapted import AdaptedLinear
from ..layers.finite import check_finite
from ..layers.inject import adapters
from ..layers.slices import AdapterSlice, fisher_key
from ._directions import suffix_of
from ._factors import NAMES, TRAINED, Factors, Sum
from ._resume import dump, parse, take_over
from ._shares import in_all
from ._start import check_plain_adapters, ejected_on_error
from .method import Loader, Loss, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PAST = tuple(name for name in NAMES if name not in TRAINED)


class Stacked(Method):
    """y = x W0^T + bias + s sum_t x (B_t A_t)^T over the tasks so far, in one call of the LoRA linear; s is
    the scale of the adapters, lora_alpha / r or 1. The current A and B are trained, under a penalty.

    Between tasks nothing is folded in, W0 stays; `export` folds the whole sum in. All tasks have the rank of
    the adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        generator: torch.Generator | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        check_plain_adapters(adapters(model))
        with ejected_on_error(model):
            super().__init__(model, config, group=group)
            self._check_layers()
        self.generator = generator
        for layer in self.layers.values():
            for piece, lora_a, lora_b in layer.adapter_parameters():
                Factors.first(lora_a, lora_b).put(layer, piece)
            layer.composer = Sum(type(self).__name__)

    def state_dict(self) -> dict[str, Any]:
        """The state of the method between tasks. Weights and all factors are in the model's own state_dict.
        Tensors are not copied.

        Returns:
            {"tensors": the factors of earlier tasks, "config": counts of tasks}.

        Raises:
            ArgumentError: during a task.

        Examples:
            >>> method = methods.OLoRA(model, config)
            >>> torch.save([model.state_dict(), method.state_dict()], "task0.pt")
        """
        self._check_not_exported("state_dict")
        tensors = {
            f"{key}.{name}": getattr(now, name).detach() for key, _, _, now in self._all() for name in PAST
        }
        return dump(self, tensors)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of the same method on the same adapters, which may be freshly injected;
        nothing changes unless all of it fits.

        Load the model's own state_dict afterwards: its parameters have the ranks of all tasks then. They are
        replaced, so make the optimizer after both.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            ArgumentError: during a task.
            TargetError: for merged layers.
            CheckpointError: naming what does not fit.

        Examples:
            >>> import copy
            >>> fresh = copy.deepcopy(model)
            >>> method = methods.OLoRA(model, config)
            >>> for task in range(2):
            ...     method.begin_task(task)
            ...     _ = nn.init.ones_(model.fc.lora_B)  # in place of training
            ...     method.end_task(loader)
            >>> torch.save([model.state_dict(), method.state_dict()], "task1.pt")
            >>> weights, state = torch.load("task1.pt", weights_only=True)
            >>> later = methods.OLoRA(fresh, config)
            >>> later.load_state_dict(state)
            >>> fresh.load_state_dict(weights)
            <All keys matched successfully>
        """
        self._check_not_exported("load_state_dict")
        check_ready(self.layers, "load_state_dict")
        tensors, config = parse(self, saved)
        loaded = [
            (layer, piece, self._parsed(tensors, key, now, config["tasks"]))
            for key, layer, piece, now in self._all()
        ]
        for layer, piece, factors in loaded:
            factors.put(layer, piece)
        take_over(self, config)

    @staticmethod
    def _parsed(tensors: Mapping[str, Tensor], key: str, now: Factors, tasks: int) -> Factors:
        """The current factors with the saved ones of `tasks` earlier tasks, copied."""
        r, columns = now.lora_A.shape
        values = {}
        for name, shape in zip(PAST, ((tasks * r, columns), (now.lora_B.shape[0], tasks * r)), strict=True):
            value = tensors.get(f"{key}.{name}")
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise CheckpointError(
                    f"state: {key}.{name}: expected a floating-point tensor, got {type(value).__name__}"
                )
            if tuple(value.shape) != shape:
                raise CheckpointError(
                    f"state: {key}.{name}: expected shape {list(shape)} ({tasks} tasks of rank {r}), got "
                    f"{list(value.shape)}"
                )
            values[name] = value.detach().to(now.lora_A.device, now.lora_A.dtype, copy=True)
        check_finite({f"{key}.{name}": value for name, value in values.items()}, "state", CheckpointError)
        return Factors(now.lora_A, now.lora_B, **values)

    def _all(self) -> Iterator[tuple[str, AdaptedLinear, AdapterSlice, Factors]]:
        """(key, layer, slice, factors) of every adapter."""
        for name, layer in self.layers.items():
            for piece in layer.adapter_slices:
                yield fisher_key(canonical_name(name), piece), layer, piece, Factors.of(layer, piece)

    def _check_layers(self) -> None:
        """Raises `TargetError` for layers that the method cannot work on."""
        if names := sharded(self.layers):
            raise TargetError(f"{names[0]}: its parameters are sharded, which stacked factors cannot be")

    def _begin(self) -> None:
        self._check_layers()

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        in_all(self._check_ended, self.group)
        generator = self._drawing(self.generator)
        ended = [(layer, piece, now.frozen(layer, generator)) for _, layer, piece, now in self._all()]
        for layer, piece, factors in ended:
            factors.put(layer, piece)

    def _check_ended(self) -> None:
        check_ready(self.layers, "end_task")
        self._check_layers()
        current = {
            f"{name}{suffix_of(piece)} of {key}": getattr(now, name)
            for key, _, piece, now in self._all()
            for name in TRAINED
        }
        check_finite(current, "end_task", ArgumentError)
