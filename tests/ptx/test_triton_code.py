# SPDX-License-Identifier: Apache-2.0
"""What Triton compiles for sm_80 and sm_90, executed: right against fp64, without races or deadlocks."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from ptx import check, separately

LONG = bool(os.environ.get("FUSED_EWCLORA_TEST_LONG"))
# A representative set: every kernel, with wgmma and bulk copies where there are any, the splits of the Fisher
# and the sums that the last block finishes. `make ptx-check` executes everything.
CHOSEN = {
    "sm_80": (
        "lora_linear fc1 dropout, r 10, bfloat16 by prologue",
        "lora_linear_backward k, v of qkv, r 10, bfloat16 by prologue",
        "ewc_penalty fp32 F, scales, r 10, float32, high",
        "fisher_accumulate_ sample, cu_seqlens, in splits, bfloat16",
        "factored_penalty scales, r 10, float32, high",
        "fisher_sums_ sample, cu_seqlens, in splits, bfloat16",
        "l1_penalty scales, r 10, float32, high",
    ),
    "sm_90": (
        "lora_linear fc1, r 10, bfloat16 by full",
        "lora_linear fc1, r 10, bfloat16 by concat",  # stores the tiles that it multiplies
        "lora_linear_backward fc1, r 10, bfloat16 by prologue",
        "ewc_penalty fp32 F, r 10, float32, highest",
        "fisher_accumulate_ sample, bfloat16",
        "fisher_accumulate_ sample, one token, bfloat16",
        "fisher_accumulate_ batch, bfloat16",
        "ewc_penalty 8-bit F, r 10, float32, high",
        "ewc_penalty 8-bit F, odd widths, r 10, bfloat16",
        "factored_penalty odd widths, r 10, bfloat16",
        "l1_penalty odd widths, r 10, float32, highest",
        "fisher_sums_ sample, bfloat16",
        "merge_ scales, r 10, bfloat16",
        "soft_threshold_ gates, bfloat16",
    ),
}
NAMES = [(arch, name) for arch, names in CHOSEN.items() for name in names]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[dict[str, Any]]]:
    """Every chosen case in two interleavings: many blocks at a time, and two."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arch, names in CHOSEN.items():
        wanted = [] if LONG else ["--case", *names]
        for row in json.loads(separately.run("ptx.check", "--arch", arch, "--seeds", "2", "--json", *wanted)):
            found.setdefault(f"{arch} {row['case']}", []).append(row)
    return found


@separately.needed
@pytest.mark.parametrize(("arch", "name"), NAMES)
def test_executed_code(arch: str, name: str, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """Results equal fp64, have the same bits in every interleaving, and nothing is found."""
    rows = outcomes[f"{arch} {name}"]
    assert len({row["seed"] for row in rows}) == 2
    for row in rows:
        assert row["launches"] > 0
        assert row["findings"] == []
        assert row["error"] <= row["allowed"]
    assert len({row["bits"] for row in rows}) == 1


@separately.needed
def test_everything_right(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """All that was executed, in the long run all there is."""
    wrong = [row for rows in outcomes.values() for row in rows if not row["right"]]
    assert wrong == []
    assert set(outcomes) >= {f"{arch} {name}" for arch, name in NAMES}


@separately.needed
def test_tf32_rounded(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """Operands at "high" are rounded to tf32, not cut off, which would make every product too small."""
    for row in outcomes["sm_80 ewc_penalty fp32 F, scales, r 10, float32, high"]:
        assert row["error"] < 5e-4


def test_architectures() -> None:
    """The command executes what it is asked to."""
    assert set(CHOSEN) == set(check.ARCHITECTURES)
