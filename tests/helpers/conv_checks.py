# SPDX-License-Identifier: Apache-2.0
"""What several processes must agree on where a model has convolutions; run by test_convs.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from conv_models import adapted, images, plain
from models import randomize_adapters_
from processes import run_checks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_ewclora as fe
from fused_ewclora.distributed.processes import whole

SAMPLES = 8
OPTIONS: Any = {"ewc_lambda": 3.0, "fisher_mode": "sample", "fisher_dtype": torch.float64}


def mine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return x[rank::world], y[rank::world]


def step(model: nn.Module, ewc: fe.EWC, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The gradients of a loss with its penalty."""
    model.zero_grad()
    (F.cross_entropy(model(batch[0]), batch[1]) + ewc.penalty()).backward()
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: whole(grad) for name, grad in named.items() if grad is not None}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 0
    for name, value in expected.items():
        torch.testing.assert_close(whole(found[name]), whole(value), rtol=1e-9, atol=1e-13, msg=name)


def weights(model: nn.Module) -> dict[str, Tensor]:
    named = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if ".lora_" not in name}


def two_tasks(model: nn.Module, ewc: fe.EWC) -> None:
    """A task, gradients with the penalty, and another task; compared with those of one process."""
    alone = adapted(plain("circular"))
    other = fe.EWC(alone, **OPTIONS)
    for task in range(2):
        whole_batch = images(SAMPLES, seed=task)
        ewc.estimate_fisher([mine(*whole_batch)], F.cross_entropy)
        ewc.reduce_fisher_()
        ewc.consolidate()
        other.estimate_fisher([whole_batch], F.cross_entropy)
        other.consolidate()
        same(ewc.fishers, other.fishers)
        same(weights(model), weights(alone))
        for each in (model, alone):
            randomize(each, task)
        same(step(model, ewc, mine(*whole_batch)), step(alone, other, whole_batch))


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """The same adapters in a model that is sharded and in one that is not."""
    drawn = adapted()
    randomize_adapters_(drawn, seed)
    values = dict(drawn.named_parameters())
    for name, p in model.named_parameters():
        if ".lora_" in name:
            value = values[name.removeprefix("module.")].detach()
            if isinstance(p, torch.distributed.tensor.DTensor):
                value = torch.distributed.tensor.distribute_tensor(value, p.device_mesh, p.placements)
            p.copy_(value)


def ddp() -> None:
    model = nn.parallel.DistributedDataParallel(adapted(plain("circular")))
    two_tasks(model, fe.EWC(model, **OPTIONS))


def fsdp() -> None:
    """Kernels, adapters and Fishers are sharded by output channels."""
    model = adapted(plain("circular"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.shared, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ewc = fe.EWC(model, **OPTIONS)
    ewc.shard_()
    two_tasks(model, ewc)


CHECKS: dict[str, Callable[[], None]] = {function.__name__: function for function in (ddp, fsdp)}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_checks(CHECKS, Path(sys.argv[1]))
