# SPDX-License-Identifier: Apache-2.0
"""Injection, merging and removal of adapters; the class of each linear layer is swapped in place."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..config import LoRAConfig
from ..distributed.processes import sharded
from ..errors import EWCLoRAError, TargetError, warn
from ..report import Report
from . import bypass, freezing
from .adapted import AdaptedLinear
from .from_peft import check_no_peft, checked_config, no_adapters
from .grouping import abbreviated, grouped_rows
from .matching import Plan, plan, shorten
from .memory import check_loaded, shared_weights, weights_of
from .parts import Part
from .quantised import QuantisedLinear, warn_of_rounding

_log = logging.getLogger(__name__)


def adapters(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Every adapted layer by its dotted name; a shared layer appears once.

    Args:
        model: with adapters or without.

    Returns:
        The layers, in the order of the model; empty without adapters.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> list(fe.adapters(model))
        ['fc']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def inject(model: nn.Module, config: LoRAConfig | Any) -> Report:
    """Adapt matching layers of `model` in place and freeze all but adapters.

    Only the first injection freezes. Further ones, into the same model or a part of it, adapt other layers
    and change `requires_grad` of these alone. `modules_to_save` of the configuration are trainable
    afterwards; the table lists output heads that are frozen, with the line that lets them train.

    Names are matched as in PEFT. `"all-linear"` leaves out the head that `get_output_embeddings()` or
    `get_classifier()` returns, the last layer of the classifier in torchvision models and, in transformers
    models, every layer outside of the base model; in a model without any of these it selects every layer. The
    keys of the base state_dict do not change. Parents that are known to bypass a layer are set to call it,
    and the table says so. Nothing is changed when this raises.

    Args:
        model: with layers that the configuration selects.
        config: a `LoRAConfig`, or a `peft.LoraConfig`, which is taken where it means the same.

    Returns:
        A printable table of the adapted layers.

    Raises:
        TargetError: when nothing matches, or a match is adapted already or not adaptable.
        LayoutError: for slices without a layout that fits.
        DtypeError: for another configuration.
        NotExactlyRepresentable: for a configuration of PEFT that means something else.

    Examples:
        >>> report = fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc"]))
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['fc.lora_A', 'fc.lora_B']
    """
    check_no_peft(model)
    config = checked_config(config, model)
    planned = plan(model, config)
    weights = {match.name: (match.weight_name, match.weight) for match in planned.matches}
    check_loaded(model, weights)
    if shared := shared_weights(model, weights):
        text = next(iter(shared.values()))
        warn(f"{text}; training works, but merging and consolidation will raise")
    adopted: list[AdaptedLinear] = []
    try:
        for match in planned.matches:
            adopted.append(match.adopt_(config.lora_dropout))
            if isinstance(adopted[-1], QuantisedLinear):
                adopted[-1].quantised_merge = config.quantised_merge
    except BaseException:
        for layer in adopted:
            layer.release_()
        raise
    bypass.apply_(planned.bypass_fixes)
    freezing.freeze_(model, adopted)
    freezing.thaw_(planned.saved.values())
    report = _report(model, planned)
    _log_injection(report)
    return report


def eject(model: nn.Module, merge: bool = True) -> None:
    """Restore the plain classes in place; the adapters are folded in or dropped.

    Afterwards the state_dict keys are those of the base model, and the parameters that injection froze
    require gradients again.

    Args:
        model: with adapters.
        merge: True folds the adapters in, False drops them.

    Raises:
        TargetError: without adapters or when a tied weight cannot be merged; nothing is changed then.
        ArgumentError: when a merged weight is not finite; nothing is changed then.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> fe.eject(model)
        >>> type(model.fc).__name__
        'Linear'
    """
    layers = _adapted(model)
    check_plain(layers, "eject")
    _check_whole(layers)
    for name, layer in layers.items():
        if why := layer.not_ejectable(merge):
            raise TargetError(f"eject: {name or 'model'}: {why}. Nothing was changed")
    if merge:
        _merge(model, layers, "eject")
    else:
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
    for layer in layers.values():
        layer.release_()
    bypass.undo_(model)
    freezing.undo_(model)
    _log.info("eject: %d layers are plain again, adapters %s", len(layers), "merged" if merge else "dropped")


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what its base weights compute without adapters.

    Merged adapters are unmerged on entry and merged again on exit. Blocks can be nested. The state of every
    layer is restored on exit, even after an exception.

    Args:
        model: with adapters.

    Yields:
        Nothing.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> with fe.disabled(model):
        ...     base = model(x)
    """
    named = adapters(model)
    layers = list(named.values())
    if any(layer.merged for layer in layers):
        check_plain(named, "disabled")
    before = [(layer, layer.adapters_enabled, layer.merged) for layer in layers]
    try:
        for layer in layers:
            if layer.merged:
                layer.unmerge()
            layer.adapters_enabled = False
        yield
    finally:
        for layer, enabled, merged in before:
            layer.adapters_enabled = enabled
            if merged:
                layer.merge()


def merge(model: nn.Module) -> None:
    """`W <- W + B diag(s) A` in every adapted layer (fp32 sum, one rounding; docs/mathematics.md, section 4),
    after which inference costs as much as with the base model.

    The replaced rows are kept for `unmerge`. If the adapters are already merged, this warns and does nothing,
    as in PEFT.

    Args:
        model: with adapters.

    Raises:
        TargetError: without adapters or on tied weights; no layer is changed then.
        ArgumentError: when a sum is not finite; no layer is changed then.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> fe.merge(model)
        >>> fe.unmerge(model)
    """
    layers = _adapted(model)
    if all(layer.merged for layer in layers.values()):
        warn("merge: the adapters are merged already; nothing was done")
        return
    _merge(model, layers, "merge")


def unmerge(model: nn.Module) -> None:
    """Restore the rows that `merge` replaced, bit for bit.

    If the adapters are not merged, this warns and does nothing, as in PEFT.

    Args:
        model: with adapters.

    Raises:
        TargetError: without adapters.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> fe.merge(model)
        >>> fe.unmerge(model)
    """
    layers = _adapted(model)
    if not any(layer.merged for layer in layers.values()):
        warn("unmerge: the adapters are not merged; nothing was done")
    check_plain(layers, "unmerge")
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()


def _merge(model: nn.Module, layers: dict[str, AdaptedLinear], action: str) -> None:
    check_mergeable(model, action)
    _check_whole(layers)
    done: list[AdaptedLinear] = []
    for name, layer in layers.items():
        if layer.merged:
            continue
        try:
            layer.merge()
        except BaseException as error:
            for other in done:
                other.unmerge()
            if isinstance(error, EWCLoRAError):
                raise type(error)(f"{name or 'model'}: {error}") from None
            raise
        done.append(layer)
    warn_of_rounding(action, layers)
    if action != "eject":
        _log.info("%s: the adapters of %d layers are part of their weights", action, len(done))


def _check_whole(layers: Mapping[str, AdaptedLinear]) -> None:
    if names := sharded(layers):
        raise TargetError(
            f"{names[0]}: expected whole parameters, got some that are sharded over processes; call "
            "save_pretrained(path, model) and load the checkpoint in one process"
        )


def _adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    layers = adapters(model)
    if not layers:
        raise TargetError(no_adapters(model))
    return layers


def check_plain(
    layers: Mapping[str, AdaptedLinear], action: str, error: type[EWCLoRAError] = TargetError
) -> None:
    """Raises `error` naming the first layer whose weight, bias or adapters are no longer the plain parameters
    that it was given; `action` cannot work on others."""
    for name, layer in layers.items():
        if why := layer.not_plain():
            raise error(
                f"{action}: {name or 'model'}: {why}, or apply it after fe.eject(model). Nothing was changed"
            )


def check_mergeable(model: nn.Module, action: str = "merge") -> None:
    """Raises `TargetError` when the weight of an adapted layer cannot be rewritten: it is not a plain
    parameter, holds no numbers, or shares its memory with another tensor, which would change too."""
    layers = adapters(model)
    check_plain(layers, action)
    for name, layer in layers.items():
        if why := layer.not_writable():
            raise TargetError(f"{action}: {name or 'model'}: {why}. Nothing was changed")
    if shared := shared_weights(model, weights_of(layers)):
        text = next(iter(shared.values()))
        raise TargetError(f"{action}: {text}, and would change with it. Nothing was changed")


def _report(model: nn.Module, planned: Plan) -> Report:
    entries = list(_rows(planned))
    table = abbreviated((row for _, row in entries), "adapters", ("adapter_params",))
    rows = grouped_rows(entries, ("adapter_params",))
    total = _count(p for p in model.parameters())
    trainable = _count(p for p in model.parameters() if p.requires_grad)
    share = trainable / total
    notes = [
        f"trainable: {trainable:,} of {total:,} parameters ({share:.3%}) in {len(planned.matches)} layers"
    ]
    notes += [f"skipped: {shorten(names)} ({reason})" for reason, names in planned.skipped.items()]
    for setting, (parents, children) in _changed_parents(planned).items():
        kept = "so that calls leave it as it is"
        reason = kept if "" in children else f"or {shorten(children)} would never be called"
        notes.append(f"set on {shorten(parents)}: {setting}, {reason}; eject restores the old value")
    heads = freezing.frozen_heads(model)
    if heads:
        notes.append(f"frozen heads: {shorten(heads)}; to train them: {freezing.thawing_line(heads)}")
    if planned.saved:
        notes.append(f"trainable, modules_to_save: {shorten(planned.saved)}")
    for argument, names in (("target_modules", planned.unmatched), ("modules_to_save", planned.unsaved)):
        if names:
            notes.append(f"{argument} that match nothing: {shorten(names)}")
    summary = {
        "layers": len(planned.matches),
        "trainable": trainable,
        "total": total,
        "trainable_share": share,
    }
    skipped = {name: reason for reason, names in planned.skipped.items() for name in names}
    fixes: dict[str, dict[str, Any]] = {}
    for fix in planned.bypass_fixes:
        fixes.setdefault(fix.name, {}).update(bypass.plain_settings(fix.settings))
    lists = {
        "skipped": skipped,
        "bypass_fixes": fixes,
        "mended": fixes,  # what earlier versions call it
        "unmatched": list(planned.unmatched),
        "frozen_heads": heads,
        "modules_to_save": list(planned.saved),
    }
    return Report("LoRA adapters", rows, notes, {**summary, **lists}, table)


def _log_injection(report: Report) -> None:
    found = report.summary
    text = "inject: adapters in %d layers, %d of %d parameters trainable"
    _log.info(text, found["layers"], found["trainable"], found["total"])
    for name, settings in found["bypass_fixes"].items():
        _log.info("inject: set on %s: %s", name or "the model", settings)
    for name, reason in found["skipped"].items():
        _log.debug("inject: skipped %s: %s", name, reason)


def _rows(planned: Plan) -> Iterator[tuple[Part | None, dict[str, Any]]]:
    """One row per adapter."""
    for match in planned.matches:
        for adapter in match.adapters:
            yield (
                match.part,
                {
                    "name": match.name + (f" [{adapter.name}]" if adapter.name else ""),
                    "class": match.adapted.__name__,
                    "rows": _rows_text(adapter.rows),
                    "in_features": match.in_features,
                    "r": adapter.r,
                    "scaling": adapter.scaling,
                    "adapter_params": adapter.r * (match.in_features + adapter.row_count),
                },
            )


def _changed_parents(planned: Plan) -> dict[str, tuple[dict[str, None], dict[str, None]]]:
    """Setting -> the names of the parents that it is set on, and those of the layers in them."""
    parents: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for fix in planned.bypass_fixes:
        for attribute, value in fix.settings.items():
            text = bypass.settings_text({attribute: value})
            names, children = parents.setdefault(text, ({}, {}))
            names[fix.name] = children[fix.child] = None
    return parents


def _rows_text(rows: tuple[tuple[int, int], ...]) -> str:
    text = ", ".join(f"{start}:{stop}" for start, stop in rows[:2])
    return text + (f", ... ({len(rows)} ranges)" if len(rows) > 2 else "")


def _count(parameters: Iterator[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
