# SPDX-License-Identifier: Apache-2.0
"""The state of an EWC inside the checkpoints that `Trainer` writes.

Trainer does not tell callbacks which checkpoint it resumes from. However, it loads trainer_state.json from
that checkpoint and passes its contents to callbacks, and the file has room for entries of callbacks. Each
checkpoint therefore records a checksum of the EWC state that belongs to it there. On resuming, the state is
the one with that checksum.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.checkpoint import (
    ROWS,
    changed_rows,
    check_layers,
    describe,
    is_changed,
    pack,
    parsed_ewc,
    row_updates,
    unpack,
)
from ..checkpoints.files import MANIFEST, STATE, identity, identity_in, read_files, write_files, write_plain
from ..distributed.processes import several, together
from ..distributed.transaction import Transaction
from ..errors import CheckpointError, IntegrationError
from ..ewc.controller import EWC
from ..layers.adapted import AdaptedLinear

FOLDER = "fused_ewclora"  # inside a checkpoint, so that no file collides with those of Trainer or PEFT
FORMAT = 1
TRAINER_STATE_NAME = "trainer_state.json"  # as in transformers.trainer, which is slow to import
KEY = "fused_ewclora.EWC"  # of the entry in that file
Source = str | os.PathLike[str] | bool


def begin(ewc: EWC, args: TrainingArguments, state: TrainerState, source: Source) -> None:
    """To be called when training begins: load the EWC state of the checkpoint that training resumes from, if
    any, and record the checksum of the state for the checkpoints that follow.

    Raises `CheckpointError` when that state is missing or does not match; the EWC and the layers are
    unchanged then. Every process must call this.
    """
    recorded = _recorded(state)
    if state.global_step > 0 or recorded is not None:
        if source is not False:
            work = functools.partial(_resume, ewc, args, state, source)
            together(work) if several() else work()
    elif not isinstance(source, bool):
        raise IntegrationError(
            "EWCCallback: resume_from_checkpoint: expected the same folder in "
            f"trainer.train(resume_from_checkpoint=...), got {str(source)!r}, but training starts at step 0"
        )
    if args.should_save:
        _record(state, identity(*_contents(ewc)))


def save(ewc: EWC, args: TrainingArguments, state: TrainerState) -> None:
    """Add the EWC state to the checkpoint that Trainer has just written, in the process that wrote it."""
    folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise IntegrationError(
            f"EWCCallback: {folder}: expected the checkpoint that Trainer has just saved, found none; it was "
            "written elsewhere, as in a hyperparameter search"
        )
    files, config = _contents(ewc)
    write_files(folder / FOLDER, files, config)
    checksum = identity(files, config)
    if _recorded(state) != checksum:  # the state has changed since training began
        _record(state, checksum)
        text = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n"
        write_plain(folder, {TRAINER_STATE_NAME: text.encode()})


def _recorded(state: TrainerState) -> str | None:
    entry: Any = (state.stateful_callbacks or {}).get(KEY)
    return entry["attributes"]["checksum"] if entry is not None else None


def _record(state: TrainerState, checksum: str) -> None:
    # The form of callback entries in Trainer.
    state.stateful_callbacks[KEY] = {"args": {}, "attributes": {"checksum": checksum}}


def _contents(ewc: EWC) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files and the manifest of the EWC state."""
    saved = ewc.state_dict()
    changed = [name for name, layer in _partly_saved(ewc).items() if is_changed(layer)]
    tensors = {**saved["tensors"], **changed_rows(ewc.layers, changed)}
    layers = {name: describe(layer) for name, layer in ewc.layers.items()}
    files = {STATE: pack(tensors, True)} if tensors else {}
    return files, {"format": FORMAT, "layers": layers, "ewc": saved["config"]}


def _partly_saved(ewc: EWC) -> dict[str, AdaptedLinear]:
    """The layers of PEFT, of which Trainer saves only the adapters, so that the rows which consolidation has
    changed belong to the EWC state; of other layers it saves everything. So do tensors of quantised weights,
    which a state_dict may hold but not restore."""
    return {
        name: layer
        for name, layer in ewc.layers.items()
        if layer.weight_path != "weight" or layer.weight_state() is not None
    }


def _resume(ewc: EWC, args: TrainingArguments, state: TrainerState, source: Source) -> None:
    recorded = _recorded(state)
    if recorded is not None and recorded == identity(*_contents(ewc)):
        return  # ewc has this state already: it is the same process, or the user has loaded it
    if isinstance(source, bool):
        _take_over(ewc, _find(args, state, recorded))
        return
    folder = Path(source) / FOLDER
    if recorded is not None and identity_in(folder) != recorded:
        raise CheckpointError(
            f"{folder}: its EWC state is not the one that the checkpoint of step {state.global_step} was "
            "trained with. Nothing was loaded"
        )
    _take_over(ewc, folder)


def _find(args: TrainingArguments, state: TrainerState, recorded: str | None) -> Path:
    """The folder with the EWC state of the checkpoint that Trainer has loaded."""
    where = f"the checkpoint of step {state.global_step}"
    remedy = (
        "Give EWCCallback(ewc, resume_from_checkpoint=...) the folder of a checkpoint that has it; or False, "
        "after load_pretrained has restored ewc and model to the end of the previous task. Nothing was loaded"
    )
    if recorded is None:
        raise CheckpointError(
            f"{where}: expected an EWC state, but it was saved without an EWCCallback. {remedy}"
        )
    for checkpoint in _candidates(args, state):
        try:
            if identity_in(checkpoint / FOLDER) == recorded:
                return checkpoint / FOLDER
        except CheckpointError:
            continue  # not a checkpoint of this library, or an incomplete one
    raise CheckpointError(
        f"{where}: its EWC state is in no checkpoint of {args.output_dir} (args.output_dir), nor is it the "
        f"state of ewc. {remedy}"
    )


def _candidates(args: TrainingArguments, state: TrainerState) -> Iterator[Path]:
    """Folders of checkpoints, the most likely ones first. All checkpoints of a task have the same EWC state,
    so another one can replace a checkpoint whose saving was interrupted."""
    if args.resume_from_checkpoint:
        yield Path(args.resume_from_checkpoint)
    yield Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    yield from sorted(Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def _take_over(ewc: EWC, folder: Path) -> None:
    files, config = read_files(folder)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST}: expected format {FORMAT}, got {config.get('format')!r}; nothing was loaded"
        )
    tasks = check_layers(ewc.layers, config.get("layers"))
    tensors = unpack(files, STATE) if STATE in files else {}
    rows = {key: tensors.pop(key) for key in list(tensors) if key.startswith(ROWS)}
    updates = row_updates(ewc.layers, rows) if rows or _partly_saved(ewc) else []
    parsed = parsed_ewc(ewc, tensors, config)
    with Transaction() as change:
        for target, value in updates:
            change.copy_(target, value)
        ewc.take_over(parsed, change)
    for name, layer in ewc.layers.items():
        layer.consolidated_tasks = tasks[name]
