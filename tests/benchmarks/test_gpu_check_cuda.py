# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend in the suites of the GPU benchmarks: on a GPU where it is built, in the emulator here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

import fused_ewclora as fe
from benchmarks import gpu_preset, shapes
from benchmarks.case import OURS, Case
from benchmarks.clock import WallClock
from benchmarks.gpu.__main__ import NAMES, planned
from benchmarks.harness import measure
from benchmarks.place import AGAIN, CUDA, Place
from benchmarks.suites import SUITES
from benchmarks.workload import SMALL, Workload

PLACE = Place("cpu", True)
WHY = fe.available_backends()["cuda"]
needs_cuda = pytest.mark.skipif(WHY is not None, reason=f"cuda: {WHY}")
MOST_ROWS = 16  # of a rehearsed linear: the emulator is slow
KINDS = ("pass", "mode", "precision", "optimizer", "adapters", "vectors")


def parts(suite: str) -> Iterator[Workload]:
    """Every different part of a suite in tiny shapes, those for small launches too."""
    found = {}
    for one in gpu_preset.gpu(shapes.REHEARSAL):
        if one.op in SUITES[suite].ops and int(one.shape.get("rows", 0)) <= MOST_ROWS:
            told = [one.shape.get(name) for name in KINDS]
            found.setdefault((one.op, one.dtype, one.part, *told), one)
    yield from found.values()


def case_of(suite: str, one: Workload) -> Case:
    return SUITES[suite].build(one, PLACE)


@needs_cuda
@pytest.mark.parametrize("suite", NAMES)
def test_provider_correct(suite: str):
    """The provider is right in every part of a suite."""
    for one in parts(suite):
        case = case_of(suite, one)
        found = [p for p in case.providers if p.name == CUDA]
        if any(p.name == AGAIN for p in case.providers):
            assert not found  # beside peers that take long to get ready
            continue
        (provider,) = found
        assert (provider.role, provider.backend) == ("variant", "cuda")
        (record,) = measure(
            dataclasses.replace(case, providers=found, floor_bytes=None), 0.0, {}, WallClock(2, False)
        )
        assert "failed" not in record, (one.shape, record)


@needs_cuda
def test_idle_provider_noticed():
    """Every suite compares with fp64, so that a kernel that was never launched does not look fast."""
    for suite in NAMES:
        case = case_of(suite, next(parts(suite)))
        provider = next(p for p in case.providers if p.name == CUDA)
        idle = [t.detach() * 0 for t in (provider.check or provider.run)()]
        lazy = dataclasses.replace(provider, run=lambda r=idle: r, check=None, rotation=())
        case = dataclasses.replace(case, providers=[lazy], floor_bytes=None)
        (record,) = measure(case, 0.0, {}, WallClock(2, False))
        assert "wrong" in record["failed"]


@pytest.mark.parametrize("suite", NAMES)
def test_without_extension(suite: str, monkeypatch: pytest.MonkeyPatch):
    """Without the extension, the suites have no such provider."""
    found = {**fe.available_backends(), "cuda": "it was not built"}
    monkeypatch.setattr(fe, "available_backends", lambda: found)
    names = [p.name for p in case_of(suite, planned(suite, True)[0]).providers]
    assert OURS in names and CUDA not in names


def test_small_cases_placement():
    """Every suite has small cases, which are few and never come first."""
    for suite in ("lora_linear", "ewc_penalty", "fisher_accumulate"):
        places = [i for i, one in enumerate(planned(suite)) if one.part == SMALL]
        assert places and places[0] > 0, suite
        assert len(places) <= 20


@needs_cuda
def test_op_without_autograd():
    """The op alone is a single call without autograd."""
    one = next(one for one in parts("ewc_penalty") if one.shape["model"] == gpu_preset.OP_LAYER)
    case = case_of("ewc_penalty", one)
    loss, grads = next(p for p in case.providers if p.name == CUDA).run()
    assert loss.grad_fn is None and grads.dim() == 1
    assert grads.numel() == 2 * int(one.shape["adapters"]) * gpu_preset.OP_WIDTH * int(one.shape["rank"])
