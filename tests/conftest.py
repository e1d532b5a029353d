# SPDX-License-Identifier: Apache-2.0
"""Settings that tests share: fresh random inputs, a known thread count, memory that is not zero by luck."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import seeding  # noqa: F401  shifts seeds
import torch
from budgets import EXAMPLES, FACTOR
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # for benchmarks/, which is not installed under that name
    sys.path.append(str(ROOT))
if not (ROOT / "benchmarks").exists():  # a source distribution has it and kernels/ inside the package
    sys.path.append(str(ROOT / "fused_ewclora"))

# Triton reads it when it is imported. Without a GPU its kernels run in its interpreter, here and in the
# subprocesses of tests; those about a machine without either take it out of their environment.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1":
        importlib.import_module("interpreter").hasten()

# The CUDA kernels likewise, by an emulator; before strategies.py asks which backends there are.
NOT_EMULATED = importlib.import_module("cuda_emulator").install()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if NOT_EMULATED is not None and not torch.cuda.is_available():
        terminalreporter.write_line(f"CUDA kernels were not tested in the emulator: {NOT_EMULATED}")


# The files that take longest: first, so that no process works on one of them at the end alone.
LONGEST = (
    "ptx/test_cuda_code.py", "ptx/test_mutations.py", "ptx/test_triton_code.py",
    "benchmarks/test_gpu_check_driver.py", "project/test_packaging.py", "ops/test_lora_linear.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a run of everything; whoever names files has an order in mind."""
    if config.args == config.getini("testpaths"):
        names = [str(ROOT / "tests" / name) for name in LONGEST]
        items.sort(key=lambda item: names.index(str(item.path)) if str(item.path) in names else len(names))


# Fresh inputs on every run find more than the same ones forever; a failure prints how to reproduce it.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=False,
    print_blob=True,
    max_examples=FACTOR * EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = int(os.environ.get("FUSED_EWCLORA_TEST_THREADS") or "0") or max(1, (os.cpu_count() or 1) // WORKERS)


@pytest.fixture(autouse=True)
def known_seed() -> None:
    """Random numbers of a test depend on no other test."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def known_threads() -> Iterator[None]:
    """Every test starts with its share of the cores; one that sets another number need not restore it."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every `torch.empty` holds NaN, so that unwritten elements show; beside @given use usefixtures."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
