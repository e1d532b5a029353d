# SPDX-License-Identifier: Apache-2.0
"""P&M (arXiv 2505.22389): training under perturbations along the task vector, which is then merged with the
coefficient that costs all tasks the least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..distributed.processes import of_first, several, sharded
from ..distributed.transaction import Transaction
from ..errors import ArgumentError, TargetError
from ..ewc.placement import check_ready
from ..ewc.settings import number
from ..layers.inject import adapters
from ..literals import Labels
from ..report import Report
from ._coefficients import Coefficients, Curvature, Scaled, TaskEWC
from ._resume import dump, parse, take_over
from ._shares import estimate, in_all
from ._start import check_plain_adapters, ejected_on_error
from .method import Loader, Loss, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PerturbAndMerge(Method):
    """P&M: a task trains `D = B diag(s) A` beside W under perturbations along D, and at its end `W <- W + a
    D` with the coefficient a that costs all tasks the least (arXiv 2505.22389; docs/mathematics.md, section
    4.2).

    The coefficient is

        a = - sum_{i<=t} <F_i (W - W_i), D> / sum_{i<=t} <F_i D, D>,   within [0, 1]

    where F_i is the Fisher of task i at W_i, the W + D with which its training ended. It minimises what the
    losses of all tasks so far have risen by since their own W_i, to second order with diagonal Hessians. It
    is 1 in the first task, and where no F_i sees D.

    In training the layers compute with `W + (1 + e) D`, e drawn anew for every step from 0, epsilon and
    -epsilon: the mean of that loss is the loss plus a multiple of <H D, D>. In eval mode there is no
    perturbation. `after_step` draws the next one; a CUDA graph keeps that of its capture.

    Besides the sum of all F_i one more matrix of that size is kept, however many tasks there are. Heads are
    the caller's and are not merged. `ewc` is the controller of the Fishers; there is no penalty.

    Args:
        model: a plain model, which is injected with `config`, or one with injected adapters.
        config: of the adapters to inject; None for a model that has them.
        epsilon: size of the perturbations, at least 0; 0 is merging alone.
        probabilities: three, with the sum 1, of 0, epsilon and -epsilon.
        per_module: a coefficient for every adapter, its sums over that adapter, instead of one for all.
        labels: of the Fishers, as in `EWC.estimate_fisher`.
        fisher_dtype: of the sum of the Fishers, as in `EWC`.
        generator: source of the perturbations and of each new A; None is the default generator.
        group: the processes that train this model together, as in `Method`. All of them perturb alike.

    Raises:
        ArgumentError: for bad values; and as `Method` and `EWC` do.
        TargetError: for adapters of another method or library, with learned scales, and sharded ones.

    Examples:
        >>> method = methods.PerturbAndMerge(model, config)
        >>> method.begin_task(0)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> criterion(model(x), y).backward()
        >>> optimizer.step()
        >>> method.after_step(0, 1)
        >>> method.end_task(loader, criterion)
        >>> method.coefficients
        ({'fc': 1.0},)
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        epsilon: float = 0.5,
        probabilities: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
        per_module: bool = False,
        labels: Labels = "empirical",
        fisher_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.epsilon = number("epsilon", epsilon, 0.0, math.inf)
        self.probabilities = _checked_probabilities(probabilities)
        self.per_module, self.labels, self.generator = bool(per_module), labels, generator
        if not isinstance(fisher_dtype, torch.dtype):
            raise ArgumentError(f"fisher_dtype: expected a torch.dtype, got {fisher_dtype!r}")
        check_plain_adapters(adapters(model))
        with ejected_on_error(model):  # a dtype may not go with the layers
            super().__init__(model, config, group=group)
            self.ewc = TaskEWC(model, fisher_dtype=fisher_dtype, generator=generator)
        self._curvature = Curvature.of(self.layers)
        self._coefficients: list[Coefficients] = []  # of the tasks that have ended
        self._steps = torch.Generator()  # of the perturbations of a task
        self._scaled = Scaled()
        for layer in self.layers.values():
            layer.composer = self._scaled

    @property
    def coefficients(self) -> tuple[dict[str, float], ...]:
        """The coefficient a of every task that has ended, by adapter."""
        return tuple(found.merged for found in self._coefficients)

    def kept_tensors(self) -> Iterator[Tensor]:
        """The sum of the Fishers, and the gradient of what all tasks have lost."""
        yield from super().kept_tensors()
        yield from self._curvature.gradients.values()

    def report(self) -> Report:
        """Lists the coefficient a of every task that has ended, by adapter.

        Returns:
            A printable `Report`; `solutions` in its summary are those of all adapters together before they
            were limited to [0, 1].
        """
        rows = [
            {"adapter": key} | {f"task {t}": found.merged[key] for t, found in enumerate(self._coefficients)}
            for key in self._curvature.names()
        ]
        solutions = [found.solution for found in self._coefficients]
        return Report("Coefficients of task vectors", rows, summary={"solutions": solutions})

    def _begin(self) -> None:
        self._check_own("begin_task")
        generator = self._drawing(self.generator)
        device = None if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=device)
        self._steps.manual_seed(int(seed))
        self._perturb()

    def _perturb(self) -> None:
        """Draws the perturbation of the next step, on the CPU: it decides what is computed."""
        choice = int(torch.multinomial(torch.tensor(self.probabilities), 1, generator=self._steps))
        self._scaled.perturbation = (0.0, self.epsilon, -self.epsilon)[choice]

    def _after_step(self, step: int, total_steps: int) -> None:
        self._perturb()

    def _check_own(self, what: str) -> None:
        if self.ewc.tasks != self.tasks:
            raise ArgumentError(
                f"{what}: expected an EWC of {self.tasks} tasks, the method's own, got {self.ewc.tasks}; "
                "a PerturbAndMerge is resumed by its own load_state_dict()"
            )
        if names := sharded(self.layers):
            raise TargetError(f"{names[0]}: its parameters are sharded, which cannot be merged by a share")

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        check_ready(self.layers, "end_task")
        self._check_own("end_task")
        with self.ewc.restored_on_error():
            estimate(self.ewc, loader, loss_fn, self.labels, self.group)
            found, curvature = self._merged()
            with self._scaled.merging(found.merged, curvature.refs):
                self.ewc.consolidate()
        self._curvature = curvature
        self._coefficients.append(found)
        self._scaled.perturbation = 0.0

    def _merged(self) -> tuple[Coefficients, Curvature]:
        """The coefficients of the task, and the curvature after merging with them; nothing is changed."""
        old, (sums, samples) = self.ewc.fishers, self.ewc.of_task()
        found = in_all(lambda: self._curvature.coefficients(old, sums, samples, self.per_module), self.group)
        if several(self.group):  # another machine may add up in another order
            device = next(iter(self.layers.values())).weight.device
            found = found.replaced(of_first([found.values(device)], self.group)[0])
        return found, self._curvature.after(old, sums, samples, found.merged)

    def state_dict(self) -> dict[str, Any]:
        """The state of the method between tasks. Weights and adapters are in the model's own state_dict.

        Returns:
            {"tensors": the Fishers and what the next coefficient depends on, "config": counts and
            coefficients}.

        Examples:
            >>> method = methods.PerturbAndMerge(model, config)
            >>> torch.save([model.state_dict(), method.state_dict()], "task0.pt")
        """
        ewc = self.ewc.state_dict()
        tensors = {**ewc["tensors"], **self._curvature.named()}
        coefficients = [asdict(found) for found in self._coefficients]
        return dump(self, tensors, coefficients=coefficients, ewc=ewc["config"])

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of a PerturbAndMerge on the same adapters, which may be freshly
        injected; nothing changes unless all of it fits. Load the model's own state_dict as well.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            ArgumentError: during a task.
            CheckpointError: naming what does not fit.
            FisherError: naming what does not fit in the state of the Fishers.

        Examples:
            >>> method = methods.PerturbAndMerge(model, config)
            >>> saved = method.state_dict()
            >>> method.load_state_dict(saved)
        """
        tensors, config = parse(self, saved)
        curvature, rest = self._curvature.parsed(tensors, config["tasks"])
        coefficients = Coefficients.parsed(
            config.get("coefficients"), config["tasks"], self._curvature.names()
        )
        state = self.ewc.parse_state({"tensors": rest, "config": config.get("ewc")})
        with Transaction() as change:
            self.ewc.take_over(state, change)
        self._curvature, self._coefficients = curvature, coefficients
        take_over(self, config)


def _checked_probabilities(values: Any) -> tuple[float, float, float]:
    numbers = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    if len(numbers) != 3:
        raise ArgumentError(f"probabilities: expected three, of 0, epsilon and -epsilon, got {values!r}")
    for index, value in enumerate(numbers):
        number(f"probabilities[{index}]", value, 0.0, 1.0)
    if not math.isclose(sum(numbers), 1.0, rel_tol=1e-6):
        raise ArgumentError(f"probabilities: expected three with the sum 1, got {values!r}")
    return numbers
