# SPDX-License-Identifier: Apache-2.0
"""Export of adapters to PEFT folders and import from them, exactly or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..distributed.transaction import Transaction, canonical_name
from ..errors import CheckpointError, EWCLoRAError, NotExactlyRepresentable, TargetError
from ..layers.adapted import AdaptedLinear
from ..layers.finite import nonfinite
from ..layers.index import put_rows
from ..layers.inject import adapters, check_plain, eject, inject
from ..layers.matching import plan
from .checkpoint import is_changed, trained_tensors
from .files import ADAPTER, ADAPTER_CONFIG, write_plain
from .peft_format import (
    PREFIX,
    as_in_peft,
    model_key,
    peft_config,
    peft_shape,
    rank_and_alpha,
    refuse_foreign,
)

_log = logging.getLogger(__name__)
Planned = tuple[LoRAConfig, float]  # the configuration of one layer, and its exact scale
_LORA_MATRIX = re.compile(r"(.+)\.lora_([AB])$")


def export_peft(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which PEFT loads onto the pretrained model
    without any change of its outputs.

    The adapters on slices of a packed projection become one adapter of the summed rank with a
    block-structured B. Other trained modules are written as modules_to_save. fan_in_fan_out is set when all
    adapted layers store their weight transposed; when only some do, PEFT corrects it by itself.

    Args:
        model: with adapters.
        path: of a folder.

    Raises:
        NotExactlyRepresentable: with the reason (tasks consolidated into the base weights, a learned
            lora_scale, ...); nothing is written then.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> fe.export_peft(model, "adapter")
    """
    layers = {canonical_name(name): layer for name, layer in adapters(model).items()}
    if not layers:
        raise NotExactlyRepresentable(
            "the model has no adapters; call fused_ewclora.inject(model, config) first"
        )
    check_plain(layers, "export_peft", NotExactlyRepresentable)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, float]] = {}
    for name, layer in layers.items():
        lora_a, lora_b, scaling = _whole_layer(name, layer)
        for leaf, matrix in (("lora_A", lora_a), ("lora_B", lora_b)):
            tensors[f"{PREFIX}{name}.{leaf}.weight"] = as_in_peft(layer, leaf, matrix)
        shapes[name] = (lora_a.shape[0], scaling)
    trained = trained_tensors(model, layers)
    config = peft_config(model, layers, trained, shapes)
    tensors |= {f"{PREFIX}{name}": tensor.detach() for name, tensor in trained.items()}
    packed = safetensors.torch.save({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()})
    write_plain(Path(path), {ADAPTER: packed, ADAPTER_CONFIG: json.dumps(config, indent=1).encode()})


@torch.no_grad()
def _whole_layer(name: str, layer: AdaptedLinear) -> tuple[Tensor, Tensor, float]:
    """One A `[R, d_in]`, B `[d_out, R]` and scale that equal all adapters of the layer."""
    if layer.merged:
        raise NotExactlyRepresentable(f"{name}: its adapter is merged; call fe.unmerge(model) first")
    if is_changed(layer):
        raise NotExactlyRepresentable(
            f"{name}: earlier tasks were consolidated into its base weight, which an adapter file does not "
            "contain; use fe.save_pretrained, or fe.eject(model) and save the whole model"
        )
    if layer.composer is not None:
        raise NotExactlyRepresentable(
            f"{name}: applies more than its lora_A and lora_B; end the training with the method's export()"
        )
    pieces = [(piece, a.flatten(1), b.flatten(1)) for piece, a, b in layer.adapter_parameters()]
    scales = {layer.adapter_scale(piece) for piece, _, _ in pieces}
    if any(isinstance(scale, Tensor) for scale in scales) or len(scales) != 1:
        raise NotExactlyRepresentable(f"{name}: its adapters have learned or different scales")
    if len(pieces) == 1 and not pieces[0][0].name:
        return pieces[0][1].detach(), pieces[0][2].detach(), float(scales.pop())
    lora_a = torch.cat([a for _, a, _ in pieces])
    lora_b = lora_a.new_zeros(layer.out_features, lora_a.shape[0])
    column = 0
    for piece, a, b in pieces:
        put_rows(lora_b[:, column : column + a.shape[0]], piece.rows, b)
        column += a.shape[0]
    return lora_a, lora_b, float(scales.pop())


def import_peft(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Inject the adapters of a PEFT folder into a model without adapters, which then computes what PEFT
    computes.

    Args:
        path: of the folder.
        model: without adapters; unchanged when this raises.

    Raises:
        CheckpointError: for files that are missing or malformed, or hold NaN or Inf (in the dtype of the
            model).
        NotExactlyRepresentable: for methods and settings that adapted layers do not support, such as DoRA.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> fe.export_peft(model, "adapter")
        >>> fe.eject(model, merge=False)
        >>> fe.import_peft("adapter", model)
        >>> list(fe.adapters(model))
        ['fc']
    """
    if adapters(model):
        raise CheckpointError(
            "model: expected one without adapters, because the folder determines the adapted layers"
        )
    config, tensors = _read(Path(path))
    refuse_foreign(config)
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = model_key(key)
        if name.endswith((".lora_A", ".lora_B")) and not tensor.is_floating_point():
            raise CheckpointError(
                f"{ADAPTER}: {name}: expected a floating-point tensor, got {tensor.dtype}; nothing was loaded"
            )
        if match := _LORA_MATRIX.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in name:
            raise NotExactlyRepresentable(f"{ADAPTER}: {name} is not lora_A or lora_B of a linear layer")
        else:
            others[name] = tensor
    modules = {canonical_name(name): name for name, _ in model.named_modules()}
    _refuse_attentions(model, pairs)
    plans = {name: _plan(model, modules, name, pair, config) for name, pair in pairs.items()}
    targets = _tensors(model)
    for name, tensor in others.items():
        if name not in targets or targets[name].shape != tensor.shape:
            raise CheckpointError(
                f"{ADAPTER}: {name} {list(tensor.shape)} fits nothing in the model; nothing was loaded"
            )
    _install(model, plans, pairs, others)
    _log.info("import_peft: %d layers from %s", len(plans), path)


def _refuse_attentions(model: nn.Module, names: Iterable[str]) -> None:
    """Raises `NotExactlyRepresentable` for adapters that PEFT has made of an `nn.MultiheadAttention`."""
    named = {canonical_name(name): module for name, module in model.named_modules()}
    owners = (name.partition(".base_layer.")[0] for name in names)
    if found := next((n for n in owners if isinstance(named.get(n), nn.MultiheadAttention)), None):
        raise NotExactlyRepresentable(
            f"{found}: the scale that PEFT gives to its out_proj depends on the version of PEFT (some add "
            "this adapter twice); merge it there with merge_and_unload, and load the whole model. Nothing "
            "was loaded"
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names in files."""
    named = [*model.named_buffers(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
    return {canonical_name(name): tensor for name, tensor in named}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: cannot be read: {error}; nothing was loaded"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: expected an object, got {type(config).__name__}; nothing was loaded"
        )
    try:
        return config, safetensors.torch.load((folder / ADAPTER).read_bytes())
    except Exception as error:  # the parser's own errors are of several unrelated types
        raise CheckpointError(
            f"{folder / ADAPTER}: expected safetensors: {error}; nothing was loaded"
        ) from error


def _plan(
    model: nn.Module,
    modules: Mapping[str, str],
    name: str,
    pair: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> Planned:
    """The configuration and scale of one layer, checked against its tensors."""
    if set(pair) != {"A", "B"} or name not in modules:
        raise CheckpointError(
            f"{ADAPTER}: {name}: expected lora_A and lora_B of a layer of the model; nothing was loaded"
        )
    rank, alpha = rank_and_alpha(config, name)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise CheckpointError(
            f"{ADAPTER_CONFIG}: lora_alpha of {name}: expected a number, got {alpha!r}; nothing was loaded"
        )
    shapes = {letter: list(tensor.shape) for letter, tensor in pair.items()}
    dropout = config.get("lora_dropout", 0.0)
    target = re.escape(modules[name])
    try:
        planned = LoRAConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target)
    except EWCLoRAError as error:
        raise CheckpointError(f"{ADAPTER_CONFIG}: {name}: {error}; nothing was loaded") from None
    try:
        (match,) = plan(model, planned).matches
    except TargetError as error:
        raise NotExactlyRepresentable(f"{name}: {error}") from None
    if why := match.adapted.unlike_peft(match.module):
        raise NotExactlyRepresentable(f"{name}: {why}")
    kernel = match.adapted.kernel_of(match.module)
    matrices = {"A": (rank, match.in_features), "B": (match.adapters[0].row_count, rank)}
    expected = {
        letter: list(peft_shape(kernel, torch.Size(shape), letter == "A"))
        for letter, shape in matrices.items()
    }
    if shapes != expected:
        raise CheckpointError(
            f"{ADAPTER}: {name}: expected shapes {expected}, got {shapes}; nothing was loaded"
        )
    # A rank-stabilised scale need not be a float divided by r, so the scale itself is stored.
    return planned, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _install(
    model: nn.Module,
    plans: Mapping[str, Planned],
    pairs: Mapping[str, Mapping[str, Tensor]],
    others: Mapping[str, Tensor],
) -> None:
    try:
        with Transaction() as change:
            for config, _ in plans.values():
                inject(model, config)
            for name, layer in adapters(model).items():
                (piece,) = layer.adapter_slices
                layer.adapter_slices = (replace(piece, scaling=plans[canonical_name(name)][1]),)
            parameters = _tensors(model)
            values = {
                f"{name}.lora_{letter}": pair[letter] for name, pair in pairs.items() for letter in "AB"
            }
            values |= others
            for name, tensor in values.items():
                change.copy_(parameters[name], tensor.reshape(parameters[name].shape))
            _check_finite({name: parameters[name] for name in values})
            for name in others:
                if isinstance(parameters[name], nn.Parameter):
                    parameters[name].requires_grad_(True)
    except BaseException:
        if adapters(model):
            eject(model, merge=False)
        raise


def _check_finite(values: Mapping[str, Tensor]) -> None:
    """A buffer may hold Inf on purpose, as a mask does."""
    floating = {name: value for name, value in values.items() if value.is_floating_point()}
    bad = nonfinite({name: value for name, value in floating.items() if isinstance(value, nn.Parameter)})
    # NaN is what is not equal to itself.
    bad += [name for name, value in floating.items() if name not in bad and not torch.equal(value, value)]
    if bad:
        raise CheckpointError(
            f"{ADAPTER}: {bad[0]}: expected finite values, got NaN or Inf in the model's "
            f"{values[bad[0]].dtype} ({len(bad)} of {len(values)} tensors); nothing was loaded"
        )
