# SPDX-License-Identifier: Apache-2.0
"""Pairs of PEFT models, one as PEFT made it and one on the fused op, and what both are compared by."""

from __future__ import annotations

import copy
from typing import Any

import peft
import seeding
import torch
from models import MLP
from tolerance import EPS, accumulation, assert_as_good, rounding_bound
from torch import Tensor, nn

import fused_ewclora as fe

TARGETS = ("fc1", "fc2")
TERMS = 10  # of the longest sum in MLP


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """What training would do to lora_B, of all adapters."""
    generator = seeding.generator(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def lora_config(**options: Any) -> peft.LoraConfig:
    """Rank 2, scaling 1.5, on both hidden layers of an MLP."""
    values = {"r": 2, "lora_alpha": 3, "target_modules": list(TARGETS), **options}
    return peft.LoraConfig(**values)


def peft_model(
    model: nn.Module | None = None, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any
):
    """A PEFT model with lora_B that is not zero; an MLP unless told otherwise."""
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    torch.manual_seed(seed)
    model = MLP() if model is None else model
    made = peft.get_peft_model(model.to(dtype), lora_config(**options))
    randomise(made, seed)
    return made


def pair(*args: Any, **kwargs: Any):
    """(as PEFT made it, the same on the fused op)."""
    plain = peft_model(*args, **kwargs)
    fused = copy.deepcopy(plain)
    fe.integrations.peft.accelerate_(fused)
    return plain, fused


def inputs(dtype: torch.dtype = torch.float64, samples: int = 5, d_in: int = 6) -> Tensor:
    return torch.randn(samples, d_in, generator=seeding.generator(9)).to(dtype)


def run(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Output, and gradients of a sum of squares with respect to x and everything that trains."""
    x = x.clone().requires_grad_(True)
    y = model(x, **kwargs)
    wanted = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y.square().sum(), list(wanted.values()))
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def assert_equal_runs(plain: nn.Module, fused: nn.Module, x: Tensor, **kwargs: Any) -> None:
    """The same outputs and gradients: to rounding in fp64; below, as near to fp64 as PEFT's own."""
    exact = run(copy.deepcopy(plain).double(), x.double(), **kwargs)
    own, ours = run(plain, x, **kwargs), run(fused, x, **kwargs)
    assert own.keys() == ours.keys() == exact.keys() and len(exact) > 2
    for name, value in exact.items():
        assert ours[name].dtype == own[name].dtype, name
        # Sums in three layers and back, and one rounding to the dtype of the tensor.
        sums = 6 * (2 * TERMS**0.5 + 4) * EPS[accumulation(x.dtype)] * value.abs().max()
        # Between the layers activations and gradients are rounded to the dtype of x, twice each; by how much
        # that moves a sum is luck, for PEFT as for us.
        roundings = 0 if x.dtype == accumulation(x.dtype) else 4
        between = roundings * EPS[x.dtype] / 2 * value.abs().max()
        bound = sums + between + rounding_bound(value, own[name].dtype)
        assert_as_good(ours[name], own[name], value, bound, name)


def assert_same_bits(plain: nn.Module, fused: nn.Module, x: Tensor, **kwargs: Any) -> None:
    """PEFT's own forward ran in both."""
    own, ours = run(plain, x, **kwargs), run(fused, x, **kwargs)
    assert own.keys() == ours.keys()
    assert all(torch.equal(own[name], ours[name]) for name in own)
