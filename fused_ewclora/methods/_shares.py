"""What methods do when several processes train together, each with its share of the data: sums over all of
it, and the same draws and decisions in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..distributed.processes import check_same, common_generator, several, together
from ..ewc.controller import EWC

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def drawing(
    generator: torch.Generator | None, device: torch.device, group: ProcessGroup | None
) -> torch.Generator | None:
    """The source of what a task starts with: `generator`, or one with a seed that it gives the first process
    of several."""
    return common_generator(generator, device, group) if several(group) else generator


def agreed(decisions: Mapping[str, Any], group: ProcessGroup | None) -> None:
    """Raises `TargetError` in every process when one of them has decided otherwise, as one does whose
    parameters are not those of the others."""
    if several(group):
        check_same(decisions, group)


def end_task(ewc: EWC, loader: Iterable[Any], loss_fn: Any, labels: str, group: ProcessGroup | None) -> None:
    """`ewc.end_task` with the Fisher of the data of all processes of `group`.

    Of several, all raise what one of them raises, and none keeps what was estimated.
    """
    if not several(group):
        ewc.end_task(loader, loss_fn, labels=labels)
        return
    before = ewc._state
    try:
        together(lambda: ewc.estimate_fisher(loader, loss_fn, labels=labels), group)
        ewc.reduce_fisher_(group)
        ewc.consolidate()
    except BaseException:
        ewc._state = before
        raise
