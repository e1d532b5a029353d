"""Hosts of the passes around the LoRA linear: packing factors, skinny products, adding up partial sums."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ewclora.kernels import lora_linear as kernels
from fused_ewclora.kernels import lowrank as sums

from ...reference.adapters import row_ranges
from ...reference.philox import drop_threshold, inverse_keep
from . import kept, tables
from .cost_model import padded
from .launch import addressable, arch, cdiv, launch, multiprocessors, precision, tileable, tiles, wide

GROUP = 4  # adapters per launch: each number of them is a kernel of its own


@dataclass(frozen=True)
class Dropout:
    """Mask of one call as kernels take it; `seed` None: no dropout."""

    seed: Tensor | None = None
    threshold: int = 0
    inverse: float = 1.0

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> Dropout:
        return cls() if p == 0.0 or seed is None else cls(seed, drop_threshold(p), inverse_keep(p))


@dataclass(frozen=True)
class Packed:
    """The adapters of one call, packed: a `[rp, d_in]`, b `[d_out, rp]` scaled, zero outside rows
    [lo, hi)."""

    lora_as: Sequence[Tensor]
    lora_bs: Sequence[Tensor]
    scales: Sequence[Tensor | None]
    scale_factors: Sequence[float]
    owner: Tensor | None
    a: Tensor
    b: Tensor
    lo: int
    hi: int

    @property
    def rp(self) -> int:
        return self.b.shape[1]

    @property
    def rank(self) -> int:
        return sum(a.shape[0] for a in self.lora_as)

    def groups(self) -> list[tuple[slice, int]]:
        """(adapters, first rank) of every launch."""
        ranks = [a.shape[0] for a in self.lora_as]
        firsts = [0, *itertools.accumulate(ranks)]
        return [(slice(i, i + GROUP), firsts[i]) for i in range(0, len(ranks), GROUP)]


Owner = tuple[Tensor | None, int, int]
_owners: dict[Any, Owner] = {}  # a few KB for each way of slicing: none is let go before `kept.forget`
kept.cache(_owners.clear)


def _owner(rows: tuple[int, ...], adapters: int, d_out: int, device: torch.device) -> Owner:
    """`[adapters, d_out]` int32: the row of each adapter's B that belongs to an output row, or -1; None where
    one adapter owns all rows. And the output rows [lo, hi) outside of which none has an owner."""
    if rows == (0, 0, d_out):
        return None, 0, d_out
    key = (rows, adapters, d_out, device)
    found = _owners.get(key)
    if found is None:
        ranges = list(row_ranges(rows))
        lo, hi = min((r[1] for r in ranges), default=d_out), max((r[2] for r in ranges), default=0)
        if kept.capturing(device):  # written on the device, by every replay
            return _numbered(ranges, adapters, d_out, device), lo, hi
        host = _numbered(ranges, adapters, d_out, torch.device("cpu"))
        found = _owners[key] = kept.copied(host, device), lo, hi
    return found


def _numbered(
    ranges: Sequence[tuple[int, int, int]], adapters: int, d_out: int, device: torch.device
) -> Tensor:
    """The rows of each adapter in the order of its ranges; -1 elsewhere."""
    owner = torch.full((adapters, d_out), -1, dtype=torch.int32, device=device)
    done = [0] * adapters
    for adapter, start, stop in ranges:
        first, done[adapter] = done[adapter], done[adapter] + stop - start
        torch.arange(first, done[adapter], out=owner[adapter, start:stop])
    return owner


def _scale_stride(scale: Tensor | None) -> int:
    return 0 if scale is None or scale.dim() == 0 else scale.stride(0)


def _strides(tensors: Sequence[Tensor | None], dim: int) -> tuple[int, ...]:
    return tuple(0 if t is None else t.stride(dim) for t in tensors)


def pack(
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    rows: Sequence[int],
    like: Tensor,
    d_out: int,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Packed:
    """All factors in two matrices of the dtype of `like`, written to `a` and `b` where given."""
    lora_as, lora_bs = [addressable(t) for t in lora_as], [addressable(t) for t in lora_bs]
    d_in = lora_as[0].shape[1]
    rp = padded(sum(t.shape[0] for t in lora_as))
    a = like.new_empty(rp, d_in) if a is None else a
    b = like.new_empty(d_out, rp) if b is None else b
    owner, lo, hi = _owner(tuple(rows), len(lora_as), d_out, like.device)
    packed = Packed(lora_as, lora_bs, scales, scale_factors, owner, a, b, lo, hi)
    config = tables.lookup("lowrank_pack_kernel", arch(like), like.dtype, rp)
    blocks = cdiv(max(d_in, d_out), config["BLOCK"])
    for part, first in packed.groups():
        as_, bs, ss = lora_as[part], lora_bs[part], scales[part]
        ranks = [t.shape[0] for t in as_]
        widths = list(ranks)
        if part.stop >= len(lora_as):
            widths[-1] += rp - packed.rank
        launch(
            sums.lowrank_pack_kernel, (blocks, 2), tuple(as_), tuple(bs), tuple(ss),
            tuple(map(float, scale_factors[part])), None if owner is None else owner[part], a, b, d_in, d_out,
            d_out, first, tuple(ranks), tuple(widths), _strides(as_, 0), _strides(as_, 1), _strides(bs, 0),
            _strides(bs, 1), tuple(map(_scale_stride, ss)), a.stride(0), b.stride(0), **config,
        )  # fmt: skip
    return packed


def product_precision() -> str:
    """Of fp32 operands of the LoRA linear: "medium" would round them to bf16, which no one asked for here."""
    return "tf32" if precision() == "bf16" else precision()


def _matrix(tensor: Tensor, block: tuple[int, int], config: dict[str, Any]) -> tuple[Any, bool]:
    """The tensor, or a descriptor of it where the architecture and its strides allow one."""
    if config["TMA"] and tileable(tensor, block):
        return tiles(tensor, block), True
    return tensor, False


def _config(kernel: str, x: Tensor, rp: int, variant: str = "") -> dict[str, Any]:
    """The configuration for x; ":odd" strides, whose addresses take registers, have smaller blocks."""
    return {**tables.lookup(kernel + variant, arch(x), x.dtype, rp), "RP": rp, "BLOCK_R": min(rp, 64)}


def product(
    x: Tensor,
    weight: Tensor,
    factors: tuple[Tensor, Tensor],
    z: Tensor,
    bias: Tensor | None,
    y: Tensor,
    bounds: tuple[int, int],
    *,
    full: bool = False,
    base: bool = True,
    dropout: Dropout = Dropout(),
    transposed: bool = False,
) -> None:
    """y `[M, N]` = x W^T + drop(z b^T) + bias, or x W if `transposed`; see `lora_linear_kernel`.

    factors: (a, b), a `[rp, K]` and b `[N, rp]`; `bounds`: the rows of b that are not zero.
    """
    a, b = factors
    rows, columns, inner = y.shape[0], y.shape[1], x.shape[1]
    variant = ":no_base" if not base else "" if wide(x, weight, y) else ":odd"
    config = _config("lora_linear_kernel", x, b.shape[1], variant)
    m, n, k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    x_tiles, tma_x = _matrix(x, (m, k), config) if base else (x, False)
    w_tiles, tma_w = _matrix(weight, (k, n) if transposed else (n, k), config) if base else (weight, False)
    del config["TMA"]
    launch(
        kernels.lora_linear_kernel, (cdiv(rows, m) * cdiv(columns, n),), x_tiles, w_tiles, a, b, z, bias, y,
        dropout.seed, rows, columns, inner, z.shape[1], *bounds, dropout.threshold, dropout.inverse,
        *x.stride(), *weight.stride(), *b.stride(), z.stride(0), y.stride(0), FULL=full, BASE=base,
        W_KN=transposed, TMA_X=tma_x, TMA_W=tma_w, PRECISION=product_precision(), **config,
    )  # fmt: skip


@dataclass
class RowsPass:
    """What one read of x by rows gave: partial sums, still to be added over their first dimension."""

    u: Tensor | None = None  # [splits, M, columns]
    g: Tensor | None = None  # [blocks, N, rp]
    sums: Tensor | None = None  # [blocks, N]


def rows_pass(
    x: Tensor,
    p: Tensor | None,
    rp: int,
    *,
    u: Tensor | None = None,
    u_copy: Tensor | None = None,
    c: Tensor | None = None,
    sums_too: bool = False,
    x_copy: Tensor | None = None,
    dropout: Dropout = Dropout(),
) -> RowsPass:
    """u = drop(x) p, g = x^T c and column sums of x `[M, N]` in one read; see `lowrank_rows_kernel`.

    p `[N, rp]`; a `u` `[M, columns]` that is given receives the finished product, else columns are split as
    the grid needs and u comes in parts.
    """
    # p is a view of a packed matrix, one of whose strides is 1.
    sources = [x] if p is None else [x, p if p.stride(1) == 1 else p.T]
    config = _config("lowrank_rows_kernel", x, rp, "" if wide(*sources) else ":odd")
    m, n, (rows, columns) = config["BLOCK_M"], config["BLOCK_N"], x.shape
    blocks, ranks = cdiv(rows, m), cdiv(rp, config["BLOCK_R"])
    wanted = 1 if u is not None else cdiv(2 * multiprocessors(x), max(blocks * ranks, 1))
    chunk = cdiv(cdiv(columns, n), wanted) * n
    splits = cdiv(columns, chunk)
    result = RowsPass(None if u is None else u[None])
    if u is None and p is not None:
        result.u = x.new_empty(splits, rows, rp, dtype=torch.float32)
    if c is not None:
        result.g = x.new_empty(blocks, columns, rp, dtype=torch.float32)
    if sums_too:
        result.sums = x.new_empty(blocks, columns, dtype=torch.float32)
    matrix, tma = _matrix(x, (m, n), config)
    del config["TMA"]
    out = result.u
    launch(
        kernels.lowrank_rows_kernel, (blocks, splits, ranks), matrix, p, c, out, u_copy, result.g,
        result.sums, x_copy, dropout.seed, rows, columns, chunk, 0 if out is None else out.shape[2],
        0 if c is None else c.shape[1], dropout.threshold, dropout.inverse, *x.stride(),
        *((0, 0) if p is None else p.stride()), 0 if c is None else c.stride(0),
        *((0, 0) if out is None else out.stride()[:2]), 0 if u_copy is None else u_copy.stride(0),
        columns * rp, 0 if x_copy is None else x_copy.stride(0), TMA=tma, PRECISION=product_precision(),
        **config,
    )  # fmt: skip
    return result


def columns_pass(x: Tensor, c: Tensor, rp: int, dropout: Dropout) -> Tensor:
    """Partial sums `[splits, N, rp]` of drop(x)^T c; see `lowrank_columns_kernel`."""
    config = _config("lowrank_columns_kernel", x, rp)
    m, n, (rows, columns) = config["BLOCK_M"], config["BLOCK_N"], x.shape
    blocks, ranks = cdiv(columns, n), cdiv(rp, config["BLOCK_R"])
    chunk = cdiv(cdiv(rows, m), cdiv(2 * multiprocessors(x), blocks * ranks)) * m
    splits = cdiv(rows, chunk) if rows else 0
    g = x.new_empty(splits, columns, rp, dtype=torch.float32)
    matrix, tma = _matrix(x, (m, n), config)
    del config["TMA"]
    launch(
        kernels.lowrank_columns_kernel, (blocks, splits, ranks), matrix, c, g, dropout.seed, rows, columns,
        chunk, c.shape[1], dropout.threshold, dropout.inverse, *x.stride(), c.stride(0), columns * rp,
        TMA=tma, PRECISION=product_precision(), **config,
    )  # fmt: skip
    return g


def add_up(
    parts: Tensor,
    outs: Sequence[Tensor | None],
    *,
    adapters: Packed | None = None,
    transposed: bool = False,
    dots: Sequence[Tensor | None] | None = None,
) -> None:
    """outs[i] = sum over the parts `[S, rows, rp]`, its columns dealt to the adapters in order.

    Without `adapters`, the one output takes all columns. `transposed`: outputs are `[rank, rows]` (dA, whose
    scale is in u already); else `[owned rows, rank]` times the scale (dB), and `dots[i]` `[blocks, rank]`
    receives parts of the gradient of the scale.
    """
    splits, rows, rp = parts.shape
    config = tables.lookup("lowrank_sum_kernel", arch(parts), parts.dtype, rp)
    groups = [(slice(0, 1), 0)] if adapters is None else adapters.groups()
    plain = adapters is None or transposed
    for part, first in groups:
        out, count = outs[part], len(outs[part])
        dot = (None,) * count if dots is None else tuple(dots[part])
        if all(t is None for t in (*out, *dot)):
            continue
        ranks = (rp,) if adapters is None else tuple(a.shape[0] for a in adapters.lora_as[part])
        if plain:
            nothing: tuple[Tensor | None, ...] = (None,) * count
            bs, ss, scale_factors, owner = nothing, nothing, (1.0,) * count, None
        else:
            assert adapters is not None
            bs, ss = tuple(adapters.lora_bs[part]), tuple(adapters.scales[part])
            scale_factors = tuple(map(float, adapters.scale_factors[part]))
            owner = None if adapters.owner is None else adapters.owner[part, adapters.lo :]
        strides = (_strides(out, 1), _strides(out, 0)) if transposed else (_strides(out, 0), _strides(out, 1))
        launch(
            sums.lowrank_sum_kernel, (cdiv(rows, config["BLOCK"]), count), parts, tuple(out), ss,
            scale_factors, owner, bs, dot, rows, splits, 0 if owner is None else owner.stride(0), first,
            ranks, *strides, tuple(map(_scale_stride, ss)), _strides(bs, 0), _strides(bs, 1),
            *parts.stride()[:2], **config,
        )  # fmt: skip
