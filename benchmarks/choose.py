# SPDX-License-Identifier: Apache-2.0
"""Derives fused_ewclora/backends/measured_choice.json from the records of a GPU:
`python -m benchmarks.choose benchmarks/results/h200`.

For every op: the most work up to which the CUDA backend was faster than Triton in every case measured, the
smallest case included. Faster means by more than the noise when launched eagerly, and not slower by more than
the noise when replayed from a graph. Entries of other architectures stay.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_ewclora.backends import measured_choice
from fused_ewclora.backends.candidate import Call, LinearShape, bucket

from . import collection, records
from .case import OURS
from .harness import Record
from .place import CUDA
from .summary import by_case, label

ROOT = Path(__file__).resolve().parents[1]
HOST_NOISE = 0.1  # part of an eager time, a mean over one burst of calls, that may be chance
PASSES = {"forward": "lora_linear", "backward": "lora_linear_backward"}
OPS = {
    "ewc_penalty": "ewc_penalty", "l1_penalty": "l1_penalty", "fisher_accumulate": "fisher_accumulate_",
    "merge": "merge_", "soft_threshold": "soft_threshold_",
}  # fmt: skip
FACTORS = {  # of their work; what ops/schemas.py multiplies
    "ewc_penalty": ("adapters", "d_out", "d_in"),
    "l1_penalty": ("adapters", "rank", "d_in"),
    "fisher_accumulate": ("samples", "tokens", "d_in", "d_out"),
    "merge": ("adapters", "d_out", "d_in"),
    "soft_threshold": ("vectors", "length"),
}


class Refused(ValueError):
    """Records that no choice can be derived from, in one sentence."""


class Measured(NamedTuple):
    """One case: how much work it is, and whether CUDA was faster."""

    op: str
    work: int
    faster: bool
    label: str


def op_of(record: Record) -> str | None:
    """The op whose choice a case is about; None for cases of several ops."""
    if record["op"] in ("lora_linear", "lora_linear_slices"):
        return PASSES.get(record["shape"].get("pass"))
    return OPS.get(record["op"])


def work_of(record: Record) -> int:
    """Of the calls that were measured, as the choice sees it."""
    shape = record["shape"]
    if (names := FACTORS.get(record["op"])) is not None:
        call = Call("cuda", torch.float32, work=bucket(math.prod(shape[name] for name in names)))
    else:
        linear = LinearShape(bucket(shape["rows"]), shape["d_in"], shape["d_out"], shape["rank"])
        call = Call("cuda", torch.bfloat16, shape=linear)
    found = measured_choice.work(call)
    assert found is not None
    return found


def faster(cuda: Record, triton: Record) -> bool:
    """Whether the first was faster by more than the noise; what failed was not."""
    times = [one.get("host_seconds") for one in (cuda, triton)]
    if "failed" in cuda or "failed" in triton or None in times:
        return False
    replayed_slower = cuda["seconds"]["p20"] > triton["seconds"]["p80"]
    return bool(times[0] < (1.0 - HOST_NOISE) * times[1] and not replayed_slower)


def measured(found: Sequence[Record]) -> list[Measured]:
    """The cases of single ops that both backends took part in, the least work first."""
    cases = []
    for case in by_case(found):
        if OURS in case and CUDA in case and (op := op_of(case[OURS])) is not None:
            told = (work_of(case[OURS]), faster(case[CUDA], case[OURS]), label(case[OURS]))
            cases.append(Measured(op, *told))
    return sorted(cases, key=lambda one: (one.op, one.work))


def limit(cases: Sequence[Measured]) -> int | None:
    """The most work up to which every case was faster."""
    slow = min((one.work for one in cases if not one.faster), default=math.inf)
    return max((one.work for one in cases if one.work < slow), default=None)


def _only(found: Sequence[Record], name: str, what: str) -> Any:
    values = {str(r["environment"].get(name)): r["environment"].get(name) for r in found}
    if len(values) > 1:
        raise Refused(f"the records are of several {what}: {', '.join(sorted(values))}")
    return next(iter(values.values()))


def read(folder: Path) -> dict[Path, list[Record]]:
    """The records of a GPU by file, without host times; `Refused` where nothing can be derived from them."""
    files = {
        path: [record for record in records.read(path) if not collection.is_host(record)]
        for path in sorted(folder.glob("*.jsonl"))
    }
    found = [r for each in files.values() for r in each]
    if not found:
        raise Refused(f"there are no records in {folder}")
    if complaints := [v for r in found for v in records.violations(r)]:
        raise Refused(f"not a record of this version: {complaints[0]}")
    if any(r["environment"].get("capability") is None or r.get("timing") == "wall" for r in found):
        raise Refused(f"records in {folder} were not measured on a GPU: a rehearsal decides nothing")
    _only(found, "device", "devices")
    _only(found, "capability", "architectures")
    _only(found, "commit", "commits")
    if not any(measured(each) for each in files.values()):
        raise Refused(f"no case in {folder} has both providers, {OURS!r} and {CUDA!r}")
    return files


def entries(files: Mapping[Path, Sequence[Record]]) -> list[dict[str, Any]]:
    """What the records show, an entry per op; its work is 0 where CUDA was faster in no case, so that no
    prediction decides what was measured."""
    made = []
    for path, found in files.items():
        cases = measured(found)
        for op in dict.fromkeys(one.op for one in cases):
            of_op = [one for one in cases if one.op == op]
            most = limit(of_op) or 0
            machine = found[0]["environment"]
            place = path.resolve()
            made.append({
                "arch": "sm_" + machine["capability"].replace(".", ""),
                "op": op,
                "work": most,
                "record": str(place.relative_to(ROOT) if place.is_relative_to(ROOT) else place.name),
                "device": machine["device"],
                "commit": machine["commit"],
                "cases": sum(one.work <= most for one in of_op),
            })  # fmt: skip
    return made


def write(table: Path, arch: str, made: Sequence[dict[str, Any]]) -> None:
    """Replaces what the table says about an architecture."""
    old = json.loads(table.read_text())["entries"] if table.exists() else []
    kept = [entry for entry in old if entry["arch"] != arch]
    found = sorted([*kept, *made], key=lambda entry: (entry["arch"], entry["op"]))
    table.write_text(json.dumps({"entries": found}, indent=1) + "\n")


def main(given: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose", description=__doc__)
    parser.add_argument("records", type=Path, help="folder of the records of one GPU")
    parser.add_argument("--table", type=Path, default=measured_choice.TABLE, help="the file that is written")
    args = parser.parse_args(given)
    try:
        files = read(args.records)
    except (Refused, json.JSONDecodeError) as failure:
        print(f"benchmarks.choose: {failure}", file=sys.stderr)
        return 1
    for one in (one for found in files.values() for one in measured(found)):
        print(f"  {one.op:22} work {one.work:<12.4g} {'cuda' if one.faster else 'triton':8} {one.label}")
    made = entries(files)
    machine = next(r for found in files.values() for r in found)["environment"]
    write(args.table, "sm_" + machine["capability"].replace(".", ""), made)
    for entry in made:
        print(f"{entry['arch']} {entry['op']}: cuda up to work {entry['work']:.4g} ({entry['cases']} cases)")
    print(f"{args.table}: {len(made)} entries for {machine['device']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
