"""Gathers the Fisher of one task: capture on every adapted layer, and the checks that nothing was missed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed.processes import together
from ..errors import ArgumentError, FisherError, TargetError
from ..layers.adapted import AdaptedLinear
from ..ops.capture import FisherCapture

if TYPE_CHECKING:
    from .sharding import Sharding  # loads torch.distributed.fsdp, which takes a second


@dataclass
class TaskFisher:
    """What has been gathered for the current task: unnormalised buffers per Fisher key, and how they came
    about."""

    buffers: dict[str, Tensor]
    samples: int
    batch_size: int
    labels: tuple[str, ...]

    def plus(self, other: TaskFisher) -> TaskFisher:
        """The sum with an earlier gathering, in this one's buffers."""
        torch._foreach_add_(list(self.buffers.values()), [other.buffers[key] for key in self.buffers])
        labels = tuple(dict.fromkeys((*other.labels, *self.labels)))
        return TaskFisher(
            self.buffers, self.samples + other.samples, max(self.batch_size, other.batch_size), labels
        )


def eager() -> AbstractContextManager[Any]:
    """Compiled models run eagerly inside: a graph that was traced without capture would not feed it."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing can have been compiled, and importing dynamo takes a second
    return torch.compiler.set_stance("force_eager")


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or Inf; one host synchronisation for all of them."""
    if not tensors:
        return []
    device = next(iter(tensors.values())).device
    flags = torch.stack([torch.isfinite(tensor).all().to(device) for tensor in tensors.values()])
    return [name for name, good in zip(tensors, flags.tolist(), strict=True) if not good]


class FisherPass:
    """Inside the block every backward pass through the adapted layers adds to fresh buffers.

    `batch_size` may be set before a batch: the number of samples in it. None takes the leading dimension of
    each layer's input.
    """

    def __init__(
        self,
        layers: Mapping[str, AdaptedLinear],
        keys: Mapping[str, list[str]],
        mode: str,
        reduction: str = "mean",
        batch_size: int | None = None,
        loss_scale: float = 1.0,
        sharding: Sharding | None = None,
    ) -> None:
        if not (isinstance(loss_scale, (int, float)) and math.isfinite(loss_scale) and loss_scale > 0):
            raise ArgumentError(f"loss_scale: expected a finite number > 0, got {loss_scale!r}")
        self._layers, self._keys = layers, keys
        self._mode, self._reduction, self._loss_scale = mode, reduction, float(loss_scale)
        self._batch_size: int | None = None
        self._sharding = sharding
        self._largest = 0
        self._captures: dict[str, FisherCapture] = {}
        self._stance: AbstractContextManager[Any] = nullcontext()
        self._calls: dict[str, int] = {}
        self.samples: int | None = (
            None  # set by estimate_fisher, whose "exact" policy passes each sample several times
        )
        self.batch_size = batch_size

    @property
    def batch_size(self) -> int | None:
        """Samples of the batches to come."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ArgumentError(f"batch_size: expected an integer >= 1 or None, got {value!r}")
        self._batch_size = value
        self._largest = max(self._largest, value or 0)
        for capture in self._captures.values():
            capture.batch_size = value

    def __enter__(self) -> FisherPass:
        for name, layer in self._layers.items():
            if layer.fisher_capture is not None:
                raise FisherError(f"{name}: another Fisher pass is active on this layer; end it first")
            if layer.merged:
                raise FisherError(
                    f"{name}: its adapter is merged into the base weight; call unmerge(model) first"
                )
            if not layer.adapters_enabled:
                raise FisherError(f"{name}: its adapter is disabled; leave the `disabled` block first")
        self._captures = {name: self._capture(layer) for name, layer in self._layers.items()}
        self._stance = eager()
        self._stance.__enter__()
        self._calls = {name: layer.forward_calls for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            layer.fisher_capture = self._captures[name]
        return self

    def _capture(self, layer: AdaptedLinear) -> FisherCapture:
        pieces = layer.adapter_slices
        rows = [piece.rows for piece in pieces]
        options = (self._mode, self._reduction, self._loss_scale, self._batch_size)
        if self._sharding is not None:
            return self._sharding.capture(layer, rows, *options)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        buffers = [
            torch.zeros(piece.row_count, layer.in_features, dtype=dtype, device=layer.weight.device)
            for piece in pieces
        ]
        return FisherCapture(buffers, rows, *options)

    def finish_batch(self) -> None:
        """All backward passes of the batch are done: square what is held for layers whose later calls took no
        part in the loss."""
        for capture in self._captures.values():
            capture.finish()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers.values():
            layer.fisher_capture = None
        self._stance.__exit__(kind, error, trace)

    def result(self, labels: str, check_finite: bool) -> TaskFisher:
        """What was gathered, after the block, by all processes when sharded; raises when a layer was missed,
        counts disagree or a value is not finite."""
        self.finish_batch()
        if self._sharding is None:
            return self._result(labels, check_finite)
        sharding = self._sharding
        task = together(lambda: self._result(labels, check_finite))
        batch_size = sharding.largest(task.batch_size)
        return TaskFisher(task.buffers, sharding.summed(task.samples), batch_size, task.labels)

    def _result(self, labels: str, check_finite: bool) -> TaskFisher:
        self._check_reached()
        samples = self._counted_samples() if self.samples is None else self.samples
        buffers: dict[str, Tensor] = {}
        for name, capture in self._captures.items():
            buffers.update(zip(self._keys[name], capture.fishers, strict=True))
        if check_finite and (bad := nonfinite(buffers)):
            raise FisherError(
                f"Fisher of {_some(bad)}: expected finite values, got NaN or Inf; look for NaN or Inf in "
                "the data, the loss or the "
                "weights, or an overflow of the loss scale. What this pass gathered was discarded, nothing "
                "else was changed"
            )
        batches = max(capture.batches for capture in self._captures.values())
        return TaskFisher(buffers, samples, self._largest or math.ceil(samples / batches), (labels,))

    def _check_reached(self) -> None:
        missed = [name for name, capture in self._captures.items() if capture.batches == 0]
        if len(missed) == len(self._captures) and not self._ran_forward():
            raise FisherError(
                "no forward and backward pass ran: the loader is empty, or the block ran no loss.backward()"
            )
        bypassed = [name for name in missed if self._layers[name].forward_calls == self._calls[name]]
        if bypassed:
            raise TargetError(
                f"{_some(bypassed)}: the layer's forward never ran, so its adapter has no effect and no "
                "Fisher. The model reads its weight "
                "directly (timm BEiT, EVA02 and SwinV2 do so for attn.qkv; build them with "
                "qkv_bias_separate=True) or skips it; "
                "otherwise leave it out with exclude_modules"
            )
        if missed:
            raise FisherError(
                f"{_some(missed)}: the layer ran but no gradient reached it; its output takes no part in "
                "the loss, or the pass ran under "
                "torch.no_grad. Leave it out with exclude_modules, or use a loss that depends on it"
            )

    def _ran_forward(self) -> bool:
        return any(layer.forward_calls != self._calls[name] for name, layer in self._layers.items())

    def _counted_samples(self) -> int:
        counts = {name: capture.samples for name, capture in self._captures.items()}
        low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        if self._batch_size is None and counts[low] != counts[high]:
            raise FisherError(
                f"batch_size: layers disagree about the number of samples ({low}: {counts[low]}, {high}: "
                f"{counts[high]}); windows or "
                "tokens were folded into the leading dimension, so give batch_size, or set it on the "
                "block's value before each batch"
            )
        return counts[high]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
