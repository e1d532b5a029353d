# SPDX-License-Identifier: Apache-2.0
"""Reports what is installed and compiled, and which backend serves which op, with the reasons."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from types import ModuleType
from typing import Any

import torch

from ..backends import cuda, native
from ..errors import EWCLoRAError
from ..ops import dispatch, schemas

ENVIRONMENT = {
    "FUSED_EWCLORA_AUTOTUNE": "1: Triton kernels run in configurations measured on this GPU",
    "FUSED_EWCLORA_BACKEND": "backend of calls that name none: auto, triton, cuda, cpu or reference",
    "FUSED_EWCLORA_BUILD": "read when the package is built: auto, none, cpu or cuda",
    "FUSED_EWCLORA_CACHE": "folder of measured configurations; unset: fused_ewclora in the user's cache",
    "FUSED_EWCLORA_CPU_ISA": "instruction set of the CPU kernels: baseline, avx2 or avx512",
}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _default_backend() -> str:
    try:
        return dispatch.current_backend()
    except EWCLoRAError as error:
        return f"none: {error}"


def _instruction_set(extension: ModuleType | None) -> str | None:
    if extension is None:
        return None
    try:
        return str(extension.instruction_set())
    except RuntimeError as error:  # FUSED_EWCLORA_CPU_ISA names a set that this processor lacks
        return f"none: {error}"


def _op_table(call: dispatch.Call) -> dict[str, dict[str, str | None]]:
    """Op -> backend -> None when one of its algorithms serves `call`, else the reason why none does."""
    missing = dispatch.available_backends()
    table = {}
    for op in schemas.SCHEMAS:
        served: dict[str, str | None] = {}
        for backend, _, reason in dispatch.explain(op, call, backend="auto"):
            if served.get(backend, "") is not None:
                served[backend] = reason
        table[op] = {
            backend: reason if reason is not None else served.get(backend, f"{op} is not implemented")
            for backend, reason in missing.items()
        }
    return table


def collect() -> dict[str, Any]:
    """Everything that the command `info` prints, as plain data for JSON.

    >>> collect()["backends"]["reference"] is None
    True
    """
    extension = native.extension()
    distributions = ("fused-ewclora", "torch", "numpy", "safetensors", "triton")
    return {
        "versions": {name: _version(name) for name in distributions} | {"python": platform.python_version()},
        "platform": platform.platform(),
        "build": "pure Python" if extension is None else "CPU extension",
        "extension": {"path": getattr(extension, "__file__", None), "reason": native.unavailable()},
        "cuda_extension": {
            "path": getattr(cuda.extension(), "__file__", None),
            "reason": cuda.unavailable(),
        },
        "cpu": {
            "extension": _instruction_set(extension),
            "pytorch": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "default_backend": _default_backend(),
        "backends": dispatch.available_backends(),
        "ops": _op_table(dispatch.Call("cpu", torch.float32)),
        "gpus": _gpus(),
    }


def _gpus() -> list[dict[str, Any]]:
    """The name and architecture of every GPU, and the backends of its ops in bf16."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        arch = dispatch.arch_of(torch.device("cuda", index))
        call = dispatch.Call("cuda", torch.bfloat16, arch, precision=torch.get_float32_matmul_precision())
        name = torch.cuda.get_device_name(index)
        gpus.append({"name": name, "architecture": arch, "ops": _op_table(call)})
    return gpus


def _lines(title: str, values: dict[str, Any]) -> list[str]:
    width = max(map(len, values), default=0)
    return [title, *(f"  {name:{width}}  {value}" for name, value in values.items()), ""]


def render(data: dict[str, Any]) -> str:
    """The text form of `collect()`."""
    extension = data["extension"]
    lines = _lines("Versions", {name: value or "not installed" for name, value in data["versions"].items()})
    lines += _lines(
        "Build",
        {
            "mode": data["build"],
            "extension": extension["path"] or extension["reason"],
            "CUDA extension": data["cuda_extension"]["path"] or data["cuda_extension"]["reason"],
            "platform": data["platform"],
            "instruction set": f"extension {data['cpu']['extension']}, PyTorch {data['cpu']['pytorch']}",
            "threads": data["cpu"]["threads"],
        },
    )
    lines += _lines(
        "Environment",
        {
            name: f"{'unset' if value is None else value}  ({ENVIRONMENT[name]})"
            for name, value in data["environment"].items()
        },
    )
    lines += _lines("Backends", {name: reason or "available" for name, reason in data["backends"].items()})
    lines += [f"Default backend: {data['default_backend']}", ""]
    shown = [name for name, reason in data["backends"].items() if reason is None]
    tables = {"Ops, fp32 on the CPU": data["ops"]}
    tables |= {f"Ops, bf16 on {gpu['name']} ({gpu['architecture']})": gpu["ops"] for gpu in data["gpus"]}
    for title, ops in tables.items():
        rows = {op: "; ".join(f"{name}: {row[name] or 'yes'}" for name in shown) for op, row in ops.items()}
        lines += _lines(title, rows)
    return "\n".join(lines).rstrip()
