"""Time and peak memory of one training step: fused operations beside the plain formulation, interleaved."""

from __future__ import annotations

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fused_ewclora as fe

from .protocol import adapted
from .vit import Classifier, VisionTransformer

WARMUP = 2
SLICES = ("k", "v")


class PlainQKV(nn.Module):
    """The published formulation: every forward pass forms dW = B A, `k += x dW_k^T`, `v += x dW_v^T`."""

    def __init__(self, layer: fe.AdaptedLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.lora_as = nn.ParameterList(a.detach().clone() for _, a, _ in layer.adapter_parameters())
        self.lora_bs = nn.ParameterList(b.detach().clone() for _, _, b in layer.adapter_parameters())

    def deltas(self) -> list[Tensor]:
        return [b @ a for a, b in zip(self.lora_as, self.lora_bs, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.weight, self.bias).chunk(3, dim=-1)
        delta_k, delta_v = self.deltas()
        return torch.cat([q, k + F.linear(x, delta_k), v + F.linear(x, delta_v)], dim=-1)


def plain_copy(model: Classifier) -> tuple[Classifier, list[PlainQKV]]:
    """The same model, same values, on plain layers."""
    twin = copy.deepcopy(model)
    layers = []
    for name, layer in fe.adapters(twin).items():
        plain = PlainQKV(layer).to(layer.weight.device)
        twin.set_submodule(name, plain)
        layers.append(plain)
    return twin, layers


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
    ewc = fe.EWC(model, ewc_lambda=1.0)
    ewc.end_task([(images, labels)], F.cross_entropy, progress=False)
    with torch.no_grad():
        for layer in fe.adapters(model).values():
            for _, _, lora_b in layer.adapter_parameters():
                lora_b.normal_(std=0.02)
    twin, plain_layers = plain_copy(model)
    fishers = list(ewc.fishers.values())

    def fused() -> float:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        value = float(loss.detach() + ewc.add_penalty_grad_())
        model.zero_grad(set_to_none=True)
        return value

    def plain() -> float:
        deltas = [delta for layer in plain_layers for delta in layer.deltas()]
        squares = [(fisher * delta.square()).sum() for fisher, delta in zip(fishers, deltas, strict=True)]
        loss = F.cross_entropy(twin(images), labels) + 0.5 * ewc.ewc_lambda * torch.stack(squares).sum()
        loss.backward()
        value = float(loss.detach())
        twin.zero_grad(set_to_none=True)
        return value

    return fused, plain


def peak_bytes(step: Callable[[], float], device: torch.device) -> int:
    """Most memory that tensors made during the step hold at one moment, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "9"
    )  # the profiler reports its start and stop on stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


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
        "fused_peak_mib": peak_bytes(fused, device) / 2**20,
        "plain_peak_mib": peak_bytes(plain, device) / 2**20,
    }
