"""Checks of the arguments of every op, for implementations in Python; csrc/arguments.h does the same in C++.

Wrong sizes, lengths and devices raise `ArgumentError`, wrong dtypes `DtypeError`; messages name the argument
of the op (see `ops.schemas`), what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError

Tensors = Sequence[Tensor]
Optionals = Sequence[Tensor | None]


def _size(right: bool, name: str, expected: str, came: object) -> None:
    if not right:
        raise ArgumentError(f"{name}: expected {expected}, got {came}")


def _shape(tensor: Tensor, name: str, expected: Sequence[int], why: str) -> None:
    _size(tensor.shape == tuple(expected), name, f"shape {list(expected)} ({why})", list(tensor.shape))


def _matrix(tensor: Tensor, name: str) -> None:
    _size(tensor.dim() == 2, name, "a matrix", f"shape {list(tensor.shape)}")


def _dtype(tensor: Tensor, name: str, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        expected = " or ".join(map(str, dict.fromkeys(allowed)))
        raise DtypeError(f"{name}: expected {expected}, got {tensor.dtype}")


def _floating(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        raise DtypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def _device(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    _size(tensor.device == like.device, name, f"device {like.device} (of {like_name})", tensor.device)


def _same(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    _device(tensor, name, like, like_name)
    _dtype(tensor, name, (like.dtype,))


def _factor(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """In the dtype of `like`, or an fp32 master beside a low-precision `like`."""
    _device(tensor, name, like, like_name)
    _dtype(tensor, name, (like.dtype,) if like.dtype == torch.float64 else (like.dtype, torch.float32))


def _fisher(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    _matrix(tensor, name)
    _device(tensor, name, like, like_name)
    other = torch.float64 if like.dtype == torch.float64 else torch.bfloat16
    _dtype(tensor, name, (torch.float32, other))


def _adapter(a: Tensor, b: Tensor, scale: Tensor | None, i: int, like: Tensor, like_name: str) -> None:
    name_a, name_b, name_s = f"lora_as[{i}]", f"lora_bs[{i}]", f"scales[{i}]"
    _matrix(a, name_a)
    _matrix(b, name_b)
    rank = a.shape[0]
    _size(rank >= 1, name_a, "rank (rows) >= 1", f"shape {list(a.shape)}")
    _size(b.shape[1] == rank, name_b, f"{rank} columns (rank of {name_a})", f"shape {list(b.shape)}")
    _factor(a, name_a, like, like_name)
    _factor(b, name_b, like, like_name)
    if scale is not None:
        _size(scale.shape in ((), (rank,)), name_s, f"a 0-d tensor or shape [{rank}]", list(scale.shape))
        _factor(scale, name_s, like, like_name)


def _as_many(
    lora_as: Tensors, lora_bs: Tensors, scales: Optionals, factors: Sequence[float], count: int, other: str
) -> None:
    lists = {"lora_as": lora_as, "lora_bs": lora_bs, "scales": scales, "factors": factors}
    for name, values in lists.items():
        _size(len(values) == count, name, f"{count} entries, as in {other}", len(values))


def _layer(
    like: Tensor,
    like_name: str,
    weight: Tensor,
    bias: Tensor | None,
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """What the forward and the backward of a LoRA linear share; `like` is x or dy."""
    _floating(like, like_name)
    _matrix(weight, "weight")
    _same(weight, "weight", like, like_name)
    d_out, d_in = weight.shape
    if bias is not None:
        _shape(bias, "bias", (d_out,), "rows of weight")
        _same(bias, "bias", like, like_name)
    _size(len(lora_as) > 0, "lora_as", "at least one adapter", "none")
    _as_many(lora_as, lora_bs, scales, factors, len(lora_as), "lora_as")
    for i, (a, b, scale) in enumerate(zip(lora_as, lora_bs, scales, strict=True)):
        _adapter(a, b, scale, i, like, like_name)
        expected = f"{d_in} columns (columns of weight)"
        _size(a.shape[1] == d_in, f"lora_as[{i}]", expected, f"shape {list(a.shape)}")
    _size(len(rows) % 3 == 0, "rows", "triples (adapter, start, stop)", f"{len(rows)} numbers")
    owned = [0] * len(lora_as)
    for index, start, stop in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        _size(0 <= index < len(owned), "rows", f"an adapter below {len(owned)}", index)
        inside = 0 <= start < stop <= d_out
        _size(inside, "rows", f"0 <= start < stop <= {d_out} (rows of weight)", (start, stop))
        owned[index] += stop - start
    for i, (b, count) in enumerate(zip(lora_bs, owned, strict=True)):
        expected = f"{count} rows (its output rows)"
        _size(b.shape[0] == count, f"lora_bs[{i}]", expected, f"shape {list(b.shape)}")
    _size(seed is not None or dropout_p == 0.0, "seed", "one int64 number for dropout", None)
    if seed is not None:
        _dtype(seed, "seed", (torch.int64,))
        _size(seed.numel() == 1, "seed", "one number", f"shape {list(seed.shape)}")
        _device(seed, "seed", like, like_name)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Arguments of the op `lora_linear`."""
    _layer(x, "x", weight, bias, lora_as, lora_bs, scales, factors, rows, dropout_p, seed)
    d_in = weight.shape[1]
    expected = f"{d_in} features (columns of weight)"
    _size(x.dim() >= 1 and x.shape[-1] == d_in, "x", expected, f"shape {list(x.shape)}")


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> None:
    """Arguments of the op `lora_linear_backward`."""
    _layer(dy, "dy", weight, bias, lora_as, lora_bs, scales, factors, rows, dropout_p, seed)
    d_out, d_in = weight.shape
    expected = f"{d_out} features (rows of weight)"
    _size(dy.dim() >= 1 and dy.shape[-1] == d_out, "dy", expected, f"shape {list(dy.shape)}")
    count = 3 + 3 * len(lora_as)
    expected = f"{count} entries (x, weight, bias, then A, B, s of each adapter)"
    _size(len(needs) == count, "needs", expected, len(needs))
    for i, (scale, need) in enumerate(zip(scales, needs[5::3], strict=True)):
        _size(scale is not None or not need, f"scales[{i}]", "a tensor for its gradient", None)
    _size(bias is not None or not needs[2], "bias", "a tensor for its gradient", None)
    need_x, need_z = needs[1] or any(needs[3::3]), any((*needs[4::3], *needs[5::3]))
    _size(x is not None or not need_x, "x", "a tensor for the gradients of weight or A", None)
    _size(z is not None or not need_z, "z", "a tensor for the gradients of B or s", None)
    if x is not None:
        _same(x, "x", dy, "dy")
        expected = f"the leading shape of dy {list(dy.shape)} and {d_in} features (columns of weight)"
        _size(x.shape == (*dy.shape[:-1], d_in), "x", expected, f"shape {list(x.shape)}")
    if z is not None:
        _device(z, "z", dy, "dy")
        _dtype(z, "z", (torch.float64 if dy.dtype == torch.float64 else torch.float32,))
        ranks = sum(a.shape[0] for a in lora_as)
        _shape(z, "z", (dy.shape[:-1].numel(), ranks), "rows of dy, ranks of all adapters")


def ewc_penalty(
    fishers: Tensors,
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    factors: Sequence[float],
    needs: Sequence[bool],
) -> None:
    """Arguments of the op `ewc_penalty`."""
    _size(len(fishers) > 0, "fishers", "at least one adapter", "none")
    _as_many(lora_as, lora_bs, scales, factors, len(fishers), "fishers")
    _size(len(needs) == 3, "needs", "3 entries (A, B, s)", len(needs))
    _floating(lora_as[0], "lora_as[0]")
    for i, (fisher, a, b, scale) in enumerate(zip(fishers, lora_as, lora_bs, scales, strict=True)):
        _adapter(a, b, scale, i, a, f"lora_as[{i}]")
        _same(a, f"lora_as[{i}]", lora_as[0], "lora_as[0]")
        _fisher(fisher, f"fishers[{i}]", a, f"lora_as[{i}]")
        _shape(fisher, f"fishers[{i}]", (b.shape[0], a.shape[1]), "of B A")


def fisher_accumulate(
    fisher: Tensor, x: Tensor, dy: Tensor, squares: str, cu_seqlens: Tensor | None
) -> None:
    """Arguments of the op `fisher_accumulate_`."""
    _size(squares in ("sample", "batch"), "squares", "'sample' or 'batch'", repr(squares))
    _floating(x, "x")
    _same(dy, "dy", x, "x")
    _fisher(fisher, "fisher", x, "x")
    dims = (2, 3) if cu_seqlens is None else (2,)
    expected = f"{' or '.join(map(str, dims))} dimensions"
    _size(x.dim() in dims, "x", expected, f"shape {list(x.shape)}")
    expected = f"the leading shape of x {list(x.shape)}"
    _size(
        dy.dim() == x.dim() and dy.shape[:-1] == x.shape[:-1], "dy", expected, f"shape {list(dy.shape)}"
    )
    _shape(fisher, "fisher", (dy.shape[-1], x.shape[-1]), "features of dy and x")
    if cu_seqlens is not None:
        expected = "None for squares 'batch', which does not tell samples apart"
        _size(squares == "sample", "cu_seqlens", expected, "a tensor")
        _dtype(cu_seqlens, "cu_seqlens", (torch.int32, torch.int64))
        _size(cu_seqlens.dim() == 1, "cu_seqlens", "shape [N + 1]", list(cu_seqlens.shape))
        _device(cu_seqlens, "cu_seqlens", x, "x")


def merge(
    weights: Tensors, lora_as: Tensors, lora_bs: Tensors, scales: Optionals, factors: Sequence[float]
) -> None:
    """Arguments of the op `merge_`."""
    _as_many(lora_as, lora_bs, scales, factors, len(weights), "weights")
    for i, (weight, a, b, scale) in enumerate(zip(weights, lora_as, lora_bs, scales, strict=True)):
        _floating(weight, f"weights[{i}]")
        _matrix(weight, f"weights[{i}]")
        _device(weight, f"weights[{i}]", weights[0], "weights[0]")
        _adapter(a, b, scale, i, weight, f"weights[{i}]")
        _shape(weight, f"weights[{i}]", (b.shape[0], a.shape[1]), "of B A")


def soft_threshold(scales: Tensors) -> None:
    """Arguments of the op `soft_threshold_`."""
    for i, scale in enumerate(scales):
        _floating(scale, f"scales[{i}]")
        _device(scale, f"scales[{i}]", scales[0], "scales[0]")
