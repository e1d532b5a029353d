# SPDX-License-Identifier: Apache-2.0
"""python -m launcher.cubins FOLDER: machine code of one launch for each architecture, and what Triton says
of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from ptx.cases import cases

from fused_ewclora.backends.triton import launch
from fused_ewclora.backends.triton.tools import aot

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
CASE = "lora_linear fc1, r 10, bfloat16 by full"


def main(folder: Path) -> None:
    case = next(case for case in cases("sm_90", [torch.bfloat16]) if case.name == CASE)
    for arch in ARCHITECTURES:
        with launch.noting(arch) as launches:
            case.candidate.run(*case.arguments())
        made = aot.compiled(aot.specialise(launches[-1], arch))
        (folder / f"{arch}.cubin").write_bytes(made.asm["cubin"])
        metadata = made.metadata
        facts = {"name": metadata.name, "shared": metadata.shared, "warps": metadata.num_warps}
        (folder / f"{arch}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
