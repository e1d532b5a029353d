# SPDX-License-Identifier: Apache-2.0
"""Broken code that has to be caught: what Triton made, with something removed or weakened, and what the
machine has to say about it.

    python -m ptx.mutations [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from . import cases
from .changes import before, instead, one_more, without
from .launches import Session

SEEDS = 4  # interleavings, in one of which it has to be found
PENALTY = "ewc_penalty fp32 F, r 10, float32, high"
FACTORED = "factored_penalty gradients, r 10, float32, high"
LINEAR = "lora_linear fc1, r 10, bfloat16 by full"
FISHER = "fisher_accumulate_ sample, in splits, bfloat16"


MUTATIONS: dict[str, tuple[str, str, str, Callable[[str], str], set[str]]] = {
    # what is broken: architecture, case, kernel, change, findings of which one must be made
    "the penalty's atomics relaxed": (
        "sm_80", PENALTY, "ewc_penalty_kernel",
        instead(r"atom\.global\.gpu\.acq_rel", "atom.global.gpu.relaxed"), {"race"},
    ),
    "the penalty's atomics for the block only": (
        "sm_80", PENALTY, "ewc_penalty_kernel",
        instead(r"atom\.global\.gpu\.acq_rel", "atom.global.cta.acq_rel"), {"race"},
    ),
    "no barrier before the penalty's atomic": (
        "sm_90", PENALTY, "ewc_penalty_kernel", before(r"atom\.global", r"bar\.sync"), {"race"},
    ),
    "no barriers in the factored penalty": (
        "sm_90", FACTORED, "factored_penalty_kernel", without(r"bar\.sync"), {"race", "too early"},
    ),
    "turnstile of the Fisher released too weakly": (
        "sm_80", FISHER, "fisher_sample_kernel", instead(r"gpu\.release", "gpu.relaxed"), {"race"},
    ),
    "turnstile of the Fisher acquired too weakly": (
        "sm_80", FISHER, "fisher_sample_kernel", instead(r"gpu\.acquire", "gpu.relaxed"), {"race"},
    ),
    "no barriers in the product": (
        "sm_80", LINEAR, "lora_linear_kernel", without(r"bar\.sync"), {"race", "too early"},
    ),
    "a stage too few in the product": (
        "sm_80", LINEAR, "lora_linear_kernel", one_more(r"cp\.async\.wait_group"), {"too early"},
    ),
    "copies not waited for": (
        "sm_80", LINEAR, "lora_linear_kernel", without(r"cp\.async\.wait_group"), {"too early"},
    ),
    "copies of tiles not waited for": (
        "sm_90", LINEAR, "lora_linear_kernel",
        instead(r"@!complete bra\.uni", "@!complete bra.uni skipped; skipped: //"), {"too early"},
    ),
    "the copy's phase mistaken": (
        "sm_90", LINEAR, "lora_linear_kernel",
        instead(r"(try_wait\.parity\.shared::cta\.b64 complete, \[%r\d+\]), (%r\d+|\d+);", r"\1, 1;"),
        {"too early", "deadlock"},
    ),
    "no fence between stores and the products that read them": (
        "sm_90", LINEAR, "lora_linear_kernel", without(r"fence\.proxy\.async"), {"race"},
    ),
    "no wgmma.fence": (
        "sm_90", LINEAR, "lora_linear_kernel", without(r"wgmma\.fence"), {"wgmma"},
    ),
    "products not waited for": (
        "sm_90", LINEAR, "lora_linear_kernel", without(r"wgmma\.wait_group"), {"wgmma", "too early"},
    ),
    "a product too few waited for": (
        "sm_90", LINEAR, "lora_linear_kernel", one_more(r"wgmma\.wait_group\.sync\.aligned"),
        {"wgmma", "too early"},
    ),
    "a mask off by one": (
        "sm_80", "merge_ scales, r 10, bfloat16", "merge_kernel", instead(r"setp\.lt\.s32", "setp.le.s32"),
        {"out of bounds"},
    ),
}  # fmt: skip


def found(name: str) -> set[str]:
    """Kinds of findings, up to those that are expected."""
    arch, wanted, kernel, change, kinds = MUTATIONS[name]
    case = next(case for case in cases.cases(arch) if case.name == wanted)
    seen: set[str] = set()
    for seed in range(SEEDS):
        session = Session(arch, seed, change=lambda made, ptx: change(ptx) if made == kernel else ptx)
        case.execute(session)
        if not session.changed:
            return {"the change leaves the code as it is"}
        seen |= {kind for report in session.reports for kind in report.kinds()}
        if seen & kinds:
            break
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx.mutations", description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seen = {name: sorted(found(name)) for name in MUTATIONS}
    if options.json:
        json.dump(seen, sys.stdout)
        return 0
    for name, kinds in seen.items():
        print(f"{'caught' if MUTATIONS[name][4] & set(kinds) else 'MISSED'}  {name}: {', '.join(kinds)}")
    return int(any(not MUTATIONS[name][4] & set(kinds) for name, kinds in seen.items()))


if __name__ == "__main__":
    raise SystemExit(main())
