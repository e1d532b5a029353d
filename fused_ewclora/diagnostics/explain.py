"""Reports the implementation that every adapted layer runs on, and finds layers that never run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import TargetError
from ..layers.adapted import AdaptedLinear
from ..layers.inject import adapters
from ..layers.matching import shorten
from ..ops import dispatch
from ..report import Report


def check_bypass(model: nn.Module) -> None:
    """Raises `TargetError` for adapted layers whose forward never ran, and says how to fix that; to be called
    after the model has run uncompiled.

    Some models read `layer.weight` and never call the layer (timm's BEiT and EVA02), so that its adapter has
    no effect. The check reads one counter per layer and runs nothing. Compiled calls are not counted; use
    `verify_forward` for a compiled model.

        >>> model(x); check_bypass(model)
    """
    if names := bypassed(model):
        uncounted = "; compiled calls are not counted, verify_forward runs a model uncompiled"
        hint = uncounted if "torch._dynamo" in sys.modules else ""
        raise TargetError(_bypass_message(model, names) + hint)


def bypassed(model: nn.Module) -> list[str]:
    """The names of the adapted layers that have not run since injection, or since `verify_forward` began."""
    return [name for name, layer in adapters(model).items() if layer.forward_calls == 0]


def verify_forward(model: nn.Module, sample: Any) -> dict[str, int]:
    """Run the model once in eval mode, without gradients and uncompiled, and raise `TargetError` for adapted
    layers that did not run.

    sample: a tensor, a tuple of arguments or a mapping of keyword arguments. Returns the number of calls of
    each adapted layer.

        >>> verify_forward(model, torch.zeros(1, 3, 224, 224))
    """
    calls, _ = _observed(model, sample)
    if names := [name for name, count in calls.items() if count == 0]:
        raise TargetError(_bypass_message(model, names))
    return calls


def explain(model: nn.Module, sample: Any = None) -> Report:
    """A table of the implementation that serves each adapted layer and the reasons why others do not; its
    rows are data.

    The column r has the ranks of the adapters that the layer applies; with some methods they change from task
    to task. With a `sample` (as in `verify_forward`) the model runs once, the table has the number of calls
    of each layer, the implementation is the one for that number of input rows, and layers that never ran are
    listed below the table. Without a sample 8192 rows are assumed. Under autocast its dtype is used.

        >>> print(explain(model, torch.zeros(1, 3, 224, 224)))
    """
    calls, sizes = (None, {}) if sample is None else _observed(model, sample)
    rows = []
    for name, layer in adapters(model).items():
        ranks = _ranks(layer)
        row = {
            "name": name,
            "r": "+".join(map(str, ranks)) or "0",
            **_implementation(layer, sum(ranks), sizes.get(name)),
        }
        if calls is not None:
            row["calls"] = calls[name]
        rows.append(row)
    silent = [name for name, count in (calls or {}).items() if count == 0]
    notes = [_bypass_message(model, silent)] if silent else []
    if not rows:
        notes.append("no adapted layers")
    return Report("lora_linear by layer", rows, notes, {"layers": len(rows), "bypassed": silent})


@torch.no_grad()
def _ranks(layer: AdaptedLinear) -> list[int]:
    """The ranks of the adapters that the layer applies; empty when a method has removed all of them."""
    if layer.composer is None:
        return [piece.r for piece in layer.adapter_slices]
    return [adapter.lora_a.shape[0] for adapter in layer.composed()]


def _implementation(layer: AdaptedLinear, rank: int, rows: int | None) -> dict[str, Any]:
    weight = layer.weight
    device = weight.device.type
    autocast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    row: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    if layer.merged or not layer.adapters_enabled:
        state = "merged" if layer.merged else "disabled"
        return {**row, "backend": "torch", "algorithm": f"linear ({state})", "why_not_faster": None}
    if why := layer.not_fused():
        return {**row, "backend": "torch", "algorithm": "several calls", "why_not_faster": why}
    if rank == 0:
        return {**row, "backend": "torch", "algorithm": "linear (no ranks left)", "why_not_faster": None}
    answers = dispatch.explain("lora_linear", _call(layer, dtype, rank, rows))
    # Later entries are less preferred, except for other algorithms of the same backend.
    first = next((i for i, (_, _, reason) in enumerate(answers) if reason is None), len(answers))
    backend, algorithm = answers[first][:2] if first < len(answers) else (None, None)
    reasons = [
        f"{other} {name}: {reason}"
        for i, (other, name, reason) in enumerate(answers)
        if reason is not None and (i < first or other == backend)
    ]
    why = "; ".join(reasons) or None
    return {**row, "backend": backend, "algorithm": algorithm, "why_not_faster": why}


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


def _observed(model: nn.Module, sample: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The number of calls of each adapted layer in one run, and the most input rows of a call."""
    layers = adapters(model)
    before = {name: layer.forward_calls for name, layer in layers.items()}
    sizes: dict[str, int] = {}
    hooks = []
    for name, layer in layers.items():
        layer.forward_calls = 0
        note = functools.partial(_note_rows, sizes, name)
        hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    try:
        _run(model, sample)
        return {name: layer.forward_calls for name, layer in layers.items()}, sizes
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            layer.forward_calls += before[name]


def _note_rows(
    sizes: dict[str, int], name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = args[0] if args else kwargs["x"]
    sizes[name] = max(sizes.get(name, 0), x.numel() // max(x.shape[-1], 1))


def _run(model: nn.Module, sample: Any) -> None:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), _eager():
            if isinstance(sample, Mapping):
                model(**sample)
            elif isinstance(sample, (tuple, list)):
                model(*sample)
            else:
                model(sample)
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
