# SPDX-License-Identifier: Apache-2.0
"""One pass for the Fisher of a task: a capture on every adapted layer, and the check that each was
reached."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, FisherError, TargetError
from ..layers.adapted import AdaptedLinear
from ..layers.finite import nonfinite
from ..ops.capture import FisherCapture, RowsToSamples
from .placement import Placement
from .restoring import Undo
from .row_orders import SampleCheck
from .state import TaskFisher, flat
from .structures import Gathered, Parts


def eager() -> AbstractContextManager[Any]:
    """Compiled models run eagerly inside: a graph that was traced without a capture does not call it."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing can have been compiled, and importing dynamo takes a second
    return torch.compiler.set_stance("force_eager")


class FisherPass:
    """Between `start` and the end of its `Undo` every backward pass through the adapted layers adds to fresh
    buffers. `layers` are those that it is for (None: all).

    `batch_size` may be set before a batch: the number of samples in it. None takes the leading dimension of
    the model's first argument, or without a check of the samples of each layer's input.
    """

    def __init__(
        self,
        placement: Placement,
        structure: Gathered,
        mode: str,
        reduction: str = "mean",
        batch_size: int | None = None,
        loss_scale: float = 1.0,
        check_samples: bool = True,
        rows_to_samples: Mapping[str, RowsToSamples] | None = None,
        layers: dict[str, AdaptedLinear] | None = None,
    ) -> None:
        if not (isinstance(loss_scale, (int, float)) and math.isfinite(loss_scale) and loss_scale > 0):
            raise ArgumentError(f"loss_scale: expected a finite number > 0, got {loss_scale!r}")
        self.placement, self.structure = placement, structure
        self._layers = placement.layers if layers is None else layers
        self._parts: dict[str, list[Parts]] = {}  # sums by layer and adapter
        self.mode, self._reduction, self._loss_scale = mode, reduction, float(loss_scale)
        self._batch_size: int | None = None
        self._largest = 0
        # What rows of an input are known by: a layer, or a module that hands its rows on to several.
        self._sources = {name: layer.rows_of(name) for name, layer in placement.layers.items()}
        self._rows_to_samples = checked_functions(rows_to_samples, self._sources)
        if not isinstance(check_samples, bool):
            raise ArgumentError(f"check_samples: expected True or False, got {check_samples!r}")
        self._check_samples = check_samples and mode == "sample"  # a sum over a batch needs no order
        self._captures: dict[str, FisherCapture] = {}
        self._check: SampleCheck | None = None
        self._stances: list[AbstractContextManager[Any]] = []
        self._calls: dict[str, int] = {}
        # Set by estimate_fisher, whose "exact" policy passes each sample several times.
        self.samples: int | None = None
        self.allow_empty = False
        self.checks: list[Callable[[], None]] = []
        self._undo = Undo()
        self.batch_size = batch_size

    @property
    def batch_size(self) -> int | None:
        """The number of samples in each of the next batches."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ArgumentError(f"batch_size: expected an integer >= 1 or None, got {value!r}")
        self._batch_size = value
        self._largest = max(self._largest, value or 0)
        for capture in self._captures.values():
            capture.batch_size = value

    def start(self, undo: Undo) -> None:
        """Puts a capture on every layer, until `undo` runs."""
        for name, layer in self.placement.layers.items():
            if layer.fisher_capture is not None:
                raise FisherError(
                    f"{name}: another Fisher pass is active on this layer; end it first, or call "
                    "ewc.abort_fisher() if its block is gone"
                )
            if layer.merged:
                raise FisherError(
                    f"{name}: its adapter is merged into the base weight; call unmerge(model) first"
                )
            if not layer.adapters_enabled:
                raise FisherError(
                    f"{name}: its adapter is disabled; leave the `disabled` block "
                    "(of PEFT: `disable_adapter`) first"
                )
        options = (self.mode, self._reduction, self._loss_scale, self._batch_size)
        leaders: dict[str, FisherCapture] = {}
        for name, layer in self._layers.items():
            source = self._sources[name]
            more = (source, self._rows_to_samples.get(source))
            capture, self._parts[name] = self.placement.capture(self.structure, layer, *options, *more)
            capture.leader = leaders.get(source)
            leaders.setdefault(source, capture)
            self._captures[name] = capture
        if self._check_samples:
            self._check = SampleCheck(self.placement, leaders)
        self._calls = {name: layer.forward_calls for name, layer in self._layers.items()}
        self._undo = undo
        undo.add(self._stop)
        self._stances.append(eager())  # set when it is made
        for name, layer in self._layers.items():
            layer.fisher_capture = self._captures[name]

    def _stop(self) -> None:
        for stance in self._stances:
            stance.__exit__(None, None, None)
        for layer in self._layers.values():
            layer.fisher_capture = None

    def watched(self) -> AbstractContextManager[None]:
        """Inside, every forward of the model itself is checked as `forward` checks a batch."""
        return nullcontext() if self._check is None else self._check.by_hand(lambda: self._batch_size)

    def forward(self, run: Callable[[Any], tuple[Any, Any]], batch: Any, samples: int) -> tuple[Any, Any]:
        """run(batch), (output, targets) of a batch of `samples` samples, after which it is known which rows
        of each layer's input belong to which of them; raises `FisherError` where it cannot be known."""
        self.batch_size = samples
        return run(batch) if self._check is None else self._check.run(run, batch, samples)

    def finish_batch(self) -> None:
        """To be called after all backward passes of a batch: accumulates what layers hold back while they
        wait for calls whose output took no part in the loss."""
        for capture in self._captures.values():
            capture.finish()

    def result(self, labels: str, check_finite: bool) -> TaskFisher:
        """The Fisher of the pass, after the block, of the data of all processes where they share the model;
        raises when a layer was missed, counts disagree or a value is not finite."""
        self.finish_batch()
        task = self.placement.agree(lambda: self._result(labels, check_finite))
        samples, batch_size = self.placement.totals(task.samples, task.batch_size)
        return TaskFisher(task.buffers, samples, batch_size, task.labels)

    def _result(self, labels: str, check_finite: bool) -> TaskFisher:
        if self._undo.aborted:
            raise FisherError("this Fisher pass was ended by abort_fisher; what it gathered was discarded")
        for check in self.checks:
            check()
        if self.allow_empty and not self._ran_forward():
            return TaskFisher(self._buffers(), 0, 0, (labels,))
        self._check_reached()
        samples = self._counted_samples() if self.samples is None else self.samples
        buffers = self._buffers()
        if check_finite and (bad := nonfinite(buffers)):
            raise FisherError(
                f"{self.structure.quantity} of {_some(bad)}: expected finite values, got NaN or Inf; "
                "look for NaN or Inf in the data, the loss or the "
                "weights, or an overflow of the loss scale. What this pass gathered was discarded, nothing "
                "else was changed"
            )
        batches = max(capture.batches for capture in self._captures.values())
        return TaskFisher(buffers, samples, self._largest or math.ceil(samples / batches), (labels,))

    def _buffers(self) -> dict[str, Tensor]:
        """By Fisher key and part."""
        parts = {self._layers[name]: own for name, own in self._parts.items()}
        refs = [ref for ref in self.placement.refs if ref.layer in parts]
        return flat({ref.key: parts[ref.layer][ref.index] for ref in refs})

    def _check_reached(self) -> None:
        missed = [name for name, capture in self._captures.items() if capture.batches == 0]
        if len(missed) == len(self._captures) and not self._ran_forward():
            if self.samples:
                self.check_ran()
            raise FisherError(
                "no forward and backward pass ran through an adapted layer: the loader is empty, the block "
                f"ran no loss.backward(), or the model never calls {_some(missed)} (fe.verify_forward tells)"
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

    def check_ran(self) -> None:
        """To be called when there were batches: raises `TargetError` unless an adapted layer ran."""
        if not self._ran_forward():
            raise TargetError(
                f"{_some(list(self._layers))}: the model ran on the batches of the loader, but none of its "
                "adapted layers did, so the adapters have no effect and no Fisher. The model reads their "
                "weights without calling them, or skips them: fe.register_call can make it call them; "
                "otherwise leave them out with exclude_modules"
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


def checked_functions(
    functions: Mapping[str, RowsToSamples] | None, sources: Mapping[str, str]
) -> Mapping[str, RowsToSamples]:
    """The functions by the names of layers, or of the modules that hand rows on to layers (`sources` by
    layer); raises `ArgumentError` for anything else."""
    if functions is None:
        return {}
    if not isinstance(functions, Mapping):
        raise ArgumentError(
            f"rows_to_samples: expected a mapping of layer names to functions, got {type(functions).__name__}"
        )
    known = set(sources.values())
    for name, function in functions.items():
        if name not in known:
            if name in sources:
                raise ArgumentError(
                    f"rows_to_samples[{name!r}]: the rows of this layer are some of those of "
                    f"{sources[name]!r}; give a function for that"
                )
            raise ArgumentError(
                f"rows_to_samples: no adapted layer is called {name!r}; there are "
                f"{_some(list(dict.fromkeys(sources.values())))}"
            )
        if not callable(function):
            raise ArgumentError(
                f"rows_to_samples[{name!r}]: expected a function, got {type(function).__name__}"
            )
    return dict(functions)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
