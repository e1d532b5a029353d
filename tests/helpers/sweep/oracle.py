# SPDX-License-Identifier: Apache-2.0
"""What is right: a dense copy of the model with W + B diag(s) A in plain PyTorch, one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ewclora as fe

from .architecture import Architecture, Inputs, rows

Gradients = dict[str, Tensor]
Loss = Callable[[nn.Module, Inputs, Tensor], Tensor]


class Weight(NamedTuple):
    """Where the plain model stores the weight of a layer: all of a parameter, or one of those in it."""

    parameter: str
    index: int | None
    layer: fe.AdaptedLinear  # knows how it is stored

    def stored(self, whole: Tensor) -> Tensor:
        return whole if self.index is None else whole[self.index]

    def matrix(self, whole: Tensor) -> Tensor:
        """`[d_out, d_in]` of the parameter, or of its gradient."""
        return self.layer.matrix_of(self.stored(whole))


def weights_of(adapted: nn.Module) -> dict[str, Weight]:
    """By the names of the adapted layers."""
    return {
        name: Weight(layer.weight_name(name), layer.part.index if layer.is_part else None, layer)
        for name, layer in fe.adapters(adapted).items()
    }


@torch.no_grad()
def dense_twin(plain: nn.Module, adapted: nn.Module) -> nn.Module:
    """A copy of `plain` whose adapted weights hold B diag(s) A as well."""
    twin, weights = copy.deepcopy(plain), weights_of(adapted)
    for name, layer in fe.adapters(adapted).items():
        ((piece, lora_a, lora_b),) = layer.adapter_parameters()
        stored = weights[name].stored(twin.get_parameter(weights[name].parameter))
        stored.add_(layer.stored_as(stored, piece.scaling * lora_b @ lora_a))
    return twin


def gradients(
    model: nn.Module, weights: Mapping[str, Weight], loss: Callable[[], Tensor]
) -> dict[str, Tensor | None]:
    """d loss / d weight `[d_out, d_in]` by layer; None where the loss does not depend on it.

    Nothing else requires gradients: in eval mode some models (LeViT) keep tensors that they computed from
    parameters, with their graph.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = list(dict.fromkeys(weight.parameter for weight in weights.values()))
    parameters = [model.get_parameter(name).requires_grad_(True) for name in names]
    found = dict(zip(names, torch.autograd.grad(loss(), parameters, allow_unused=True), strict=True))
    return {
        name: None if found[weight.parameter] is None else weight.matrix(found[weight.parameter])
        for name, weight in weights.items()
    }


def sample_gradients(
    model: nn.Module, weights: Mapping[str, Weight], loss: Loss, inputs: Inputs, targets: Tensor
) -> list[Gradients]:
    """The gradients of every sample, each run by itself."""
    found = []
    for n in range(len(targets)):
        one, target = rows(inputs, n, n + 1), targets[n : n + 1]
        of_one = gradients(model, weights, lambda one=one, target=target: loss(model, one, target))
        found.append(
            {name: _zeros(weights[name].layer) if g is None else g.double() for name, g in of_one.items()}
        )
    return found


def _zeros(layer: fe.AdaptedLinear) -> Tensor:
    return torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)


def mean(samples: list[Gradients]) -> Gradients:
    return {name: torch.stack([one[name] for one in samples]).mean(0) for name in samples[0]}


def fisher(batches: list[list[Gradients]], mode: str) -> Gradients:
    """Mode "sample": the mean of squared gradients; "batch": n_b (mean gradient)^2 of each batch, added and
    divided by the number of samples."""
    total = sum(map(len, batches))
    if mode == "sample":
        return mean([{name: g.square() for name, g in one.items()} for batch in batches for one in batch])
    means = [(len(batch) / total, mean(batch)) for batch in batches]
    return {name: sum(share * of_batch[name].square() for share, of_batch in means) for name in means[0][1]}


def unused_layers(architecture: Architecture, plain: nn.Module, inputs: Inputs, targets: Tensor) -> list[str]:
    """Linear layers on which the loss does not depend but for rounding, such as a pooler beside another head,
    or queries that see a single key."""
    model, adapted = copy.deepcopy(plain), copy.deepcopy(plain)
    try:
        fe.inject(adapted, fe.LoRAConfig(r=1, target_modules=architecture.targets_of_adapters))
    except fe.TargetError:  # there are none
        return []
    found = gradients(model, weights_of(adapted), lambda: architecture.loss(model, inputs, targets))
    sizes = {name: 0.0 if gradient is None else gradient.norm().item() for name, gradient in found.items()}
    return [name for name, size in sizes.items() if size <= 1e-9 * max(sizes.values())]


class _Products(TorchDispatchMode):
    """Records parameters that multiply something that is not a parameter."""

    OPERATIONS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "matmul", "linear", "_grouped_mm")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.dim() >= 2:
                self._names.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
        self.found: dict[str, list[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.OPERATIONS:
            operands = [a for a in args if isinstance(a, Tensor)][-2:]
            names = [self._names.get(operand.untyped_storage().data_ptr()) for operand in operands]
            if sum(name is not None for name in names) == 1:
                self.found.update((found[0], found) for found in names if found is not None)
        return func(*args, **(kwargs or {}))


def matrices(architecture: Architecture, plain: nn.Module, inputs: Inputs) -> dict[str, list[str]]:
    """The parameters that the model uses as matrices, whichever module holds them: name -> all names."""
    with torch.enable_grad(), _Products(plain) as products:
        architecture.call(plain, inputs)
    return products.found


def tokens_of(architecture: Architecture, adapted: nn.Module, inputs: Inputs) -> set[int]:
    """Numbers of input rows that one sample gives to the adapted layers."""
    counts: set[int] = set()
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args: counts.add(args[0].numel() // args[0].shape[-1]) if args else None
        )
        for layer in fe.adapters(adapted).values()
    ]
    with torch.no_grad():
        architecture.call(adapted, inputs)
    for hook in hooks:
        hook.remove()
    return counts
