# SPDX-License-Identifier: Apache-2.0
"""Mistakes that type checkers have to find: in every line that says so, and in no other."""

# pyright: strict

from __future__ import annotations

import torch
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.methods import EWCLoRA, InfLoRA


def wrong(model: nn.Module, loader: list[tuple[Tensor, Tensor]], x: Tensor) -> None:
    config = fe.LoRAConfig(r=4, target_module=["qkv"])  # mistake: call
    fe.LoRAConfig(r="4")  # mistake: type
    fe.LoRAConfig(quantised_merge="requantize")  # mistake: type
    fe.injekt(model, config)  # mistake: attribute
    fe.EWC(model, ewc_lamda=1.0)  # mistake: call
    fe.EWC(model, fisher_mode="samples")  # mistake: type
    fe.EWC(model, fisher_dtype="4bit")  # mistake: type
    fe.EWC(model, fisher="diagonal")  # mistake: type
    fe.EWC(model, merge_mode="factor")  # mistake: type
    ewc = fe.EWC(model, ewc_lambda=1.0)
    ewc.end_task(loader, max_batch=3)  # mistake: call
    ewc.end_task(loader, labels="sample")  # mistake: type
    ewc.end_task(loader, reduction="none")  # mistake: type
    ewc.penalty(x)  # mistake: call
    ewc.consolidation()  # mistake: attribute
    ewc.ewc_lambda = "1e7"  # mistake: type
    fe.convert_lambda(1.0, "batch", "samples", batch_size=8)  # mistake: type
    fe.save_pretrained(model, "folder")  # mistake: types
    fe.use_backend("tritn")  # mistake: type
    FE.lora_linear(x, x, None, x, x, backend="cudnn")  # mistake: type
    FE.ewc_penalty([x], [x], [x], lam=1.0)  # mistake: call
    FE.fisher_accumulate_(torch.zeros(2, 2), x, x, mode="mean")  # mistake: overload
    EWCLoRA(model, config, ewc_lamda=1.0)  # mistake: call
    InfLoRA(model, config, total_tasks=2, variant="paper2")  # mistake: type
    fe.methods.SDLoRA(model, config, merge_mode="delta")  # mistake: call
    fe.metrics.ContinualMetrics([10]).A(0, average="mean")  # mistake: type
    fe.profiling.enabled()  # mistake: attribute
