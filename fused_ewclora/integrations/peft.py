# SPDX-License-Identifier: Apache-2.0
"""PEFT models on the fused op, and EWC over their layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import checked_merge
from ..distributed.transaction import canonical_name
from ..distributed.wrappers import innermost
from ..errors import TargetError
from ..ewc.controller import EWC
from ..literals import QuantisedMerge
from ..report import Report
from ._library import require
from ._peft_classes import fused_class
from ._peft_layers import FusedPeft
from ._peft_quantised import FusedPeftQuantised, check_without_residuals

require("peft")

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..ewc.options import EWCOptions

from peft.tuners.lora.layer import MultiheadAttention as PeftAttention  # noqa: E402  (after the check)
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

__all__ = ["accelerate_", "attach_ewc", "restore_"]


def accelerate_(peft_model: nn.Module) -> Report:
    """Runs PEFT's LoRA linears and convolutions on the fused op, in place.

    Outputs and gradients equal those of PEFT up to rounding; dropout has the same distribution but uses other
    random numbers. Keys of the state_dict, files, and merging, switching and deleting of adapters are those
    of PEFT. A second call includes layers that were added since; `restore_` undoes it.

    Args:
        peft_model: a `PeftModel`, or any model that contains layers of PEFT.

    Returns:
        A table of the layers, with the reasons for those that stay as they are.

    Raises:
        TargetError: for a model without layers of PEFT.

    Examples:
        >>> import peft
        >>> peft_model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc"]))
        >>> print(fe.integrations.peft.accelerate_(peft_model))
        PEFT's LoRA layers on the fused op
          name  base    adapters  r  scaling  why_not_fused
          fc    Linear  default   2  4        -
        1 of 1 layers run on the fused op
    """
    layers = dict(_tuner_layers(peft_model))
    if not layers:
        raise TargetError(
            "peft_model: expected layers of PEFT, found none; make it with peft.get_peft_model, or call "
            "fe.inject for a plain model"
        )
    skipped = {name: why for name, layer in layers.items() if (why := _unfit(layer)) is not None}
    fused = {name: layer for name, layer in layers.items() if name not in skipped}
    for layer in fused.values():
        kind = fused_class(layer)
        if kind is not None and not isinstance(layer, FusedPeft):
            kind.accelerate_(layer)
    return _report(fused, skipped)


def restore_(peft_model: nn.Module) -> int:
    """Undoes `accelerate_` and `attach_ewc`: all layers run PEFT's own forward again.

    Base weights that an EWC has consolidated stay as they are; an EWC of `attach_ewc` ends.

    Args:
        peft_model: the model.

    Returns:
        The number of layers that were restored.

    Raises:
        TargetError: for quantised layers with a residual, which PEFT's forward would leave out; nothing is
            changed then.

    Examples:
        >>> import peft
        >>> peft_model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc"]))
        >>> _ = fe.integrations.peft.accelerate_(peft_model)
        >>> fe.integrations.peft.restore_(peft_model)
        1
    """
    layers = [module for module in peft_model.modules() if isinstance(module, FusedPeft)]
    check_without_residuals("restore_", layers)
    for layer in layers:
        layer.release_()
    return len(layers)


def attach_ewc(
    peft_model: nn.Module,
    *,
    quantised_merge: QuantisedMerge | None = None,
    **ewc_kwargs: Unpack[EWCOptions],
) -> EWC:
    """Makes an EWC over the LoRA layers of a PEFT model, which run on the fused op from then on.

    Fishers have the module names of the plain model. Consolidation adds scaling B A to the base weights and
    initialises the adapter anew. After that PEFT's adapter file alone no longer describes the model: save it
    with `fe.save_pretrained(path, peft_model, ewc)`, or as a plain model after
    `peft_model.merge_and_unload()`. The model must have exactly one adapter, because consolidation would
    change what other adapters compute.

    Args:
        peft_model: a `PeftModel`, or any model that contains layers of PEFT.
        quantised_merge: as in `LoRAConfig`, for base layers with quantised weights.
        **ewc_kwargs: the arguments of `fe.EWC` other than the model.

    Returns:
        The EWC.

    Raises:
        TargetError: for several adapters, merged ones, or layers that the fused op does not serve.
        ArgumentError: for an unknown quantised_merge.
        EWCLoRAError: the errors of `fe.EWC`; the model is unchanged then, as after the others.

    Examples:
        >>> import peft
        >>> peft_model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc"]))
        >>> ewc = fe.integrations.peft.attach_ewc(peft_model, ewc_lambda=1e7, fisher_mode="batch")
    """
    checked_merge(quantised_merge)
    before = {module for module in peft_model.modules() if isinstance(module, FusedPeft)}
    report = accelerate_(peft_model)
    layers = [module for module in peft_model.modules() if isinstance(module, FusedPeft)]
    try:
        name = _only_adapter(layers, report)
        ewc = EWC(peft_model, **ewc_kwargs)
    except BaseException:
        for layer in set(layers) - before:
            layer.release_()
        raise
    config = getattr(innermost(peft_model), "peft_config", {}).get(name)
    for layer in layers:
        if isinstance(layer, FusedPeftQuantised):
            layer.quantised_merge = quantised_merge
        layer.bound, layer.gaussian = name, getattr(config, "init_lora_weights", True) == "gaussian"
    return ewc


def _only_adapter(layers: list[FusedPeft], report: Report) -> str:
    for name, why in [*report.summary["skipped"].items(), *report.summary["not_fused"].items()]:
        raise TargetError(f"attach_ewc: {name or 'the model'}: {why}; its adapter would be unprotected")
    names = sorted({name for layer in layers for name in layer.lora_A})
    if len(names) != 1:
        raise TargetError(
            f"attach_ewc: consolidation changes the base weights under all adapters; expected one, got "
            f"{names}; delete_adapter the others first"
        )
    if any(layer.merged for layer in layers):
        raise TargetError("attach_ewc: the adapter is merged; call unmerge_adapter() on the PEFT model first")
    return names[0]


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield canonical_name(name), module


def _unfit(layer: Any) -> str | None:
    """The reason why a layer is left to PEFT whichever of its adapters is active, or None."""
    if isinstance(layer, PeftAttention):
        return (
            "PEFT merges the adapters of an nn.MultiheadAttention in every forward, and some versions add "
            "the adapter of its out_proj twice; fe.inject(model, config) adapts the plain model instead"
        )
    fused = fused_class(layer)
    if fused is None:
        kind = type(layer)
        return f"{kind.__module__}.{kind.__qualname__} is not PEFT's LoRA linear, Conv2d or Conv1d"
    if why := fused.base_unfit(layer.base_layer):
        return why
    if layer.lora_A and all(name in layer.lora_variant for name in layer.lora_A):
        return f"its adapters are variants of LoRA ({', '.join(sorted(layer.lora_A))})"
    if layer.lora_A and all(layer.lora_bias.get(name) for name in layer.lora_A):
        return f"its adapters have a bias ({', '.join(sorted(layer.lora_A))})"
    return None


def _report(fused: dict[str, Any], skipped: dict[str, str]) -> Report:
    rows = []
    for name, layer in fused.items():
        pieces = layer.adapter_slices
        rows.append(
            {
                "name": name,
                "base": type(layer.base_layer).__name__,
                "adapters": "+".join(layer.active_names()) or None,
                "r": "+".join(str(piece.r) for piece in pieces) or None,
                "scaling": "+".join(f"{piece.scaling:.4g}" for piece in pieces) or None,
                "why_not_fused": layer.not_fused(),
            }
        )
    not_fused = {row["name"]: row["why_not_fused"] for row in rows if row["why_not_fused"]}
    notes = [f"{len(fused) - len(not_fused)} of {len(fused) + len(skipped)} layers run on the fused op"]
    notes += [f"left to PEFT: {name or '(the model)'}: {why}" for name, why in skipped.items()]
    summary = {"layers": len(fused), "skipped": skipped, "not_fused": not_fused}
    return Report("PEFT's LoRA layers on the fused op", rows, notes, summary)
