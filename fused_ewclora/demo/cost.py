# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of one training step: fused operations beside the plain formulation, interleaved."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import fused_ewclora as fe

from .explicit import ExplicitDelta, replace_with_explicit_
from .memory import peak_bytes
from .protocol import adapted
from .vit import Classifier, VisionTransformer

WARMUP = 2


def plain_copy(model: Classifier) -> tuple[Classifier, list[ExplicitDelta]]:
    """The same model with the same values, its adapters in the published formulation."""
    twin = copy.deepcopy(model)
    return twin, replace_with_explicit_(twin, fe.adapters(twin))


def steps(
    dim: int, depth: int, side: int, patch: int, batch: int, rank: int, device: torch.device
) -> tuple[Callable[[], float], Callable[[], float]]:
    """A step (forward, backward, penalty) in both formulations on the same values; each returns its loss."""
    torch.manual_seed(0)
    model = adapted(VisionTransformer(side, patch, 1, dim, depth, num_heads=4), rank)
    model.add_head(10)
    model.to(device)
    images, labels = (
        torch.rand(batch, 1, side, side, device=device),
        torch.randint(10, (batch,), device=device),
    )
    ewc_lambda = 1.0
    ewc = fe.EWC(model, ewc_lambda=ewc_lambda)
    ewc.end_task([(images, labels)], F.cross_entropy, progress=False)
    with torch.no_grad():
        for layer in fe.adapters(model).values():
            for _, _, lora_b in layer.adapter_parameters():
                lora_b.normal_(std=0.02)
    twin, plain_layers = plain_copy(model)
    fishers = [fisher for fisher in ewc.fishers.values() if isinstance(fisher, torch.Tensor)]

    def fused() -> float:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        value = float(loss.detach() + ewc.add_penalty_grad_())
        model.zero_grad(set_to_none=True)
        return value

    def plain() -> float:
        deltas = [delta for layer in plain_layers for delta in layer.deltas()]
        squares = [(fisher * delta.square()).sum() for fisher, delta in zip(fishers, deltas, strict=True)]
        loss = F.cross_entropy(twin(images), labels) + 0.5 * ewc_lambda * torch.stack(squares).sum()
        loss.backward()
        value = float(loss.detach())
        twin.zero_grad(set_to_none=True)
        return value

    return fused, plain


def measure(
    name: str,
    repeats: int,
    device: torch.device,
    *,
    dim: int,
    depth: int,
    side: int,
    patch: int,
    batch: int,
    rank: int,
) -> dict[str, float | int | str]:
    """Medians over interleaved repeats; checks first that both formulations compute the same loss."""
    fused, plain = steps(dim, depth, side, patch, batch, rank, device)
    losses = fused(), plain()
    if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):  # fp32 sums of some 1e5 terms in two orders
        raise fe.EWCLoRAError(f"cost: the fused step has loss {losses[0]}, the plain formulation {losses[1]}")
    times: dict[str, list[float]] = {"fused": [], "plain": []}
    for repeat in range(repeats + WARMUP):
        for kind, step in (("fused", fused), ("plain", plain)):
            start = time.perf_counter()
            step()  # returns a number, so a GPU has finished
            if repeat >= WARMUP:
                times[kind].append(time.perf_counter() - start)
    return {
        "model": name,
        "dim": dim,
        "blocks": depth,
        "tokens": (side // patch) ** 2 + 1,
        "batch": batch,
        "rank": rank,
        "repeats": repeats,
        "fused_ms": 1e3 * statistics.median(times["fused"]),
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        "fused_peak_mib": peak_bytes(fused, device)[1] / 2**20,
        "plain_peak_mib": peak_bytes(plain, device)[1] / 2**20,
    }
