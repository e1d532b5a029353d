"""Which layers of a model a `LoRAConfig` means, decided and validated before anything is changed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from ..config import ALL_LINEAR, LoRAConfig, QKVLayout, matches
from ..errors import LayoutError, TargetError
from . import bypass
from .adapted import AdaptedLinear
from .linear import LoRALinear
from .slices import AdapterSlice, plan_slices

LayoutRule = Callable[[nn.Module, str], QKVLayout | None]
HeadRule = Callable[[nn.Module], Iterable[nn.Module]]
MAX_NAMES = 12  # of a list in an error message

_layout_rules: list[LayoutRule] = []
_head_rules: list[HeadRule] = []
_adapted_classes: dict[type[nn.Module], type[AdaptedLinear]] = {nn.Linear: LoRALinear}
_libraries: dict[str, Callable[[], object]] = {}


def register_layout(rule: LayoutRule) -> LayoutRule:
    """Add a rule that knows packed projections: rule(parent module, child name) -> `QKVLayout` or None;
    usable as a decorator.

    Rules serve layers that `slices` are asked for without a `layout`; the first that answers wins, and when
    none does `inject` raises `LayoutError`. Rules that do not know the parent are asked about its own parent,
    with a child such as `"qkv.linear"`.

        >>> thirds = QKVLayout(("q", "k", "v"))
        >>> register_layout(lambda parent, child: thirds if child == "qkv" else None)
    """
    _layout_rules.append(rule)
    return rule


def register_heads(rule: HeadRule) -> HeadRule:
    """Add a rule that knows output heads, which `"all-linear"` leaves out: rule(model) -> modules."""
    _head_rules.append(rule)
    return rule


def register_adapted_class(adapted: type[AdaptedLinear]) -> None:
    """Adapt modules whose class is exactly `adapted.plain` by turning them into `adapted`."""
    _adapted_classes[adapted.plain] = adapted


def register_library(name: str, load: Callable[[], object]) -> None:
    """Call `load`, which registers layouts and classes, once, before the first model that has modules of the
    top-level package `name` is planned."""
    _libraries[name] = load


def load_libraries(model: nn.Module) -> None:
    """Call what `register_library` was given for the packages that the modules of `model` come from."""
    for name in {type(module).__module__.partition(".")[0] for module in model.modules()} & set(_libraries):
        _libraries[name]()
        del _libraries[name]


@dataclass(frozen=True)
class Match:
    """A layer that will be adapted, and the class it will have."""

    name: str
    module: nn.Module
    adapted: type[AdaptedLinear]
    in_features: int
    adapters: tuple[AdapterSlice, ...]
    lora_alpha: float | None


@dataclass(frozen=True)
class Plan:
    """Everything an injection will do; `skipped` maps a reason to the names it applies to."""

    matches: tuple[Match, ...]
    skipped: dict[str, list[str]] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    mends: tuple[bypass.Mend, ...] = ()


def plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """Match and validate; raises `TargetError` or `LayoutError` naming the layer, and changes nothing.

    PEFT's rules on names. Only exact `nn.Linear`s are adapted: other classes are skipped with a reason, and
    an `nn.Linear` that cannot be adapted raises when targets name it. `"all-linear"` leaves out what
    `get_output_embeddings()` or `get_classifier()` return and what a rule of `register_heads` names.
    """
    if config.target_modules is None:
        raise TargetError(
            f"target_modules: expected a string, names or {ALL_LINEAR!r}, got None; {_available(model)}"
        )
    everything = config.target_modules == ALL_LINEAR
    load_libraries(model)
    heads = set(_output_heads(model)) if everything else set()
    found: list[tuple[str, nn.Module]] = []
    skipped: dict[str, list[str]] = {}
    for name, module in _wanted(model, config):
        reason = "output head" if module in heads else _unfit(module)
        if reason is None:
            found.append((name, module))
        elif isinstance(module, AdaptedLinear):
            raise TargetError(
                f"{name or 'model'}: has adapters already; fe.eject(model) removes them. Nothing was changed"
            )
        elif is_linear(module) and not everything:
            raise TargetError(
                f"{name}: {reason}; leave it out with exclude_modules=[{name!r}]. Nothing was changed"
            )
        else:
            skipped.setdefault(reason, []).append(name)
    if not found:
        raise TargetError(_nothing_matched(model, config, skipped))
    planned = tuple(_match(model, name, module, config) for name, module in found)
    unmatched = _unmatched(config, [name for name, _ in _wanted(model, config)])
    return Plan(planned, skipped, unmatched, bypass.find(model, [module for _, module in found]))


def _wanted(model: nn.Module, config: LoRAConfig) -> Iterator[tuple[str, nn.Module]]:
    """Modules that the names select, each once, under the first of its names; any of its names counts."""
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(module, []).append(name)
    targets, exclude = config.target_modules, config.exclude_modules
    for module, names in aliases.items():
        if exclude is not None and any(matches(exclude, name) for name in names):
            continue
        if targets == ALL_LINEAR:
            if is_linear(module):
                yield names[0], module
        elif targets is not None and any(matches(targets, name) for name in names):
            yield names[0], module


def _output_heads(model: nn.Module) -> Iterator[nn.Module]:
    for getter in ("get_output_embeddings", "get_classifier"):
        method = getattr(model, getter, None)
        head = method() if callable(method) else None
        for each in head if isinstance(head, (tuple, list)) else (head,):  # distilled models have two
            if isinstance(each, nn.Module):
                yield from each.modules()
    for rule in _head_rules:
        for head in rule(model):
            yield from head.modules()


def is_linear(module: nn.Module) -> bool:
    """Whether it is an `nn.Linear`, or of another class with an adapted form, or derived from one."""
    return isinstance(module, tuple(_adapted_classes))


def _unfit(module: nn.Module) -> str | None:
    """Why a module cannot be adapted in place, or None."""
    kind = type(module).__name__
    if not is_linear(module):
        return f"{kind} is not nn.Linear"
    if type(module) not in _adapted_classes:
        base = next(plain.__name__ for plain in _adapted_classes if isinstance(module, plain))
        hint = " (nn.MultiheadAttention uses its weight without calling it)" if "Dynamically" in kind else ""
        return f"{kind} is a subclass of {base} whose behaviour would be lost{hint}"
    if "forward" in vars(module):
        return "its forward has been replaced on the instance, so an adapter would never run"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter (weight norm, pruning or another wrapper)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    adapted = _adapted_classes[type(module)]
    expected = adapted.features(module)
    if tuple(weight.shape) != (expected if adapted.transposed else expected[::-1]):
        sides = "[in_features, out_features]" if adapted.transposed else "[out_features, in_features]"
        return f"its weight has shape {list(weight.shape)}, not {sides}"
    return None


def _match(model: nn.Module, name: str, module: nn.Module, config: LoRAConfig) -> Match:
    layout = config.layout
    adapted = _adapted_classes[type(module)]
    in_features, out_features = adapted.features(module)
    if config.slices is not None and layout is None:
        layout = known_layout(model, name)
    alpha = config.alpha_of(name)
    try:
        adapters = plan_slices(out_features, config.rank_of(name), alpha, config.slices, layout)
    except LayoutError as error:
        hint = "; layers of another layout take a call of inject of their own" if layout is not None else ""
        raise LayoutError(f"{name or 'model'}: {error}{hint}. Nothing was changed") from None
    return Match(name, module, adapted, in_features, adapters, alpha)


def known_layout(model: nn.Module, name: str) -> QKVLayout | None:
    """What a registered rule says about the layer called `name`, or None."""
    answers = (rule(parent, child) for parent, child in ancestors(model, name) for rule in _layout_rules)
    return next((answer for answer in answers if answer is not None), None)


def ancestors(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """(parent, its child) and (grandparent, path of two names) of the layer called `name`: some projections
    are wrapped together with their norm."""
    parts = name.split(".")
    for depth in range(1, min(len(parts), 2) + 1):
        yield model.get_submodule(".".join(parts[:-depth])), ".".join(parts[-depth:])


def _unmatched(config: LoRAConfig, names: list[str]) -> tuple[str, ...]:
    targets = config.target_modules
    if targets is None or isinstance(targets, str):
        return ()
    return tuple(target for target in targets if not any(matches((target,), name) for name in names))


def shorten(names: Iterable[str]) -> str:
    """`a, b, c and 9 more`."""
    names = list(names)
    rest = len(names) - MAX_NAMES
    return ", ".join(name or "(the model)" for name in names[:MAX_NAMES]) + (
        f" and {rest} more" if rest > 0 else ""
    )


def _available(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if is_linear(module)]
    return f"nn.Linear layers of the model: {shorten(names)}" if names else "the model has no nn.Linear"


def _nothing_matched(model: nn.Module, config: LoRAConfig, skipped: dict[str, list[str]]) -> str:
    targets = config.target_modules or ()
    message = (
        f"target_modules: no nn.Linear matches {targets if isinstance(targets, str) else list(targets)!r}"
    )
    if config.exclude_modules is not None:
        message += f" outside exclude_modules={config.exclude_modules!r}"
    names = [name for name, module in model.named_modules() if is_linear(module)]
    known = dict.fromkeys(part for name in names for part in (name, name.rpartition(".")[2]))
    asked = [targets] if isinstance(targets, str) else list(targets)
    close = [guess for target in asked for guess in difflib.get_close_matches(target, known, n=2)]
    if close:
        message += f" (did you mean {' or '.join(map(repr, dict.fromkeys(close)))}?)"
    for reason, which in skipped.items():
        message += f"; {shorten(which)}: {reason}"
    return f"{message}; {_available(model)}"
