# SPDX-License-Identifier: Apache-2.0
"""What a method stores in addition to the base model: sizes of adapters, and bytes in total."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import Method

# Prefixes of the names of adapter parameters that a checkpoint of the learned model needs. The others (norms
# of frozen directions, magnitudes at the end of the last task) can be computed from these or serve a penalty.
COUNTED = ("lora_A", "lora_B", "lora_scale", "lora_magnitudes", "lora_past_A", "lora_past_B")


def adapter_parameters(method: Method) -> int:
    """The number of values in adapters: A, B, gates, magnitudes and frozen directions, trained or not."""
    return sum(p.numel() for name, p in _held(method) if name.startswith(COUNTED))


def trained_parameters(method: Method) -> int:
    """The number of trained values in adapters; heads do not count."""
    return sum(p.numel() for _, p in _held(method) if p.requires_grad)


def state_bytes(method: Method, others: Iterable[Tensor] = ()) -> int:
    """Bytes that the method stores from step to step in addition to the base model: adapters, Fishers and the
    other state of their controller, subspaces; and `others`. Each storage counts once, in full; gradients,
    trained heads and the state of optimizers do not count."""
    sizes = {}
    for tensor in (*_kept(method), *others):
        storage = tensor.untyped_storage()
        sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _held(method: Method) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all adapters; a parameter that layers share is yielded once. Methods replace the
    parameters of layers and change ranks, so they are read from the model each time."""
    seen: set[int] = set()
    for layer in fe.adapters(method.model).values():
        for name, parameter in layer.named_lora_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter


def _kept(method: Method) -> Iterable[Tensor]:
    for _, parameter in _held(method):
        yield parameter
    yield from method.kept_tensors()
