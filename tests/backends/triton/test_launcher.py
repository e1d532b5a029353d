# SPDX-License-Identifier: Apache-2.0
"""Plans hand the CUDA driver what Triton's own launcher hands it, and a GPU would compute the right thing
from it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from budgets import LONG
from launcher import comparison, stub
from ptx import separately
from torch import Tensor

from fused_ewclora.backends import native

pytestmark = [
    separately.needed,
    pytest.mark.skipif(stub.missing() is not None, reason=str(stub.missing())),
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
]
USERS = ("FE.lora_linear, prologue", "FE.lora_linear_slices", "FE.ewc_penalty", "FE.ewc_penalty_grad_",
         "FE.fisher_accumulate_", "FE.merge_", "FE.soft_threshold_", "FE.l1_penalty")  # fmt: skip
# Tensor maps and pointers, dropout, scales, tables of slices and of penalties, splits, odd strides, tuples.
HOSTS = (
    "lora_linear fc1, r 10, bfloat16 by full", "lora_linear fc1, r 10, bfloat16 by concat",
    "lora_linear fc1 dropout, r 10, bfloat16 by prologue",
    "lora_linear k, v of qkv, r 10, bfloat16 by prologue", "lora_linear odd widths, r 10, bfloat16 by full",
    "lora_linear_backward fc1, r 10, bfloat16 by prologue",
    "lora_linear_backward k, v of qkv, r 10, bfloat16 by addmm",
    "ewc_penalty fp32 F, scales, r 10, bfloat16", "ewc_penalty value only, r 10, bfloat16",
    "fisher_accumulate_ sample, bfloat16", "fisher_accumulate_ sample, cu_seqlens, in splits, bfloat16",
    "fisher_accumulate_ sample, one token, bfloat16", "fisher_accumulate_ batch, bfloat16",
    "merge_ scales, r 10, bfloat16", "merge_ several layers, r 10, bfloat16",
    "soft_threshold_ gates, bfloat16", "ewc_penalty 8-bit F, r 10, bfloat16",
    "factored_penalty scales, r 10, bfloat16", "fisher_sums_ sample, bfloat16",
    "fisher_sums_ sample, one token, bfloat16", "l1_penalty scales, r 10, bfloat16",
)  # fmt: skip
# What is compared beside sm_90, and what is executed.
OTHERS = {"sm_80": (*USERS[:4], HOSTS[2], HOSTS[10]), "sm_100": (HOSTS[0], HOSTS[5], HOSTS[7])}
EXECUTED = {"sm_90": (*USERS, HOSTS[0], HOSTS[5], HOSTS[7], HOSTS[10]), "sm_80": (HOSTS[2],)}


ALL = {"sm_90": (*USERS, *HOSTS), **OTHERS}


def named(chosen: dict[str, tuple[str, ...]]) -> list[str]:
    return [f"{arch} {name}" for arch, names in chosen.items() for name in names]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The chosen calls; in the long run those of the compile report on sm_90 as well."""
    chosen = ["--dtype", "bfloat16", "--driver", "13010", "13020", "--execute", *named(EXECUTED)]
    found = run("--arch", *ALL, "--case", *named(ALL), *chosen)
    if LONG:
        found += run("--dtype", "bfloat16", "float16", "float32", "--rank", "4", "10", "30", "64", "128")
    return found


def run(*arguments: str) -> list[dict[str, Any]]:
    return list(json.loads(separately.run("launcher.check", "--json", *arguments)))


def test_equal_launches(rows: list[dict[str, Any]]) -> None:
    """Functions, grids, blocks, shared memory, streams, attributes, and the bytes of every parameter,
    tensor maps among them, of plans that were made for other addresses and numbers; for drivers whose maps
    of small tensors are corrected and for later ones."""
    compared = [row for row in rows if not row["executed"]]
    assert [row for row in compared if not row["right"]] == []
    for version in (13010, 13020):
        done = {f"{row['arch']} {row['case']}" for row in compared if row["driver"] == version}
        assert done >= set(named(ALL))


def test_executed(rows: list[dict[str, Any]]) -> None:
    """The machine code, with the parameters that plans hand over, equals fp64, forward and backward,
    without races or accesses out of bounds."""
    executed = [row for row in rows if row["executed"]]
    assert [row for row in executed if not row["right"]] == []
    assert {f"{row['arch']} {row['case']}" for row in executed} == set(named(EXECUTED))


def test_broken_plans() -> None:
    """Plans with a wrong grid, value, order, pointer, number or tensor map are found."""
    told = json.loads(separately.run("launcher.mutations"))
    assert told.pop("nothing") is True
    assert len(told) > 10 and set(told.values()) == {False}, told


def launch(**changes: Any) -> stub.Launch:
    made = stub.Launch("kernel", b"code", (3, 2, 1), (128, 1, 1), 512, 7, 1, (), (b"\1\0\0\0",))
    return replace(made, **changes)


def pointer(tensor: Tensor, offset: int = 0) -> bytes:
    return struct.pack("<Q", tensor.data_ptr() + offset)


def found(one: stub.Launch, other: stub.Launch, *tensors: Tensor) -> list[str]:
    """Differences, where each launch has temporaries of its own."""
    made = [(t.data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
    half = len(made) // 2
    return list(
        comparison.differences(
            [one], comparison.Buffers.of([], made[:half]), [other], comparison.Buffers.of([], made[half:])
        )
    )


@pytest.mark.parametrize(
    "change",
    [
        {"function": "other"}, {"image": b"other"}, {"grid": (3, 1, 2)},
        {"block": (256, 1, 1)}, {"shared": 0},
        {"stream": 0}, {"context": 2}, {"attributes": ((6, (1, 0, 0, 0)),)}, {"parameters": (b"\1\0\0\1",)},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_difference(change: dict[str, Any]) -> None:
    """Whatever differs is seen."""
    assert found(launch(), launch()) == []
    assert len(found(launch(), launch(**change))) == 1


def test_temporaries() -> None:
    """Memory of a call may lie elsewhere, if pointers into it are as far from its start and as often the
    same."""
    a, b, c, d = (torch.empty(64) for _ in range(4))
    expected = launch(parameters=(pointer(a), pointer(b, 16), pointer(a, 4)))
    assert found(expected, launch(parameters=(pointer(c), pointer(d, 16), pointer(c, 4))), a, b, c, d) == []
    assert found(expected, launch(parameters=(pointer(d), pointer(c, 16), pointer(d, 4))), a, b, c, d) == []
    for wrong in (
        (pointer(c), pointer(d, 16), pointer(d, 4)), (pointer(c), pointer(d), pointer(c, 4)),
        (pointer(c), pointer(c, 16), pointer(c, 4)), (pointer(c), pointer(a, 16), pointer(c, 4)),
    ):  # fmt: skip
        assert found(expected, launch(parameters=wrong), a, b, c, d)
