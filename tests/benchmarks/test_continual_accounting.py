# SPDX-License-Identifier: Apache-2.0
"""What methods keep is counted: by formulas, and against a walk over everything that a method refers to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import WIDTH, adapted, batches, data
from torch import Tensor, nn

from benchmarks.continual.accounting import adapter_parameters, state_bytes, trained_parameters
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
)  # fmt: skip

RANK = 4
ADAPTERS = 3  # k and v of qkv, fc: all of them WIDTH x WIDTH
FACTORS = ADAPTERS * 2 * RANK * WIDTH
FISHERS = ADAPTERS * WIDTH * WIDTH
DOUBLE = 8  # bytes; the tiny model is in fp64
KINDS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "LoRA": (LoRA, {}),
    "EWC-LoRA": (EWCLoRA, {"ewc_lambda": 1.0}),
    "EWC-LoRA, factors": (EWCLoRA, {"ewc_lambda": 1.0, "merge_mode": "factors"}),
    "SD-LoRA": (SDLoRA, {}),
    "SD-LoRA-RR": (SDLoRA, {"ranks": (4, 3, 2)}),
    "SD-LoRA, shared": (SDLoRA, {"magnitudes": "shared"}),
    "SD-LoRA and EWC": (SDLoRA, {"ewc_lambda": 1.0}),
    "CoDyRA": (CoDyRA, {}),
    "CoDyRA and EWC": (CoDyRA, {"ewc_lambda": 1.0}),
    "InfLoRA": (InfLoRA, {"epsilon": 0.5}),
    "KeepLoRA": (KeepLoRA, {"epsilon_w": 0.5, "epsilon_f": 0.5}),
    "O-LoRA": (OLoRA, {}),
    "N-LoRA": (NLoRA, {"lambda_1": 1e-4}),
    "IEL": (IEL, {"beta": 1.0}),
    "ITA": (ITA, {"alpha": 1.0}),
    "P&M": (PerturbAndMerge, {}),
    "CL-LoRA": (CLLoRA, {"shared": ["fc"]}),
    "Factor-EWC": (FactorEWC, {"ewc_lambda": 1.0}),
}


def started(name: str, tasks: int) -> Method:
    """A method that has ended some tasks, with one step each, and begun the next one."""
    kind, options = KINDS[name]
    torch.manual_seed(0)
    model = adapted(r=RANK)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.zero_()  # InfLoRA starts from 0
    method = kind(model, **options)
    for task in range(tasks + 1):
        method.begin_task(task)
        loader = batches(*data(8, seed=task), 4)
        method.prepare(loader)
        if task < tasks:
            optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.05)
            (F.cross_entropy(method.model(loader[0][0]), loader[0][1]) + method.penalty()).backward()
            optimizer.step()
            method.after_step(0, 1)
            method.end_task(loader, F.cross_entropy)
    return method


def reachable(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors behind attributes, containers and the objects of this library; modules are not entered."""
    if id(value) in seen or isinstance(value, (nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from reachable(entry, seen)
    elif isinstance(value, (list, tuple, set)):
        for entry in value:
            yield from reachable(entry, seen)
    elif type(value).__module__.startswith("fused_ewclora"):
        yield from reachable(vars(value), seen)


def walked_bytes(method: Method) -> int:
    """Independent of what `state_bytes` knows about methods."""
    named = dict(method.model.named_parameters())
    adapters = [p for name, p in named.items() if ".lora_" in name]
    plain = {id(p) for name, p in named.items() if ".lora_" not in name}
    found = [*adapters, *(t for t in reachable(vars(method), set()) if id(t) not in plain)]
    storages = {(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in found}
    return sum(storages.values())


@pytest.mark.parametrize("name", KINDS)
def test_all_state_counted(name: str) -> None:
    """Everything that a method keeps is counted."""
    for tasks in (0, 2):
        method = started(name, tasks)
        assert state_bytes(method) == walked_bytes(method)
    assert state_bytes(method) >= FACTORS * DOUBLE


@pytest.mark.parametrize(
    "name, first, third",
    [
        ("LoRA", FACTORS, FACTORS),
        ("EWC-LoRA", FACTORS, FACTORS),
        ("EWC-LoRA, factors", FACTORS, FACTORS),
        ("SD-LoRA", FACTORS + ADAPTERS, 3 * FACTORS + 3 * ADAPTERS),
        ("SD-LoRA, shared", FACTORS + 1, 3 * FACTORS + 3),
        ("SD-LoRA-RR", FACTORS + ADAPTERS, (4 + 3 + 2) * FACTORS // RANK + 3 * ADAPTERS),
        ("CoDyRA", FACTORS + RANK * ADAPTERS, FACTORS + RANK * ADAPTERS),
        ("InfLoRA", FACTORS, FACTORS),
    ],
)
def test_adapter_formulas(name: str, first: int, third: int) -> None:
    """Adapters hold as many numbers as their formulas say."""
    assert adapter_parameters(started(name, 0)) == first
    assert adapter_parameters(started(name, 2)) == third


@pytest.mark.parametrize(
    "name, trained",
    [
        ("LoRA", FACTORS),
        ("SD-LoRA, shared", FACTORS + 3),
        ("SD-LoRA", FACTORS + 3 * ADAPTERS),  # all magnitudes, no frozen direction
        ("CoDyRA", FACTORS + RANK * ADAPTERS),
        ("InfLoRA", FACTORS // 2),  # A is frozen
    ],
)
def test_trained_parameters(name: str, trained: int) -> None:
    """The trained numbers are those with gradients."""
    method = started(name, 2)
    head = sum(p.numel() for p in method.model.head.parameters())
    assert trained_parameters(method) == trained
    assert trained + head == sum(p.numel() for p in method.model.parameters() if p.requires_grad)


def test_state_bytes() -> None:
    """The bytes of adapters, Fishers and subspaces are counted."""
    factors, fishers = FACTORS * DOUBLE, FISHERS * 4  # Fishers are in fp32
    assert state_bytes(started("LoRA", 2)) == factors
    assert state_bytes(started("EWC-LoRA", 0)) == factors
    assert state_bytes(started("EWC-LoRA", 2)) == factors + fishers
    with_ewc, without = started("SD-LoRA and EWC", 2), started("SD-LoRA", 2)
    assert state_bytes(with_ewc) - state_bytes(without) == fishers
    inflora = started("InfLoRA", 2)
    columns = sum(used.basis.shape[1] for used in inflora.subspaces.values())
    assert columns > 0
    assert state_bytes(inflora) == factors + columns * WIDTH * DOUBLE


def test_shared_storage_once() -> None:
    """A storage counts once and as a whole."""
    method = started("LoRA", 0)
    before = state_bytes(method)
    layer = method.model.fc
    layer.lora_A = nn.Parameter(layer.lora_B.detach()[:, :RANK].T)  # another view of the same numbers
    assert state_bytes(method) == before - RANK * WIDTH * DOUBLE
    layer.lora_A = nn.Parameter(torch.zeros(2 * RANK, WIDTH, dtype=torch.float64)[:RANK])
    assert state_bytes(method) == before + RANK * WIDTH * DOUBLE
