# SPDX-License-Identifier: Apache-2.0
"""Avalanche: EWC-LoRA as a plugin for any supervised strategy."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import ArgumentError, TargetError, warn
from ..ewc.controller import EWC
from ..ewc.estimation import LABELS, check_max_batches
from ..layers.adapted import AdaptedLinear
from ..layers.inject import adapters
from ..layers.optimizers import reset_optimizer_state_
from ..literals import Labels, Transforms
from ._library import require

require("avalanche")

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..ewc.options import EWCOptions

from avalanche.benchmarks import OnlineCLExperience  # noqa: E402
from avalanche.models import avalanche_forward  # noqa: E402
from avalanche.training.plugins import EWCPlugin, SupervisedPlugin  # noqa: E402

__all__ = ["EWCLoRAPlugin"]

TRANSFORMS = ("eval", "train")


class EWCLoRAPlugin(SupervisedPlugin):  # type: ignore[misc, unused-ignore]
    """Adds the EWC penalty to the loss of a strategy, and ends a task after each training experience.

    To end a task, the plugin calls `EWC.end_task` over the dataset of the experience (for an online stream
    with known task boundaries, over that of the original experience) with the model in eval mode and the
    criterion of the strategy. It then resets the optimizer state of the adapters; the state of heads is kept.
    Task labels are passed to multi-task models as in Avalanche. `strategy.loss`, and therefore Avalanche's
    loss metrics, include the penalty. `avalanche.checkpointing.save_checkpoint` saves the plugin with its
    strategy. An `EWCLoRAWarning` tells once of Avalanche's own `EWCPlugin` beside this one.

    Args:
        ewc: the `EWC` of the model that the strategy trains; None creates one with `ewc_options` before the
            first experience, when the model must have its adapters.
        labels: as in `EWC.estimate_fisher`.
        max_batches: as in `EWC.estimate_fisher`.
        batch_size: samples per batch of the Fisher pass; None is `train_mb_size` of the strategy. With
            fisher_mode "batch" the Fisher depends on it.
        transforms: "eval" or "train", the group of the dataset's transformations in the Fisher pass.
        reset_optimizer: False leaves the state of the optimizer as it is.
        **ewc_options: the arguments of `EWC` other than the model, such as ewc_lambda.

    Raises:
        ArgumentError: for invalid arguments; before anything is trained, for a second plugin or another
            model.
        TargetError: before anything is trained, for a model without adapters or one whose adapted layers have
            been replaced.

    Examples:
        >>> from avalanche.training.supervised import Naive
        >>> _ = fe.inject(model, config)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> plugin = fe.integrations.avalanche.EWCLoRAPlugin(ewc_lambda=1e7, fisher_mode="batch")
        >>> strategy = Naive(model=model, optimizer=optimizer, plugins=[plugin])
    """

    _told = False  # of Avalanche's own plugin

    def __init__(
        self,
        ewc: EWC | None = None,
        *,
        labels: Labels = "empirical",
        max_batches: int | None = None,
        batch_size: int | None = None,
        transforms: Transforms = "eval",
        reset_optimizer: bool = True,
        **ewc_options: Unpack[EWCOptions],
    ) -> None:
        super().__init__()
        if ewc is not None and not isinstance(ewc, EWC):
            raise ArgumentError(f"ewc: expected an EWC or None, got {type(ewc).__name__}")
        if ewc is not None and ewc_options:
            raise ArgumentError(f"ewc: expected an EWC or options to make one, got both: {list(ewc_options)}")
        known = set(inspect.signature(EWC).parameters) - {"model"}
        if unknown := sorted(set(ewc_options) - known):
            raise ArgumentError(f"{unknown[0]}: expected options of EWC, {sorted(known)}")
        for name, value, allowed in (("labels", labels, LABELS), ("transforms", transforms, TRANSFORMS)):
            if value not in allowed:
                raise ArgumentError(f"{name}: expected one of {allowed}, got {value!r}")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ArgumentError(f"batch_size: expected an integer >= 1 or None, got {batch_size!r}")
        check_max_batches(max_batches)
        self.ewc = ewc
        self.labels, self.max_batches, self.batch_size = labels, max_batches, batch_size
        self.transforms, self.reset_optimizer, self._ewc_options = transforms, reset_optimizer, ewc_options

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Checks that the EWC belongs to the strategy's model, after Avalanche has adapted the model."""
        if sum(isinstance(plugin, EWCLoRAPlugin) for plugin in strategy.plugins) > 1:
            raise ArgumentError(
                "plugins: expected one EWCLoRAPlugin, got several; each would end every task. Give the "
                "strategy one of them"
            )
        if self.ewc is None:
            self.ewc = EWC(strategy.model, **self._ewc_options)
        if self.ewc.model is not strategy.model:
            raise ArgumentError(
                "ewc: expected the EWC of the strategy's model, got that of another module; make EWC and "
                "strategy of one model, and one plugin per strategy"
            )
        _check_layers(strategy.model, self.ewc.layers)
        self._warn_of_ewc_plugin(strategy.plugins)

    def _warn_of_ewc_plugin(self, plugins: Iterable[object]) -> None:
        if not self._told and any(isinstance(plugin, EWCPlugin) for plugin in plugins):
            self._told = True
            warn(
                "plugins: Avalanche's EWCPlugin is beside EWCLoRAPlugin; it draws lora_A and lora_B back to "
                "their values in earlier tasks, which consolidation has folded into the weights and "
                "initialised anew. Remove EWCPlugin from plugins"
            )

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Adds the penalty P to `strategy.loss`."""
        if self._controller.history or self._controller.ewc_lambda is None:  # which penalty() tells
            strategy.loss = strategy.loss + self._controller.penalty()

    def after_training_exp(self, strategy: Any, num_workers: int = 0, **kwargs: Any) -> None:
        """Estimates the Fisher, consolidates, and resets the adapters' optimizer state."""
        experience = strategy.experience
        if isinstance(experience, OnlineCLExperience) and experience.access_task_boundaries:
            if not experience.is_last_subexp:
                return
            experience = experience.origin_experience
        dataset = experience.dataset
        dataset = dataset.eval() if self.transforms == "eval" else dataset.train()
        loader = DataLoader(
            dataset,
            batch_size=self.batch_size or strategy.train_mb_size,
            collate_fn=getattr(dataset, "collate_fn", None),
            num_workers=num_workers,
        )
        task_labels = hasattr(
            experience, "task_labels"
        )  # benchmarks without them have experiences without the attribute

        def forward(model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
            x, y = batch[0], batch[1]
            return (avalanche_forward(model, x, batch[-1]) if task_labels else model(x)), y

        self._controller.end_task(
            loader,
            strategy._criterion,
            labels=self.labels,
            max_batches=self.max_batches,
            progress=False,
            forward=forward,
            batch_size_fn=lambda batch: len(batch[1]),
        )
        if self.reset_optimizer:
            reset_optimizer_state_(strategy.optimizer, strategy.model)
        else:
            self._controller.watch.dismiss()

    @property
    def _controller(self) -> EWC:
        if self.ewc is None:
            raise ArgumentError(
                "ewc: expected an EWC, got None; the plugin makes it before the first training experience"
            )
        return self.ewc


def _check_layers(model: nn.Module, expected: dict[str, AdaptedLinear]) -> None:
    """Check that the model still has the layers of the EWC, because dynamic modules replace layers."""
    present = set(adapters(model).values())
    if gone := [name for name, layer in expected.items() if layer not in present]:
        raise TargetError(
            f"{gone[0]}: the adapted layer has been replaced, as dynamic modules do with classifiers that "
            "grow; leave it out with exclude_modules. Nothing of this experience was trained"
        )
    if new := present - set(expected.values()):
        raise TargetError(
            f"model: {len(new)} adapted layers are unknown to the EWC; make it after the last inject. "
            "Nothing of this experience was trained"
        )
