# SPDX-License-Identifier: Apache-2.0
"""Methods over several processes, each with its share of the data: what is learned from data is a sum over
all of it, and random values and decisions are the same in every process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..distributed.processes import check_same, common_generator, of_first, several, together
from ..distributed.transaction import Transaction
from ..errors import ArgumentError, TargetError
from ..ewc.controller import EWC
from ..ewc.fold import folding
from ..ewc.placement import Placement
from ..layers.adapted import AdaptedLinear
from ..literals import Labels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")
DRIFT = 1e-3  # of adapters that are trained together on machines which round differently; far below one step


def in_all(work: Callable[[], Result], group: ProcessGroup | None) -> Result:
    """The result of `work`, which makes no collective calls; its error in one process of `group` is raised in
    every process."""
    return together(work, group) if several(group) else work()


def drawing(
    generator: torch.Generator | None, device: torch.device, group: ProcessGroup | None
) -> torch.Generator | None:
    """The source of a task's new parameters: `generator`, or with several processes a common one, whose seed
    the first process draws from `generator`."""
    return common_generator(generator, device, group) if several(group) else generator


def agreed(decisions: Mapping[str, Any], group: ProcessGroup | None) -> None:
    """Raises `TargetError` in every process when their decisions differ, as they do when their parameters
    differ."""
    if several(group):
        check_same(decisions, group)


def trained_together(layers: Mapping[str, AdaptedLinear], group: ProcessGroup | None) -> None:
    """Raises `TargetError` in every process when the adapters that one of them has trained are others than
    those of the first, as with a DistributedDataParallel that was made before parameters were replaced."""
    if not several(group):
        return
    device = next(iter(layers.values())).weight.device
    values = [
        parameter.detach().flatten().to(device, torch.float32)
        for layer in layers.values()
        for _, parameter in layer.named_lora_parameters()
        if parameter.requires_grad
    ]
    own = torch.cat(values)
    (first,) = of_first([own], group)

    def check() -> None:
        if own.shape != first.shape or bool((own - first).norm() > DRIFT * first.norm()):
            raise TargetError(
                "end_task: expected the same adapters in all processes, got others than those of process 0: "
                "they were not trained together. Make DistributedDataParallel after begin_task, as the "
                "optimizer; processes that train models of their own need a group each"
            )

    in_all(check, group)


@contextmanager
def folded(placement: Placement, group: ProcessGroup | None) -> Iterator[Transaction]:
    """W <- W + B diag(s) A in every layer (fp32 sum, one rounding), then the block, which starts the adapters
    anew through the transaction; an exception in it undoes everything.

    Raises `TargetError` for merged or tied weights and `ArgumentError` for sums that are not finite, before
    anything is changed.
    """
    placement.check_foldable("end_task")
    with folding(
        placement.layers,
        placement.new_weights(),
        action="end_task",
        error=ArgumentError,
        agree=lambda check: in_all(check, group),
    ) as change:
        yield change


def estimate(
    ewc: EWC, loader: Iterable[Any], loss_fn: Any, labels: Labels, group: ProcessGroup | None
) -> None:
    """`ewc.estimate_fisher` with the data of all processes of `group`, each of which raises the errors of
    every other one. One with an empty loader adds nothing. An EWC that needs no Fisher estimates none."""
    many = several(group)
    if ewc.gathers:
        in_all(lambda: ewc.estimate_fisher(loader, loss_fn, labels=labels, allow_empty=many), group)
    if many:
        ewc.reduce_fisher_(group)


def end_task(
    ewc: EWC, loader: Iterable[Any], loss_fn: Any, labels: Labels, group: ProcessGroup | None
) -> None:
    """`ewc.end_task` with the Fisher of the data of all processes of `group`; what was estimated before an
    error is discarded."""
    with ewc.restored_on_error():
        estimate(ewc, loader, loss_fn, labels, group)
        ewc.consolidate()


def estimate_prior(
    ewc: EWC, loader: Iterable[Any], loss_fn: Any, labels: Labels, group: ProcessGroup | None
) -> None:
    """`ewc.consolidate_prior` with the Fisher of the data of all processes of `group`, as in `end_task`."""
    with ewc.restored_on_error():
        estimate(ewc, loader, loss_fn, labels, group)
        ewc.consolidate_prior()
