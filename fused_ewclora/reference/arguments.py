# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of every op, for implementations in Python; csrc/arguments.h does the same in C++.

Wrong sizes, lengths and devices raise `ArgumentError`, wrong dtypes `DtypeError`; messages name the argument
of the op (see `ops.schemas`), what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError
from .adapters import by_kind, row_ranges
from .eight_bit import ALIGNMENT, row_bytes

Tensors = Sequence[Tensor]
Optionals = Sequence[Tensor | None]


def _wrong(name: str, expected: str, came: object) -> ArgumentError:
    got = f"shape {list(came.shape)}" if isinstance(came, Tensor) else came
    return ArgumentError(f"{name}: expected {expected}, got {got}")


def _matrix(tensor: Tensor, name: str) -> None:
    if tensor.dim() != 2:
        raise _wrong(name, "a matrix", tensor)


def _dtype(tensor: Tensor, name: str, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        expected = " or ".join(map(str, dict.fromkeys(allowed)))
        raise DtypeError(f"{name}: expected {expected}, got {tensor.dtype}")


def _floating(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        raise DtypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def _device(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise _wrong(name, f"device {like.device} (of {like_name})", tensor.device)


def _same(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    _device(tensor, name, like, like_name)
    _dtype(tensor, name, (like.dtype,))


def _factor(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """In the dtype of `like`, or an fp32 master beside a low-precision `like`."""
    _device(tensor, name, like, like_name)
    if tensor.dtype != like.dtype:
        _dtype(tensor, name, (like.dtype,) if like.dtype == torch.float64 else (like.dtype, torch.float32))


def _fisher(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    _matrix(tensor, name)
    _device(tensor, name, like, like_name)
    other = torch.float64 if like.dtype == torch.float64 else torch.bfloat16
    _dtype(tensor, name, (torch.float32, other))


def codes(tensor: Tensor, name: str, a: Tensor, b: Tensor) -> None:
    """A Fisher in 8 bits; its rows are read as vectors of 16 bytes."""
    _matrix(tensor, name)
    _device(tensor, name, a, "lora_as")
    if tensor.shape != (b.shape[0], row_bytes(a.shape[1])):
        expected = f"shape {[b.shape[0], row_bytes(a.shape[1])]} (8-bit codes of B A)"
        raise _wrong(name, expected, tensor)
    # Nothing that is traced has a place in memory; the op looks again when it runs.
    offset = 0 if torch.compiler.is_compiling() else tensor.storage_offset()
    apart = tensor.stride(0) % ALIGNMENT or offset % ALIGNMENT
    if tensor.numel() and (tensor.stride(1) != 1 or apart):
        raise _wrong(name, "8-bit codes with contiguous rows", f"strides {tensor.stride()}")


def factor_of_fisher(
    tensor: Tensor, name: str, size: int, square: bool, like: Tensor, like_name: str
) -> None:
    """The sums `[size]`, or the factor `[size, size]`, of a structured Fisher: fp32, or fp64 beside fp64."""
    expected = [size, size] if square else [size]
    if list(tensor.shape) != expected:
        raise _wrong(name, f"shape {expected} (beside {like_name})", tensor)
    _device(tensor, name, like, like_name)
    _dtype(tensor, name, (torch.float32, *((torch.float64,) if like.dtype == torch.float64 else ())))


def _product(tensor: Tensor, name: str, a: Tensor, b: Tensor) -> None:
    if tensor.shape != (b.shape[0], a.shape[1]):
        raise _wrong(name, f"shape {[b.shape[0], a.shape[1]]} (of B A)", tensor)


def _adapter(a: Tensor, b: Tensor, scale: Tensor | None, i: int, like: Tensor, like_name: str) -> None:
    name_a, name_b, name_s = f"lora_as[{i}]", f"lora_bs[{i}]", f"scales[{i}]"
    _matrix(a, name_a)
    _matrix(b, name_b)
    rank = a.shape[0]
    if rank < 1:
        raise _wrong(name_a, "rank (rows) >= 1", a)
    if b.shape[1] != rank:
        raise _wrong(name_b, f"{rank} columns (rank of {name_a})", b)
    _factor(a, name_a, like, like_name)
    _factor(b, name_b, like, like_name)
    if scale is not None:
        if scale.shape not in ((), (rank,)):
            raise _wrong(name_s, f"a 0-d tensor or shape [{rank}]", scale)
        _factor(scale, name_s, like, like_name)


def _as_many(
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    scale_factors: Sequence[float],
    count: int,
    other: str,
) -> None:
    lists = {"lora_as": lora_as, "lora_bs": lora_bs, "scales": scales, "scale_factors": scale_factors}
    for name, values in lists.items():
        if len(values) != count:
            raise _wrong(name, f"{count} entries, as in {other}", len(values))


def _layer(
    like: Tensor,
    like_name: str,
    weight: Tensor,
    bias: Tensor | None,
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    scale_factors: Sequence[float],
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
        if bias.shape != (d_out,):
            raise _wrong("bias", f"shape [{d_out}] (rows of weight)", bias)
        _same(bias, "bias", like, like_name)
    if not lora_as:
        raise _wrong("lora_as", "at least one adapter", "none")
    _as_many(lora_as, lora_bs, scales, scale_factors, len(lora_as), "lora_as")
    for i, (lora_a, lora_b, scale) in enumerate(zip(lora_as, lora_bs, scales, strict=True)):
        _adapter(lora_a, lora_b, scale, i, like, like_name)
        if lora_a.shape[1] != d_in:
            raise _wrong(f"lora_as[{i}]", f"{d_in} columns (columns of weight)", lora_a)
    if len(rows) % 3 != 0:
        raise _wrong("rows", "triples (adapter, start, stop)", f"{len(rows)} numbers")
    owned = [0] * len(lora_as)
    for index, start, stop in row_ranges(rows):
        if not 0 <= index < len(owned):
            raise _wrong("rows", f"an adapter below {len(owned)}", index)
        some = start < stop or d_out == 0  # a weight without rows has one range, without rows
        if not (0 <= start <= stop <= d_out and some):
            raise _wrong("rows", f"0 <= start < stop <= {d_out} (rows of weight)", (start, stop))
        owned[index] += stop - start
    for i, (lora_b, count) in enumerate(zip(lora_bs, owned, strict=True)):
        if lora_b.shape[0] != count:
            raise _wrong(f"lora_bs[{i}]", f"{count} rows (its output rows)", lora_b)
    if seed is not None:
        _dtype(seed, "seed", (torch.int64,))
        if seed.numel() != 1:
            raise _wrong("seed", "one number", seed)
        _device(seed, "seed", like, like_name)
    elif dropout_p != 0.0:
        raise _wrong("seed", "one int64 number for dropout", None)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    scale_factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Arguments of the op `lora_linear`."""
    _layer(x, "x", weight, bias, lora_as, lora_bs, scales, scale_factors, rows, dropout_p, seed)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise _wrong("x", f"{weight.shape[1]} features (columns of weight)", x)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    scale_factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> None:
    """Arguments of the op `lora_linear_backward`."""
    _layer(dy, "dy", weight, bias, lora_as, lora_bs, scales, scale_factors, rows, dropout_p, seed)
    d_out, d_in = weight.shape
    if dy.dim() < 1 or dy.shape[-1] != d_out:
        raise _wrong("dy", f"{d_out} features (rows of weight)", dy)
    count = 3 + 3 * len(lora_as)
    if len(needs) != count:
        expected = f"{count} entries (x, weight, bias, then every A, every B, every s)"
        raise _wrong("needs", expected, len(needs))
    need_as, need_bs, need_scales = by_kind(needs[3:])
    needed = {"x": (x, needs[1] or any(need_as)), "z": (z, any(need_bs) or any(need_scales))}
    needed["bias"] = (bias, needs[2])
    needed |= {f"scales[{i}]": (scale, need_scales[i]) for i, scale in enumerate(scales)}
    for name, (tensor, need) in needed.items():
        if need and tensor is None:
            raise _wrong(name, "a tensor for the gradients that are asked for", None)
    if x is not None:
        _same(x, "x", dy, "dy")
        if x.shape != (*dy.shape[:-1], d_in):
            raise _wrong("x", f"the rows of dy {list(dy.shape)} and {d_in} features (columns of weight)", x)
    if z is not None:
        _device(z, "z", dy, "dy")
        _dtype(z, "z", (torch.float64 if dy.dtype == torch.float64 else torch.float32,))
        shape = (dy.shape[:-1].numel(), sum(a.shape[0] for a in lora_as))
        if z.shape != shape:
            raise _wrong("z", f"shape {list(shape)} (rows of dy, ranks of all adapters)", z)


def ewc_penalty(
    fishers: Tensors,
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    scale_factors: Sequence[float],
    needs: Sequence[bool],
) -> None:
    """Arguments of the op `ewc_penalty`."""
    if not fishers:
        raise _wrong("fishers", "at least one adapter", "none")
    _as_many(lora_as, lora_bs, scales, scale_factors, len(fishers), "fishers")
    if len(needs) != 3:
        raise _wrong("needs", "3 entries (A, B, s)", len(needs))
    _floating(lora_as[0], "lora_as[0]")
    for i, (fisher, a, b, scale) in enumerate(zip(fishers, lora_as, lora_bs, scales, strict=True)):
        _adapter(a, b, scale, i, a, f"lora_as[{i}]")
        _same(a, f"lora_as[{i}]", lora_as[0], "lora_as[0]")
        if fisher.dtype == torch.uint8:
            codes(fisher, f"fishers[{i}]", a, b)
            continue
        _fisher(fisher, f"fishers[{i}]", a, f"lora_as[{i}]")
        _product(fisher, f"fishers[{i}]", a, b)


def kronecker_penalty(
    fishers: Tensors,
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    scale_factors: Sequence[float],
    needs: Sequence[bool],
) -> None:
    """Arguments of the ops `factored_penalty` and `kronecker_penalty`."""
    count = len(fishers) // 2
    if not count or len(fishers) % 2:
        raise _wrong("fishers", "two entries per adapter", len(fishers))
    _as_many(lora_as, lora_bs, scales, scale_factors, count, "half of fishers")
    if len(needs) != 3:
        raise _wrong("needs", "3 entries (A, B, s)", len(needs))
    _floating(lora_as[0], "lora_as[0]")
    for i, (a, b, scale) in enumerate(zip(lora_as, lora_bs, scales, strict=True)):
        _adapter(a, b, scale, i, a, f"lora_as[{i}]")
        _same(a, f"lora_as[{i}]", lora_as[0], "lora_as[0]")
        for j, size in ((i, b.shape[0]), (count + i, a.shape[1])):
            square = fishers[j].dim() == 2
            factor_of_fisher(fishers[j], f"fishers[{j}]", size, square, a, f"lora_as[{i}]")


def l1_penalty(
    fishers: Tensors,
    lora_as: Tensors,
    lora_bs: Tensors,
    scales: Optionals,
    scale_factors: Sequence[float],
    needs: Sequence[bool],
) -> None:
    """Arguments of the op `l1_penalty`."""
    if fishers:
        raise _wrong("fishers", "none, an l1 norm has no Fisher", len(fishers))
    if not lora_as:
        raise _wrong("lora_as", "at least one adapter", "none")
    _as_many(lora_as, lora_bs, scales, scale_factors, len(lora_as), "lora_as")
    if len(needs) != 3:
        raise _wrong("needs", "3 entries (A, B, s)", len(needs))
    _floating(lora_as[0], "lora_as[0]")
    for i, (a, b, scale) in enumerate(zip(lora_as, lora_bs, scales, strict=True)):
        _adapter(a, b, scale, i, a, f"lora_as[{i}]")
        _same(a, f"lora_as[{i}]", lora_as[0], "lora_as[0]")


def fisher_accumulate(fisher: Tensor, x: Tensor, dy: Tensor, squares: str, cu_seqlens: Tensor | None) -> None:
    """Arguments of the op `fisher_accumulate_`."""
    _samples(x, dy, squares, cu_seqlens)
    _fisher(fisher, "fisher", x, "x")
    if fisher.shape != (dy.shape[-1], x.shape[-1]):
        raise _wrong("fisher", f"shape {[dy.shape[-1], x.shape[-1]]} (features of dy and x)", fisher)


def fisher_sums(
    rows: Tensor, columns: Tensor, x: Tensor, dy: Tensor, squares: str, cu_seqlens: Tensor | None
) -> None:
    """Arguments of the op `fisher_sums_`."""
    _samples(x, dy, squares, cu_seqlens)
    factor_of_fisher(rows, "rows", dy.shape[-1], False, dy, "dy")
    factor_of_fisher(columns, "columns", x.shape[-1], False, x, "x")


def _samples(x: Tensor, dy: Tensor, squares: str, cu_seqlens: Tensor | None) -> None:
    if squares not in ("sample", "batch"):
        raise _wrong("squares", "'sample' or 'batch'", repr(squares))
    _floating(x, "x")
    _same(dy, "dy", x, "x")
    if x.dim() != 2 and (x.dim() != 3 or cu_seqlens is not None):
        raise _wrong("x", f"{'2 or 3' if cu_seqlens is None else '2'} dimensions", x)
    if dy.dim() != x.dim() or dy.shape[:-1] != x.shape[:-1]:
        raise _wrong("dy", f"the leading shape of x {list(x.shape)}", dy)
    if cu_seqlens is not None:
        if squares == "batch":
            raise _wrong(
                "cu_seqlens", "None for squares 'batch', which does not tell samples apart", "a tensor"
            )
        _dtype(cu_seqlens, "cu_seqlens", (torch.int32, torch.int64))
        if cu_seqlens.dim() != 1:
            raise _wrong("cu_seqlens", "shape [N + 1]", cu_seqlens)
        _device(cu_seqlens, "cu_seqlens", x, "x")


def merge(
    weights: Tensors, lora_as: Tensors, lora_bs: Tensors, scales: Optionals, scale_factors: Sequence[float]
) -> None:
    """Arguments of the op `merge_`."""
    _as_many(lora_as, lora_bs, scales, scale_factors, len(weights), "weights")
    for i, (weight, a, b, scale) in enumerate(zip(weights, lora_as, lora_bs, scales, strict=True)):
        _floating(weight, f"weights[{i}]")
        _matrix(weight, f"weights[{i}]")
        _device(weight, f"weights[{i}]", weights[0], "weights[0]")
        _adapter(a, b, scale, i, weight, f"weights[{i}]")
        _product(weight, f"weights[{i}]", a, b)


def soft_threshold(scales: Tensors) -> None:
    """Arguments of the op `soft_threshold_`."""
    for i, scale in enumerate(scales):
        _floating(scale, f"scales[{i}]")
        _device(scale, f"scales[{i}]", scales[0], "scales[0]")
