# SPDX-License-Identifier: Apache-2.0
"""`nn.DataParallel` on the CPU: its own forward, and `replicate` with copies in place of devices."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

replication = importlib.import_module("torch.nn.parallel.replicate")  # the function has the same name


class Broadcast(torch.autograd.Function):
    """The tensors themselves for the first replica and copies for others; frozen ones have no gradient."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.count, ctx.given = count, len(tensors)
        copies = [tensor if i == 0 else tensor.clone() for i in range(count) for tensor in tensors]
        needs = ctx.needs_input_grad[1:] * count
        ctx.mark_non_differentiable(*(copy for copy, need in zip(copies, needs, strict=True) if not need))
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_tensor = zip(*(grads[i * ctx.given :][: ctx.given] for i in range(ctx.count)), strict=True)
        given = [[grad for grad in own if grad is not None] for own in by_tensor]
        return (None, *(torch.stack(own).sum(0) if own else None for own in given))


def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
    """A list of tensors for every device."""
    if not tensors:
        return []
    if detach:
        return [[tensor.detach().clone() for tensor in tensors] for _ in devices]
    copies = Broadcast.apply(len(devices), *tensors)
    return [list(copies[i : i + len(tensors)]) for i in range(0, len(copies), len(tensors))]


class Replicated(nn.DataParallel):
    """`nn.DataParallel` over `count` replicas on the CPU, each in a thread of its own."""

    def __init__(self, module: nn.Module, count: int = 2) -> None:
        super().__init__(module)
        self.dim, self.output_device = 0, -1
        self.device_ids, self.src_device_obj = list(range(count)), torch.device("cpu")

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        parts = [torch.chunk(x, len(device_ids)) for x in inputs]
        chunks = list(zip(*parts, strict=True))
        return chunks, [kwargs] * len(chunks)

    def replicate(self, module: nn.Module, device_ids: Any) -> Any:
        with on_cpu():
            return replication.replicate(module, device_ids, not torch.is_grad_enabled())

    def parallel_apply(self, replicas: Any, inputs: Any, kwargs: Any) -> list[Any]:
        outputs: list[Any] = [None] * len(replicas)
        enabled = torch.is_grad_enabled()

        def run(i: int) -> None:
            try:
                with torch.set_grad_enabled(enabled):
                    outputs[i] = replicas[i](*inputs[i], **kwargs[i])
            except Exception as error:
                outputs[i] = error

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(replicas))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for output in outputs:
            if isinstance(output, Exception):
                raise output
        return outputs

    def gather(self, outputs: Any, output_device: Any) -> Any:
        return torch.cat(outputs)


@contextmanager
def on_cpu() -> Iterator[None]:
    """PyTorch's `replicate` takes any numbers for devices, all of which are the CPU."""
    patched = {"_broadcast_coalesced_reshape": broadcast, "_get_device_index": lambda device, _: device}
    with mock.patch.multiple(replication, **patched):
        yield
