# SPDX-License-Identifier: Apache-2.0
"""When Triton serves a call, when it does not, and what it says then."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

import oracles
import pytest
import torch
from interpreters import in_subprocess
from strategies import LINEAR_BACKENDS, Values, call_for, device_of, refusal, refused_linear
from tolerance import assert_within, sum_bound

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError, BackendError
from fused_ewclora.ops import dispatch
from fused_ewclora.ops.dispatch import Call

INSTALLED = importlib.util.find_spec("triton") is not None
AVAILABLE = fe.available_backends()["triton"] is None
needs_triton = pytest.mark.skipif(not AVAILABLE, reason=f"Triton: {fe.available_backends()['triton']}")
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
PENALTY = "FE.ewc_penalty([torch.ones(7, 5)], [torch.ones(2, 5)], [torch.ones(7, 2)], backend={!r})"


@pytest.fixture
def backend():
    """The module, which tests look into."""
    return importlib.import_module("fused_ewclora.backends.triton")


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
def test_no_gpu_no_interpreter():
    """Without a GPU and without its interpreter, Triton says so."""
    code = (
        "import torch, fused_ewclora as fe\n"
        "from fused_ewclora import functional as FE\n"
        "print(fe.available_backends()['triton'])\n"
        f"print(float({PENALTY.format('auto')}))\n"
        f"{PENALTY.format('triton')}"
    )
    done = in_subprocess(code, **NO_GPU)
    assert done.stdout.splitlines()[0].startswith("no GPU (TRITON_INTERPRET=1 ")
    assert done.stdout.splitlines()[1] == "70.0"
    assert "BackendError: backend: backend 'triton' is not available: no GPU" in done.stderr


def test_missing_triton():
    """Without Triton everything else works."""
    code = (
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name.startswith('triton') else find(name, *rest)\n"
        "import sys, torch, fused_ewclora as fe\n"
        "from fused_ewclora import functional as FE\n"
        "print(fe.available_backends()['triton'])\n"
        f"print(float({PENALTY.format('auto')}), 'triton' in sys.modules)"
    )
    done = in_subprocess(code, TRITON_INTERPRET="1", **NO_GPU)
    assert done.stdout.splitlines() == ["Triton is not installed (pip install triton)", "70.0 False"]


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
def test_old_version_named(backend, monkeypatch):
    """A version that is too old is named."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1+git1")
    assert backend.unavailable.__wrapped__() == "Triton 3.5.1+git1 is installed, 3.6 or newer is needed"


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("triton", "numpy", "fits"),
    [("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True), ("3.6.0", "2.4.0", False)],
)
def test_numpy_breaks_interpreter(backend, monkeypatch, triton, numpy, fits):
    """An interpreter that a newer NumPy breaks is not offered as a backend."""
    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton, "numpy": numpy}.get)
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    expected = f"the interpreter of Triton {triton} needs NumPy 2.3 or older, {numpy} is installed"
    assert backend.unavailable.__wrapped__() == (None if fits else expected)


@needs_triton
def test_broken_install_reason(backend, monkeypatch):
    """An install that fails to import is a reason not to use Triton, not an error."""

    def broken(name):
        raise OSError("libtriton.so: no such file")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert "failed to import: libtriton.so: no such file" in backend.unavailable.__wrapped__()


@needs_triton
@pytest.mark.parametrize("arch", ["sm_70", "sm_75", "sm_80", "sm_120", "gfx942"])
def test_old_arch_refused(backend, monkeypatch, arch):
    """GPUs without the matrix units are refused."""
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    reason = backend._cannot(Call("cuda", torch.float32, arch))
    old = {"sm_70": "7.0", "sm_75": "7.5"}.get(arch)
    assert reason == (None if old is None else f"compute capability {old}, 8.0 or newer is needed")


@needs_triton
def test_fp64_reference():
    """Asked for by name, Triton refuses fp64; otherwise the reference serves it."""
    fisher, a, b = (
        torch.ones(*s, dtype=torch.float64, device=device_of("triton")) for s in ((7, 5), (2, 5), (7, 2))
    )
    with pytest.raises(BackendError, match=r"'triton' cannot .*float64 runs on the reference"):
        FE.ewc_penalty([fisher], [a], [b], backend="triton")
    assert FE.ewc_penalty([fisher], [a], [b], backend="auto").item() == 70.0


@needs_triton
@pytest.mark.skipif(device_of("triton") == "cpu", reason="the interpreter serves the CPU")
def test_cpu_tensors_refused():
    """Tensors on the CPU are refused where there is a GPU."""
    with pytest.raises(BackendError, match=r"'triton' cannot run merge_ on cpu .*tensors are on cpu"):
        FE.merge_(torch.zeros(7, 5), torch.ones(2, 5), torch.ones(7, 2), backend="triton")


@needs_triton
@pytest.mark.skipif(device_of("triton") == "cuda", reason="beside a GPU Triton comes first")
@pytest.mark.parametrize("op", ["lora_linear", "ewc_penalty", "l1_penalty", "fisher_accumulate_", "merge_"])
def test_auto_skips_interpreter(op):
    """The choice `auto` never takes the interpreter."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert dispatch.choose(op, "auto", Call("cpu", dtype)).backend != "triton"


@needs_triton
def test_penalty_rank_fallback():
    """Ranks for which the penalty and the l1 norm have no kernel go to another backend."""
    values = Values(0, "triton")
    fisher, a, b = values.fisher(9, 7), values.normal(129, 7), values.normal(9, 129)
    exact, _ = oracles.ewc_penalty([fisher], [a], [b], [1.0], 2.0)
    wide, _ = oracles.ewc_penalty([fisher], [a.abs()], [b.abs()], [1.0], 2.0)
    value = FE.ewc_penalty([fisher], [a], [b], None, 2.0, backend="auto")
    assert_within(value, exact, sum_bound(wide, 2 * 129 + 7, torch.float32), "penalty")
    rows = dispatch.explain("ewc_penalty", call_for("triton", torch.float32, rank=129), "auto")
    assert "rank 129 > 128" in [reason for name, _, reason in rows if name == "triton"]
    with pytest.raises(BackendError, match="rank 129 > 128"):
        FE.ewc_penalty([fisher], [a], [b], None, 2.0, backend="triton")
    truth, _ = oracles.l1_penalty([a], [b], [1.0], 2.0)
    most, _ = oracles.l1_penalty([a.abs()], [b.abs()], [1.0], 2.0)
    value = FE.l1_penalty([a], [b], None, 2.0, backend="auto")
    assert_within(value, truth, sum_bound(most, 2 * 129 + 7, torch.float32), "l1 norm")
    with pytest.raises(BackendError, match="rank 129 > 128"):
        FE.l1_penalty([a], [b], None, 2.0, backend="triton")
    for op in ("ewc_penalty", "l1_penalty"):
        assert refusal("triton", op, torch.float32, rank=128) is None


@needs_triton
def test_algorithm_names():
    """Algorithms are asked for by name."""
    before = dispatch.current_backend()
    assert set(dispatch.algorithms("triton")) == {"full", "prologue", "addmm", "concat"}
    assert [name for name in LINEAR_BACKENDS if name.startswith("triton")] == [
        f"triton:{key}" for key in dispatch.algorithms("triton")
    ]
    with fe.use_backend("triton:concat"):
        assert dispatch.current_backend() == "triton:concat"
    assert dispatch.current_backend() == before
    with pytest.raises(ArgumentError, match=r"use_backend: .*\(full, prologue, addmm, concat\), got 'magic'"):
        fe.use_backend("triton:magic")
    with pytest.raises(ArgumentError, match="none can be named"):
        fe.use_backend("reference:full")


@needs_triton
@pytest.mark.parametrize("algorithm", ["full", "prologue", "addmm", "concat"])
def test_named_algorithm_runs(algorithm):
    """The named algorithm is the one that runs."""
    shape = dispatch.LinearShape(64, 64, 64, 16)
    call = call_for("triton", torch.float32, shape=shape)
    assert algorithm in dispatch.choose("lora_linear", f"triton:{algorithm}", call).keys
    assert algorithm in dispatch.choose("lora_linear_backward", f"triton:{algorithm}", call).keys
    assert dispatch.choose("merge_", f"triton:{algorithm}", call).backend == "triton"


def linear(backend: str, rank: int = 4, dropout_p: float = 0.0) -> list[torch.Tensor]:
    """y and its gradients."""
    values = Values(0, backend)
    tensors = [
        values.normal(*shape).requires_grad_() for shape in ((9, 33), (29, 33), (rank, 33), (29, rank))
    ]
    x, w, a, b = tensors
    options = {"dropout_p": dropout_p, "training": True, "seed": 3, "backend": backend}
    y = FE.lora_linear(x, w, None, a, b, **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), tensors)]


@needs_triton
@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("triton:full", {"rank": 70}, "rank 70 > 64"),
        ("triton:full", {"dropout_p": 0.5}, "dropout"),
        ("triton:concat", {"dropout_p": 0.5}, "dropout"),
    ],
)
def test_algorithm_refusal_reason(name, options, reason):
    """An algorithm that cannot serve a call says why."""
    assert reason in refused_linear(name, options.get("rank", 4), "dropout_p" in options)
    with pytest.raises(BackendError, match=reason):
        linear(name, **options)


@needs_triton
@pytest.mark.parametrize(("rank", "dropout_p"), [(4, 0.0), (70, 0.0), (4, 0.5), (70, 0.5)])
def test_default_algorithm(rank, dropout_p):
    """Without a named algorithm, Triton takes one that can serve the call."""
    reference = [t.cpu() for t in linear("reference", rank, dropout_p)]
    for mine, truth in zip(linear("triton", rank, dropout_p), reference, strict=True):
        # sums of at most 70 products, squared and multiplied once more: 1e3 roundings of the largest element
        torch.testing.assert_close(mine.cpu(), truth, rtol=0.0, atol=1e-4 * float(truth.abs().max()))


@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_backward"])
def test_host_time_counts(op):
    """Eager calls of small layers take the algorithm that is fewest launches; a captured graph, and calls
    that the GPU works on for longer, the one that the GPU is fastest with."""
    cost_model = importlib.import_module("fused_ewclora.backends.triton.cost_model")
    chosen = {}
    for rows in (16, 1 << 14):
        shape = dispatch.LinearShape(rows, 3072, 768, 16)
        for captured in (False, True):
            call = Call("cuda", torch.bfloat16, "sm_90", shape, captured=captured)
            times = cost_model.modelled(op, call)
            fastest = {name for name in times if cost_model.slower(op, name, call) is None}
            assert len(fastest) == 1
            chosen[rows, captured] = fastest.pop()
            if captured:
                assert chosen[rows, captured] == min(times, key=times.get)
    fewest = min(cost_model.HOST_WORK[op], key=lambda name: cost_model.host(op, name))
    assert chosen[16, False] == fewest
    assert chosen[1 << 14, False] == chosen[1 << 14, True]
