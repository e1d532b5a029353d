# SPDX-License-Identifier: Apache-2.0
"""KeepLoRA (arXiv 2601.19659): updates along the task's own gradient, outside of the principal directions of
the pretrained weights and of the features of earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import LoRAConfig, checked_targets, matches
from ..distributed.processes import check_same, several, sharded
from ..distributed.transaction import Transaction, canonical_name
from ..errors import ArgumentError, TargetError
from ..ewc.estimation import Forward, default_forward
from ..ewc.gradients import gradient_sums
from ..ewc.placement import LocalPlacement
from ..ewc.settings import number
from ..layers.adapted import AdaptedLinear
from ..layers.finite import check_finite
from ..layers.index import AdapterRef, adapter_refs, take_rows
from ..layers.quantised import warn_of_rounding
from ..literals import Variant
from ..progress import showing
from ..report import Report
from ._inputs import input_sums
from ._projected import Projected
from ._shares import in_all
from ._start import ejected_on_error
from ._subspace import Subspace, directions, extended
from .method import Loader, Loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KeepLoRA(Projected):
    """KeepLoRA, `y = x (W + B A)^T` with a frozen A `[r, d_in]` of gradient directions outside of what is
    protected (arXiv 2601.19659; docs/mathematics.md, section 7).

    A holds the r leading right singular directions of the mean gradient of W over the task's data, outside of
    a subspace that holds the principal directions of the pretrained weight and the features of earlier tasks.
    Only B is trained. `prepare` makes one pass with gradients over the task's data before training, and
    `end_task` one pass over the features of the task, which join the subspace. At the end of a task `W <- W +
    B A`, and B starts at 0. Every adapter, each slice of a packed projection, has a subspace of its own, in
    `subspaces`.

    Args:
        model: a plain model, which is injected with `config`, or one with injected adapters.
        config: of the adapters to inject; None for a model that has them.
        epsilon_w: share, in [0, 1], of the squared singular values of the pretrained weight that its
            principal directions hold, which are chosen before the first task; 0 protects none of them. Or the
            shares of different layers by regular expressions for their whole names, of which the first that
            matches counts: the authors' code takes 0.85 in the image tower of CLIP and 0.2 in the text tower.
        epsilon_f: share, in [0, 1], of the energy of every task's features that the subspace holds when the
            task has ended.
        variant: "paper", or "official", the authors' code for CLIP: left singular vectors of the weight,
            which therefore has to be square, and one of them fewer; the features of a task are the sum of its
            batches, row by row, which need one size; B starts at `G A^T`, G the mean gradient, and W at `W -
            B A`, so that the model starts as it was, but weight decay pulls it elsewhere. Its singular
            directions are approximate, these are not. Both take gradients in eval mode, of means over
            samples.
        forward: calls the model on a batch in passes over data, as in `EWC.estimate_fisher`. Every row of the
            inputs is a feature, padding included.
        max_batches: of a pass over data, as in `EWC.estimate_fisher`.
        group: the processes that train this model together, as in `Method`. Gradients and features are those
            of all of them.

    Raises:
        ArgumentError: for values out of range, and expressions that match no layer or leave one out.
        TargetError: for adapters of another method and weights of another shape. Nothing is changed then.

    Examples:
        >>> method = methods.KeepLoRA(model, config, epsilon_w=0.5, epsilon_f=0.9)
        >>> method.begin_task(0)
        >>> method.prepare(loader, criterion)  # before training
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> criterion(model(x), y).backward()
        >>> optimizer.step()
        >>> method.end_task(loader)
        >>> list(method.subspaces)
        ['fc']
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        epsilon_w: float | Mapping[str, float] = 0.85,
        epsilon_f: float = 0.99,
        variant: Variant = "paper",
        forward: Forward = default_forward,
        max_batches: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.epsilon_w = _checked_shares(epsilon_w)
        self.epsilon_f = number("epsilon_f", epsilon_f, 0.0, 1.0)
        with ejected_on_error(model):
            super().__init__(
                model, config, variant=variant, forward=forward, max_batches=max_batches, group=group
            )
            self._check_square()
            self._shares = _by_adapter(self.epsilon_w, self.layers)
        self.subspaces: dict[str, Subspace] = {}  # by adapter; none before the first task is prepared

    def _check_square(self) -> None:
        if self.variant != "official":
            return
        for ref in adapter_refs(self.layers):
            if ref.piece.row_count != ref.layer.in_features:
                raise TargetError(
                    f"{ref.key}: variant 'official' takes directions of outputs for those of inputs, "
                    f"expected as many of both, got {ref.piece.row_count} and {ref.layer.in_features}; take "
                    "variant 'paper'"
                )

    @torch.no_grad()
    def prepare(self, loader: Loader, loss_fn: Loss | None = None, *, progress: bool | None = None) -> None:
        """Chooses A for the task that has begun, from the gradients of one pass over its data in eval mode;
        the first task also chooses the principal directions of the weights.

        Args:
            loader: batches of the task, as in `EWC.estimate_fisher`.
            loss_fn: as in `EWC.estimate_fisher`; None is -log p(y).
            progress: as in `end_task`.

        Raises:
            ArgumentError: outside of a task, for a B that is not 0 any more and without any sample.
            TargetError: for merged or sharded layers and those that never run.
            FisherError: as `EWC.estimate_fisher` does. Nothing is changed after any of these errors.

        Examples:
            >>> method = methods.KeepLoRA(model, config)
            >>> method.begin_task(0)
            >>> method.prepare(loader, criterion)
        """
        self._check_untrained()
        if names := sharded(self.layers):
            raise TargetError(f"{names[0]}: its parameters are sharded, and KeepLoRA needs whole weights")
        with showing(progress):
            sums, samples = self._gradients(loader, loss_fn)
        refs = adapter_refs(self.layers)
        subspaces = self.subspaces or self._same_subspaces({ref.key: self._principal(ref) for ref in refs})
        chosen = {}
        for ref in refs:
            gradient = sums[ref.key].double() / samples
            used = subspaces[ref.key].to(gradient.device)
            chosen[ref.key] = directions(gradient.T @ gradient, used, ref.piece.r, "paper")
        chosen = self._same(chosen)
        with Transaction() as change:
            for ref in refs:
                change.copy_(ref.parameters()[0], chosen[ref.key])
            if self.variant == "official":
                starts = {key: total.double() @ chosen[key].T / samples for key, total in sums.items()}
                self._start_at(starts, refs, change)
        self.subspaces, self._prepared = subspaces, True

    def _gradients(self, loader: Loader, loss_fn: Loss | None) -> tuple[dict[str, Tensor], int]:
        """The summed gradient of every adapter's rows of W over the samples of all processes, and their
        number."""
        many = several(self.group)
        samples = 0

        def gathered() -> dict[str, Tensor]:
            nonlocal samples
            found, samples = gradient_sums(
                self.model,
                self.layers,
                loader,
                loss_fn,
                forward=self.forward,
                max_batches=self.max_batches,
                allow_empty=many,
            )
            return found

        sums = self._summed(gathered)
        if many:
            count = torch.tensor(samples, device=next(iter(sums.values())).device)
            dist.all_reduce(count, group=self.group)
            samples = int(count)
        if samples == 0:
            raise ArgumentError("loader: expected at least one sample, got none in any process")
        return sums, samples

    def _principal(self, ref: AdapterRef) -> Subspace:
        """The principal directions of the rows of the base weight."""
        weight = take_rows(ref.layer.base_weight, ref.piece.rows).double()
        squares = weight.T @ weight if self.variant == "paper" else weight @ weight.T
        empty = Subspace.empty(ref.layer.in_features, weight.device)
        return self._extended(empty, squares, self._shares[ref.key])

    def _extended(self, used: Subspace, squares: Tensor, epsilon: float) -> Subspace:
        if epsilon == 0.0:  # not left to rounding
            return used
        return extended(used, squares, epsilon, "paper", fewer=self.variant == "official")

    def _start_at(self, starts: Mapping[str, Tensor], refs: list[AdapterRef], change: Transaction) -> None:
        """B <- starts and W <- W - B A, of the A that is there."""
        placement = LocalPlacement(self.model, self.layers)
        placement.check_foldable("prepare")
        for ref in refs:
            change.copy_(ref.parameters()[1], -starts[ref.key])
        updates = placement.new_weights()
        values = {f"W - B A of {name}": value for name, new in updates.items() for _, value in new}
        in_all(lambda: check_finite(values, "prepare", ArgumentError), self.group)
        for new in updates.values():
            for target, value in new:
                change.copy_(target, value)
        for ref in refs:
            change.copy_(ref.parameters()[1], starts[ref.key])
        warn_of_rounding("prepare", self.layers)

    def report(self) -> Report:
        """Says per adapter how many directions its inputs have, and how many of them are protected.

        Returns:
            A printable `Report`, without rows before the first `prepare`.

        Examples:
            >>> method = methods.KeepLoRA(model, config)
            >>> method.report().summary
            {'directions': 0, 'protected': 0}
        """
        ranks = {key: (used.basis.shape[0], used.rank) for key, used in self.subspaces.items()}
        rows = [{"adapter": key, "directions": d, "protected": k} for key, (d, k) in ranks.items()]
        totals = {
            "directions": sum(d for d, _ in ranks.values()),
            "protected": sum(k for _, k in ranks.values()),
        }
        return Report("Protected directions", rows, summary=totals)

    def _owners(self, tasks: int) -> dict[str, AdaptedLinear]:
        return {ref.key: ref.layer for ref in adapter_refs(self.layers)} if tasks else {}

    def _features(self, loader: Loader) -> dict[str, Tensor]:
        """The uncentred covariance of the features of the task by layer."""
        if self.variant == "paper":
            return self._covariances(loader)
        sums = in_all(lambda: self._own_sums(loader), self.group)
        if several(self.group):
            check_same({f"rows of a batch of {name}": x.shape[0] for name, x in sums.items()}, self.group)
            for total in sums.values():
                dist.all_reduce(total, group=self.group)
        return {name: x.double().T @ x.double() for name, x in sums.items()}

    def _own_sums(self, loader: Loader) -> dict[str, Tensor]:
        self._check_unmerged()
        return input_sums(self.model, self.layers, loader, self.max_batches, self.forward)

    @torch.no_grad()
    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        self._check_prepared("end_task")
        features = self._features(loader)
        subspaces = {}
        for name, layer in self.layers.items():
            for ref in adapter_refs({name: layer}):
                used = self.subspaces[ref.key].to(features[name].device)
                subspaces[ref.key] = self._extended(used, features[name], self.epsilon_f)
        subspaces = self._same_subspaces(subspaces)
        self._fold()
        self.subspaces = subspaces


def _checked_shares(value: float | Mapping[str, float]) -> float | dict[str, float]:
    if not isinstance(value, Mapping):
        return number("epsilon_w", value, 0.0, 1.0)
    for pattern in value:
        if not isinstance(pattern, str):
            raise ArgumentError(f"epsilon_w: expected regular expressions as keys, got {pattern!r}")
        checked_targets(pattern, "epsilon_w")
    return {key: number(f"epsilon_w[{key!r}]", share, 0.0, 1.0) for key, share in value.items()}


def _by_adapter(shares: float | dict[str, float], layers: Mapping[str, AdaptedLinear]) -> dict[str, float]:
    """The share of every adapter by its key."""
    if not isinstance(shares, dict):
        return {ref.key: shares for ref in adapter_refs(layers)}
    found = {name: [key for key in shares if matches(key, canonical_name(name))] for name in layers}
    if missed := [name for name, keys in found.items() if not keys]:
        raise ArgumentError(
            f"epsilon_w: expected a share for every layer, none of {list(shares)} matches {missed[0]}"
        )
    if unused := [key for key in shares if not any(key in keys for keys in found.values())]:
        raise ArgumentError(f"epsilon_w: {unused[0]!r} matches none of the layers {list(layers)[:3]} ...")
    return {
        ref.key: shares[found[name][0]]
        for name, layer in layers.items()
        for ref in adapter_refs({name: layer})
    }
