# SPDX-License-Identifier: Apache-2.0
"""The demo: base, both methods over all seeds, cost of a step, tables, files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fused_ewclora as fe

from . import report
from .cost import measure
from .plot import plot
from .protocol import Recipe, Result, check, run_method, train_base
from .scenario import Scenario, make_scenario

# ViT-B's width; two of its blocks are enough to see the cost per block.
WIDE = {"dim": 768, "depth": 2, "side": 56, "patch": 7, "batch": 8}
QUICK = {
    "tasks": 3,
    "epochs": 4,
    "batch_size": 16,
    "train_per_class": 60,
    "test_per_class": 30,
    "base_steps": 200,
    "dim": 32,
    "depth": 2,
}


class Progress:
    """A progress bar where stderr is a terminal, otherwise one line per step of work. total None: unknown."""

    def __init__(self, total: int | None, quiet: bool = False) -> None:
        self._done, self._total, self._start = 0, total, time.perf_counter()
        self._quiet, self._bar = quiet, None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="task")

    def __call__(self, text: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            self._bar.set_description(text)
        else:
            seconds = time.perf_counter() - self._start
            count = str(self._done)
            if self._total is not None:
                count = f"{count:>{len(str(self._total))}}/{self._total}"
            print(f"[{count} {seconds:5.0f} s]  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe with the options of the command line; the default lambda depends on the Fisher mode."""
    recipe = Recipe(**QUICK) if args.quick else Recipe()  # type: ignore[arg-type]
    overrides = {
        name: getattr(args, name) for name in ("tasks", "rank", "epochs") if getattr(args, name) is not None
    }
    recipe = dataclasses.replace(recipe, fisher_mode=args.fisher_mode, **overrides)
    if args.ewc_lambda is None:
        ewc_lambda = fe.convert_lambda(recipe.ewc_lambda, "sample", args.fisher_mode, recipe.batch_size)
    else:
        ewc_lambda = args.ewc_lambda
    return dataclasses.replace(recipe, ewc_lambda=ewc_lambda)


def device_of(name: str) -> torch.device:
    """The device of this name; raises `ArgumentError` where it is not available."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise fe.ArgumentError(
            f"--device {name}: not available here: {str(error).splitlines()[0]}"
        ) from error
    return device


def run_all(
    scenario: Scenario, recipe: Recipe, seeds: list[int], device: torch.device, progress: Progress
) -> tuple[list[Result], list[float]]:
    """Both methods on every seed, from one base per seed; also the test accuracies of the bases."""
    results, base_accuracies = [], []
    for seed in seeds:
        backbone, base_accuracy = train_base(scenario, recipe, seed, device)
        base_accuracies.append(base_accuracy)
        progress(f"seed {seed}  base      test accuracy {base_accuracy:5.1f} %")
        for method, ewc_lambda in ((report.PLAIN, 0.0), (report.EWC, recipe.ewc_lambda)):
            results.append(run_method(method, backbone, scenario, recipe, seed, ewc_lambda, device, progress))
    return results, base_accuracies


def measure_costs(
    recipe: Recipe, scenario: Scenario, quick: bool, device: torch.device
) -> list[dict[str, Any]]:
    """The demo's own transformer, and one as wide as ViT-B."""
    side = scenario.continual.train_images.shape[-1]
    own = {
        "dim": recipe.dim,
        "depth": recipe.depth,
        "side": side,
        "patch": side // recipe.patches,
        "batch": recipe.batch_size,
    }
    rows = [measure("this demo's transformer", 2 if quick else 30, device, rank=recipe.rank, **own)]
    if not quick:
        rows.append(measure("width of ViT-B", 5, device, rank=recipe.rank, **WIDE))
    return rows


def run(args: argparse.Namespace) -> int:
    """Run the demo as the command line asks; returns 0, and raises a readable error on failure."""
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        return _run(args)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    seeds = list(dict.fromkeys(args.seeds[:1] if args.quick else args.seeds))
    device, recipe = device_of(args.device), recipe_of(args)
    dataset = args.dataset or ("digits" if args.quick else "mnist")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    scenario = make_scenario(dataset, Path(args.data_root))
    check(scenario, recipe)
    print(f"{scenario.description}; {recipe.tasks} tasks, seeds {seeds}, {device}", file=sys.stderr)

    progress = Progress(len(seeds) * (1 + 2 * recipe.tasks))
    try:
        results, bases = run_all(scenario, recipe, seeds, device, progress)
    finally:
        progress.close()
    costs = measure_costs(recipe, scenario, args.quick, device)

    summary = report.aggregate(results)
    data = report.record(
        results,
        scenario=scenario.description,
        arguments=vars(args) | {"run": "demo"},
        recipe=dataclasses.asdict(recipe),
        seeds=seeds,
        device=str(device),
        base_accuracy=bases,
        summary=summary,
        comparison=report.compare(summary),
        step_cost=costs,
        seconds=time.perf_counter() - start,
    )
    report.write_json(output / "demo.json", data)
    plot(output / "demo.png", results, scenario.description)
    print(json.dumps(data) if args.json else render(data, results, output))
    return 0


def render(data: dict[str, Any], results: list[Result], output: Path) -> str:
    """The tables and the conclusion, for the terminal."""
    parts = [report.matrix_text(results, method, "class_incremental") for method in report.METHODS]
    parts += [report.metrics_text(data["summary"], len(data["seeds"])), report.cost_text(data["step_cost"])]
    parts += [report.conclusion(data["summary"], data["recipe"]["tasks"], len(data["seeds"]))]
    parts += [f"{data['seconds']:.0f} s; record and picture: {output / 'demo.json'}, {output / 'demo.png'}"]
    return "\n\n" + "\n\n".join(parts)
