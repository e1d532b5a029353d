# SPDX-License-Identifier: Apache-2.0
"""The checks of many architectures, in processes of one thread each."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.extras import prepare_torchvision

from . import checks, listed


def prepare() -> None:
    """In every process, before a model library is imported."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    prepare_torchvision()


def measure(key: tuple[str, str]) -> tuple[dict[str, Any], float]:
    """The record of one architecture, and its seconds."""
    start = time.perf_counter()
    try:
        record = checks.run(listed.find(*key)).to_dict()
    except Exception as error:  # of the model library, for example in a version that lacks the model
        record = checks.Record(*key, task="").to_dict() | {"failed": f"{type(error).__name__}: {error}"}
    return record, time.perf_counter() - start


def measured(keys: list[tuple[str, str]], jobs: int) -> Iterator[tuple[dict[str, Any], float]]:
    if jobs == 1:
        prepare()
        yield from map(measure, keys)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=prepare) as pool:
        yield from pool.map(measure, keys)
