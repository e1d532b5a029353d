# SPDX-License-Identifier: Apache-2.0
"""Representative calls of every op: what the compile report compiles and autotuning times.

A workload builds the arguments of its op (its schema without `backend`) on any device; on "meta" they hold no
data. The kinds cover what makes kernels differ: algorithms, dtypes of factors and of F, matmul precisions,
dropout, adapters on slices of rows, and widths that neither vector loads nor tensor descriptors can address.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....reference import eight_bit
from ...candidate import Call, Candidate, LinearShape
from .. import candidates, cost_model, has_penalty, launch, tables

PRECISIONS = ("highest", "high", "medium")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANKS = (4, 10, 16, 30, 64, 128)
DROPOUT = 0.1


class Sizes(NamedTuple):
    """Shapes of one transformer: inputs [samples, tokens, width], hidden layer of `hidden`."""

    samples: int = 64
    tokens: int = 197
    width: int = 1024
    hidden: int = 4096
    layers: int = 6  # adapters of one penalty call


VIT_L = Sizes()


class Make:
    """Tensors of one device; random values from a fixed seed."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        meta = self.device.type == "meta"
        self.generator = None if meta else torch.Generator(self.device).manual_seed(20)

    def normal(self, *shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        if self.generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.mul_(std).to(dtype)

    def fisher(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.normal(*shape, dtype=dtype).abs_()

    def codes(self, rows: int, columns: int) -> Tensor:
        """A Fisher in 8 bits."""
        if self.generator is None:
            return torch.empty(rows, eight_bit.row_bytes(columns), dtype=torch.uint8, device=self.device)
        return eight_bit.encode(self.fisher(rows, columns))

    def integers(self, values: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)


@dataclass(frozen=True)
class Workload:
    """One call: `make(Make(device))` builds its arguments; `dtype` and `rank` are those it stands for."""

    op: str
    kind: str
    dtype: torch.dtype
    rank: int
    make: Callable[[Make], tuple[Any, ...]]
    precision: str = PRECISIONS[0]
    shape: LinearShape | None = None

    @property
    def aligned(self) -> bool:
        """Whether vector loads and tensor descriptors can address its matrices."""
        return not self.kind.endswith("odd widths")

    @property
    def name(self) -> str:
        rank = f", r {self.rank}" if self.rank else ""
        precision = f", {self.precision}" if self.dtype == torch.float32 else ""
        return f"{self.op} {self.kind}{rank}, {tables.name_of(self.dtype)}{precision}"

    def candidates(self) -> list[Candidate]:
        """The algorithms that can compute the call."""
        call = Call("cuda", self.dtype, shape=self.shape, rank=self.rank)
        return [
            c
            for c in candidates(self.op)
            if not c.keys or not cost_model.impossible(self.op, c.keys[0], call)
        ]

    @contextlib.contextmanager
    def precision_set(self) -> Iterator[None]:
        """The matmul precision of the call, put back afterwards."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def noted(workload: Workload, arch: str) -> list[tuple[Candidate, list[launch.Launch], list[tables.Key]]]:
    """What each algorithm would launch on `arch`, and what it looked up; nothing runs."""
    found = []
    for candidate in workload.candidates():
        arguments = workload.make(Make("meta"))
        with workload.precision_set(), launch.noting(arch) as launches, tables.watching() as keys:
            if workload.op.endswith("_penalty") and not has_penalty(workload.rank, arch, workload.op):
                continue
            candidate.run(*arguments)
        found.append((candidate, launches, keys))
    return found


def workloads(
    dtypes: Sequence[torch.dtype] = DTYPES, ranks: Sequence[int] = RANKS, sizes: Sizes = VIT_L
) -> list[Workload]:
    """Every kind of call, for each dtype and rank."""
    found: list[Workload] = []
    for dtype in dtypes:
        for precision in PRECISIONS if dtype == torch.float32 else PRECISIONS[:1]:
            for rank in ranks:
                found += _linears(dtype, rank, precision, sizes)
                found += _penalties(dtype, rank, precision, sizes)
                found += _factored_penalties(dtype, rank, precision, sizes)
                found += _l1_penalties(dtype, rank, precision, sizes)
                found += _merges(dtype, rank, precision, sizes)
            found += _fishers(dtype, precision, sizes)
            found += _fisher_sums(dtype, precision, sizes)
        found += _thresholds(dtype)
    return found


def _adapter(make: Make, rank: int, d_in: int, d_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = make.normal(rank, d_in, dtype=dtype, std=d_in**-0.5)
    return a, make.normal(d_out, rank, dtype=dtype, std=rank**-0.5)


def _linears(dtype: torch.dtype, rank: int, precision: str, sizes: Sizes) -> Iterator[Workload]:
    samples, tokens, width, hidden, _ = sizes
    odd = (samples, tokens, width - 1, hidden - 1)

    def one(
        samples: int, tokens: int, d_in: int, d_out: int, p: float, master: torch.dtype
    ) -> Callable[[Make], tuple[list[Any], list[Any]]]:
        """A frozen weight with bias and one adapter, scale a number."""

        def make(make: Make) -> tuple[list[Any], list[Any]]:
            x = make.normal(samples, tokens, d_in, dtype=dtype)
            weight = make.normal(d_out, d_in, dtype=dtype, std=d_in**-0.5)
            a, b = _adapter(make, rank, d_in, d_out, master)
            seed = make.integers([7], torch.int64).reshape(()) if p else None
            return [x, weight, make.normal(d_out, dtype=dtype)], [
                [a],
                [b],
                [None],
                [0.5],
                [0, 0, d_out],
                p,
                seed,
            ]

        return make

    def slices(make: Make) -> tuple[list[Any], list[Any]]:
        """k and v of a packed projection, scales tensors, factors in the dtype of x."""
        x = make.normal(samples, tokens, width, dtype=dtype)
        weight = make.normal(3 * width, width, dtype=dtype, std=width**-0.5)
        pairs = [_adapter(make, max(rank // 2, 1), width, width, dtype) for _ in range(2)]
        scales = [make.normal(a.shape[0], dtype=dtype) for a, _ in pairs]
        rows = [0, width, 2 * width, 1, 2 * width, 3 * width]
        return [x, weight, None], [
            [a for a, _ in pairs],
            [b for _, b in pairs],
            scales,
            [1.0, 1.0],
            rows,
            0.0,
            None,
        ]

    kinds = {
        "fc1": (one(samples, tokens, width, hidden, 0.0, torch.float32), (width, hidden, False)),
        "fc1 dropout": (one(samples, tokens, width, hidden, DROPOUT, torch.float32), (width, hidden, True)),
        "k, v of qkv": (slices, (width, 3 * width, False)),
        "odd widths": (one(*odd, 0.0, dtype), (odd[2], odd[3], False)),
    }
    for kind, (make, (d_in, d_out, dropout)) in kinds.items():
        shape = LinearShape(samples * tokens, d_in, d_out, rank, dropout)
        yield Workload("lora_linear", kind, dtype, rank, _forward(make), precision, shape)
        yield Workload("lora_linear_backward", kind, dtype, rank, _backward(make), precision, shape)


def _forward(make: Callable[[Make], tuple[list[Any], list[Any]]]) -> Callable[[Make], tuple[Any, ...]]:
    def arguments(maker: Make) -> tuple[Any, ...]:
        base, adapters = make(maker)
        return (*base, *adapters)

    return arguments


def _backward(make: Callable[[Make], tuple[list[Any], list[Any]]]) -> Callable[[Make], tuple[Any, ...]]:
    """Gradients of x, bias, factors and scales; the base weight is frozen."""

    def arguments(maker: Make) -> tuple[Any, ...]:
        (x, weight, bias), adapters = make(maker)
        lora_as, scales = adapters[0], adapters[2]
        dy = maker.normal(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
        rows = x.numel() // x.shape[-1]
        z = maker.normal(rows, sum(a.shape[0] for a in lora_as), dtype=torch.float32)
        needs = [True, False, bias is not None]
        needs += [True] * (2 * len(lora_as)) + [scale is not None for scale in scales]
        return (dy, x, weight, bias, z, *adapters, needs)

    return arguments


def _penalties(dtype: torch.dtype, rank: int, precision: str, sizes: Sizes) -> Iterator[Workload]:
    def penalty(
        width: int, fisher_dtype: torch.dtype, scaled: bool, needs: tuple[bool, bool, bool]
    ) -> Callable[[Make], tuple[Any, ...]]:
        def make(make: Make) -> tuple[Any, ...]:
            pairs = [_adapter(make, rank, width, width, dtype) for _ in range(sizes.layers)]
            coded = fisher_dtype == torch.uint8
            fishers = [
                make.codes(width, width) if coded else make.fisher(width, width, dtype=fisher_dtype)
                for _ in pairs
            ]
            scales = [make.normal(rank, dtype=dtype) if scaled else None for _ in pairs]
            lora_as, lora_bs = [a for a, _ in pairs], [b for _, b in pairs]
            return (fishers, lora_as, lora_bs, scales, [1.0] * sizes.layers, 2.0, list(needs))

        return make

    wide, odd = sizes.width, sizes.width - 1
    kinds = {
        "fp32 F": penalty(wide, torch.float32, False, (True, True, False)),
        "fp32 F, scales": penalty(wide, torch.float32, True, (True, True, True)),
        "bf16 F": penalty(wide, torch.bfloat16, False, (True, True, False)),
        "value only": penalty(wide, torch.float32, False, (False, False, False)),
        "8-bit F": penalty(wide, torch.uint8, False, (True, True, False)),
        "8-bit F, scales": penalty(wide, torch.uint8, True, (True, True, True)),
        "odd widths": penalty(odd, torch.float32, False, (True, True, False)),
        "8-bit F, odd widths": penalty(odd, torch.uint8, False, (True, True, False)),
    }
    for kind, make in kinds.items():
        yield Workload("ewc_penalty", kind, dtype, rank, make, precision)


def _factored_penalties(dtype: torch.dtype, rank: int, precision: str, sizes: Sizes) -> Iterator[Workload]:
    def penalty(
        width: int, scaled: bool, needs: tuple[bool, bool, bool]
    ) -> Callable[[Make], tuple[Any, ...]]:
        def make(make: Make) -> tuple[Any, ...]:
            pairs = [_adapter(make, rank, width, width, dtype) for _ in range(sizes.layers)]
            sums = [make.normal(width, dtype=torch.float32).abs_() for _ in range(2 * sizes.layers)]
            scales = [make.normal(rank, dtype=dtype) if scaled else None for _ in pairs]
            lora_as, lora_bs = [a for a, _ in pairs], [b for _, b in pairs]
            return (sums, lora_as, lora_bs, scales, [1.0] * sizes.layers, 2.0, list(needs))

        return make

    kinds = {
        "gradients": penalty(sizes.width, False, (True, True, False)),
        "scales": penalty(sizes.width, True, (True, True, True)),
        "value only": penalty(sizes.width, False, (False, False, False)),
        "odd widths": penalty(sizes.width - 1, False, (True, True, False)),
    }
    for kind, make in kinds.items():
        yield Workload("factored_penalty", kind, dtype, rank, make, precision)


def _l1_penalties(dtype: torch.dtype, rank: int, precision: str, sizes: Sizes) -> Iterator[Workload]:
    """The calls of `ewc_penalty`, without their Fishers."""
    for workload in _penalties(dtype, rank, precision, sizes):
        kind = {"fp32 F": "gradients", "fp32 F, scales": "scales", "odd widths": "odd widths"}.get(
            workload.kind
        )
        if kind is None:
            continue

        def make(make: Make, of_ewc: Callable[[Make], tuple[Any, ...]] = workload.make) -> tuple[Any, ...]:
            return ([], *of_ewc(make)[1:])

        yield Workload("l1_penalty", kind, dtype, rank, make, precision)


def _fisher_sums(dtype: torch.dtype, precision: str, sizes: Sizes) -> Iterator[Workload]:
    """The calls of `fisher_accumulate_`, with sums in the place of F."""
    for workload in _fishers(dtype, precision, sizes):

        def make(make: Make, of_fisher: Callable[[Make], tuple[Any, ...]] = workload.make) -> tuple[Any, ...]:
            fisher, *rest = of_fisher(make)
            return (fisher.sum(1), fisher.sum(0), *rest)

        yield Workload("fisher_sums_", workload.kind, dtype, 0, make, precision)


def _fishers(dtype: torch.dtype, precision: str, sizes: Sizes) -> Iterator[Workload]:
    samples, tokens, width, hidden, _ = sizes

    def fisher(
        leading: tuple[int, ...], d_in: int, d_out: int, mode: str, ragged: bool = False
    ) -> Callable[[Make], tuple[Any, ...]]:
        def make(make: Make) -> tuple[Any, ...]:
            x = make.normal(*leading, d_in, dtype=dtype)
            dy = make.normal(*leading, d_out, dtype=dtype, std=1.0 / samples)
            bounds = [n * tokens for n in range(samples + 1)]
            cu_seqlens = make.integers(bounds, torch.int32) if ragged else None
            return (make.fisher(d_out, d_in), x, dy, mode, float(samples), cu_seqlens)

        return make

    kinds = {
        "sample": fisher((samples, tokens), width, hidden, "sample"),
        "sample, one token": fisher((samples,), width, hidden, "sample"),
        "sample, cu_seqlens": fisher((samples * tokens,), width, hidden, "sample", ragged=True),
        "batch": fisher((samples, tokens), width, hidden, "batch"),
        "sample, odd widths": fisher((samples, tokens), width - 1, width - 1, "sample"),
        "sample, one token, odd widths": fisher((samples,), width - 1, width - 1, "sample"),
        "batch, odd widths": fisher((samples, tokens), width - 1, width - 1, "batch"),
    }
    for kind, make in kinds.items():
        yield Workload("fisher_accumulate_", kind, dtype, 0, make, precision)


def _merges(dtype: torch.dtype, rank: int, precision: str, sizes: Sizes) -> Iterator[Workload]:
    def merge(
        d_in: int, d_out: int, master: torch.dtype, scaled: bool, layers: int = 1
    ) -> Callable[[Make], tuple[Any, ...]]:
        def make(make: Make) -> tuple[Any, ...]:
            weights = [make.normal(d_out, d_in, dtype=dtype) for _ in range(layers)]
            lora_as, lora_bs = zip(*(_adapter(make, rank, d_in, d_out, master) for _ in weights), strict=True)
            scales = [make.normal(rank, dtype=master) if scaled else None for _ in weights]
            return (weights, list(lora_as), list(lora_bs), scales, [0.5] * layers)

        return make

    width, hidden = sizes.width, sizes.hidden
    kinds = {
        "fp32 factors": merge(width, hidden, torch.float32, False),
        "scales": merge(width, hidden, dtype, True),
        "odd widths": merge(width - 1, hidden - 1, dtype, False),
        "several layers": merge(width, width, torch.float32, False, sizes.layers),
    }
    for kind, make in kinds.items():
        yield Workload("merge_", kind, dtype, rank, make, precision)


def _thresholds(dtype: torch.dtype) -> Iterator[Workload]:
    def make(make: Make) -> tuple[Any, ...]:
        return [make.normal(64, dtype=dtype) for _ in range(4)], 0.1

    yield Workload("soft_threshold_", "gates", dtype, 0, make)
