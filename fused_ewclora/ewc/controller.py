# SPDX-License-Identifier: Apache-2.0
"""EWC on the product B A of LoRA matrices, over a sequence of tasks (EWC-LoRA, arXiv 2602.17559)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..distributed.processes import check_same
from ..distributed.transaction import Transaction, by_canonical_name
from ..errors import ArgumentError, FisherError, TargetError, warn
from ..fishers import Fisher
from ..layers.adapted import AdaptedLinear
from ..layers.from_peft import no_adapters
from ..layers.index import checked_fisher_dtype, devices
from ..layers.inject import adapters, check_plain
from ..layers.watch import TrainingWatch
from ..literals import FisherDtype, FisherMode, Labels, MergeMode, Reduction, StructureName, Update
from ..ops.capture import RowsToSamples
from ..report import size_text
from . import estimation as passes
from . import several_passes
from .consolidate import consolidate, consolidate_prior
from .conversion import check_convertible, converted
from .divergence import CHOOSE_LAMBDA, divergence
from .fisher_pass import FisherPass
from .packing import Packing
from .placement import LocalPlacement, Placement
from .restoring import Undo
from .settings import FISHER_MODES, MERGE_MODES, UPDATES, checked_lambda, number, one_of
from .state import EWCState, Expected, TaskFisher, TaskRecord, by_fisher, dump
from .structures import EIGHT_BIT, Structure, check_mode, structure_of
from .structures.dense import Dense, EightBit
from .untrained import untrained_message

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


_log = logging.getLogger(__name__)


class EWC:
    """Penalty, Fisher and consolidation of all adapters of a model, `(lambda/2) sum F (B diag(s) A)^2`
    (EWC-LoRA, arXiv 2602.17559; docs/mathematics.md, sections 2 to 4).

    Consolidation resets lora_A and lora_B in place; an optimizer must forget their moments, which
    `reset_optimizer_state_` does. The state follows the model to other devices; a copy or pickle of an EWC
    holds a model of its own. `watch` tells of an optimizer that does not train the adapters, or that keeps
    their old moments, with an `EWCLoRAWarning`.

    Args:
        model: a model with injected adapters, also wrapped by DDP or torch.compile.
        ewc_lambda: strength of the penalty. It has no default, because it means nothing without fisher_mode,
            the data and, for "batch", the batch size: the published 1e7 belongs to "batch" at batch size 128,
            and to "sample" belongs what `convert_lambda` makes of it, 78125. Fishers and consolidation do not
            need it; `ewc.ewc_lambda = ...` sets it later, and `penalty` after the first task raises without.
        gamma: decay of the Fishers of earlier tasks, in [0, 1]; 1 is the published value, 0 forgets them.
        fisher_mode: "sample", the mean of squared per-sample gradients, or "batch", n times the squared mean
            gradient of a batch of n, averaged over samples (the official code).
        fisher_dtype: of the cumulative Fisher, fp32 or bf16 (fp64 beside fp64 adapters), or "8bit" with a
            scale for every 32 numbers; a task's Fisher is accumulated in fp32.
        merge_mode: "delta", W + s B A, or "factors", W0 + s (sum B)(sum A) with the cross terms of the
            official code; it keeps the original rows W0.
        check_finite: refuse NaN and Inf in Fishers and weights (one host synchronisation per task).
        update: "sum", gamma F + F_task, "convex", gamma F + (1 - gamma) F_task, or "fixed", F, with which no
            later task has a Fisher pass; the first task, or the prior, gives F_task.
        generator: source of the A of each new task; None is the default generator. Processes that call
            `reduce_fisher_` or `shard_` draw the same A.
        fisher: how F is kept (docs/fishers.md): "dense", one number per weight; "factored", its row and
            column sums; "kronecker", K-FAC, with mode "sample"; "uniform", its mean; or a `Structure`.

    Raises:
        ArgumentError: for a value that is out of range or does not go with another.
        DtypeError: for a fisher_dtype that does not go with the adapters.
        TargetError: without adapters or where something else computes a weight (a parametrization, pruning).

    Examples:
        >>> _ = fe.inject(model, config)
        >>> ewc = fe.EWC(model, ewc_lambda=100.0)
        >>> loss = criterion(model(x), y) + ewc.penalty()
        >>> ewc.end_task(loader, criterion)
        >>> ewc.tasks, list(ewc.fishers)
        (1, ['fc'])
    """

    _running = Undo()  # of the pass that was begun last
    _told_lambda = False  # whether the missing lambda has been told

    def __init__(
        self,
        model: nn.Module,
        ewc_lambda: float | None = None,
        gamma: float = 1.0,
        fisher_mode: FisherMode = "sample",
        fisher_dtype: FisherDtype = torch.float32,
        merge_mode: MergeMode = "delta",
        check_finite: bool = True,
        update: Update = "sum",
        generator: torch.Generator | None = None,
        fisher: StructureName | Structure = "dense",
    ) -> None:
        self.model = model
        self.ewc_lambda = ewc_lambda
        self.gamma = number("gamma", gamma, 0.0, 1.0)
        self.structure = structure_of(fisher, fisher_dtype)
        self.fisher_mode = one_of("fisher_mode", fisher_mode, FISHER_MODES)
        check_mode(self.structure, fisher_mode)
        self.merge_mode = one_of("merge_mode", merge_mode, MERGE_MODES)
        self.update = one_of("update", update, UPDATES)
        self.check_finite, self.generator = bool(check_finite), generator
        self.layers: dict[str, AdaptedLinear] = by_canonical_name(adapters(model).items())
        if not self.layers:
            raise TargetError(no_adapters(model))
        check_plain(self.layers, "EWC")
        self.watch = TrainingWatch(self.layers)
        self._placement: Placement = LocalPlacement(model, self.layers)
        self._state = EWCState()
        self._common_generator: torch.Generator | None = None  # of the next A, after reduce_fisher_
        self.fisher_dtype = self._kept_dtype(self.structure, fisher_dtype)
        self._values: tuple[Any, dict[str, Fisher]] = (None, {})

    def _kept_dtype(self, structure: Structure, fisher_dtype: torch.dtype | str) -> torch.dtype:
        """The dtype of kept numbers; of codes there are none."""
        if isinstance(fisher_dtype, str):
            return torch.float32
        return checked_fisher_dtype(self._placement.refs, fisher_dtype, structure.dtypes, structure.name)

    @property
    def ewc_lambda(self) -> float | None:
        """The strength of the penalty; None until it is given."""
        return self._lambda

    @ewc_lambda.setter
    def ewc_lambda(self, value: float | None) -> None:
        self._lambda = None if value is None else checked_lambda(value)

    def __repr__(self) -> str:
        strength = "None" if self._lambda is None else f"{self._lambda:g}"
        eight_bit = self.structure.name == EightBit.name
        kept = repr(EIGHT_BIT) if eight_bit else str(self.fisher_dtype).removeprefix("torch.")
        structure = Dense.name if eight_bit else self.structure.name
        held = size_text(sum(tensor.nbytes for tensor in self._state.fishers.values()))
        return (
            f"EWC(ewc_lambda={strength}, gamma={self.gamma:g}, fisher_mode={self.fisher_mode!r}, "
            f"fisher={structure!r}, fisher_dtype={kept}, merge_mode={self.merge_mode!r}, "
            f"update={self.update!r}; {self.tasks} tasks, {len(self.layers)} layers, Fishers of {held})"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "ewc_lambda" in state:  # of an earlier version
            self._lambda = vars(self).pop("ewc_lambda")
            self.watch = TrainingWatch(self.layers)
        if "structure" not in state:
            self.structure = structure_of("dense", torch.float32)
        self._values = (None, {})

    @property
    def fishers(self) -> dict[str, Fisher]:
        """The cumulative Fisher `[rows of the adapter, d_in]` by module name, with ".k" etc. for slices;
        empty before the first task. Of other structures than dense ones an `EightBitFisher`, `FactoredFisher`
        or `KroneckerFisher`. Tensors that are sharded by rows are DTensors."""
        return self._as_values(self._placement.wrapped(self._state.fishers))

    def _as_values(self, tensors: Mapping[str, Tensor]) -> dict[str, Fisher]:
        if type(self.structure) is Dense:
            return dict(tensors)
        columns = {ref.key: ref.layer.in_features for ref in self._placement.refs}
        return {key: self.structure.value(parts, columns[key]) for key, parts in by_fisher(tensors).items()}

    @property
    def tasks(self) -> int:
        """Tasks consolidated so far, without the prior."""
        return sum(not record.prior for record in self._state.history)

    @property
    def history(self) -> tuple[TaskRecord, ...]:
        """How the Fisher of the prior, if there is one, and of each consolidated task was made: labels,
        samples, batch size, gamma."""
        return self._state.history

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).weight.device

    def _check(self) -> None:
        """Raises `TargetError` when the adapters have changed; the state follows a model that was moved."""
        self._placement.check()
        self._follow()

    def _follow(self) -> None:
        """Moves the state to the devices of the layers."""
        self._state = self._state.moved(devices(self._placement.refs), self.fisher_dtype)

    def _fishers_in_place(self) -> dict[str, Fisher]:
        """The Fishers on the devices of the layers."""
        if next(iter(self._state.fishers.values())).device != self._device:
            self._follow()
        tensors: dict[str, Any] = self._state.fishers
        if type(self.structure) is Dense:
            return tensors
        if torch.compiler.is_compiling():  # a graph guards on what it changes, and would be made again
            return self._as_values(tensors)
        if self._values[0] is not tensors:
            self._values = (tensors, self._as_values(tensors))
        return self._values[1]

    def _given_lambda(self) -> float:
        """The strength of the penalty; raises `ArgumentError` when there is none."""
        if self._lambda is None:
            raise ArgumentError(f"ewc_lambda: expected a number for the penalty, got none. {CHOOSE_LAMBDA}")
        return self._lambda

    def _no_penalty(self) -> Tensor:
        """The penalty before the first consolidation: exactly 0."""
        if self.ewc_lambda is None and not self._told_lambda and not torch.compiler.is_compiling():
            self._told_lambda = True
            warn(
                "ewc_lambda: none was given; the penalty is 0 during the first task, and raises after it. "
                f"{CHOOSE_LAMBDA}"
            )
        # A leaf, so that .backward() works on it alone; torch.compile has no leaves inside its graphs.
        leaf = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return torch.zeros((), device=self._device, requires_grad=leaf)

    def penalty(self) -> Tensor:
        """The penalty `P = (lambda/2) sum F (B diag(s) A)^2` over all adapters (docs/mathematics.md, section
        2).

        Returns:
            P, 0-d fp32 (fp64 beside fp64 adapters), differentiable; exactly 0 before the first consolidation,
            or the prior.

        Raises:
            ArgumentError: after the first consolidation without an ewc_lambda.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> fe.EWC(model, ewc_lambda=100.0).penalty().item()
            0.0
        """
        if not self._state.fishers:
            return self._no_penalty()
        return self._placement.penalty(self._fishers_in_place(), self._given_lambda())

    def add_penalty_grad_(self, grad_scale: float | Tensor = 1.0) -> Tensor:
        """Adds `grad_scale * dP` to `.grad` of the adapters, without a graph.

        Args:
            grad_scale: factor of the gradient; under a GradScaler its scale.

        Returns:
            The unscaled P, 0-d.

        Raises:
            ArgumentError: as `penalty`.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model, ewc_lambda=100.0)
            >>> criterion(model(x), y).backward()
            >>> ewc.add_penalty_grad_().item()
            0.0
        """
        if not self._state.fishers:
            return self._no_penalty().detach()
        return self._placement.add_penalty_grad_(self._fishers_in_place(), self._given_lambda(), grad_scale)

    @contextmanager
    def accumulate_fisher(
        self,
        reduction: Reduction = "mean",
        batch_size: int | None = None,
        loss_scale: float = 1.0,
        labels: Labels = "empirical",
        *,
        check_samples: bool = True,
        rows_to_samples: Mapping[str, RowsToSamples] | None = None,
        allow_empty: bool = False,
    ) -> Iterator[FisherPass]:
        """Backward passes inside the block add to the Fisher of the current task; several blocks before
        `consolidate` add up.

        Train or eval mode is the caller's choice. Compiled models run eagerly inside. An exception or
        non-finite values discard what the block gathered.

        Args:
            reduction: of the loss over samples, "mean" or "sum".
            batch_size: samples per batch where it is not the leading dimension of the model's first argument,
                or with fisher_mode "batch" of every layer's input; where it varies, set `.batch_size` on the
                block's value.
            loss_scale: the factor on the loss.
            labels: of the loss, which is only recorded.
            check_samples: as in `estimate_fisher`, for every call of the model itself (the loss is not
                checked).
            rows_to_samples: as in `estimate_fisher`.
            allow_empty: a block without a forward pass adds zero, for one process of several.

        Yields:
            The pass, whose `.batch_size` can be set.

        Raises:
            TargetError: when an adapted layer was not reached.
            FisherError: for values that are not finite, and for rows whose sample is unknown.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> with ewc.accumulate_fisher():
            ...     for x, y in loader:
            ...         criterion(model(x), y).backward()
            >>> ewc.consolidate()
        """
        self._check()
        self._note_gradients()
        self._check_gathers("accumulate_fisher")
        options = (reduction, batch_size, loss_scale, check_samples, rows_to_samples)
        running = FisherPass(self._placement, self.structure, self.fisher_mode, *options)
        running.allow_empty = allow_empty
        undo = Undo()
        with self._naming_lambda():
            with undo, undo:
                self._begin(running, undo)
                with running.watched():
                    yield running
            fisher = running.result(labels, self.check_finite)
        self._add(fisher)

    @property
    def gathers(self) -> bool:
        """Whether the end of this task needs a Fisher: not with update "fixed" once there is one."""
        return self.update != "fixed" or not self._state.fishers

    def _check_gathers(self, action: str) -> None:
        if not self.gathers:
            raise FisherError(
                f"{action}: update 'fixed' keeps the F that there is, to which a task adds nothing; call "
                "consolidate alone"
            )

    def _note_gradients(self) -> None:
        """Notes whether the training of this task has left gradients, before a Fisher pass leaves its own."""
        if self._state.task is None:
            self.watch.note_gradients()

    @contextmanager
    def _naming_lambda(self) -> Iterator[None]:
        """An error of the block says how large the penalty is when that has made the training diverge."""
        try:
            yield
        except FisherError as error:
            if text := self._diverged():
                raise FisherError(f"{error}. {text}") from error
            raise

    def _diverged(self) -> str | None:
        if not self._state.fishers or not self.ewc_lambda:
            return None
        return divergence(self._placement, self._fishers_in_place(), self.ewc_lambda, self.fisher_mode)

    def _begin(self, running: FisherPass, undo: Undo) -> None:
        running.start(undo)
        self._running = undo

    def abort_fisher(self) -> None:
        """Ends a pass whose block was left without ending it, as by an interrupt between the lines of a
        program or a generator that nobody resumes.

        The captures are removed from the layers, modes and gradients that `estimate_fisher` had set aside
        are restored, and what the pass gathered is discarded: a block that goes on all the same raises
        `FisherError` at its end. Fishers of passes that had ended before stay. Without a pass nothing
        happens.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> fe.EWC(model).abort_fisher()
        """
        self._running.abort()
        for layer in self.layers.values():
            layer.fisher_capture = None

    def _add(self, fisher: TaskFisher) -> None:
        old = self._state
        task = fisher if old.task is None else self._packing.plus(fisher, old.task)
        self._state = replace(old, task=task)

    @property
    def _packing(self) -> Packing:
        return Packing(self._placement, self.structure, self.fisher_dtype, len(self._state.history))

    def estimate_fisher(
        self,
        loader: Iterable[Any],
        loss_fn: passes.LossFunction | None = None,
        labels: Labels = "empirical",
        max_batches: int | None = None,
        progress: bool | None = None,
        *,
        reduction: Reduction | None = None,
        forward: passes.Forward = passes.default_forward,
        logits_fn: Callable[[Any], Tensor] = passes.default_logits,
        batch_size_fn: Callable[[Any], int] = passes.batch_size_of,
        generator: torch.Generator | None = None,
        check_samples: bool = True,
        rows_to_samples: Mapping[str, RowsToSamples] | None = None,
        allow_empty: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        """Adds the Fisher of the data in `loader` to the current task's, in eval mode; modes and gradients
        are restored.

        With fisher_mode "sample" the pass runs the first and the last sample of the first batch alone, to
        find which rows of each layer's input belong to which sample; with both modes it compares losses that
        are not known with those of samples alone (docs/conventions.md). What a call that raises has gathered
        is discarded, also after an interrupt.

        Args:
            loader: of batches (x, y), x, or mappings for model(**batch) with targets "labels".
            loss_fn: loss_fn(output, y), a mean or a sum over samples; None takes -log p(y), summed over the
                targets of a sample, unless the model has a loss that is something else.
            labels: "empirical"; "sampled", y ~ softmax(logits_fn(output)); or "exact", the expectation over
                classes of -log p, one backward per class, without loss_fn.
            max_batches: how many batches are used; None uses all.
            progress: whether a progress bar is shown; None shows it where the terminal can.
            reduction: "mean" or "sum", what loss_fn is over samples where its own attribute `reduction` does
                not say so; None is "mean".
            forward: forward(model, batch) -> (output, targets), for batches of another form.
            logits_fn: logits_fn(output) -> logits, for labels that are sampled or exact.
            batch_size_fn: batch_size_fn(batch) -> the number of samples.
            generator: source of the labels that are sampled.
            check_samples: False skips the checks above, and vouches that every input has the samples first,
                in order, and that the loss is what `reduction` says.
            rows_to_samples: by layer, function(x `[rows, d]`) -> the sample of each row, for rows in no fixed
                order (routed experts).
            allow_empty: a loader without samples adds zero, for one process of several.
            max_bytes: of the sums that are gathered at a time; the loader, which has to give the same batches
                every time, is passed over once for every group of layers that fits, and the sums of a group
                wait in what F is kept in.

        Raises:
            FisherError: for an empty loader, non-finite values, a loss that is no mean over samples, samples
                that act on each other or rows whose sample is unknown.
            ArgumentError: for batches whose parts disagree.
            TargetError: for layers that never ran.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> ewc.estimate_fisher(loader, criterion, labels="sampled")
            >>> ewc.consolidate()
            >>> ewc.fishers["fc"].shape
            torch.Size([6, 8])
        """
        passes.check_labels(labels, self.fisher_mode)
        self._check_gathers("estimate_fisher")
        options = (labels, loss_fn, reduction, logits_fn, generator, check_samples)
        policy = passes.LabelPolicy(*options)
        data = passes.Data(loader, self._device, forward, batch_size_fn, max_batches, progress)
        self._check()
        groups: list[dict[str, AdaptedLinear]] | None = None
        if max_bytes is not None:
            groups = several_passes.groups(self._placement, self.structure, max_bytes)
            several_passes.check_repeatable(loader)
        self._note_gradients()
        if groups is None:
            found = self._passed(data, policy, None, allow_empty, rows_to_samples)
        else:
            rewind, passed = several_passes.Rewind(self._placement, loader, generator), []
            for turn, layers in enumerate(groups):
                if turn:
                    rewind()
                    policy = passes.LabelPolicy(*options)
                passed.append(
                    self._packing.packed(
                        self._passed(data, policy, layers, allow_empty, rows_to_samples, warn=not turn)
                    )
                )
            found = several_passes.joined(passed)
        self._add(found)  # last: after an interrupt nothing of this call is there

    def _passed(
        self,
        data: passes.Data,
        policy: passes.LabelPolicy,
        layers: dict[str, AdaptedLinear] | None,
        allow_empty: bool,
        rows_to_samples: Mapping[str, RowsToSamples] | None,
        warn: bool = True,
    ) -> TaskFisher:
        """The Fisher of one pass over the data, of these layers (None: all)."""
        running = FisherPass(
            self._placement,
            self.structure,
            self.fisher_mode,
            policy.backward_reduction,
            check_samples=policy.check_samples,
            rows_to_samples=rows_to_samples,
            layers=layers,
        )
        running.samples, running.allow_empty = 0, allow_empty
        undo = Undo()
        with self._naming_lambda(), torch.inference_mode(False), undo, undo:
            checks = passes.run(self.model, data, policy, running, undo, self.check_finite, self._begin)
            fisher = running.result(policy.labels, self.check_finite)
            if warn:
                checks.warn()
        return fisher

    def reduce_fisher_(self, group: ProcessGroup | None = None) -> None:
        """Sums the Fisher of the current task, and its number of samples, over the processes of `group`.

        Call it once on every process between estimate_fisher and consolidate, each having passed over its own
        share of the data; one whose share is empty calls estimate_fisher with allow_empty=True. It also makes
        `consolidate` draw the same new A everywhere, for which update "fixed" needs it as well. Nothing is
        left to do after `shard_`, with which a Fisher pass itself sums over processes.

        Args:
            group: the processes; None is all of them.

        Raises:
            FisherError: before any estimate, without a process group or when no process has samples.
            TargetError: when adapters or settings differ between processes.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> ewc.estimate_fisher(loader, criterion)
            >>> if torch.distributed.is_initialized():
            ...     ewc.reduce_fisher_()
            >>> ewc.consolidate()
        """
        if not self.gathers:
            check_same(self._described(), group)
            self._common_generator = self._placement.common_generator(self.generator, group)
            return
        if self._state.task is None:
            raise FisherError("reduce_fisher_: this task has no Fisher yet; call estimate_fisher first")
        task = self._packing.reduced(self._state.task, self._described(), group)
        if task.samples == 0:
            raise FisherError(
                "reduce_fisher_: the loaders of all processes were empty; no process has samples"
            )
        self._common_generator = self._placement.common_generator(self.generator, group)
        self._state = replace(self._state, task=task)

    def shard_(self, mesh: DeviceMesh | None = None) -> None:
        """Keeps of every Fisher only the rows whose lora_B this process holds; for models that FSDP2 shards.

        Call it once on every process, after `fully_shard` and before training. From then on the memory of
        a Fisher is divided by the number of processes, Fishers are summed over all processes batch by batch
        (so each must run the same number of batches, as FSDP requires), a state loaded or made before is
        sharded too, and gradients of the penalty reach the shards undivided.

        Args:
            mesh: that of the parameters, which None takes; of a mesh with replication the sharded dimension
                counts.

        Raises:
            TargetError: when lora_A or lora_B is not sharded by rows over mesh, or when adapters or settings
                differ between processes.
            ArgumentError: for merge_mode "factors".

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> if torch.distributed.is_initialized():
            ...     torch.distributed.fsdp.fully_shard(model)
            ...     ewc.shard_()
        """
        if self.merge_mode != "delta":
            raise ArgumentError(f"merge_mode: expected 'delta' for shard_, got {self.merge_mode!r}")
        for name, layer in self.layers.items():
            if layer.weight_state() is not None:
                raise TargetError(f"shard_: {name}: its weight is quantised, and cannot be sharded by rows")
        from .sharding import ShardedPlacement  # loads torch.distributed.fsdp, which takes a second

        before, sharded = self._placement, ShardedPlacement(self._placement, mesh, self.structure)
        check_same(self._described())
        self._state = self._state.mapped_by_key(lambda fishers: sharded.taken(before.wrapped(fishers)))
        self._placement = sharded

    def convert_fisher_(
        self,
        fisher: StructureName | Structure,
        fisher_dtype: FisherDtype = torch.float32,
    ) -> dict[str, float]:
        """From now on keeps F as `EWC(fisher=, fisher_dtype=)` names it, and converts what is kept of earlier
        tasks.

        To be called between tasks. Dense Fishers, in 8 bits too, become any other ("kronecker" keeps their
        row and column sums as diagonal factors), factored ones "uniform". Captured graphs of the penalty must
        be captured anew. Nothing has changed when this raises.

        Args:
            fisher: as in `EWC`.
            fisher_dtype: as in `EWC`.

        Returns:
            For each adapter the relative error in the Frobenius norm that this made of F.

        Raises:
            ArgumentError: as the constructor.
            DtypeError: as the constructor.
            FisherError: from structures whose single numbers are lost, during a task that has a Fisher, after
                `shard_` and for values that are not finite.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> ewc.end_task(loader, criterion)
            >>> ewc.convert_fisher_("dense", "8bit")["fc"] < 0.05
            True
        """
        structure = structure_of(fisher, fisher_dtype)
        check_mode(structure, self.fisher_mode)
        dtype = self._kept_dtype(structure, fisher_dtype)
        if not isinstance(self._placement, LocalPlacement):
            raise FisherError("convert_fisher_: the Fishers are sharded by rows; convert before shard_")
        if self._state.task is not None:
            raise FisherError(
                "convert_fisher_: this task has a Fisher already, gathered for the present structure; "
                "call consolidate first"
            )
        check_convertible(self.structure, structure)
        self._check()
        options = (self._placement.refs, self.structure, structure, dtype, self.check_finite)
        fishers, errors = converted(self._state, *options)
        self._state = replace(self._state, fishers=fishers)
        self.structure, self.fisher_dtype, self._values = structure, dtype, (None, {})
        return errors

    def consolidate(self, gamma: float | None = None) -> None:
        """Ends a task: `F <- gamma F + F_task`, `W <- W + B diag(s) A` (fp32 sum, one rounding), A and B
        reset (docs/mathematics.md, section 4); all or nothing.

        With update "fixed" F stays what it is. The model computes what it computed before, to one rounding of
        W.

        Args:
            gamma: decay of the earlier Fishers in this call; None is that of the constructor.

        Raises:
            FisherError: when the task has no Fisher or a new value is not finite; weights, Fishers, adapters
                and counters are then as they were.
            TargetError: for merged or tied weights, likewise.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> ewc.estimate_fisher(loader, criterion)
            >>> ewc.consolidate(gamma=0.9)
        """
        self._check()
        gamma = self.gamma if gamma is None else number("gamma", gamma, 0.0, 1.0)
        self._placement.check_foldable("consolidate")
        self.watch.check_changed("consolidate")
        with self._naming_lambda():
            self._state = consolidate(
                self._state,
                self._placement,
                self.structure,
                gamma=gamma,
                update=self.update,
                merge_mode=self.merge_mode,
                fisher_dtype=self.fisher_dtype,
                check_finite=self.check_finite,
                generator=self._common_generator or self.generator,
            )
        self._common_generator = None
        self.watch.expect_fresh_optimizer()
        done = self._state.history[-1]
        text = "consolidate: task %d, a Fisher of %d samples (labels %s), gamma %g"
        _log.info(text, self.tasks, done.samples, done.labels, gamma)

    def consolidate_prior(self) -> None:
        """Before the first task, keeps the Fisher that was gathered, as if it were that of an earlier task:
        the first task is penalised as well. Weights and adapters stay as they are.

        With untrained adapters it is the Fisher of the pretrained weights, of whatever data and loss it was
        estimated with. Tasks add theirs (update "sum", gamma decays the prior too), or with update "fixed"
        the prior stays all there is.

        Raises:
            FisherError: after a consolidation, for trained adapters, without a Fisher and for values that are
                not finite; nothing has changed then.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model, ewc_lambda=100.0)
            >>> ewc.estimate_fisher(loader, criterion)
            >>> ewc.consolidate_prior()
            >>> ewc.tasks
            0
        """
        self._check()
        options = (self.fisher_dtype, self.check_finite)
        self._state = consolidate_prior(self._state, self._placement, self.structure, *options)
        self._common_generator = None

    def end_task(
        self,
        loader: Iterable[Any],
        loss_fn: passes.LossFunction | None = None,
        *,
        gamma: float | None = None,
        labels: Labels = "empirical",
        max_batches: int | None = None,
        progress: bool | None = None,
        reduction: Reduction | None = None,
        forward: passes.Forward = passes.default_forward,
        logits_fn: Callable[[Any], Tensor] = passes.default_logits,
        batch_size_fn: Callable[[Any], int] = passes.batch_size_of,
        generator: torch.Generator | None = None,
        check_samples: bool = True,
        rows_to_samples: Mapping[str, RowsToSamples] | None = None,
        allow_empty: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        """Ends a task: `estimate_fisher`, where the task needs a Fisher, then `consolidate(gamma)`.

        A Fisher that was estimated stays when `consolidate` raises: remove the cause and call `consolidate`.
        Warns, before anything else, of adapters that the first task did not train although it trained others,
        and of a loader that the last task has ended with when no adapter has been trained since.

        Args:
            loader: as in `estimate_fisher`.
            loss_fn: as in `estimate_fisher`.
            gamma: as in `consolidate`.
            labels: as in `estimate_fisher`, like all that follow.
            max_batches: as there.
            progress: as there.
            reduction: as there.
            forward: as there.
            logits_fn: as there.
            batch_size_fn: as there.
            generator: as there.
            check_samples: as there.
            rows_to_samples: as there.
            allow_empty: as there.
            max_bytes: as there.

        Raises:
            EWCLoRAError: the errors of both.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> ewc.end_task(loader, criterion, max_batches=1)
            >>> ewc.history[0].samples
            4
        """
        if gamma is not None:
            number("gamma", gamma, 0.0, 1.0)
        self._check()
        if message := untrained_message(self._placement.layers):
            warn(f"end_task: {message}")
        if self.gathers:
            self.watch.check_repeated(loader)
            self.estimate_fisher(
                loader,
                loss_fn,
                labels,
                max_batches,
                progress,
                reduction=reduction,
                forward=forward,
                logits_fn=logits_fn,
                batch_size_fn=batch_size_fn,
                generator=generator,
                check_samples=check_samples,
                rows_to_samples=rows_to_samples,
                allow_empty=allow_empty,
                max_bytes=max_bytes,
            )
        self.consolidate(gamma)
        self.watch.note_ended_with(loader)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """An exception in the block discards every Fisher that was estimated in it.

        Yields:
            Nothing.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> with ewc.restored_on_error():
            ...     ewc.end_task(loader, criterion)
        """
        before = self._state, self._common_generator
        try:
            yield
        except BaseException:
            self._state, self._common_generator = before
            raise

    def _described(self) -> dict[str, Any]:
        """What must be the same in all processes that share a model or its data."""
        shapes = {
            ref.key: (ref.piece.row_count, ref.layer.in_features, ref.piece.r, ref.piece.scaling)
            for ref in self._placement.refs
        }
        return {**shapes, **self._settings(), "gamma": self.gamma, "ewc_lambda": self.ewc_lambda}

    def _settings(self) -> dict[str, str]:
        return {
            "fisher": self.structure.name,
            "fisher_mode": self.fisher_mode,
            "merge_mode": self.merge_mode,
            "update": self.update,
        }

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on; tensors are not copied. Weights and adapters are in the
        model's own state_dict.

        Returns:
            {"tensors": Fishers and, with merge_mode "factors", the sums of A and of B; "config": how they
            were made}.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> sorted(fe.EWC(model).state_dict())
            ['config', 'tensors']
        """
        return dump(self._state.mapped_by_key(self._placement.wrapped), self._settings())

    def parse_state(self, saved: Mapping[str, Any]) -> EWCState:
        """The validated state in `saved`, which `take_over` loads.

        Args:
            saved: what `state_dict` returned.

        Returns:
            The state.

        Raises:
            FisherError: naming what does not fit.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> state = ewc.parse_state(ewc.state_dict())
        """
        shapes = {
            ref.key: (ref.piece.row_count, ref.piece.r, ref.layer.in_features) for ref in self._placement.refs
        }
        expected = Expected(shapes, self._settings(), self.check_finite, self.structure)
        return self._placement.parsed(saved, expected)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of an EWC with the same settings and adapters; nothing changes unless
        all of it fits. The state of the model (weights, adapters) is the model's own and loaded by itself.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            FisherError: naming what does not fit.

        Examples:
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> ewc.end_task(loader, criterion)
            >>> torch.save(ewc.state_dict(), "ewc.pt")
            >>> later = fe.EWC(model)
            >>> later.load_state_dict(torch.load("ewc.pt", weights_only=True))
            >>> later.tasks
            1
        """
        parsed = self.parse_state(saved)
        with Transaction() as change:
            self.take_over(parsed, change)

    def take_over(self, parsed: EWCState, change: Transaction) -> None:
        """Loads a parsed state, on the devices of the layers; Fishers that exist already are updated in place
        through `change`.

        Args:
            parsed: what `parse_state` returned.
            change: collects what is written, so that all of it or nothing happens.

        Examples:
            >>> from fused_ewclora.distributed.transaction import Transaction
            >>> _ = fe.inject(model, config)
            >>> ewc = fe.EWC(model)
            >>> with Transaction() as change:
            ...     ewc.take_over(ewc.parse_state(ewc.state_dict()), change)
        """
        self.watch.dismiss()  # the optimizer's state may be loaded too, and is then the right one
        new = parsed.copied(devices(self._placement.refs), self.fisher_dtype)
        if self._state.fishers and new.fishers:
            for key, tensor in self._state.fishers.items():
                change.copy_(tensor, new.fishers[key])
            new = replace(new, fishers=self._state.fishers)
        self._state = new
