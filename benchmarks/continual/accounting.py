"""What a method keeps beside the plain model: numbers of adapters, and bytes of everything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import Method

# Beginnings of names of adapter parameters that a checkpoint of the learned model would need. The others
# (norms of frozen directions, magnitudes at the end of the last task) follow from these or serve a penalty.
COUNTED = ("lora_A", "lora_B", "lora_scale", "lora_magnitudes", "lora_past_A", "lora_past_B")


def adapter_parameters(method: Method) -> int:
    """How many numbers the adapters hold: A, B, gates, magnitudes and frozen directions, trained or not."""
    return sum(p.numel() for name, p in _held(method) if name.startswith(COUNTED))


def trained_parameters(method: Method) -> int:
    """How many numbers of the adapters an optimizer changes; heads do not count."""
    return sum(p.numel() for _, p in _held(method) if p.requires_grad)


def state_bytes(method: Method) -> int:
    """Bytes of what the method keeps from step to step beside the plain model: adapters, Fishers and what
    their controller remembers, subspaces. Each storage counts once and whole; gradients, heads and the state
    of optimizers do not count."""
    sizes = {}
    for tensor in _kept(method):
        storage = tensor.untyped_storage()
        sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _held(method: Method) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all adapters; a parameter that layers share comes once. Methods replace both
    layers' parameters and their ranks, so they are looked up in the model."""
    seen: set[int] = set()
    for layer in fe.adapters(method.model).values():
        for name, parameter in layer.named_lora_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter


def _kept(method: Method) -> Iterable[Tensor]:
    for _, parameter in _held(method):
        yield parameter
    if (ewc := getattr(method, "ewc", None)) is not None:
        yield from ewc.state_dict()["tensors"].values()
    for subspace in getattr(method, "subspaces", {}).values():
        yield subspace.basis
