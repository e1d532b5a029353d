# SPDX-License-Identifier: Apache-2.0
"""The tensors that a checkpoint does not hold: what it knows of them, and whether a model has the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as shown  # of values from files, which may be long or deep
from typing import Any

from torch import Tensor, nn

from ..distributed.processes import whole
from ..distributed.transaction import canonical_name
from ..errors import CheckpointError, warn
from ..layers.adapted import AdaptedLinear
from ..layers.digest import digest
from .files import MANIFEST

BUFFER_BYTES = 1 << 16  # up to here buffers, which training may change, are saved; larger ones are tables
HiddenRule = Callable[[nn.Module], Mapping[str, Tensor]]
_hidden_rules: list[HiddenRule] = []
Others = list[str]  # what a model has otherwise than the checkpoint, in words


def register_hidden(rule: HiddenRule) -> HiddenRule:
    """Add a rule for tensors that a module computes with and that are neither parameters nor buffers of it:
    rule(module) -> tensors by name."""
    _hidden_rules.append(rule)
    return rule


def outside_tensors(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> dict[str, Tensor]:
    """Parameters, persistent buffers and hidden tensors by canonical name, except adapters and adapted
    weights; the names are those in a model that `inject` adapted, for PEFT's layers too."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        persistent = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        hidden = {key: tensor for rule in _hidden_rules for key, tensor in rule(module).items()}
        for key, tensor in {**module._parameters, **persistent, **hidden}.items():
            name = canonical_name(f"{prefix}.{key}" if prefix else key).replace(".base_layer.", ".")
            # PEFT keeps the module in place of which a trained copy runs.
            if tensor is not None and ".original_module." not in name and not _inside(name, layers):
                found.setdefault(name, tensor)
    for name, layer in layers.items():
        found.pop(layer.weight_name(name), None)  # of a layer that its owner stores the weight of
        if isinstance(layer.bias, Tensor) and not layer.is_part:
            found[f"{name}.bias"] = layer.bias
    return found


def _inside(name: str, layers: Mapping[str, AdaptedLinear]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in layers for end in range(1, len(parts)))


def split(
    outside: Mapping[str, Tensor], trained: Iterable[Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of the tensors that are not `trained`: the small buffers, and the digests of all others. Every process
    that shares the model must call this."""
    known = set(map(id, trained))
    left = {name: tensor for name, tensor in outside.items() if id(tensor) not in known}
    buffers = {name: tensor for name, tensor in left.items() if _is_small_buffer(tensor)}
    return buffers, {
        name: digest(whole(tensor.detach())) for name, tensor in left.items() if name not in buffers
    }


def _is_small_buffer(tensor: Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter) and 0 < tensor.numel() * tensor.element_size() <= BUFFER_BYTES


def compare(outside: Mapping[str, Tensor], saved: Any, loaded: Iterable[Tensor]) -> Others:
    """How the frozen tensors differ from the digests in the manifest; `loaded` are those whose values the
    checkpoint holds. Checkpoints of earlier versions have no digests. Every process that shares the model
    must call this."""
    if saved is None:
        return []
    if not isinstance(saved, dict):
        raise CheckpointError(f"{MANIFEST}: frozen: expected a table, got {shown(saved)}; nothing was loaded")
    held = set(map(id, loaded))
    saved = {canonical_name(name): value for name, value in saved.items()}
    others = [f"{name} (not in the model)" for name in saved if name not in outside]
    for name, tensor in outside.items():
        if id(tensor) in held:
            continue
        if name in saved:
            found = digest(whole(tensor.detach()))
            if found and saved[name] != "" and saved[name] != found:
                others.append(f"{name}{_dtypes(saved[name], found)}")
        elif not tensor.requires_grad:
            others.append(f"{name} (not in the checkpoint)")
    return others


def _dtypes(saved: Any, found: str) -> str:
    """The dtypes in two digests, if they differ."""
    theirs = saved.partition(":")[0] if isinstance(saved, str) else saved
    ours = found.partition(":")[0]
    return "" if theirs == ours else f" ({shown(theirs)} in the checkpoint, {ours} in the model)"


def other_weight(name: str, saved: Any, found: str) -> Others:
    """`compare` for the digest of one adapted weight."""
    return [] if saved in (None, "", found) or not found else [f"{name}{_dtypes(saved, found)}"]


def report(others: Others, strict: bool) -> None:
    """Raises `CheckpointError`, or warns unless `strict`, when there are differences."""
    if not others:
        return
    others = list(dict.fromkeys(others))
    names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    count = f"{len(others)} differ" if len(others) > 1 else "it differs"
    problem = f"{names}: the checkpoint belongs to other base weights or frozen tensors ({count})"
    if strict:
        raise CheckpointError(
            f"{problem}; load the pretrained weights that it was trained from before inject. What was frozen "
            "when it was saved is not in it. strict=False warns instead. Nothing was loaded"
        )
    warn(f"{problem}; the model will not compute what was saved")
