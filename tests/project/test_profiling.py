# SPDX-License-Identifier: Apache-2.0
"""Ranges around operations: named after op, shapes, backend and algorithm; nothing when they are off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from strategies import BACKENDS
from torch.profiler import ProfilerActivity, profile

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.fishers import FactoredFisher, KroneckerFisher
from fused_ewclora.ops import dispatch
from fused_ewclora.ops.schemas import SCHEMAS


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    yield
    fe.profiling.disable()


def names(run) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return [event.name for event in profiled.events() if event.name.startswith("fused_ewclora.")]


def every_op(backend: str) -> None:
    x, w = torch.randn(2, 3, 8), torch.randn(6, 8)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    FE.lora_linear(x, w, None, a, b, backend=backend).sum().backward()
    sums = FactoredFisher(torch.rand(6), torch.rand(8))
    for fisher in (torch.rand(6, 8), sums, KroneckerFisher(torch.eye(6), torch.eye(8))):
        FE.ewc_penalty([fisher], [a], [b], backend=backend)
    FE.l1_penalty([a], [b], backend=backend)
    for fisher in (torch.zeros(6, 8), sums):
        FE.fisher_accumulate_(fisher, x, torch.randn(2, 3, 6), backend=backend)
    FE.merge_([w], [a.detach()], [b.detach()], backend=backend)
    FE.soft_threshold_([torch.randn(4), torch.randn(5)], 0.1, backend=backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("cpu", "reference")])
def test_range_names(backend):
    """Ranges name the op, the shapes, the backend and the algorithm."""
    with fe.profiling.enable():
        ranges = names(lambda: every_op(backend))
    starts = [name.partition(")")[0] + ")" for name in ranges]
    assert starts == [
        "fused_ewclora.lora_linear(x [2, 3, 8], W [6, 8], rank 2, float32)",
        "fused_ewclora.lora_linear_backward(dy [2, 3, 6], W [6, 8], rank 2, float32)",
        "fused_ewclora.ewc_penalty(adapters 1, first [6, 8], float32, rank 2)",
        "fused_ewclora.factored_penalty(adapters 1, first [6, 8], float32, rank 2)",
        "fused_ewclora.kronecker_penalty(adapters 1, first [6, 8], float32, rank 2)",
        "fused_ewclora.l1_penalty(adapters 1, first [6, 8], float32, rank 2)",
        "fused_ewclora.fisher_accumulate_(x [2, 3, 8], dy [2, 3, 6], float32, sample)",
        "fused_ewclora.fisher_sums_(x [2, 3, 8], dy [2, 3, 6], float32, sample)",
        "fused_ewclora.merge_(weights 1, first [6, 8], float32, rank 2)",
        "fused_ewclora.soft_threshold_(vectors 2, first [4], float32)",
    ]
    assert {name.split(".")[1].split("(")[0] for name in ranges} == set(SCHEMAS)
    for name in ranges:
        op = name.split(".")[1].split("(")[0]
        chosen = dispatch.choose(op, backend, dispatch.Call("cpu", torch.float32))
        assert name.endswith(f" {backend}: {chosen.algorithm}")


def test_off_is_direct():
    """Without ranges the functions of the backends run themselves."""
    call = dispatch.Call("cpu", torch.float32)

    def is_plain() -> bool:
        return dispatch.choose("merge_", "reference", call) in dispatch.candidates("merge_")

    assert is_plain()
    fe.profiling.enable()
    assert not is_plain()
    fe.profiling.disable()
    assert is_plain()
    with fe.profiling.enable():
        assert not is_plain()
    assert is_plain()
    assert not names(lambda: every_op("reference"))


def test_blocks_nest():
    with fe.profiling.enable():
        with fe.profiling.enable():
            pass
        assert len(names(lambda: every_op("reference"))) == len(SCHEMAS)


def test_results_unchanged():
    """Results are the same, and errors pass through."""
    x, w, a, b = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    expected = FE.lora_linear(x, w, None, a, b)
    with fe.profiling.enable():
        assert torch.equal(FE.lora_linear(x, w, None, a, b), expected)
        with pytest.raises(fe.BackendError, match="cannot run"):
            FE.lora_linear(*(t.double() for t in (x, w)), None, a.double(), b.double(), backend=other())


def other() -> str:
    """A backend that does not serve fp64."""
    return next((b for b in BACKENDS if b != "reference"), None) or pytest.skip("the reference alone")


def test_compiled_models():
    """Compiled models have ranges too."""
    w, a, b = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    run = torch.compile(lambda x: FE.lora_linear(x, w, None, a, b) * 2, backend="aot_eager", fullgraph=True)
    run(torch.randn(3, 8))
    with fe.profiling.enable():
        ranges = names(lambda: run(torch.randn(3, 8)))
    assert len(ranges) == 1 and ranges[0].startswith("fused_ewclora.lora_linear(x [3, 8]")


def test_nvtx_missing(monkeypatch):
    """NVTX is refused where there is none."""

    def missing(_: str) -> None:
        raise RuntimeError("NVTX functions not installed")

    monkeypatch.setattr(torch.cuda.nvtx, "mark", missing)
    with pytest.raises(fe.BackendError, match=r"nvtx: .*NVTX functions not installed"):
        fe.profiling.enable(nvtx=True)
    assert not names(lambda: every_op("reference"))


def test_nvtx_order(monkeypatch):
    """NVTX ranges open and close in order."""
    pushed: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "mark", lambda name: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", pushed.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: pushed.append("end"))
    with fe.profiling.enable(nvtx=True):
        every_op("reference")
    assert pushed[1::2] == ["end"] * len(SCHEMAS) and all(
        name.startswith("fused_ewclora.") for name in pushed[::2]
    )
