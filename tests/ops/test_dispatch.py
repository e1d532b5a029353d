# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: choices, reasons, and the errors of choices that cannot be met."""

from __future__ import annotations

import every_operation
import pytest
import torch
from interpreters import in_subprocess
from strategies import BACKENDS, LINEAR_BACKENDS, device_of
from tolerance import EPS, TF32X3, on_matrix_units

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError, BackendError
from fused_ewclora.ops import dispatch
from fused_ewclora.ops.capture import FisherCapture
from fused_ewclora.ops.dispatch import Call
from fused_ewclora.ops.schemas import SCHEMAS

UNAVAILABLE = [name for name, why in fe.available_backends().items() if why is not None]
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
# Chains of four sums of at most 45 terms: 2 sqrt(45) + 4 roundings each, of the largest element.
TOLERANCE = 4 * 17.5 * EPS[torch.float32]
NAMES = [*BACKENDS, *(name for name in LINEAR_BACKENDS if name not in BACKENDS)]


@pytest.fixture(autouse=True)
def restored_choice():
    choice = dispatch.current_backend()
    yield
    fe.use_backend(choice)


def penalty(device: str = "cpu", **options) -> torch.Tensor:
    fisher, a, b = (torch.ones(*shape, device=device) for shape in ((7, 5), (2, 5), (7, 2)))
    return FE.ewc_penalty([fisher], [a], [b], **options)


def test_use_backend_sets():
    """`use_backend` sets the choice until it is changed."""
    fe.use_backend("reference")
    assert dispatch.current_backend() == "reference"
    assert dispatch.resolve(None) == "reference"
    fe.use_backend("auto")
    assert dispatch.current_backend() == "auto"


def test_use_backend_context():
    """As a context manager, `use_backend` ends with the block, also after an error."""
    fe.use_backend("auto")
    with fe.use_backend("reference"):
        assert dispatch.current_backend() == "reference"
        with fe.use_backend("auto"):
            assert dispatch.current_backend() == "auto"
        assert dispatch.current_backend() == "reference"
    with pytest.raises(ZeroDivisionError), fe.use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch.current_backend() == "auto"


def test_call_wins():
    """A backend named in the call takes precedence over the choice."""
    with fe.use_backend("reference"):
        assert dispatch.resolve("auto") == "auto"


@pytest.mark.parametrize("backend", NAMES)
def test_choice_decides(backend, monkeypatch):
    """Observed, not inferred: the chosen candidate is replaced by one that reports itself."""
    asked = []

    def chosen(op, name, call):
        asked.append((op, name))
        return original(op, name, call)

    original = dispatch.choose
    monkeypatch.setattr("fused_ewclora.ops.schemas.choose", chosen)
    with fe.use_backend(backend):
        penalty(device_of(backend))
    assert ("ewc_penalty", backend) in asked


@pytest.mark.parametrize("wrong", ["CPU", "rocm", "", "None"])
def test_unknown_name(wrong):
    """Unknown names are refused with the list of known ones; nothing changes."""
    fe.use_backend("reference")
    with pytest.raises(
        ArgumentError, match="use_backend: expected one of auto, triton, cuda, cpu, reference"
    ):
        fe.use_backend(wrong)
    with pytest.raises(ArgumentError, match=f"backend: expected one of .*, got '{wrong}'"):
        penalty(backend=wrong)
    assert dispatch.current_backend() == "reference"


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_unavailable_refused(name):
    """An unavailable backend is refused with its reason; nothing changes."""
    reason = fe.available_backends()[name]
    fe.use_backend("reference")
    with pytest.raises(BackendError) as caught:
        fe.use_backend(name)
    assert name in str(caught.value) and reason in str(caught.value)
    with pytest.raises(BackendError) as caught:
        penalty(backend=name)
    assert name in str(caught.value) and reason in str(caught.value)
    assert dispatch.current_backend() == "reference"


@needs_cpu
def test_no_fallback():
    """fp64 runs on the reference: `auto` goes there, `cpu` says that it cannot."""
    double = [torch.ones(*shape, dtype=torch.float64) for shape in ((7, 5), (2, 5), (7, 2))]
    assert FE.ewc_penalty(*([t] for t in double), backend="auto").dtype == torch.float64
    with pytest.raises(BackendError, match=r"'cpu' cannot run ewc_penalty on cpu torch.float64: .*reference"):
        FE.ewc_penalty(*([t] for t in double), backend="cpu")
    weight = torch.zeros(7, 5, dtype=torch.float64)
    with pytest.raises(BackendError, match="'cpu' cannot run merge_"):
        FE.merge_(weight, double[1], double[2], backend="cpu")
    assert not weight.any()


@pytest.mark.parametrize("op", SCHEMAS)
def test_cpu_dtypes(op):
    """Every op is served for every dtype on the CPU."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        rows = dispatch.explain(op, Call("cpu", dtype), "auto")
        assert ("reference", "plain PyTorch", None) in rows
        chosen = dispatch.choose(op, "auto", Call("cpu", dtype))
        assert chosen.backend == next(backend for backend, _, reason in rows if reason is None)


@pytest.mark.parametrize("op", SCHEMAS)
def test_explain_reasons(op):
    """`explain` gives a reason in words for every candidate that does not serve."""
    with fe.use_backend("reference"):
        for backend, algorithm, reason in dispatch.explain(op, Call("cpu", torch.float32)):
            assert algorithm and (reason is None) == (backend == "reference")
            assert reason is None or "reference" in reason or reason == fe.available_backends()[backend]
    for backend, _, reason in dispatch.explain(op, Call("cuda", torch.float32), "auto"):
        if backend == "cpu":
            assert reason is not None and "cuda" in reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(backend):
    """Backends agree on every operation."""
    exact = every_operation.results("reference", torch.float64)
    error = every_operation.worst_error(every_operation.results(backend), exact)
    limit = TOLERANCE + (4 * TF32X3 if on_matrix_units(backend) else 0.0)
    assert error <= limit, f"error {error:.3g} > {limit:.3g}"


def test_environment():
    """The environment names the backend."""
    code = "from fused_ewclora.ops.dispatch import current_backend; print(current_backend())"
    done = in_subprocess(code, FUSED_EWCLORA_BACKEND="reference")
    assert done.stdout.strip() == "reference", done.stderr


def test_environment_wrong():
    """A wrong name in the environment is an error that names the variable."""
    code = (
        "import torch, fused_ewclora.functional as FE\n"
        "FE.merge_(torch.zeros(7, 5), torch.zeros(2, 5), torch.zeros(7, 2))"
    )
    done = in_subprocess(code, FUSED_EWCLORA_BACKEND="rocm")
    assert done.returncode != 0
    assert "ArgumentError: FUSED_EWCLORA_BACKEND: expected one of" in done.stderr and "'rocm'" in done.stderr


@needs_cpu
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_instruction_sets(isa, tmp_path):
    """Processors without AVX-512 or AVX2 run other code from the same sources."""
    if isa == "avx2" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this processor has no AVX2")
    path = tmp_path / "results.pt"
    code = (
        "import torch, every_operation\n"
        "from fused_ewclora import _C\n"
        f"torch.save(every_operation.results('cpu'), {str(path)!r})\n"
        "print(_C.instruction_set())"
    )
    done = in_subprocess(code, FUSED_EWCLORA_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
    exact = every_operation.results("reference", torch.float64)
    error = every_operation.worst_error(torch.load(path), exact)
    assert error <= TOLERANCE, f"error {error:.3g} > {TOLERANCE:.3g}"


@needs_cpu
def test_fisher_pass_backend():
    """The C++ kernels do not serve fp64, so asking for them shows whether the capture listens."""
    capture = FisherCapture([torch.zeros(7, 5, dtype=torch.float64)], [((0, 7),)])
    x, dy = torch.ones(3, 4, 5, dtype=torch.float64), torch.ones(3, 4, 7, dtype=torch.float64)
    with fe.use_backend("cpu"), pytest.raises(BackendError, match="float64"):
        capture.record(x, dy)


@needs_cpu
def test_instruction_set_unknown():
    """An unknown instruction set is an error that names the variable."""
    done = in_subprocess(
        "import every_operation; every_operation.results('cpu')", FUSED_EWCLORA_CPU_ISA="mmx"
    )
    assert done.returncode != 0
    assert "FUSED_EWCLORA_CPU_ISA: expected" in done.stderr and "mmx" in done.stderr
