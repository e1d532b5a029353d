# SPDX-License-Identifier: Apache-2.0
"""What nvcc compiles of csrc/cuda for sm_80, executed: right and without findings; broken code is caught."""

from __future__ import annotations

import os

import pytest
from ptx import cuda_cases, cuda_launches, cuda_mutations

REASON = cuda_launches.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LONG = bool(os.environ.get("FUSED_EWCLORA_TEST_LONG"))
# A representative set: every kernel, ragged, with sums that the last block finishes and turns that blocks
# take. `make ptx-check` executes everything.
CHOSEN = (
    "lora_linear, slices",
    "lora_linear, dropout, slices, fp32",
    "ewc_penalty, high",
    "ewc_penalty, F in bf16",
    "ewc_penalty, one",
    "ewc_penalty, F in 8 bits",
    "factored_penalty, fp32",
    "l1_penalty, highest",
    "l1_penalty, many, rank 70",
    "fisher_accumulate_, cu_seqlens",
    "fisher_accumulate_, in splits",
    "fisher_accumulate_, T=1",
    "fisher_sums_, in splits",
    "fisher_sums_, T=1",
    "merge_, bfloat16",
    "soft_threshold_, float32",
)


@pytest.mark.parametrize("name", cuda_cases.names() if LONG else CHOSEN)
def test_executed_code(name: str) -> None:
    """Results equal fp64, with the same bits for many blocks at a time and for two; nothing is found."""
    outcomes = [
        cuda_cases.execute(name, cuda_launches.Session(seed=seed, resident=resident))
        for seed, resident in enumerate((6, 2))
    ]
    for outcome in outcomes:
        assert len(outcome.session.reports) > 0
        assert outcome.findings == []
        assert outcome.error <= outcome.allowed
    assert len({outcome.bits for outcome in outcomes}) == 1


def test_chosen_calls() -> None:
    """The representative calls are among the calls."""
    assert set(CHOSEN) <= set(cuda_cases.names())


@pytest.mark.parametrize("name", cuda_mutations.MUTATIONS)
def test_caught(name: str) -> None:
    """The machine finds what is expected of it in broken code."""
    found = cuda_mutations.found(name)
    assert cuda_mutations.MUTATIONS[name][3] & found, found
