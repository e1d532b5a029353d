# SPDX-License-Identifier: Apache-2.0
"""Implementations called past the checks of `functional`: whichever serves the call, wrong sizes, lengths and
devices raise ValueError, wrong dtypes TypeError, and nothing has been changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from strategies import BACKENDS, device_of
from structured_cases import reads
from torch import Tensor

from fused_ewclora.ops.dispatch import candidates

HALF, DOUBLE, INT, BYTE = torch.float16, torch.float64, torch.int32, torch.uint8
META = torch.device("meta")


def T(*shape: int, **options: Any) -> Tensor:
    return torch.full(shape, 1 if options.get("dtype") in (INT, BYTE) else 0.5, **options)


def adapters() -> dict[str, Any]:
    """Two of ranks 2 and 3 on rows [0, 4) and [4, 7)."""
    return {
        "lora_as": [T(2, 5), T(3, 5)],
        "lora_bs": [T(4, 2), T(3, 3)],
        "scales": [None, T(3)],
        "scale_factors": [1.0, 2.0],
    }


def linear() -> dict[str, Any]:
    return {
        "x": T(6, 5), "weight": T(7, 5), "bias": T(7), **adapters(), "rows": [0, 0, 4, 1, 4, 7],
        "dropout_p": 0.5, "seed": torch.tensor(3),
    }  # fmt: skip


def linear_backward() -> dict[str, Any]:
    forward = linear()
    front = {"dy": T(6, 7), "x": forward.pop("x"), "weight": forward.pop("weight")}
    front |= {"bias": forward.pop("bias"), "z": T(6, 5)}
    return {**front, **forward, "needs": [True] * 7 + [False, True]}


def penalty() -> dict[str, Any]:
    return {"fishers": [T(4, 5), T(3, 5)], **adapters(), "ewc_lambda": 1.0, "needs": [True] * 3}


def codes() -> dict[str, Any]:
    return {**penalty(), "fishers": [T(4, 48, dtype=BYTE), T(3, 48, dtype=BYTE)]}


def factored() -> dict[str, Any]:
    return {**penalty(), "fishers": [T(4), T(3), T(5), T(5)]}


def l1() -> dict[str, Any]:
    return {"fishers": [], **adapters(), "l1_lambda": 1.0, "needs": [True] * 3}


def sums() -> dict[str, Any]:
    samples = fisher()
    samples.pop("fisher")
    return {"rows": T(7), "columns": T(5), **samples}


def fisher() -> dict[str, Any]:
    return {"fisher": T(7, 5), "x": T(3, 4, 5), "dy": T(3, 4, 7), "squares": "sample", "weight": 1.0,
            "cu_seqlens": None}  # fmt: skip


def packed() -> dict[str, Any]:
    offsets = torch.tensor([0, 2, 6])
    return {**fisher(), "x": T(6, 5), "dy": T(6, 7), "cu_seqlens": offsets}


def merge() -> dict[str, Any]:
    return {"weights": [T(4, 5), T(3, 5)], **adapters()}


def threshold() -> dict[str, Any]:
    return {"scales": [T(3), T(2)], "kappa": 0.1}


# Arguments that are right, in the order of the op's.
GOOD = {
    "lora_linear": linear,
    "lora_linear_backward": linear_backward,
    "ewc_penalty": penalty,
    "ewc_penalty in 8 bits": codes,
    "factored_penalty": factored,
    "l1_penalty": l1,
    "fisher_sums_": sums,
    "fisher_accumulate_": fisher,
    "fisher_accumulate_ packed": packed,
    "merge_": merge,
    "soft_threshold_": threshold,
}

# What is wrong with arguments of the adapters, whatever the op does with them; and the error, and its words.
Row = tuple[str, Any, type[Exception], list[str]]
ADAPTERS: list[Row] = [
    ("lora_as", [T(2, 5)], ValueError, ["2", "1"]),
    ("lora_bs", [T(4, 2)], ValueError, ["2", "1"]),
    ("scales", [None], ValueError, ["2", "1"]),
    ("scales", [None, None, None], ValueError, ["2", "3"]),
    ("scale_factors", [1.0], ValueError, ["2", "1"]),
    ("lora_as[1]", T(15), ValueError, ["matrix", "[15]"]),
    ("lora_as[1]", T(0, 5), ValueError, ["rank", "[0, 5]"]),
    ("lora_bs[1]", T(3, 2), ValueError, ["3 columns", "[3, 2]"]),
    ("lora_bs[1]", T(3, 3, 1), ValueError, ["matrix", "[3, 3, 1]"]),
    ("scales[1]", T(2), ValueError, ["[3]", "[2]"]),
    ("scales[1]", T(3, 1), ValueError, ["[3]", "[3, 1]"]),
    ("lora_as[1]", T(3, 5, dtype=HALF), TypeError, ["float32", "float16"]),
    ("lora_bs[1]", T(3, 3, dtype=DOUBLE), TypeError, ["float32", "float64"]),
    ("scales[1]", T(3, dtype=INT), TypeError, ["float32", "int32"]),
    ("lora_bs[1]", T(3, 3, device=META), ValueError, ["device", "meta"]),
    ("scales[1]", T(3, device=META), ValueError, ["device", "meta"]),
]
LAYER: list[Row] = [
    *ADAPTERS,
    ("weight", T(35), ValueError, ["matrix", "[35]"]),
    ("weight", T(7, 5, dtype=HALF), TypeError, ["float32", "float16"]),
    ("weight", T(7, 5, device=META), ValueError, ["device", "meta"]),
    ("bias", T(6), ValueError, ["[7]", "[6]"]),
    ("bias", T(7, dtype=HALF), TypeError, ["float32", "float16"]),
    ("lora_as[1]", T(3, 6), ValueError, ["5 columns", "[3, 6]"]),
    ("lora_bs[1]", T(2, 3), ValueError, ["3 rows", "[2, 3]"]),
    ("rows", [0, 0, 4, 1, 4], ValueError, ["triples", "5"]),
    ("rows", [0, 0, 4, 2, 4, 7], ValueError, ["below 2", "2"]),
    ("rows", [0, 0, 4, -1, 4, 7], ValueError, ["below 2", "-1"]),
    ("rows", [0, 0, 4, 1, 5, 8], ValueError, ["<= 7", "(5, 8)"]),
    ("rows", [0, 0, 4, 1, 7, 4], ValueError, ["start < stop", "(7, 4)"]),
    ("seed", None, ValueError, ["int64", "None"]),
    ("seed", T(), TypeError, ["int64", "float32"]),
    ("seed", torch.tensor([1, 2]), ValueError, ["one", "[2]"]),
]
TABLE: dict[str, list[Row]] = {
    "lora_linear": [
        *LAYER,
        ("x", T(6, 4), ValueError, ["5 features", "[6, 4]"]),
        ("x", T(), ValueError, ["5 features", "[]"]),
        ("x", T(6, 5, dtype=INT), TypeError, ["float", "int32"]),
    ],
    "lora_linear_backward": [
        *LAYER,
        ("dy", T(6, 5), ValueError, ["7 features", "[6, 5]"]),
        ("dy", T(6, 7, dtype=INT), TypeError, ["float", "int32"]),
        ("x", T(6, 4), ValueError, ["5 features", "[6, 4]"]),
        ("x", T(5, 5), ValueError, ["[6, 7]", "[5, 5]"]),
        ("x", T(6, 5, dtype=HALF), TypeError, ["float32", "float16"]),
        ("x", None, ValueError, ["gradient", "None"]),
        ("z", T(6, 4), ValueError, ["[6, 5]", "[6, 4]"]),
        ("z", T(6, 5, dtype=HALF), TypeError, ["float32", "float16"]),
        ("z", None, ValueError, ["gradient", "None"]),
        ("bias", None, ValueError, ["gradient", "None"]),
        ("scales[1]", None, ValueError, ["gradient", "None"]),
        ("needs", [True] * 8, ValueError, ["9", "8"]),
    ],
    "ewc_penalty": [
        *ADAPTERS,
        ("fishers", [T(4, 5)], ValueError, ["1", "2"]),
        ("fishers", [], ValueError, ["at least one"]),
        ("fishers[1]", T(5, 3), ValueError, ["[3, 5]", "[5, 3]"]),
        ("fishers[1]", T(3, 5, 1), ValueError, ["matrix", "[3, 5, 1]"]),
        ("fishers[1]", T(3, 5, dtype=HALF), TypeError, ["float32", "float16"]),
        ("fishers[1]", T(3, 5, dtype=DOUBLE), TypeError, ["float32", "float64"]),
        ("fishers[1]", T(3, 5, device=META), ValueError, ["device", "meta"]),
        ("needs", [True] * 2, ValueError, ["3", "2"]),
    ],
    "ewc_penalty in 8 bits": [
        *ADAPTERS,
        ("fishers[1]", T(3, 32, dtype=BYTE), ValueError, ["[3, 48]", "[3, 32]"]),
        ("fishers[1]", T(4, 48, dtype=BYTE), ValueError, ["[3, 48]", "[4, 48]"]),
        ("fishers[1]", T(144, dtype=BYTE), ValueError, ["matrix", "[144]"]),
        ("fishers[1]", T(3, 96, dtype=BYTE)[:, ::2], ValueError, ["contiguous rows", "96, 2"]),
        ("fishers[1]", T(3, 56, dtype=BYTE)[:, :48], ValueError, ["contiguous rows", "56, 1"]),
        ("fishers[1]", T(3, 48, dtype=BYTE, device=META), ValueError, ["device", "meta"]),
    ],
    "factored_penalty": [
        *ADAPTERS,
        ("fishers", [T(4), T(3), T(5)], ValueError, ["two", "3"]),
        ("fishers", [], ValueError, ["two", "0"]),
        ("fishers[1]", T(4), ValueError, ["[3]", "[4]"]),
        ("fishers[3]", T(4), ValueError, ["[5]", "[4]"]),
        ("fishers[1]", T(3, 1), ValueError, ["[3", "[3, 1]"]),
        ("fishers[3]", T(5, dtype=HALF), TypeError, ["float32", "float16"]),
        ("fishers[3]", T(5, dtype=DOUBLE), TypeError, ["float32", "float64"]),
        ("fishers[1]", T(3, device=META), ValueError, ["device", "meta"]),
        ("needs", [True] * 2, ValueError, ["3", "2"]),
    ],
    "l1_penalty": [
        *ADAPTERS,
        ("fishers", [T(4, 5), T(3, 5)], ValueError, ["none", "2"]),
        ("needs", [True] * 2, ValueError, ["3", "2"]),
    ],
    "fisher_sums_": [
        ("rows", T(5), ValueError, ["[7]", "[5]"]),
        ("columns", T(7), ValueError, ["[5]", "[7]"]),
        ("columns", T(5, 1), ValueError, ["[5]", "[5, 1]"]),
        ("rows", T(7, dtype=HALF), TypeError, ["float32", "float16"]),
        ("rows", T(7, device=META), ValueError, ["device", "meta"]),
        ("dy", T(3, 6, 7), ValueError, ["[3, 4, 5]", "[3, 6, 7]"]),
        ("squares", "mean", ValueError, ["sample", "'mean'"]),
    ],
    "fisher_accumulate_": [
        ("fisher", T(5, 7), ValueError, ["[7, 5]", "[5, 7]"]),
        ("fisher", T(35), ValueError, ["matrix", "[35]"]),
        ("fisher", T(7, 5, dtype=HALF), TypeError, ["float32", "float16"]),
        ("fisher", T(7, 5, device=META), ValueError, ["device", "meta"]),
        ("x", T(12, 5, dtype=INT), TypeError, ["float", "int32"]),
        ("x", T(1, 3, 4, 5), ValueError, ["2 or 3", "[1, 3, 4, 5]"]),
        ("x", T(5), ValueError, ["2 or 3", "[5]"]),
        ("dy", T(3, 6, 7), ValueError, ["[3, 4, 5]", "[3, 6, 7]"]),
        ("dy", T(12, 7), ValueError, ["[3, 4, 5]", "[12, 7]"]),
        ("dy", T(3, 4, 7, dtype=HALF), TypeError, ["float32", "float16"]),
        ("dy", T(3, 4, 7, device=META), ValueError, ["device", "meta"]),
        ("squares", "mean", ValueError, ["sample", "'mean'"]),
    ],
    "fisher_accumulate_ packed": [
        ("cu_seqlens", T(3), TypeError, ["int64", "float32"]),
        ("cu_seqlens", torch.tensor([[0, 2, 6]]), ValueError, ["[N + 1]", "[1, 3]"]),
        ("cu_seqlens", torch.zeros(3, dtype=INT, device=META), ValueError, ["device", "meta"]),
        ("squares", "batch", ValueError, ["cu_seqlens: ", "'batch'"]),
        ("x", T(2, 3, 5), ValueError, ["2 dimensions", "[2, 3, 5]"]),
    ],
    "merge_": [
        *ADAPTERS,
        ("weights[1]", T(5, 3), ValueError, ["[3, 5]", "[5, 3]"]),
        ("weights[1]", T(15), ValueError, ["matrix", "[15]"]),
        ("weights[1]", T(3, 5, dtype=INT), TypeError, ["float", "int32"]),
        ("weights[1]", T(3, 5, device=META), ValueError, ["device", "meta"]),
    ],
    "soft_threshold_": [
        ("scales[1]", T(2, dtype=INT), TypeError, ["float", "int32"]),
        ("scales[1]", T(2, device=META), ValueError, ["device", "meta"]),
    ],
}  # fmt: skip
CASES = [
    (case, backend)
    for case in GOOD
    for backend in BACKENDS
    if not (case.endswith("8 bits") and not reads(backend, "8 bits"))
]
# In Python a check of every adapter takes as long as preparing a launch: Triton's LoRA linear, which every
# layer of a step calls, relies on the checks of `functional`.
CHECKED = [
    (case, backend) for case, backend in CASES if not (backend == "triton" and case.startswith("lora_linear"))
]
WRONG = [(case, backend, *row) for case, backend in CHECKED for row in TABLE[case]]


def implementations(case: str, backend: str) -> list[Callable[..., Any]]:
    """What a backend runs an op by; Triton's "full" is never chosen for a call with dropout."""
    op = case.partition(" ")[0]
    return [c.run for c in candidates(op) if c.backend == backend and c.keys != ("full",)]


def tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from tensors(argument)


def there(value: Any, device: str) -> Any:
    """`value` on the device of a backend; a device that is wrong stays wrong."""
    if isinstance(value, list):
        return [there(entry, device) for entry in value]
    return value.to(device) if isinstance(value, Tensor) and not value.is_meta else value


def spoiled(case: str, argument: str, value: Any, device: str) -> list[Any]:
    """The right arguments, but for `argument` ("x", or an entry "scales[1]")."""
    arguments = GOOD[case]()
    name, _, entry = argument.removesuffix("]").partition("[")
    if entry:
        arguments[name][int(entry)] = value
    else:
        arguments[name] = value
    return there(list(arguments.values()), device)


@pytest.mark.parametrize(("case", "backend"), CASES)
def test_right_arguments_are_served(case: str, backend: str) -> None:
    for run in implementations(case, backend):
        result = run(*there(list(GOOD[case]().values()), device_of(backend)))
        returned = tensors([result] if isinstance(result, Tensor) else result or [])
        assert all(t.isfinite().all() for t in returned)


@pytest.mark.parametrize(
    ("case", "backend", "argument", "value", "error", "words"),
    WRONG,
    ids=[f"{case}-{backend}-{i}-{argument}" for i, (case, backend, argument, *_) in enumerate(WRONG)],
)
def test_error_class(
    case: str, backend: str, argument: str, value: Any, error: type[Exception], words: list[str]
) -> None:
    """A wrong argument raises one kind of error."""
    for run in implementations(case, backend):
        arguments = spoiled(case, argument, value, device_of(backend))
        before = [t.clone() for t in tensors(arguments)]
        with pytest.raises(error) as caught:
            run(*arguments)
        message = str(caught.value)
        assert argument.partition("[")[0] in message and ": expected " in message
        assert all(word in message for word in words), message
        after = list(tensors(arguments))
        assert all(t.is_meta or torch.equal(t, b) for t, b in zip(after, before, strict=True))
