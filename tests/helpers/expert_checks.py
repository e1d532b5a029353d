# SPDX-License-Identifier: Apache-2.0
"""What several processes must agree on where a model has experts; run by test_experts.py."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import randomize_adapters_
from processes import run_checks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy_experts import D, Mixture, is_known

import fused_ewclora as fe
from fused_ewclora.distributed.processes import assign_, reshard, whole
from fused_ewclora.integrations import _transformers_experts as routed

TOKENS, SAMPLES = 3, 12


def model_of() -> Mixture:
    routed._known = is_known  # type: ignore[assignment]
    torch.manual_seed(0)
    model = Mixture().double()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["inner", "experts"]))
    randomize_adapters_(model)
    return model


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Of samples that have few of the classes of tokens each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, TOKENS, D, generator=generator, dtype=torch.float64)
    x[:, :, 0] = 0.1 * (torch.arange(SAMPLES) % 4)[:, None] + 0.05
    return x, torch.arange(SAMPLES) % 3


def mine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return x[rank::world], y[rank::world]


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return {
        name.removeprefix("module."): whole(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 0
    for name, value in expected.items():
        torch.testing.assert_close(whole(found[name]), value, rtol=1e-9, atol=1e-13, msg=name)


def task(ewc: fe.EWC, batch: tuple[Tensor, Tensor], alone: bool) -> None:
    ewc.estimate_fisher([(batch[0][:2], batch[1][:2]), (batch[0][2:], batch[1][2:])], F.cross_entropy)
    if not alone:
        ewc.reduce_fisher_()
    ewc.consolidate()


OPTIONS: Any = {"ewc_lambda": 3.0, "fisher_mode": "sample", "fisher_dtype": torch.float64}


def ddp() -> None:
    """Without find_unused_parameters, although each process sends tokens to other experts."""
    alone, inner = model_of(), model_of()
    model = nn.parallel.DistributedDataParallel(inner)
    for seed in range(2):
        same(gradients(model, mine(*data(seed))), gradients(alone, data(seed)))
    first, second = fe.EWC(model, **OPTIONS), fe.EWC(alone, **OPTIONS)
    task(first, mine(*data(2)), alone=False)
    task(second, data(2), alone=True)
    same(first.fishers, second.fishers)
    same(plain(inner), plain(alone))


def fsdp(kept: bool) -> None:
    """Two tasks under FSDP2, which divides the parameters of the experts by experts or keeps them whole, and
    a checkpoint that one process and all of them load."""
    alone, model = model_of(), model_of()
    ignored = {p for n, p in model.named_parameters() if kept and "experts" in n and "lora" not in n}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    first, second = fe.EWC(model, **OPTIONS), fe.EWC(alone, **OPTIONS)
    first.shard_()
    folder = Path(sys.argv[1]) / f"checkpoint-{kept}"
    for number in range(2):
        same(gradients(model, mine(*data(number))), gradients(alone, data(number)))
        task(first, mine(*data(2)), alone=False)
        task(second, data(2), alone=True)
        same(first.fishers, second.fishers)
        same(plain(model), plain(alone))
        adapt(model, number)
        adapt(alone, number)
        torch.testing.assert_close(first.penalty(), second.penalty(), rtol=1e-5, atol=0.0)
    with torch.no_grad():
        model(data(0)[0])  # leaves the root's parameters whole
    fe.save_pretrained(folder, model, first)
    again, single = model_of(), model_of()
    fully_shard(again, mesh=mesh)
    for other in (again, single):
        ewc = fe.EWC(other, **OPTIONS)
        if other is again:
            ewc.shard_()
        fe.load_pretrained(folder, other, ewc)
        same(dict(other.named_parameters()), dict(alone.named_parameters()))
        same(ewc.fishers, second.fishers)


def plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora" not in name}


@torch.no_grad()
def adapt(model: nn.Module, seed: int) -> None:
    """The same adapters in every process, sharded or not."""
    generator = torch.Generator().manual_seed(seed)
    reshard(model)
    for name, p in model.named_parameters():
        if "lora" in name:
            assign_(p, 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


CHECKS: dict[str, Callable[[], None]] = {
    "ddp": ddp,
    "fsdp, experts divided": functools.partial(fsdp, kept=False),
    "fsdp, experts whole": functools.partial(fsdp, kept=True),
}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_checks(CHECKS, Path(sys.argv[1]))
