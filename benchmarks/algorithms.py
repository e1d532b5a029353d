# SPDX-License-Identifier: Apache-2.0
"""Algorithms of the LoRA linear: the chosen one, those that can be forced, and predicted times."""

from __future__ import annotations

from fused_ewclora.backends.candidate import Call, LinearShape, bucket
from fused_ewclora.ops.dispatch import choose

from . import predict
from .place import Entry, Place
from .workload import Workload

OF_TRITON = ("full", "prologue", "addmm", "concat")
OPS = {"forward": "lora_linear", "backward": "lora_linear_backward"}


def forced(entry: Entry) -> tuple[str, ...]:
    """Algorithms that the argument `backend` can select."""
    return OF_TRITON if entry.backend == "triton" else ()


def _shape(workload: Workload) -> LinearShape:
    rank = workload.size("rank") * (2 if workload.op == "lora_linear_slices" else 1)
    return LinearShape(workload.size("rows"), workload.size("d_in"), workload.size("d_out"), rank)


def described(workload: Workload, place: Place, entry: Entry) -> str:
    """The algorithms that the passes of the workload use, in words."""
    if not place.gpu:
        return "C++ prologue into BLAS addmm"
    shape = _shape(workload)
    arch = None if place.rehearsal else predict.arch()
    call = Call(place.device, workload.torch_dtype, arch, shape._replace(rows=bucket(shape.rows)))
    return "; ".join(choose(OPS[part], entry.recorded, call).algorithm for part in workload.which.split("+"))


def predicted(workload: Workload, entry: Entry, key: str) -> float | None:
    """Seconds of Triton's forward pass by the cost model of the dispatch; None where it has no model."""
    if entry.backend != "triton" or workload.which != "forward":
        return None
    shape = _shape(workload)
    return predict.forward(key, shape.rows, shape.d_in, shape.d_out, shape.rank, workload.torch_dtype)
