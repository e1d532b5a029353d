# SPDX-License-Identifier: Apache-2.0
"""What injection freezes and what it leaves trainable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from .adapted import AdaptedLinear
from .matching import is_linear, output_heads

# Attribute of modules: the names of the parameters below it that injection froze. Adapted layers have it too,
# so that an injection into a part of the model knows that the whole has been frozen.
FROZEN = "_fused_ewclora_frozen"


def is_frozen(model: nn.Module) -> bool:
    """Whether an earlier injection has frozen the model, after which requires_grad is the user's."""
    return any(FROZEN in vars(module) for module in model.modules())


def freeze_(model: nn.Module, layers: Iterable[AdaptedLinear]) -> None:
    """Freeze everything but adapters and record it, after injection has adapted `layers`; when the model has
    been frozen before, only record these layers."""
    layers = list(layers)
    if not is_frozen(model):
        keep = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, AdaptedLinear)
            for _, parameter in module.named_lora_parameters()
        }
        frozen = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in keep]
        for _, parameter in frozen:
            parameter.requires_grad_(False)
        vars(model)[FROZEN] = tuple(name for name, _ in frozen)
    for layer in layers:
        vars(layer).setdefault(FROZEN, ())


def thaw_(modules: Iterable[nn.Module]) -> None:
    """Let the floating-point parameters of these modules require gradients."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)


def undo_(model: nn.Module) -> None:
    """Let everything that `freeze_` froze require gradients again."""
    for module in model.modules():
        present = dict(module.named_parameters(remove_duplicate=False))
        for name in vars(module).pop(FROZEN, ()):
            if name in present:  # heads may have been replaced since
                present[name].requires_grad_(True)


def frozen_heads(model: nn.Module) -> list[str]:
    """The names of the output heads that injection froze and that are still frozen: those that the model or a
    rule of `register_heads` names, else the last linear layer. A head that is adapted, or whose weight is an
    embedding too, is none of them."""
    heads = set(output_heads(model))
    if not heads:
        heads = set([module for module in model.modules() if is_linear(module)][-1:])
    frozen = {name for name in _recorded(model) if not model.get_parameter(name).requires_grad}
    names: list[str] = []
    for name, module in model.named_modules():
        if module not in heads or any(name.startswith(f"{parent}.") for parent in names):
            continue
        adapted = any(isinstance(part, AdaptedLinear) for part in module.modules())
        own = {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
        if own & frozen and not adapted and not _tied(model, name, module):
            names.append(name)
    return names


def _recorded(model: nn.Module) -> Iterator[str]:
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules():
        for name in vars(module).get(FROZEN, ()):
            full = f"{prefix}.{name}".lstrip(".")
            if full in present:
                yield full


def _tied(model: nn.Module, name: str, module: nn.Module) -> bool:
    own = {id(parameter) for parameter in module.parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    return any(id(p) in own and not other.startswith(f"{name}.") for other, p in everywhere)


def thawing_line(names: Iterable[str]) -> str:
    """The Python that lets these modules of `model` train."""
    return "; ".join(f"{_path(name)}.requires_grad_(True)" for name in names)


def _path(name: str) -> str:
    dotted = all(part.isidentifier() for part in name.split("."))
    return f"model.{name}" if dotted else f"model.get_submodule({name!r})"
