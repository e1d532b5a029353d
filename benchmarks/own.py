# SPDX-License-Identifier: Apache-2.0
"""Cases of the user: an operation at shapes of numbers, and functions that are measured beside ours."""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fused_ewclora._arguments import one_of
from fused_ewclora.errors import ArgumentError

from . import workloads
from .workload import FACTORED, STRUCTURES, Workload

LABEL = "own shape"  # in place of the name of a model, in records
DTYPES = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
LAYER, MATRICES = ("M", "d_in", "d_out", "r"), ("adapters", "d_out", "d_in", "r")
SAMPLES = ("samples", "tokens", "d_in", "d_out")
FIELDS: dict[str, tuple[str, ...]] = {  # what the numbers of a shape are; M: rows of x
    "lora_linear": LAYER,
    "lora_linear_slices": LAYER,
    "ewc_penalty": MATRICES,
    "structured_penalty": MATRICES,
    "l1_penalty": MATRICES,
    "fisher_accumulate": SAMPLES,
    "fisher_sums": SAMPLES,
    "merge": MATRICES,
    "soft_threshold": ("vectors", "length"),
}
WORDS: dict[str, tuple[str, ...]] = {  # that may follow the numbers, the first by default
    "structured_penalty": (FACTORED, *(kind for kind in STRUCTURES if kind != FACTORED)),
    "fisher_accumulate": ("sample", "batch"),
}
ONLY_FP32 = ("structured_penalty", "l1_penalty", "soft_threshold")


def form(op: str) -> str:
    """What the numbers of a shape of this op are."""
    words = WORDS.get(op)
    return ",".join(FIELDS[op]) + (f"[,{'|'.join(words)}]" if words else "")


def forms(ops: Iterable[str] = tuple(FIELDS)) -> str:
    """What the numbers are, of each of these ops that takes numbers."""
    return "; ".join(f"{op} {form(op)}" for op in ops if op in FIELDS) or f"of {', '.join(FIELDS)} alone"


def has_numbers(text: str) -> bool:
    """Whether a shape is one of numbers, and not the label of a case."""
    return re.match(r"\s*-?\d+\s*,", text) is not None


def is_own(workload: Workload) -> bool:
    """Whether the shape of a case is the user's."""
    return workload.shape.get("model") == LABEL


def _numbers(op: str, text: str) -> tuple[list[int], str | None]:
    """The numbers of a shape, and its word."""
    if op not in FIELDS:
        raise ArgumentError(f"--shape {text}: {op} takes no numbers; expected --op of {', '.join(FIELDS)}")
    parts = [part.strip() for part in text.split(",")]
    words = WORDS.get(op, ())
    word = parts.pop() if words and parts[-1] in words else next(iter(words), None)
    count = len(FIELDS[op])
    if len(parts) != count or not all(re.fullmatch("[0-9]+", part) and int(part) > 0 for part in parts):
        raise ArgumentError(f"--shape {text}: {op} takes {count} integers >= 1: {form(op)}")
    return [int(part) for part in parts], word


def workload(op: str, text: str, dtype: str) -> Workload:
    """The case of an op at a shape such as "3152,768,768,10"; raises `ArgumentError` in words."""
    (one, two, three, four), word = _padded(op, text)
    kind = DTYPES[dtype]
    if op in ONLY_FP32 and kind != "float32":
        raise ArgumentError(f"--dtype {dtype}: {op} is measured in fp32 alone")
    if op == "lora_linear_slices" and three % 3:
        raise ArgumentError(f"--shape {text}: expected a d_out divisible by 3, of q, k and v, got {three}")
    matrices = {"sizes": (three, two), "adapters": one, "rank": four}
    make: dict[str, Callable[[], Workload]] = {
        "lora_linear": lambda: workloads.linear(LABEL, one, (two, three), four, kind),
        "lora_linear_slices": lambda: workloads.linear(LABEL, one, (two, three), four, kind, slices=True),
        "ewc_penalty": lambda: workloads.penalty(LABEL, dtype=kind, **matrices),
        "structured_penalty": lambda: workloads.structured_penalty(LABEL, kind=str(word), **matrices),
        "l1_penalty": lambda: workloads.l1_penalty(LABEL, **matrices),
        "fisher_accumulate": lambda: workloads.fisher(LABEL, one, two, (three, four), str(word), kind),
        "fisher_sums": lambda: workloads.fisher_sums(LABEL, one, two, (three, four), kind),
        "merge": lambda: workloads.merge(LABEL, dtype=kind, **matrices),
        "soft_threshold": lambda: workloads.threshold(LABEL, one, two),
    }
    return make[op]()


def _padded(op: str, text: str) -> tuple[tuple[int, ...], str | None]:
    numbers, word = _numbers(op, text)
    return (*numbers, *[0] * (4 - len(numbers))), word


@functools.cache
def function(path: str) -> Callable[..., Any]:
    """The function "package.module:function"; the current folder is searched as well."""
    name, _, attribute = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not look there
    try:
        found = getattr(importlib.import_module(name), attribute)
    except Exception as failure:  # whatever the module raises when it is imported
        why = f"{type(failure).__name__}: {failure}"
        raise argparse.ArgumentTypeError(f"{path!r} cannot be imported: {why}") from failure
    if not callable(found):
        raise argparse.ArgumentTypeError(f"{path!r} is no function but {type(found).__name__}")
    made: Callable[..., Any] = found
    return made


def provider(peers: Sequence[str]) -> Callable[[str], str]:
    """A type of options: the name of a peer, or "package.module:function", which is imported."""
    named = one_of("provider", peers)

    def convert(text: str) -> str:
        if ":" not in text:
            return named(text)
        function(text)
        return text

    return convert


def providers(names: Sequence[str] | None) -> tuple[list[str] | None, dict[str, Callable[..., Any]]]:
    """The peers that are chosen, None for all, and the functions of the user; names are those of both."""
    if names is None:
        return None, {}
    return list(names), {name: function(name) for name in names if ":" in name}
