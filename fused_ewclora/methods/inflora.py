"""InfLoRA (arXiv 2404.00228): updates inside a subspace that is chosen before a task and does not touch the
inputs of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import LoRAConfig
from ..distributed.processes import of_first, several
from ..distributed.transaction import Transaction, canonical_name
from ..errors import ArgumentError, CheckpointError, TargetError
from ..ewc.estimation import Forward, check_max_batches, default_forward
from ..ewc.placement import LocalPlacement
from ..ewc.settings import number, one_of
from ..layers.inject import adapters
from ._inputs import input_covariances
from ._resume import dump, parse, take_over
from ._shares import folded, in_all
from ._subspace import VARIANTS, Subspace, directions, extended
from .method import Loader, Loss, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class InfLoRA(Method):
    """y = x (W + B A)^T with A `[r, d_in]` frozen: the r strongest directions of the task's inputs outside of
    the subspace that earlier tasks used; only B is trained (docs/mathematics.md, section 7).

        method.begin_task(t)
        method.prepare(loader)        # one pass over the task's data, before training
        ...                           # as with every method
        method.end_task(loader)       # a second pass: what the task used becomes part of the subspace

    At the end of a task W <- W + B A and B starts at 0. The subspace is that of DualGPM, one per layer: it
    holds the share epsilon of the energy of every task's inputs, rising linearly over tasks as in the
    official code, epsilon + (epsilon_last - epsilon) t / total_tasks. total_tasks None: it stays at epsilon.

    variant: "paper", or "official": the covariance in place of the inputs in every decomposition and energy
    (so that energies are squared), rows of A of norm 1 / sqrt 3, one direction fewer after the first task.
    Both start from an exactly projected basis, and rows of A for which no direction is left are 0, where
    official ones are arbitrary.
    forward, max_batches: of the passes over data, as in `EWC.estimate_fisher`. Every row of the inputs
    counts, padding included. group: as in `Method`; the inputs are those of all its processes, max_batches
    those of each.

    Raises `ArgumentError` for values out of range and `TargetError` for adapters of another method, before
    anything is changed.

        >>> method = InfLoRA(model, LoRAConfig(r=10, target_modules=["qkv"]), epsilon=0.95, total_tasks=10)
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        epsilon: float = 0.95,
        epsilon_last: float = 1.0,
        total_tasks: int | None = None,
        variant: str = "paper",
        forward: Forward = default_forward,
        max_batches: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.epsilon = number("epsilon", epsilon, 0.0, 1.0)
        self.epsilon_last = number("epsilon_last", epsilon_last, 0.0, 1.0)
        if total_tasks is not None and (
            isinstance(total_tasks, bool) or not isinstance(total_tasks, int) or total_tasks < 1
        ):
            raise ArgumentError(f"total_tasks: expected an integer >= 1 or None, got {total_tasks!r}")
        self.total_tasks, self.variant = total_tasks, one_of("variant", variant, VARIANTS)
        check_max_batches(max_batches)
        self.forward, self.max_batches = forward, max_batches
        if composed := [name for name, layer in adapters(model).items() if layer.composer is not None]:
            raise TargetError(f"{composed[0]}: expected plain adapters, found those of another method")
        super().__init__(model, config, group=group)
        self.subspaces = {
            name: Subspace.empty(layer.in_features, layer.weight.device)
            for name, layer in self.layers.items()
        }
        self._prepared = False
        for layer in self.layers.values():
            for _, lora_a, _ in layer.adapter_parameters():
                lora_a.requires_grad_(False)

    def threshold(self, task: int) -> float:
        """The share of the energy of task number `task`, counted from 0, that the subspace must hold."""
        if self.total_tasks is None:
            return self.epsilon
        progress = min(task / self.total_tasks, 1.0)
        return self.epsilon + (self.epsilon_last - self.epsilon) * progress

    @torch.no_grad()
    def prepare(self, loader: Loader) -> None:
        """Chooses A for the task that has begun, from one pass over its data in eval mode.

        Adapters of a packed projection share their input and so their A. Raises `ArgumentError` outside of a
        task, for a B that is not 0 any more, an empty loader or inputs that are not finite, `TargetError` for
        merged layers and those that never run; nothing is changed then.

            >>> method.begin_task(0); method.prepare(loader)
        """
        if not self._running:
            raise ArgumentError("prepare: no task is running; call begin_task first")
        covariances = self._covariances(loader, untrained=True)
        chosen = {}
        for name, layer in self.layers.items():
            used = self.subspaces[name].to(covariances[name].device)
            widest = max(piece.r for piece in layer.adapter_slices)
            chosen[name] = directions(covariances[name], used, widest, self.variant)
        if several(self.group):
            chosen = dict(zip(chosen, of_first(list(chosen.values()), self.group), strict=True))
        with Transaction() as change:
            for name, layer in self.layers.items():
                for piece, lora_a, _ in layer.adapter_parameters():
                    change.copy_(lora_a, chosen[name][: piece.r])
        self._prepared = True

    def _covariances(self, loader: Loader, untrained: bool = False) -> dict[str, Tensor]:
        """Sums over the data of all processes; an error in one is raised in all."""
        sums = in_all(lambda: self._own_covariances(loader, untrained), self.group)
        if several(self.group):
            for covariance in sums.values():
                dist.all_reduce(covariance, group=self.group)
        return sums

    def _own_covariances(self, loader: Loader, untrained: bool) -> dict[str, Tensor]:
        for name, layer in self.layers.items():
            if untrained and any(bool(lora_b.any()) for _, _, lora_b in layer.adapter_parameters()):
                raise ArgumentError(
                    f"prepare: {name}: expected a lora_B of 0, got a trained one, to which a new A would "
                    "give another meaning; call it before training"
                )
            if layer.merged:
                raise TargetError(f"{name}: its adapter is merged into the base weight; call unmerge(model)")
        return input_covariances(self.model, self.layers, loader, self.max_batches, self.forward)

    def _of_first(self, subspaces: dict[str, Subspace]) -> dict[str, Subspace]:
        """Those of the first process: another machine may order directions of equal energy differently."""
        bases = of_first([used.basis for used in subspaces.values()], self.group)
        first = next(iter(subspaces.values())).basis
        flags = [used.complement for used in subspaces.values()]
        (complements,) = of_first([torch.tensor(flags, device=first.device)], self.group)
        parts = zip(subspaces, bases, complements.tolist(), strict=True)
        return {name: Subspace(basis, complement) for name, basis, complement in parts}

    def penalty(self) -> Tensor:
        """0; raises `ArgumentError` in a task that was not prepared."""
        if self._running:
            self._check_prepared("penalty")
        return super().penalty()

    def _begin(self) -> None:
        self._prepared = False

    def _check_prepared(self, what: str) -> None:
        if not self._prepared:
            raise ArgumentError(f"{what}: A has not been chosen for this task; call prepare(loader) first")

    def _after_step(self, step: int, total_steps: int) -> None:
        self._check_prepared("after_step")

    @torch.no_grad()
    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        self._check_prepared("end_task")
        covariances = self._covariances(loader)
        epsilon = self.threshold(self.tasks)
        subspaces = {
            name: extended(used.to(covariances[name].device), covariances[name], epsilon, self.variant)
            for name, used in self.subspaces.items()
        }
        if several(self.group):
            subspaces = self._of_first(subspaces)
        with folded(LocalPlacement(self.model, self.layers), self.group) as change:
            for layer in self.layers.values():
                for _, _, lora_b in layer.adapter_parameters():
                    change.copy_(lora_b, torch.zeros_like(lora_b))
        self.subspaces = subspaces

    def state_dict(self) -> dict[str, Any]:
        """{"tensors": bases of the subspaces, "config": the rest}, between tasks. Weights and adapters are in
        the model's own state_dict.

        >>> torch.save([model.state_dict(), method.state_dict()], "task3.pt")
        """
        named = {canonical_name(name): used for name, used in self.subspaces.items()}
        tensors = {f"subspace.{name}": used.basis for name, used in named.items()}
        complements = {name: used.complement for name, used in named.items()}
        return dump(self, tensors, variant=self.variant, complements=complements)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of an InfLoRA of the same variant on the same layers, which may be
        freshly injected; nothing changes unless all of it fits.

        Load the model's own state_dict as well. Raises `ArgumentError` during a task and `CheckpointError`
        naming what does not fit.

            >>> model.load_state_dict(state); method.load_state_dict(method_state)
        """
        tensors, config = parse(self, saved)
        if config.get("variant") != self.variant:
            raise CheckpointError(
                f"state: variant: it was made with {config.get('variant')!r}, this InfLoRA has "
                f"{self.variant!r}"
            )
        complements = config.get("complements")
        subspaces = {}
        for name, layer in self.layers.items():
            key = canonical_name(name)
            basis = tensors.get(f"subspace.{key}")
            complement = complements.get(key) if isinstance(complements, Mapping) else None
            if not isinstance(complement, bool):
                raise CheckpointError(
                    f"state: complements: expected true or false for {key}, got {complement!r}"
                )
            subspaces[name] = Subspace(_checked(basis, key, layer.in_features), complement).to(
                layer.weight.device
            )
        self.subspaces = subspaces
        take_over(self, config)


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
