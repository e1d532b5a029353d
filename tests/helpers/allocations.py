# SPDX-License-Identifier: Apache-2.0
"""What a call allocates, as the profiler of PyTorch sees it."""

from __future__ import annotations

from collections.abc import Callable

import torch

MIB = 2**20


def peak_and_largest(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes held at the worst moment beyond those held before, and the largest single allocation."""
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profiler:
        kept = run()
    held = peak = largest = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() != "[memory]":
            continue
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    del kept
    return peak, largest


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
