# SPDX-License-Identifier: Apache-2.0
"""CL-LoRA (arXiv 2505.24816): adapters that all tasks share, and adapters of each task with block weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import LoRAConfig, checked_targets, matches
from ..distributed.processes import several, sharded
from ..errors import ArgumentError, TargetError
from ..ewc.settings import number, one_of
from ..layers.finite import check_finite
from ..layers.index import AdapterRef, adapter_refs
from ..layers.inject import adapters
from ..layers.plain import own_tensors
from ..literals import Variant
from ..report import Report
from . import _task_adapters as parts
from ._cl_state import dump_tensors, parse_tensors
from ._cl_terms import distilled, importance, mean_cosine
from ._resume import dump, parse, take_over
from ._shares import in_all
from ._start import check_plain_adapters, ejected_on_error
from .method import VARIANTS, Loader, Loss, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SCALES = (0.5, 1.5)  # of the uniform distribution that block weights are drawn from


class CLLoRA(Method):
    """CL-LoRA: adapters that all tasks share, and adapters of each task with block weights (arXiv 2505.24816;
    docs/mathematics.md, section 7).

    Layers that are shared have `y = x (W + B A)^T`, A frozen with random orthonormal rows and B trained in
    every task. The others have `y = x (W + w_t B_t A_t)^T` with A_t, B_t and the block weight w_t of each
    task. Nothing is folded into W. From the second task on, each batch has a backward pass of `distillation`,
    then `reassign_`, before the backward pass of the task's loss; the official code also takes a step of
    the optimizer in between, two steps per batch. `task` runs the model of one task.

    The caller's are: which layers are shared (the first blocks), the early exit, the heads, and what is made
    of the features of all tasks. The authors give each task a cosine head on the features of `task(k)`, whose
    rows are at last the class means of these, and take the class with the highest cosine of all tasks.
    Outside of a task and of `task(k)` the model runs as of the last task that has ended. Make the optimizer,
    and DistributedDataParallel, anew for each task, because what a layer has grows.

    Args:
        model: a plain model, which is injected with `config`, or one with injected adapters.
        config: of the adapters to inject; None for a model that has them.
        shared: names of the shared layers as `target_modules` of LoRAConfig: names, suffixes or a regular
            expression, such as `r"blocks\\.[0-5]\\..*"`.
        kd_weight: weight of `distillation`, at least 0.
        temperature: of the logits of `distillation`, above 0.
        orthogonality: weight of `penalty`, at least 0.
        variant: "paper", or "official", whose distillation also has the gradient of the head through the
            teacher's logits.
        generator: draws A and block weights; None is the default generator.
        group: the processes that train this model together, as in `Method`.

    Raises:
        ArgumentError: for bad values, ranks above the width and adapters that are trained already.
        TargetError: for adapters that have scales, another method or another library, or are sharded.

    Examples:
        >>> config = fe.LoRAConfig(r=2, target_modules=["fc", "head"])
        >>> method = methods.CLLoRA(model, config, shared="fc")
        >>> for task in range(2):
        ...     method.begin_task(task)
        ...     optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ...     optimizer.zero_grad()
        ...     if task > 0:
        ...         method.distillation(x, model.fc).backward()  # the early exit runs the shared layers
        ...         method.reassign_()
        ...     (criterion(model(x), y) + method.penalty()).backward()
        ...     optimizer.step()
        ...     method.end_task(loader)
        >>> with method.task(0):
        ...     logits = model(x)
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        shared: str | Sequence[str],
        kd_weight: float = 5.0,
        temperature: float = 2.0,
        orthogonality: float = 1e-4,
        variant: Variant = "paper",
        generator: torch.Generator | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.kd_weight = number("kd_weight", kd_weight, 0.0, math.inf)
        self.temperature = number("temperature", temperature, 0.0, math.inf)
        if self.temperature == 0.0:
            raise ArgumentError(f"temperature: expected a number > 0, got {temperature!r}")
        self.orthogonality = number("orthogonality", orthogonality, 0.0, math.inf)
        self.variant, self.generator = one_of("variant", variant, VARIANTS), generator
        check_plain_adapters(adapters(model))
        with ejected_on_error(model):
            super().__init__(model, config, group=group)
            if checked_targets(shared, "shared") is None:
                raise ArgumentError("shared: expected names or a regular expression, got None")
            self._shared = {name: layer for name, layer in self.layers.items() if matches(shared, name)}
            self._check(shared)
        self._specific = {name: layer for name, layer in self.layers.items() if name not in self._shared}
        self._choice = parts.Choice()
        self._distilled = False  # whether gradients of a distillation wait for reassign_
        for ref in adapter_refs(self._shared):
            lora_a, lora_b = ref.parameters()
            lora_a.requires_grad_(False)
            parts.put(ref.layer, parts.TEACHER + parts.suffix(ref.piece), torch.zeros_like(lora_b))
            ref.layer.composer = parts.Shared(self._choice)
        for ref in adapter_refs(self._specific):
            like = ref.parameters()[0]
            parts.put(ref.layer, ref.piece.scale_name, like.new_ones(()), trained=True)
            parts.put_past(ref.layer, ref.piece, parts.no_past(ref.layer, ref.piece, like))
            ref.layer.composer = parts.Specific(self._choice)

    def _check(self, shared: str | Sequence[str]) -> None:
        if not self._shared:
            raise ArgumentError(f"shared: {shared!r} matches none of {list(self.layers)[:3]} ...")
        if names := sharded(self.layers):
            raise TargetError(f"{names[0]}: its parameters are sharded, which adapters per task cannot be")
        for ref in adapter_refs(self.layers):
            lora_a, lora_b = ref.parameters()
            if lora_a.shape[0] > lora_a.shape[1]:
                raise ArgumentError(
                    f"r: expected at most the {lora_a.shape[1]} inputs of {ref.key}, got {lora_a.shape[0]}"
                )
            if bool(lora_b.any()):
                raise ArgumentError(
                    f"{ref.key}: expected a lora_B of 0, got a trained one, whose A would be drawn anew"
                )

    @property
    def shared_layers(self) -> tuple[str, ...]:
        """Names of the layers whose adapters all tasks share.

        Returns:
            Some of the names in `layers`.
        """
        return tuple(self._shared)

    def _check_unmerged(self) -> None:
        if merged := [name for name, layer in self.layers.items() if layer.merged]:
            raise TargetError(f"{merged[0]}: its adapter is merged into the base weight; call unmerge(model)")

    @contextmanager
    def task(self, task: int) -> Iterator[None]:
        """A context in which the model runs with the adapters of a task that has ended, or of the one that
        runs.

        Args:
            task: its number, from 0.

        Yields:
            None.

        Raises:
            ArgumentError: for a number of no such task.
            TargetError: for adapters that are merged into the base weights.

        Examples:
            >>> config = fe.LoRAConfig(r=2, target_modules=["fc", "head"])
            >>> method = methods.CLLoRA(model, config, shared="fc")
            >>> method.begin_task(0)
            >>> with method.task(0):
            ...     logits = model(x)
        """
        self._check_not_exported("task")
        ended = self.tasks + int(self._running)
        if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < ended:
            raise ArgumentError(f"task: expected one of the {ended} tasks so far, from 0, got {task!r}")
        self._check_unmerged()
        with self._choice.set(None if task == self.tasks else task, False):
            yield

    def distillation(self, x: Any, early_exit: Callable[[Any], Tensor]) -> Tensor:
        """kd_weight times the cross entropy of softened logits, of `early_exit(x)` `[N, C]` with the shared
        adapters as they are against those of the end of the last task.

        Call `backward` on the result, then `reassign_`.

        Args:
            x: what early_exit takes, a batch.
            early_exit: runs the shared layers alone and gives their features to the head that is trained; it
                is the caller's, as are the gradients of that head where several processes train.

        Returns:
            A 0-d tensor, differentiable; 0 during the first task.

        Raises:
            ArgumentError: outside of a task.

        Examples:
            >>> config = fe.LoRAConfig(r=2, target_modules=["fc", "head"])
            >>> method = methods.CLLoRA(model, config, shared="fc")
            >>> method.begin_task(0)
            >>> float(method.distillation(x, model.fc).detach())
            0.0
        """
        self._check_not_exported("distillation")
        if not self._running:
            raise ArgumentError("distillation: no task is running; call begin_task first")
        if self.tasks == 0:
            return super().penalty()
        student = early_exit(x)
        with self._choice.set(None, True), torch.set_grad_enabled(self.variant == "official"):
            teacher = early_exit(x)
        loss = self.kd_weight * distilled(student, teacher, self.temperature)
        self._distilled = True
        return loss

    @torch.no_grad()
    def reassign_(self) -> None:
        """Multiplies row i of the gradient of every shared B by ||row i of B of the last task|| over the mean
        of these.

        It is to be called once after the backward pass of `distillation`, before other gradients are added.
        Over several processes it takes the mean of these gradients first.

        Raises:
            ArgumentError: without a distillation and where its gradient did not reach a shared adapter.
        """
        self._check_not_exported("reassign_")
        if not self._distilled:
            raise ArgumentError("reassign_: expected gradients of a distillation; call it and backward first")
        refs = adapter_refs(self._shared)
        if missed := [ref.key for ref in refs if ref.parameters()[1].grad is None]:
            raise ArgumentError(
                f"{missed[0]}: the gradient of the distillation did not reach it ({len(missed)} such "
                "adapters); early_exit must run every shared layer"
            )
        gradients = [gradient for ref in refs if (gradient := ref.parameters()[1].grad) is not None]
        if several(self.group):
            self._average(gradients)
        for ref, gradient in zip(refs, gradients, strict=True):
            gradient *= importance(self._teacher(ref))[:, None]
        self._distilled = False

    def _average(self, gradients: list[Tensor]) -> None:
        """Their means over processes, in one call."""
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        flat /= dist.get_world_size(self.group)
        means = flat.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _teacher(self, ref: AdapterRef) -> Tensor:
        found = own_tensors(ref.layer)[parts.TEACHER + parts.suffix(ref.piece)]
        assert found is not None
        return found

    def block_weights(self) -> dict[str, Tensor]:
        """The block weight w of every adapter of the task that runs, or ran last.

        Returns:
            0-d tensors by module name, with ".k" etc. for slices.
        """
        self._check_not_exported("block_weights")
        table = {
            ref.key: own_tensors(ref.layer)[ref.piece.scale_name] for ref in adapter_refs(self._specific)
        }
        return {key: scale for key, scale in table.items() if scale is not None}

    def penalty(self) -> Tensor:
        """orthogonality times the mean over earlier tasks of |cos(w_t, w_k)|, w all block weights of a task.

        Returns:
            A 0-d tensor, differentiable; 0 during the first task.
        """
        if not self._running or self.tasks == 0 or not self._specific:
            return super().penalty()
        now = torch.stack([weight.to(torch.float64) for weight in self.block_weights().values()])
        earlier = torch.stack(
            [parts.past(ref.layer, ref.piece)[2].to(now) for ref in adapter_refs(self._specific)], dim=1
        )
        return (self.orthogonality * mean_cosine(now, earlier)).to(
            next(iter(self.block_weights().values())).dtype
        )

    def report(self) -> Report:
        """Says per adapter whether it is shared, and lists its block weights by task.

        Returns:
            A printable `Report`.
        """
        self._check_not_exported("report")
        rows: list[dict[str, Any]] = [
            {"adapter": ref.key, "r": ref.piece.r, "shared": True, "weights": ()}
            for ref in adapter_refs(self._shared)
        ]
        for ref in adapter_refs(self._specific):
            weights = tuple(parts.past(ref.layer, ref.piece)[2].tolist())
            rows.append({"adapter": ref.key, "r": ref.piece.r, "shared": False, "weights": weights})
        totals = {"shared": len(adapter_refs(self._shared)), "specific": len(adapter_refs(self._specific))}
        return Report("CL-LoRA adapters", rows, summary=totals)

    def export(self, task: int | None = None) -> nn.Module:
        """The model of one task as plain layers, in place. Several tasks have a model each: give the task,
        and export others from copies of the method.

        Args:
            task: its number, from 0; None where there is one.

        Returns:
            The model.

        Raises:
            ArgumentError: without a task where there are several, during a task, and for a second time.

        Examples:
            >>> import copy
            >>> config = fe.LoRAConfig(r=2, target_modules=["fc", "head"])
            >>> method = methods.CLLoRA(model, config, shared="fc")
            >>> models = [copy.deepcopy(method).export(k) for k in range(method.tasks)]
        """
        self._check_exportable()
        if task is None and self.tasks > 1 and self._specific:
            raise ArgumentError(
                f"task: expected one of the {self.tasks} tasks, each of which has adapters of its own, so "
                "that no single plain model computes all of them; copy.deepcopy(method).export(task) for each"
            )
        if not self.tasks:
            return super().export()
        with self.task(self.tasks - 1 if task is None else task):
            return super().export()

    def _begin(self) -> None:
        self._check_unmerged()
        generator = self._drawing(self.generator)
        self._choice.task, self._distilled = None, False
        with torch.no_grad():
            for ref in adapter_refs(self._shared if self.tasks == 0 else {}):
                ref.parameters()[0].copy_(parts.orthonormal_rows(ref.parameters()[0], generator))
            weights = list(self.block_weights().values())
            drawn = self._new_weights(len(weights), generator)
            for ref, weight, value in zip(adapter_refs(self._specific), weights, drawn, strict=True):
                lora_a, lora_b = ref.parameters()
                lora_a.copy_(parts.orthonormal_rows(lora_a, generator))
                lora_b.zero_()
                weight.copy_(value)

    @staticmethod
    def _new_weights(count: int, generator: torch.Generator | None) -> Tensor:
        device = None if generator is None else generator.device
        drawn = torch.rand(count, dtype=torch.float64, generator=generator, device=device)
        return SCALES[0] + (SCALES[1] - SCALES[0]) * drawn

    def _after_step(self, step: int, total_steps: int) -> None:
        if self._distilled:
            raise ArgumentError("after_step: expected reassign_ after the backward pass of a distillation")

    @torch.no_grad()
    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        self._check_unmerged()
        values = {
            f"{name} of {ref.key}": tensor
            for ref in adapter_refs(self.layers)
            for name, tensor in zip(("lora_A", "lora_B"), ref.parameters(), strict=True)
        }
        values |= {f"block weight of {key}": weight for key, weight in self.block_weights().items()}
        in_all(lambda: check_finite(values, "end_task", ArgumentError), self.group)
        joined = [(ref, parts.with_current(ref.layer, ref.piece)) for ref in adapter_refs(self._specific)]
        for ref, tensors in joined:
            parts.put_past(ref.layer, ref.piece, tensors)
        for ref in adapter_refs(self._shared):
            self._teacher(ref).copy_(ref.parameters()[1])
        self._choice.task = self.tasks
        self._distilled = False

    def state_dict(self) -> dict[str, Any]:
        """The state of the method between tasks. Weights and heads are the caller's.

        Returns:
            {"tensors": all adapters, "config": counts of tasks}.

        Examples:
            >>> config = fe.LoRAConfig(r=2, target_modules=["fc", "head"])
            >>> method = methods.CLLoRA(model, config, shared="fc")
            >>> torch.save([method.state_dict(), model.state_dict()], "task0.pt")
        """
        self._check_not_exported("state_dict")
        tensors = dump_tensors(self._shared, self._specific)
        return dump(self, tensors, variant=self.variant, shared=list(self._shared))

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of a CLLoRA with the same shared layers, which may be freshly injected;
        parameters are replaced, so load the model's own state_dict, and make the optimizer, afterwards.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            ArgumentError: during a task.
            CheckpointError: naming what does not fit; nothing was loaded then.

        Examples:
            >>> config = fe.LoRAConfig(r=2, target_modules=["fc", "head"])
            >>> method = methods.CLLoRA(model, config, shared="fc")
            >>> saved = method.state_dict()
            >>> method.load_state_dict(saved)
        """
        tensors, config = parse(self, saved, variant=self.variant, shared=list(self._shared))
        load = parse_tensors(tensors, config, self._shared, self._specific)
        load()
        self._choice.task = config["tasks"] - 1 if config["tasks"] else None
        take_over(self, config)
