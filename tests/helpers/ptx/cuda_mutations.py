# SPDX-License-Identifier: Apache-2.0
"""Broken code of csrc/cuda that has to be caught: nvcc's PTX with something removed or weakened, and what the
machine has to say about it."""

from __future__ import annotations

from collections.abc import Callable

from . import cuda_cases
from .changes import instead, one_more, without
from .cuda_launches import Session

SEEDS = 4  # interleavings, in one of which it has to be found
PENALTY = "ewc_penalty, high"
CODES = "ewc_penalty, F in 8 bits"
FACTORED = "factored_penalty, fp32"
SPLIT = cuda_cases.SPLIT.name

MUTATIONS: dict[str, tuple[str, str, Callable[[str], str], set[str]]] = {
    # what is broken: call, kernel, change, findings of which one must be made
    "no fences around the penalty's atomics": (
        PENALTY, "ewc_penalty_kernel", without(r"membar\.gl"), {"race"},
    ),
    "no fences around the product's atomics": (
        "lora_linear, slices", "finish_kernel", without(r"membar\.gl"), {"race"},
    ),
    "no barriers in the penalty": (
        PENALTY, "ewc_penalty_kernel", without(r"bar\.sync"), {"race"},
    ),
    "no barriers within warps in the penalty": (
        PENALTY, "ewc_penalty_kernel", without(r"bar\.warp\.sync"), {"race"},
    ),
    "turnstile of the Fisher released too weakly": (
        SPLIT, "fisher_kernel", instead(r"st\.release", "st.relaxed"), {"race"},
    ),
    "turnstile of the Fisher acquired too weakly": (
        SPLIT, "fisher_kernel", instead(r"ld\.acquire", "ld.relaxed"), {"race"},
    ),
    "no barriers in the Fisher": (
        "fisher_accumulate_, cu_seqlens", "fisher_kernel", without(r"bar\.sync"), {"race", "too early"},
    ),
    "a stage too few in the Fisher": (
        "fisher_accumulate_, aligned", "fisher_kernel", one_more(r"cp\.async\.wait_group"), {"too early"},
    ),
    "copies of the Fisher not waited for": (
        "fisher_accumulate_, aligned", "fisher_kernel", without(r"cp\.async\.wait_group"), {"too early"},
    ),
    "lanes do not wait for codes that others fetch": (
        CODES, "ewc_penalty_kernel", without(r"bar\.warp\.sync"), {"race", "too early"},
    ),
    "no fences around the atomics of sums": (
        cuda_cases.SPLIT_SUMS.name, "fisher_sums_kernel", without(r"membar\.gl"), {"race"},
    ),
    "products of the factored penalty not waited for": (
        FACTORED, "factored_penalty_kernel", instead(r"ld\.acquire", "ld.relaxed"), {"race"},
    ),
    "no barriers in the walk": (
        "lora_linear, bf16", "walk_kernel", without(r"bar\.sync"), {"race"},
    ),
    "no barriers within warps in the walk": (
        "lora_linear, fp32, high", "walk_kernel", without(r"bar\.warp\.sync"), {"race"},
    ),
    "no barriers in the product": (
        "lora_linear, bf16", "expand_kernel", without(r"bar\.sync"), {"race"},
    ),
    "no barriers in the merge": (
        "merge_, float32", "merge_kernel", without(r"bar\.sync"), {"race"},
    ),
    "a mask off by one": (
        "soft_threshold_, float32", "soft_threshold_kernel", instead(r"setp\.ge\.s64", "setp.gt.s64"),
        {"out of bounds"},
    ),
}  # fmt: skip


def found(name: str) -> set[str]:
    """Kinds of findings, up to those that are expected."""
    call, kernel, change, kinds = MUTATIONS[name]
    seen: set[str] = set()
    for seed in range(SEEDS):
        session = Session(seed=seed, change=lambda made, ptx: change(ptx) if made == kernel else ptx)
        cuda_cases.execute(call, session)
        if not session.changed:
            return {"the change leaves the code as it is"}
        seen |= {kind for report in session.reports for kind in report.kinds()}
        if seen & kinds:
            break
    return seen
