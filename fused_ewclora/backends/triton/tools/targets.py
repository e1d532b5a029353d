# SPDX-License-Identifier: Apache-2.0
"""What the kernels aim at on one H200, and what the machine model predicts for them as they are now.

A target is a ratio to a floor: the time of the kernel over that of the bytes or products that it cannot do
without. `python -m fused_ewclora compile-report --targets` compiles the kernels that targets name and prints
the table; nothing in it is measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ....errors import BackendError
from ...candidate import Call, LinearShape
from .. import cost_model
from ..launch import Launch
from . import aot, compile_report, kernel_counts, machine_model, nvcc_kernels, workloads
from . import work as works
from .work import COPY, PRODUCT, READ_F, READ_X, WGRAD

ARCH = "sm_90"
MACHINE = machine_model.MACHINES[ARCH]
VIT_L = workloads.Sizes(layers=48)  # all k and v in one penalty
FC2 = workloads.Sizes(width=4096, hidden=1024)  # the workload called fc1 is fc2 then


class Target(NamedTuple):
    """`most` is the largest ratio of the kernels' time to the floor; the kernels of a workload's algorithm
    that are named in `kernels` are added up."""

    name: str
    shape: str
    op: str
    kind: str
    dtype: torch.dtype
    kernels: tuple[str, ...]
    floor: str
    most: float
    precision: str = "highest"
    rank: int = 10
    algorithm: str = ""
    sizes: workloads.Sizes = VIT_L
    cuda: str = ""  # the twin in `nvcc_kernels`


_BF16, _FP32 = torch.bfloat16, torch.float32
_PENALTY = ("ewc_penalty", ("ewc_penalty_kernel",))


def _penalty(kind: str, precision: str, rank: int, most: float) -> Target:
    op, kernels = _PENALTY
    twin = f"penalty {kind.partition(' ')[0]} {precision}"
    shape = f"ViT-L k, v; {kind}, r {rank}, {precision}"
    return Target("penalty", shape, op, kind, _FP32, kernels, READ_F, most, precision, rank, cuda=twin)


def _product(name: str, op: str, algorithm: str, k: int, sizes: workloads.Sizes) -> Target:
    shape = f"ViT-L, K {k}, bf16, {algorithm}"
    kernels = ("lora_linear_kernel",)
    return Target(name, shape, op, "fc1", _BF16, kernels, PRODUCT, 1 / 0.85, algorithm=algorithm, sizes=sizes)


TARGETS: tuple[Target, ...] = (
    *(_penalty("fp32 F", "high", rank, 1.4) for rank in (10, 16)),
    *(_penalty("fp32 F", "highest", rank, 1.8) for rank in (10, 16)),
    *(_penalty("bf16 F", precision, 16, 1.6) for precision in ("high", "medium")),
    _product("forward", "lora_linear", "prologue", 1024, VIT_L),
    _product("forward", "lora_linear", "full", 1024, VIT_L),
    _product("forward", "lora_linear", "full", 4096, FC2),
    _product("dx", "lora_linear_backward", "prologue", 1024, FC2),
    _product("dx", "lora_linear_backward", "prologue", 4096, VIT_L),
    Target(
        "u, dB", "ViT-L fc1, bf16", "lora_linear_backward", "fc1", _BF16, ("lowrank_columns_kernel",), READ_X,
        1.15, algorithm="prologue", cuda="u, dB",
    ),
    Target(
        "Fisher per sample", "ViT-L fc1, 64 x 197, bf16", "fisher_accumulate_", "sample", _BF16,
        ("fisher_sample_kernel",), WGRAD, 1.7, cuda="Fisher per sample",
    ),
    Target(
        "square-add", "ViT-L fc1", "fisher_accumulate_", "batch", _BF16, ("fisher_square_kernel",), COPY,
        1 / 0.85,
        cuda="square-add",
    ),
    Target("merge", "ViT-L fc1, bf16", "merge_", "fp32 factors", _BF16, ("merge_kernel",), COPY, 1 / 0.85),
)  # fmt: skip


def collect(
    cubins: Sequence[Path] = (),
    executed: Sequence[kernel_counts.Executed] = (),
    jobs: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The table as plain data: a row per target and backend. `cubins` are files of machine code of the CUDA
    kernels (sm_90, by nvcc); without them their rows are missing."""
    if (reason := compile_report.missing()) is not None:
        raise BackendError(reason)
    if aot.nvdisasm() is None:
        raise BackendError("this Triton lacks backends/nvidia/bin/nvdisasm, which reads machine code")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = []
        for row in pool.map(triton_row, TARGETS, [tuple(executed)] * len(TARGETS)):
            rows.append(row)
            progress(f"predicted {len(rows)} of {len(TARGETS)}")
    rows += _cuda_rows(cubins, executed)
    return {"machine": MACHINE.name, "arch": ARCH, "rows": rows}


def _is_meant(target: Target, launch: Launch) -> bool:
    """Whether a launch of one of the target's kernels is its own: dA takes the kernel of u and dB as well."""
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    return target.name != "u, dB" or arguments["p"] is not None


def triton_row(target: Target, executed: Sequence[kernel_counts.Executed] = ()) -> dict[str, Any]:
    """The row of Triton's kernel, which is compiled here."""
    made = workloads.workloads((target.dtype,), (target.rank,), target.sizes)
    (workload,) = (
        w
        for w in made
        if (w.op, w.kind, w.rank or target.rank) == (target.op, target.kind, target.rank)
        and w.precision == (target.precision if target.dtype == _FP32 else w.precision)
    )
    call = workload.make(workloads.Make("meta"))
    predictions, loops, floor = [], [], 0.0
    for candidate, launches, _ in workloads.noted(workload, ARCH):
        if target.algorithm and target.algorithm not in candidate.keys:
            continue
        for launch in launches:
            if launch.kernel.fn.__name__ not in target.kernels or not _is_meant(target, launch):
                continue
            specialisation = aot.specialise(launch, ARCH)
            noted = compile_report.Noted(
                specialisation, "", {}, compile_report._constants(launch, {}), set(), [], [],
                works.of(launch, call),
            )  # fmt: skip
            row = compile_report._row(noted, aot.build(specialisation), executed)
            predictions.append(row["predicted"])
            loops.append(row["main_loop"])
            floor = max(floor, row["predicted"]["floor"])
        break
    return _row(target, "triton", predictions, loops, floor)


def _cuda_rows(
    cubins: Sequence[Path], executed: Sequence[kernel_counts.Executed]
) -> Iterable[dict[str, Any]]:
    found = nvcc_kernels.read(cubins)
    for target in TARGETS:
        twin = nvcc_kernels.TWINS.get(target.cuda)
        if twin is None or (kernel := found.get(target.cuda)) is None:
            continue
        work = twin.work(target.rank)
        known = kernel_counts.executed_for(executed, kernel.symbol, {"arch": ARCH})
        counts, main = kernel_counts.counts(kernel.code, work, twin.warps, kernel.blocks, known)
        prediction = machine_model.predict(counts, MACHINE)
        told = {"seconds": prediction.seconds, "limited_by": prediction.limited_by}
        yield _row(target, "cuda", [told], [asdict(main)], work.floor(MACHINE))


def _row(
    target: Target, backend: str, predictions: list[Any], loops: list[Any], floor: float
) -> dict[str, Any]:
    seconds = machine_model.in_a_row([p["seconds"] for p in predictions])
    slowest = max(predictions, key=lambda p: float(p["seconds"]))
    ratio = seconds / floor
    return {
        "name": target.name,
        "shape": target.shape,
        "backend": backend,
        "kernels": list(target.kernels),
        "precision": target.precision if target.dtype == _FP32 else None,
        "rank": target.rank,
        "op": target.op,
        "algorithm": target.algorithm,
        "floor_name": target.floor,
        "floor": floor,
        "target": target.most,
        "seconds": seconds,
        "ratio": ratio,
        "met": ratio <= target.most,
        "limited_by": slowest["limited_by"],
        "main_loop": loops[0],
    }


MODELS = {"ViT-B/16": (768, 12608), "ViT-L/16": (1024, 12608), "ViT-H/14": (1280, 16448)}  # width, rows
LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # widths in and out


def choices() -> str:
    """In Markdown, the algorithms that the cost model chooses for 64 images, with their times over the frozen
    product's."""
    lines = ["| layer | product, us | forward | dx |", "|---|---|---|---|"]
    for model, (width, rows) in MODELS.items():
        for layer, (wide_in, wide_out) in LAYERS.items():
            shape = LinearShape(rows, wide_in * width, wide_out * width, 16)
            product = 2.0 * rows * shape.d_in * shape.d_out / MACHINE.blas
            cells = []
            for op in ("lora_linear", "lora_linear_backward"):
                times = cost_model.modelled(op, Call("cuda", _BF16, ARCH, shape))
                best = min(times, key=times.__getitem__)
                cells.append(f"{best} {times[best] / product:.2f}")
            lines.append(f"| {model} {layer} | {1e6 * product:.0f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


COLUMNS = (
    "kernel",
    "shape",
    "floor",
    "us",
    "target",
    "backend",
    "loop",
    "predicted us",
    "ratio",
    "limited by",
)


def render(data: dict[str, Any], markdown: bool = False) -> str:
    """The table as text, or in Markdown for docs/triton.md."""
    lines = [COLUMNS, *(_cells(row) for row in data["rows"])]
    if markdown:
        marks = ["|" + "---|" * len(COLUMNS)]
        texts = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([texts[0], *marks, *texts[1:], "", choices()])
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    texts = ["  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"predictions for one {data['machine']}, none measured", *texts])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        row["shape"],
        row["floor_name"],
        f"{1e6 * row['floor']:.1f}",
        f"{row['target']:.2f}",
        row["backend"],
        str(row["main_loop"]["instructions"] or "-"),
        f"{1e6 * row['seconds']:.1f}",
        f"{row['ratio']:.2f}{'' if row['met'] else ' (not met)'}",
        row["limited_by"],
    )
