# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the public operations: errors name the argument, what was expected and what came."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import ArgumentError, DtypeError
from ..fishers import FactoredFisher, KroneckerFisher
from ..reference import arguments
from . import dispatch, schemas
from .adapters import Adapter, Scale, row_ranges
from .capture import MODES
from .windows import Geometry

_SHORT = (torch.float16, torch.bfloat16)
_LARGEST = torch.finfo(torch.float32).max


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def writes(op: str) -> None:
    """Outside of transforms, which cannot follow what is written in place."""
    if schemas.is_transformed():
        raise ArgumentError(
            f"{op}: expected a call outside of torch.func transforms, forward-mode differentiation and "
            "torch.jit.trace, which cannot follow what it writes in place, got one inside"
        )


def floating(tensor: Tensor, name: str) -> None:
    """A real floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise DtypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def finite(tensor: Tensor, name: str) -> None:
    """No NaN, no Inf. The extremes tell, in one pass and without masks as large as the tensor."""
    if tensor.numel() and not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ArgumentError(
            f"{name}: expected finite values, got {bad} NaN or Inf of {tensor.numel()}; nothing was changed"
        )


def number(value: float, name: str, dtype: torch.dtype = torch.float32) -> None:
    """A number that is finite where it is used, in fp64 beside `dtype` fp64, else in fp32: NaN or Inf would
    silently spread to every result."""
    largest = sys.float_info.max if dtype == torch.float64 else _LARGEST
    # A comparison: torch.compile traces it for a number that varies between calls, unlike math.isfinite.
    if not -largest <= value <= largest:
        raise ArgumentError(f"{name}: expected a finite number of at most {largest:.4g} in size, got {value}")


def matrix(tensor: Tensor, name: str) -> None:
    """A real floating-point matrix."""
    floating(tensor, name)
    if tensor.dim() != 2:
        raise ArgumentError(f"{name}: expected a matrix, got shape {_shape(tensor)}")


def _same(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if tensor.device != other.device:
        raise ArgumentError(f"{name}: expected device {other.device} (of {other_name}), got {tensor.device}")
    if tensor.dtype != other.dtype:
        raise DtypeError(f"{name}: expected {other.dtype} (of {other_name}), got {tensor.dtype}")


def _factors(lora_a: Tensor, lora_b: Tensor, scale: Scale, where: str, like: Tensor, like_name: str) -> None:
    """Shapes of one adapter, and dtypes: that of `like`, or fp32 masters beside a low-precision `like`."""
    matrix(lora_a, f"lora_a{where}")
    matrix(lora_b, f"lora_b{where}")
    rank = lora_a.shape[0]
    if rank < 1:
        raise ArgumentError(f"lora_a{where}: expected rank (rows) >= 1, got shape {_shape(lora_a)}")
    if lora_b.shape[1] != rank:
        raise ArgumentError(
            f"lora_b{where}: expected {rank} columns (rank of lora_a), got shape {_shape(lora_b)}"
        )
    tensors = [(f"lora_a{where}", lora_a), (f"lora_b{where}", lora_b)]
    if isinstance(scale, Tensor):
        floating(scale, f"scale{where}")
        if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != rank):
            raise ArgumentError(f"scale{where}: expected a 0-d tensor or shape [{rank}], got {_shape(scale)}")
        tensors.append((f"scale{where}", scale))
    elif not isinstance(scale, (int, float)):
        raise DtypeError(f"scale{where}: expected a number or a tensor, got {type(scale).__name__}")
    else:
        number(scale, f"scale{where}", like.dtype)
    allowed = (like.dtype,) if like.dtype == torch.float64 else (like.dtype, torch.float32)
    for name, tensor in tensors:
        if tensor.device != like.device:
            raise ArgumentError(
                f"{name}: expected device {like.device} (of {like_name}), got {tensor.device}"
            )
        if tensor.dtype not in allowed:
            expected = " or ".join(map(str, dict.fromkeys(allowed)))
            raise DtypeError(
                f"{name}: expected {expected} beside {like_name} in {like.dtype}, got {tensor.dtype}"
            )


def autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Adapter]]:
    """Inputs of the base product in autocast's dtype when autocast is on for their device, as `F.linear`
    would have them; adapters in another 16-bit dtype become fp32, which loses nothing."""
    if not isinstance(x, Tensor) or x.is_meta or x.dtype == torch.float64:
        return x, weight, bias, adapters
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias, adapters
    dtype = torch.get_autocast_dtype(x.device.type)
    adapters = [
        Adapter(_widened(a, dtype), _widened(b, dtype), _widened(s, dtype), rows)  # type: ignore[arg-type]
        for a, b, s, rows in adapters
    ]
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), adapters


def _widened(value: Scale, dtype: torch.dtype) -> Scale:
    """A factor or scale in fp32 when it has the other 16-bit dtype than autocast."""
    other = isinstance(value, Tensor) and value.dtype in _SHORT and value.dtype != dtype
    return value.float() if other else value  # type: ignore[union-attr]


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], dropout_p: float
) -> list[int]:
    """Everything about a LoRA linear; returns the `rows` of the ops."""
    floating(x, "x")
    matrix(weight, "weight")
    _same(weight, "weight", x, "x")
    d_out, d_in = weight.shape
    if x.is_nested:
        raise ArgumentError("x: expected a padded tensor, got a nested one")
    if x.dim() < 1 or x.shape[-1] != d_in:
        raise ArgumentError(f"x: expected {d_in} features (columns of weight), got shape {_shape(x)}")
    if bias is not None:
        floating(bias, "bias")
        _same(bias, "bias", x, "x")
        if bias.shape != (d_out,):
            raise ArgumentError(f"bias: expected shape [{d_out}] (rows of weight), got {_shape(bias)}")
    _dropout(dropout_p)
    if not adapters:
        raise ArgumentError("adapters: expected at least one, got none")
    return _adapters(adapters, x, d_in, d_out)


def add_low_rank(
    y: Tensor, x: Tensor, adapters: Sequence[Adapter], residual: Tensor | None, dropout_p: float
) -> list[int]:
    """Everything about adapters on a given product; returns the `rows` of the ops."""
    floating(x, "x")
    floating(y, "y")
    if x.dim() < 1 or y.shape[:-1] != x.shape[:-1]:
        raise ArgumentError(f"y: expected leading shape {list(x.shape[:-1])} (of x), got {_shape(y)}")
    d_in, d_out = x.shape[-1], y.shape[-1]
    for name, tensor in (("y", y), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ArgumentError(f"{name}: expected device {x.device} (of x), got {tensor.device}")
    if residual is not None:
        floating(residual, "residual")
        if residual.shape != (d_out, d_in):
            raise ArgumentError(f"residual: expected shape {[d_out, d_in]}, got {_shape(residual)}")
    _dropout(dropout_p)
    return _adapters(adapters, x, d_in, d_out)


def _dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")


def _adapters(adapters: Sequence[Adapter], x: Tensor, d_in: int, d_out: int) -> list[int]:
    flat_rows: list[int] = []
    for index, (lora_a, lora_b, scale, rows) in enumerate(adapters):
        where = "" if len(adapters) == 1 else f" of adapter {index}"
        _factors(lora_a, lora_b, scale, where, x, "x")
        if lora_a.shape[1] != d_in:
            raise ArgumentError(
                f"lora_a{where}: expected {d_in} columns (columns of weight), got {lora_a.shape[1]}"
            )
        owned = sum(stop - start for start, stop in rows)
        if lora_b.shape[0] != owned:
            raise ArgumentError(
                f"lora_b{where}: expected {owned} rows (its output rows), got {lora_b.shape[0]}"
            )
        for start, stop in rows:
            flat_rows += (index, start, stop)
    _disjoint(flat_rows, d_out)
    return flat_rows


def images(x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    """The input of a convolution with this weight, which has one entry of the geometry per dimension."""
    floating(x, "x")
    floating(weight, "weight")
    dims = weight.dim()
    if x.is_nested:
        raise ArgumentError("x: expected a padded tensor, got a nested one")
    if x.dim() not in (dims, dims - 1) or x.shape[1 - dims] != weight.shape[1]:
        channels, spatial = weight.shape[1], "H, W" if dims == 4 else "L"
        raise ArgumentError(
            f"x: expected [N, {channels}, {spatial}] or [{channels}, {spatial}] (weight {_shape(weight)}), "
            f"got shape {_shape(x)}"
        )
    if min(geometry.counts(tuple(x.shape[2 - dims :]))) < 1:
        raise ArgumentError(
            f"x: expected at least one window of {list(geometry.kernel)} (padding {list(geometry.padding)}, "
            f"dilation {list(geometry.dilation)}), got shape {_shape(x)}"
        )


def lora_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], dropout_p: float
) -> None:
    """Everything about a LoRA convolution but the sizes of its input."""
    rows = x.new_empty(0, weight[0].numel())  # of x as the base product has them
    lora_linear(rows, weight.flatten(1), bias, adapters, dropout_p)


def _disjoint(rows: list[int], d_out: int) -> None:
    if rows == [0, 0, d_out]:
        return
    done = 0
    for start, stop in sorted((start, stop) for _, start, stop in row_ranges(rows)):
        if not 0 <= start < stop <= d_out:
            raise ArgumentError(
                f"rows: expected 0 <= start < stop <= {d_out} (rows of weight), got ({start}, {stop})"
            )
        if start < done:
            raise ArgumentError(f"rows: expected disjoint ranges, but row {start} is in two of them")
        done = stop


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A 0-d int64 seed; None draws one from the default generator of `device`, without synchronisation."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise DtypeError(f"seed: expected one int64 number, got {seed.dtype} of shape {_shape(seed)}")
        return seed.to(device).reshape(())
    if not hasattr(seed, "__index__"):
        raise DtypeError(f"seed: expected an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ArgumentError(f"seed: expected an integer of 64 bits, got {seed}")
    return torch.tensor(seed, dtype=torch.int64, device=device)


def penalty(
    fishers: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scales: Sequence[Scale]
) -> None:
    """One Fisher `[d_out, d_in]` per adapter, fp32 or bf16 (fp64 beside fp64 adapters)."""
    for name, values in (("lora_as", lora_as), ("lora_bs", lora_bs), ("scales", scales)):
        if len(values) != len(fishers):
            raise ArgumentError(f"{name}: expected {len(fishers)} entries, one per Fisher, got {len(values)}")
    if _all_plain(fishers, lora_as, lora_bs, scales):
        return
    for i, (fisher_i, a, b, scale) in enumerate(zip(fishers, lora_as, lora_bs, scales, strict=True)):
        _factors(a, b, scale, f"[{i}]", a, f"lora_as[{i}]")
        _same(a, f"lora_as[{i}]", lora_as[0], "lora_as[0]")
        if fisher_i.dtype == torch.uint8:
            arguments.codes(fisher_i, f"fishers[{i}]", a, b)
            continue
        _accumulator(fisher_i, f"fishers[{i}]", a, f"lora_as[{i}]")
        if fisher_i.shape != (b.shape[0], a.shape[1]):
            expected = [b.shape[0], a.shape[1]]
            raise ArgumentError(f"fishers[{i}]: expected shape {expected} (of B A), got {_shape(fisher_i)}")


def _fields(pair: tuple[Tensor, Tensor]) -> tuple[str, str]:
    return ("outputs", "inputs") if isinstance(pair, KroneckerFisher) else ("rows", "columns")


def structured_penalty(
    fishers: Sequence[tuple[Tensor, Tensor]],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale],
) -> None:
    """One pair of sums or of factors per adapter, by the names of its fields."""
    for name, values in (("lora_as", lora_as), ("lora_bs", lora_bs), ("scales", scales)):
        if len(values) != len(fishers):
            raise ArgumentError(f"{name}: expected {len(fishers)} entries, one per Fisher, got {len(values)}")
    for i, (pair, a, b, scale) in enumerate(zip(fishers, lora_as, lora_bs, scales, strict=True)):
        _factors(a, b, scale, f"[{i}]", a, f"lora_as[{i}]")
        _same(a, f"lora_as[{i}]", lora_as[0], "lora_as[0]")
        square = isinstance(pair, KroneckerFisher)
        for name, part, size in zip(_fields(pair), pair, (b.shape[0], a.shape[1]), strict=True):
            floating(part, f"fishers[{i}].{name}")
            arguments.factor_of_fisher(part, f"fishers[{i}].{name}", size, square, a, f"lora_as[{i}]")


def l1_penalty(lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scales: Sequence[Scale]) -> None:
    """Adapters of one dtype on one device."""
    for name, values in (("lora_bs", lora_bs), ("scales", scales)):
        if len(values) != len(lora_as):
            raise ArgumentError(f"{name}: expected {len(lora_as)} entries, as lora_as has, got {len(values)}")
    for i, (a, b, scale) in enumerate(zip(lora_as, lora_bs, scales, strict=True)):
        _factors(a, b, scale, f"[{i}]", a, f"lora_as[{i}]")
        _same(a, f"lora_as[{i}]", lora_as[0], "lora_as[0]")


def fisher_sums(pair: FactoredFisher, x: Tensor, dy: Tensor, mode: str, cu_seqlens: Tensor | None) -> None:
    """Row sums `[d_out]` and column sums `[d_in]`."""
    _samples(x, dy, mode, cu_seqlens)
    for name, part, of in zip(pair._fields, pair, (dy, x), strict=True):
        floating(part, f"fisher.{name}")
        arguments.factor_of_fisher(part, f"fisher.{name}", of.shape[-1], False, x, "x")


def _all_plain(
    fishers: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scales: Sequence[Scale]
) -> bool:
    """Whether all adapters have the common form, fp32 with numbers as scales on one device, and fit.

    The detailed checks take four times as long, and hundreds of tensors come in every training step.
    """
    tensors = [*fishers, *lora_as, *lora_bs]
    if not {type(t) for t in tensors} <= {Tensor, Parameter} or {type(s) for s in scales} != {float}:
        return False
    if {t.dtype for t in tensors} != {torch.float32} or len({t.device for t in tensors}) != 1:
        return False
    shapes = zip(
        [t.shape for t in fishers], [t.shape for t in lora_as], [t.shape for t in lora_bs], strict=True
    )
    fits = all(len(a) == 2 == len(b) and a[0] == b[1] >= 1 and f == (b[0], a[1]) for f, a, b in shapes)
    sizes = [abs(float(s)) for s in scales]
    return fits and all(map(math.isfinite, sizes)) and max(sizes) <= _LARGEST


def _accumulator(fisher_: Tensor, name: str, like: Tensor, like_name: str) -> None:
    matrix(fisher_, name)
    wide = like.dtype == torch.float64
    allowed = (torch.float64, torch.float32) if wide else (torch.float32, torch.bfloat16)
    if fisher_.dtype not in allowed:
        expected = " or ".join(map(str, allowed))
        raise DtypeError(
            f"{name}: expected {expected} beside {like_name} in {like.dtype}, got {fisher_.dtype}"
        )
    if fisher_.device != like.device:
        raise ArgumentError(f"{name}: expected device {like.device} (of {like_name}), got {fisher_.device}")


def fisher(fisher_: Tensor, x: Tensor, dy: Tensor, mode: str, cu_seqlens: Tensor | None) -> None:
    """Shapes and dtypes of one accumulation."""
    _samples(x, dy, mode, cu_seqlens)
    _accumulator(fisher_, "fisher", x, "x")
    if fisher_.shape != (dy.shape[-1], x.shape[-1]):
        expected = [dy.shape[-1], x.shape[-1]]
        raise ArgumentError(
            f"fisher: expected shape {expected} (features of dy and x), got {_shape(fisher_)}"
        )


def _samples(x: Tensor, dy: Tensor, mode: str, cu_seqlens: Tensor | None) -> None:
    if mode not in MODES:
        raise ArgumentError(f"mode: expected one of {MODES}, got {mode!r}")
    floating(x, "x")
    floating(dy, "dy")
    _same(dy, "dy", x, "x")
    dims = (2,) if cu_seqlens is not None else (2, 3)
    if x.dim() not in dims or dy.dim() not in dims:
        raise ArgumentError(
            f"x, dy: expected {' or '.join(map(str, dims))} dimensions, got {_shape(x)} and {_shape(dy)}"
        )
    if x.shape[:-1] != dy.shape[:-1]:
        raise ArgumentError(f"dy: expected leading shape {list(x.shape[:-1])} (of x), got {_shape(dy)}")
    if cu_seqlens is not None:
        if mode == "batch":
            raise ArgumentError(
                "cu_seqlens: expected None in mode 'batch', which does not tell samples apart"
            )
        if not isinstance(cu_seqlens, Tensor):
            raise DtypeError(
                f"cu_seqlens: expected an int32 or int64 tensor, got {type(cu_seqlens).__name__}"
            )
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1:
            raise DtypeError(
                f"cu_seqlens: expected int32 or int64 [N + 1], got {cu_seqlens.dtype} {_shape(cu_seqlens)}"
            )


def offsets(bounds: Sequence[int], rows: int) -> None:
    """Sample offsets start at 0, never decrease and end at the number of rows."""
    ordered = all(a <= b for a, b in itertools.pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != rows or not ordered:
        raise ArgumentError(
            f"cu_seqlens: expected offsets rising from 0 to {rows} (rows of x), got {list(bounds)[:8]}"
        )


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Scale, where: str = "") -> None:
    """Shapes and dtypes of a merge; `where` tells entries of a sequence apart."""
    matrix(weight, f"weight{where}")
    _factors(lora_a, lora_b, scale, where, weight, f"weight{where}")
    if weight.shape != (lora_b.shape[0], lora_a.shape[1]):
        expected = [lora_b.shape[0], lora_a.shape[1]]
        raise ArgumentError(f"weight{where}: expected shape {expected} (of B A), got {_shape(weight)}")


def is_plain_merge(
    weights: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scales: Sequence[Scale]
) -> bool:
    """Whether a merge has the common form, nobody transforms it, and all checks of it would pass; C++ looks
    at hundreds of tensors in the time in which the detailed checks look at one."""
    if torch.compiler.is_compiling():
        return False
    common = dispatch.plain_merge()
    return common is not None and common(weights, lora_as, lora_bs, scales) and not schemas.is_transformed()


def as_many(values: object, count: int, name: str, other: str) -> None:
    """A sequence with one entry per entry of `other`."""
    if not isinstance(values, Sequence):
        raise DtypeError(f"{name}: expected a sequence, like {other}, got {type(values).__name__}")
    if len(values) != count:
        raise ArgumentError(f"{name}: expected {count} entries, one per {other}, got {len(values)}")


def one_device(tensors: Sequence[Tensor], name: str) -> None:
    """Entries of one call, which one implementation serves."""
    for i, tensor in enumerate(tensors):
        if tensor.device != tensors[0].device:
            raise ArgumentError(
                f"{name}[{i}]: expected device {tensors[0].device} (of {name}[0]), got {tensor.device}"
            )
