# SPDX-License-Identifier: Apache-2.0
"""The keys by which Triton finds machine code on disk."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from fused_ewclora.backends.triton import KERNELS

KEYS = """
import importlib, itertools, os
from fused_ewclora.backends.triton import KERNELS, launch
modules = {name: importlib.import_module(f"fused_ewclora.kernels.{name}") for name in KERNELS}
for first in (None, *KERNELS):
    if (child := os.fork()) == 0:
        for name in (first, *KERNELS) if first else KERNELS:
            launch.settle(modules[name])
        keys = [(name, key, value.cache_key) for name, module in modules.items()
                for key, value in sorted(vars(module).items()) if hasattr(value, "cache_key")]
        print(len(keys), hash(tuple(keys)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_keys_keep_in_any_order():
    """The keys of kernels do not depend on which is launched first."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", KEYS]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = ran.stdout.splitlines()
    assert len(told) == len(KERNELS) + 1 and len(set(told)) == 1 and int(told[0].split()[0]) > 20, told
