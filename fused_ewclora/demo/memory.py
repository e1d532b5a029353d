# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a computation: the tensors that it allocates, without those that existed before it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_bytes(run: Callable[[], T], device: torch.device | str = "cpu") -> tuple[T, int]:
    """The result of `run`, and the most bytes that tensors allocated by it occupy at the same time.

    On a CPU this is the largest running sum of the allocations and frees of PyTorch's CPU allocator, results
    and temporaries, as torch.profiler records them. Memory that libraries allocate themselves is not seen:
    packing buffers of BLAS, vectors of C++ code.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with contextlib.nullcontext() if device.index is None else torch.cuda.device(device):
            return _cuda_peak_bytes(run)
    # Otherwise the profiler reports its start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return result, peak


def _cuda_peak_bytes(run: Callable[[], T]) -> tuple[T, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, int(torch.cuda.max_memory_allocated() - before)
