# SPDX-License-Identifier: Apache-2.0
"""Which algorithm of the LoRA linear is expected to be fastest, from bytes and FLOPs.

Eager calls take the time of the GPU or of the host, whichever is longer; a captured graph that of the GPU.
Times are a model, not measurements: every product runs at the rate of the BLAS library (`efficiency` of it
in Triton), everything else at the bandwidth of memory, and each launch beyond the first costs `LAUNCH`. Rates
are constants of an architecture family; where the machine model predicted the product from its machine code
(`predicted_choice`), that is Triton's share.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .. import predicted_choice
from ..candidate import Call, LinearShape, remembers_choices
from .launch import INTERPRETED, family

LAUNCH = 2e-6  # s
# Of the host, in seconds, assumed until a machine with a GPU measures them: what every call takes, forward
# and backward with autograd, before it does anything; a launch of a plan through the driver; an operation of
# PyTorch. By algorithm: launches, operations.
HOST_CALL = {"lora_linear": 10e-6, "lora_linear_backward": 30e-6}
HOST_LAUNCH, HOST_OPERATION = 3e-6, 6e-6
HOST_WORK = {
    "lora_linear": {"full": (2, 0), "prologue": (3, 0), "addmm": (3, 1), "concat": (2, 2)},
    "lora_linear_backward": {"prologue": (3, 0), "addmm": (3, 1), "concat": (4, 2)},
}
MAX_FULL_RANK = 64  # z of a block of rows stays in registers beside the product's accumulator


class Rates(NamedTuple):
    """Bytes/s of memory, FLOP/s of BLAS products in 16 bit, tf32 and fp32, Triton's share of them, and how
    many columns of its product share one z in the algorithm "full"."""

    bandwidth: float
    half: float
    tf32: float
    single: float
    efficiency: float
    columns: int


RATES = {
    "sm_80": Rates(1.7e12, 250e12, 120e12, 18e12, 0.92, 128),
    "sm_86": Rates(0.7e12, 100e12, 45e12, 25e12, 0.90, 64),
    "sm_90": Rates(4.3e12, 790e12, 395e12, 50e12, 0.88, 256),
    "sm_100": Rates(6.5e12, 1600e12, 800e12, 60e12, 0.75, 256),
    "gfx942": Rates(4.0e12, 600e12, 300e12, 80e12, 0.80, 128),
    INTERPRETED: Rates(4.3e12, 790e12, 395e12, 50e12, 0.88, 256),
}


def impossible(op: str, algorithm: str, call: Call) -> str | None:
    """Why `algorithm` cannot compute `call`, or None."""
    if call.shape is None:
        return None
    if op == "lora_linear_backward":
        masked = algorithm == "concat" and call.shape.dropout
        return "dropout: the mask acts on u A alone, not on dy W beside it" if masked else None
    if algorithm != "full":
        return None
    if call.shape.rank > MAX_FULL_RANK:
        return f"rank {call.shape.rank} > {MAX_FULL_RANK}"
    if call.shape.dropout:
        return "dropout: the mask would be drawn again for every block of columns"
    return None


def slower(op: str, algorithm: str, call: Call) -> str | None:
    """Why another algorithm is expected to be faster, or None for the fastest."""
    if call.shape is None:
        return None
    alone = modelled(op, call)
    if algorithm not in alone:
        return impossible(op, algorithm, call)
    times = alone if call.captured else {name: max(t, host(op, name)) for name, t in alone.items()}
    best = min(times, key=lambda name: (times[name], alone[name]))
    if algorithm == best:
        return None
    return f"modelled {times[algorithm] * 1e6:.0f} us against {times[best] * 1e6:.0f} us of {best!r}"


def host(op: str, algorithm: str) -> float:
    """Seconds that the host takes for an eager call by `algorithm`."""
    launches, operations = HOST_WORK[op][algorithm]
    return HOST_CALL[op] + launches * HOST_LAUNCH + operations * HOST_OPERATION


def _rate(op: str, call: Call, rates: Rates) -> tuple[float, float]:
    """FLOP/s of BLAS and of Triton."""
    if call.dtype != torch.float32:
        share = predicted_choice.product_share(call.arch or "", op)
        return rates.half, rates.half * (rates.efficiency if share is None else share)
    if call.precision == "highest":
        # Triton's fp32 products on the matrix units are not true fp32; only BLAS provides those, at any cost.
        return rates.single, rates.single * 1e-3
    return rates.tf32, rates.tf32 * rates.efficiency


@remembers_choices
@functools.lru_cache(maxsize=1024)
def modelled(op: str, call: Call) -> dict[str, float]:
    """Seconds by algorithm that can compute `call`; backward without the passes common to all."""
    assert call.shape is not None
    rates = RATES[family(call.arch or INTERPRETED)]
    blas, triton = _rate(op, call, rates)
    size = 4 if call.dtype == torch.float32 else 2
    forward = op == "lora_linear"
    times = (_forward if forward else _backward)(
        call.shape, blas, triton, rates.bandwidth / size, rates.columns
    )
    return {name: seconds for name, seconds in times.items() if impossible(op, name, call) is None}


def _forward(
    shape: LinearShape, blas: float, triton: float, elements: float, columns: int
) -> dict[str, float]:
    m, k, n, r = shape.rows, shape.d_in, shape.d_out, padded(shape.rank)
    base, low_rank, read_x = 2.0 * m * k * n, 2.0 * m * n * r, m * k / elements
    return {
        "full": (base * (1 + r / max(min(columns, n), 1)) + low_rank) / triton,
        "prologue": LAUNCH + read_x + (base + low_rank) / triton,
        "addmm": 2 * LAUNCH + read_x + 2 * m * n / elements + base / blas,
        "concat": 3 * LAUNCH + 2 * read_x + 2 * k * n / elements + (base + low_rank) / blas,
    }


def _backward(
    shape: LinearShape, blas: float, triton: float, elements: float, columns: int
) -> dict[str, float]:
    """The product dx = dy W + u A; dy is read anyway, so that only writing its copy counts."""
    m, k, n, r = shape.rows, shape.d_in, shape.d_out, padded(shape.rank)
    base, low_rank = 2.0 * m * k * n, 2.0 * m * k * r
    return {
        "prologue": (base + low_rank) / triton,
        "addmm": LAUNCH + 2 * m * k / elements + base / blas,
        "concat": LAUNCH + m * n / elements + 2 * k * n / elements + (base + low_rank) / blas,
    }


def padded(rank: int) -> int:
    """The rank as kernels see it: 16, 32 or a multiple of 64 (`tl.dot` takes no fewer than 16)."""
    return 16 if rank <= 16 else 32 if rank <= 32 else -(-rank // 64) * 64
