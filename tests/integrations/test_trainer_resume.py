# SPDX-License-Identifier: Apache-2.0
"""EWC in the checkpoints of `transformers.Trainer`: a run that was interrupted inside a task continues in
fresh objects as if it had not been interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import fused_ewclora as fe
from fused_ewclora.integrations.peft import attach_ewc
from fused_ewclora.integrations.transformers import EWCCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:peft"),
    pytest.mark.usefixtures("cheap_collections"),
]

VOCABULARY, SAMPLES, BATCH, STOP = 17, 12, 2, 4  # STOP: steps before the interruption, one after saving


def bert(rank: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).double()
    if rank:
        fe.inject(model, fe.LoRAConfig(r=rank, target_modules=["query", "value"]))
        model.classifier.requires_grad_(True)
    return model


def controller(model: nn.Module, **options: Any) -> fe.EWC:
    return fe.EWC(model, **{"ewc_lambda": 1e10, "fisher_dtype": torch.float64, **options})


def labelled(task: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(task)
    ids = torch.randint(0, VOCABULARY, (SAMPLES, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


class Interruption(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == STOP


def trainer_of(folder: Path, task: int, ewc: fe.EWC, callbacks: list[Any] | None = None, **settings: Any):
    defaults: dict[str, Any] = {
        "output_dir": str(folder / f"task{task}"), "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2, "learning_rate": 1e-2, "optim": "adamw_torch", "logging_steps": 1,
        "save_steps": STOP - 1, "save_strategy": "steps", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 5,
    }  # fmt: skip
    return Trainer(
        ewc.model,
        TrainingArguments(**{**defaults, **settings}),
        train_dataset=labelled(task),
        callbacks=[EWCCallback(ewc)] if callbacks is None else callbacks,
    )


def two_tasks(folder: Path, ewc: fe.EWC, interrupted: bool, **settings: Any) -> Trainer:
    """The trainer of the second task, to its end or to its interruption."""
    for task in range(2):
        trainer = trainer_of(folder, task, ewc, **settings)
        if interrupted and task == 1:
            trainer.add_callback(Interruption())
        trainer.train()
        if not (interrupted and task == 1):
            ewc.end_task(trainer.get_train_dataloader())
    return trainer


def interrupted(folder: Path) -> tuple[fe.EWC, Path]:
    """An EWC inside its second task, and the last checkpoint of that task."""
    ewc = controller(bert())
    two_tasks(folder, ewc, True)
    return ewc, folder / "task1" / f"checkpoint-{STOP - 1}"


def penalties(trainer: Trainer) -> list[tuple[float, float]]:
    return [(e["loss"], e["ewc_penalty"]) for e in trainer.state.log_history if "loss" in e]


def assert_same(ewc: fe.EWC, expected: fe.EWC) -> None:
    """Models, Fishers and what is known of them, bit for bit."""
    states = zip(
        {**ewc.model.state_dict(), **ewc.state_dict()["tensors"]}.items(),
        {**expected.model.state_dict(), **expected.state_dict()["tensors"]}.items(),
        strict=True,
    )
    for (name, mine), (_, other) in states:
        assert torch.equal(mine, other), name
    assert ewc.state_dict()["config"] == expected.state_dict()["config"]
    counts = [[layer.consolidated_tasks for layer in fe.adapters(e.model).values()] for e in (ewc, expected)]
    assert counts[0] == counts[1]


def contents(ewc: fe.EWC) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in ewc.state_dict()["tensors"].items()}


# 6 batches per epoch: with 4 per step an epoch has 2 steps, the last one of fewer batches.
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 4, "num_train_epochs": 4}, {"save_total_limit": 1}],
    ids=["every batch", "accumulation", "rotation"],
)
def test_interrupted_task(settings, tmp_path):
    """An interrupted task goes on as if it had not been interrupted."""
    whole = controller(bert())
    uninterrupted = two_tasks(tmp_path / "whole", whole, False, **settings)
    two_tasks(tmp_path / "run", controller(bert()), True, **settings)
    ewc = controller(bert())
    trainer = trainer_of(tmp_path / "run", 1, ewc, **settings)
    trainer.train(resume_from_checkpoint=True)
    ewc.end_task(trainer.get_train_dataloader())
    assert_same(ewc, whole)
    assert ewc.tasks == 2
    assert penalties(trainer) == penalties(uninterrupted)
    assert min(penalty for _, penalty in penalties(trainer)[1:]) > 0.0
    kept = list((tmp_path / "run" / "task1").glob("checkpoint-*/fused_ewclora"))
    assert len(kept) == settings.get("save_total_limit", len(kept)) > 0


def test_model_only_checkpoint(tmp_path):
    """Trainer then starts with a new optimizer; the EWC and its penalty are those of before."""
    two_tasks(tmp_path, controller(bert()), True, save_only_model=True)
    ewc, expected = controller(bert()), controller(bert())
    trainer_of(tmp_path, 0, expected, save_only_model=True).train(
        resume_from_checkpoint=str(tmp_path / "task0" / "checkpoint-12")
    )
    expected.end_task(trainer_of(tmp_path, 0, expected).get_train_dataloader())
    trainer = trainer_of(tmp_path, 1, ewc, save_only_model=True)
    trainer.train(resume_from_checkpoint=True)
    assert ewc.history == expected.history
    for key, fisher in expected.fishers.items():
        torch.testing.assert_close(ewc.fishers[key], fisher, rtol=1e-12, atol=0.0)
    assert min(penalty for _, penalty in penalties(trainer)[-3:]) > 0.0


def test_moved_checkpoint_named(tmp_path):
    """A checkpoint that was moved is named."""
    expected, checkpoint = interrupted(tmp_path / "run")
    moved = tmp_path / "elsewhere"
    shutil.move(checkpoint, moved)
    ewc = controller(bert())
    before = contents(ewc)
    with pytest.raises(fe.CheckpointError, match=r"step 3: its EWC state is in no checkpoint of .*task1"):
        trainer_of(tmp_path / "other", 1, ewc).train(resume_from_checkpoint=str(moved))
    assert contents(ewc).keys() == before.keys() and ewc.tasks == 0
    callback = EWCCallback(ewc, resume_from_checkpoint=moved)
    trainer = trainer_of(tmp_path / "other", 1, ewc, [callback])
    trainer.train(resume_from_checkpoint=str(moved))
    assert ewc.tasks == 1 and all(torch.equal(f, expected.fishers[k]) for k, f in ewc.fishers.items())
    again = controller(bert())
    trainer_of(tmp_path / "other", 1, again, resume_from_checkpoint=str(moved)).train(
        resume_from_checkpoint=str(moved)
    )
    assert_same(again, ewc)


def test_neighbour_state_used(tmp_path):
    """Killed between Trainer's files and ours, or saved where no callback is asked (SIGTERM)."""
    ewc = controller(bert())
    two_tasks(tmp_path, ewc, False)
    last = tmp_path / "task1" / "checkpoint-9"
    shutil.rmtree(last / "fused_ewclora")
    again = controller(bert())
    trainer_of(tmp_path, 1, again).train(resume_from_checkpoint=str(last))
    again.end_task(trainer_of(tmp_path, 1, again).get_train_dataloader())
    assert again.tasks == 2
    for key, fisher in ewc.fishers.items():
        torch.testing.assert_close(again.fishers[key], fisher, rtol=1e-12, atol=0.0)


def test_foreign_run_rejected(tmp_path):
    """The state of another run in the same place is not taken."""
    _, checkpoint = interrupted(tmp_path / "run")
    moved = tmp_path / "elsewhere"
    shutil.move(checkpoint, moved)
    other = controller(bert(seed=0))
    trainer_of(tmp_path / "run", 1, other).train()  # without a first task: checkpoints of the same names
    ewc = controller(bert())
    with pytest.raises(fe.CheckpointError, match="in no checkpoint"):
        trainer_of(tmp_path / "run", 1, ewc).train(resume_from_checkpoint=str(moved))
    callback = EWCCallback(ewc, resume_from_checkpoint=tmp_path / "run" / "task1" / "checkpoint-3")
    with pytest.raises(fe.CheckpointError, match="not the one that the checkpoint of step 3"):
        trainer_of(tmp_path / "run", 1, ewc, [callback]).train(resume_from_checkpoint=str(moved))
    assert ewc.tasks == 0


def test_missing_state_refused(tmp_path):
    """A checkpoint without an EWC state is refused."""
    ewc = controller(bert())
    trainer_of(tmp_path, 0, ewc, []).train()
    with pytest.raises(fe.CheckpointError, match=r"step 12: expected an EWC state, but .* without an EWCC"):
        trainer_of(tmp_path, 0, ewc).train(resume_from_checkpoint=True)
    assert ewc.tasks == 0
    kept = EWCCallback(ewc, resume_from_checkpoint=False)
    trainer_of(tmp_path, 0, ewc, [kept], num_train_epochs=3).train(resume_from_checkpoint=True)


def test_folder_not_resuming(tmp_path):
    """A checkpoint folder is refused when training does not resume."""
    ewc = controller(bert())
    with pytest.raises(fe.IntegrationError, match="training starts at step 0"):
        trainer_of(tmp_path, 0, ewc, [EWCCallback(ewc, resume_from_checkpoint="run")]).train()
    with pytest.raises(fe.ArgumentError, match="expected a folder or a bool, got 3"):
        EWCCallback(ewc, resume_from_checkpoint=3)


def test_mismatch_changes_nothing(tmp_path):
    """Whatever Trainer did to the model, the EWC and the counts of its layers stay."""
    _, checkpoint = interrupted(tmp_path)
    cases = [
        (bert(seed=1), {}, "belongs to other base weights"),
        (bert(), {"fisher_mode": "batch"}, "fisher_mode: the state was made with 'sample'"),
        (bert(), {"merge_mode": "factors"}, "merge_mode"),
    ]
    fewer = bert(rank=0)
    fe.inject(fewer, fe.LoRAConfig(r=2, target_modules=["query"]))
    fewer.classifier.requires_grad_(True)
    (checkpoint / "optimizer.pt").unlink()  # which torch itself refuses for fewer parameters
    for model, options, message in [*cases, (fewer, {}, "adapted in the checkpoint only")]:
        ewc = controller(model, **options)
        with pytest.raises(fe.CheckpointError, match=message):
            trainer_of(tmp_path, 1, ewc).train(resume_from_checkpoint=str(checkpoint))
        assert ewc.tasks == 0 and not ewc.fishers
        assert all(layer.consolidated_tasks == 0 for layer in fe.adapters(model).values())
    files = checkpoint / "fused_ewclora"
    tensors = load_file(files / "ewc_state.safetensors")
    save_file({key: value + 1.0 for key, value in tensors.items()}, files / "ewc_state.safetensors")
    ewc = controller(bert())
    with pytest.raises(fe.CheckpointError, match=r"its hash is not the one in ewc_config\.json"):
        trainer_of(tmp_path, 1, ewc).train(resume_from_checkpoint=str(checkpoint))
    assert ewc.tasks == 0


def test_matching_state_no_file(tmp_path):
    """Training resumed in the same process, or after loading by hand."""
    ewc, checkpoint = interrupted(tmp_path)
    for files in (tmp_path / "task1").glob("*/fused_ewclora"):
        shutil.rmtree(files)
    trainer_of(tmp_path, 1, ewc).train(resume_from_checkpoint=str(checkpoint))
    assert ewc.tasks == 1


def test_task_end_while_training(tmp_path):
    """A task that ends during training is in the checkpoint."""

    class Ends(TrainerCallback):
        def on_epoch_end(self, args, state, control, train_dataloader=None, **kwargs):
            if state.epoch == 1.0:
                ewc.end_task(train_dataloader)

    ewc = controller(bert())
    settings: dict[str, Any] = {"save_strategy": "epoch"}
    trainer_of(tmp_path, 0, ewc, [EWCCallback(ewc), Ends()], **settings).train()
    again = controller(bert())
    trainer_of(tmp_path, 0, again, num_train_epochs=3, **settings).train(resume_from_checkpoint=True)
    assert again.tasks == 1 and all(torch.equal(f, ewc.fishers[k]) for k, f in again.fishers.items())
    state = json.loads((tmp_path / "task0" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6 and "fused_ewclora.EWC" in state["stateful_callbacks"]


def test_peft_weights_restored(tmp_path):
    """Of PEFT's models Trainer saves the adapters alone."""

    def live() -> fe.EWC:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = peft.get_peft_model(bert(rank=0), config)
        return attach_ewc(model, ewc_lambda=1e10, fisher_dtype=torch.float64)

    whole = live()
    two_tasks(tmp_path / "whole", whole, False, label_names=["labels"])
    two_tasks(tmp_path / "run", live(), True, label_names=["labels"])
    ewc = live()
    trainer = trainer_of(tmp_path / "run", 1, ewc, label_names=["labels"])
    trainer.train(resume_from_checkpoint=True)
    assert any(layer.consolidated_tasks == 1 for layer in fe.adapters(ewc.model).values())
    ewc.end_task(trainer.get_train_dataloader())
    assert_same(ewc, whole)
