# SPDX-License-Identifier: Apache-2.0
"""Captured, compiled and concurrent calls, against fp64 or the same steps run eagerly.

`python -m benchmarks.gpu.graphs` captures every operation of every backend in a CUDA graph and replays it on
new values, after calls that push whatever the library keeps out of its caches; runs a training step under
`torch.compile(mode="reduce-overhead")`, calls on two streams at a time, and a whole EWC-LoRA training step as
one graph. It needs nothing but PyTorch and the library. Exit status 1 when something is wrong, 77 without a
backend.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ewclora import available_backends, use_backend
from fused_ewclora import functional as FE

from .. import models
from ..harness import error_to_truth, matmul_precision
from ..shapes import Model
from ..steps import SKIP
from .small_calls import BF16, FP32, TOLERANCES

RANGES = (((160, 320),), ((0, 128),))
PENALTIES = ((96, 64, 10), (33, 70, 16), (1, 5, 1)) * 4  # d_out, d_in, rank
EVICTIONS = 20  # more than any cache of plans holds
LAMBDA = 3.0
STEPS = 5  # of training
RATE = 0.05
VIT = Model("tiny ViT", width=64, depth=2, tokens=17, heads=2, hidden=128)
OF_STEP = {
    FP32: 1e-3,
    BF16: 0.1,
}  # allowed differences of what training changes: products may be cut otherwise
OF_COMPILED = 1e-4
SHOWN = 8  # wrong checks of a backend, named again at the end
POISON = 0x7F  # every byte of memory that was given back: large or no numbers, addresses of nothing


class Work(NamedTuple):
    """One operation on tensors that stay in place; `compute(inputs, backend)` returns its results."""

    name: str
    inputs: list[Tensor]
    compute: Callable[[Sequence[Tensor], str], list[Tensor]]
    tolerance: float

    def __call__(self, backend: str) -> list[Tensor]:
        return self.compute(self.inputs, backend)

    def renew(self) -> None:
        """Other values in the same places; those of Fishers, which are not negative, stay so."""
        with torch.no_grad():
            for tensor in self.inputs:
                if tensor.is_floating_point():
                    tensor.copy_(tensor[torch.randperm(len(tensor), device=tensor.device)] * 0.9)
                else:
                    tensor.add_(1)  # a seed

    def error(self, results: Sequence[Tensor]) -> float:
        """The largest relative error of results for the present values."""
        wide = [t.detach().cpu() for t in self.inputs]
        wide = [t.double() if t.is_floating_point() else t for t in wide]
        for given, copy in zip(self.inputs, wide, strict=True):
            copy.requires_grad_(given.requires_grad)
        truth = [t.detach() for t in self.compute(wide, "reference")]
        return error_to_truth([t.detach().cpu() for t in results], truth)


def _normal(device: str, *shape: int, dtype: torch.dtype = FP32, std: float = 1.0) -> Tensor:
    return (torch.randn(shape) * std).to(dtype).to(device)


def _linear(inputs: Sequence[Tensor], backend: str, options: dict[str, Any]) -> list[Tensor]:
    x, dy, weight, a, b, s, a2, b2, *seed = inputs
    adapters = [FE.Adapter(a, b, s, RANGES[0]), FE.Adapter(a2, b2, 0.5, RANGES[1])]
    more = {"training": True, "seed": seed[0], **options} if seed else options
    y = FE.lora_linear_adapters(x, weight, None, adapters, **more, backend=backend)
    return [y, *torch.autograd.grad(y, [x, a, b, s, a2, b2], dy)]


def linear(device: str, dtype: torch.dtype, dropout: float = 0.0) -> Work:
    """Both passes of two adapters on slices, one of them with a scale per rank."""
    normal = functools.partial(_normal, device)
    data = [normal(197, 384, dtype=dtype), normal(197, 320, dtype=dtype)]
    data.append(normal(320, 384, dtype=dtype, std=0.05))
    shapes = [(10, 384), (160, 10), (10,), (4, 384), (128, 4)]
    factors = [normal(*s, std=0.1 if len(s) == 2 else 1.0).requires_grad_() for s in shapes]
    data[0].requires_grad_()
    seed = [torch.tensor(7, device=device)] if dropout else []
    options: dict[str, Any] = {"dropout_p": dropout} if dropout else {}
    name = f"lora_linear, {str(dtype).removeprefix('torch.')}{', dropout' if dropout else ''}"
    compute = functools.partial(_linear, options=options)
    return Work(name, [*data, *factors, *seed], compute, TOLERANCES[dtype])


def _penalty(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    n = len(inputs) // 3
    fishers, leaves = inputs[:n], inputs[n:]
    value = FE.ewc_penalty(fishers, leaves[:n], leaves[n:], [0.5] * n, LAMBDA, backend=backend)
    return [value, *torch.autograd.grad(value, list(leaves))]


def _penalty_grad(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    n = len(inputs) // 3
    leaves = [t.detach().requires_grad_() for t in inputs[n:]]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    value = FE.ewc_penalty_grad_(inputs[:n], leaves[:n], leaves[n:], [0.5] * n, LAMBDA, backend=backend)
    return [value, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def penalty(device: str, compute: Callable[..., list[Tensor]], name: str) -> Work:
    fishers = [_normal(device, m, n).abs() for m, n, _ in PENALTIES]
    lora_as = [_normal(device, r, n, std=n**-0.5).requires_grad_() for _, n, r in PENALTIES]
    lora_bs = [_normal(device, m, r, std=0.3).requires_grad_() for m, _, r in PENALTIES]
    return Work(name, [*fishers, *lora_as, *lora_bs], compute, 1e-4)


def _l1(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    n = len(inputs) // 2
    value = FE.l1_penalty(inputs[:n], inputs[n:], [0.5] * n, LAMBDA, backend=backend)
    return [value, *torch.autograd.grad(value, list(inputs))]


def l1(device: str) -> Work:
    lora_as = [_normal(device, r, n, std=n**-0.5).requires_grad_() for _, n, r in PENALTIES]
    lora_bs = [_normal(device, m, r, std=0.3).requires_grad_() for m, _, r in PENALTIES]
    return Work("l1_penalty", [*lora_as, *lora_bs], _l1, 1e-4)


def _fisher(inputs: Sequence[Tensor], backend: str, mode: str) -> list[Tensor]:
    start, x, dy = inputs
    fisher = start.clone()
    FE.fisher_accumulate_(fisher, x, dy, mode=mode, weight=0.5, check_finite=False, backend=backend)
    return [fisher]


def fisher(device: str, mode: str, tokens: int) -> Work:
    inputs = [_normal(device, 45, 61).abs(), _normal(device, 5, tokens, 61), _normal(device, 5, tokens, 45)]
    name = f"fisher_accumulate_, {mode}, {tokens} tokens"
    return Work(name, inputs, functools.partial(_fisher, mode=mode), 1e-4)


def _merge(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    before, a, b = inputs
    return [FE.merge_(before.clone(), a, b, 0.5, backend=backend)]


def _threshold(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    return [FE.soft_threshold_(inputs[0].clone(), 0.25, backend=backend)]


def works(device: str) -> list[Work]:
    """Every operation."""
    merged = [_normal(device, 45, 37), _normal(device, 10, 37), _normal(device, 45, 10, std=0.3)]
    return [
        linear(device, BF16),
        linear(device, FP32),
        linear(device, BF16, 0.3),
        penalty(device, _penalty, "ewc_penalty"),
        penalty(device, _penalty_grad, "ewc_penalty_grad_"),
        l1(device),
        fisher(device, "sample", 21),
        fisher(device, "sample", 1),
        fisher(device, "batch", 21),
        Work("merge_", merged, _merge, TOLERANCES[FP32]),
        Work("soft_threshold_", [_normal(device, 300)], _threshold, TOLERANCES[FP32]),
    ]


def evict(backend: str, device: str) -> None:
    """Calls of other shapes and scale factors, so that kept plans and tables make room, then memory that was
    given back is written over."""
    for i in range(EVICTIONS if device != "cpu" else 2):
        shape = (17 + i, 40, 3)
        few = [_normal(device, *shape[:2]).abs(), _normal(device, 3, 40), _normal(device, shape[0], 3)]
        FE.ewc_penalty(few[:1], few[1:2], few[2:], [0.5 + i], LAMBDA, backend=backend)
        x, weight = _normal(device, 5, 40), _normal(device, shape[0], 40)
        FE.lora_linear(x, weight, None, few[1], few[2], 0.25 + i, backend=backend)
    gc.collect()
    if device != "meta":
        for size in (1 << 9, 1 << 12, 1 << 16, 1 << 21):
            held = [torch.full((size,), POISON, dtype=torch.uint8, device=device) for _ in range(32)]
            del held


class Graph:
    """A captured step and the places of its results. On the CPU, of a rehearsal, a replay is another call."""

    def __init__(self, step: Callable[[], Sequence[Tensor]], device: str) -> None:
        self.step, self.graph = step, None
        if device == "cpu":
            self.results = [t.detach().clone() for t in step()]
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and makes what is kept
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = [t.detach() for t in step()]

    def replay(self) -> list[Tensor]:
        """The results of another run, none of which was there before."""
        for result in self.results:
            result.fill_(torch.nan)
        if self.graph is not None:
            self.graph.replay()
        else:
            for result, new in zip(self.results, self.step(), strict=True):
                result.copy_(new.detach())
        return self.results


Check = Callable[[], str | None]


def _beyond(error: float, allowed: float) -> str | None:
    return None if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}"


def replayed(work: Work, backend: str, device: str) -> str | None:
    """What is wrong with replays of an operation on new values, with evictions before each."""
    graph = Graph(lambda: work(backend), device)
    for _ in range(2):
        evict(backend, device)
        work.renew()
        if reason := _beyond(work.error(graph.replay()), work.tolerance):
            return reason
    return None


class Protected(nn.Module):
    """A linear with one adapter and a penalty on it and others, as a module: its tensors stay in place."""

    def __init__(self, device: str, backend: str) -> None:
        super().__init__()
        self.backend = backend
        values = penalty(device, _penalty, "").inputs
        n = len(values) // 3
        self.lora_as = nn.ParameterList([_normal(device, 10, 64, std=0.1), *values[n : 2 * n]])
        self.lora_bs = nn.ParameterList([_normal(device, 96, 10, std=0.1), *values[2 * n :]])
        fishers = [_normal(device, 96, 64).abs(), *values[:n]]
        for i, value in enumerate((_normal(device, 96, 64, std=0.1), *fishers)):
            self.register_buffer(f"fixed{i}", value)

    def forward(self, x: Tensor, dy: Tensor) -> Tensor:
        weight, *fishers = self.buffers()
        a, b = self.lora_as[0], self.lora_bs[0]
        y = FE.lora_linear(x, weight, None, a, b, 0.5, backend=self.backend)
        many = (list(self.lora_as), list(self.lora_bs))
        return (y * dy).sum() + FE.ewc_penalty(fishers, *many, None, LAMBDA, backend=self.backend)


def compiled(backend: str, device: str) -> str | None:
    """What is wrong with a compiled training step whose parameters change in place."""
    module = Protected(device, backend)
    options: dict[str, Any] = {"backend": "eager"} if device == "cpu" else {"mode": "reduce-overhead"}
    step = torch.compile(module, **options)
    parameters = list(module.parameters())
    for i in range(4):
        x, dy = _normal(device, 37, 64), _normal(device, 37, 96)
        expected = torch.autograd.grad(module(x, dy), parameters)
        if device != "cpu":
            torch.compiler.cudagraph_mark_step_begin()
        found = [t.clone() for t in torch.autograd.grad(step(x, dy), parameters)]
        if reason := _beyond(error_to_truth(found, expected), OF_COMPILED):
            return f"call {i}: {reason}"
        with torch.no_grad():
            torch._foreach_add_(parameters, list(expected), alpha=-1e-3)
        if i == 1:
            evict(backend, device)
    return None


def two_streams(backend: str, device: str) -> str | None:
    """What is wrong with calls that run at the same time."""
    several = [linear(device, dtype) for dtype in (BF16, BF16, FP32, FP32)]
    several += [penalty(device, _penalty, "") for _ in range(2)]
    contexts: list[Any] = [contextlib.nullcontext()] * 2
    if device != "cpu":
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        contexts = [torch.cuda.stream(stream) for stream in streams]
    results: list[list[Tensor]] = []
    for _ in range(5):
        results = []
        for i, work in enumerate(several):
            with contexts[i % 2]:
                results.append(work(backend))
    if device != "cpu":
        torch.cuda.synchronize()
    errors = [work.error(found) / work.tolerance for work, found in zip(several, results, strict=True)]
    return _beyond(max(errors), 1.0)


class Training:
    """A whole step of EWC-LoRA: loss, penalty, gradients and SGD with momentum, in place."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        subject = models.vision(VIT, VIT.depth, 4, VIT.tokens, 4, device, dtype)
        self.x, self.labels = subject.x, subject.labels
        self.adapted = models.adapted(subject)
        pairs = zip(self.adapted.lora_as, self.adapted.lora_bs, strict=True)
        self.fishers = [_normal(device, b.shape[0], a.shape[1]).square() for a, b in pairs]
        self.ewc = models.protected(self.adapted.model, self.fishers)
        self.parameters = self.adapted.leaves()
        self.moments = [torch.zeros_like(p) for p in self.parameters]
        self.start = [p.detach().clone() for p in self.parameters]

    def restart(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.start)
            torch._foreach_zero_(self.moments)

    def __call__(self) -> list[Tensor]:
        loss = F.cross_entropy(self.adapted.model(self.x), self.labels) + self.ewc.penalty()
        gradients = list(torch.autograd.grad(loss, self.parameters))
        with torch.no_grad():
            torch._foreach_mul_(self.moments, 0.9)
            torch._foreach_add_(self.moments, gradients)
            torch._foreach_add_(self.parameters, self.moments, alpha=-RATE)
        return [loss]

    def change(self) -> list[Tensor]:
        """What training has changed."""
        return [p.detach() - s for p, s in zip(self.parameters, self.start, strict=True)]


def trained(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """What is wrong with a whole step replayed from a graph, beside the same steps run eagerly."""
    with use_backend(backend):
        training = Training(device, dtype)
        for _ in range(STEPS):
            training()
        expected = training.change()
        graph = Graph(training, device)
        training.restart()
        for i in range(STEPS):
            if i == 2:
                evict(backend, device)
            graph.replay()
        return _beyond(error_to_truth(training.change(), expected), OF_STEP[dtype])


def checks(backend: str, device: str) -> Iterator[tuple[str, Check]]:
    """All checks of a backend, by name; each makes its tensors when it is called."""
    for i, work in enumerate(works("meta")):
        yield f"graph, {work.name}", lambda i=i: replayed(works(device)[i], backend, device)
    yield "two streams", lambda: two_streams(backend, device)
    for dtype in (FP32, BF16):
        name = f"graph of a training step, {str(dtype).removeprefix('torch.')}"
        yield name, lambda dtype=dtype: trained(backend, device, dtype)
    yield "torch.compile, reduce-overhead", lambda: compiled(backend, device)


def lost(device: str) -> bool:
    """Whether an earlier error has made the device unusable for this process."""
    try:
        return bool(torch.ones(2, device=device).sum().item() != 2)
    except Exception:
        return True


def _checked(backend: str, device: str, end: float) -> tuple[list[str], str]:
    """Runs the checks of a backend until `end`; returns lines about those that are wrong, and the verdict."""
    torch.manual_seed(0)
    wrong: list[str] = []
    left = list(checks(backend, device))
    count = len(left)
    while left and time.monotonic() < end:
        name, check = left.pop(0)
        begin = time.monotonic()
        try:
            with matmul_precision("highest"):
                reason = check()
        except Exception as failure:
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
        told = f"wrong: {name}: {reason}" if reason else f"right: {name}"
        print(f"{told} ({time.monotonic() - begin:.1f} s)", flush=True)
        wrong += [told] if reason else []
        if reason and lost(device):
            wrong.append("the device is lost to an error: nothing more can run in this process")
            break
    unreached = f", {len(left)} were not reached" if left else ""
    return wrong, f"{backend}: {len(wrong)} of {count - len(left)} checks are wrong{unreached}"


def run_checks(backends: Sequence[str], device: str, end: float) -> int:
    """Runs the checks of some backends until `end`; what is wrong comes last. Returns the exit status."""
    told, verdicts = [], []
    for name in backends:
        wrong, verdict = _checked(name, device, end)
        told += [f"{name}: {line}" for line in wrong[:SHOWN]]
        verdicts.append(verdict)
    print(*told, "; ".join(verdicts), sep="\n", flush=True)
    return int(bool(told))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.graphs", description=__doc__)
    parser.add_argument("--budget", type=float, default=600.0, help="no check starts after so many seconds")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, without graphs, on the reference"
    )
    args = parser.parse_args()
    end = time.monotonic() + args.budget
    if args.rehearse:
        return run_checks(["reference"], "cpu", end)
    reasons = available_backends()
    there = [name for name in ("triton", "cuda") if reasons[name] is None]
    if not there:
        print(f"no backend of a GPU: {reasons['triton']}; {reasons['cuda']}")
        return SKIP
    return run_checks(there, "cuda", end)


if __name__ == "__main__":
    raise SystemExit(main())
