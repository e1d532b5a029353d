# SPDX-License-Identifier: Apache-2.0
"""Continual learning on real images: plain sequential LoRA and EWC-LoRA on the same data, seeds and recipe.

`python -m fused_ewclora demo` trains a small vision transformer, freezes it, and teaches it new classes in
tasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .data import DATASETS
from .job import run
from .protocol import Recipe

__all__ = ["add_arguments", "run"]

SEEDS = (0, 1, 2)


def _at_least(low: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"expected an integer >= {low}, got {value}")
        return value

    return integer


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo command; `run` takes what they parse to."""
    recipe = Recipe()
    parser.add_argument(
        "--seeds",
        type=_at_least(0),
        nargs="+",
        default=list(SEEDS),
        help="one run of both methods per seed (0 1 2)",
    )
    parser.add_argument("--tasks", type=_at_least(2), default=None, help=f"number of tasks ({recipe.tasks})")
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default=None,
        help="mnist (default; base: scikit-learn's digits), digits, fashion-mnist (base: MNIST), cifar100, "
        "folder (train/<class>/*, test/<class>/*); the last two train the base on half of the classes",
    )
    parser.add_argument(
        "--data-root", default="data", help="folder with the data set; MNIST is downloaded there (data)"
    )
    parser.add_argument(
        "--ewc-lambda",
        type=_not_negative,
        default=None,
        help=f"strength of the penalty ({recipe.ewc_lambda:g})",
    )
    parser.add_argument(
        "--rank", type=_at_least(1), default=None, help=f"rank of the adapters ({recipe.rank})"
    )
    parser.add_argument(
        "--epochs", type=_at_least(1), default=None, help=f"epochs per task ({recipe.epochs})"
    )
    parser.add_argument(
        "--fisher-mode",
        choices=("sample", "batch"),
        default=recipe.fisher_mode,
        help="Fisher per sample, or of batch means as in the official code; converts the default lambda",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument(
        "--threads",
        type=_at_least(1),
        default=1,
        help="CPU threads; with 1, results are reproducible (1)",
    )
    parser.add_argument(
        "--output", default="demo-output", help="folder for demo.json and demo.png (demo-output)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a run of a few seconds on the smallest data set, as a test"
    )
    parser.add_argument("--json", action="store_true", help="print the record to stdout instead of tables")
    parser.add_argument(
        "--suite",
        nargs="*",
        metavar="NAME",
        help="instead of the demo: every method on language and vision (demo --suite --help)",
    )
