# SPDX-License-Identifier: Apache-2.0
"""What the methods have in common that choose a frozen A before each task, outside of subspaces that training
must not touch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import LoRAConfig
from ..distributed.processes import of_first, several
from ..distributed.transaction import canonical_name
from ..errors import ArgumentError, CheckpointError, TargetError
from ..ewc.estimation import Forward, check_max_batches
from ..ewc.placement import LocalPlacement
from ..ewc.settings import one_of
from ..layers.adapted import AdaptedLinear
from ..layers.inject import adapters
from ..literals import Variant
from ._inputs import input_covariances
from ._resume import dump, parse, take_over
from ._shares import folded, in_all
from ._start import check_uncomposed
from ._subspace import Subspace
from .method import VARIANTS, Loader, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Projected(Method):
    """`prepare` chooses A, only B is trained, and at the end of a task W <- W + B A, B <- 0 and the subspaces
    grow. The arguments are those of `InfLoRA`."""

    subspaces: dict[str, Subspace]  # by the names of `_owners`

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None,
        *,
        variant: Variant,
        forward: Forward,
        max_batches: int | None,
        group: ProcessGroup | None,
    ) -> None:
        self.variant = one_of("variant", variant, VARIANTS)
        check_max_batches(max_batches)
        self.forward, self.max_batches = forward, max_batches
        check_uncomposed(adapters(model))
        super().__init__(model, config, group=group)
        self._prepared = False
        for layer in self.layers.values():
            for _, lora_a, _ in layer.adapter_parameters():
                lora_a.requires_grad_(False)

    def penalty(self) -> Tensor:
        """There is none; what is protected is out of reach of B.

        Returns:
            0, a 0-d tensor.

        Raises:
            ArgumentError: in a task that was not prepared.
        """
        if self._running:
            self._check_prepared("penalty")
        return super().penalty()

    def kept_tensors(self) -> Iterator[Tensor]:
        """What the method itself keeps from step to step.

        Yields:
            The bases of the subspaces.
        """
        yield from (subspace.basis for subspace in self.subspaces.values())

    def state_dict(self) -> dict[str, Any]:
        """The state of the method between tasks. Weights and adapters are in the model's own state_dict.

        Returns:
            {"tensors": bases of the subspaces, "config": counts of tasks and what the bases span}.

        Raises:
            ArgumentError: during a task.

        Examples:
            >>> method = methods.InfLoRA(model, config)
            >>> torch.save([model.state_dict(), method.state_dict()], "task0.pt")
        """
        named = {canonical_name(name): used for name, used in self.subspaces.items()}
        tensors = {f"subspace.{name}": used.basis for name, used in named.items()}
        complements = {name: used.complement for name, used in named.items()}
        return dump(self, tensors, variant=self.variant, complements=complements)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of such a method of the same variant on the same layers, which may be
        freshly injected; nothing changes unless all of it fits. Load the model's own state_dict as well.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            ArgumentError: during a task.
            CheckpointError: naming what does not fit.

        Examples:
            >>> import copy
            >>> fresh = copy.deepcopy(model)
            >>> method = methods.InfLoRA(model, config)
            >>> torch.save([model.state_dict(), method.state_dict()], "task0.pt")
            >>> weights, state = torch.load("task0.pt", weights_only=True)
            >>> later = methods.InfLoRA(fresh, config)
            >>> _ = fresh.load_state_dict(weights)
            >>> later.load_state_dict(state)
        """
        tensors, config = parse(self, saved, variant=self.variant)
        complements = config.get("complements")
        subspaces = {}
        for name, layer in self._owners(config["tasks"]).items():
            key = canonical_name(name)
            basis = tensors.get(f"subspace.{key}")
            complement = complements.get(key) if isinstance(complements, Mapping) else None
            if not isinstance(complement, bool):
                raise CheckpointError(
                    f"state: complements: expected true or false for {key}, got {complement!r}"
                )
            checked = Subspace(_checked(basis, key, layer.in_features), complement)
            subspaces[name] = checked.to(layer.weight.device)
        self.subspaces = subspaces
        take_over(self, config)

    def _owners(self, tasks: int) -> dict[str, AdaptedLinear]:
        """The layer that each subspace belongs to, after so many tasks."""
        raise NotImplementedError

    def _check_untrained(self) -> None:
        """Raises `ArgumentError` outside of a task and for a B that is not 0 any more, `TargetError` for
        merged layers; an error in one process is raised in all."""
        self._check_not_exported("prepare")
        if not self._running:
            raise ArgumentError("prepare: no task is running; call begin_task first")
        in_all(self._check_own_untrained, self.group)

    def _check_own_untrained(self) -> None:
        for name, layer in self.layers.items():
            if any(bool(lora_b.any()) for _, _, lora_b in layer.adapter_parameters()):
                raise ArgumentError(
                    f"prepare: {name}: expected a lora_B of 0, got a trained one, to which a new A would "
                    "give another meaning; call it before training"
                )
        self._check_unmerged()

    def _check_unmerged(self) -> None:
        for name, layer in self.layers.items():
            if layer.merged:
                raise TargetError(f"{name}: its adapter is merged into the base weight; call unmerge(model)")

    def _covariances(self, loader: Loader) -> dict[str, Tensor]:
        """Those of the inputs of all processes by layer; an error in one is raised in all."""
        return self._summed(lambda: self._own_covariances(loader))

    def _own_covariances(self, loader: Loader) -> dict[str, Tensor]:
        self._check_unmerged()
        return input_covariances(self.model, self.layers, loader, self.max_batches, self.forward)

    def _summed(self, work: Any) -> dict[str, Tensor]:
        """The tensors that `work` finds in the data of this process, summed over processes."""
        sums: dict[str, Tensor] = in_all(work, self.group)
        if several(self.group):
            for total in sums.values():
                dist.all_reduce(total, group=self.group)
        return sums

    def _same(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of the first process: another machine may order directions of equal energy differently."""
        if not several(self.group):
            return tensors
        return dict(zip(tensors, of_first(list(tensors.values()), self.group), strict=True))

    def _same_subspaces(self, subspaces: dict[str, Subspace]) -> dict[str, Subspace]:
        """As `_same`."""
        if not several(self.group):
            return subspaces
        bases = self._same({name: used.basis for name, used in subspaces.items()})
        flags = [used.complement for used in subspaces.values()]
        first = next(iter(bases.values()))
        (complements,) = of_first([torch.tensor(flags, device=first.device)], self.group)
        parts = zip(bases.items(), complements.tolist(), strict=True)
        return {name: Subspace(basis, complement) for (name, basis), complement in parts}

    def _begin(self) -> None:
        self._prepared = False

    def _check_prepared(self, what: str) -> None:
        if not self._prepared:
            raise ArgumentError(f"{what}: A has not been chosen for this task; call prepare(loader) first")

    def _after_step(self, step: int, total_steps: int) -> None:
        self._check_prepared("after_step")

    def _fold(self) -> None:
        """W <- W + B A, B <- 0."""
        with folded(LocalPlacement(self.model, self.layers), self.group) as change:
            for layer in self.layers.values():
                for _, _, lora_b in layer.adapter_parameters():
                    change.copy_(lora_b, torch.zeros_like(lora_b))


def _checked(basis: Any, key: str, width: int) -> Tensor:
    """An fp64 `[width, at most width / 2]` with orthonormal columns."""
    if not isinstance(basis, Tensor) or basis.dtype != torch.float64 or basis.dim() != 2:
        raise CheckpointError(
            f"state: subspace of {key}: expected an fp64 matrix, got {type(basis).__name__}"
        )
    if basis.shape[0] != width or basis.shape[1] > width / 2:
        raise CheckpointError(
            f"state: subspace of {key}: expected [{width}, at most {width // 2}], got {list(basis.shape)}"
        )
    identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    # Columns orthonormal to about width * eps when they were made, and never changed since.
    if not bool(((basis.T @ basis - identity).abs() < math.sqrt(torch.finfo(basis.dtype).eps)).all()):
        raise CheckpointError(f"state: subspace of {key}: expected orthonormal columns")
    return basis.detach().clone()
