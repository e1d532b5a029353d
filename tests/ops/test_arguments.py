# SPDX-License-Identifier: Apache-2.0
"""Every wrong argument raises the promised error, which names it and says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError, BackendError, DtypeError, EWCLoRAError

T = torch.zeros
HALF, DOUBLE, INT = torch.float16, torch.float64, torch.int64
DROPPING = {"dropout_p": 0.5, "training": True}


def lora_linear(**changed: Any) -> Any:
    good = {"x": T(3, 5), "weight": T(7, 5), "bias": T(7), "lora_a": T(2, 5), "lora_b": T(7, 2), "scale": 1.0}
    return FE.lora_linear(**{**good, **changed})


def slices(*adapters: Any, **changed: Any) -> Any:
    return FE.lora_linear_slices(
        **{"x": T(3, 5), "weight": T(7, 5), "bias": None, "slices": adapters, **changed}
    )


def penalty(**changed: Any) -> Any:
    good = {"fishers": [T(7, 5)], "lora_as": [T(2, 5)], "lora_bs": [T(7, 2)], "scales": [1.0]}
    return FE.ewc_penalty(**{**good, **changed})


def penalty_grad(**changed: Any) -> Any:
    good = {"fishers": [T(7, 5)], "lora_as": [T(2, 5)], "lora_bs": [T(7, 2)], "scales": [1.0]}
    return FE.ewc_penalty_grad_(**{**good, **changed})


def fisher(**changed: Any) -> Any:
    return FE.fisher_accumulate_(**{"fisher": T(7, 5), "x": T(3, 4, 5), "dy": T(3, 4, 7), **changed})


def packed(cu_seqlens: Any, **changed: Any) -> Any:
    return fisher(**{"x": T(6, 5), "dy": T(6, 7), "cu_seqlens": cu_seqlens, **changed})


def merge(**changed: Any) -> Any:
    return FE.merge_(**{"weight": T(7, 5), "lora_a": T(2, 5), "lora_b": T(7, 2), "scale": 1.0, **changed})


def soft_threshold(**changed: Any) -> Any:
    return FE.soft_threshold_(**{"scale": T(3), "kappa": 0.1, **changed})


A, B = T(2, 5), T(7, 2)
META = torch.device("meta")
Row = tuple[Callable[..., Any], dict[str, Any], type[EWCLoRAError], list[str]]

# operation, what is wrong, the error, words of its message (first the argument's name)
TABLE: list[Row] = [
    (lora_linear, {"scale": float("nan")}, ArgumentError, ["scale:", "finite", "nan"]),
    (penalty, {"scales": [float("inf")]}, ArgumentError, ["scale[0]:", "finite", "inf"]),
    (penalty, {"ewc_lambda": float("nan")}, ArgumentError, ["ewc_lambda:", "finite", "nan"]),
    (penalty_grad, {"ewc_lambda": float("inf")}, ArgumentError, ["ewc_lambda:", "finite", "inf"]),
    (penalty, {"ewc_lambda": 1e39}, ArgumentError, ["ewc_lambda:", "finite", "3.403e+38", "1e+39"]),
    (penalty_grad, {"ewc_lambda": -1e39}, ArgumentError, ["ewc_lambda:", "finite", "-1e+39"]),
    (penalty_grad, {"grad_scale": math.nan}, ArgumentError, ["grad_scale:", "finite", "nan"]),
    (penalty, {"scales": [1e39]}, ArgumentError, ["scale[0]:", "finite", "1e+39"]),
    (lora_linear, {"scale": 1e39}, ArgumentError, ["scale:", "finite", "1e+39"]),
    (merge, {"scale": 1e39}, ArgumentError, ["scale:", "finite", "1e+39"]),
    (fisher, {"weight": 1e39}, ArgumentError, ["weight:", "finite", "1e+39"]),
    (fisher, {"weight": float("nan")}, ArgumentError, ["weight:", "finite", "nan"]),
    (lora_linear, {"x": [1.0]}, DtypeError, ["x:", "tensor", "list"]),
    (lora_linear, {"x": T(3, 5, dtype=INT)}, DtypeError, ["x:", "floating-point", "int64"]),
    (lora_linear, {"x": T(3, 5, dtype=torch.complex64)}, DtypeError, ["x:", "floating-point", "complex64"]),
    (lora_linear, {"x": T(3, 6)}, ArgumentError, ["x:", "5", "[3, 6]"]),
    (lora_linear, {"x": T(())}, ArgumentError, ["x:", "5", "[]"]),
    (lora_linear, {"weight": [1.0]}, DtypeError, ["weight:", "tensor", "list"]),
    (lora_linear, {"weight": T(())}, ArgumentError, ["weight:", "matrix", "[]"]),
    (lora_linear, {"weight": T(7, 5, 1)}, ArgumentError, ["weight:", "matrix", "[7, 5, 1]"]),
    (lora_linear, {"weight": T(7, 5, dtype=HALF)}, DtypeError, ["weight:", "float32", "float16"]),
    (lora_linear, {"weight": T(7, 5, device=META)}, ArgumentError, ["weight:", "cpu", "meta"]),
    (lora_linear, {"bias": 1.0}, DtypeError, ["bias:", "tensor", "float"]),
    (lora_linear, {"bias": T(6)}, ArgumentError, ["bias:", "[7]", "[6]"]),
    (lora_linear, {"bias": T(7, 1)}, ArgumentError, ["bias:", "[7]", "[7, 1]"]),
    (lora_linear, {"bias": T(7, dtype=HALF)}, DtypeError, ["bias:", "float32", "float16"]),
    (lora_linear, {"bias": T(7, device=META)}, ArgumentError, ["bias:", "cpu", "meta"]),
    (lora_linear, {"lora_a": None}, DtypeError, ["lora_a:", "tensor", "NoneType"]),
    (lora_linear, {"lora_a": T(5)}, ArgumentError, ["lora_a:", "matrix", "[5]"]),
    (lora_linear, {"lora_a": T(2, 6)}, ArgumentError, ["lora_a:", "5", "6"]),
    (lora_linear, {"lora_a": T(0, 5), "lora_b": T(7, 0)},
     ArgumentError, ["lora_a:", "rank", ">= 1", "[0, 5]"]),
    (lora_linear, {"lora_a": T(2, 5, dtype=HALF)}, DtypeError, ["lora_a:", "float32", "float16"]),
    (lora_linear, {"lora_a": T(2, 5, dtype=DOUBLE)}, DtypeError, ["lora_a:", "float32", "float64"]),
    (lora_linear, {"lora_a": T(2, 5, device=META)}, ArgumentError, ["lora_a:", "cpu", "meta"]),
    (lora_linear, {"lora_b": T(7, 3)}, ArgumentError, ["lora_b:", "2", "[7, 3]"]),
    (lora_linear, {"lora_b": T(6, 2)}, ArgumentError, ["lora_b:", "7", "6"]),
    (lora_linear, {"lora_b": T(7, 2, dtype=INT)}, DtypeError, ["lora_b:", "floating-point", "int64"]),
    (lora_linear, {"scale": "1"}, DtypeError, ["scale:", "number", "str"]),
    (lora_linear, {"scale": T(3)}, ArgumentError, ["scale:", "[2]", "[3]"]),
    (lora_linear, {"scale": T(2, 1)}, ArgumentError, ["scale:", "[2]", "[2, 1]"]),
    (lora_linear, {"scale": T(2, dtype=HALF)}, DtypeError, ["scale:", "float32", "float16"]),
    (lora_linear, {"dropout_p": 1.5}, ArgumentError, ["dropout_p:", "[0, 1]", "1.5"]),
    (lora_linear, {"dropout_p": -0.1}, ArgumentError, ["dropout_p:", "[0, 1]", "-0.1"]),
    (lora_linear, {"dropout_p": math.nan}, ArgumentError, ["dropout_p:", "[0, 1]", "nan"]),
    (lora_linear, {**DROPPING, "seed": T(())}, DtypeError, ["seed:", "int64", "float32"]),
    (lora_linear, {**DROPPING, "seed": T(2, dtype=INT)}, DtypeError, ["seed:", "one", "[2]"]),
    (lora_linear, {**DROPPING, "seed": 1.5}, DtypeError, ["seed:", "int", "float"]),
    (lora_linear, {**DROPPING, "seed": 2**63}, ArgumentError, ["seed:", "64", str(2**63)]),
    (lora_linear, {"backend": "rocm"}, ArgumentError, ["backend:", "reference", "'rocm'"]),
    (slices, {"slices": []}, ArgumentError, ["adapters:", "at least one", "none"]),
    (slices, {"slices": [(0, 8, A, T(8, 2), 1.0)]}, ArgumentError, ["rows:", "7", "(0, 8)"]),
    (slices, {"slices": [(-1, 2, A, T(3, 2), 1.0)]}, ArgumentError, ["rows:", "0 <= start", "(-1, 2)"]),
    (slices, {"slices": [(3, 3, A, T(0, 2), 1.0)]}, ArgumentError, ["rows:", "start < stop", "(3, 3)"]),
    (slices, {"slices": [(0, 3, A, T(2, 2), 1.0)]}, ArgumentError, ["lora_b:", "3", "2"]),
    (slices, {"slices": [(0, 3, A, T(3, 2), 1.0), (2, 4, A, T(2, 2), 1.0)]},
     ArgumentError, ["rows:", "disjoint", "2"]),
    (
        slices,
        {"slices": [(0, 3, A, T(3, 2), 1.0), (3, 4, A, T(1, 3), 1.0)]},
        ArgumentError,
        ["lora_b of adapter 1:", "2 columns", "[1, 3]"],
    ),
    (penalty, {"lora_as": []}, ArgumentError, ["lora_as:", "1", "0"]),
    (penalty, {"lora_bs": [B, B]}, ArgumentError, ["lora_bs:", "1", "2"]),
    (penalty, {"scales": []}, ArgumentError, ["scales:", "1", "0"]),
    (penalty, {"fishers": [T(5, 7)]}, ArgumentError, ["fishers[0]:", "[7, 5]", "[5, 7]"]),
    (penalty, {"fishers": [T(35)]}, ArgumentError, ["fishers[0]:", "matrix", "[35]"]),
    (penalty, {"fishers": [T(7, 5, dtype=HALF)]}, DtypeError, ["fishers[0]:", "float32", "float16"]),
    (penalty, {"fishers": [T(7, 5, dtype=DOUBLE)]}, DtypeError, ["fishers[0]:", "float32", "float64"]),
    (penalty, {"fishers": [T(7, 5, device=META)]}, ArgumentError, ["fishers[0]:", "cpu", "meta"]),
    (penalty, {"lora_as": [T(5)]}, ArgumentError, ["lora_a[0]:", "matrix", "[5]"]),
    (penalty, {"lora_bs": [T(7, 3)]}, ArgumentError, ["lora_b[0]:", "2", "[7, 3]"]),
    (penalty, {"lora_bs": [T(7, 2, dtype=HALF)]}, DtypeError, ["lora_b[0]:", "float32", "float16"]),
    (penalty, {"scales": [T(3)]}, ArgumentError, ["scale[0]:", "[2]", "[3]"]),
    (penalty, {"backend": "rocm"}, ArgumentError, ["backend:", "reference", "'rocm'"]),
    (
        penalty,
        {"fishers": [T(7, 5)] * 2, "lora_as": [A, A.bfloat16()], "lora_bs": [B, B], "scales": None},
        DtypeError,
        ["lora_as[1]:", "float32", "bfloat16"],
    ),
    (penalty_grad, {"fishers": [T(5, 7)]}, ArgumentError, ["fishers[0]:", "[7, 5]", "[5, 7]"]),
    (penalty_grad, {"scales": ["x"]}, DtypeError, ["scale[0]:", "number", "str"]),
    (fisher, {"mode": "mean"}, ArgumentError, ["mode:", "sample", "'mean'"]),
    (fisher, {"fisher": T(5, 7)}, ArgumentError, ["fisher:", "[7, 5]", "[5, 7]"]),
    (fisher, {"fisher": T(7, 5, dtype=HALF)}, DtypeError, ["fisher:", "float32", "float16"]),
    (fisher, {"fisher": T(7, 5, device=META)}, ArgumentError, ["fisher:", "cpu", "meta"]),
    (fisher, {"x": T(3, 4, 5, dtype=INT)}, DtypeError, ["x:", "floating-point", "int64"]),
    (fisher, {"dy": T(3, 4, 7, dtype=HALF)}, DtypeError, ["dy:", "float32", "float16"]),
    (fisher, {"dy": T(3, 4, 7, device=META)}, ArgumentError, ["dy:", "cpu", "meta"]),
    (fisher, {"dy": T(3, 6, 7)}, ArgumentError, ["dy:", "[3, 4]", "[3, 6, 7]"]),
    (fisher, {"dy": T(12, 7)}, ArgumentError, ["dy:", "[3, 4]", "[12, 7]"]),
    (fisher, {"x": T(5), "dy": T(7)}, ArgumentError, ["x", "2 or 3", "[5]"]),
    (fisher, {"x": T(1, 3, 4, 5), "dy": T(1, 3, 4, 7)}, ArgumentError, ["x", "2 or 3", "[1, 3, 4, 5]"]),
    (fisher, {"backend": "rocm"}, ArgumentError, ["backend:", "reference", "'rocm'"]),
    (packed, {"cu_seqlens": [0, 6]}, DtypeError, ["cu_seqlens:", "int64", "list"]),
    (packed, {"cu_seqlens": T(2)}, DtypeError, ["cu_seqlens:", "int64", "float32"]),
    (packed, {"cu_seqlens": T(2, 1, dtype=INT)}, DtypeError, ["cu_seqlens:", "[N + 1]", "[2, 1]"]),
    (packed, {"cu_seqlens": torch.tensor([1, 6])}, ArgumentError, ["cu_seqlens:", "0 to 6", "[1, 6]"]),
    (packed, {"cu_seqlens": torch.tensor([0, 5])}, ArgumentError, ["cu_seqlens:", "0 to 6", "[0, 5]"]),
    (packed, {"cu_seqlens": torch.tensor([0, 9, 6])}, ArgumentError, ["cu_seqlens:", "rising", "[0, 9, 6]"]),
    (packed, {"cu_seqlens": T(0, dtype=INT)}, ArgumentError, ["cu_seqlens:", "0 to 6", "[]"]),
    (packed, {"cu_seqlens": torch.tensor([0, 6]), "mode": "batch"},
     ArgumentError, ["cu_seqlens:", "None", "batch"]),
    (packed, {"cu_seqlens": torch.tensor([0, 3]), "x": T(1, 3, 5), "dy": T(1, 3, 7)},
     ArgumentError, ["x", "2", "[1, 3, 5]"]),
    (merge, {"weight": T(35)}, ArgumentError, ["weight:", "matrix", "[35]"]),
    (merge, {"weight": T(5, 7)}, ArgumentError, ["weight:", "[7, 5]", "[5, 7]"]),
    (merge, {"weight": T(7, 5, dtype=INT)}, DtypeError, ["weight:", "floating-point", "int64"]),
    (merge, {"lora_a": T(2, 5, dtype=DOUBLE)}, DtypeError, ["lora_a:", "float32", "float64"]),
    (merge, {"lora_b": T(7, 3)}, ArgumentError, ["lora_b:", "2", "[7, 3]"]),
    (merge, {"scale": math.nan}, ArgumentError, ["scale:", "finite", "nan"]),
    (merge, {"scale": T(3)}, ArgumentError, ["scale:", "[2]", "[3]"]),
    (merge, {"backend": "rocm"}, ArgumentError, ["backend:", "reference", "'rocm'"]),
    (soft_threshold, {"scale": 1.0}, DtypeError, ["scale:", "tensor", "float"]),
    (soft_threshold, {"scale": T(3, dtype=INT)}, DtypeError, ["scale:", "floating-point", "int64"]),
    (soft_threshold, {"kappa": -1.0}, ArgumentError, ["kappa:", ">= 0", "-1.0"]),
    (soft_threshold, {"kappa": math.nan}, ArgumentError, ["kappa:", ">= 0", "nan"]),
    (soft_threshold, {"backend": "rocm"}, ArgumentError, ["backend:", "reference", "'rocm'"]),
    (merge, {"weight": T(1, 5).expand(7, 5)}, ArgumentError, ["weight:", "memory of their own", "(0, 1)"]),
    (merge, {"weight": T(20).as_strided((7, 5), (2, 1))}, ArgumentError, ["weight:", "(2, 1)"]),
    (fisher, {"fisher": T(7, 1).expand(7, 5)}, ArgumentError, ["fisher:", "memory of their own", "(1, 0)"]),
    (soft_threshold, {"scale": T(1).expand(3)}, ArgumentError, ["scale:", "memory of their own", "(0,)"]),
    (soft_threshold, {"scale": [T(3), T(1).expand(3)]}, ArgumentError, ["scale[1]:", "(0,)"]),
]  # fmt: skip


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def identity(row: Row) -> str:
    return f"{row[0].__name__}-{'+'.join(row[1])}-{row[3][-1]}"


@pytest.mark.parametrize(("operation", "wrong", "error", "words"), TABLE, ids=map(identity, TABLE))
def test_wrong_named(operation, wrong, error, words):
    """Wrong arguments raise and are named."""
    given = [t for value in wrong.values() for t in tensors_in(value) if t.device.type == "cpu"]
    before = [t.clone() for t in given]
    with pytest.raises(EWCLoRAError) as caught:
        operation(**wrong)
    message = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {message}"
    missing = [word for word in words if word not in message]
    assert not missing and message.startswith(words[0]), f"{missing} not in: {message}"
    assert all(map(torch.equal, given, before))


def test_interlocked_strides():
    """Strides that no operation makes are looked at: elements that do not meet are written as any others."""
    apart = torch.zeros(20).as_strided((3, 2), (2, 3))
    assert torch.equal(FE.merge_(apart, torch.ones(1, 2), torch.ones(3, 1)), torch.ones(3, 2))


SHARED = torch.zeros(200)


@pytest.mark.parametrize(
    ("operation", "wrong", "words"),
    [
        (merge, {"weight": SHARED[:35].view(7, 5), "lora_b": SHARED[30:44].view(7, 2)},
         ["weight:", "lora_b"]),
        (merge, {"weight": SHARED[:35].view(7, 5), "scale": SHARED[4]}, ["weight:", "scale"]),
        (merge, {"weight": [T(7, 5), SHARED[:35].view(7, 5)], "lora_a": [SHARED[:10].view(2, 5), A],
                 "lora_b": [B, B]}, ["weight[1]:", "lora_a[0]"]),
        (fisher, {"fisher": SHARED[:35].view(7, 5), "x": SHARED[20:80].view(3, 4, 5)}, ["fisher:", "x"]),
        (fisher, {"fisher": SHARED[:35].view(7, 5), "dy": SHARED[:84].view(3, 4, 7)}, ["fisher:", "dy"]),
    ],
)  # fmt: skip
def test_read_while_written(operation, wrong, words):
    """A target that shares elements with what is read is refused, by name."""
    with pytest.raises(ArgumentError) as caught:
        operation(**wrong)
    message = str(caught.value)
    assert message.startswith(words[0]) and f"of {words[1]}," in message and "share" in message


def test_neighbours_in_memory():
    """Tensors may lie side by side, or interleaved, in one storage."""
    memory = torch.zeros(7, 12)
    weight, b = memory[:, :5], memory[:, 6:8].fill_(1.0)
    assert torch.equal(FE.merge_(weight, torch.ones(2, 5), b), torch.full((7, 5), 2.0))
    assert memory[:, 5].eq(0).all() and memory[:, 8:].eq(0).all() and b.eq(1).all()


def test_expanded_grad():
    """A gradient whose elements share memory is refused before any gradient changes."""
    a, b = T(2, 5).add(1).requires_grad_(), T(7, 2).add(1).requires_grad_()
    b.grad = T(1).expand(7, 2)
    with pytest.raises(ArgumentError, match=r"grad .*\[7, 2\].*memory of their own"):
        FE.ewc_penalty_grad_([T(7, 5).add(1)], [a], [b])
    assert a.grad is None and b.grad.eq(0).all()


def test_fp64_numbers():
    """Numbers beyond fp32 serve fp64."""
    wide = [torch.ones(shape, dtype=DOUBLE) for shape in ((7, 5), (2, 5), (7, 2))]
    assert FE.ewc_penalty(*([t] for t in wide), ewc_lambda=1e39).item() == pytest.approx(0.5e39 * 35 * 4)


@pytest.mark.parametrize(
    ("operation", "target"), [(fisher, "fisher"), (merge, "weight"), (soft_threshold, "scale")]
)
def test_targets_unchanged(operation, target):
    """Targets are unchanged by calls that raise."""
    tensor = torch.full((7, 5) if target != "scale" else (3,), 2.0)
    wrong = {"fisher": {"dy": T(3, 4, 6)}, "weight": {"lora_b": T(7, 3)}, "scale": {"kappa": -1.0}}[target]
    with pytest.raises(ArgumentError):
        operation(**{target: tensor}, **wrong)
    assert bool((tensor == 2.0).all())


def test_grads_unchanged():
    """Gradients are unchanged by calls that raise."""
    a, b = T(2, 5, requires_grad=True), T(7, 2, requires_grad=True)
    a.grad = torch.ones(2, 5)
    with pytest.raises(ArgumentError):
        FE.ewc_penalty_grad_([T(7, 6)], [a], [b])
    assert torch.equal(a.grad, torch.ones(2, 5)) and b.grad is None


def test_error_classes():
    """Errors are value errors and wrong types are type errors too."""
    for error in (ArgumentError, DtypeError, BackendError):
        assert issubclass(error, EWCLoRAError) and issubclass(error, ValueError)
    assert issubclass(DtypeError, TypeError) and not issubclass(ArgumentError, TypeError)
