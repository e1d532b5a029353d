# SPDX-License-Identifier: Apache-2.0
"""Small ragged calls of every operation, forward and backward, each compared with the reference in fp64.

They are few enough for a tool that checks every memory access, and cover tails, slices, dropout, packed
samples and every precision. `python -m benchmarks.gpu.small_calls` runs them on every available backend of a
GPU, and needs no libraries of tests. Exit status 1 when a result is wrong, 77 when no backend asked for is
available.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ewclora import available_backends
from fused_ewclora import functional as FE
from fused_ewclora.fishers import EightBitFisher, FactoredFisher, Fisher, KroneckerFisher

from ..harness import error_to_truth, matmul_precision
from ..l1_penalty import LOST, of_signs
from ..steps import SKIP

BACKENDS = ("triton", "cuda", "reference")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {FP32: 2e-5, BF16: 2e-2, FP16: 4e-3}
PRECISIONS = {"highest": 2e-5, "high": 4e-3, "medium": 3e-2}  # of fp32 products
# What signs add in the gradients of an l1 norm. In fp32 none of so few elements is near enough to 0.
SIGNS = {"highest": 0.0, "high": of_signs(LOST["high"]), "medium": of_signs(LOST["medium"])}
Ranges = tuple[tuple[int, int], ...]
SHOWN = 8  # wrong calls of a backend, named again at the end
RAGGED = ((45, 37, 10), (64, 131, 7), (1, 1, 1))  # d_out, d_in, rank


class Values:
    """Random tensors of one seed, on a device, or as fp64 on the CPU with the very same values."""

    def __init__(self, device: str, exact: bool) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.device, self.exact = device, exact

    def __call__(self, *shape: int, dtype: torch.dtype = FP32, std: float = 1.0) -> Tensor:
        drawn = (torch.randn(shape, generator=self.generator) * std).to(dtype)
        return drawn.double() if self.exact else drawn.to(self.device)

    def leaf(self, *shape: int, dtype: torch.dtype = FP32, std: float = 1.0) -> Tensor:
        return self(*shape, dtype=dtype, std=std).requires_grad_()


Method = Callable[[Values, str], list[Tensor]]


class Call(NamedTuple):
    name: str
    method: Method
    tolerance: float
    precision: str = "highest"


def linear(
    values: Values, backend: str, rows: int = 37, d_in: int = 61, d_out: int = 45,
    adapters: Sequence[tuple[int, Ranges]] = ((10, ((0, 45),)),), dtype: torch.dtype = BF16,
    master: torch.dtype | None = None, dropout: float = 0.0, strided: bool = False, base: bool = False,
) -> list[Tensor]:  # fmt: skip
    """y and all gradients; every second adapter has a scale per rank. `base`: of weight and bias as well."""
    master = master or dtype
    x = values(rows, d_in + 5, dtype=dtype)[:, 2:-3] if strided else values(rows, d_in, dtype=dtype)
    weight, bias = values(d_out, d_in, dtype=dtype, std=d_in**-0.5), values(d_out, dtype=dtype)
    leaves = [x.requires_grad_(), *([weight.requires_grad_(), bias.requires_grad_()] if base else [])]
    adapter_arguments = []
    for i, (rank, ranges) in enumerate(adapters):
        a = values.leaf(rank, d_in, dtype=master, std=d_in**-0.5)
        b = values.leaf(sum(stop - start for start, stop in ranges), rank, dtype=master, std=0.3)
        scale = values.leaf(rank, dtype=master) if i % 2 else 0.75
        adapter_arguments.append(FE.Adapter(a, b, scale, ranges))
        leaves += [t for t in (a, b, scale) if isinstance(t, Tensor)]
    options: dict[str, Any] = {"dropout_p": dropout, "training": True, "seed": 5} if dropout else {}
    y = FE.lora_linear_adapters(x, weight, bias, adapter_arguments, **options, backend=backend)
    return [y, *torch.autograd.grad(y, leaves, values(rows, d_out, dtype=dtype))]


def _fisher(values: Values, m: int, n: int, kind: torch.dtype | str) -> Fisher:
    if kind == "factored":
        return FactoredFisher(values(m).abs(), values(n).abs())
    if kind == "kronecker":
        roots = values(m, m), values(n, n)
        return KroneckerFisher(*(root @ root.T for root in roots))
    if isinstance(kind, torch.dtype):
        return values(m, n, dtype=kind).abs()
    # The same codes on every device: a GPU may round to others.
    found = EightBitFisher.encode(torch.randn(m, n, generator=values.generator).abs())
    return found._replace(codes=found.codes.to(values.device))


def penalty(
    values: Values, backend: str, shapes: Sequence[tuple[int, int, int]] = RAGGED,
    dtype: torch.dtype = FP32, fisher: torch.dtype | str | None = FP32,
) -> list[Tensor]:  # fmt: skip
    """The loss and all gradients; every second adapter has a scale per rank. `fisher`: the dtype of dense
    Fishers, or "8 bits", "factored" or "kronecker"; None is the l1 norm, which has none."""
    fishers = [] if fisher is None else [_fisher(values, m, n, fisher) for m, n, _ in shapes]
    lora_as = [values.leaf(r, n, dtype=dtype, std=n**-0.5) for _, n, r in shapes]
    lora_bs = [values.leaf(m, r, dtype=dtype, std=0.3) for m, _, r in shapes]
    scales = [values.leaf(r, dtype=dtype) if i % 2 else 0.5 for i, (_, _, r) in enumerate(shapes)]
    if fisher is None:
        loss = FE.l1_penalty(lora_as, lora_bs, scales, 3.0, backend=backend)
    else:
        loss = FE.ewc_penalty(fishers, lora_as, lora_bs, scales, 3.0, backend=backend)
    leaves = [*lora_as, *lora_bs, *(s for s in scales if isinstance(s, Tensor))]
    return [loss, *torch.autograd.grad(loss, leaves)]


def fisher(
    values: Values, backend: str, samples: int = 3, tokens: int = 21, d_in: int = 61, d_out: int = 45,
    dtype: torch.dtype = BF16, mode: str = "sample", packed: Sequence[int] = (), flat: bool = False,
    factored: bool = False,
) -> list[Tensor]:  # fmt: skip
    """F, or its row and column sums, after one call, starting from random values; `packed` are lengths of
    samples, `flat` means one token without a dimension for it."""
    start = FactoredFisher(values(d_out).abs(), values(d_in).abs()) if factored else values(d_out, d_in).abs()
    leading = (sum(packed),) if packed else (samples,) if flat else (samples, tokens)
    x, dy = values(*leading, d_in, dtype=dtype), values(*leading, d_out, dtype=dtype)
    bounds = torch.tensor([0, *packed], device=x.device).cumsum(0) if packed else None
    FE.fisher_accumulate_(start, x, dy, mode=mode, weight=0.5, cu_seqlens=bounds, backend=backend)
    return [start] if isinstance(start, Tensor) else [start.rows, start.columns]


def merge(values: Values, backend: str, dtype: torch.dtype = FP32) -> list[Tensor]:
    """Two layers and a slice of rows of a third, in one call."""
    whole = [values(45, 37, dtype=dtype), values(64, 131, dtype=dtype), values(96, 33, dtype=dtype)]
    weights = [*whole[:2], whole[2][32:64]]
    ranks = (10, 7, 16)
    lora_as = [values(r, w.shape[1]) for r, w in zip(ranks, weights, strict=True)]
    lora_bs = [values(w.shape[0], r, std=0.3) for r, w in zip(ranks, weights, strict=True)]
    FE.merge_(weights, lora_as, lora_bs, [0.5, values(7), 1.0], backend=backend)
    return whole


def threshold(values: Values, backend: str, dtype: torch.dtype = FP32) -> list[Tensor]:
    """Vectors of several lengths in one call."""
    scales = [values(n, dtype=dtype) for n in (1, 10, 257)]
    FE.soft_threshold_(scales, 0.25, backend=backend)
    return scales


SLICES = ((10, ((32, 64),)), (4, ((64, 96),)))
HEADS = ((7, ((0, 9), (21, 30))), (12, ((9, 21),)))
LINEARS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {"dtype": FP16},
    "fp32": {"dtype": FP32},
    "bf16, adapters in fp32": {"master": FP32},
    "slices": {"d_out": 96, "adapters": SLICES},
    "several ranges": {"adapters": HEADS},
    "dropout": {"dropout": 0.3},
    "dropout, slices, fp32": {"dropout": 0.3, "dtype": FP32, "d_out": 96, "adapters": SLICES},
    "one row": {"rows": 1},
    "aligned": {"rows": 128, "d_in": 128, "d_out": 128, "adapters": ((16, ((0, 128),)),)},
    "rank 70": {"adapters": ((70, ((0, 45),)),)},
    "columns of a wider x": {"strided": True},
    "weight and bias": {"base": True},
}
PENALTIES: dict[str, dict[str, Any]] = {
    "adapters in bf16": {"dtype": BF16},
    "F in bf16": {"fisher": BF16},
    "one": {"shapes": ((48, 64, 16),)},
    "many, rank 70": {"shapes": ((33, 70, 70), *((17, 40, 3),) * 20)},
    "F in 8 bits": {"fisher": "8 bits"},
    "F in 8 bits, adapters in bf16": {"fisher": "8 bits", "dtype": BF16},
    "F in 8 bits, rank 70": {"fisher": "8 bits", "shapes": ((33, 70, 70), (50, 300, 30))},
}
FACTORED: dict[str, dict[str, Any]] = {
    "fp32": {},
    "adapters in bf16": {"dtype": BF16},
    "many, rank 70": {"shapes": ((33, 700, 70), *((17, 40, 3),) * 20)},
}
FISHERS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {"dtype": FP16},
    "fp32": {"dtype": FP32},
    "aligned": {"tokens": 64, "d_in": 128, "d_out": 128},
    "T=1": {"tokens": 1, "samples": 50},
    "no tokens' dimension": {"flat": True, "samples": 50},
    "cu_seqlens": {"packed": (5, 0, 33, 1)},
    "cu_seqlens, fp32": {"packed": (5, 0, 33, 1), "dtype": FP32},
    "batch": {"mode": "batch"},
    "batch, fp32": {"mode": "batch", "dtype": FP32},
}
SUMS = ("bf16", "fp16", "fp32", "aligned", "T=1", "cu_seqlens", "batch")


def calls() -> Iterator[Call]:
    """All small calls."""
    for name, options in LINEARS.items():
        tolerance = TOLERANCES[options.get("dtype", BF16)]
        yield Call(f"lora_linear, {name}", functools.partial(linear, **options), tolerance)
    single = functools.partial(linear, dtype=FP32)
    yield Call("lora_linear, fp32, high", single, PRECISIONS["high"], "high")
    for precision, tolerance in PRECISIONS.items():
        yield Call(f"ewc_penalty, {precision}", penalty, tolerance, precision)
    for name, options in PENALTIES.items():
        tolerance = max(PRECISIONS["high"], TOLERANCES[options.get("dtype", FP32)])
        yield Call(f"ewc_penalty, {name}", functools.partial(penalty, **options), tolerance, "high")
    for name, options in FACTORED.items():
        method = functools.partial(penalty, fisher="factored", **options)
        yield Call(f"factored_penalty, {name}", method, TOLERANCES[options.get("dtype", FP32)])
    method = functools.partial(penalty, fisher="kronecker")
    yield Call("kronecker_penalty, fp32", method, TOLERANCES[FP32])
    for precision, tolerance in PRECISIONS.items():
        method = functools.partial(penalty, fisher=None)
        yield Call(f"l1_penalty, {precision}", method, tolerance + SIGNS[precision], precision)
    for name in ("adapters in bf16", "one", "many, rank 70"):
        options = PENALTIES[name]
        method = functools.partial(penalty, fisher=None, **options)
        yield Call(f"l1_penalty, {name}", method, TOLERANCES[options.get("dtype", FP32)])
    for name, options in FISHERS.items():
        tolerance = TOLERANCES[options.get("dtype", BF16)]
        yield Call(f"fisher_accumulate_, {name}", functools.partial(fisher, **options), tolerance)
    for name in SUMS:
        method = functools.partial(fisher, factored=True, **FISHERS[name])
        yield Call(f"fisher_sums_, {name}", method, TOLERANCES[FISHERS[name].get("dtype", BF16)])
    for name, method in (("merge_", merge), ("soft_threshold_", threshold)):
        for dtype in (FP32, BF16, FP16):
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield Call(label, functools.partial(method, dtype=dtype), TOLERANCES[dtype])


def wrong(call: Call, backend: str, device: str) -> str | None:
    """What is wrong with the results of a call, or None."""
    truth = call.method(Values("cpu", True), "reference")
    with matmul_precision(call.precision):
        results = [t.detach().cpu() for t in call.method(Values(device, False), backend)]
    error = error_to_truth(results, [t.detach() for t in truth])
    return (
        None if error <= call.tolerance else f"error {error:.3g} against fp64, allowed {call.tolerance:.3g}"
    )


def _checked(backend: str, device: str) -> tuple[list[str], int]:
    """Runs and checks all calls in this process; returns lines about those that are wrong, and their
    number."""
    failed, count = [], 0
    for call in calls():
        try:
            reason = wrong(call, backend, device)
        except Exception as failure:
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
        count += 1
        if reason:
            failed.append(f"wrong: {call.name}: {reason}")
        print(failed[-1] if reason else f"right: {call.name}", flush=True)
    return failed, count


def run_calls(backend: str, device: str, *others: str) -> int:
    """Runs and checks all calls of some backends; what is wrong comes last. Returns the exit status."""
    told, verdicts = [], []
    for name in (backend, *others):
        failed, count = _checked(name, device)
        told += [f"{name}: {line}" for line in failed[:SHOWN]]
        verdicts.append(f"{name}: {len(failed)} of {count} calls are wrong")
    print(*told, "; ".join(verdicts), sep="\n", flush=True)
    return int(bool(told))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small_calls", description=__doc__)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, on the reference")
    args = parser.parse_args()
    if args.rehearse and args.backends == ["cuda"]:
        print("a rehearsal builds nothing")
        return SKIP
    if args.rehearse:
        return run_calls("reference", "cpu")
    reasons = {name: available_backends()[name] for name in args.backends}
    for name in reasons:
        if reasons[name] is not None:
            print(f"{name}: {reasons[name]}", flush=True)
    there = [name for name in reasons if reasons[name] is None]
    return run_calls(there[0], "cuda", *there[1:]) if there else SKIP


if __name__ == "__main__":
    raise SystemExit(main())
