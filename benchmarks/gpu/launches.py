# SPDX-License-Identifier: Apache-2.0
"""Which kernels the GPU check launches on an architecture: its small calls, its graphs, its suites, and the
candidates of its tuning."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora import use_backend
from fused_ewclora.backends.triton import launch, tables
from fused_ewclora.backends.triton.tools import aot, workloads
from fused_ewclora.layers.inject import adapters

from .. import algorithms, models
from ..harness import matmul_precision
from ..place import Place
from ..suites import SUITES
from . import graphs, small_calls
from .__main__ import NAMES, planned
from .noting import noting

META = "meta"
PLACE = Place(META, True)  # with the providers of a GPU
Notes = dict[str, aot.Specialisation]


class Noted:
    """Launches by what decides their machine code, of one architecture, and what could not be noted."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.launches: dict[str, launch.Launch] = {}
        self.specialisations: Notes = {}
        self.complaints: list[str] = []

    @contextlib.contextmanager
    def by(self, what: str, precision: str | None = None) -> Iterator[None]:
        """Notes the launches of calls inside; an error is a complaint."""
        with noting(self.arch) as launches, matmul_precision(precision):
            try:
                yield
            except Exception as failure:
                told = " ".join(f"{type(failure).__name__}: {failure}".split())
                self.complaints.append(f"{what}: {told[:200]}")
        for one in launches:
            found = aot.specialise(one, self.arch)
            self.specialisations.setdefault(found.key, found)
            self.launches.setdefault(found.key, one)


def of_calls(noted: Noted) -> None:
    """The small calls."""
    for call in small_calls.calls():
        with noted.by(call.name, call.precision):
            call.method(small_calls.Values(META, False), "triton")


def of_graphs(noted: Noted) -> None:
    """The captured operations, what evicts them, and whole steps."""
    for work in graphs.works(META):
        with noted.by(work.name, "highest"):
            work("triton")
    with noted.by("evictions", "highest"):
        graphs.evict("triton", META)
    with noted.by("compiled step", "highest"):
        module = graphs.Protected(META, "triton")
        x, dy = (torch.empty(37, width, device=META) for width in (64, 96))
        torch.autograd.grad(module(x, dy), list(module.parameters()))
    for dtype in (torch.float32, torch.bfloat16):
        with noted.by("graph of a step", "highest"), _controllers(), use_backend("triton"):
            graphs.Training(META, dtype)()


def _protected(model: torch.nn.Module, fishers: Sequence[Tensor]) -> types.SimpleNamespace:
    """In place of the controller, which takes no Fishers without values: the same penalty."""
    pairs = [(a, b) for layer in adapters(model).values() for _, a, b in layer.adapter_parameters()]

    def penalty() -> Tensor:
        lora_as, lora_bs = zip(*pairs, strict=True)
        return FE.ewc_penalty(list(fishers), list(lora_as), list(lora_bs), None, models.EWC_LAMBDA)

    return types.SimpleNamespace(penalty=penalty)


@contextlib.contextmanager
def _controllers() -> Iterator[None]:
    with mock.patch.object(models, "protected", _protected):
        yield


def of_suite(name: str) -> Callable[[Noted], None]:
    """Every provider of ours in every case of a suite."""

    def note(noted: Noted) -> None:
        for workload in planned(name):
            what = f"{name}, {workload.shape}"
            with noted.by(what, workload.precision), _controllers(), _undescribed():
                case = SUITES[name].build(workload, PLACE)
                for provider in case.providers:
                    if provider.role in ("ours", "variant", "floor") and provider.backend == "triton":
                        provider.run()
                        if provider.check is not None:
                            provider.check()

    return note


@contextlib.contextmanager
def _undescribed() -> Iterator[None]:
    """Descriptions ask what serves tensors of the device, which nothing does here."""
    with mock.patch.object(algorithms, "described", lambda *_: ""):
        yield


def of_tuning(noted: Noted) -> None:
    """Every configuration that the tuning tries."""
    from . import tune

    for key in tune.keys(noted.arch):
        for config in tune.candidates(key):
            entry = {"kernel": key.kernel, "config": config}
            with tables.override(entry):
                for workload, candidate in tune.asking(key):
                    with noted.by(f"{key.kernel} {config}", workload.precision):
                        candidate.run(*workload.make(workloads.Make(META)))


PARTS: dict[str, Callable[[Noted], None]] = {
    "calls": of_calls,
    "graphs": of_graphs,
    **{name: of_suite(name) for name in NAMES},
    "tune": of_tuning,
}


def noted(arch: str, parts: Sequence[str] = ()) -> Noted:
    """What the parts of the check launch on `arch`; () means all."""
    result = Noted(arch)
    for name in parts or PARTS:
        PARTS[name](result)
    return result
