# SPDX-License-Identifier: Apache-2.0
"""Predicted seconds, from bytes, FLOPs and the assumed rates of the cost model that chooses algorithms.

These are not measurements: records keep them in a field of their own, `predicted_seconds`.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from fused_ewclora.backends.candidate import Call, LinearShape, arch_of
from fused_ewclora.backends.triton import cost_model
from fused_ewclora.backends.triton.launch import family

from .case import Case

ASSUMED = "sm_90"  # where there is no GPU


@functools.cache
def arch() -> str:
    """The architecture that predictions are for."""
    return (torch.cuda.is_available() and arch_of(torch.device("cuda", 0))) or ASSUMED


def rates() -> cost_model.Rates:
    return cost_model.RATES[family(arch())]


def roofline(flops: float, bytes_moved: float, product: str) -> float:
    """Bytes at the assumed bandwidth or FLOPs at the assumed rate, whichever takes longer."""
    assumed = rates()
    rate = {"bf16": assumed.half, "tf32": assumed.tf32, "fp32": assumed.single}[product]
    return max(bytes_moved / assumed.bandwidth, flops / rate)


def of_case(case: Case) -> float:
    return roofline(case.flops, case.bytes, case.product)


def filled(case: Case) -> Case:
    """The case with predictions for ours where the suite gave none."""
    providers = [
        dataclasses.replace(p, predicted=of_case(case))
        if p.role in ("ours", "variant") and p.predicted is None
        else p
        for p in case.providers
    ]
    return dataclasses.replace(case, providers=providers)


def forward(algorithm: str, rows: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype) -> float | None:
    """Seconds of an algorithm of the LoRA linear, or of the one predicted to be fastest ("")."""
    shape = LinearShape(rows, d_in, d_out, rank)
    times = cost_model.modelled("lora_linear", Call("cuda", dtype, arch(), shape))
    return times.get(algorithm) if algorithm else min(times.values())
