# SPDX-License-Identifier: Apache-2.0
"""EWC in transformers' `Trainer`, without subclassing it."""

from __future__ import annotations

import math
import os
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ArgumentError, IntegrationError, TargetError, warn
from ..ewc.controller import EWC
from ..layers.adapted import AdaptedLinear
from ..layers.inject import check_plain
from ..layers.matching import shorten
from ._transformers_checkpoint import Source, begin, save

# The tasks that had ended when Trainer.train last returned; scripts may make a callback for every task.
_trained: weakref.WeakKeyDictionary[EWC, int] = weakref.WeakKeyDictionary()
_told: weakref.WeakSet[EWC] = weakref.WeakSet()  # what was told of them


class EWCCallback(TrainerCallback):
    """Adds the gradient of `ewc.penalty()` to every optimizer step of a `Trainer`, and logs the penalty.

    The penalty depends only on parameters, which do not change until the optimizer steps. Its gradient is
    therefore added once per step, before the first micro-batch. Gradient accumulation, `num_items_in_batch`
    and the averaging of DDP do not affect it, and clipping sees the sum, as with a penalty in the loss. Under
    a GradScaler the gradient is multiplied by the scale of that step. `on_pre_optimizer_step` would be too
    late, because Trainer clips and unscales before it.

    `loss` in the logs is the loss of the data alone; `ewc_penalty` is the mean penalty over the same steps.
    Reporters run before the callbacks of the user and miss it; move this callback to the front of
    `trainer.callback_handler.callbacks` to include them.

    Every checkpoint of Trainer holds the state of `ewc` in a folder `fused_ewclora`. Training that is resumed
    loads it, also in a fresh process, where the model must first be built from the same pretrained weights
    and injected in the same way. ewc_lambda and gamma are not restored but set by the script, like the
    learning rate.

    Args:
        ewc: the `EWC` of the model that the Trainer trains.
        resume_from_checkpoint: True looks for that state in args.resume_from_checkpoint and in the
            checkpoints of args.output_dir; a path names the folder of a checkpoint elsewhere, from which
            Trainer resumes too; False leaves `ewc` as it is.

    Raises:
        TargetError: when `ewc` is no `EWC`; at the start of training, when the model is not that of `ewc`.
        ArgumentError: when resume_from_checkpoint is neither a path nor a bool.
        IntegrationError: at the start of training, under DeepSpeed, FSDP and optimizers that step inside
            backward, which keep gradients outside of `.grad`.
        CheckpointError: when training is resumed and the state is missing or does not match; `ewc` is
            unchanged then.

    Examples:
        >>> import transformers
        >>> sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))
        >>> _ = fe.inject(bert, fe.LoRAConfig(target_modules=["query", "value"]))
        >>> ewc = fe.EWC(bert, ewc_lambda=100.0)
        >>> data = [{"input_ids": torch.randint(50, (8,)), "labels": i % 2} for i in range(16)]
        >>> quiet = {"report_to": "none", "disable_tqdm": True}
        >>> args = transformers.TrainingArguments(output_dir="run", use_cpu=True, **quiet)
        >>> callback = fe.integrations.transformers.EWCCallback(ewc)
        >>> trainer = transformers.Trainer(bert, args, train_dataset=data, callbacks=[callback])
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> ewc.end_task(trainer.get_train_dataloader())
    """

    def __init__(self, ewc: EWC, resume_from_checkpoint: Source = True) -> None:
        if not isinstance(ewc, EWC):
            raise TargetError(
                f"ewc: expected a fused_ewclora.EWC, got {type(ewc).__name__}; make one with "
                "fe.EWC(model, ewc_lambda=...) after fe.inject(model, config)"
            )
        if not isinstance(resume_from_checkpoint, (str, os.PathLike, bool)):
            raise ArgumentError(
                f"resume_from_checkpoint: expected a folder or a bool, got {resume_from_checkpoint!r}"
            )
        self.ewc = ewc
        self.resume_from_checkpoint = resume_from_checkpoint
        self._added = False  # whether the current step has the gradient already
        self._sum: Tensor | float = 0.0
        self._steps = 0
        self._told = False  # that the penalty is not finite

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise where the penalty would have no effect, load the state when training is resumed, and reset
        the counters."""
        _check_model(self.ewc, kwargs["model"])
        if reason := _unsupported(args):
            raise IntegrationError(
                f"EWCCallback: {reason}; add ewc.penalty() to the loss in Trainer.compute_loss instead"
            )
        begin(self.ewc, args, state, self.resume_from_checkpoint)
        self._check_training(state, kwargs.get("optimizer"))
        self._added, self._sum, self._steps = False, 0.0, 0

    def _check_training(self, state: TrainerState, optimizer: Any) -> None:
        """Warn of an optimizer without the adapters, and of a task that has not been ended."""
        if optimizer is not None:
            self.ewc.watch.check_holds(optimizer)
        if state.global_step > 0:  # the optimizer's state is that of the checkpoint, of the same task
            self.ewc.watch.dismiss()
        elif _trained.get(self.ewc) == self.ewc.tasks and self.ewc not in _told:
            _told.add(self.ewc)
            warn(
                "EWCCallback: training begins again, but ewc.end_task(dataloader) was not called since the "
                "last Trainer.train; if this is a new task, the last one has no Fisher and is not protected"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember that this task has been trained."""
        _trained[self.ewc] = self.ewc.tasks

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the state of the EWC to the checkpoint."""
        if args.should_save:
            save(self.ewc, args, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the gradient, before the backward passes of the step add theirs."""
        if self._added:  # the last epoch ended inside a step, whose gradients are still there
            return
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        penalty = self.ewc.add_penalty_grad_(1.0 if scaler is None else _scale(scaler, self.ewc))
        self._added = True
        self._sum, self._steps = self._sum + penalty, self._steps + 1

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The gradient has been used."""
        self._added = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the mean penalty to the logs, and to the history, which is a copy of them."""
        if logs is None or "loss" not in logs or not self._steps:
            return
        logs["ewc_penalty"] = float(self._sum) / self._steps
        if not math.isfinite(logs["ewc_penalty"]) and not self._told:
            self._told = True
            warn(
                f"EWCCallback: the penalty is {logs['ewc_penalty']} with ewc_lambda={self.ewc.ewc_lambda:g} "
                f"and fisher_mode={self.ewc.fisher_mode!r}: training has diverged, most likely because "
                "ewc_lambda, or the learning rate beside it, is too large"
            )
        if state.log_history:
            state.log_history[-1]["ewc_penalty"] = logs["ewc_penalty"]
        self._sum, self._steps = 0.0, 0


def _scale(scaler: Any, ewc: EWC) -> Tensor:
    """The scale of the step as a tensor, without a device sync; the first call initialises the scaler."""
    device = next(iter(ewc.layers.values())).weight.device
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


def _check_model(ewc: EWC, model: nn.Module) -> None:
    inside = {id(module) for module in model.modules() if isinstance(module, AdaptedLinear)}
    if missing := [name for name, layer in ewc.layers.items() if id(layer) not in inside]:
        raise TargetError(
            f"EWCCallback: expected the model that the EWC was made for, Trainer's lacks {shorten(missing)}; "
            "give Trainer and fe.EWC the same model, and none of them a copy"
        )
    check_plain(ewc.layers, "EWCCallback")


def _unsupported(args: TrainingArguments) -> str | None:
    """The reason why gradients in `.grad` would not reach the optimizer, or None."""
    kind = getattr(args.distributed_state, "distributed_type", None)
    if args.deepspeed or str(kind).endswith("DEEPSPEED"):
        return "DeepSpeed keeps gradients outside of .grad"
    if args.fsdp or str(kind).endswith("FSDP"):
        return "FSDP shards parameters, which add_penalty_grad_ does not follow"
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optimizer or "layerwise" in optimizer:
        return f"the optimizer {optimizer!r} steps inside backward"
    return None
