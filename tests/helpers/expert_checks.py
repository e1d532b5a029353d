"""What several processes must agree on where a model has experts; run by test_experts.py."""

from __future__ import annotations

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
from fused_ewclora.distributed.processes import whole
from fused_ewclora.integrations import _transformers_experts as routed

TOKENS, SAMPLES = 3, 8


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
    same({n: p for n, p in inner.named_parameters() if "lora" not in n},
         {n: p for n, p in alone.named_parameters() if "lora" not in n})  # fmt: skip


def sharded_experts() -> None:
    """Training works where FSDP2 divides the experts over processes, and EWC is refused by name."""
    alone, model = model_of(), model_of()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for seed in range(2):
        same(gradients(model, mine(*data(seed))), gradients(alone, data(seed)))
    ewc = fe.EWC(model, **OPTIONS)
    try:
        ewc.shard_()
    except fe.TargetError as error:
        assert "experts.0.gate_up_proj: experts.gate_up_proj is sharded" in str(error), error
    else:
        raise AssertionError("sharded experts were taken")


def whole_experts() -> None:
    """EWC over two tasks where FSDP2 shards everything but the parameters of the experts."""
    alone, model = model_of(), model_of()
    kept = {p for n, p in model.named_parameters() if "experts" in n and "lora" not in n}
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params=kept)
    first, second = fe.EWC(model, **OPTIONS), fe.EWC(alone, **OPTIONS)
    first.shard_()
    task(first, mine(*data(2)), alone=False)
    task(second, data(2), alone=True)
    same(first.fishers, second.fishers)
    same({n: p for n, p in model.named_parameters() if "lora" not in n},
         {n: p for n, p in alone.named_parameters() if "lora" not in n})  # fmt: skip


CHECKS: dict[str, Callable[[], None]] = {
    function.__name__: function for function in (ddp, sharded_experts, whole_experts)
}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_checks(CHECKS, Path(sys.argv[1]))
