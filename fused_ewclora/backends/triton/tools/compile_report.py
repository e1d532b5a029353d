# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel costs in every shipped configuration, compiled ahead of time and without a GPU.

Hosts are called with meta tensors for the representative workloads, their launches are noted instead of run,
and each distinct specialisation is compiled: what is reported is what would be launched.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch

from ....errors import BackendError
from .. import launch, tables
from . import aot, kernel_counts, machine_model, occupancy, workloads
from . import work as works

SCHEMA = 2
ARCHITECTURES = tuple(occupancy.LIMITS)
RANKS = workloads.RANKS
# Kernels made of products: with 16-bit operands these must be warp-group ones on sm_90.
MATRIX_KERNELS = (
    "lora_linear_kernel",
    "lowrank_rows_kernel",
    "lowrank_columns_kernel",
    "fisher_sample_kernel",
    "fisher_token_kernel",
    "fisher_sums_kernel",
)
NO_SPILLS_ON_AMD = ("ewc_penalty_kernel", "factored_penalty_kernel")
# Kernel -> (bytes that may spill, why). Aligned calls never spill.
SPILLS_OF_UNALIGNED: dict[str, tuple[int, str]] = {}
HALF = ("bfloat16", "float16")


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if launch.interpreted():
        return "TRITON_INTERPRET is set, so that Triton interprets kernels and compiles none: unset it"
    if aot.cuobjdump() is None:
        return "this Triton lacks backends/nvidia/bin/cuobjdump, which reads the resources of machine code"
    return None


@dataclass(frozen=True)
class Noted:
    """One distinct specialisation and what led to it."""

    specialisation: aot.Specialisation
    dtype: str
    config: dict[str, Any]
    constants: dict[str, Any]
    ranks: set[int]
    aligned: list[bool]
    calls: list[str]
    work: works.Work | None = None  # of the first call


@dataclass(frozen=True)
class Survey:
    """What the workloads of one dtype would launch on one architecture."""

    noted: list[Noted]
    exercised: set[tuple[int, str]]  # (position in the table, dtype)
    failures: list[str]


def survey(arch: str, dtype: torch.dtype, ranks: Sequence[int] = RANKS) -> Survey:
    """Call every host and note its launches."""
    found: dict[str, Noted] = {}
    result = Survey([], set(), [])
    for workload in workloads.workloads((dtype,), ranks):
        try:
            _note(workload, arch, found, result.exercised)
        except Exception as error:  # of one workload; the others are still reported
            result.failures.append(f"{arch}: {workload.name}: {type(error).__name__}: {error}")
    result.noted.extend(found.values())
    return result


def _note(
    workload: workloads.Workload, arch: str, found: dict[str, Noted], exercised: set[tuple[int, str]]
) -> None:
    for candidate, launches, keys in workloads.noted(workload, arch):
        algorithm = f" ({candidate.keys[0]})" if candidate.keys else ""
        for noted, entry, positions, name in _attributed(launches, keys):
            exercised |= {(position, name) for position in positions}
            specialisation = aot.specialise(noted, arch)
            config = entry["config"]
            dtype = tables.name_of(workload.dtype)
            work = works.of(noted, workload.make(workloads.Make("meta")))
            new = Noted(specialisation, dtype, config, _constants(noted, config), set(), [], [], work)
            known = found.setdefault(specialisation.key, new)
            known.ranks.add(workload.rank)
            known.aligned.append(workload.aligned)
            known.calls.append(workload.name + algorithm)


def _attributed(
    launches: Iterable[launch.Launch], keys: Sequence[tables.Key]
) -> Iterable[tuple[launch.Launch, tables.Entry, list[int], str]]:
    """Each launch with the entry that configured it, its place in the table, and the dtype asked for.

    That is the looked-up entry of its kernel that agrees with its options most; hosts may narrow a block. Two
    that say the same have two places.
    """
    for noted in launches:
        name = noted.kernel.fn.__name__
        asked = [
            (tables.shipped(key), key) for key in dict.fromkeys(keys) if tables.named(key.kernel) == name
        ]
        if not asked:
            raise LookupError(f"{name} was launched without a lookup of its configuration")
        entry, key = max(asked, key=lambda pair: _agreement(noted, pair[0]))
        table = tables.table(launch.family(key.arch))
        same = [one for one, _ in asked if one["config"] == entry["config"]]
        yield noted, entry, [i for i, other in enumerate(table) if any(other is e for e in same)], key.dtype


def _agreement(noted: launch.Launch, entry: tables.Entry) -> int:
    return sum(noted.options.get(name) == value for name, value in entry["config"].items())


def _constants(noted: launch.Launch, config: Any) -> dict[str, Any]:
    constants = {name: value for name, value in noted.options.items() if name not in config}
    plain = int | float | str | None
    return {name: value if isinstance(value, plain) else str(value) for name, value in constants.items()}


def unexercised(arch: str, exercised: set[tuple[int, str]]) -> list[str]:
    """Entries of the table of `arch` that no workload launched with, per dtype that they name."""
    found = []
    for position, entry in enumerate(tables.table(launch.family(arch))):
        served = {dtype for place, dtype in exercised if place == position}
        wanted = set(entry.get("dtypes", ())) or (served or {"any dtype"})
        found += [
            f"{arch}: entry {position} ({entry['kernel']}, rank {entry.get('rank', 'any')}) serves no "
            f"workload in {dtype}"
            for dtype in sorted(wanted - served)
        ]
    return found


def collect(
    archs: Sequence[str] = ARCHITECTURES,
    kernels: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    ranks: Sequence[int] = (),
    jobs: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    few: bool = False,
    executed: Sequence[kernel_counts.Executed] = (),
) -> dict[str, Any]:
    """The report as plain data; `BackendError` in words where nothing can be compiled.

    `kernels`, `dtypes` and `ranks` choose what is compiled (empty: everything), and `few` one aligned and one
    unaligned call of each kernel and configuration; every host is called with every workload in any case.
    `executed` counts replace those that the machine code shows.
    """
    if (reason := missing()) is not None:
        raise BackendError(reason)
    called = tuple(dict.fromkeys((*RANKS, *ranks)))
    questions = [(arch, dtype, called) for arch in archs for dtype in workloads.DTYPES]
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        surveys = list(pool.map(survey, *zip(*questions, strict=True)))
        chosen = _chosen([n for s in surveys for n in s.noted], kernels, dtypes, ranks)
        chosen = _last_of_each_configuration(chosen) if few else chosen
        rows = []
        for noted, resources in zip(
            chosen, pool.map(aot.build, [n.specialisation for n in chosen]), strict=True
        ):
            rows.append(_row(noted, resources, executed))
            progress(f"compiled {len(rows)} of {len(chosen)}")
    exercised: dict[str, set[tuple[int, str]]] = {arch: set() for arch in archs}
    for (arch, *_), answer in zip(questions, surveys, strict=True):
        exercised[arch] |= answer.exercised
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "triton": importlib.metadata.version("triton"),
        "rows": rows,
        "failures": [failure for s in surveys for failure in s.failures],
        "unexercised": [text for arch in archs for text in unexercised(arch, exercised[arch])],
    }
    return {**data, "problems": problems(data)}


def _chosen(
    noted: Sequence[Noted], kernels: Sequence[str], dtypes: Sequence[str], ranks: Sequence[int]
) -> list[Noted]:
    names = sorted({n.specialisation.name for n in noted})
    if unknown := sorted(set(kernels) - set(names)):
        raise BackendError(f"no kernel is called {', '.join(unknown)}: there are {', '.join(names)}")
    return [
        n
        for n in noted
        if (not kernels or n.specialisation.name in kernels)
        and (not dtypes or n.dtype in dtypes)
        and (not ranks or n.ranks & {0, *ranks})
    ]


def _last_of_each_configuration(noted: Sequence[Noted]) -> list[Noted]:
    """With aligned arguments and without."""
    configurations = (
        (n.specialisation.arch, n.specialisation.name, n.dtype, repr(n.config), any(n.aligned)) for n in noted
    )
    return list(dict(zip(configurations, noted, strict=True)).values())


def _row(
    noted: Noted, resources: aot.Resources, executed: Sequence[kernel_counts.Executed] = ()
) -> dict[str, Any]:
    arch, options = noted.specialisation.arch, noted.specialisation.options
    fits = occupancy.occupancy(
        arch, resources.registers, resources.shared, options["num_warps"], resources.tensor_memory
    )
    return {
        "kernel": noted.specialisation.name,
        "arch": arch,
        "dtype": noted.dtype,
        "config": dict(noted.config),
        "constants": noted.constants,
        "aligned": any(noted.aligned),
        "registers": resources.registers,
        "scalar_registers": resources.scalar_registers,
        "spill": resources.spill,
        "shared": resources.shared,
        "tensor_memory": resources.tensor_memory,
        "serialised": resources.serialised,
        "error": resources.error,
        "instructions": {name: resources.instructions.get(name, 0) for name in aot.INSTRUCTIONS},
        "blocks_per_multiprocessor": fits.blocks,
        "occupancy": fits.share,
        "limited_by": fits.limited_by,
        "calls": noted.calls,
        **_predicted(noted, resources, fits.blocks, executed),
    }


def _predicted(
    noted: Noted, resources: aot.Resources, blocks: int, executed: Sequence[kernel_counts.Executed]
) -> dict[str, Any]:
    """The main loop and the predicted time of the first call; None where the machine code, the work of the
    kernel or the machine is not known."""
    found: dict[str, Any] = {"main_loop": None, "predicted": None}
    if resources.code is None or noted.work is None:
        return found
    name, arch = noted.specialisation.name, noted.specialisation.arch
    properties = {**noted.constants, **noted.config, "arch": arch, "dtype": noted.dtype}
    known = kernel_counts.executed_for(executed, name, properties)
    warps = noted.specialisation.options["num_warps"]
    counts, main = kernel_counts.counts(resources.code, noted.work, warps, blocks, known)
    found["main_loop"] = {**asdict(main), "executed": known is not None}
    if (machine := machine_model.MACHINES.get(arch)) is not None:
        prediction, floor = machine_model.predict(counts, machine), noted.work.floor(machine)
        found["predicted"] = {
            "machine": machine.name,
            "seconds": prediction.seconds,
            "limited_by": prediction.limited_by,
            "floor": floor,
            "floor_name": noted.work.floor_name,
            "ratio": prediction.seconds / floor if floor > 0 else None,
            "waves": prediction.waves,
            "resources": prediction.resources,
        }
    return found


def problems(data: dict[str, Any]) -> list[str]:
    """What must not be in a release, in words; empty when all is well."""
    found = [*data["failures"], *data["unexercised"]]
    for row in data["rows"]:
        found += [f"{described(row)}: {text}" for text in _row_problems(row)]
    return found


def _row_problems(row: dict[str, Any]) -> Iterable[str]:
    arch, limit = row["arch"], occupancy.LIMITS[row["arch"]].shared_per_block
    if row["error"] is not None:
        yield row["error"]
        return
    if row["shared"] > limit:
        yield f"{row['shared']} bytes of shared memory, a block has {limit}"
    elif row["blocks_per_multiprocessor"] < 1:
        yield f"no block fits on a multiprocessor: {row['limited_by']}"
    if not arch.startswith("sm_") and row["kernel"] not in NO_SPILLS_ON_AMD:
        return
    allowed, _ = SPILLS_OF_UNALIGNED.get(row["kernel"], (0, ""))
    if row["spill"] > (0 if row["aligned"] else allowed):
        yield f"{row['spill']} bytes of registers spilled"
    matrix = row["kernel"] in MATRIX_KERNELS and row["dtype"] in HALF
    if row["instructions"].get("tf32") and not row["instructions"].get("rounding"):
        yield "fp32 operands are cut off to tf32, not rounded"
    if arch == "sm_90" and matrix and not row["instructions"]["wgmma"]:
        yield "no wgmma"
    if row["serialised"]:
        yield row["serialised"]


def described(row: dict[str, Any]) -> str:
    """A row in words: kernel, architecture, dtype, constants and the first call that leads to it."""
    constants = ", ".join(f"{k} {v}" for k, v in row["constants"].items() if v not in (False, None))
    return f"{row['kernel']} {row['arch']} {row['dtype']} [{constants}] of {row['calls'][0]}"


COLUMNS = ("kernel", "dtype", "configuration", "n", "regs", "spill", "shared", "matrix units", "copies",
           "blocks", "occupancy", "limited by", "loop", "predicted us", "by", "floors")  # fmt: skip


def render(data: dict[str, Any], full: bool = False) -> str:
    """The text form: per configuration the worst over its `n` specialisations, or all of them if `full`."""
    lines = [f"Triton {data['triton']}"]
    for arch in dict.fromkeys(row["arch"] for row in data["rows"]):
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for index, row in enumerate(r for r in data["rows"] if r["arch"] == arch):
            key = (row["kernel"], row["dtype"], _short(row["config"]), *([str(index)] if full else []))
            groups.setdefault(key, []).append(row)
        table = [COLUMNS, *(_cells(key, rows, full) for key, rows in sorted(groups.items()))]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        lines += ["", arch]
        lines += [
            "  " + "  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in table
        ]
    lines += ["", *(f"PROBLEM {text}" for text in data["problems"])]
    return "\n".join(lines).rstrip()


def _short(config: dict[str, Any]) -> str:
    blocks = "x".join(str(v) for k, v in config.items() if k.startswith("BLOCK"))
    return f"{blocks} w{config.get('num_warps', 4)} s{config.get('num_stages', 3)}"


def _cells(key: tuple[str, ...], rows: list[dict[str, Any]], full: bool) -> tuple[str, ...]:
    worst = functools.partial(max, default=0)
    fewest = min(rows, key=lambda row: row["occupancy"])
    used = {name: worst(row["instructions"][name] for row in rows) for name in aot.INSTRUCTIONS}
    units = [name for name in ("wgmma", "tcgen05", "mma_sync", "mfma") if used[name]]
    copies = [name for name in ("tma", "cp_async") if used[name]]
    constants = rows[0]["constants"].items()
    chosen = " ".join(f"{k}={v}" for k, v in constants if v not in (False, None)) if full else ""
    return (
        key[0],
        key[1],
        f"{key[2]} {chosen}".rstrip(),
        str(len(rows)),
        str(worst(row["registers"] for row in rows)),
        str(worst(row["spill"] for row in rows)),
        str(worst(row["shared"] for row in rows)),
        " ".join(f"{name}:{used[name]}" for name in units) or "-",
        " ".join(f"{name}:{used[name]}" for name in copies) or "-",
        str(fewest["blocks_per_multiprocessor"]),
        f"{fewest['occupancy']:.0%}",
        fewest["limited_by"],
        *_prediction_cells(rows),
    )


def _prediction_cells(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Instructions of the main loop, and the prediction that is worst beside its floor."""
    loops = [row["main_loop"]["instructions"] for row in rows if row["main_loop"] is not None]
    known = [row["predicted"] for row in rows if row["predicted"] is not None]
    worst = max(known, key=lambda found: found["ratio"] or 0.0, default=None)
    loop = str(max(loops)) if any(loops) else "-"
    if worst is None:
        return loop, "-", "-", "-"
    ratio = "-" if worst["ratio"] is None else f"{worst['ratio']:.2f}"
    return loop, f"{1e6 * worst['seconds']:.1f}", worst["limited_by"], ratio


def show_progress(text: str) -> None:
    """Overwrite one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text}", end="", file=sys.stderr, flush=True)
