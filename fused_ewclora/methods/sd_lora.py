# SPDX-License-Identifier: Apache-2.0
"""SD-LoRA (arXiv 2501.13198): every task adds a direction; the magnitudes of all of them are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import LoRAConfig, positive
from ..distributed.processes import sharded
from ..distributed.transaction import Transaction, canonical_name
from ..errors import ArgumentError, CheckpointError, TargetError
from ..ewc.anchored import AnchoredEWC
from ..ewc.placement import check_ready
from ..ewc.settings import number, one_of
from ..layers.adapted import AdaptedLinear
from ..layers.inject import adapters
from ..layers.slices import AdapterSlice, fisher_key
from ..literals import Labels, Magnitudes, Normalization
from ..report import Report
from ._directions import MAGNITUDES, NORMALIZATIONS, Directions, Shared, Stack, fresh_a, suffix_of
from ._freezing import Frozen, freeze, freeze_shared, measure, normalised
from ._sd_state import Outcome, dump, parse
from ._shares import agreed, end_task, trained_together
from ._start import check_plain_adapters, ejected_on_error
from .method import Loader, Loss, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from ..ewc.options import FisherOptions

Ranks = int | Sequence[int] | Callable[[int], int]


class SDLoRA(Method):
    """`y = x W0^T + bias + sum_k alpha_k x (B_k A_k)^T / n_k` over the tasks so far: the directions of
    earlier tasks are frozen, all alpha_k and the current A and B are trained (SD-LoRA, arXiv 2501.13198;
    docs/mathematics.md, section 5).

    The sum is computed in one call of the LoRA linear. Between tasks nothing is folded in, W0 stays; `export`
    folds the whole sum in.

    `begin_task` and `end_task` replace parameters: make the optimizer, and DistributedDataParallel, anew for
    each task. `end_task` needs data only for `ewc_lambda`. Checkpoints are made of `state_dict()`.

    Args:
        model: as in `Method`.
        config: as in `Method`, without lora_alpha.
        normalization: "product", `n_k = ||B_k A_k||_F` also of the current direction, or "factors",
            `n_k = ||B_k||_F ||A_k||_F` with the current direction as it is (the official code). While B is 0,
            as at the start of a task, "product" leaves the current direction as it is, too; the first step of
            the optimizer gives it its length, alpha.
        magnitudes: "per_adapter", every adapter (each slice of a packed projection is one) has an alpha per
            task of its own, or "shared", all of them have one per task, as in paper and official code: one
            parameter, which gets the sum of their gradients. With "factors" it needs `reset_alphas`.
        alpha_init: magnitude of a new direction, 1 in the paper, 0.8 in the official code.
        reset_alphas: put all magnitudes back to alpha_init at the start of a task, as the official code does;
            the model jumps there. Otherwise it computes the same before and after.
        ranks: of the direction of task t, as a function of t, as a list, whose last entry serves all later
            tasks, or as one number; (10, 10, 10, 10, 8, 8, 8, 8, 6) is the paper's SD-LoRA-RR. None keeps the
            adapters' own.
        kd_threshold: SD-LoRA-KD; a new direction whose squared distance from the span of the earlier ones is
            at most this share of its squared length (9e-4 in the paper) is dropped after its task, and its
            coefficients are folded into their magnitudes. Decided per adapter, or with shared magnitudes for
            the network, whose adapters then count as one matrix. None keeps every direction.
            Refused with `reset_alphas`, which would overwrite the folded coefficients.
        generator: source of each new A; None is the default generator.
        ewc_lambda: not of the paper: adds the penalty `(lambda/2) sum F (Delta - Delta_0)^2` of EWC-LoRA,
            where Delta is what the adapters add and Delta_0 what they added when the last task ended; `ewc`
            is the controller. None adds no penalty.
        labels: as in `EWCLoRA`.
        group: as in `Method`.
        **ewc: gamma, fisher_mode, fisher_dtype, check_finite, update and fisher of `EWC`, beside an
            ewc_lambda.

    Raises:
        ArgumentError: for bad values and for adapters with scales of their own (lora_alpha).
        TargetError: for adapters that another method composes, that PEFT manages or that are sharded.
        EWCLoRAError: the errors of `Method`.

    Examples:
        >>> method = methods.SDLoRA(model, config, ranks=(2, 1))
        >>> pretrained = model.fc.weight.clone()
        >>> for task in range(2):
        ...     method.begin_task(task)
        ...     optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ...     for inputs, labels in loader:
        ...         optimizer.zero_grad()
        ...         criterion(model(inputs), labels).backward()
        ...         optimizer.step()
        ...     method.end_task(loader)
        >>> torch.equal(model.fc.weight, pretrained)
        True
        >>> method.report().rows[0]["ranks"]
        (2, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        normalization: Normalization = "product",
        magnitudes: Magnitudes = "per_adapter",
        alpha_init: float = 1.0,
        reset_alphas: bool = False,
        ranks: Ranks | None = None,
        kd_threshold: float | None = None,
        generator: torch.Generator | None = None,
        ewc_lambda: float | None = None,
        labels: Labels = "empirical",
        group: ProcessGroup | None = None,
        **ewc: Unpack[FisherOptions],
    ) -> None:
        self.normalization = one_of("normalization", normalization, NORMALIZATIONS)
        self.magnitudes = one_of("magnitudes", magnitudes, MAGNITUDES)
        self.alpha_init = _positive_number("alpha_init", alpha_init)
        self.reset_alphas = bool(reset_alphas)
        if (magnitudes, normalization) == ("shared", "factors") and not self.reset_alphas:
            # Norms of adapters differ, and the current direction is not divided by them yet.
            raise ArgumentError(
                "reset_alphas: expected True with magnitudes='shared' and normalization='factors', got "
                "False: no magnitude that adapters share keeps what they add when each is divided by its norm"
            )
        self.ranks = _checked_ranks(ranks)
        if kd_threshold is not None and number("kd_threshold", kd_threshold, 0.0, math.inf) >= 1.0:
            # The first direction has residual 1, and nothing to be folded into.
            raise ArgumentError(f"kd_threshold: expected a number < 1, got {kd_threshold!r}")
        if kd_threshold is not None and self.reset_alphas:
            # What a dropped direction added lives on in the magnitudes of the others alone.
            raise ArgumentError(
                f"kd_threshold: expected None with reset_alphas=True, got {kd_threshold!r}: the magnitudes "
                "that hold the coefficients of dropped directions would be overwritten by the next task"
            )
        self.kd_threshold = kd_threshold
        if ewc and ewc_lambda is None:
            raise ArgumentError(f"{min(ewc)}: expected an ewc_lambda beside it, got None")
        if config is not None and (config.lora_alpha is not None or config.alpha_pattern):
            raise ArgumentError("lora_alpha: expected None, SD-LoRA learns its scales")
        check_plain_adapters(adapters(model))
        with ejected_on_error(model):
            super().__init__(model, config, group=group)
            self._check_layers()
            self.ewc = None if ewc_lambda is None else AnchoredEWC(model, ewc_lambda, **ewc)
        self.generator, self.labels = generator, labels
        self._outcomes: dict[str, list[Outcome]] = {key: [] for key, _, _ in self._adapters()}
        composer = Stack(self.normalization, self._shared())
        for layer in self.layers.values():
            layer.composer = composer
            for piece, lora_a, lora_b in layer.adapter_parameters():
                Directions.first(lora_a, lora_b, self.alpha_init).put(layer, piece)

    def penalty(self) -> Tensor:
        """The penalty `(lambda/2) sum F (Delta - Delta_0)^2`, with an ewc_lambda.

        Returns:
            0-d and differentiable; 0 during the first task and without an ewc_lambda.
        """
        if self.ewc is None:
            return super().penalty()
        self._check_not_exported("penalty")
        return self.ewc.penalty()

    def report(self) -> Report:
        """The directions that each adapter holds.

        Returns:
            A printable table with a row per adapter: the tasks whose directions it holds, their ranks and
            alphas, and for every task that has ended the residual: the share of its direction's squared
            length outside of the span of the earlier ones, 0 for a direction that stayed zero. With shared
            magnitudes it is that of the whole network.

        Examples:
            >>> method = methods.SDLoRA(model, config)
            >>> method.begin_task(0)
            >>> _ = nn.init.ones_(model.fc.lora_B)  # in place of training
            >>> method.end_task(loader)
            >>> report = method.report()
            >>> report.rows[0]["tasks"], report.rows[0]["residuals"]
            ((0,), (1.0,))
            >>> report.summary
            {'directions': 1, 'dropped': 0}
        """
        self._check_not_exported("report")
        rows = [
            {
                "name": key,
                "tasks": tuple(t for t, outcome in enumerate(self._outcomes[key]) if outcome.kept),
                "ranks": tuple((now.lora_past_scale != 0).sum(0).tolist()),
                "alphas": tuple(now.lora_magnitudes[:-1].tolist()),
                "residuals": tuple(outcome.residual for outcome in self._outcomes[key]),
            }
            for key, layer, piece in self._adapters()
            for now in (Directions.of(layer, piece),)
        ]
        kept = sum(len(row["tasks"]) for row in rows)
        dropped = self.tasks * len(rows) - kept
        notes = [f"{kept} directions of {self.tasks} tasks in {len(rows)} adapters, {dropped} dropped"]
        return Report("SD-LoRA directions", rows, notes, {"directions": kept, "dropped": dropped})

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on, in a task or between tasks. Weights, heads and
        optimizers are the caller's. Tensors are not copied.

        Returns:
            Tensors by name, plain values, and the state of `ewc`.

        Raises:
            TargetError: for merged adapters.
        """
        self._check_not_exported("state_dict")
        check_ready(self.layers, "state_dict")
        settings = {
            "normalization": self.normalization,
            "magnitudes": self.magnitudes,
            "tasks": self.tasks,
            "running": self._running,
        }
        ewc = None if self.ewc is None else self.ewc.state_dict()
        return dump(self._adapters(), self._outcomes, settings) | {"ewc": ewc}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()`, also in a freshly built model; parameters are replaced, so make the
        optimizer afterwards.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            CheckpointError: for other base weights, adapters or settings than were saved; nothing was loaded
                then.
            FisherError: for Fishers that do not fit; nothing was loaded then.

        Examples:
            >>> import copy
            >>> fresh = copy.deepcopy(model)
            >>> method = methods.SDLoRA(model, config)
            >>> method.begin_task(0)
            >>> method.end_task(loader)
            >>> torch.save({"method": method.state_dict(), "head": model.head.state_dict()}, "task0.pt")
            >>> saved = torch.load("task0.pt", weights_only=True)
            >>> later = methods.SDLoRA(fresh, config)
            >>> later.load_state_dict(saved["method"])
            >>> _ = fresh.head.load_state_dict(saved["head"])
            >>> later.tasks
            1
        """
        self._check_not_exported("load_state_dict")
        check_ready(self.layers, "load_state_dict")
        parsed = parse(saved, self._adapters(), self.normalization, self.magnitudes)
        if (saved.get("ewc") is None) != (self.ewc is None):
            theirs = "without" if saved.get("ewc") is None else "with"
            raise CheckpointError(f"ewc: the state was saved {theirs} an ewc_lambda; nothing was loaded")
        if self.ewc is not None:
            fishers = self.ewc.parse_state(saved["ewc"])
            with Transaction() as change:
                self.ewc.take_over(fishers, change)
        for (_, layer, piece), directions in zip(self._adapters(), parsed.directions, strict=True):
            directions.put(layer, piece)
        self._outcomes, self.tasks, self._running = parsed.outcomes, parsed.tasks, parsed.running
        self._refresh()

    def _adapters(self) -> list[tuple[str, AdaptedLinear, AdapterSlice]]:
        """(key, layer, slice) of every adapter; a list, because ranks in slices may change meanwhile."""
        return [
            (fisher_key(canonical_name(name), piece), layer, piece)
            for name, layer in self.layers.items()
            for piece in layer.adapter_slices
        ]

    def _shared(self) -> Shared | None:
        """Where magnitudes are that all adapters share: beside the first of them."""
        if self.magnitudes == "per_adapter":
            return None
        _, layer, piece = self._adapters()[0]
        return Shared(layer, "lora_magnitudes" + suffix_of(piece))

    def _check_layers(self) -> None:
        for name, layer in self.layers.items():
            for piece in layer.adapter_slices:
                if piece.scaling != 1.0:
                    raise ArgumentError(
                        f"lora_alpha: expected None, SD-LoRA learns its scales; {name} has one"
                    )
        self._check_whole()

    def _check_whole(self) -> None:
        if names := sharded(self.layers):
            raise TargetError(f"{names[0]}: its parameters are sharded, which stacked directions cannot be")

    def _begin(self) -> None:
        self._check_whole()
        changes = []
        generator = self._drawing(self.generator)
        for _, layer, piece in self._adapters():
            now = old = Directions.of(layer, piece)
            rank = self._rank(piece)
            if rank != piece.r:
                now = self._started(now, layer, rank, generator)
            if self.reset_alphas and self.tasks:
                if (self.magnitudes, self.normalization) == ("shared", "factors"):
                    now = normalised(now)
                now = replace(now, lora_magnitudes=torch.full_like(now.lora_magnitudes, self.alpha_init))
            if now is not old:
                changes.append((now, layer, piece))
        for now, layer, piece in changes:
            now.put(layer, piece)
        self._refresh()

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        check_ready(self.layers, "end_task")
        self._check_whole()
        generator = self._drawing(self.generator)
        ended = [
            (key, layer, piece, frozen, self._started(frozen.directions, layer, piece.r, generator))
            for (key, layer, piece), frozen in zip(self._adapters(), self._frozen(), strict=True)
        ]
        agreed({key: "a direction" if frozen.kept else "none" for key, *_, frozen, _ in ended}, self.group)
        trained_together(self.layers, self.group)
        if self.ewc is not None:
            end_task(self.ewc, loader, loss_fn, self.labels, self.group)
        for key, layer, piece, frozen, directions in ended:
            directions.put(layer, piece)
            self._outcomes[key].append(Outcome(frozen.residual, frozen.kept))

    def _frozen(self) -> list[Frozen]:
        """How every adapter ends the task."""
        current, measured = [], []
        for key, layer, piece in self._adapters():
            current.append(Directions.of(layer, piece))
            try:
                measured.append(measure(current[-1], self.normalization))
            except ArgumentError as error:
                raise ArgumentError(f"end_task: {key}: {error}; nothing was changed") from None
        if self.magnitudes == "shared":
            return freeze_shared(current, measured, self.kd_threshold, self.alpha_init)
        pairs = zip(current, measured, strict=True)
        return [freeze(now, own, self.kd_threshold, self.alpha_init) for now, own in pairs]

    def _rank(self, piece: AdapterSlice) -> int:
        if self.ranks is None:
            return piece.r
        if callable(self.ranks):
            return positive(self.ranks(self.tasks), f"ranks({self.tasks})")
        return self.ranks[min(self.tasks, len(self.ranks) - 1)]

    @torch.no_grad()
    def _started(
        self, now: Directions, layer: AdaptedLinear, rank: int, generator: torch.Generator | None
    ) -> Directions:
        """With a new current direction: A random, B zero."""
        lora_a = fresh_a(layer, now.lora_A, rank, generator)
        return replace(now, lora_A=lora_a, lora_B=now.lora_B.new_zeros(now.lora_B.shape[0], rank))

    def _refresh(self) -> None:
        if self.ewc is not None:
            self.ewc.refresh()


def _positive_number(name: str, value: float) -> float:
    if number(name, value, 0.0, math.inf) == 0.0:
        raise ArgumentError(f"{name}: expected a number > 0, got {value!r}")
    return float(value)


def _checked_ranks(ranks: Any) -> tuple[int, ...] | Callable[[int], int] | None:
    if ranks is None or callable(ranks):
        return ranks
    if isinstance(ranks, int):
        ranks = (ranks,)
    if not isinstance(ranks, Sequence) or isinstance(ranks, str) or not ranks:
        raise ArgumentError(f"ranks: expected ranks per task or a function of the task, got {ranks!r}")
    return tuple(positive(rank, f"ranks[{i}]") for i, rank in enumerate(ranks))
