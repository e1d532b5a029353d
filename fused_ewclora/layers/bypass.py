# SPDX-License-Identifier: Apache-2.0
"""Bypasses: parents that use the weight of a layer without calling it, and settings that change that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import TargetError

CallRule = Callable[[nn.Module, str], Mapping[str, Any] | None]
ModuleRule = Callable[[nn.Module], Mapping[str, Any] | None]
Refusal = Callable[[nn.Module, str], str | None]
CLASS = "__class__"  # the setting that gives a parent another class
# Attribute of a changed parent that holds the old values, as plain data, so that copies of the model have it.
# Models that were pickled by earlier versions have it under this name.
OLD_VALUES = "_fused_ewclora_mended"

_call_rules: list[CallRule] = []
_outer_rules: list[CallRule] = []
_module_rules: list[ModuleRule] = []
_refusals: list[Refusal] = []


@dataclass(frozen=True)
class BypassFix:
    """Attributes to set on `parent`, the module called `name`, so that it calls its `child`; for a module
    further up `child` is the path of the layer in it, and `""` for settings of the module itself."""

    name: str
    parent: nn.Module
    child: str
    settings: Mapping[str, Any]


def register_call(rule: CallRule) -> CallRule:
    """Add a rule for parents that bypass a layer, which means that they use its weight without calling it.

    Can be used as a decorator. `inject` sets the attributes, which must not change the outputs of the parent,
    and `eject` restores the old values.

    Args:
        rule: rule(parent module, child name) -> attributes to set on the parent so that it calls the layer,
            or None. The attribute `__class__` gives the parent another class, which must store what the old
            one does.

    Returns:
        rule.

    Examples:
        >>> def separate(parent, child):
        ...     return {"separate": True} if hasattr(parent, "separate") else None
        >>> rule = fe.register_call(separate)
    """
    _call_rules.append(rule)
    return rule


def register_outer_call(rule: CallRule) -> CallRule:
    """Add a rule as in `register_call` that is asked about every module above a layer, with the path of the
    layer in it, such as "layers.0.linear1"."""
    _outer_rules.append(rule)
    return rule


def register_module_settings(rule: ModuleRule) -> ModuleRule:
    """Add a rule for modules that would change themselves in calls, such as their frozen weights:
    rule(module) -> attributes that prevent it, or None. It is asked about all modules beside the adapted
    layers."""
    _module_rules.append(rule)
    return rule


def register_refusal(rule: Refusal) -> Refusal:
    """Add a rule for parents that bypass a layer and cannot be made to call it: rule(parent module, child
    name) -> the reason, or None."""
    _refusals.append(rule)
    return rule


def refusal(parents: Iterable[tuple[nn.Module, str]]) -> str | None:
    """The reason why one of the parents of a layer would bypass it after all, or None."""
    reasons = (rule(parent, child) for parent, child in parents for rule in _refusals)
    return next((reason for reason in reasons if reason is not None), None)


def is_made_to_call(parent: nn.Module, child: str) -> bool:
    """Whether a rule of `register_call` makes a parent call its layer `child`."""
    return any(rule(parent, child) for rule in _call_rules)


def parents_of(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """(parent, name of the child in it) for every place of every module below `model`."""
    parents: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                parents.setdefault(module, []).append((parent, child))
    return parents


def find_fixes(
    model: nn.Module, layers: Iterable[nn.Module], parts: Iterable[tuple[nn.Module, str]] = ()
) -> tuple[BypassFix, ...]:
    """The fixes after which all parents of `layers` call them, and the owners of `parts` (owner, name of the
    child) those; raises `TargetError` when a parent lacks an attribute that a rule would set."""
    children: dict[nn.Module, list[str]] = {}
    for owner, child in parts:
        children.setdefault(owner, []).append(child)
    fixes = []
    for name, parent, path, direct in _places(model, set(layers), children):
        rules = (*_call_rules, *_outer_rules) if direct else _outer_rules
        if settings := next(filter(None, (rule(parent, path) for rule in rules)), None):
            fixes.append(BypassFix(name, parent, path, settings))
    fixes += _of_modules(model, set(layers))
    for fix in fixes:
        for attribute in fix.settings:
            if not hasattr(fix.parent, attribute):
                layer = f"{fix.name}.{fix.child}".lstrip(".")
                raise TargetError(
                    f"{layer}: {type(fix.parent).__name__} uses its weight without calling it, and has no "
                    f"attribute {attribute}, which would make it call the layer; leave the layer out with "
                    f"exclude_modules=[{layer!r}]. Nothing was changed"
                )
    return tuple(fixes)


def _of_modules(model: nn.Module, layers: set[nn.Module]) -> Iterator[BypassFix]:
    for name, module in model.named_modules() if _module_rules else ():
        if module in layers or OLD_VALUES in vars(module):
            continue
        if settings := next(filter(None, (rule(module) for rule in _module_rules)), None):
            yield BypassFix(name, module, "", settings)


def _places(
    model: nn.Module, wanted: set[nn.Module], children: Mapping[nn.Module, list[str]]
) -> Iterator[tuple[str, nn.Module, str, bool]]:
    """(name of a module, the module, path of a wanted layer in it, whether the layer is its own) for all
    modules above the layers, and above the children that modules will have."""
    above = dict(model.named_modules(remove_duplicate=False))
    seen: set[tuple[nn.Module, str]] = set()
    for name, module in above.items():
        steps = name.split(".") if name else []
        layers = [steps] if module in wanted else []
        layers += [[*steps, child] for child in children.get(module, ())]
        for parts in layers:
            for depth in reversed(range(len(parts))):
                outer, path = ".".join(parts[:depth]), ".".join(parts[depth:])
                if (above[outer], path) not in seen:  # a shared module is above a layer under several names
                    seen.add((above[outer], path))
                    yield outer, above[outer], path, depth == len(parts) - 1


def apply_(fixes: Iterable[BypassFix]) -> None:
    """Set the attributes and keep the old values on each parent."""
    for fix in fixes:
        before = vars(fix.parent).setdefault(OLD_VALUES, {})
        for attribute, value in fix.settings.items():
            before.setdefault(attribute, getattr(fix.parent, attribute))
            setattr(fix.parent, attribute, value)


def undo_(model: nn.Module) -> None:
    """Restore the values that `apply_` replaced, everywhere in the model."""
    for module in model.modules():
        for attribute, value in vars(module).pop(OLD_VALUES, {}).items():
            setattr(module, attribute, value)


def replaced_parent(parents: Iterable[tuple[nn.Module, str]]) -> str | None:
    """The class of a parent of a layer that `apply_` has replaced, because it would not call the layer."""
    replaced = (vars(parent).get(OLD_VALUES, {}).get(CLASS) for parent, _ in parents)
    return next((kind.__name__ for kind in replaced if kind is not None), None)


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as data: a class by its name."""
    return {
        attribute: value.__name__ if attribute == CLASS else value for attribute, value in settings.items()
    }


def settings_text(settings: Mapping[str, Any]) -> str:
    """`attribute = value, ...`."""
    return ", ".join(f"{attribute} = {value}" for attribute, value in plain_settings(settings).items())
