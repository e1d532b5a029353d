# SPDX-License-Identifier: Apache-2.0
"""python -m launcher.variations: calls that differ from the one that a plan was made for, as JSON by name:
whether the plan served them, and how that differs from what Triton's launcher would have handed over."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ptx.launches import tensors
from torch import Tensor

from fused_ewclora.backends.triton import candidates, launch

from . import calls, memory, triton_launcher
from .comparison import Buffers, differences

ARCH = "sm_90"
D_IN, D_OUT, RANK = 176, 208, 10
Arguments = dict[str, Any]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """The same values so many elements behind an aligned address."""
    room = tensor.new_empty(tensor.numel() + elements)
    return room[elements:].view(tensor.shape).copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    """The same values in every other column of a larger matrix."""
    return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]


def linear(**changes: Any) -> Arguments:
    given = {
        "x": normal(159, D_IN),
        "weight": normal(D_OUT, D_IN),
        "bias": normal(D_OUT),
        "lora_as": [normal(RANK, D_IN)],
        "lora_bs": [normal(D_OUT, RANK)],
        "scales": [normal(RANK)],
        "factors": [0.5],
        "rows": [0, 0, D_OUT],
        "dropout": 0.0,
        "seed": None,
    }
    return given | changes


def backward(**changes: Any) -> Arguments:
    given = {"dy": normal(159, D_OUT), **linear(), "needs": [True, False, True, True, True, True]}
    given["z"] = normal(159, RANK, dtype=torch.float32)
    given |= changes
    order = (
        "dy",
        "x",
        "weight",
        "bias",
        "z",
        "lora_as",
        "lora_bs",
        "scales",
        "factors",
        "rows",
        "dropout",
        "seed",
    )
    return {name: given[name] for name in (*order, "needs")}


def fisher(**changes: Any) -> Arguments:
    given = {
        "fisher": normal(D_OUT, D_IN, dtype=torch.float32),
        "x": normal(5, 21, D_IN),
        "dy": normal(5, 21, D_OUT),
        "mode": "sample",
        "weight": 1.0,
        "cu_seqlens": None,
    }
    return given | changes


def merge(**changes: Any) -> Arguments:
    given = {
        "weights": [normal(32, 48) for _ in range(2)],
        "lora_as": [normal(4, 48) for _ in range(2)],
        "lora_bs": [normal(32, 4) for _ in range(2)],
        "scales": [None, None],
        "factors": [0.5, 0.5],
    }
    return given | changes


def threshold(**changes: Any) -> Arguments:
    return {"scales": [normal(64) for _ in range(2)], "kappa": 0.1} | changes


def penalty() -> Arguments:
    return {
        "fishers": [normal(40, 48, dtype=torch.float32).abs() for _ in range(2)],
        "lora_as": [normal(4, 48) for _ in range(2)],
        "lora_bs": [normal(40, 4) for _ in range(2)],
        "scales": [None, None],
        "factors": [1.0, 1.0],
        "ewc_lambda": 2.0,
        "needs": [True, True, False],
    }


def doubled(make: Callable[[], Tensor]) -> list[Tensor]:
    one = make()
    return [one, one]


def neighbours(dtype: torch.dtype) -> list[Tensor]:
    """Two tensors in one, of which one begins where the other ends."""
    return list(normal(128).to(dtype).split(64))


def variations() -> Iterator[tuple[str, str, Arguments, Arguments]]:
    """(name, op, the call that a plan is made for, the other call)."""
    wide = torch.zeros(()).expand(159, D_IN).to(torch.bfloat16)
    linears: dict[str, Arguments] = {
        "same kind": {},
        "rows of x": {"x": normal(160, D_IN)},
        "x strided": {"x": strided(normal(159, D_IN))},
        "x transposed": {"x": normal(D_IN, 159).T},
        "x expanded": {"x": wide[:1].expand(159, D_IN)},
        "x 2 bytes off": {"x": shifted(normal(159, D_IN), 1)},
        "x 16 bytes off": {"x": shifted(normal(159, D_IN), 8)},
        "weight transposed": {"weight": normal(D_IN, D_OUT).T},
        "no bias": {"bias": None},
        "bias 8 bytes off": {"bias": shifted(normal(D_OUT), 4)},
        "no scale": {"scales": [None]},
        "scale of one": {"scales": [normal(1)[0]]},
        "factor": {"factors": [0.25]},
        "fp32 factors": {"lora_as": [normal(RANK, D_IN, dtype=torch.float32)]},
        "rows of adapters": {"rows": [0, 16, D_OUT], "lora_bs": [normal(D_OUT - 16, RANK)]},
        "other rows": {"rows": [0, 0, 16, 0, 32, D_OUT], "lora_bs": [normal(D_OUT - 16, RANK)]},
        "rank": {"lora_as": [normal(4, D_IN)], "lora_bs": [normal(D_OUT, 4)], "scales": [normal(4)]},
        "B 2 bytes off": {"lora_bs": [shifted(normal(D_OUT, RANK), 1)]},
        "dropout": {"dropout": 0.25, "seed": torch.tensor(5)},
        "fp16": {
            "x": normal(159, D_IN).half(),
            "weight": normal(D_OUT, D_IN).half(),
            "bias": normal(D_OUT).half(),
        },
    }
    for name, changes in linears.items():
        yield f"linear, {name}", "lora_linear", linear(), linear(**changes)
    drop = {"dropout": 0.25, "seed": torch.tensor(5)}
    yield "linear, other seed", "lora_linear", linear(**drop), linear(**{**drop, "seed": torch.tensor(9)})
    yield "linear, other dropout", "lora_linear", linear(**drop), linear(**{**drop, "dropout": 0.5})
    two = {
        "lora_as": [normal(4, D_IN), normal(4, D_IN)],
        "lora_bs": [normal(64, 4), normal(64, 4)],
        "scales": [None, None],
        "factors": [0.5, 0.5],
        "rows": [0, 0, 64, 1, 64, 128],
    }
    shared = two | {"lora_as": doubled(lambda: normal(4, D_IN)), "lora_bs": doubled(lambda: normal(64, 4))}
    yield "linear, adapters shared", "lora_linear", linear(**two), linear(**shared)
    yield (
        "linear, adapters swapped",
        "lora_linear",
        linear(**two),
        linear(**two | {"rows": [1, 0, 64, 0, 64, 128]}),
    )
    backwards: dict[str, Arguments] = {
        "same kind": {},
        "no dx": {"needs": [False, False, True, True, True, True]},
        "no dA": {"needs": [True, False, True, False, True, True]},
        "only dx": {"needs": [True] + [False] * 5},
        "dW": {"needs": [True] * 6},
        "dy strided": {"dy": strided(normal(159, D_OUT))},
        "dy expanded": {"dy": torch.ones((), dtype=torch.bfloat16).expand(159, D_OUT)},
    }
    for name, changes in backwards.items():
        yield f"backward, {name}", "lora_linear_backward", backward(), backward(**changes)
    fishers: dict[str, Arguments] = {
        "same kind": {},
        "weight": {"weight": 3.0},
        "batch": {"mode": "batch"},
        "F transposed": {"fisher": normal(D_IN, D_OUT, dtype=torch.float32).T},
        "bf16 F": {"fisher": normal(D_OUT, D_IN)},
        "many samples": {"x": normal(64, 21, D_IN), "dy": normal(64, 21, D_OUT)},
        "one token": {"x": normal(105, D_IN), "dy": normal(105, D_OUT)},
        "x off": {"x": shifted(normal(5, 21, D_IN), 1)},
    }
    for name, changes in fishers.items():
        yield f"fisher, {name}", "fisher_accumulate_", fisher(), fisher(**changes)
    flat = {"x": normal(105, D_IN), "dy": normal(105, D_OUT)}
    ends = [torch.tensor(e, dtype=torch.int32) for e in ([0, 50, 105], [0, 7, 105], [0, 7, 50, 105])]
    for name, other in {"other samples": ends[1], "more samples": ends[2]}.items():
        yield (
            f"fisher, {name}",
            "fisher_accumulate_",
            fisher(**flat, cu_seqlens=ends[0]),
            fisher(**flat, cu_seqlens=other),
        )
    weights: dict[str, Arguments] = {
        "same kind": {},
        "one weight twice": {"weights": doubled(lambda: normal(32, 48))},
        "scaled": {"scales": [normal(4), None]},
        "factor": {"factors": [0.5, 0.25]},
    }
    overlapping = normal(48, 48)
    weights["overlapping rows"] = {"weights": [overlapping[:32], overlapping[16:]]}
    for name, changes in weights.items():
        yield f"merge, {name}", "merge_", merge(), merge(**changes)
    scales: dict[str, Arguments] = {
        "same kind": {},
        "kappa": {"kappa": 0.7},
        "one scale twice": {"scales": doubled(lambda: normal(64))},
        "neighbours": {"scales": neighbours(torch.bfloat16)},
        "strided": {"scales": [normal(128)[::2], normal(64)]},
    }
    for name, changes in scales.items():
        yield f"threshold, {name}", "soft_threshold_", threshold(), threshold(**changes)
    given = penalty()
    yield "penalty, lambda", "ewc_penalty", given, given | {"ewc_lambda": 5.0}
    yield "penalty, factor", "ewc_penalty", given, given | {"factors": [1.0, 0.5]}
    yield "penalty, needs", "ewc_penalty", given, given | {"needs": [False, True, False]}
    # Strides that offsets inside a tile could not follow: hosts copy such tensors.
    far = torch.empty(4 << 22, dtype=torch.bfloat16).as_strided((4, D_IN), (1 << 22, 1)).normal_()
    copied = given | {"lora_as": [far[:, :48], far[:, 48:96]]}
    yield "penalty, copies", "ewc_penalty", copied, copied
    few = {"lora_as": [far], "lora_bs": [normal(D_OUT, 4)], "scales": [None]}
    yield "linear, copies", "lora_linear", linear(**few), linear(**few)
    yield "penalty, other F", "ewc_penalty", given, given | {"fishers": penalty()["fishers"]}


def outcome(op: str, first: Arguments, other: Arguments, high: bool = False) -> dict[str, Any]:
    """What became of the other call."""
    host = next(c for c in candidates(op) if not c.keys or c.keys[0] == "prologue").run
    driver = triton_launcher.activate(ARCH)
    driver.set(noting=1)
    before = torch.get_float32_matmul_precision()
    with calls.pretending(ARCH):
        for _ in range(2):
            host(*first.values())
        start = len(driver.launches())
        try:
            torch.set_float32_matmul_precision("high" if high else before)
            with memory.held(), launch.handing(ARCH, triton_launcher.run):
                host(*other.values())
                expected_in = Buffers.of(tensors(list(other.values())), memory.blocks())
            expected = driver.launches(start)
            with memory.held():
                host(*other.values())
                got_in = Buffers.of(tensors(list(other.values())), memory.blocks())
        finally:
            torch.set_float32_matmul_precision(before)
        got = driver.launches(start + len(expected))
    driver.set(noting=0)
    wrong = list(differences(expected, expected_in, got, got_in))[:4] if got else []
    return {"served": bool(got), "launches": len(expected), "wrong": wrong}


def main() -> None:
    torch.manual_seed(0)
    found = {name: outcome(op, first, other) for name, op, first, other in variations()}
    full = linear(
        x=normal(159, D_IN, dtype=torch.float32), weight=normal(D_OUT, D_IN, dtype=torch.float32), bias=None
    )
    found["linear, precision"] = outcome("lora_linear", full, full, high=True)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    memory.preload("launcher.variations", sys.argv[1:])
    main()
