# SPDX-License-Identifier: Apache-2.0
"""The loss on the way from one task to the next: `python -m fused_ewclora.benchmarks.continual.path`.

SD-LoRA (arXiv 2501.13198) explains its stability by a path of low loss: training moves from a minimum of the
tasks so far to one of them and the next without leaving a region where all of their losses are low. Here
every method learns a stream, and the weights after task t and after task t + 1, W + B diag(s) A or W and all
directions of SD-LoRA with their magnitudes, are joined by a straight line,

    W(p) = (1 - p) W_t + p W_(t+1),    p in [0, 1],

along which the losses and accuracies of the first task, of all tasks up to t, and of task t + 1 are measured.
They are task-aware: each task by its own head, which stays as it was learned. The barrier of a way is the
largest height of the loss of the tasks up to t over the straight line between its values at the ends.

Written to the folder `--out`: `path.json`, a list with a record per run, and `path.png`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ewclora.demo.environment import timestamp
from fused_ewclora.demo.evaluation import PERCENT
from fused_ewclora.demo.files import replace_text
from fused_ewclora.demo.job import device_of
from fused_ewclora.demo.vit import Classifier
from fused_ewclora.errors import ArgumentError, EWCLoRAError
from fused_ewclora.ewc.estimation import to_device

from ..collection import Record
from ..machine import environment
from ..plot import MISSING
from ..report import table
from . import configuration, problems
from .configuration import Run, Training
from .learner import Heads
from .run import State, learn
from .stream import Problem, Task, loader

SUITE, POINTS = "path-digits", 11
FIRST, EARLIER, NEW = "first task", "tasks so far", "new task"
SPLITS = ("train", "test")
Weights = dict[str, Tensor]


def weights_of(state: State) -> Weights:
    """What every adapted layer multiplies with at the moment, by name."""
    return {name: layer.consolidated_weight().detach().clone() for name, layer in state.method.layers.items()}


def between(start: Weights, end: Weights, p: float) -> Weights:
    """(1 - p) start + p end."""
    return {name: torch.lerp(weight, end[name], p) for name, weight in start.items()}


@torch.no_grad()
def measured(
    model: Classifier, number: int, task: Task, split: str, training: Training, device: torch.device
) -> tuple[float, float]:
    """Mean loss, and accuracy in percent, of a task by its own head."""
    loss = correct = count = 0.0
    for inputs, labels in loader(getattr(task, split), training.test_batch_size, workers=training.workers):
        logits, y = model.heads[number](model.backbone(to_device(inputs, device))), labels.to(device)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += int((logits.argmax(1) == y).sum())
        count += len(y)
    return loss / count, PERCENT * correct / count


def way(
    problem: Problem, state: State, number: int, ends: tuple[Weights, Weights], points: int
) -> dict[str, Any]:
    """Losses and accuracies on the line to task `number` from the one before it."""
    plain = Classifier(copy.deepcopy(problem.backbone)).to(state.device)  # type: ignore[arg-type]
    plain.heads = state.model.heads
    plain.backbone.eval()
    places = [point / (points - 1) for point in range(points)]
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        of: {split: {"loss": [], "accuracy": []} for split in SPLITS} for of in (FIRST, EARLIER, NEW)
    }
    for place in places:
        with torch.no_grad():
            for name, weight in between(*ends, place).items():
                plain.get_submodule(name).weight.copy_(weight)  # type: ignore[operator,union-attr]
        for split in SPLITS:
            each = [
                measured(plain, i, problem.stream.tasks[i], split, state.run.training, state.device)
                for i in range(number + 1)
            ]
            for of, some in ((FIRST, each[:1]), (EARLIER, each[:-1]), (NEW, each[-1:])):
                for key, values in zip(("loss", "accuracy"), zip(*some, strict=True), strict=True):
                    found[of][split][key].append(statistics.fmean(values))
    return {"from": number - 1, "to": number, "places": places, "values": found}


def follow(run: Run, problem: Problem, device: torch.device, points: int = POINTS) -> list[dict[str, Any]]:
    """Learns the stream; the ways between its tasks, in order. Raises `ArgumentError` for a problem whose
    tasks share a head."""
    state, ways = State(run, problem, device), []
    if not isinstance(state.model, Heads):
        raise ArgumentError(
            f"{run.suite}: expected a problem whose tasks have a head each, got one that is learned by "
            f"{type(state.model).__name__}: its tasks have no losses apart"
        )
    before: Weights | None = None
    for number in range(len(problem.stream.tasks)):
        learn(state, number)
        after = weights_of(state)
        if before is not None:
            # Loaders draw from the global random state, from which the next task draws its adapters.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                ways.append(way(problem, state, number, (before, after), points))
        before = after
    return ways


def barrier(values: Sequence[float], places: Sequence[float]) -> float:
    """The largest height of values over the straight line between the first and the last of them."""
    chord = [(1.0 - p) * values[0] + p * values[-1] for p in places]
    return max(value - line for value, line in zip(values, chord, strict=True))


def summary(record: Record) -> list[str]:
    """A row of the table: barrier and rise of the test loss of the tasks so far, largest and mean."""
    ways = record["ways"]
    losses = [way["values"][EARLIER]["test"]["loss"] for way in ways]
    barriers = [barrier(loss, way["places"]) for loss, way in zip(losses, ways, strict=True)]
    rises = [loss[-1] - loss[0] for loss in losses]
    last = ways[-1]["values"]
    values = [statistics.fmean(barriers), max(barriers), statistics.fmean(rises), max(rises)]
    return [
        record["method"], str(record["seed"]), *(f"{value:.3f}" for value in values),
        f"{last[FIRST]['test']['loss'][-1]:.3f}", f"{last[NEW]['test']['accuracy'][-1]:.1f}",
    ]  # fmt: skip


HEADS = [
    "method", "seed", "barrier, mean", "largest", "rise, mean", "largest", "loss of the first task, end",
    "accuracy on the last task, %",
]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    command = argparse.ArgumentParser(
        prog="python -m fused_ewclora.benchmarks.continual.path",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--suite", default=SUITE, help=f"a configuration by name or file ({SUITE})")
    command.add_argument("--methods", nargs="+", metavar="NAME", help="of the configuration; default: all")
    command.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the configuration's")
    command.add_argument("--points", type=int, default=POINTS, help=f"on each way, with its ends ({POINTS})")
    command.add_argument("--out", type=Path, default=Path("path-output"), help="folder (path-output)")
    command.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data (data)")
    command.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    command.add_argument("--threads", type=int, default=1, help="CPU threads; 1 repeats exactly (1)")
    return command


def chosen(args: argparse.Namespace) -> list[Run]:
    """The runs that the options select; raises `ArgumentError` for options that select none."""
    if args.points < 2 or args.threads < 1:
        raise ArgumentError(f"--points, --threads: expected >= 2 and >= 1, got {args.points}, {args.threads}")
    loaded = configuration.load(configuration.find(args.suite))
    if args.seeds:
        loaded = configuration.with_seeds(loaded, args.seeds)
    known = list(dict.fromkeys(run.method for run in loaded.runs))
    if unknown := [name for name in args.methods or () if name not in known]:
        raise ArgumentError(f"--methods: expected some of {known}, got {unknown[0]!r}")
    return [run for run in loaded.runs if not args.methods or run.method in args.methods]


def record_of(run: Run, ways: Sequence[Mapping[str, Any]], device: str) -> Record:
    """What is written about a run."""
    return {
        "path": "line", "suite": run.suite, "method": run.method, "kind": run.kind, "seed": run.seed,
        "run": run.to_dict(), "ways": list(ways), "environment": environment(device), "time": timestamp(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for an error of the library, 2 for wrong usage."""
    args = parser().parse_args(arguments)
    try:
        return _main(args)
    except EWCLoRAError as error:
        print(f"fused_ewclora: {error}", file=sys.stderr)
        return 1


def _main(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError(MISSING)
    device_of(args.device)
    runs, found = chosen(args), []
    torch.set_num_threads(args.threads)
    for run in runs:
        problem = problems.load(run.problem, args.data_root, run.seed, args.device)
        ways = follow(run, problem, torch.device(args.device), args.points)
        found.append(record_of(run, ways, torch.device(args.device).type))
        print(f"{run.suite}  seed {run.seed}  {run.method}", file=sys.stderr, flush=True)
    from ..plots import style
    from . import path_figure  # needs matplotlib

    args.out.mkdir(parents=True, exist_ok=True)
    replace_text(args.out / "path.json", json.dumps(found, allow_nan=False))
    print("\n".join(table(HEADS, [summary(record) for record in found])))
    for path in style.save(path_figure.draw(found), args.out, "path", ("png",)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
