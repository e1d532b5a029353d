# SPDX-License-Identifier: Apache-2.0
"""DDP and FSDP2 with gloo on the CPU: every check of distributed_checks.py, by two to four processes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import distributed_checks
import pytest
import torch
import torch.nn.functional as F
from budgets import LONG
from processes import Results, assert_agreed, launched
from tiny_models import adapted, data, randomise

import fused_ewclora as fe
from fused_ewclora.errors import FisherError
from fused_ewclora.ewc.controller import EWC

WORLDS = (2, 3, 4) if LONG else (2, 4)
CASES = [(world, name) for world in WORLDS for name in distributed_checks.names(world)]


@functools.cache
def folder_of(world: int) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"fused_ewclora-{world}-"))


@functools.cache
def results_of(world: int) -> Results:
    """What every process said about every check; those of four load what two have saved."""
    if world == 4:
        results_of(2)
    return launched(distributed_checks.__file__, world, folder_of(world), folder_of(2))


@pytest.mark.parametrize(("world", "name"), CASES, ids=[f"{world}-{name}" for world, name in CASES])
def test_processes_agree(world: int, name: str):
    assert_agreed(results_of(world), name)


def test_resume_one_process():
    """One process loads what several processes saved."""
    results_of(2)
    model = adapted()
    randomise(model)
    ewc = EWC(model, **distributed_checks.OPTIONS)
    fe.load_pretrained(folder_of(2) / "checkpoint", model, ewc)
    distributed_checks.compare(distributed_checks.values(model, ewc), folder_of(2))


def test_reduce_without_group():
    """Reducing without a Fisher or a process group raises an error that says so."""
    ewc = EWC(adapted())
    with pytest.raises(FisherError, match="estimate_fisher"):
        ewc.reduce_fisher_()
    ewc.estimate_fisher([data(4)], F.cross_entropy)
    before = {key: value.clone() for key, value in ewc.state_dict()["tensors"].items()}
    with pytest.raises(FisherError, match="init_process_group"):
        ewc.reduce_fisher_()
    assert all(torch.equal(value, before[key]) for key, value in ewc.state_dict()["tensors"].items())
