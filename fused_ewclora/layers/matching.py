# SPDX-License-Identifier: Apache-2.0
"""The layers of a model that a `LoRAConfig` selects, decided and validated before anything is changed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..config import ALL_LINEAR, LoRAConfig, QKVLayout, matches
from ..distributed.wrappers import innermost
from ..errors import LayoutError, TargetError
from . import bypass
from .adapted import AdaptedLinear
from .left_out import NOT_IN_ALL, left_out
from .linear import LoRALinear
from .parts import LoRAPart, Part, PartGroup, parts_of
from .slices import AdapterSlice, plan_slices
from .suggest import suggestion

LayoutRule = Callable[[nn.Module, str], QKVLayout | None]
HeadRule = Callable[[nn.Module], Iterable[nn.Module]]
MAX_NAMES = 12  # in one list of an error message
HEAD = "output head"  # the reason why "all-linear" leaves a layer out

_layout_rules: list[LayoutRule] = []
_head_rules: list[HeadRule] = []
_adapted_classes: dict[type[nn.Module], type[AdaptedLinear]] = {nn.Linear: LoRALinear}
_weight_classes: dict[tuple[type[nn.Module], type], type[AdaptedLinear]] = {}
_libraries: dict[str, Callable[[], object]] = {}


def register_layout(rule: LayoutRule) -> LayoutRule:
    """Add a rule for packed projections.

    Can be used as a decorator. The rules are asked when a configuration has `slices` without a `layout`. The
    first one that returns a layout decides; when none does, `inject` raises `LayoutError`. If no rule knows
    the parent, they are asked about the parent of the parent, with a child such as `"qkv.linear"`.

    Args:
        rule: rule(parent module, child name) -> `QKVLayout` or None.

    Returns:
        rule.

    Examples:
        >>> thirds = fe.QKVLayout(("q", "k", "v"))
        >>> rule = fe.register_layout(lambda parent, child: thirds if child == "my_packed_qkv" else None)
    """
    _layout_rules.append(rule)
    return rule


def register_heads(rule: HeadRule) -> HeadRule:
    """Add a rule for output heads, which `"all-linear"` leaves out: rule(model) -> modules."""
    _head_rules.append(rule)
    return rule


def register_adapted_class(adapted: type[AdaptedLinear], kind: type[nn.Module] | None = None) -> None:
    """Register `adapted` as the class that modules of exactly the class `kind` become, by default
    `adapted.plain`."""
    _adapted_classes[adapted.plain if kind is None else kind] = adapted


def register_adapted_weight(weight: type[Tensor], adapted: type[AdaptedLinear]) -> None:
    """Register `adapted` as the class that modules of exactly the class `adapted.plain` become when their
    weight is of exactly the class `weight`, a subclass of tensors."""
    _weight_classes[adapted.plain, weight] = adapted


def register_library(name: str, load: Callable[[], object]) -> None:
    """Register `load`, which registers layouts and classes of the top-level package `name`; it is called
    once, before the first injection into a model with modules or parameters of classes of that package."""
    _libraries[name] = load


def load_libraries(model: nn.Module) -> None:
    """Call the `load` functions that are registered for the packages of the modules and parameters of
    `model`."""
    kinds: set[type] = {type(module) for module in model.modules()}
    kinds |= {type(parameter) for parameter in model.parameters()}
    for name in {kind.__module__.partition(".")[0] for kind in kinds} & set(_libraries):
        _libraries[name]()
        del _libraries[name]


@dataclass(frozen=True)
class Candidate:
    """A module that may be adapted, or a part of one, which has the name of its child to be."""

    name: str
    module: nn.Module
    part: Part | None = None

    @property
    def owner_name(self) -> str:
        """The name of `module`."""
        return self.name if self.part is None else self.part.owner_name(self.name)

    @property
    def names(self) -> list[str]:
        """What a target may have called it."""
        return [self.name] if self.part is None else _part_names([self.owner_name], self.part)


@dataclass(frozen=True)
class Match:
    """A layer that will be adapted, and the class that it will have; with a `part`, one that will be added to
    `module`."""

    name: str
    module: nn.Module
    adapted: type[AdaptedLinear]
    in_features: int
    adapters: tuple[AdapterSlice, ...]
    lora_alpha: float | None
    part: Part | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as it is stored."""
        if self.part is not None:
            return self.part.weight_in(self.module)
        return cast(Tensor, self.module._parameters["weight"])

    @property
    def weight_name(self) -> str:
        """The name of its parameter in the model."""
        if self.part is not None:
            return self.part.weight_name(self.part.owner_name(self.name))
        return f"{self.name}.weight".lstrip(".")

    def adopt_(self, lora_dropout: float) -> AdaptedLinear:
        """Turn the module into the adapted layer, or add the adapted part to it."""
        if self.part is not None:
            return self.part.adapted(self.module, self.part, self.adapters, self.lora_alpha, lora_dropout)
        return self.adapted.adopt_(self.module, self.adapters, self.lora_alpha, lora_dropout)


@dataclass(frozen=True)
class Plan:
    """Everything that an injection will do; `skipped` maps a reason to the names that it applies to, `saved`
    the names of `modules_to_save` to the modules."""

    matches: tuple[Match, ...]
    skipped: dict[str, list[str]] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    bypass_fixes: tuple[bypass.BypassFix, ...] = ()
    saved: dict[str, nn.Module] = field(default_factory=dict)  # modules_to_save by name
    unsaved: tuple[str, ...] = ()  # modules_to_save that match nothing


def plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """Match and validate without changing anything; raises `TargetError` or `LayoutError` naming the layer.

    Names are matched as in PEFT. Only modules whose class is exactly `nn.Linear`, `nn.Conv2d`, `nn.Conv1d` or
    another one that is registered are adapted: modules of other classes are skipped with a reason, and a
    linear layer or convolution that the targets name but that cannot be adapted raises. `"all-linear"` leaves
    out convolutions, and the modules that `get_output_embeddings()`, `get_classifier()` or a rule of
    `register_heads` returns.
    """
    if config.target_modules is None:
        raise TargetError(
            f"target_modules: expected a string, names or {ALL_LINEAR!r}, got None; {_available(model)}"
        )
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise TargetError(
            f"{lazy[0]}: has no shape yet; run the model once, which gives lazy modules their shapes, before "
            "inject. Nothing was changed"
        )
    everything = config.target_modules == ALL_LINEAR
    load_libraries(model)
    heads = set(output_heads(model)) if everything else set()
    saved = _saved(model, config)
    trained = {part for module in saved.values() for part in module.modules()}
    matched: list[Candidate] = []
    skipped: dict[str, list[str]] = {}
    parents = bypass.parents_of(model)
    wanted = list(_wanted(model, config))
    for candidate in wanted:
        name, module, part = candidate.name, candidate.module, candidate.part
        if module in trained:  # PEFT leaves such targets out as well
            skipped.setdefault("in modules_to_save", []).append(name)
            continue
        if part is not None:
            reason = HEAD if module in heads else part.unfit(module)
            if reason is None:
                reason = bypass.refusal(parents.get(module, ()))
            adapted = isinstance(part.child_of(module), AdaptedLinear)
        else:
            reason = HEAD if module in heads else _unfit(module)
            adapted = isinstance(module, AdaptedLinear)
            if reason is None:
                reason = bypass.refusal(parents.get(module, ()))
        if reason is None:
            matched.append(candidate)
        elif adapted:
            raise TargetError(
                f"{name or 'model'}: has adapters already; fe.eject(model) removes them. Nothing was changed"
            )
        elif (part is not None or _adaptable(module)) and not everything:
            raise TargetError(
                f"{name}: {reason}; leave it out with exclude_modules=[{name!r}]. Nothing was changed"
            )
        else:
            skipped.setdefault(reason, []).append(name)
    others = _left_out(model, config, matched, {*heads, *trained})
    for reason, names in others.items():
        skipped.setdefault(reason, []).extend(names)
    if not matched:
        raise TargetError(_nothing_matched(model, config, skipped))
    planned = tuple(_match(model, candidate, config) for candidate in matched)
    unmatched = _unmatched(config, [*(n for c in wanted for n in c.names), *chain(*others.values())])
    layers = [candidate.module for candidate in matched if candidate.part is None]
    parts = [(candidate.module, candidate.part.name) for candidate in matched if candidate.part is not None]
    fixes = bypass.find_fixes(model, layers, parts)
    names = [name for name, module in model.named_modules() if module in trained]
    unsaved = tuple(n for n in config.modules_to_save or () if not any(name.endswith(n) for name in names))
    return Plan(planned, skipped, unmatched, fixes, saved, unsaved)


def _saved(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The outermost modules whose names end with one of `modules_to_save`, as PEFT matches them."""
    wanted = config.modules_to_save
    if wanted is None:
        return {}
    saved: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{parent}.") for parent in saved)
        if inside or not any(name.endswith(ending) for ending in wanted):
            continue
        if any(isinstance(part, AdaptedLinear) for part in module.modules()):
            raise TargetError(
                f"modules_to_save: {name}: expected modules without adapters, got one that has them. Nothing "
                "was changed"
            )
        saved[name] = module
    if not saved:
        names = [name for name, _ in model.named_children()]
        raise TargetError(
            f"modules_to_save: no module's name ends with one of {list(wanted)}; the model has "
            f"{shorten(names)}. Nothing was changed"
        )
    return saved


def _wanted(model: nn.Module, config: LoRAConfig) -> Iterator[Candidate]:
    """The modules, and parts of modules, that the configuration selects by any of their names, each once,
    under its first name. The name of a module selects all of its parts."""
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(module, []).append(name)
    targets, exclude = config.target_modules, config.exclude_modules

    def excluded(names: list[str]) -> bool:
        return exclude is not None and any(matches(exclude, name) for name in names)

    def targeted(names: list[str]) -> bool:
        return targets is not None and any(matches(targets, name) for name in names)

    for module, names in aliases.items():
        if excluded(names) or isinstance(module, (LoRAPart, PartGroup)):
            continue
        parts = parts_of(module)
        if targets == ALL_LINEAR:
            if is_linear(module):
                yield Candidate(names[0], module)
            parts = [part for part in parts if part.in_all]
        elif not parts and targeted(names):
            yield Candidate(names[0], module)
        chosen = []
        for part in parts:
            own = _part_names(names, part)
            if not excluded(own) and (targets == ALL_LINEAR or targeted(own)):
                chosen.append(Candidate(f"{names[0]}.{part.name}".lstrip("."), module, part))
        yield from _in_slices(names[0], chosen, config)


def _part_names(owners: list[str], part: Part) -> list[str]:
    """The names that select a part of a module with these names."""
    return [*owners, *(f"{owner}.{name}".lstrip(".") for owner in owners for name in part.names)]


def _left_out(
    model: nn.Module, config: LoRAConfig, matched: Iterable[Candidate], covered: Iterable[nn.Module]
) -> dict[str, list[str]]:
    """Reason -> parameters that may be linear maps, and convolutions, that are asked for but get no adapters.
    `covered` are modules that are spoken of elsewhere."""
    targets, exclude = config.target_modules, config.exclude_modules
    everything = targets == ALL_LINEAR

    def wanted(module: nn.Module, name: str) -> bool:
        names = (name, name.rpartition(".")[0])
        if is_linear(module) or (exclude is not None and any(matches(exclude, n) for n in names)):
            return False
        return everything or (targets is not None and matches(targets, name))

    parts = {(candidate.module, candidate.part.parameter) for candidate in matched if candidate.part}
    covered = set(covered)
    reasons = left_out(model, covered, parts, wanted)
    convolutions = [
        name
        for name, module in model.named_modules()
        if everything and isinstance(module, _ConvNd) and not isinstance(module, AdaptedLinear)
        if module not in covered and not (exclude is not None and matches(exclude, name))
    ]
    return {**reasons, f"convolutions: {NOT_IN_ALL}": convolutions} if convolutions else reasons


def _in_slices(name: str, parts: list[Candidate], config: LoRAConfig) -> list[Candidate]:
    """Of the parts of the module called `name`, those that the slices of the configuration select, if they
    are slices by themselves."""
    segments = {candidate.part.segment: candidate for candidate in parts if candidate.part is not None}
    segments.pop(None, None)
    if config.slices is None or not segments:
        return parts
    if unknown := [piece for piece in config.slices if piece not in segments]:
        raise LayoutError(
            f"{name or 'model'}: slices: expected some of {list(segments)}, got {unknown[0]!r}. Nothing was "
            "changed"
        )
    left_out = [candidate for segment, candidate in segments.items() if segment not in config.slices]
    return [candidate for candidate in parts if candidate not in left_out]


def output_heads(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the heads that the model or a rule of `register_heads` names."""
    model = innermost(model)
    for getter in ("get_output_embeddings", "get_classifier"):
        method = getattr(model, getter, None)
        head = method() if callable(method) else None
        for module in head if isinstance(head, (tuple, list)) else (head,):  # distilled models have two
            if isinstance(module, nn.Module):
                yield from module.modules()
    for rule in _head_rules:
        for head in rule(model):
            yield from head.modules()


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an instance of `nn.Linear` or of another class that has an adapted form, unless
    it is a convolution."""
    return isinstance(module, tuple(plain for plain, own in _adapted_classes.items() if own.in_all))


def _adaptable(module: nn.Module) -> bool:
    """Whether the module is a linear layer or a convolution, adaptable or not: a target that names one means
    it."""
    return isinstance(module, (*_adapted_classes, _ConvNd))


def _unfit(module: nn.Module) -> str | None:
    """The reason why a module cannot be adapted in place, or None."""
    kind = type(module).__name__
    if not isinstance(module, tuple(_adapted_classes)):
        conv = isinstance(module, _ConvNd)
        return f"{kind} is not nn.Conv1d or nn.Conv2d" if conv else f"{kind} is not nn.Linear"
    if type(module) not in _adapted_classes:
        base = next(plain.__name__ for plain in _adapted_classes if isinstance(module, plain))
        return f"{kind} is a subclass of {base} whose behaviour would be lost"
    if hasattr(module, "_hf_hook"):
        return (
            "accelerate has replaced its forward to place or offload it, so an adapter would never run (load "
            "the model without device_map, or call remove_hook_from_module(model, recurse=True) of "
            "accelerate.hooks)"
        )
    if "forward" in vars(module):
        return "its forward has been replaced on the instance, so an adapter would never run"
    return _adapted_class(module).unfit(module)


def _adapted_class(module: nn.Module) -> type[AdaptedLinear]:
    """The class that a module becomes: by the class of its weight where that decides, else by its own."""
    kind = _weight_classes.get((type(module), type(module._parameters.get("weight"))))
    return _adapted_classes[type(module)] if kind is None else kind


def _match(model: nn.Module, candidate: Candidate, config: LoRAConfig) -> Match:
    name, module, part = candidate.name, candidate.module, candidate.part
    layout, slices = config.layout, config.slices
    adapted: type[AdaptedLinear]
    if part is None:
        adapted = _adapted_class(module)
        in_features, out_features = adapted.features(module)
        if slices is not None and layout is None:
            layout = known_layout(model, name)
    else:
        adapted, in_features, out_features = part.adapted, part.in_features, part.out_features
        slices = None if part.segment is not None else slices
        layout = part.layout if layout is None else layout
    owner, *own = candidate.names
    names = dict.fromkeys((name, *own, owner))
    alpha = config.alpha_of(*names)
    try:
        adapters = plan_slices(out_features, config.rank_of(*names), alpha, slices, layout)
    except LayoutError as error:
        hint = "; layers with another layout need their own call of inject"
        if layout is None:
            parent = module if part is not None else next(ancestors(model, name), (model, ""))[0]
            hint = suggestion(parent, in_features, out_features, slices or ())
        raise LayoutError(f"{name or 'model'}: {error}{hint}. Nothing was changed") from None
    return Match(name, module, adapted, in_features, adapters, alpha, part)


def known_layout(model: nn.Module, name: str) -> QKVLayout | None:
    """The layout of the layer called `name` by the registered rules, or None."""
    layouts = (rule(parent, child) for parent, child in ancestors(model, name) for rule in _layout_rules)
    return next((layout for layout in layouts if layout is not None), None)


def ancestors(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name of the layer in it) and (grandparent, path of two names) for the layer called `name`;
    some projections share a wrapper with their norm."""
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


def linear_maps(model: nn.Module) -> Iterator[str]:
    """The names of the layers of a model that may be adapted, and of the parts of modules."""
    for name, module in model.named_modules():
        if is_linear(module):
            yield name
        elif not isinstance(module, LoRAPart):
            yield from (f"{name}.{part.name}".lstrip(".") for part in parts_of(module))


def _available(model: nn.Module) -> str:
    names, convs = list(linear_maps(model)), _convolutions(model)
    text = f"nn.Linear layers of the model: {shorten(names)}" if names else "the model has no nn.Linear"
    return f"{text}; convolutions, which names select: {shorten(convs)}" if convs else text


def _convolutions(model: nn.Module) -> list[str]:
    """The names of the convolutions that can be adapted."""
    return [n for n, module in model.named_modules() if isinstance(module, _ConvNd) and not _unfit(module)]


def _nothing_matched(model: nn.Module, config: LoRAConfig, skipped: dict[str, list[str]]) -> str:
    targets = config.target_modules or ()
    kinds = "nn.Linear" if targets == ALL_LINEAR else "nn.Linear or convolution"
    message = f"target_modules: no {kinds} matches {targets if isinstance(targets, str) else list(targets)!r}"
    if config.exclude_modules is not None:
        message += f" outside exclude_modules={config.exclude_modules!r}"
    names = [*linear_maps(model), *_convolutions(model)]
    known = dict.fromkeys(part for name in names for part in (name, name.rpartition(".")[2]))
    asked = [targets] if isinstance(targets, str) else list(targets)
    close = [guess for target in asked for guess in difflib.get_close_matches(target, known, n=2)]
    if close:
        message += f" (did you mean {' or '.join(map(repr, dict.fromkeys(close)))}?)"
    for reason, which in skipped.items():
        message += f"; {shorten(which)}: {reason}"
        if reason == HEAD:
            message += f" (target_modules={which[:MAX_NAMES]!r} adapts it all the same)"
    convs = [name for name, module in model.named_modules() if isinstance(module, _ConvNd)]
    if targets == ALL_LINEAR and convs:
        message += f"; {ALL_LINEAR!r} leaves out convolutions, target_modules can name them: {shorten(convs)}"
    return f"{message}; {_available(model)}"
