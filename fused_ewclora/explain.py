"""Which implementation every adapted layer runs on, and whether it runs at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from .errors import TargetError
from .inject import adapters
from .layers import LoRALinear
from .matching import shorten
from .ops import _dispatch
from .report import Report


def check_bypass(model: nn.Module) -> None:
    """Call it after the model has run: raises `TargetError` naming adapted layers whose forward never ran,
    and the mend.

    Some models read `layer.weight` and never call the layer (timm's BEiT and EVA02), so that an adapter
    trains nothing. Costs a look at a counter per layer; nothing runs.

        >>> model(x); check_bypass(model)
    """
    if names := bypassed(model):
        raise TargetError(_bypass_message(model, names))


def bypassed(model: nn.Module) -> list[str]:
    """Names of the adapted layers that have not run since injection, or since `verify_forward` began."""
    return [name for name, layer in adapters(model).items() if layer.forward_calls == 0]


def verify_forward(model: nn.Module, sample: Any) -> dict[str, int]:
    """Run the model once (eval mode, no gradients, uncompiled) and raise `TargetError` for adapted layers
    that did not run.

    sample: a tensor, a tuple of arguments or a mapping of keyword arguments. Returns the number of calls per
    adapted layer.

        >>> verify_forward(model, torch.zeros(1, 3, 224, 224))
    """
    calls = _calls(model, sample)
    if names := [name for name, count in calls.items() if count == 0]:
        raise TargetError(_bypass_message(model, names))
    return calls


def explain(model: nn.Module, sample: Any = None) -> Report:
    """A table of the implementation that serves each adapted layer and why faster ones do not; rows are data.

    With a `sample` (as in `verify_forward`) the model runs once and the table counts the calls of each layer;
    layers that never ran are named below it. Under autocast its dtype decides.

        >>> print(explain(model, torch.zeros(1, 3, 224, 224)))
    """
    calls = None if sample is None else _calls(model, sample)
    rows = []
    for name, layer in adapters(model).items():
        row = {"name": name, "r": "+".join(str(s.r) for s in layer.adapter_slices), **_implementation(layer)}
        if calls is not None:
            row["calls"] = calls[name]
        rows.append(row)
    silent = [name for name, count in (calls or {}).items() if count == 0]
    notes = [_bypass_message(model, silent)] if silent else []
    if not rows:
        notes.append("no adapted layers")
    return Report("lora_linear by layer", rows, notes, {"layers": len(rows), "bypassed": silent})


def _implementation(layer: LoRALinear) -> dict[str, Any]:
    weight = layer.weight
    device = weight.device.type
    autocast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    row: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    if layer.merged or not layer.adapters_enabled:
        state = "merged" if layer.merged else "disabled"
        return {**row, "backend": "torch", "algorithm": f"linear ({state})", "why_not_faster": None}
    reasons: list[str] = []
    for backend, algorithm, reason in _dispatch.explain("lora_linear", _dispatch.Call(device, dtype)):
        if reason is None:
            return {
                **row,
                "backend": backend,
                "algorithm": algorithm,
                "why_not_faster": "; ".join(reasons) or None,
            }
        reasons.append(f"{backend} {algorithm}: {reason}")
    return {**row, "backend": None, "algorithm": None, "why_not_faster": "; ".join(reasons)}


def _calls(model: nn.Module, sample: Any) -> dict[str, int]:
    layers = adapters(model)
    before = {name: layer.forward_calls for name, layer in layers.items()}
    for layer in layers.values():
        layer.forward_calls = 0
    try:
        _run(model, sample)
        return {name: layer.forward_calls for name, layer in layers.items()}
    finally:
        for name, layer in layers.items():
            layer.forward_calls += before[name]


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
        return nullcontext()  # nothing can have been compiled, and importing dynamo takes a second
    return torch.compiler.set_stance("force_eager")


def _bypass_message(model: nn.Module, names: list[str]) -> str:
    message = f"adapted layers that never ran although the model did: {shorten(names)}"
    parent = names[0].rpartition(".")[0]
    if getattr(model.get_submodule(parent), "qkv_bias_separate", None) is False:
        # timm's BEiT-like attention calls F.linear on the weight unless this is set.
        return f"{message}. Set qkv_bias_separate = True on their parents (as model.{parent})"
    return f"{message}. Their parents must call them, not F.linear on their weight; or use exclude_modules"
