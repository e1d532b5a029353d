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
from ..steps import SKIP

BACKENDS = ("triton", "cuda", "reference")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {FP32: 2e-5, BF16: 2e-2, FP16: 4e-3}
PRECISIONS = {"highest": 2e-5, "high": 4e-3, "medium": 3e-2}  # of fp32 products
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


def dense(values: Values, rows: int, columns: int, dtype: torch.dtype = FP32) -> Tensor:
    """A Fisher, a number per weight."""
    return values(rows, columns, dtype=dtype).abs()


def eight_bit(values: Values, rows: int, columns: int) -> Fisher:
    """The same codes on every device."""
    found = EightBitFisher.encode(torch.randn(rows, columns, generator=values.generator).abs())
    return found._replace(codes=found.codes.to(values.device))


def factored(values: Values, rows: int, columns: int) -> Fisher:
    """Row and column sums."""
    return FactoredFisher(values(rows).abs(), values(columns).abs())


def kronecker(values: Values, rows: int, columns: int) -> Fisher:
    """Two positive semidefinite factors."""
    roots = [values(size, size, std=size**-0.5) for size in (rows, columns)]
    return KroneckerFisher(*((root.double() @ root.double().T).to(root.dtype) for root in roots))


def penalty(
    values: Values, backend: str, shapes: Sequence[tuple[int, int, int]] = RAGGED,
    dtype: torch.dtype = FP32, fisher: Callable[[Values, int, int], Fisher] = dense,
) -> list[Tensor]:  # fmt: skip
    """The loss and all gradients; every second adapter has a scale per rank."""
    fishers = [fisher(values, m, n) for m, n, _ in shapes]
    lora_as = [values.leaf(r, n, dtype=dtype, std=n**-0.5) for _, n, r in shapes]
    lora_bs = [values.leaf(m, r, dtype=dtype, std=0.3) for m, _, r in shapes]
    scales = [values.leaf(r, dtype=dtype) if i % 2 else 0.5 for i, (_, _, r) in enumerate(shapes)]
    loss = FE.ewc_penalty(fishers, lora_as, lora_bs, scales, 3.0, backend=backend)
    leaves = [*lora_as, *lora_bs, *(s for s in scales if isinstance(s, Tensor))]
    return [loss, *torch.autograd.grad(loss, leaves)]


def fisher(
    values: Values, backend: str, samples: int = 3, tokens: int = 21, d_in: int = 61, d_out: int = 45,
    dtype: torch.dtype = BF16, mode: str = "sample", packed: Sequence[int] = (), flat: bool = False,
) -> list[Tensor]:  # fmt: skip
    """F after one call, starting from random values; `packed` are lengths of samples, `flat` means one token
    without a dimension for it."""
    start = values(d_out, d_in).abs()
    leading = (sum(packed),) if packed else (samples,) if flat else (samples, tokens)
    x, dy = values(*leading, d_in, dtype=dtype), values(*leading, d_out, dtype=dtype)
    bounds = torch.tensor([0, *packed], device=x.device).cumsum(0) if packed else None
    FE.fisher_accumulate_(start, x, dy, mode=mode, weight=0.5, cu_seqlens=bounds, backend=backend)
    return [start]


def sums(values: Values, backend: str, d_in: int = 61, d_out: int = 45, **options: Any) -> list[Tensor]:
    """Row and column sums after one call; `options` as of `fisher`."""
    of_rows, of_columns = values(d_out).abs(), values(d_in).abs()
    leading, dtype, packed = options["leading"], options.get("dtype", BF16), options.get("packed", ())
    x, dy = values(*leading, d_in, dtype=dtype), values(*leading, d_out, dtype=dtype)
    bounds = torch.tensor([0, *packed], device=x.device).cumsum(0) if packed else None
    mode = options.get("mode", "sample")
    FE.fisher_accumulate_(
        FactoredFisher(of_rows, of_columns), x, dy, mode=mode, weight=0.5, cu_seqlens=bounds, backend=backend
    )
    return [of_rows, of_columns]


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
    "F in bf16": {"fisher": functools.partial(dense, dtype=BF16)},
    "F in 8 bits": {"fisher": eight_bit},
    "F in 8 bits, adapters in bf16": {"fisher": eight_bit, "dtype": BF16},
    "factored": {"fisher": factored},
    "factored, adapters in bf16": {"fisher": factored, "dtype": BF16},
    "factored, rank 70": {"fisher": factored, "shapes": ((33, 70, 70), *((17, 40, 3),) * 20)},
    "Kronecker": {"fisher": kronecker},
    "one": {"shapes": ((48, 64, 16),)},
    "many, rank 70": {"shapes": ((33, 70, 70), *((17, 40, 3),) * 20)},
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


SUMS: dict[str, dict[str, Any]] = {
    "bf16": {"leading": (3, 21)},
    "fp32": {"leading": (3, 21), "dtype": FP32},
    "aligned": {"leading": (3, 64), "d_in": 128, "d_out": 128},
    "T=1": {"leading": (50, 1)},
    "cu_seqlens": {"leading": (39,), "packed": (5, 0, 33, 1)},
    "batch": {"leading": (3, 21), "mode": "batch"},
}


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
    for name, options in FISHERS.items():
        tolerance = TOLERANCES[options.get("dtype", BF16)]
        yield Call(f"fisher_accumulate_, {name}", functools.partial(fisher, **options), tolerance)
    for name, options in SUMS.items():
        tolerance = TOLERANCES[options.get("dtype", BF16)]
        yield Call(f"fisher_sums_, {name}", functools.partial(sums, **options), tolerance)
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
