# SPDX-License-Identifier: Apache-2.0
"""8-bit codes for the Fishers of real streams, at equal bytes: `python -m benchmarks.continual.codes`.

The code of `fused_ewclora.fishers.EightBitFisher`, s c^2, and fp8 e4m3 with a bf16 scale for every 32 values
as well. Of both: the errors of the penalty and of its gradients, for the Fisher that a stream leaves behind
and the adapters of its last task, and what is left of it when Fishers are added task after task, each sum
rounded again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.demo.environment import timestamp
from fused_ewclora.demo.files import replace_text
from fused_ewclora.fishers import EightBitFisher
from fused_ewclora.methods import EWCLoRA
from fused_ewclora.reference.eight_bit import BLOCK

from .. import machine
from . import configuration, problems
from .configuration import Run
from .page import RESULTS
from .run import State, first, make_optimizer, make_schedule
from .stream import Problem, Task, loader

COMMAND = "python -m benchmarks.continual.codes"
OUTPUT = RESULTS / "fishers" / "codes.json"
SUITES = ("fishers-vision", "fishers-language")
METHOD, SEED = "dense", 0
ADDITIONS, REPEATS = 100, 5
E4M3 = torch.finfo(torch.float8_e4m3fn)
# A Fisher [d_out, d_in], a seed for unbiased rounding, None for the nearest level -> the values of its codes.
Rounding = Callable[[Tensor, int | None], Tensor]
Record = dict[str, Any]


class Stream(NamedTuple):
    """What a stream leaves behind: the Fishers of every task, `[tasks][matrices]`, and the adapters of the
    last one before it ends."""

    fishers: list[list[Tensor]]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]


def learned(run: Run, problem: Problem) -> Stream:
    """Learns the stream of a run of EWC-LoRA on the CPU; its penalty is that of all earlier tasks."""
    state = State(run, problem, torch.device("cpu"))
    method = state.method
    assert isinstance(method, EWCLoRA)
    fishers: list[list[Tensor]] = []
    sums: dict[str, Tensor] = {}
    lora_as: list[Tensor] = []
    lora_bs: list[Tensor] = []
    for number, task in enumerate(problem.stream.tasks):
        _train(state, number, task)
        adapters = [one for layer in fe.adapters(state.model).values() for one in layer.composed()]
        lora_as = [one.lora_a.detach().clone() for one in adapters]
        lora_bs = [one.lora_b.detach() * one.scale for one in adapters]
        method.end_task(loader(task.train, run.training.batch_size), F.cross_entropy)
        now = {name: fisher.clone() for name, fisher in method.ewc.fishers.items()}
        fishers.append([fisher - sums[name] if sums else fisher for name, fisher in now.items()])
        sums = now
    return Stream([[f.clamp_(min=0.0) for f in of_task] for of_task in fishers], lora_as, lora_bs)


def _train(state: State, number: int, task: Task) -> None:
    training = state.run.training.of_task(number)
    state.model.add_head(len(task.classes))
    batches = loader(task.train, training.batch_size, state.order)
    state.method.begin_task(number)
    optimizer = make_optimizer(state.model, training)
    steps = training.iterations or training.epochs * len(batches)
    schedule = make_schedule(optimizer, training, steps)
    state.model.train()
    for step, (x, y) in enumerate(first(batches, steps)):
        optimizer.zero_grad()
        (F.cross_entropy(state.model(x), y) + state.method.penalty()).backward()
        optimizer.step()
        if training.rates_by_step or (step + 1) % len(batches) == 0:
            schedule.step()


def square_root(fisher: Tensor, seed: int | None) -> Tensor:
    """The code of this library."""
    return EightBitFisher.encode(fisher, seed).dense()


def e4m3(fisher: Tensor, seed: int | None) -> Tensor:
    """fp8 e4m3: the largest value of a block becomes the largest level, or less where the scale is rounded
    up."""
    columns = fisher.shape[1]
    blocks = F.pad(fisher, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = blocks.amax(-1, keepdim=True) / E4M3.max
    rounded = scale.bfloat16()
    up = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    scale = torch.where(rounded.float() < scale, up, rounded).float()
    units = torch.where(scale > 0.0, blocks / scale, 0.0)
    if seed is None:
        codes = units.to(torch.float8_e4m3fn).float()
    else:
        step = torch.exp2(units.log2().floor().clamp(min=-6.0) - 3.0)  # between levels; subnormal below 2^-6
        noise = torch.rand(units.shape, generator=torch.Generator().manual_seed(seed))
        codes = ((units / step + noise).floor() * step).clamp(max=E4M3.max)
    return (codes * scale).flatten(1)[:, :columns]


CODES: dict[str, Rounding] = {"square root": square_root, "fp8 e4m3": e4m3}


def penalty_of(fishers: Sequence[Tensor], stream: Stream) -> list[Tensor]:
    """P, and all dA and all dB, each as one tensor, in fp64."""
    wide = [[t.double() for t in tensors] for tensors in (fishers, stream.lora_as, stream.lora_bs)]
    factors = [t.requires_grad_() for t in (*wide[1], *wide[2])]
    loss = FE.ewc_penalty(wide[0], wide[1], wide[2])
    grads = [g.flatten() for g in torch.autograd.grad(loss, factors)]
    count = len(wide[1])
    return [loss.detach(), torch.cat(grads[:count]), torch.cat(grads[count:])]


def errors(fishers: Sequence[Tensor], exact: Sequence[Tensor], stream: Stream) -> dict[str, float]:
    """Relative errors {"penalty", "dA", "dB"}, in norm."""
    pairs = zip(("penalty", "dA", "dB"), penalty_of(fishers, stream), penalty_of(exact, stream), strict=True)
    return {name: float((given - right).norm() / right.norm()) for name, given, right in pairs}


def added(stream: Stream, code: Rounding, seed: int | None) -> list[Tensor]:
    """The sum of ADDITIONS Fishers, those of the tasks over and over, rounded after every addition."""
    sums = [torch.zeros_like(fisher) for fisher in stream.fishers[0]]
    for number in range(ADDITIONS):
        of_task = stream.fishers[number % len(stream.fishers)]
        for i, fisher in enumerate(of_task):
            place = None if seed is None else (seed * ADDITIONS + number) * len(sums) + i
            sums[i] = code(sums[i] + fisher, place)
    return sums


def exact_sum(stream: Stream) -> list[Tensor]:
    """The same sum in fp64."""
    count = len(stream.fishers)
    times = [len(range(start, ADDITIONS, count)) for start in range(count)]
    sums = [torch.zeros_like(fisher, dtype=torch.float64) for fisher in stream.fishers[0]]
    for often, of_task in zip(times, stream.fishers, strict=True):
        for total, fisher in zip(sums, of_task, strict=True):
            total += often * fisher.double()
    return sums


def total_error(fishers: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of the sum of all values, with its sign: what a biased rounding moves."""
    right = sum(float(f.double().sum()) for f in exact)
    return sum(float(f.double().sum()) for f in fishers) / right - 1.0


def measured(stream: Stream) -> dict[str, Record]:
    """By code: errors of one rounding to the nearest level, and after many additions. The latter are rounded
    without bias REPEATS times with other seeds ("unbiased", the largest errors; "bias", mean and standard
    error of that of the total), and once to the nearest level."""
    once = [torch.stack(of).sum(0) for of in zip(*stream.fishers, strict=True)]
    whole = exact_sum(stream)
    found: dict[str, Record] = {}
    for name, code in CODES.items():
        runs = [added(stream, code, seed) for seed in range(REPEATS)]
        of_runs = [errors(run, whole, stream) for run in runs]
        totals = [total_error(run, whole) for run in runs]
        nearest = added(stream, code, None)
        found[name] = {
            "once": errors([code(f, None) for f in once], once, stream),
            "unbiased": {key: max(one[key] for one in of_runs) for key in of_runs[0]},
            "bias": statistics.fmean(totals),
            "bias_error": statistics.stdev(totals) / REPEATS**0.5,
            "nearest": errors(nearest, whole, stream),
            "nearest_bias": total_error(nearest, whole),
        }
    return found


def record(suite: str, root: Path) -> Record:
    """The record of a configuration, by its name."""
    runs = configuration.load(configuration.find(suite)).runs
    run = next(run for run in runs if (run.method, run.seed) == (METHOD, SEED))
    stream = learned(run, problems.load(run.problem, root, run.seed, "cpu"))
    return {
        "suite": suite,
        "seed": run.seed,
        "ewc_lambda": run.options["ewc_lambda"],
        "matrices": [list(fisher.shape) for fisher in stream.fishers[0]],
        "tasks": len(stream.fishers),
        "additions": ADDITIONS,
        "repeats": REPEATS,
        "codes": measured(stream),
        "environment": machine.environment(),
        "time": timestamp(),
        "command": COMMAND,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="data; fetched where possible")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="the file of the records")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found: list[Record] = []
    for suite in SUITES:
        found.append(record(suite, args.data_root))
        replace_text(args.out, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
