"""The adapter files in the layout of PEFT where PEFT would compute the same, and one that it refuses where it
would not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ._transaction import canonical_name
from .adapted import AdaptedLinear
from .errors import NotExactlyRepresentable

OWN_TYPE = "FUSED_EWCLORA"  # unknown to PEFT, which raises on it
PREFIX = "base_model.model."
_PEFT_KEY = re.compile(r"\.(lora_[AB])\.weight$")


def disk_key(name: str, adapter: bool, peft: bool) -> str:
    """The key of a tensor of the model in adapter_model.safetensors."""
    if not peft:
        return name
    return f"{PREFIX}{name}.weight" if adapter else f"{PREFIX}{name}"


def model_key(key: str) -> str:
    """The reverse of `disk_key`, also for keys that carry prefixes of wrappers."""
    return _PEFT_KEY.sub(r".\1", canonical_name(key))


def own_config(reason: str) -> dict[str, Any]:
    """An adapter_config.json that PEFT refuses to load."""
    return {"peft_type": OWN_TYPE, "reason": reason}


def exact_alpha(scaling: float, r: int) -> float:
    """The lora_alpha with lora_alpha / r == scaling, bit for bit; raises `NotExactlyRepresentable` when there
    is none."""
    guess = scaling * r
    for alpha in (
        float(round(guess)),
        guess,
        math.nextafter(guess, math.inf),
        math.nextafter(guess, -math.inf),
    ):
        if alpha / r == scaling:
            return int(alpha) if alpha == int(alpha) else alpha
    raise NotExactlyRepresentable(f"scaling {scaling!r} is no number divided by rank {r}")


def _ambiguous(name: str, others: Iterable[str]) -> bool:
    """PEFT matches names in lists as dotted suffixes."""
    return any(other.endswith("." + name) for other in others)


def stock_shapes(layers: Mapping[str, AdaptedLinear]) -> dict[str, tuple[int, float]]:
    """(r, lora_alpha) of each layer; raises `NotExactlyRepresentable` for adapters that PEFT has no form
    for."""
    shapes = {}
    for name, layer in layers.items():
        piece = layer.adapter_slices[0]
        if piece.name or len(layer.adapter_slices) != 1:
            raise NotExactlyRepresentable(f"{name} has adapters on slices of its rows")
        if piece.scale_name in layer._parameters:
            raise NotExactlyRepresentable(f"{name} has a learned lora_scale")
        shapes[name] = (piece.r, exact_alpha(piece.scaling, piece.r))
    return shapes


def peft_config(
    model: nn.Module,
    layers: Mapping[str, AdaptedLinear],
    extras: Iterable[str],
    shapes: Mapping[str, tuple[int, float]],
) -> dict[str, Any]:
    """adapter_config.json of stock PEFT for adapters of these (r, lora_alpha) and other trained tensors;
    raises `NotExactlyRepresentable` with the reason when PEFT would compute something else."""
    first = next(iter(layers.values()))
    if any(layer.lora_dropout != first.lora_dropout for layer in layers.values()):
        raise NotExactlyRepresentable("layers differ in lora_dropout")
    r, alpha = shapes[next(iter(layers))]
    modules = [canonical_name(name) for name, _ in model.named_modules()]
    if any(_ambiguous(name, modules) for name in layers):
        targets: Any = "|".join(re.escape(name) for name in layers)  # a string is matched in full
    else:
        targets = list(layers)
    patterned = [name for name in layers if shapes[name] != (r, alpha)]
    if any(_ambiguous(name, layers) for name in patterned):
        raise NotExactlyRepresentable(
            "ranks differ between layers of which one's name is a suffix of another's"
        )
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "target_modules": targets,
        "rank_pattern": {re.escape(name): shapes[name][0] for name in patterned},
        "alpha_pattern": {re.escape(name): shapes[name][1] for name in patterned},
        "modules_to_save": _modules_to_save(model, extras),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _modules_to_save(model: nn.Module, extras: Iterable[str]) -> list[str] | None:
    """Whole modules that own all the other trained parameters; PEFT saves modules, not parameters."""
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
            raise NotExactlyRepresentable(f"of {name or 'the model'} only some parameters are trained")
        if any(other != name and other.endswith(name) for other in modules):
            raise NotExactlyRepresentable(f"{name} is trained and its name is the end of another module's")
    return names or None
