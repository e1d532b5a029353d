# SPDX-License-Identifier: Apache-2.0
"""One number that shifts the seeds of the tests; a run with another shows which merely happen to work."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

SHIFT = int(os.environ.get("FUSED_EWCLORA_TEST_SEED") or "0")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed + SHIFT) % 2**64)


def _shifted(manual_seed: Callable[[int], torch.Generator], seed: int) -> torch.Generator:
    return manual_seed((int(seed) + SHIFT) % 2**64)


if SHIFT:  # here, so that it is so in the processes that tests start
    torch.manual_seed = functools.partial(_shifted, torch.manual_seed)
