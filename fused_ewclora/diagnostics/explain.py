# SPDX-License-Identifier: Apache-2.0
"""Reports the implementation that every adapted layer runs on, and finds layers that never run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.wrappers import unwrapped
from ..errors import TargetError
from ..layers.adapted import AdaptedLinear
from ..layers.grouping import grouped_rows
from ..layers.inject import adapters
from ..layers.matching import MAX_NAMES, shorten
from ..layers.parts import LoRAPart, Part
from ..ops import dispatch
from ..report import Report, size_text
from .explain_table import Reason, printed
from .second_reads import second_reads, tensors_in

TITLE = "lora_linear by layer"
FP32_BYTES = torch.float32.itemsize


def check_bypass(model: nn.Module) -> None:
    """Raises an error for adapted layers whose forward never ran, and says how to fix that; to be called
    after the model has run uncompiled.

    Some models read `layer.weight` and never call the layer (timm's BEiT and EVA02), so that its adapter has
    no effect. The check reads one counter per layer and runs nothing. Compiled calls are not counted; use
    `verify_forward` for a compiled model.

    Args:
        model: with adapters.

    Raises:
        TargetError: naming the layers.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> _ = model(x)
        >>> fe.check_bypass(model)
    """
    if names := bypassed(model):
        uncounted = "; compiled calls are not counted, verify_forward runs a model uncompiled"
        hint = uncounted if "torch._dynamo" in sys.modules else ""
        raise TargetError(_bypass_message(model, names) + hint)


def bypassed(model: nn.Module) -> list[str]:
    """The names of the adapted layers that have not run since injection."""
    return [name for name, layer in adapters(model).items() if layer.forward_calls == 0]


def verify_forward(model: nn.Module, sample: Any) -> dict[str, int]:
    """Runs the model in eval mode, without gradients and uncompiled, to see that every adapted layer runs,
    and that the model reads no weight a second time, beside the calls of its layer (a tied decoder): merging
    and consolidation would change what it computes.

    The second run finds second reads: each weight is changed but for the calls of its layer, and restored bit
    for bit. Random numbers of the caller are not used.

    Args:
        model: with adapters.
        sample: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Returns:
        The number of calls of each adapted layer in one run.

    Raises:
        TargetError: for layers that did not run, and for weights that are read a second time.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> fe.verify_forward(model, x)
        {'fc': 1}
    """
    layers, before = adapters(model), _counts(model)
    first = _run(model, sample)
    calls, counts = _calls_since(model, before), _counts(model)
    if names := [name for name, count in calls.items() if count == 0]:
        raise TargetError(_bypass_message(model, names))
    try:
        names = second_reads(model, layers, functools.partial(_run, model, sample), first)
    finally:
        for name, layer in layers.items():
            layer.forward_calls = counts[name]
    if names:
        raise TargetError(
            f"the model reads the weight of {shorten(names)} a second time, beside the calls of the layer: "
            "the adapter does not act there, and merging or consolidating it would change the outputs. Leave "
            f"it out with exclude_modules={names[:MAX_NAMES]!r}, or give the other use a weight of its own. "
            "Nothing was changed"
        )
    return calls


def explain(model: nn.Module, sample: Any = None) -> Report:
    """A table of the implementation that serves each adapted layer and the reasons why others do not; its
    rows are data. The experts of a mixture that are served alike share a row, in which their calls are added.
    Printed, all layers that are alike share a row, with the bytes of a dense Fisher in fp32 of each, and a
    reason stands once, as a note with a number.

    The column r has the ranks of the adapters that the layer applies; with some methods they change from task
    to task. Under autocast its dtype is used.

    Args:
        model: with adapters.
        sample: as in `verify_forward`: the model runs once, the table has the number of calls of each layer,
            the implementation is the one for that number of input rows, and layers that never ran are listed
            below the table. Without one 8192 rows are assumed.

    Returns:
        The table.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> len(fe.explain(model, x).rows)
        1
    """
    calls: dict[str, int] | None = None
    sizes: dict[str, int] = {}
    if sample is not None:
        before = _counts(model)
        with _measured(model) as sizes:
            _run(model, sample)
        calls = _calls_since(model, before)
    rows: list[tuple[Part | None, dict[str, Any]]] = []
    shown: list[dict[str, Any]] = []
    reasons: list[list[Reason]] = []
    for name, layer in adapters(model).items():
        ranks = _ranks(layer)
        served, why = _implementation(layer, sum(ranks), sizes.get(name))
        row = {"name": name, "r": "+".join(map(str, ranks)) or "0", **served}
        called = {} if calls is None else {"calls": calls[name]}
        shown.append({**row, "F": size_text(_dense_bytes(layer)), **called})
        reasons.append(why)
        row |= {"why_not_faster": "; ".join(map(str, why)) or None, **called}
        rows.append((layer.part if isinstance(layer, LoRAPart) else None, row))
    silent = [name for name, count in (calls or {}).items() if count == 0]
    notes = [_bypass_message(model, silent)] if silent else []
    if not rows:
        return Report(TITLE, (), ["no adapted layers"], {"layers": 0, "bypassed": silent})
    total = sum(map(_dense_bytes, adapters(model).values()))
    notes.append(f"F: {size_text(total)} for all, dense in fp32; fe.memory(model) compares structures")
    title, table, remarks = printed(shown, reasons, TITLE)
    data = grouped_rows(rows, () if calls is None else ("calls",))
    return Report(title, data, [*notes, *remarks], {"layers": len(rows), "bypassed": silent}, table)


def _dense_bytes(layer: AdaptedLinear) -> int:
    """What a dense Fisher of the adapters takes in fp32, the default of `EWC`."""
    return sum(piece.row_count for piece in layer.adapter_slices) * layer.in_features * FP32_BYTES


@torch.no_grad()
def _ranks(layer: AdaptedLinear) -> list[int]:
    """The ranks of the adapters that the layer applies; empty when a method has removed all of them."""
    if layer.composer is None:
        return [piece.r for piece in layer.adapter_slices]
    return [adapter.lora_a.shape[0] for adapter in layer.composed()]


def _implementation(layer: AdaptedLinear, rank: int, rows: int | None) -> tuple[dict[str, Any], list[Reason]]:
    """What serves the next call of the layer, and why nothing faster does."""
    device = layer.weight.device.type
    autocast = torch.is_autocast_enabled(device) and layer.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else layer.dtype
    row: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    if layer.merged or not layer.adapters_enabled:
        state = "merged" if layer.merged else "disabled"
        return {**row, "backend": "torch", "algorithm": f"linear ({state})"}, []
    if why := layer.not_fused():
        return {**row, "backend": "torch", "algorithm": "several calls"}, [Reason("", "", why)]
    if layer.weight_state() is not None:
        kind = "add_low_rank on the product of the library of its weight"
        return {**row, "backend": "torch", "algorithm": kind}, []
    if rank == 0:
        return {**row, "backend": "torch", "algorithm": "linear (no ranks left)"}, []
    answers = dispatch.explain("lora_linear", _call(layer, dtype, rank, rows))
    # Later entries are less preferred, except for other algorithms of the same backend.
    first = next((i for i, (_, _, reason) in enumerate(answers) if reason is None), len(answers))
    backend, algorithm = answers[first][:2] if first < len(answers) else (None, None)
    reasons = [
        Reason(other, name, reason)
        for i, (other, name, reason) in enumerate(answers)
        if reason is not None and (i < first or other == backend)
    ]
    return {**row, "backend": backend, "algorithm": algorithm}, reasons


def _call(layer: AdaptedLinear, dtype: torch.dtype, rank: int, rows: int | None) -> dispatch.Call:
    """The next call of the layer, as far as the choice of an implementation depends on it."""
    dropout = layer.training and layer.dropout_p > 0.0
    shape = dispatch.LinearShape(
        dispatch.bucket(dispatch.DEFAULT_ROWS if rows is None else rows),
        layer.in_features,
        layer.out_features,
        rank,
        dropout,
    )
    device = layer.weight.device
    precision = torch.get_float32_matmul_precision() if dtype == torch.float32 else None
    return dispatch.Call(device.type, dtype, dispatch.arch_of(device), shape, precision=precision)


def _counts(model: nn.Module) -> dict[str, int]:
    """The number of calls of each adapted layer until now. The layers count by themselves: hooks would switch
    off a path of PyTorch that never calls them."""
    return {name: layer.forward_calls for name, layer in adapters(model).items()}


def _calls_since(model: nn.Module, before: Mapping[str, int]) -> dict[str, int]:
    return {name: count - before[name] for name, count in _counts(model).items()}


@contextmanager
def _measured(model: nn.Module) -> Iterator[dict[str, int]]:
    """Yields the most input rows of a call of each adapted layer in the block, without hooks either."""
    sizes: dict[str, int] = {}
    layers = adapters(model)
    own = {name: vars(layer).get("forward") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            vars(layer)["forward"] = functools.partial(_note_rows, sizes, name, layer, layer.forward)
        yield sizes
    finally:
        for name, layer in layers.items():
            if (forward := own[name]) is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = forward


def _note_rows(
    sizes: dict[str, int],
    name: str,
    layer: AdaptedLinear,
    forward: Callable[..., Tensor],
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    x = args[0] if args else kwargs["x"]
    sizes[name] = max(sizes.get(name, 0), layer.row_count(x))
    return forward(*args, **kwargs)


def _run(model: nn.Module, sample: Any) -> list[Tensor]:
    """The tensors of one run in eval mode, inside of DDP and `nn.DataParallel`; random numbers are the same
    every time, and not taken from those of the caller."""
    model = unwrapped(model)
    modes = [(module, module.training) for module in model.modules()]
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval()
        with torch.no_grad(), _eager(), torch.random.fork_rng(gpus):
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in gpus)):
                generator.manual_seed(0)
            if isinstance(sample, Mapping):
                output = model(**sample)
            elif isinstance(sample, (tuple, list)):
                output = model(*sample)
            else:
                output = model(sample)
            return [tensor.detach().clone() for tensor in tensors_in(output)]
    finally:
        for module, training in modes:
            module.training = training


def _eager() -> AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing has been compiled, and importing dynamo takes a second
    return torch.compiler.set_stance("force_eager")


def _bypass_message(model: nn.Module, names: list[str]) -> str:
    message = f"adapted layers that never ran although the model did: {shorten(names)}"
    parent = names[0].rpartition(".")[0]
    if getattr(model.get_submodule(parent), "qkv_bias_separate", None) is False:
        # timm's attention of BEiT and its relatives calls F.linear on the weight unless this is set.
        return f"{message}. Set qkv_bias_separate = True on their parents (as model.{parent})"
    return f"{message}. Their parents must call them, not F.linear on their weight; or use exclude_modules"
