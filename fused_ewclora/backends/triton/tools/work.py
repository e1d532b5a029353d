# SPDX-License-Identifier: Apache-2.0
"""What a noted launch has to do: bytes, trips of its main loop, and the least time that the work could take.

Kernels are known by name and read by the names of their arguments; the sizes come from the noted launch, the
elements of F of a penalty, which its table of pointers hides, from the arguments of the op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..launch import Launch, cdiv
from .machine_model import Machine

READ_F, PRODUCT, WGRAD, READ_X, COPY = (
    "one read of F", "frozen product by BLAS", "weight gradient by BLAS", "one read of x or dy",
    "its bytes, copied",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One launch. Bytes from the second-level cache and in flight are those of one block, those of memory of
    all. `trips` are of the loops around the main one and of itself, for one block on average: code with fewer
    loops flattens the innermost ones. `rare` is the share of blocks that run conditional code outside."""

    blocks: int
    trips: tuple[float, ...]
    memory_bytes: float
    cache_bytes: float
    in_flight: float
    floor_bytes: float = 0  # of the floor; or its products:
    floor_flops: float = 0
    floor_name: str = COPY
    rare: float = 1.0

    def floor(self, machine: Machine) -> float:
        """Seconds that the work takes at least, by what it is compared with."""
        return max(self.floor_bytes / machine.memory, self.floor_flops / machine.blas)


Arguments = Mapping[str, Any]


def of(launch: Launch, call: Sequence[Any]) -> Work | None:
    """The work of `launch`, made by an op that was called with `call`; None for a kernel nobody described."""
    arguments = {**dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)), **launch.options}
    describe = _KERNELS.get(launch.kernel.fn.__name__)
    return None if describe is None else describe(arguments, math.prod(launch.grid), call)


def _size(tensor: Any) -> int:
    """Bytes of an element of a tensor or of a tensor descriptor."""
    return int(getattr(tensor, "base", tensor).element_size())


def _ahead(arguments: Arguments, per_trip: float) -> float:
    """Bytes in flight of a pipelined loop."""
    return max(arguments.get("num_stages", 3) - 1, 1) * per_trip


def _penalty(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    fishers, lora_as, lora_bs = call[:3]
    elements = sum(a.shape[1] * b.shape[0] for a, b in zip(lora_as, lora_bs, strict=True))
    size = sum(f.numel() * _size(f) for f in fishers) / elements  # of codes with their scales: more than one
    m, n, rp = a["BLOCK_M"], a["BLOCK_N"], a["RP"]
    trips = elements / (m * n) / blocks
    per_trip = m * n * size + m * rp * (_size(lora_as[0]) + 4)
    parts = 4 * a["work"].numel()  # written, and read by who adds them up
    ahead = m * n * size if fishers else m * rp * _size(lora_bs[0])  # an l1 norm streams B alone
    return Work(
        blocks, (1, trips), elements * size + 2 * parts, trips * per_trip + 2 * 4 * rp * n,
        _ahead(a, ahead), floor_bytes=elements * size or 2 * parts, floor_name=READ_F if fishers else COPY,
        # The last of a row or column of blocks adds up.
        rare=max(m * trips / lora_bs[0].shape[0], n / lora_as[0].shape[1]),
    )  # fmt: skip


def _linear(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    m, n, k, size = a["M"], a["N"], a["K"], _size(a["y"])
    bm, bn, bk = a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"]
    tiles = cdiv(m, bm) * cdiv(n, bn)
    steps = cdiv(k, bk) if a["BASE"] else 0
    per_step = (bm + bn + (a["RP"] if a["FULL"] else 0)) * bk * size
    outside = bm * bn * size + (bm + bn) * a["RP"] * size
    low_rank = 4 * m * a["z_columns"]
    memory = (m * n + (m * k + n * k if a["BASE"] else 0)) * size + low_rank
    floor = {"floor_flops": 2.0 * m * n * k, "floor_name": PRODUCT} if a["BASE"] else {"floor_bytes": memory}
    return Work(
        blocks, (tiles / blocks, steps), memory, tiles / blocks * (steps * per_step + outside),
        _ahead(a, per_step) if a["BASE"] else outside, **floor,
    )  # fmt: skip


def _rows(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    m, n, size = a["M"], a["N"], _size(a["x"])
    bm, bn = a["BLOCK_M"], a["BLOCK_N"]
    trips = cdiv(n, bn)
    read = bm * bn * size + bn * a["BLOCK_R"] * size
    written = bm * bn * size if a["x_copy"] is not None else 0
    made = [a[name] for name in ("u", "u_copy", "x_copy") if a[name] is not None]
    memory = m * n * size + sum(t.numel() * _size(t) for t in made)
    return Work(
        blocks, (1, trips), memory, trips * (read + written), _ahead(a, bm * bn * size),
        floor_bytes=m * n * size, floor_name=READ_X,
    )  # fmt: skip


def _columns(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    """Parts of u and of the sums are written, and those of the sums read again by who comes last."""
    m, n, size = a["M"], a["N"], _size(a["x"])
    bm, bn = a["BLOCK_M"], a["BLOCK_N"]
    trips = cdiv(min(a["chunk"], m), bm)
    per_trip = bm * bn * size
    if a["c"] is not None:
        per_trip += bm * a["BLOCK_R"] * _size(a["c"])
    if a["u"] is not None:
        per_trip += bm * min(a["BLOCK_R"], a["rank"]) * 4
    made = [a[name] for name in ("u", "g", "g", "sums", "sums", "x_copy") if a[name] is not None]
    return Work(
        blocks, (1, trips), m * n * size + sum(t.numel() * _size(t) for t in made), trips * per_trip,
        _ahead(a, bm * bn * size), floor_bytes=m * n * size, floor_name=READ_X, rare=1 / max(a["splits"], 1),
    )  # fmt: skip


def _sum(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    parts, outs = a["parts"], [out for out in a["outs"] if out is not None]
    rank, splits = a["ranks"][0], a["splits"]
    read = splits * a["rows"] * sum(a["ranks"]) * _size(parts)
    moved = read + sum(out.numel() * _size(out) for out in outs)
    per_trip = a["BLOCK"] * a["BLOCK_R"] * 4
    return Work(
        blocks, (cdiv(rank, a["BLOCK_R"]), splits), moved, read / blocks, 4 * per_trip, floor_bytes=moved
    )


def _fisher_sample(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    samples, tokens, splits, size = a["samples"], a["tokens"], a["splits"], _size(a["x"])
    bm, bn, bt = a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_T"]
    d_out, d_in = a["d_out"], a["d_in"]
    steps = cdiv(tokens, bt)
    tiles = cdiv(d_out, bm) * cdiv(d_in, bn) * splits
    turns = samples / splits * tiles / blocks  # samples that a block multiplies
    per_step = (bm + bn) * bt * size
    f = 2 * _size(a["fisher"]) * splits
    return Work(
        blocks, (turns, steps), samples * tokens * (d_out + d_in) * size + d_out * d_in * f,
        turns * steps * per_step + bm * bn * f / splits * tiles / blocks, _ahead(a, per_step),
        floor_flops=2.0 * samples * tokens * d_out * d_in, floor_name=WGRAD,
    )  # fmt: skip


def _fisher_token(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    found = _fisher_sample({**a, "tokens": a["samples"], "samples": 1, "splits": 1}, blocks, call)
    return replace(found, floor_bytes=found.memory_bytes, floor_name=COPY)  # F itself is most of the work


def _factored(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    """A program reads A and B twice and writes gradients once; a trip is a block of one of them."""
    sums, lora_as, lora_bs = call[:3]
    factors = sum(t.numel() * _size(t) for t in (*lora_as, *lora_bs)) + sum(t.numel() * 4 for t in sums)
    written = 4 * a["grads"].numel()
    d = (lora_as[0].shape[1] + lora_bs[0].shape[0]) / 2
    again = (a["RP"] // a["BLOCK_R"]) ** 2  # products of every two blocks of ranks
    per_trip = 2 * a["BLOCK"] * a["BLOCK_R"] * _size(lora_as[0])
    trips = cdiv(int(d), a["BLOCK"])
    return Work(
        blocks, (again, trips), factors + written, (2 * again * factors + factors + written) / blocks,
        _ahead(a, per_trip), floor_bytes=factors + written,
    )  # fmt: skip


def _fisher_sums(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    found = _fisher_sample({**a, "fisher": a["row_parts"]}, blocks, call)
    d_out, d_in = a["d_out"], a["d_in"]
    parts = 4 * (a["row_parts"].numel() + a["column_parts"].numel())
    f = 8 * a["splits"] * d_out * d_in  # of F, which is not there
    return replace(
        found, memory_bytes=found.memory_bytes - f + parts,
        cache_bytes=found.cache_bytes + (parts - f) / blocks,
    )  # fmt: skip


def _fisher_sums_add(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    parts = (a["row_parts"], a["column_parts"])
    moved = sum(4 * (t.numel() + 2 * t.shape[1]) for t in parts)
    trips = max(a["row_count"], a["column_count"])
    return Work(blocks, (1, trips), moved, moved / blocks, 4 * a["BLOCK"], floor_bytes=moved)


def _fisher_square(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    moved = a["d_out"] * a["d_in"] * (2 * _size(a["fisher"]) + 4)
    return Work(blocks, (), moved, moved / blocks, moved / blocks, floor_bytes=moved)


def _merge(a: Arguments, blocks: int, call: Sequence[Any]) -> Work:
    weights, size = a["weights"], _size(a["weights"][0])
    moved = 2 * size * sum(w.numel() for w in weights)
    factors = a["BLOCK_M"] * a["ranks"][0] * 4 + a["BLOCK_N"] * a["ranks"][0] * 4
    tile = a["BLOCK_M"] * a["BLOCK_N"] * size
    # The code of every tensor is there, and a block runs that of one.
    return Work(
        blocks, (1, cdiv(a["ranks"][0], a["BLOCK_R"])), moved, moved / blocks + factors, tile,
        floor_bytes=moved, rare=1 / len(weights),
    )  # fmt: skip


_KERNELS: dict[str, Callable[[Arguments, int, Sequence[Any]], Work]] = {
    "ewc_penalty_kernel": _penalty,
    "factored_penalty_kernel": _factored,
    "lora_linear_kernel": _linear,
    "lowrank_rows_kernel": _rows,
    "lowrank_columns_kernel": _columns,
    "lowrank_sum_kernel": _sum,
    "fisher_sample_kernel": _fisher_sample,
    "fisher_token_kernel": _fisher_token,
    "fisher_square_kernel": _fisher_square,
    "fisher_sums_kernel": _fisher_sums,
    "fisher_sums_add_kernel": _fisher_sums_add,
    "merge_kernel": _merge,
}
