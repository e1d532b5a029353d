"""Bypasses: parents that use the weight of a layer without calling it, and settings that change that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import TargetError

CallRule = Callable[[nn.Module, str], Mapping[str, Any] | None]
# Attribute of a changed parent that holds the old values, as plain data, so that copies of the model have it.
# Models that were pickled by earlier versions have it under this name.
OLD_VALUES = "_fused_ewclora_mended"

_call_rules: list[CallRule] = []


@dataclass(frozen=True)
class BypassFix:
    """Attributes to set on `parent`, the module called `name`, so that it calls its `child`."""

    name: str
    parent: nn.Module
    child: str
    settings: Mapping[str, Any]


def register_call(rule: CallRule) -> CallRule:
    """Add a rule for parents that bypass a layer, which means that they use its weight without calling it:
    rule(parent module, child name) -> attributes to set on the parent so that it calls the layer, or None.

    Can be used as a decorator. `inject` sets the attributes, which must not change the outputs of the parent,
    and `eject` restores the old values.

        >>> separate = {"qkv_bias_separate": True}
        >>> register_call(lambda parent, child: separate if isinstance(parent, Beit) else None)
    """
    _call_rules.append(rule)
    return rule


def find_fixes(model: nn.Module, layers: Iterable[nn.Module]) -> tuple[BypassFix, ...]:
    """The fixes after which all parents of `layers` call them; raises `TargetError` when a parent lacks an
    attribute that a rule would set."""
    wanted = set(layers)
    fixes = []
    for name, parent in model.named_modules():
        for child, module in parent._modules.items():
            if module not in wanted:
                continue
            for rule in _call_rules:
                if settings := rule(parent, child):
                    fixes.append(BypassFix(name, parent, child, settings))
                    break
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
