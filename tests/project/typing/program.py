# SPDX-License-Identifier: Apache-2.0
"""A program of a user; type checkers in strict mode find nothing in it. It is checked and never run."""

# pyright: strict

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.literals import Backend, FisherMode, Labels
from fused_ewclora.methods import EWCLoRA, InfLoRA, Method, SDLoRA
from fused_ewclora.metrics import ContinualMetrics

Batches = list[tuple[Tensor, Tensor]]


def adapted(model: nn.Module) -> fe.Report:
    layout = fe.QKVLayout(("q", "k", "v"))
    config = fe.LoRAConfig(r=10, target_modules=["qkv"], slices=("k", "v"), layout=layout)
    report = fe.inject(model, config)
    layers: dict[str, fe.AdaptedLinear] = fe.adapters(model)
    ranks: list[int] = [layer.r for layer in layers.values()]
    print(report, report.rows[0]["name"], ranks, fe.explain(model, torch.zeros(1, 3, 224, 224)))
    return fe.memory(model, fisher="factored")


def trained(model: nn.Module, loaders: list[Batches], mode: FisherMode = "batch") -> fe.EWC:
    ewc = fe.EWC(model, ewc_lambda=1e7, gamma=0.9, fisher_mode=mode, fisher_dtype="8bit", update="convex")
    ewc.ewc_lambda = fe.convert_lambda(1e7, "batch", "sample", batch_size=128)
    for loader in loaders:
        optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
        for x, y in loader:
            loss: Tensor = F.cross_entropy(model(x), y) + ewc.penalty()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]  # of PyTorch
            optimizer.step()  # pyright: ignore[reportUnknownMemberType]  # of PyTorch
        ewc.end_task(loader, F.cross_entropy, gamma=1.0, max_batches=100, progress=False, max_bytes=2**30)
    with ewc.accumulate_fisher(reduction="sum") as fisher_pass:
        fisher_pass.batch_size = 8
    fishers = {name: f for name, f in ewc.fishers.items() if isinstance(f, Tensor)}
    errors: dict[str, float] = ewc.convert_fisher_("uniform")
    print(fishers, errors, ewc.history[0].samples, ewc.tasks + 1)
    return ewc


def saved(folder: Path, model: nn.Module, ewc: fe.EWC) -> None:
    fe.save_pretrained(folder, model, ewc)
    fe.load_pretrained(folder, model, ewc, strict=True)
    fe.merge(model)
    fe.unmerge(model)
    with fe.disabled(model):
        fe.export_peft(model, folder / "peft")
    fe.import_peft(folder / "peft", model)
    fe.eject(model)


def operations(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    backend: Backend = "reference"
    y: Tensor = FE.lora_linear(x, weight, None, lora_a, lora_b, 0.5, backend=backend)
    penalty: Tensor = FE.ewc_penalty([weight.square()], [lora_a], [lora_b], ewc_lambda=2.0)
    fisher: Tensor = FE.fisher_accumulate_(torch.zeros_like(weight), x, y, mode="sample")
    one: Tensor = FE.merge_(weight, lora_a, lora_b)
    several = FE.merge_([weight], [lora_a], [lora_b], 0.5)
    with fe.use_backend("triton:prologue"):
        return y.sum() + penalty + fisher.sum() + one.sum() + several[0].sum()


def methods(model: nn.Module, loader: Batches, labels: Labels = "exact") -> ContinualMetrics:
    config = fe.LoRAConfig(r=4, target_modules="all-linear")
    tried: list[Method] = [
        EWCLoRA(model, config, labels=labels, ewc_lambda=1e7, fisher_mode="batch"),
        InfLoRA(model, config, total_tasks=5, variant="official"),
        SDLoRA(model, config, ewc_lambda=1.0, fisher_mode="sample"),
        fe.methods.CoDyRA(model, gate_init="normal", schedule="staircase"),
    ]
    for method in tried:
        method.begin_task(0)
        method.prepare(loader, F.cross_entropy, progress=None)
        (method.penalty() * 2.0).backward()  # type: ignore[no-untyped-call, unused-ignore]
        method.after_step(0, 1)
        method.end_task(loader, F.cross_entropy, progress=True)
        exported: nn.Module = method.export()
        print(exported)
    metrics = fe.metrics.ContinualMetrics([10, 10])
    metrics.add([0.9])
    print(metrics.A(0, average="task_mean", protocol="class_incremental"), fe.__version__.split("."))
    return metrics


def caught(model: nn.Module) -> str:
    logging.getLogger("fused_ewclora").setLevel(logging.INFO)
    try:
        with fe.profiling.enable(nvtx=True):
            fe.check_bypass(model)
    except fe.TargetError as error:
        return str(error)
    return fe.integrations.__name__
