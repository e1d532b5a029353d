# SPDX-License-Identifier: Apache-2.0
"""A small attention model for tests of whole tasks, and the Fisher of its weights one sample at a time in
plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import seeding
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_ewclora.config import LoRAConfig, QKVLayout
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.layers.inject import inject
from fused_ewclora.layers.linear import LoRALinear

TOKENS, WIDTH, CLASSES = 3, 6, 4
KEYS = ("qkv.k", "qkv.v", "fc")


class Tiny(nn.Module):
    """x `[N, T, 6]` -> logits `[N, 4]`: packed attention, a layer that may run twice, a mean over tokens and
    a head."""

    def __init__(self, calls: int = 1, reentrant: bool | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.calls, self.reentrant = calls, reentrant

    def block(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        for _ in range(self.calls):
            x = x + torch.tanh(self.fc(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            x = self.block(x)
        else:
            x = checkpoint(self.block, x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)
        return self.head(x.mean(1))


def adapted(
    seed: int = 0, r: int = 2, lora_alpha: float | None = None, dtype=torch.float64, **options
) -> Tiny:
    """A Tiny with random non-zero adapters on k and v of `qkv` (per-head interleaved rows) and on `fc`; the
    head trains."""
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    torch.manual_seed(seed)
    model = Tiny(**options).to(dtype)
    layout = QKVLayout(("q", "k", "v"))
    inject(
        model,
        LoRAConfig(r=r, lora_alpha=lora_alpha, target_modules=["qkv"], slices=("k", "v"), layout=layout),
    )
    inject(model, LoRAConfig(r=r, lora_alpha=lora_alpha, target_modules=["fc"]))
    model.head.requires_grad_(True)
    randomise(model)
    return model


def layers(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


@torch.no_grad()
def randomise(model: nn.Module, scale: float = 0.3) -> None:
    """What training would do to lora_B."""
    for layer in layers(model):
        for _, _, lora_b in layer.adapter_parameters():
            lora_b.normal_(0, scale)


def data(samples: int, seed: int = 1, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = seeding.generator(seed)
    x = torch.randn(samples, TOKENS, WIDTH, generator=generator, dtype=dtype)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Consecutive batches, the last one ragged."""
    return list(zip(x.split(size), y.split(size), strict=True))


def plain(model: Tiny) -> Tiny:
    """The same function without adapters, whose weights W + B diag(s) A require gradients."""
    other = Tiny(calls=model.calls).to(next(model.parameters()).dtype)
    weights = {"qkv": model.qkv.consolidated_weight(), "fc": model.fc.consolidated_weight()}
    with torch.no_grad():
        for name, weight in weights.items():
            other.get_submodule(name).weight.copy_(weight)
            other.get_submodule(name).bias.copy_(getattr(model, name).bias)
        other.head.load_state_dict(model.head.state_dict())
    return other


def weight_gradients(model: Tiny, loss: Callable[[Tiny], Tensor]) -> dict[str, Tensor]:
    """d loss / d (B diag(s) A) by Fisher key: the rows of the gradient of the plain weights."""
    other = plain(model)
    qkv, fc = torch.autograd.grad(loss(other), [other.qkv.weight, other.fc.weight])
    return {"qkv.k": qkv[WIDTH : 2 * WIDTH], "qkv.v": qkv[2 * WIDTH :], "fc": fc}


def squares(
    model: Tiny, losses: Iterable[Callable[[Tiny], Tensor]], weights: Iterable[float]
) -> dict[str, Tensor]:
    """sum_i weight_i * gradient_i^2."""
    total: dict[str, Tensor] = {}
    for loss, weight in zip(losses, weights, strict=True):
        for key, gradient in weight_gradients(model, loss).items():
            total[key] = total.get(key, torch.zeros_like(gradient)) + weight * gradient.square()
    return total


def snapshot(model: nn.Module, *others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of everything that must not change: parameters, buffers, Fishers."""
    held = {f"model.{name}": tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for i, tensors in enumerate(others):
        held |= {f"{i}.{name}": tensor for name, tensor in tensors.items()}
    return {name: copy.deepcopy(tensor.detach()) for name, tensor in held.items()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Bitwise equality of two snapshots, NaN equal to itself."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (tensor, after[name])]
        assert tensor.shape == after[name].shape and torch.equal(*bits), name


def controller(model, **options) -> EWC:
    return EWC(model, ewc_lambda=20.0, fisher_dtype=torch.float64, **options)


def train(model, ewc, seed: int, steps: int = 3):
    """A few steps with a fresh optimizer, as after a task boundary."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for step in range(steps):
        x, y = data(8, seed=100 * seed + step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + ewc.penalty()).backward()
        optimizer.step()


def two_tasks(**options):
    model = adapted()
    ewc = controller(model, **options)
    for task in range(2):
        train(model, ewc, task)
        ewc.end_task(batches(*data(9, seed=task), 4), F.cross_entropy)
    return model, ewc


def whole(model, ewc):
    return snapshot(model, ewc.state_dict()["tensors"])


def fresh(**options) -> Tiny:
    """An adapted model at the start of a task."""
    model = adapted(**options)
    randomise(model, 0.0)
    return model
