# SPDX-License-Identifier: Apache-2.0
"""Hosts of the passes around the LoRA linear: packing factors, skinny products, adding up partial sums."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ewclora.kernels import lora_linear as kernels
from fused_ewclora.kernels import lowrank as lowrank_kernels

from ...reference.adapters import row_ranges
from ...reference.philox import drop_threshold, inverse_keep
from . import kept, tables
from .cost_model import padded
from .launch import (
    addressable,
    arch,
    cdiv,
    launch,
    multiprocessors,
    precision,
    tileable,
    tiles,
    wide,
)

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
    again: Sequence[Tensor] = (),
) -> Packed:
    """All factors in two matrices of the dtype of `like`, written to `a` and `b` where given; `again` holds
    those of an earlier call."""
    lora_as, lora_bs = [addressable(t) for t in lora_as], [addressable(t) for t in lora_bs]
    d_in = lora_as[0].shape[1]
    rp = padded(sum(t.shape[0] for t in lora_as))
    owner, lo, hi = _owner(tuple(rows), len(lora_as), d_out, like.device)
    if again:
        a, b = again
        return Packed(lora_as, lora_bs, scales, scale_factors, owner, a, b, lo, hi)
    a = like.new_empty(rp, d_in) if a is None else a
    b = like.new_empty(d_out, rp) if b is None else b
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
            lowrank_kernels.lowrank_pack_kernel, (blocks, 2), tuple(as_), tuple(bs), tuple(ss),
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
    z_sum: Tensor | None = None,
) -> None:
    """y `[M, N]` = x W^T + drop(z b^T) + bias, or x W if `transposed`; see `lora_linear_kernel`.

    factors: (a, b), a `[rp, K]` and b `[N, rp]`; `bounds`: the rows of b that are not zero. Where `z_sum`
    `[M, rp]` is given, z `[parts, M, columns]` is added up over its parts, and written there.
    """
    a, b = factors
    parts, stride_zs = (1, 0) if z_sum is None else (z.shape[0], z.stride(0))
    rows, columns, inner = y.shape[0], y.shape[1], x.shape[1]
    variant = ":no_base" if not base else "" if wide(x, weight, y) else ":odd"
    config = _config("lora_linear_kernel", x, b.shape[1], variant)
    m, n, k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    x_tiles, tma_x = _matrix(x, (m, k), config) if base else (x, False)
    w_tiles, tma_w = _matrix(weight, (k, n) if transposed else (n, k), config) if base else (weight, False)
    del config["TMA"]
    launch(
        kernels.lora_linear_kernel, (cdiv(rows, m) * cdiv(columns, n),), x_tiles, w_tiles, a, b, z, z_sum,
        bias, y, dropout.seed, rows, columns, inner, z.shape[-1], parts, *bounds, dropout.threshold,
        dropout.inverse, *x.stride(), *weight.stride(), *b.stride(), stride_zs, z.stride(-2),
        0 if z_sum is None else z_sum.stride(0), y.stride(0), FULL=full, BASE=base, W_KN=transposed,
        TMA_X=tma_x, TMA_W=tma_w, PRECISION=product_precision(), **config,
    )  # fmt: skip


def rows_pass(
    x: Tensor,
    packed: Packed,
    u: Tensor,
    *,
    u_copy: Tensor | None = None,
    x_copy: Tensor | None = None,
    dropout: Dropout = Dropout(),
) -> None:
    """u = drop(x) a^T `[M, columns]` in one read of x `[M, N]`; see `lowrank_rows_kernel`."""
    p, rp = packed.a.T, packed.rp
    config = _config("lowrank_rows_kernel", x, rp, "" if wide(x, packed.a) else ":odd")
    m, n, (rows, columns) = config["BLOCK_M"], config["BLOCK_N"], x.shape
    matrix, tma = _matrix(x, (m, n), config)
    del config["TMA"]
    launch(
        kernels.lowrank_rows_kernel, (cdiv(rows, m), cdiv(rp, config["BLOCK_R"])), matrix, p, u, u_copy,
        x_copy, dropout.seed, rows, columns, u.shape[1], dropout.threshold, dropout.inverse, *x.stride(),
        *p.stride(), u.stride(0), 0 if u_copy is None else u_copy.stride(0),
        0 if x_copy is None else x_copy.stride(0), TMA=tma, PRECISION=product_precision(), **config,
    )  # fmt: skip


@dataclass(frozen=True)
class Gradients:
    """Where sums over rows go: `outs[i]` of each adapter (None: not asked for) and their columns' sums.

    `transposed`: outputs are `[rank, columns]` (dA, whose scale is in the sums already); else `[owned rows,
    rank]` times the scale (dB), the columns being those of y from `lo` on. `scales[i]` `[rank]` is the
    gradient of the scale, rank by rank.
    """

    packed: Packed
    outs: Sequence[Tensor | None]
    scales: Sequence[Tensor | None]
    transposed: bool = False
    lo: int = 0
    bias: Tensor | None = None

    @property
    def any(self) -> bool:
        return any(t is not None for t in (*self.outs, *self.scales))

    def dots(self, blocks: int) -> list[Tensor | None]:
        """Room for parts of the gradients of scales, one per block of columns."""
        return [None if t is None else t.new_empty(blocks, t.shape[0], dtype=torch.float32)
                for t in self.scales]  # fmt: skip

    def arguments(
        self, part: slice, dots: Sequence[Tensor | None]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What `deal_out` takes for the adapters of `part`: tensors, then sizes and strides."""
        packed, outs = self.packed, tuple(self.outs[part])
        if self.transposed:
            nothing: tuple[Tensor | None, ...] = (None,) * len(outs)
            bs, ss, factors, owner = nothing, nothing, (1.0,) * len(outs), None
        else:
            bs, ss = tuple(packed.lora_bs[part]), tuple(packed.scales[part])
            factors = tuple(map(float, packed.scale_factors[part]))
            owner = None if packed.owner is None else packed.owner[part, self.lo :]
        strides = _strides(outs, 0), _strides(outs, 1)
        return (
            (outs, ss, factors, owner, bs, tuple(dots[part])),
            (
                tuple(a.shape[0] for a in packed.lora_as[part]),
                *(strides[::-1] if self.transposed else strides),
                tuple(map(_scale_stride, ss)),
                _strides(bs, 0),
                _strides(bs, 1),
            ),
        )


def columns_pass(
    x: Tensor,
    c: Tensor | None,
    gradients: Gradients,
    *,
    p: Tensor | None = None,
    x_copy: Tensor | None = None,
    dropout: Dropout = Dropout(),
) -> Tensor | None:
    """Sums over the rows of x `[M, N]`, drop(x)^T c, dealt out to adapters, in one read of x.

    With p `[N, rp]`, also u = x p: its parts `[blocks, M, rank]` over blocks of columns are returned. See
    `lowrank_columns_kernel`, which deals out a few adapters itself; `lowrank_sum_kernel` does more.
    """
    packed, bias = gradients.packed, gradients.bias
    rp, rank = packed.rp, packed.rank
    # p is a view of a packed matrix, one of whose strides is 1.
    sources = [x] if p is None else [x, p if p.stride(1) == 1 else p.T]
    variant = ":odd" if not wide(*sources) else "" if p is None else ":with_u"
    config = _config("lowrank_columns_kernel", x, rp, variant)
    m, n, (rows, columns) = config["BLOCK_M"], config["BLOCK_N"], x.shape
    blocks, ranks = cdiv(columns, n), cdiv(rp, config["BLOCK_R"])
    # Parts of u grow with blocks of columns, parts of g with chunks of rows: with both, one wave has fewest.
    programs = (2 if p is None else 1) * multiprocessors(x)
    chunk = cdiv(cdiv(rows, m), max(programs // (blocks * ranks), 1)) * m
    splits = cdiv(rows, chunk)
    u = None if p is None else x.new_empty(blocks, rows, rank, dtype=torch.float32)
    g = None if c is None else x.new_empty(splits, columns, rank, dtype=torch.float32)
    sums = None if bias is None else x.new_empty(splits, columns, dtype=torch.float32)
    deal = min(n, 64)
    together = c is not None and ranks == 1 and len(gradients.outs) <= GROUP
    dealt, sizes = _NOT_DEALT
    dss: tuple[Tensor | None, ...] | None = None
    arrivals = None
    if together:
        dealt, sizes = gradients.arguments(slice(GROUP), gradients.dots(cdiv(columns, deal)))
        dss = tuple(gradients.scales) if any(t is not None for t in gradients.scales) else None
        arrivals = kept.zeros(x, 1 + blocks * (1 + cdiv(splits, lowrank_kernels.AT_ONCE.value)))
    matrix, tma = _matrix(x, (m, n), config)
    del config["TMA"]
    owner = dealt[3]
    launch(
        kernels.lowrank_columns_kernel, (blocks, splits, ranks), matrix, c, p, g, u, sums,
        bias if together else None, x_copy, dropout.seed, arrivals, *dealt, dss, rows, columns, chunk, splits,
        0 if c is None else c.shape[1], rank, dropout.threshold, dropout.inverse, *x.stride(),
        0 if c is None else c.stride(0), *((0, 0) if p is None else p.stride()),
        0 if u is None else u.stride(0), 0 if x_copy is None else x_copy.stride(0),
        0 if owner is None else owner.stride(0), *sizes, TMA=tma, PRECISION=product_precision(), DEAL=deal,
        **config,
    )  # fmt: skip
    if not together:
        if g is not None:
            deal_out(g, gradients)
        if bias is not None:
            assert sums is not None
            bias.copy_(sums.sum(0))
    return u


_NOT_DEALT: tuple[tuple[Any, ...], tuple[Any, ...]] = ((None,) * 6, (0,) * 6)


def add_up(parts: Tensor, out: Tensor) -> None:
    """out `[rows, rp]` = sum over the parts `[S, rows, rank]`, zero from the rank on."""
    nothing = (None,)
    arguments = ((out,), nothing, (1.0,), None, nothing, nothing)
    width = out.shape[1]
    _sum(parts, width, 1, arguments, 0, ((width,), (out.stride(0),), (out.stride(1),), (0,), (0,), (0,)))


def deal_out(parts: Tensor, gradients: Gradients) -> None:
    """Sums over the parts `[S, columns, rank]`, dealt out to the adapters."""
    block = _sum_config(parts, gradients.packed.rp)["BLOCK"]
    dots = gradients.dots(cdiv(parts.shape[1], block))
    for part, first in gradients.packed.groups():
        arguments, sizes = gradients.arguments(part, dots)
        if any(t is not None for t in (*arguments[0], *arguments[-1])):
            _sum(parts, gradients.packed.rp, len(arguments[0]), arguments, first, sizes)
    for dot, scale in zip(dots, gradients.scales, strict=True):
        if dot is not None:
            assert scale is not None
            scale.copy_(dot.sum(0))


def _sum_config(parts: Tensor, rp: int) -> Mapping[str, Any]:
    return tables.lookup("lowrank_sum_kernel", arch(parts), parts.dtype, rp)


def _sum(
    parts: Tensor, rp: int, count: int, arguments: tuple[Any, ...], first: int, sizes: tuple[Any, ...]
) -> None:
    config, owner = _sum_config(parts, rp), arguments[3]
    launch(
        lowrank_kernels.lowrank_sum_kernel, (cdiv(parts.shape[1], config["BLOCK"]), count), parts, *arguments,
        parts.shape[1], parts.shape[0], parts.shape[2], 0 if owner is None else owner.stride(0), first,
        *sizes, *parts.stride()[:2], **config,
    )  # fmt: skip
