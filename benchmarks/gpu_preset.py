# SPDX-License-Identifier: Apache-2.0
"""The preset for GPUs, in order of importance: a run that stops early has measured what matters most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .shapes import PRECISIONS, REHEARSAL, RELEASE, Model, Sizes
from .workload import BOTH, LATER, MAIN, OP, SMALL, Workload
from .workloads import (
    fisher,
    l1_penalty,
    label_of,
    linear,
    merge,
    penalty,
    penalty_of_all_linears,
    step,
    threshold,
)

SINGLE, HALF = "float32", "bfloat16"
OP_LAYER = "op layer"  # label of the case that measures the host time of one call of the op
OP_WIDTH = 64  # of its matrices, so small that the device finishes before the host


def gpu(sizes: Sizes = RELEASE) -> Iterator[Workload]:
    """bf16 data, published ranks; the cases that have targets come first in each op."""
    yield from _linears(sizes)
    yield from _penalties(sizes)
    yield from _fishers(sizes)
    for optimizer in ("Adam", "SGD"):
        m = sizes.large
        yield step(m.name, m.depth, sizes.samples, m.tokens, sizes.slice_rank, optimizer, HALF, MAIN)
    yield from _merges(sizes)


def rehearsal() -> Iterator[Workload]:
    """Tiny cases, each with a property that the cases before it do not have."""
    shown: set[tuple[object, ...]] = set()
    for workload in gpu(REHEARSAL):
        new = set(_traits(workload)) - shown
        shown |= new
        if new:
            yield workload


def _traits(workload: Workload) -> Iterator[tuple[object, ...]]:
    yield "dtype", workload.op, workload.dtype
    yield (
        "part",
        workload.op,
        workload.part if workload.part in (LATER, OP) else MAIN,
    )  # the other parts run in the same way
    for name in ("pass", "mode", "precision", "optimizer"):
        yield name, workload.shape.get(name)
    for name in ("adapters", "length"):
        yield name, workload.op, workload.shape.get(name)


def _linears(sizes: Sizes) -> Iterator[Workload]:
    """Cases with both passes first: they have targets. Slow peers only for both passes of the large model."""

    def layers(model: Model, which: str, part: str = MAIN) -> Iterator[Workload]:
        rows = sizes.samples * model.tokens
        for name, size in model.linears().items():
            yield linear(label_of(model, name), rows, size, sizes.rank, HALF, False, which, part)
        label, size = label_of(model, "qkv, slices k,v"), model.linears()["qkv"]
        yield linear(label, rows, size, sizes.slice_rank, HALF, True, which, part)

    for model in sizes.models:
        yield from layers(model, BOTH)
    for which in ("forward", "backward"):
        yield from layers(sizes.large, which)
    yield from layers(sizes.large, BOTH, LATER)
    # One token, one sample and a few samples, which benchmarks.choose needs; the smallest first.
    for rows in (1, sizes.base.tokens, 8 * sizes.base.tokens):
        for which in ("forward", "backward"):
            for model, name in ((sizes.small, "proj"), (sizes.base, "proj"), (sizes.base, "fc1")):
                label, size = label_of(model, name), model.linears()[name]
                yield linear(label, rows, size, sizes.rank, HALF, False, which, SMALL)
    for which in ("forward", "backward"):
        for model in (sizes.base, sizes.huge):
            yield from layers(model, which)


def _penalties(sizes: Sizes) -> Iterator[Workload]:
    """The published setting first: k and v of the large model, F in fp32, at every precision."""

    def kv(
        models: Sequence[Model], rank: int, dtype: str, precisions: Sequence[str], part: str = MAIN
    ) -> Iterator[Workload]:
        for precision in precisions:
            for m in models:
                size, label = (m.width, m.width), label_of(m, "k,v")
                yield penalty(label, size, 2 * m.depth, rank, dtype, precision, part)

    published = sizes.slice_rank
    yield from kv(sizes.models, published, SINGLE, PRECISIONS)
    yield from kv([sizes.large], published, SINGLE, ("highest", "high"), LATER)
    yield from kv(sizes.models, published, HALF, PRECISIONS)
    large = sizes.large
    for precision in PRECISIONS:
        label, size = label_of(large, "k,v"), (large.width, large.width)
        yield l1_penalty(label, size, 2 * large.depth, published, precision, MAIN)
    # Small matrices, so that host time dominates a call of the op; then few or small adapters.
    square = (OP_WIDTH, OP_WIDTH)
    yield penalty(OP_LAYER, square, 2 * sizes.large.depth, published, SINGLE, "high", OP)
    for model, depth in (
        (sizes.small, 1),
        (sizes.small, sizes.small.depth),
        (sizes.base, 1),
        (sizes.base, 4),
    ):
        yield from kv([model._replace(depth=depth)], published, SINGLE, ("high",), SMALL)
    for rank in (published, sizes.rank):
        for dtype in (SINGLE, HALF):
            for precision in PRECISIONS:
                yield penalty_of_all_linears(sizes.large, rank, dtype, precision, MAIN)
    for dtype in (SINGLE, HALF):
        yield from kv(sizes.models, sizes.rank, dtype, PRECISIONS)


def _fishers(sizes: Sizes) -> Iterator[Workload]:
    """Per-sample Fisher of the large model first: it has the targets."""
    for mode in ("sample", "batch"):
        for model in (sizes.large, sizes.huge):
            for name, size in model.linears().items():
                yield fisher(label_of(model, name), sizes.samples, model.tokens, size, mode, HALF, MAIN)
    for samples, token in ((1, True), (1, False), (8, False)):  # one token, one sample, a few samples
        for model in (sizes.small, sizes.base):
            tokens, size = 1 if token else model.tokens, model.linears()["proj"]
            yield fisher(label_of(model, "proj"), samples, tokens, size, "sample", HALF, SMALL)


def _merges(sizes: Sizes) -> Iterator[Workload]:
    """One layer, then k and v of a whole model; then the scales of all adapters, and one long vector."""
    for model, dtype in ((sizes.large, SINGLE), (sizes.large, HALF), (sizes.small, SINGLE)):
        size = (model.width, model.width)
        for count in (1, 2 * model.depth):
            yield merge(label_of(model, "k,v"), size, count, sizes.slice_rank, dtype, MAIN)
    yield threshold("scales", 2 * sizes.large.depth, sizes.rank, MAIN)
    yield threshold("one long vector", 1, sizes.scales, MAIN)
