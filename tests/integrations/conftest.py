# SPDX-License-Identifier: Apache-2.0
"""Tests with the real model libraries. Where these are not installed the folder is left out, and the summary
of the run says so; `make test` requires them."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    "timm", "transformers", "peft", "accelerate", "avalanche", "open_clip", "bitsandbytes", "torchao",
)  # fmt: skip
MISSING = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
HINT = "make test-integrations installs them"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from configurations; nothing is downloaded
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if not MISSING:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from benchmarks.extras import prepare_torchvision

    prepare_torchvision()
elif os.environ.get("FUSED_EWCLORA_TEST_INTEGRATIONS") == "required":
    raise pytest.UsageError(f"not installed: {', '.join(MISSING)}; {HINT}")
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def cheap_collections() -> Iterator[None]:
    """Every `Trainer.train` collects garbage, half a second with the modules that are loaded here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        terminalreporter.write_line(
            f"tests/integrations left out, not installed: {', '.join(MISSING)}; {HINT}"
        )
