# SPDX-License-Identifier: Apache-2.0
"""PEFT's models and configurations where ours are expected; they are known by their classes' names, so that
PEFT is not imported."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import ALL_LINEAR, LoRAConfig, Targets, matches
from ..errors import DtypeError, NotExactlyRepresentable, TargetError

ACCELERATE = "fused_ewclora.integrations.peft.accelerate_(peft_model)"
ATTACH = "fused_ewclora.integrations.peft.attach_ewc(peft_model, ewc_lambda=...)"

# Fields of peft.LoraConfig that `_converted` maps, and those that do not affect what the layers compute. The
# rest must have PEFT's defaults.
_MAPPED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
    "modules_to_save",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "peft_type", "peft_version", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
# What PEFT adds to modules_to_save for a task, where the model has it.
_CLASSIFIERS = ("classifier", "score")
_HEADS = {"SEQ_CLS": _CLASSIFIERS, "TOKEN_CLS": _CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}


def _classes(value: object) -> Iterator[str]:
    """The names of the classes of an object that PEFT defines."""
    return (cls.__name__ for cls in type(value).__mro__ if cls.__module__.split(".")[0] == "peft")


def has_peft_layers(model: nn.Module) -> bool:
    """Whether PEFT has wrapped the model or some of its layers."""
    known = {"PeftModel", "BaseTuner", "BaseTunerLayer"}
    return any(not known.isdisjoint(_classes(module)) for module in model.modules())


def check_no_peft(model: nn.Module) -> None:
    """Raises `TargetError` for a model that has adapters of PEFT."""
    if has_peft_layers(model):
        raise TargetError(
            f"model: expected a plain model, got one with adapters of PEFT; {ACCELERATE} runs these on the "
            f"fused op, {ATTACH} makes an EWC over them, and peft_model.unload() gives the plain model. "
            "Nothing was changed"
        )


def no_adapters(model: nn.Module) -> str:
    """What to say of a model without adapters of ours."""
    if has_peft_layers(model):
        return f"model: its adapters are those of PEFT; call {ATTACH}, or {ACCELERATE} without an EWC"
    return "model: expected adapters, found none; call fused_ewclora.inject(model, config) first"


def checked_config(config: object, model: nn.Module) -> LoRAConfig:
    """`config` itself, or the same as a LoRAConfig if it is a `peft.LoraConfig`.

    Raises `DtypeError` for anything else and `NotExactlyRepresentable` for settings of PEFT that `inject`
    does not have.
    """
    if isinstance(config, LoRAConfig):
        return config
    if next(_classes(config), None) == "LoraConfig":
        return _converted(config, model)
    raise DtypeError(f"config: expected a LoRAConfig, got {type(config).__module__}.{type(config).__name__}")


def _converted(config: Any, model: nn.Module) -> LoRAConfig:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        if field.name not in _MAPPED | _HARMLESS and value != default and (value or default):
            raise NotExactlyRepresentable(
                f"config: {field.name}={value!r} of peft.LoraConfig is not what inject makes; call "
                f"peft.get_peft_model(model, config), then {ACCELERATE} or {ATTACH}. Nothing was changed"
            )
    converted = LoRAConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_names(config.target_modules),
        exclude_modules=_names(config.exclude_modules),
        rank_pattern=config.rank_pattern or None,
        alpha_pattern=config.alpha_pattern or None,
        modules_to_save=_modules_to_save(config, model),
    )
    return _with_attentions(converted, model)


def _with_attentions(config: LoRAConfig, model: nn.Module) -> LoRAConfig:
    """The configuration that adapts what PEFT adapts of every `nn.MultiheadAttention`: both projections of
    one that is a target, with the values for its own name, and with "all-linear" no input projection."""
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    targets, excluded = config.target_modules, config.exclude_modules
    if not names or targets is None:
        return config
    if targets == ALL_LINEAR:
        return replace(config, exclude_modules=_either(excluded, [f"{name}.in_proj" for name in names]))
    found = [n for n in names if matches(targets, n) and not (excluded and matches(excluded, n))]
    if not found:
        return config
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in found:
        _check_attention(name, modules[name], config)
        own = rf"^{re.escape(name)}\.(in|out)_proj"
        ranks[own], alphas[own] = config.rank_of(name), config.alpha_of(name) or 0.0
    return replace(
        config,
        target_modules=_either(targets, [f"{name}.out_proj" for name in found]),
        rank_pattern={**ranks, **(config.rank_pattern or {})},
        alpha_pattern={**alphas, **(config.alpha_pattern or {})},
    )


def _check_attention(name: str, attention: nn.Module, config: LoRAConfig) -> None:
    """Raises `NotExactlyRepresentable` for an attention that PEFT does not adapt as inject would."""
    excluded = [
        leaf
        for leaf in ("in_proj", "out_proj")
        if config.exclude_modules is not None and matches(config.exclude_modules, f"{name}.{leaf}")
    ]
    if excluded:
        what = f"exclude_modules for its {excluded[0]} alone"
    elif config.lora_dropout:
        what = f"lora_dropout={config.lora_dropout}"
    elif not attention._qkv_same_embed_dim:
        what = "weights of their own for q, k and v"
    else:
        return
    raise NotExactlyRepresentable(
        f"{name}: expected what PEFT applies to an nn.MultiheadAttention, got {what}; give inject a "
        "LoRAConfig. Nothing was changed"
    )


def _either(targets: Targets | None, names: list[str]) -> str:
    """A regular expression for what `targets` select, and for these whole names."""
    if targets is None or isinstance(targets, str):
        given = [] if targets is None else [f"(?:{targets})"]
    else:
        given = [rf"(?:.*\.)?{re.escape(target)}" for target in targets]
    return "|".join([*given, *map(re.escape, names)])


def _names(value: Any) -> Any:
    """PEFT keeps names as a set, whose order differs between processes."""
    return value if value is None or isinstance(value, str) else tuple(sorted(value)) or None


def _modules_to_save(config: Any, model: nn.Module) -> tuple[str, ...] | None:
    task = getattr(config.task_type, "value", config.task_type)
    names = [name for name, _ in model.named_modules()]
    heads = [head for head in _HEADS.get(task, ()) if any(name.endswith(head) for name in names)]
    return tuple(dict.fromkeys([*(config.modules_to_save or ()), *heads])) or None
