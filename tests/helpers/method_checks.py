# SPDX-License-Identifier: Apache-2.0
"""Methods over several processes, each with its share of the data; run by test_distributed_methods.py."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_checks
from tiny_models import adapted, batches, data, randomise
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import (
    IEL,
    ITA,
    CLLoRA,
    CoDyRA,
    EWCLoRA,
    FactorEWC,
    InfLoRA,
    KeepLoRA,
    LoRA,
    Method,
    NLoRA,
    OLoRA,
    PerturbAndMerge,
    SDLoRA,
)

SAMPLES, STEPS, TASKS = 12, 3, 3
DDP = nn.parallel.DistributedDataParallel
EWC: dict[str, Any] = {"ewc_lambda": 20.0, "fisher_dtype": torch.float64}
KEEP: dict[str, Any] = {"epsilon_w": 0.4, "epsilon_f": 0.6}
WIDE: dict[str, Any] = {"fisher_dtype": torch.float64}
GATES: dict[str, Any] = {"gate_init": "normal", "kappa_max": 0.4, "dense_fraction": 0.0}


def mine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return x[rank::world], y[rank::world]


@functools.cache
def alone() -> dist.ProcessGroup:
    """A group of this process only."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


def at_start() -> nn.Module:
    model = adapted()
    randomise(model, 0.0)
    return model


def trained(method: Method, model: nn.Module, share: Callable[..., Any], task: int, compact: bool) -> None:
    parameters = [p for p in method.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.5)
    for step in range(STEPS):
        x, y = share(*data(SAMPLES, seed=10 * task + step))
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + method.penalty()).backward()
        optimizer.step()
        method.after_step(step, STEPS)
    if compact:
        method.compact_(optimizer)


def parameters(method: Method) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in method.model.named_parameters()}


def state(method: Method) -> dict[str, Tensor]:
    """All tensors that the next task depends on."""
    held = parameters(method)
    ewc = getattr(method, "ewc", None)
    fishers = getattr(method, "fishers", {}) if ewc is None else ewc.fishers
    held |= {f"fisher of {key}": f.clone() for key, f in fishers.items()}
    if isinstance(method, PerturbAndMerge):
        held |= {f"gradient of {key}": g.clone() for key, g in method._curvature.gradients.items()}
    for name, used in getattr(method, "subspaces", {}).items():
        held[f"projector of {name}"] = used.free() @ used.free().T
    return held


def identical(method: Method) -> None:
    """Every process has the same parameters, Fishers and subspaces, bit for bit."""
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, state(method))
    for other in held:
        assert other.keys() == held[0].keys()
        for name, tensor in other.items():
            assert torch.equal(tensor, held[0][name]), name


def close(method: Method, whole: Method, except_drawn: bool) -> None:
    """Equal to 1e-10; after a task new A and gates are drawn by each run for itself."""
    found, expected = state(method), state(whole)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        leaf = name.rpartition(".")[2]
        if except_drawn and leaf.startswith(("lora_A", "lora_scale")):
            assert tensor.shape == expected[name].shape and tensor.any(), name
            continue
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def take_drawn(whole: Method, method: Method) -> None:
    """What was drawn anew, from the run of several processes."""
    source = parameters(method)
    with torch.no_grad():
        for name, parameter in whole.model.named_parameters():
            if name.rpartition(".")[2].startswith(("lora_A", "lora_scale")):
                parameter.copy_(source[name])
    if isinstance(method, PerturbAndMerge) and isinstance(whole, PerturbAndMerge):
        whole._steps.set_state(method._steps.get_state())
        whole._scaled.perturbation = method._scaled.perturbation


def equals_one_process(
    kind: type[Method],
    options: dict[str, Any],
    compact: bool = False,
    keep_wrapper: bool = False,
    prior: bool = False,
) -> None:
    """keep_wrapper: DDP is made once, and so does not make parameters equal at the start of each task."""
    whole = kind(at_start(), group=alone(), **options)
    method = kind(at_start(), **options)
    if prior:
        x, y = data(SAMPLES, seed=90)
        method.estimate_prior(batches(*mine(x, y), 2), F.cross_entropy)
        whole.estimate_prior(batches(x, y, 5), F.cross_entropy)
    torch.manual_seed(dist.get_rank())  # what each process draws for itself differs
    chosen = kind in (InfLoRA, KeepLoRA, FactorEWC)  # A follows from the data, or stays
    wrapped = None
    for task in range(TASKS):
        for one in (method, whole):
            one.begin_task(task)
        if wrapped is None or not keep_wrapper:
            wrapped = DDP(method.model)
        identical(method)
        take_drawn(whole, method)
        x, y = data(SAMPLES, seed=50 + task)
        own = batches(*mine(x, y), 1 + dist.get_rank())  # processes may have different numbers of batches
        method.prepare(own)
        whole.prepare(batches(x, y, 5))
        identical(method)
        close(method, whole, False)
        trained(method, wrapped, mine, task, compact)
        trained(whole, whole.model, lambda *both: both, task, compact)
        identical(method)
        close(method, whole, False)
        if task == TASKS - 1:
            without = isinstance(method, PerturbAndMerge) or getattr(method, "ewc", None) is None
            assert float(method.penalty().detach()) > 0.0 or without
            break
        method.end_task(own, F.cross_entropy)
        whole.end_task(batches(x, y, 5), F.cross_entropy)
        identical(method)
        close(method, whole, not chosen)
        for found, expected in zip(history(method), history(whole), strict=True):
            fixed = options.get("update") == "fixed" and not found.prior
            assert found.samples == expected.samples == (0 if fixed else SAMPLES)
    if isinstance(method, CoDyRA):
        assert method._survivors == whole._survivors
        assert 0 < sum(method._survivors[-1].values()) < 6, "gates have died, not all of them"
    if isinstance(method, SDLoRA):
        assert method.report().summary == whole.report().summary
    if isinstance(method, PerturbAndMerge) and isinstance(whole, PerturbAndMerge):
        for mine_, whole_ in zip(method.coefficients, whole.coefficients, strict=True):
            torch.testing.assert_close(mine_, whole_, rtol=1e-10, atol=1e-12)
        assert 0.0 < method.coefficients[-1]["fc"] < 1.0
    if isinstance(method, (InfLoRA, KeepLoRA)):
        used = [subspace.rank for subspace in method.subspaces.values()]
        assert used == [subspace.rank for subspace in whole.subspaces.values()] and min(used) > 0


def history(method: Method) -> tuple[Any, ...]:
    ewc = getattr(method, "ewc", None)
    return getattr(method, "history", ()) if ewc is None else ewc.history


def errors_in_all(method: Method, call: Callable[[], None], expected: type[Exception], words: str) -> None:
    """`call` raises in every process and changes nothing."""
    before, tasks = state(method), method.tasks
    try:
        call()
    except expected as error:
        assert words in str(error), error
    else:
        raise AssertionError("no error")
    after = state(method)
    assert after.keys() == before.keys() and method.tasks == tasks
    assert all(
        torch.allclose(tensor, after[name], rtol=0.0, atol=0.0, equal_nan=True)
        for name, tensor in before.items()
    )


def adapters_of_one_process_that_are_not_finite_are_an_error_in_all() -> None:
    """Parameters that no DDP kept equal."""
    for kind in (LoRA, CoDyRA, OLoRA):
        method = kind(adapted())
        method.begin_task(0)
        if dist.get_rank() == 1:
            with torch.no_grad():
                method.model.fc.lora_B[0, 0] = torch.nan
        errors_in_all(
            method, functools.partial(method.end_task, []), fe.ArgumentError, "of fc: expected finite"
        )


def bad_data_of_one_process_is_an_error_in_all() -> None:
    x, y = mine(*data(SAMPLES))
    bad = [(x * float("nan"), y)] if dist.get_rank() == 1 else [(x, y)]
    none = [] if dist.get_rank() == 1 else [(x, y)]
    cases: list[tuple[type[Method], dict[str, Any]]] = [(EWCLoRA, EWC), (SDLoRA, EWC), (CoDyRA, EWC)]
    cases.append((PerturbAndMerge, WIDE))
    for kind, options in cases:
        method = kind(adapted(), **options)
        method.begin_task(0)
        errors_in_all(method, functools.partial(method.end_task, bad, F.cross_entropy), fe.FisherError, "NaN")
        method.end_task(none, F.cross_entropy)  # a share without samples adds nothing
        others = SAMPLES - len(range(1, SAMPLES, dist.get_world_size()))
        assert method.tasks == 1 and method.ewc.history[0].samples == others
        identical(method)
    method = FactorEWC(at_start(), ewc_lambda=1.0)
    method.begin_task(0)
    errors_in_all(method, functools.partial(method.end_task, bad, F.cross_entropy), fe.FisherError, "NaN")
    errors_in_all(
        method, functools.partial(method.end_task, [], F.cross_entropy), fe.FisherError, "no process"
    )
    method.end_task(none, F.cross_entropy)
    assert method.history[0].samples == others
    identical(method)
    method = KeepLoRA(at_start(), **KEEP)
    method.begin_task(0)
    errors_in_all(method, functools.partial(method.prepare, bad), fe.FisherError, "NaN")
    method.prepare(none)
    errors_in_all(method, functools.partial(method.end_task, bad), fe.ArgumentError, "NaN")
    method.end_task([(x, y)])
    identical(method)
    iel = IEL(at_start(), beta=1.0)
    iel.begin_task(0)
    errors_in_all(iel, functools.partial(iel.prepare, bad), fe.FisherError, "NaN")
    iel.prepare(none)
    identical(iel)
    method = InfLoRA(at_start())
    method.begin_task(0)
    for loader, words in ((bad, "NaN"), (none, "expected at least one batch")):
        errors_in_all(method, functools.partial(method.prepare, loader), fe.ArgumentError, words)
    method.prepare([(x, y)])
    errors_in_all(method, functools.partial(method.end_task, bad), fe.ArgumentError, "NaN")
    method.end_task([(x, y)])
    identical(method)


def official_keep_lora_adds_the_batches_of_all() -> None:
    """As one process that has the batches of all; batches of another size are an error in all."""
    options = {**KEEP, "variant": "official"}
    method, whole = KeepLoRA(at_start(), **options), KeepLoRA(at_start(), group=alone(), **options)
    x, y = data(SAMPLES)
    world = dist.get_world_size()
    shares = [batches(x[rank::world], y[rank::world], 3) for rank in range(world)]
    loaders = shares[dist.get_rank()], [batch for share in shares for batch in share]
    for one, loader in zip((method, whole), loaders, strict=True):
        one.begin_task(0)
        one.prepare(loader)
    identical(method)
    close(method, whole, False)
    assert all(b.any() for layer in method.layers.values() for _, _, b in layer.adapter_parameters())
    other = batches(*mine(x, y), 3 if dist.get_rank() else 2)
    errors_in_all(method, functools.partial(method.end_task, other), fe.TargetError, "rows of a batch of qkv")
    for one, loader in zip((method, whole), loaders, strict=True):
        one.end_task(loader)
    identical(method)
    close(method, whole, False)


def cl_lora_distils_the_data_of_all() -> None:
    """Two tasks with distillation are those of one process with all the data."""
    options = {"shared": ["qkv"], "orthogonality": 0.3}
    method, whole = CLLoRA(at_start(), **options), CLLoRA(at_start(), group=alone(), **options)
    torch.manual_seed(dist.get_rank())
    for task in range(2):
        for one in (method, whole):
            one.begin_task(task)
        take_drawn(whole, method)
        wrapped = DDP(method.model)
        for one, model, share in ((method, wrapped, mine), (whole, whole.model, lambda *both: both)):
            optimizer = torch.optim.SGD([p for p in one.model.parameters() if p.requires_grad], lr=0.1)
            for step in range(STEPS):
                x, y = share(*data(SAMPLES, seed=10 * task + step))
                optimizer.zero_grad()
                if task:
                    inner = one.model
                    one.distillation(
                        x, lambda x, inner=inner: inner.head(inner.qkv(x)[..., 6:12].mean(1))
                    ).backward()
                    one.reassign_()
                (F.cross_entropy(model(x), y) + one.penalty()).backward()
                optimizer.step()
                one.after_step(step, STEPS)
        for one in (method, whole):
            one.end_task([])
        identical(method)
        close(method, whole, False)


def decisions_that_differ_are_an_error_in_all() -> None:
    """Parameters that no DDP kept equal."""
    gated = CoDyRA(adapted())
    gated.begin_task(0)
    with torch.no_grad():
        gated.model.fc.lora_scale[dist.get_rank()] = 0.0
    message = "surviving ranks of fc: process 0 has [1], process 1 has [0]"
    errors_in_all(gated, gated.compact_, fe.TargetError, message)
    errors_in_all(gated, functools.partial(gated.end_task, []), fe.TargetError, message)
    directions = SDLoRA(adapted())
    directions.begin_task(0)
    if dist.get_rank() == 1:
        randomise(directions.model, 0.0)
    call = functools.partial(directions.end_task, [])
    errors_in_all(directions, call, fe.TargetError, "qkv.k: process 0 has a direction, process 1 has none")


def a_wrapper_of_former_parameters_is_an_error_in_all() -> None:
    """Parameters that were replaced after DDP was made are trained by every process for itself."""
    for kind, options in (
        (OLoRA, {}), (IEL, {"beta": 1.0}), (SDLoRA, {}),
        (CLLoRA, {"shared": ["qkv"], "orthogonality": 0.0}),
    ):  # fmt: skip
        method = kind(at_start(), **options)
        wrapped = DDP(method.model, find_unused_parameters=True)
        for task in range(2):
            method.begin_task(task)
            method.prepare([mine(*data(SAMPLES))])
            # The shared adapters of CL-LoRA are not replaced: there nothing is wrapped in the second task.
            model = method.model if task and kind is CLLoRA else wrapped
            optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.1)
            F.cross_entropy(model(mine(*data(SAMPLES))[0]), mine(*data(SAMPLES))[1]).backward()
            optimizer.step()
            if task == 0:
                method.end_task([])
        errors_in_all(method, functools.partial(method.end_task, []), fe.TargetError, "not trained together")


def groups_are_apart() -> None:
    """Processes that train models of their own, each in a group of one."""
    torch.manual_seed(0)
    x, y = data(SAMPLES, seed=dist.get_rank())
    method = EWCLoRA(adapted(seed=dist.get_rank()), group=alone(), **EWC)
    by_hand = fe.EWC(adapted(seed=dist.get_rank()), **EWC)
    method.begin_task(0)
    torch.manual_seed(3)
    if dist.get_rank() == 1:  # the other one is not waited for
        method.end_task([(x, y)], F.cross_entropy)
        torch.manual_seed(3)
        by_hand.end_task([(x, y)], F.cross_entropy)
        for (name, found), expected in zip(
            method.model.named_parameters(), by_hand.model.parameters(), strict=True
        ):
            assert torch.equal(found, expected), name


def case(kind: type[Method], *arguments: Any, **more: Any) -> Callable[[], None]:
    return functools.partial(equals_one_process, kind, *arguments, **more)


CHECKS: dict[str, Callable[[], None]] = {
    "lora": case(LoRA, {}, keep_wrapper=True),
    "ewc_lora": case(EWCLoRA, EWC, keep_wrapper=True),
    "ewc_lora_decaying": case(EWCLoRA, {**EWC, "gamma": 0.7}),
    "ewc_lora_prior": case(EWCLoRA, {**EWC, "gamma": 0.7}, prior=True),
    "ewc_lora_fixed": case(EWCLoRA, {**EWC, "update": "fixed"}, keep_wrapper=True, prior=True),
    "factor_ewc": case(FactorEWC, {"ewc_lambda": 20.0, "gamma": 0.7}, keep_wrapper=True),
    "inflora": case(InfLoRA, {"epsilon": 0.6}, keep_wrapper=True),
    "inflora_official": case(InfLoRA, {"epsilon": 0.6, "variant": "official"}),
    "keep_lora_official": official_keep_lora_adds_the_batches_of_all,
    "keep_lora": case(KeepLoRA, KEEP, keep_wrapper=True),
    "cl_lora": case(CLLoRA, {"shared": ["qkv"], "orthogonality": 0.3}),
    "cl_lora_distillation": cl_lora_distils_the_data_of_all,
    "sd_lora": case(SDLoRA, {"ranks": (2, 3)}),
    "sd_lora_kd": case(SDLoRA, {"kd_threshold": 0.9, "normalization": "factors"}),
    "sd_lora_ewc": case(SDLoRA, EWC),
    "sd_lora_shared": case(SDLoRA, {"magnitudes": "shared", "kd_threshold": 0.999, **EWC}),
    "o_lora": case(OLoRA, {"lambda_2": 0.1}),
    "o_lora_official": case(OLoRA, {"variant": "official"}),
    "n_lora": case(NLoRA, {"lambda_1": 0.01}),
    "codyra": case(CoDyRA, GATES, keep_wrapper=True),
    "codyra_compact": case(CoDyRA, GATES, True),
    "codyra_ewc": case(CoDyRA, {**GATES, **EWC}),
    "iel": case(IEL, {"beta": 50.0, **WIDE}),
    "ita_official": case(ITA, {"alpha": 50.0, "variant": "official", **WIDE}),
    "perturb_and_merge": case(PerturbAndMerge, WIDE, keep_wrapper=True),
    "bad_data_of_one_process_is_an_error_in_all": bad_data_of_one_process_is_an_error_in_all,
    "adapters_of_one_process_that_are_not_finite_are_an_error_in_all": (
        adapters_of_one_process_that_are_not_finite_are_an_error_in_all
    ),
    "a_wrapper_of_former_parameters_is_an_error_in_all": a_wrapper_of_former_parameters_is_an_error_in_all,
    "decisions_that_differ_are_an_error_in_all": decisions_that_differ_are_an_error_in_all,
    "groups_are_apart": groups_are_apart,
}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_checks(CHECKS, Path(sys.argv[1]))
