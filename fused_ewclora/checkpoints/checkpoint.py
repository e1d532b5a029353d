# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of adapters, consolidated weights and the EWC state, in safetensors and JSON.

A checkpoint is replaced as a whole and loaded as a whole.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown  # shortens values from files, which may be long or deep
from typing import Any

import safetensors.torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.processes import reshard, sharded, together, whole
from ..distributed.transaction import Transaction, by_canonical_name, canonical_name
from ..errors import ArgumentError, CheckpointError, FisherError, NotExactlyRepresentable
from ..ewc.controller import EWC
from ..ewc.state import EWCState
from ..layers.adapted import AdaptedLinear, Updates
from ..layers.finite import nonfinite
from ..layers.from_peft import no_adapters
from ..layers.index import put_rows, take_rows
from ..layers.inject import adapters, check_plain
from ..layers.slices import AdapterSlice, exact_part, fingerprint, fisher_key, same_weights
from . import frozen
from .files import ADAPTER, ADAPTER_CONFIG, MANIFEST, STATE, read_files, write_files
from .peft_format import as_in_peft, disk_key, model_key, own_config, peft_config, stock_shapes

_log = logging.getLogger(__name__)
FORMAT = 1
ROWS = "merged_rows."  # prefix of the keys of base weight rows that consolidation has changed
PART = "#"  # between the name of a layer and a tensor that determines its weight, in such keys
BUFFERS = "buffer."  # prefix of the keys of small buffers
# By layer: its new weight, or the tensors that determine it.
NewWeights = Mapping[str, Tensor | Mapping[str, Tensor]]


def save_pretrained(path: str | os.PathLike[str], model: nn.Module, ewc: EWC | None = None) -> None:
    """Write everything that differs from the pretrained model into the folder `path`; a reader sees either
    the old checkpoint or the new one.

    adapter_model.safetensors and adapter_config.json hold the adapters, all other trained parameters and the
    running statistics. They have PEFT's own layout if PEFT would compute exactly the same, else one that PEFT
    refuses to load. ewc_state.safetensors holds the Fishers, the base weight rows that consolidation has
    changed, and small buffers; ewc_config.json says how the Fishers were estimated and holds the hashes of
    all files, and digests of all base weights and of all other frozen tensors. States of optimizers and of
    random generators are not saved. If the process dies while it writes, the old checkpoint remains readable.
    Processes that save into one folder wait for each other. When the model is sharded every process must call
    this; the first process writes whole tensors, which any number of processes can load.

    Args:
        path: of the folder, which is made if there is none.
        model: with adapters.
        ewc: that of the model, or None for the model alone.

    Raises:
        CheckpointError: while adapters are merged, and when another process holds the folder for minutes.
        ArgumentError: for an EWC of another model.
        OSError: when the files cannot be written.

    Examples:
        >>> import os
        >>> _ = fe.inject(model, config)
        >>> fe.save_pretrained("task1", model, fe.EWC(model))
        >>> "adapter_model.safetensors" in os.listdir("task1")
        True
    """
    reshard(model)
    layers = _layers(model, ewc)
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise CheckpointError(
            f"{merged[0]}: its adapter is merged into the base weight; call fe.unmerge(model) before saving"
        )
    spread = bool(sharded(layers))
    keep = not spread or dist.get_rank() == 0
    trained = trained_tensors(model, layers)
    now = {name: layer.weight_fingerprint() for name, layer in layers.items()}
    changed = [name for name, layer in layers.items() if _differs(layer, now[name])]
    buffers, digests = frozen.split(frozen.outside_tensors(model, layers), trained.values())
    tensors, adapter_config = _adapter_file(model, layers, trained, changed)
    files = {ADAPTER: pack(tensors, keep), ADAPTER_CONFIG: json.dumps(adapter_config, indent=1).encode()}
    state = changed_rows(layers, changed) | {BUFFERS + name: tensor for name, tensor in buffers.items()}
    saved = None if ewc is None else ewc.state_dict()
    if saved is not None:
        state |= saved["tensors"]
    if state:
        files[STATE] = pack(state, keep)
    config = {
        "format": FORMAT,
        "layers": {
            name: {**describe(layer), "weight": exact_part(now[name])} for name, layer in layers.items()
        },
        "frozen": digests,
        "ewc": None if saved is None or ewc is None else saved["config"],
        "ewc_lambda": None if ewc is None else ewc.ewc_lambda,
        "gamma": None if ewc is None else ewc.gamma,
    }
    if spread:
        together(lambda: write_files(Path(path), files, config) if keep else None)
    else:
        write_files(Path(path), files, config)


def load_pretrained(
    path: str | os.PathLike[str], model: nn.Module, ewc: EWC | None = None, strict: bool = True
) -> None:
    """Load a checkpoint into a freshly injected model and its EWC; training then continues bit for bit as if
    it had not been interrupted.

    The model must have been built from the same pretrained weights and injected with the same configuration.
    Prefixes of DDP, torch.compile, FSDP and PEFT in names are ignored. When the model is sharded every
    process must call this. All files are read, hashed and checked before the model is changed. NaN and Inf
    are refused unless the EWC has `check_finite=False`.

    Args:
        path: of the folder.
        model: freshly injected; unchanged when this raises.
        ewc: that of the model, or None for the model alone.
        strict: base weights and all tensors that are not in the checkpoint must have the bits that they had
            when it was saved, which False turns into a warning.

    Raises:
        CheckpointError: naming the file or the tensor, and what to do.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> ewc = fe.EWC(model)
        >>> fe.save_pretrained("task1", model, ewc)
        >>> fe.load_pretrained("task1", model, ewc)
    """
    reshard(model)
    layers = _layers(model, ewc)
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise CheckpointError(
            f"{merged[0]}: its adapter is merged into the base weight; call fe.unmerge(model) before loading"
        )
    read = functools.partial(read_files, Path(path))
    files, config = together(read) if sharded(layers) else read()
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{MANIFEST}: expected format {FORMAT}, got {shown(config.get('format'))}; nothing was loaded"
        )
    others: frozen.Others = []
    tasks = check_layers(layers, config.get("layers"), others)
    values = _values(model, layers, unpack(files, ADAPTER))
    state = unpack(files, STATE) if STATE in files else {}
    rows = _taken(state, ROWS)
    new = _new_weights(layers, rows)
    others += _other_weights(layers, new, config["layers"])
    outside = frozen.outside_tensors(model, layers)
    buffers, unfit = _buffer_updates(outside, _taken(state, BUFFERS))
    held = [target for target, _ in (*values.values(), *buffers)]
    others += unfit + frozen.compare(outside, config.get("frozen"), held)
    frozen.report(others, strict)
    if ewc is None or ewc.check_finite:
        _check_finite({name: value for name, (_, value) in values.items()}, ADAPTER)
        _check_finite(rows, STATE)
    updates = [*values.values(), *_weight_updates(layers, new), *buffers]
    parsed = None if ewc is None else parsed_ewc(ewc, state, config)
    with Transaction() as change:
        for target, value in updates:
            change.copy_(target, value)
        if ewc is not None and parsed is not None:
            ewc.take_over(parsed, change)
    for name, layer in layers.items():
        layer.consolidated_tasks = tasks[name]
    _log.info("load_pretrained: %d layers from %s", len(layers), path)


def _layers(model: nn.Module, ewc: EWC | None) -> dict[str, AdaptedLinear]:
    layers = by_canonical_name(adapters(model).items())
    if not layers:
        raise CheckpointError(no_adapters(model))
    check_plain(layers, "checkpoint", CheckpointError)
    for name, layer in layers.items():
        if saved_by := getattr(layer.composer, "saved_by", None):
            raise CheckpointError(
                f"{name}: its adapters grow with the tasks and are saved and loaded by {saved_by}; to save "
                "the final model, call method.export() and save the whole model"
            )
    if ewc is not None and set(map(id, ewc.layers.values())) != set(map(id, layers.values())):
        raise ArgumentError("ewc: expected the EWC of this model, got one whose layers are others")
    return layers


def _origin(layer: AdaptedLinear) -> str:
    # The stored fingerprint is empty when the layer was injected on the meta device.
    return layer.origin_fingerprint or layer.weight_fingerprint()


def is_changed(layer: AdaptedLinear) -> bool:
    """Whether the base weight is no longer the pretrained one."""
    return layer.consolidated_tasks > 0 or _differs(layer, layer.weight_fingerprint())


def _differs(layer: AdaptedLinear, now: str) -> bool:
    """`is_changed` for a layer whose present weight has the fingerprint `now`."""
    return layer.consolidated_tasks > 0 or not same_weights(now, layer.origin_fingerprint or now)


def changed_rows(layers: Mapping[str, AdaptedLinear], changed: list[str]) -> dict[str, Tensor]:
    """The rows of base weights that consolidation writes, for the layers in `changed`, by key; of a weight
    whose numbers are not stored as such, everything that determines them."""
    found: dict[str, Tensor] = {}
    for name in changed:
        state = layers[name].weight_state()
        if state is not None:
            found |= {f"{ROWS}{name}{PART}{part}": tensor for part, tensor in state.items()}
            continue
        weight = layers[name].whole_weight()
        for piece in layers[name].adapter_slices:
            found[ROWS + fisher_key(name, piece)] = take_rows(weight, piece.rows)
    return found


def _adapters_of(layers: Mapping[str, AdaptedLinear]) -> dict[str, Tensor]:
    return {
        f"{name}.{leaf}": p for name, layer in layers.items() for leaf, p in layer.named_lora_parameters()
    }


def trained_tensors(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> dict[str, Tensor]:
    """Trainable parameters other than the adapters (heads, norms), and running statistics."""
    known = {id(p) for p in _adapters_of(layers).values()}
    trained: dict[str, Tensor] = {
        **by_canonical_name((name, p) for name, p in model.named_parameters() if p.requires_grad)
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            trained |= {
                canonical_name(f"{name}.{key}"): value for key, value in module.named_buffers(recurse=False)
            }
    return {name: tensor for name, tensor in trained.items() if id(tensor) not in known}


def _adapter_file(
    model: nn.Module, layers: Mapping[str, AdaptedLinear], trained: Mapping[str, Tensor], changed: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        if changed:
            raise NotExactlyRepresentable(
                f"tasks were consolidated into the base weight of {changed[0]}, and PEFT would load the "
                "adapter onto the pretrained weight"
            )
        config = peft_config(model, layers, trained, stock_shapes(layers))
    except NotExactlyRepresentable as reason:
        config = own_config(str(reason))
    peft = config["peft_type"] == "LORA"
    tensors = {
        disk_key(f"{name}.{leaf}", True, peft): as_in_peft(layer, leaf, p.detach()) if peft else p
        for name, layer in layers.items()
        for leaf, p in layer.named_lora_parameters()
    }
    tensors |= {disk_key(name, False, peft): tensor for name, tensor in trained.items()}
    return tensors, config


def describe(layer: AdaptedLinear) -> dict[str, Any]:
    """The properties that a layer must have for its present checkpoint to be loaded into it."""
    return {
        "shape": [layer.out_features, layer.in_features],
        "fingerprint": _origin(layer),
        "consolidated_tasks": layer.consolidated_tasks,
        "adapters": [_describe_piece(piece) for piece in layer.adapter_slices],
    }


def _describe_piece(piece: AdapterSlice) -> dict[str, Any]:
    return {
        "name": piece.name,
        "rows": [list(rows) for rows in piece.rows],
        "r": piece.r,
        "scaling": piece.scaling,
    }


def pack(tensors: Mapping[str, Tensor], keep: bool) -> bytes:
    """The contents of a file; empty in a process that does not write it (`keep` is False)."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())  # a collective: every process must call it
        if keep:
            # Copies: safetensors refuses tensors that share storage, as tied heads do.
            copies[name] = full.cpu().clone().contiguous()
    return safetensors.torch.save(copies) if keep else b""


def unpack(files: Mapping[str, bytes], name: str) -> dict[str, Tensor]:
    """The tensors in one of the files; raises `CheckpointError` when they cannot be read."""
    if name not in files:
        raise CheckpointError(
            f"{name}: not listed in {MANIFEST}; the checkpoint is incomplete. Nothing was loaded"
        )
    try:
        return safetensors.torch.load(files[name])
    except Exception as error:  # the parser raises errors of several unrelated types
        raise CheckpointError(f"{name}: expected safetensors: {error}. Nothing was loaded") from error


def check_layers(
    layers: Mapping[str, AdaptedLinear], saved: Any, others: frozen.Others | None = None
) -> dict[str, int]:
    """Check that layers, adapters and pretrained weights are the saved ones; returns the number of
    consolidated tasks of each layer. Other pretrained weights are added to `others` if that is given."""
    if not isinstance(saved, dict) or not all(isinstance(entry, dict) for entry in saved.values()):
        raise CheckpointError(f"{MANIFEST}: expected a table of layers; nothing was loaded")
    saved = {canonical_name(name): entry for name, entry in saved.items()}
    if missing := sorted(set(saved) ^ set(layers)):
        where = "the checkpoint" if missing[0] in saved else "the model"
        raise CheckpointError(
            f"{missing[0]}: adapted in {where} only; inject with the configuration of the checkpoint. "
            "Nothing was loaded"
        )
    for name, layer in layers.items():
        ours = describe(layer)
        for field in ("shape", "adapters"):
            if saved[name].get(field) != ours[field]:
                raise CheckpointError(
                    f"{name}: {field}: the checkpoint has {shown(saved[name].get(field))}, the model "
                    f"{ours[field]}; inject with the same configuration. Nothing was loaded"
                )
        if not same_weights(saved[name].get("fingerprint"), ours["fingerprint"]):
            found = [layer.weight_name(name)]
            if others is None:
                frozen.report(found, strict=True)
            else:
                others += found
        tasks = saved[name].get("consolidated_tasks")
        if isinstance(tasks, bool) or not isinstance(tasks, int) or not 0 <= tasks < 2**63:
            raise CheckpointError(
                f"{MANIFEST}: {name}: expected a number of consolidated tasks; nothing was loaded"
            )
    return {name: saved[name]["consolidated_tasks"] for name in layers}


def _values(
    model: nn.Module, layers: Mapping[str, AdaptedLinear], saved: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(tensor of the model, value) for each one in the adapter file, by canonical name."""
    required = _adapters_of(layers)
    # PEFT keeps a copy of a head for each adapter, all under one name; the trainable one takes precedence.
    by_use = sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[1].requires_grad)
    available: dict[str, Tensor] = {canonical_name(name): p for name, p in by_use}
    available |= {
        canonical_name(name): buffer for name, buffer in model.named_buffers(remove_duplicate=False)
    }
    available |= required
    values = {model_key(key): tensor for key, tensor in saved.items()}
    if missing := sorted(set(required) - set(values)):
        raise CheckpointError(
            f"{ADAPTER}: {missing[0]} is missing ({len(missing)} in all); nothing was loaded"
        )
    if foreign := sorted(set(values) - set(available)):
        raise CheckpointError(
            f"{ADAPTER}: the model has no {foreign[0]} ({len(foreign)} such tensors); nothing was loaded"
        )
    for name, layer in layers.items():
        for leaf, _ in layer.named_lora_parameters():
            key = f"{name}.{leaf}"
            values[key] = _reshaped(layer, leaf, required[key], values[key])
    for name, value in values.items():
        _same_kind(name, available[name], value, ADAPTER)
    return {name: (available[name], value) for name, value in values.items()}


def _reshaped(layer: AdaptedLinear, leaf: str, target: Tensor, value: Tensor) -> Tensor:
    """A saved parameter, a matrix or as PEFT has it, in the shape of the layer's own."""
    if value.dim() == target.dim() or target.dim() < 2 or not layer.kernel_of(layer):
        return value
    shapes = [tensor.shape for tensor in (target.flatten(1), as_in_peft(layer, leaf, target))]
    return value.reshape(target.shape) if value.shape in shapes else value


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose keys begin with the prefix, which are removed."""
    return {key: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _buffer_updates(
    outside: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> tuple[Updates, frozen.Others]:
    """The buffers that the model has, and the names of the others."""
    updates: Updates = []
    others: frozen.Others = []
    for key, value in saved.items():
        name = canonical_name(key.removeprefix(BUFFERS))
        target = outside.get(name)
        if target is not None and (target.shape, target.dtype) == (value.shape, value.dtype):
            updates.append((target, value))
        else:
            others.append(f"{name} (not in the model)" if target is None else f"{name} (of another shape)")
    return updates, others


def _check_finite(values: Mapping[str, Tensor], file: str) -> None:
    if bad := nonfinite({name: value for name, value in values.items() if value.is_floating_point()}):
        raise CheckpointError(
            f"{file}: {bad[0]}: expected finite values, got NaN or Inf ({len(bad)} of {len(values)} "
            "tensors); an EWC with check_finite=False loads them. Nothing was loaded"
        )


def _other_weights(
    layers: Mapping[str, AdaptedLinear], new: NewWeights, saved: Mapping[str, Any]
) -> frozen.Others:
    """The adapted weights that would not be those of the saved model, with the new ones in place."""
    entries = {canonical_name(name): entry for name, entry in saved.items()}
    others: frozen.Others = []
    for name, layer in layers.items():
        now = _new_fingerprint(layer, new[name]) if name in new else layer.weight_fingerprint()
        if name not in new and _differs(layer, now):
            raise _unconsolidated(name)
        others += frozen.other_weight(layer.weight_name(name), entries[name].get("weight"), exact_part(now))
    return others


def _unconsolidated(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: the checkpoint was saved before any consolidation, but the base weight of the model has "
        "been consolidated; load it into a freshly built and injected model. Nothing was loaded"
    )


def row_updates(layers: Mapping[str, AdaptedLinear], saved: Mapping[str, Tensor]) -> Updates:
    """New base weights from the saved rows; a layer without saved rows must still have its pretrained
    weight."""
    new = _new_weights(layers, saved)
    for name, layer in layers.items():
        if name not in new and is_changed(layer):
            raise _unconsolidated(name)
    return _weight_updates(layers, new)


def _weight_updates(layers: Mapping[str, AdaptedLinear], new: NewWeights) -> Updates:
    updates: Updates = []
    for name, weight in new.items():
        layer = layers[name]
        updates += layer.weight_updates(weight) if isinstance(weight, Tensor) else layer.state_updates(weight)
    return updates


def _new_fingerprint(layer: AdaptedLinear, new: Tensor | Mapping[str, Tensor]) -> str:
    """The fingerprint that the layer will have."""
    return fingerprint(whole(new)) if isinstance(new, Tensor) else layer.fingerprint_of(new)


def _new_weights(layers: Mapping[str, AdaptedLinear], saved: Mapping[str, Tensor]) -> NewWeights:
    """What the saved rows, and the saved parts of weights, make of the layers that have some."""
    left = {canonical_name(key.removeprefix(ROWS)): value for key, value in saved.items()}
    new: dict[str, Tensor | Mapping[str, Tensor]] = {}
    for name, layer in layers.items():
        state = layer.weight_state()
        if state is not None:
            parts = _taken(left, f"{name}{PART}")
            if parts:
                new[name] = _whole_state(layer, name, {k.partition(PART)[2]: v for k, v in parts.items()})
            continue
        keys = [fisher_key(name, piece) for piece in layer.adapter_slices]
        if not any(key in left for key in keys):
            continue
        weight = layer.whole_weight().detach().clone()
        for key, piece in zip(keys, layer.adapter_slices, strict=True):
            if key not in left:
                raise CheckpointError(f"{STATE}: the rows of {key} are missing; nothing was loaded")
            rows = left.pop(key)
            _same_kind(f"rows of {key}", weight[: piece.row_count], rows, STATE)
            put_rows(weight, piece.rows, rows.to(weight.device))
        new[name] = weight
    if left:
        raise CheckpointError(f"{STATE}: the model has no adapter {min(left)}; nothing was loaded")
    return new


def _whole_state(layer: AdaptedLinear, name: str, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The saved parts of the weight of a layer, which fit it and are all there."""
    expected = layer.state_like(parts)
    for part in expected:
        if part not in parts:
            raise CheckpointError(f"{STATE}: {part} of the weight of {name} is missing; nothing was loaded")
    for part, value in parts.items():
        if part not in expected:
            raise CheckpointError(f"{STATE}: the weight of {name} has no {part}; nothing was loaded")
        _same_kind(f"{part} of the weight of {name}", expected[part], value, STATE)
    return parts


def _same_kind(name: str, target: Tensor, value: Tensor, file: str) -> None:
    if target.shape != value.shape or target.dtype != value.dtype:
        raise CheckpointError(
            f"{file}: {name}: the checkpoint has {list(value.shape)} {value.dtype}, the model "
            f"{list(target.shape)} {target.dtype}; build the model with the same shapes and dtype. Nothing "
            "was loaded"
        )


def parsed_ewc(ewc: EWC, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> EWCState:
    """The validated state for an EWC, which is not changed; raises `CheckpointError`."""
    if config.get("ewc") is None:
        raise CheckpointError(
            f"{MANIFEST}: the checkpoint was saved without an EWC; load it with ewc=None. Nothing was loaded"
        )
    try:
        return ewc.parse_state({"tensors": tensors, "config": config["ewc"]})
    except FisherError as error:
        raise CheckpointError(f"{STATE}: {error}. Nothing was loaded") from error
