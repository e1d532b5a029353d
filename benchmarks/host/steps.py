# SPDX-License-Identifier: Apache-2.0
"""A training step of a narrow vision transformer of timm: forward, loss, penalty and backward, without the
optimizer.

Depth and number of adapted linears are those of ViT-B and ViT-L, so that the host does as much as for these;
width, tokens and samples are tiny, because what is to be seen is what the host does and not how long products
take on it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ewclora as fe

from .. import end_to_end, extras, models
from ..case import OURS, Run, Target
from ..models import Adapted, Subject
from ..registry import PEFT, WITHOUT
from ..shapes import RELEASE, Model
from .case import NOT_COMPARED, Caller, HostCase, Truth
from .place import Entry, HostPlace

WIDTH, HEADS, TOKENS, SAMPLES, RANK = 32, 2, 2, 1, 16
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LIMIT = 0.7  # x the step under PEFT, which has no penalty
FROZEN, ADDED = "frozen base", f"{OURS} add_penalty_grad_"
Penalty = Callable[[], Tensor]


def narrow(model: Model) -> Model:
    """A model of the same depth."""
    return Model(f"{model.name.partition('/')[0]}, narrow", WIDTH, model.depth, TOKENS, HEADS)


def draw(model: Model, place: HostPlace) -> Subject:
    """timm's model and one image, whose gradient is wanted: then a frozen model has the same graph."""
    base = models.of_timm(narrow(model), model.depth, SAMPLES, TOKENS, RANK, place.device)
    config = fe.LoRAConfig(r=RANK, target_modules=list(LINEARS))
    return Subject(base.model, config, base.x.requires_grad_(), base.labels)


def _step(
    adapted: Adapted, base: Subject, autocast: torch.dtype | None, penalty: Penalty | None = None,
    after: Penalty | None = None,
) -> tuple[Run, Run]:  # fmt: skip
    """The step, and the same with the gradients of what trains. `after` follows the backward pass."""
    trained, device = adapted.leaves(), base.x.device.type
    leaves = [base.x, *trained]

    def run() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(device, autocast) if autocast else contextlib.nullcontext():
            loss = F.cross_entropy(adapted.model(base.x), base.labels)
            if penalty is not None:
                loss = loss + penalty()
        loss.backward()
        if after is not None:
            after()
        return [loss]

    def gradients() -> list[Tensor]:
        run()
        return [leaf.grad for leaf in trained if leaf.grad is not None]

    return run, gradients


def _ours(
    base: Subject,
    adapted: Adapted,
    ewc: fe.EWC,
    autocast: torch.dtype | None,
    place: HostPlace,
    without: Truth,
) -> Iterator[Caller]:
    """Ours with EWC on every backend; on the first of them also with `add_penalty_grad_`, and without EWC."""

    def caller(
        name: str, role: str, entry: Entry, runs: tuple[Run, Run], algorithm: str, truth: Truth | None = None
    ) -> Caller:
        run, gradients = runs
        return Caller(
            name, lambda: run, role, entry.backend, algorithm, entry.using, gradients, entry.results, truth
        )

    step = functools.partial(_step, adapted, base, autocast)
    entries = place.entries()
    for entry in entries:
        yield caller(entry.name, entry.role, entry, step(ewc.penalty), "EWC.penalty in the loss")
    first = entries[0]
    added = step(None, ewc.add_penalty_grad_)
    yield caller(ADDED, "variant", first, added, "EWC.add_penalty_grad_ after backward")
    yield caller(f"{OURS} {WITHOUT}", "variant", first, step(), "no penalty", without)


def _others(
    base: Subject, adapted: Adapted, autocast: torch.dtype | None, without: Truth
) -> Iterator[Caller]:
    """PEFT's model without a penalty, and the model without adapters."""
    built: list[tuple[Run, Run]] = []

    def by_peft() -> tuple[Run, Run]:
        if not built:
            built.append(_step(models.by_peft(base, adapted), base, autocast))
        return built[0]

    yield Caller(PEFT, lambda: by_peft()[0], check=lambda: by_peft()[1](), truth=without)
    frozen = _step(Adapted(models.sharing(base.model), []), base, autocast)[0]
    yield Caller(FROZEN, lambda: frozen, "floor", results=NOT_COMPARED)


def _callers(
    base: Subject, fishers: list[Tensor], adapted: Adapted, autocast: torch.dtype | None, place: HostPlace,
    without: Truth,
) -> list[Caller]:  # fmt: skip
    ewc = models.protected(adapted.model, fishers)
    mine = _ours(base, adapted, ewc, autocast, place, without)
    return [*mine, *_others(base, adapted, autocast, without)]


def build(model: Model, autocast: torch.dtype | None, place: HostPlace) -> HostCase:
    """One case: the model whose depth is taken, and the dtype of autocast. Weights are fp32."""
    computed = "float32" if autocast is None else str(autocast).removeprefix("torch.")
    shape: dict[str, int | str] = {"model": narrow(model).name, "blocks": model.depth, "width": WIDTH}
    shape |= {"tokens": TOKENS, "samples": SAMPLES, "adapters": len(LINEARS) * model.depth, "rank": RANK}
    shape |= {} if autocast is None else {"autocast": f"autocast {computed}"}
    case = functools.partial(HostCase, "training_step", shape, "float32")
    try:
        base = draw(model, place)
    except extras.Unavailable as missing:
        return case([_missing(OURS, "ours", missing), _missing(PEFT, "peer", missing)], list, 0.0)
    adapted = models.adapted(base)
    published = models.explicit(base, adapted)
    fishers = end_to_end.balanced_fishers(published, end_to_end.few(base))
    without = functools.partial(end_to_end.exact, published, base)
    targets = []
    if autocast is None and model is RELEASE.base:
        targets.append(Target(PEFT, LIMIT, f"step with EWC, at most {LIMIT} x PEFT's without"))
    return case(
        _callers(base, fishers, adapted, autocast, place, without),
        functools.partial(end_to_end.exact, published, base, fishers),
        end_to_end.TOLERANCES[computed],
        targets,
    )


def _missing(name: str, role: str, missing: extras.Unavailable) -> Caller:
    """A caller that says why there is none."""

    def make() -> Run:
        raise missing

    return Caller(name, make, role)


def cases(place: HostPlace) -> Iterator[Callable[[], HostCase]]:
    """All cases, not built yet."""
    for model in (RELEASE.base, RELEASE.large):
        for autocast in (None, torch.bfloat16):
            yield functools.partial(build, model, autocast, place)
