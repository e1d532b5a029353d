"""Parents that use the weight of a layer without calling it, and the settings that make them call it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import TargetError

CallRule = Callable[[nn.Module, str], Mapping[str, Any] | None]
MENDED = (
    "_fused_ewclora_mended"  # on a mended parent: its attributes as they were; data, so that copies have it
)

_call_rules: list[CallRule] = []


@dataclass(frozen=True)
class Mend:
    """Attributes to set on the module called `name`, which would not call its child otherwise."""

    name: str
    parent: nn.Module
    child: str
    settings: Mapping[str, Any]


def register_call(rule: CallRule) -> CallRule:
    """Add a rule that knows parents which use a layer without calling it: rule(parent module, child name) ->
    attributes to set on the parent so that it calls the layer, or None; usable as a decorator.

    `inject` sets them, with unchanged outputs, and `eject` puts the old values back.

        >>> separate = {"qkv_bias_separate": True}
        >>> register_call(lambda parent, child: separate if isinstance(parent, Beit) else None)
    """
    _call_rules.append(rule)
    return rule


def find(model: nn.Module, layers: Iterable[nn.Module]) -> tuple[Mend, ...]:
    """What has to be set for `layers` to be called, by all of their parents; raises `TargetError` when a
    parent has no such attribute."""
    wanted = set(layers)
    found = []
    for name, parent in model.named_modules():
        for child, module in parent._modules.items():
            if module not in wanted:
                continue
            for rule in _call_rules:
                if settings := rule(parent, child):
                    found.append(Mend(name, parent, child, settings))
                    break
    for mend in found:
        for attribute in mend.settings:
            if not hasattr(mend.parent, attribute):
                layer = f"{mend.name}.{mend.child}".lstrip(".")
                raise TargetError(
                    f"{layer}: {type(mend.parent).__name__} uses its weight without calling it, and has no "
                    f"attribute {attribute} that would mend that; leave the layer out with "
                    f"exclude_modules=[{layer!r}]. Nothing was changed"
                )
    return tuple(found)


def apply_(mends: Iterable[Mend]) -> None:
    """Set them, keeping on each parent what was there."""
    for mend in mends:
        before = vars(mend.parent).setdefault(MENDED, {})
        for attribute, value in mend.settings.items():
            before.setdefault(attribute, getattr(mend.parent, attribute))
            setattr(mend.parent, attribute, value)


def undo_(model: nn.Module) -> None:
    """Put back what `apply_` replaced anywhere in the model."""
    for module in model.modules():
        for attribute, value in vars(module).pop(MENDED, {}).items():
            setattr(module, attribute, value)
