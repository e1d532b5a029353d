# SPDX-License-Identifier: Apache-2.0
"""The layouts of adapter files: PEFT's own where PEFT would compute the same, and one that PEFT refuses to
load where it would not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.transaction import canonical_name
from ..errors import CheckpointError, NotExactlyRepresentable
from ..layers.adapted import AdaptedLinear
from ..layers.bypass import parents_of, replaced_parent

OWN_TYPE = "FUSED_EWCLORA"  # unknown to PEFT, which therefore raises
PREFIX = "base_model.model."
_PEFT_KEY = re.compile(r"\.(lora_[AB])\.weight$")


def disk_key(name: str, adapter: bool, peft: bool) -> str:
    """The key of a tensor of the model in adapter_model.safetensors."""
    if not peft:
        return name
    return f"{PREFIX}{name}.weight" if adapter else f"{PREFIX}{name}"


def model_key(key: str) -> str:
    """The inverse of `disk_key`; it also removes the prefixes of wrappers."""
    return _PEFT_KEY.sub(r".\1", canonical_name(key))


def peft_shape(kernel: tuple[int, ...], matrix: torch.Size, is_a: bool) -> tuple[int, ...]:
    """The shape that PEFT gives to a lora_A or lora_B of this shape: those of convolutions are kernels."""
    if not kernel:
        return tuple(matrix)
    if is_a:
        return (matrix[0], matrix[1] // math.prod(kernel), *kernel)
    return (*matrix, *(1 for _ in kernel))


def as_in_peft(layer: AdaptedLinear, leaf: str, tensor: Tensor) -> Tensor:
    """A parameter of a layer, called `leaf`, as PEFT has it."""
    kernel = layer.kernel_of(layer)
    if not kernel:
        return tensor
    matrix = tensor.flatten(1)
    return matrix.reshape(peft_shape(kernel, matrix.shape, leaf.startswith("lora_A")))


def own_config(reason: str) -> dict[str, Any]:
    """An adapter_config.json that PEFT refuses to load."""
    return {"peft_type": OWN_TYPE, "reason": reason}


def exact_alpha(scaling: float, divisor: float) -> float:
    """The lora_alpha with lora_alpha / divisor == scaling, bit for bit; raises `NotExactlyRepresentable` when
    there is none."""
    guess = scaling * divisor
    for alpha in (
        float(round(guess)),
        guess,
        math.nextafter(guess, math.inf),
        math.nextafter(guess, -math.inf),
    ):
        if alpha / divisor == scaling:
            return int(alpha) if alpha == int(alpha) else alpha
    raise NotExactlyRepresentable(f"scaling {scaling!r} is not a float divided by {divisor!r}")


def _alphas(scales: Mapping[str, tuple[int, float]]) -> tuple[dict[str, float], bool]:
    """lora_alpha of each layer, and whether PEFT must divide it by sqrt(r) instead of r to get the scales."""
    try:
        return {name: exact_alpha(scaling, r) for name, (r, scaling) in scales.items()}, False
    except NotExactlyRepresentable as error:
        try:
            return {name: exact_alpha(scaling, math.sqrt(r)) for name, (r, scaling) in scales.items()}, True
        except NotExactlyRepresentable:
            raise error from None


def _ambiguous(name: str, others: Iterable[str]) -> bool:
    """Whether the name, which PEFT matches as a dotted suffix, is the end of another one."""
    return any(other.endswith("." + name) for other in others)


def _pattern(name: str, layers: Iterable[str]) -> str:
    """A key of rank_pattern that matches this layer only: anchored where the name is a suffix of another."""
    return ("^" if _ambiguous(name, layers) else "") + re.escape(name)


def stock_shapes(layers: Mapping[str, AdaptedLinear]) -> dict[str, tuple[int, float]]:
    """(r, scaling) of each layer; raises `NotExactlyRepresentable` for adapters that PEFT does not have."""
    shapes = {}
    for name, layer in layers.items():
        if len(layer.adapter_slices) != 1 or layer.adapter_slices[0].name:
            raise NotExactlyRepresentable(f"{name} has several adapters, or one on slices of its rows")
        piece = layer.adapter_slices[0]
        if layer.composer is not None:
            raise NotExactlyRepresentable(f"{name} applies more than its lora_A and lora_B")
        if piece.scale_name in layer._parameters:
            raise NotExactlyRepresentable(f"{name} has a learned lora_scale")
        shapes[name] = (piece.r, piece.scaling)
    return shapes


def peft_config(
    model: nn.Module,
    layers: Mapping[str, AdaptedLinear],
    extras: Iterable[str],
    shapes: Mapping[str, tuple[int, float]],
) -> dict[str, Any]:
    """The adapter_config.json of PEFT for adapters with these (r, scaling) and for the other trained tensors;
    raises `NotExactlyRepresentable` with the reason when PEFT would compute something else."""
    parents = parents_of(model)
    for name, layer in layers.items():
        if layer.is_part:
            raise NotExactlyRepresentable(
                f"{name}: its weight, {layer.weight_name(name)}, is that of another module, for which PEFT "
                "has no adapter that computes the same in every version"
            )
        if kind := replaced_parent(parents.get(layer, ())):
            raise NotExactlyRepresentable(
                f"{name}: {kind} uses its weight without calling it, and PEFT's adapter would have no effect"
            )
    for name, layer in layers.items():
        if why := layer.unlike_peft(layer):
            raise NotExactlyRepresentable(f"{name}: {why}")
    first = next(iter(layers.values()))
    if any(layer.dropout_p != first.dropout_p for layer in layers.values()):
        raise NotExactlyRepresentable("the layers have different dropout probabilities")
    alphas, stabilised = _alphas(shapes)
    plain = {name: (shapes[name][0], alphas[name]) for name in layers}
    r, alpha = plain[next(iter(layers))]
    transposed = {layer.transposed for layer in layers.values()}
    modules = [canonical_name(name) for name, _ in model.named_modules()]
    if any(_ambiguous(name, modules) for name in layers):
        targets: Any = "|".join(re.escape(name) for name in layers)  # a string must match the whole name
    else:
        targets = list(layers)
    patterns = {name: _pattern(name, layers) for name in layers if plain[name] != (r, alpha)}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout_p,
        "target_modules": targets,
        "rank_pattern": {pattern: plain[name][0] for name, pattern in patterns.items()},
        "alpha_pattern": {pattern: plain[name][1] for name, pattern in patterns.items()},
        "modules_to_save": _modules_to_save(model, extras),
        "use_rslora": stabilised,
        "bias": "none",
        "fan_in_fan_out": transposed == {True},
        "init_lora_weights": True,
    }


def _modules_to_save(model: nn.Module, extras: Iterable[str]) -> list[str] | None:
    """The modules that consist of the other trained parameters; PEFT saves modules, not parameters."""
    wanted = set(extras)
    names = sorted({name.rpartition(".")[0] for name in wanted})
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    for name in names:
        owned = (
            {f"{name}.{tensor}" for tensor in modules[name].state_dict()}
            if name in modules and name
            else set()
        )
        if not owned or not owned <= wanted or isinstance(modules[name], AdaptedLinear):
            raise NotExactlyRepresentable(f"only some parameters of {name or 'the model'} are trained")
        if any(other != name and other.endswith(name) for other in modules):
            raise NotExactlyRepresentable(
                f"{name} is trained, and its name is the end of the name of another module"
            )
    return names or None


# Keys of adapter_config.json that do not affect the computation, or only say which tensors the file holds.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_USED = {
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
}  # fmt: skip
_DEFAULT = 8  # of r and of lora_alpha in PEFT
# Initialisations that do not change the base weights. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) do, and
# PEFT changes the base weights again when it loads such a file.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def refuse_foreign(config: Mapping[str, Any]) -> None:
    """Raises `NotExactlyRepresentable` for methods and settings of PEFT that an adapted linear layer does not
    support, unknown ones included."""
    if config.get("peft_type") != "LORA":
        raise NotExactlyRepresentable(f"peft_type={config.get('peft_type')!r}; expected 'LORA'")
    if (init := config.get("init_lora_weights", True)) not in _INITS:
        raise NotExactlyRepresentable(
            f"init_lora_weights={init!r} changed the base weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which turns it into a plain one"
        )
    for key, value in config.items():
        if key not in _HARMLESS | _USED and value not in (None, False, "none", [], {}):
            raise NotExactlyRepresentable(f"{key}={value!r} is not supported by a plain LoRA layer")


def rank_and_alpha(config: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """r and lora_alpha of a layer by PEFT's rules, not yet validated."""
    r = _pattern_value(config.get("rank_pattern"), name, config.get("r", _DEFAULT))
    alpha = _pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", _DEFAULT))
    return r, alpha


def _pattern_value(patterns: Any, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the whole name or its end after a dot, as in PEFT."""
    if not isinstance(patterns or {}, Mapping):
        raise CheckpointError(
            f"adapter_config.json: expected a table of patterns, got {type(patterns).__name__}; nothing was "
            "loaded"
        )
    for pattern, value in (patterns or {}).items():
        try:
            match = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise CheckpointError(
                f"adapter_config.json: {pattern!r} is no pattern: {error}; nothing was loaded"
            ) from None
        if match:
            return value
    return default
