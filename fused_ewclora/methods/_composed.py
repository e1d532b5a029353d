# SPDX-License-Identifier: Apache-2.0
"""What IEL and ITA share: task vectors that are kept as factors, whose mean is the model, and the Fisher of
the weights before all tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..distributed.processes import sharded
from ..distributed.transaction import Transaction, canonical_name, parameters_restored_on_error
from ..errors import ArgumentError, CheckpointError, TargetError
from ..ewc.placement import check_ready
from ..ewc.settings import number, one_of
from ..ewc.structures import Structure, structure_of
from ..ewc.structures.dense import Dense
from ..fishers import Fisher
from ..functional import ewc_penalty
from ..layers.adapted import AdaptedLinear
from ..layers.inject import adapters
from ..layers.slices import AdapterSlice, fisher_key, same_weights
from ..literals import Labels, StructureName, Variant
from ..progress import showing
from ..report import Report
from ._directions import fresh_a
from ._pretrained import PretrainedFisher
from ._resume import dump, parse, take_over
from ._shares import estimate, in_all, trained_together
from ._start import check_plain_adapters, ejected_on_error
from ._vectors import STORED, Mean, Vectors, parsed
from .method import VARIANTS, Loader, Loss, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Composed(Method):
    """Task vectors D_k = scaling B_k A_k beside weights W0 that never change; between tasks the model
    computes with W0 plus their mean. The subclasses say what a task trains and what its penalty is."""

    mean_of_past: bool  # whether the penalty is on D_t less the mean of the past task vectors

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None,
        variant: Variant,
        labels: Labels,
        fisher: StructureName | Structure,
        fisher_dtype: torch.dtype | Literal["8bit"],
        generator: torch.Generator | None,
        group: ProcessGroup | None,
    ) -> None:
        self.variant, self.labels = one_of("variant", variant, VARIANTS), labels
        self.generator = generator
        if variant == "official" and type(structure_of(fisher, fisher_dtype)) is not Dense:
            raise ArgumentError(f"fisher: expected 'dense' for variant 'official', got {fisher!r}")
        check_plain_adapters(adapters(model))
        with ejected_on_error(model):  # a dtype may not go with the layers
            super().__init__(model, config, group=group)
            self._ewc = PretrainedFisher(
                model, 0.0, update="convex", fisher=fisher, fisher_dtype=fisher_dtype
            )
        self._mean = Mean(self.mean_of_past)
        self._prepared = self._taken_in = False
        self._constant: Tensor | None = None  # of the penalty, which the square of `changes` has too much
        for layer in self.layers.values():
            for piece, lora_a, lora_b in layer.adapter_parameters():
                Vectors.first(lora_a.detach(), lora_b.detach(), piece.scaling).put(layer, piece)
            layer.composer = self._mean

    @property
    def fishers(self) -> dict[str, Fisher]:
        """The Fisher of W0 by adapter, the mean over the samples of all tasks that it has seen; as
        `EWC.fishers`."""
        return self._ewc.fishers

    @contextmanager
    def pretrained(self) -> Iterator[None]:
        """A context in which the model computes with W0, without task vectors, as for tuning a new head
        before `prepare`.

        Yields:
            None.

        Under activation checkpointing the backward pass of what is computed in it belongs in it too, as it
        computes parts of the model again.

        Raises:
            ArgumentError: after `export`.
            TargetError: for merged adapters, with which the weights are not W0.

        Examples:
            >>> method = methods.ITA(model, config, alpha=0.5)
            >>> method.begin_task(0)
            >>> with method.pretrained():
            ...     features = model.fc(x)
        """
        self._check_not_exported("pretrained")
        check_ready(self.layers, "pretrained")
        before, self._mean.left_out = self._mean.left_out, True
        try:
            yield
        finally:
            self._mean.left_out = before

    def kept_tensors(self) -> Iterator[Tensor]:
        """What the method itself keeps from step to step.

        Yields:
            The Fisher of W0, and a constant of the penalty.
        """
        yield from self._ewc.state_dict()["tensors"].values()
        if self._constant is not None:
            yield self._constant

    def prepare(self, loader: Loader, loss_fn: Loss | None = None, *, progress: bool | None = None) -> None:
        """Estimates the Fisher of W0 on the data of the task that has begun, in eval mode, with the present
        head; once in a task, before its first penalty.

        Args:
            loader: of the batches of the task, as in `EWC.estimate_fisher`.
            loss_fn: as in `EWC.estimate_fisher`; None is -log p(y), which labels "exact" always take.
            progress: as in `end_task`.

        Raises:
            ArgumentError: outside of a task and for a second time in one.
            EWCLoRAError: the errors of `EWC.estimate_fisher`. Nothing is changed after any of these errors.

        Examples:
            >>> method = methods.ITA(model, config, alpha=0.5)
            >>> method.begin_task(0)
            >>> method.prepare(loader)
            >>> list(method.fishers)
            ['fc']
        """
        self._check_not_exported("prepare")
        if not self._running:
            raise ArgumentError("prepare: no task is running; call begin_task first")
        if self._prepared:
            raise ArgumentError(f"prepare: task {self.tasks} has been prepared already, by all of its data")
        if not self._taken_in:  # in an earlier call, after which there was no memory for what follows
            with self._ewc.restored_on_error():
                with self.pretrained(), showing(progress):
                    estimate(self._ewc, loader, loss_fn, self.labels, self.group)
                self._take_in()
            self._taken_in = True
        self._ewc.ewc_lambda, self._constant = self._strength(), None
        if self.mean_of_past and self.tasks:
            self._constant = self._of_past()
        self._prepared = True

    def penalty(self) -> Tensor:
        """The penalty of the running task, as the class gives it.

        Returns:
            A 0-d tensor, differentiable; 0 between tasks.

        Raises:
            ArgumentError: in a task that was not prepared.
        """
        if not self._running:
            return super().penalty()
        self._check_not_exported("penalty")
        self._check_prepared("penalty")
        value = self._ewc.penalty()
        return value if self._constant is None else value - self._constant

    def decoupled_step_(self, rate: float = 1.0, clip_grad: float | None = 100.0) -> Tensor:
        """The official code's use of the penalty, in place of adding it to the loss: called between backward
        and the step of the optimizer, it moves A and B by -rate times the gradient of the penalty. `.grad`
        stays as it is.

        Args:
            rate: factor of the gradient, at least 0; the official one is the present learning rate divided by
                the first one.
            clip_grad: the largest norm of the gradient of each A and each B, which longer ones are shortened
                to; None leaves them as they are.

        Returns:
            The penalty before the step, 0-d.

        Raises:
            ArgumentError: for values out of range and in a task that was not prepared.

        Examples:
            >>> method = methods.ITA(model, config, alpha=0.5, variant="official")
            >>> method.begin_task(0)
            >>> method.prepare(loader)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
            >>> criterion(model(x), y).backward()
            >>> penalty = method.decoupled_step_(scheduler.get_last_lr()[0] / 0.1)
            >>> optimizer.step()
        """
        self._check_not_exported("decoupled_step_")
        number("rate", rate, 0.0, float("inf"))
        if clip_grad is not None:
            number("clip_grad", clip_grad, 0.0, float("inf"))
        trained = [p for *_, now in self._vectors() for p in (now.lora_A, now.lora_B)]
        with torch.enable_grad():
            penalty = self.penalty()
            gradients = torch.autograd.grad(penalty, trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is None:
                    continue
                if clip_grad is not None:
                    gradient = gradient * (clip_grad / (gradient.norm() + 1e-6)).clamp(max=1.0)
                parameter.add_(gradient, alpha=-rate)
        return penalty.detach()

    def compose(self, tasks: Iterable[int] | None = None) -> None:
        """From now until the next task the model computes with W0 plus the mean of the task vectors of these
        tasks: a few of them specialise it, leaving some out makes it forget them. `export` exports what is
        composed.

        Args:
            tasks: their numbers, from 0, each once; an empty sequence gives W0, None all that have ended.

        Raises:
            ArgumentError: in a task and for tasks that have not ended.
            TargetError: for merged adapters, in which nothing else could be composed.

        Examples:
            >>> method = methods.ITA(model, config, alpha=0.5)
            >>> for task in range(2):
            ...     method.begin_task(task)
            ...     method.prepare(loader)
            ...     _ = nn.init.ones_(model.fc.lora_B)  # in place of training
            ...     method.end_task(loader)
            >>> method.compose([1])  # without what the first task has learned
            >>> print(method.report().notes[0])
            composed now: the mean of tasks [1]
        """
        self._check_not_exported("compose")
        if self._running:
            raise ArgumentError(f"compose: task {self.tasks} has not ended; call end_task first")
        check_ready(self.layers, "compose")
        chosen = tuple(range(self.tasks)) if tasks is None else tuple(sorted(tasks))
        for task in chosen:
            if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < self.tasks:
                raise ArgumentError(f"tasks: expected numbers of the {self.tasks} ended tasks, got {task!r}")
        if len(set(chosen)) < len(chosen):
            raise ArgumentError(f"tasks: expected every task once, got {list(chosen)}")
        self._mean.tasks = chosen

    def report(self) -> Report:
        """Says how long every task's vector is, ||D_k||, by adapter, and what is composed.

        Returns:
            A printable `Report`.
        """
        self._check_not_exported("report")
        rows = [
            {"adapter": key, "r": piece.r}
            | {f"task {k}": norm for k, norm in enumerate(now.norms(piece.scaling))}
            for key, _, piece, now in self._vectors()
        ]
        notes = [f"composed now: the mean of tasks {list(self._mean.tasks)}"]
        return Report("Lengths of task vectors", rows, notes, {"tasks": self.tasks})

    def state_dict(self) -> dict[str, Any]:
        """The state of the method between tasks. Weights never change; heads and optimizers are the caller's.

        Returns:
            {"tensors": factors of all task vectors and the Fisher, "config": counts of tasks and how the
            Fisher was made}.

        Raises:
            ArgumentError: during a task.

        Examples:
            >>> method = methods.ITA(model, config, alpha=0.5)
            >>> torch.save({"method": method.state_dict(), "head": model.head.state_dict()}, "task0.pt")
        """
        self._check_not_exported("state_dict")
        ewc = self._ewc.state_dict()
        tensors = dict(ewc["tensors"])
        for key, _, _, now in self._vectors():
            tensors |= {f"{key}.{name}": getattr(now, name).detach() for name in STORED}
        prints = {name: layer.origin_fingerprint for name, layer in self._named()}
        return dump(self, tensors, variant=self.variant, fingerprints=prints, ewc=ewc["config"])

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of the same kind and variant on the same weights; all tasks are
        composed. Parameters are replaced, so make the optimizer afterwards.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            ArgumentError: during a task.
            CheckpointError: naming what does not fit; nothing was loaded then.
            FisherError: naming what does not fit of the Fisher; nothing was loaded then.

        Examples:
            >>> import copy
            >>> fresh = copy.deepcopy(model)
            >>> method = methods.ITA(model, config, alpha=0.5)
            >>> saved = {"method": method.state_dict(), "head": model.head.state_dict()}
            >>> later = methods.ITA(fresh, config, alpha=0.5)
            >>> later.load_state_dict(saved["method"])
            >>> fresh.head.load_state_dict(saved["head"])
            <All keys matched successfully>
        """
        tensors, config = parse(self, saved, variant=self.variant)
        check_ready(self.layers, "load_state_dict")
        prints = config.get("fingerprints")
        for name, layer in self._named():
            kept = prints.get(name) if isinstance(prints, Mapping) else None
            if not same_weights(kept, layer.origin_fingerprint):
                raise CheckpointError(f"state: {name}: it belongs to other base weights")
        found = [
            (layer, piece, parsed(tensors, key, piece, now, config["tasks"]))
            for key, layer, piece, now in self._vectors()
        ]
        named = {f"{key}.{name}" for key, *_ in self._vectors() for name in STORED}
        own = {name: tensor for name, tensor in tensors.items() if name not in named}
        state = self._ewc.parse_state({"tensors": own, "config": config.get("ewc")})
        with Transaction() as change, parameters_restored_on_error(self.layers):
            for layer, piece, now in found:
                now.put(layer, piece)
            self._ewc.take_over(state, change)
        take_over(self, config)
        self._mean.tasks, self._mean.current = tuple(range(self.tasks)), False

    def _vectors(self) -> list[tuple[str, AdaptedLinear, AdapterSlice, Vectors]]:
        return [
            (fisher_key(name, piece), layer, piece, Vectors.of(layer, piece))
            for name, layer in self._named()
            for piece in layer.adapter_slices
        ]

    def _named(self) -> list[tuple[str, AdaptedLinear]]:
        return [(canonical_name(name), layer) for name, layer in self.layers.items()]

    def _check_prepared(self, what: str) -> None:
        if not self._prepared:
            raise ArgumentError(f"{what}: this task has no Fisher yet; call prepare(loader) first")

    def _check_whole(self) -> None:
        if names := sharded(self.layers):
            raise TargetError(f"{names[0]}: its parameters are sharded, which task vectors cannot be")

    def _begin(self) -> None:
        self._check_whole()
        self._mean.tasks = tuple(range(self.tasks)) if self.mean_of_past else ()
        self._mean.current, self._prepared, self._taken_in = True, False, False

    def _after_step(self, step: int, total_steps: int) -> None:
        self._check_prepared("after_step")

    @torch.no_grad()
    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        self._check_prepared("end_task")
        check_ready(self.layers, "end_task")
        self._check_whole()
        in_all(self._check_finite, self.group)
        trained_together(self.layers, self.group)
        generator = self._drawing(self.generator)
        ended = [
            (layer, piece, now.ended(fresh_a(layer, now.lora_A, piece.r, generator), piece.scaling))
            for _, layer, piece, now in self._vectors()
        ]
        with parameters_restored_on_error(self.layers):
            for layer, piece, vectors in ended:
                vectors.put(layer, piece)
            self._take_in_last()
        self._mean.tasks, self._mean.current = tuple(range(self.tasks + 1)), False

    def _check_finite(self) -> None:
        for key, _, _, now in self._vectors():
            now.check_finite(key)

    @torch.no_grad()
    def _of_past(self) -> Tensor:
        """(lambda/2) sum F (mean of the past task vectors)^2, which does not change in a task."""
        vectors = [now for *_, now in self._vectors()]
        return ewc_penalty(
            list(self.fishers.values()),
            [now.lora_past_A for now in vectors],
            [now.lora_past_B for now in vectors],
            [now.lora_past_scale[: now.lora_past_A.shape[0]] for now in vectors],
            self._strength(),
        )

    def _strength(self) -> float:
        """The factor lambda of the task's (lambda/2) sum F changes^2."""
        raise NotImplementedError

    def _take_in(self) -> None:
        """Makes the Fisher of this task's data part of that of the penalty, before training."""
        raise NotImplementedError

    def _take_in_last(self) -> None:
        """The same after training."""
