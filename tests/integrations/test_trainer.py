# SPDX-License-Identifier: Apache-2.0
"""EWC in `transformers.Trainer`, against loops written by hand in fp64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
)

import fused_ewclora as fe
from fused_ewclora.integrations.transformers import EWCCallback

pytestmark = pytest.mark.usefixtures("cheap_collections")

VOCABULARY, WIDTH, SAMPLES, BATCH = 17, 16, 14, 2
LEARNING_RATE, BETAS, EPSILON = 1e-2, (0.9, 0.999), 1e-3  # an epsilon that hides no difference
IGNORED = -100


class Trainer(transformers.Trainer):
    """Takes the samples in order; older versions have no argument for that."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def gpt2(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=WIDTH, n_head=2, vocab_size=VOCABULARY, n_positions=8, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(dtype)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["c_attn"], slices=("q", "v")))
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["c_fc"]))
    return model


def sentences(seed: int = 0, count: int = SAMPLES) -> list[dict[str, Tensor]]:
    """Sequences with unequal numbers of labels, so that token means and batch means differ."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        ids = torch.randint(0, VOCABULARY, (6,), generator=generator)
        labels = ids.clone()
        labels[: 1 + i % 4] = IGNORED
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def second_task(model: nn.Module, seed: int = 1, **options: Any) -> fe.EWC:
    """A controller with the Fisher of a first task; adapters away from zero, where the penalty is not 0."""
    ewc = fe.EWC(model, 1e4, fisher_dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(seed)
    noise = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in adapter_tensors(model)}
    ewc.end_task(batches(sentences(7)))
    with torch.no_grad():
        for name, parameter in adapter_tensors(model):
            parameter.copy_(0.1 * noise[name])
    return ewc


def adapter_tensors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if "lora_" in name]


def batches(samples: list[dict[str, Tensor]], size: int = BATCH) -> list[dict[str, Tensor]]:
    return [
        {key: torch.stack([s[key] for s in samples[i : i + size]]) for key in samples[0]}
        for i in range(0, len(samples), size)
    ]


def arguments(folder: Any, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "num_train_epochs": 2,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "adam_epsilon": EPSILON,
        "optim": "adamw_torch", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "max_grad_norm": 0.0,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **settings})


def by_hand(
    model: nn.Module, ewc: fe.EWC, samples: list[dict[str, Tensor]], accumulation: int, max_grad_norm: float
) -> list[float]:
    """Two epochs of AdamW with the penalty in the loss; the penalties at the start of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, BETAS, EPSILON, weight_decay=0.0)
    model.train()
    penalties, size = [], accumulation * BATCH
    for _ in range(2):
        for i in range(0, len(samples), size):
            (whole,) = batches(samples[i : i + size], size)
            optimizer.zero_grad()
            penalty = ewc.penalty()
            (model(**whole).loss + penalty).backward()  # the mean over all tokens of the step
            if max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            penalties.append(float(penalty.detach()))
    return penalties


def assert_trained_alike(model: nn.Module, other: nn.Module, start: dict[str, Tensor]) -> None:
    """Equal to 1e-9 of the way that training went, far below what a penalty in a wrong place would change."""
    for (name, mine), (_, expected) in zip(adapter_tensors(model), adapter_tensors(other), strict=True):
        way = (expected - start[name]).abs().max()
        assert way > 0.0, f"{name} did not train"
        assert (mine - expected).abs().max() <= 1e-9 * way, name


def start_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter_tensors(model)}


# 7 batches: with 3 per step the last step of an epoch has fewer. A norm of 0 is no clipping.
@pytest.mark.parametrize(("accumulation", "max_grad_norm"), [(1, 0.0), (3, 0.0), (3, 1e-2)])
def test_matches_manual_loop(accumulation, max_grad_norm, tmp_path):
    """Training equals a loop with the penalty in the loss."""
    model, other = gpt2(), gpt2()
    ewc, other_ewc = second_task(model), second_task(other)
    start = start_of(model)
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": max_grad_norm}
    trainer = Trainer(
        model, arguments(tmp_path, **settings), train_dataset=sentences(), callbacks=[EWCCallback(ewc)]
    )
    trainer.train()
    penalties = by_hand(other, other_ewc, sentences(), accumulation, max_grad_norm)
    assert_trained_alike(model, other, start)
    logged = [entry["ewc_penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(penalties, rel=1e-6)  # the penalty itself is fp32 or wider
    assert min(penalties) > 0.0


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-2])  # 0: nothing is unscaled before the optimizer's step
def test_grad_scaler(max_grad_norm, tmp_path, monkeypatch):
    """A gradient scaler changes nothing."""
    model, other = gpt2(), gpt2()
    ewc, other_ewc = second_task(model), second_task(other)
    start = start_of(model)
    trainer = Trainer(
        model,
        arguments(tmp_path, gradient_accumulation_steps=3, max_grad_norm=max_grad_norm),
        train_dataset=sentences(),
        callbacks=[EWCCallback(ewc)],
    )
    # accelerate refuses fp16 on CPUs; this is what it sets up elsewhere. Autocast leaves fp64 alone.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
    trainer.train()
    by_hand(other, other_ewc, sentences(), 3, max_grad_norm)
    assert scaler.get_scale() > 2.0**10, "the scale was in use and has grown"
    assert_trained_alike(model, other, start)


def test_penalty_logged_mean(tmp_path):
    """The penalty is logged as the mean over the steps, as the loss is."""
    model, other = gpt2(), gpt2()
    ewc, other_ewc = second_task(model), second_task(other)
    seen: list[dict[str, Any]] = []

    class Reader(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    callbacks = [EWCCallback(ewc), Reader()]
    trainer = Trainer(
        model, arguments(tmp_path, logging_steps=7), train_dataset=sentences(), callbacks=callbacks
    )
    trainer.train()
    penalties = by_hand(other, other_ewc, sentences(), 1, 0.0)
    means = [sum(penalties[i : i + 7]) / 7 for i in (0, 7)]
    assert [entry["ewc_penalty"] for entry in seen if "ewc_penalty" in entry] == pytest.approx(
        means, rel=1e-6
    )
    assert "ewc_penalty" not in seen[-1], "the summary of the run has no step of its own"


def test_truncated_step_penalty():
    """Trainer leaves the loop inside a step when a callback stops the epoch, and goes on accumulating."""
    model = gpt2()
    ewc = second_task(model)
    callback, kwargs = EWCCallback(ewc), {"optimizer": None, "model": model}
    callback.on_step_begin(None, None, None, **kwargs)
    once = {name: p.grad.clone() for name, p in adapter_tensors(model)}
    callback.on_step_begin(None, None, None, **kwargs)
    assert all(torch.equal(p.grad, once[name]) for name, p in adapter_tensors(model))
    callback.on_optimizer_step(None, None, None, **kwargs)
    callback.on_step_begin(None, None, None, **kwargs)
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in adapter_tensors(model))


def test_first_task_plain(tmp_path):
    """The first task trains as it does without EWC."""
    model, other = gpt2(), gpt2()
    start = start_of(model)
    callback = EWCCallback(fe.EWC(model, 1e4, fisher_dtype=torch.float64))
    trainer = Trainer(
        model, arguments(tmp_path, num_train_epochs=1), train_dataset=sentences(), callbacks=[callback]
    )
    trainer.train()
    Trainer(other, arguments(tmp_path, num_train_epochs=1), train_dataset=sentences()).train()
    for (name, mine), (_, expected) in zip(adapter_tensors(model), adapter_tensors(other), strict=True):
        assert torch.equal(mine, expected) and not torch.equal(mine, start[name]), name
    assert {entry["ewc_penalty"] for entry in trainer.state.log_history if "loss" in entry} == {0.0}


def test_task_not_ended(tmp_path):
    """A second training without end_task in between is told once, also with a new callback; after end_task it
    is not, nor are moments that were reset or belong to a new optimizer."""

    def train() -> list[str]:
        trainer = Trainer(
            model, arguments(tmp_path, max_steps=1), train_dataset=sentences(), callbacks=[EWCCallback(ewc)]
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        return [str(entry.message) for entry in caught if issubclass(entry.category, fe.EWCLoRAWarning)]

    model = gpt2()
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
    assert train() == []
    ewc.end_task(batches(sentences()))
    assert train() == []
    (message,) = train()
    assert "ewc.end_task(dataloader) was not called" in message
    assert train() == []


def test_diverged_penalty(tmp_path):
    """A penalty that is not finite is told once, with lambda."""
    model = gpt2()
    ewc = second_task(model)
    with torch.no_grad():
        adapter_tensors(model)[0][1].fill_(float("nan"))
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=sentences(), callbacks=[EWCCallback(ewc)]
    )
    with pytest.warns(fe.EWCLoRAWarning, match=r"the penalty is nan with ewc_lambda=10000") as caught:
        trainer.train()
    assert len([entry for entry in caught if entry.category is fe.EWCLoRAWarning]) == 1


def test_optimizer_without_adapters(tmp_path):
    """An optimizer of the base weights that Trainer was given is told when training begins."""
    model = gpt2()
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    given = (torch.optim.SGD(base, lr=0.1), None)
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=1), train_dataset=sentences(), callbacks=[EWCCallback(ewc)],
        optimizers=given,
    )  # fmt: skip
    with pytest.warns(fe.EWCLoRAWarning, match="made before inject"):
        trainer.train()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["query", "value"]))
    model.classifier.requires_grad_(True)
    return model


def labelled(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (12, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(2, 7, (12, 1), generator=generator)).long()
    return [{"input_ids": i, "attention_mask": m, "labels": i[0] % 3} for i, m in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("bf16", [False, True])
def test_two_tasks_saved(bf16, tmp_path):
    """Two tasks train, consolidate and save."""
    model = bert()
    ewc = fe.EWC(model, ewc_lambda=100.0)
    for task in range(2):
        trainer = Trainer(
            model,
            arguments(tmp_path, bf16=bf16, num_train_epochs=1),
            train_dataset=labelled(task),
            callbacks=[EWCCallback(ewc)],
        )
        trainer.train()
        batch = {k: v[None] for k, v in labelled(task)[0].items()}
        model.eval()
        before = model(**batch).logits.detach()
        ewc.end_task(trainer.get_train_dataloader())
        rounding = (
            0.05 if bf16 else 1e-5
        )  # the merged weight is rounded once, activations to 8 bits under bf16
        torch.testing.assert_close(model(**batch).logits.detach(), before, rtol=rounding, atol=rounding)
    assert [record.samples for record in ewc.history] == [12, 12]
    assert all(torch.isfinite(f).all() and f.sum() > 0 for f in ewc.fishers.values())
    assert any(entry.get("ewc_penalty", 0.0) > 0.0 for entry in trainer.state.log_history)
    fe.save_pretrained(tmp_path / "adapters", model, ewc)
    other = bert()
    again = fe.EWC(other, ewc_lambda=100.0)
    fe.load_pretrained(tmp_path / "adapters", other, again)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(**batch).logits, model.float()(**batch).logits.float(),
                                   rtol=0.05 if bf16 else 0, atol=0.05 if bf16 else 0)  # fmt: skip


def test_checkpoint_resume(tmp_path):
    """A fresh model that goes on from the end of the first epoch ends where the first run ended."""
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-7")):
        model = gpt2()
        ewc = second_task(model)
        start = start_of(model)
        settings = arguments(tmp_path, save_strategy="no" if checkpoint else "epoch")
        trainer = Trainer(model, settings, train_dataset=sentences(), callbacks=[EWCCallback(ewc)])
        trainer.train(resume_from_checkpoint=checkpoint)
        results.append(model)
    assert trainer.state.global_step == 14
    assert_trained_alike(results[1], results[0], start)


def test_missing_penalty_refused(tmp_path):
    """A setup that would train without a penalty is refused."""
    model, other = gpt2(), gpt2()
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
    trainer = Trainer(other, arguments(tmp_path), train_dataset=sentences(), callbacks=[EWCCallback(ewc)])
    with pytest.raises(
        fe.TargetError, match=r"the model that the EWC was made for, Trainer's lacks .*c_attn"
    ):
        trainer.train()
    with pytest.raises(fe.TargetError, match=r"ewc: expected a fused_ewclora\.EWC, got GPT2LMHeadModel"):
        EWCCallback(model)
    for name, value, reason in (
        ("deepspeed", {"stage": 2}, "DeepSpeed"),
        ("fsdp", "full_shard", "FSDP"),
        ("optim", "lomo", "steps inside backward"),
    ):
        args = arguments(tmp_path)
        object.__setattr__(args, name, value)
        with pytest.raises(fe.IntegrationError, match=reason):
            EWCCallback(ewc).on_train_begin(args, None, None, model=model)


def test_padding_fisher(tmp_path):
    """The Fisher of padded batches is that of single samples without padding."""
    model = bert().double().eval()
    samples = labelled(0)
    trainer = Trainer(model, arguments(tmp_path, per_device_train_batch_size=4), train_dataset=samples)
    expected = dict.fromkeys(fe.adapters(model), 0.0)
    weights = [layer.weight.requires_grad_(True) for layer in fe.adapters(model).values()]
    for sample in samples:
        length = int(sample["attention_mask"].sum())
        logits = model(input_ids=sample["input_ids"][None, :length]).logits
        loss = F.cross_entropy(logits, sample["labels"][None])
        for name, gradient in zip(expected, torch.autograd.grad(loss, weights), strict=True):
            expected[name] = expected[name] + gradient.square() / len(samples)
    for weight in weights:
        weight.requires_grad_(False)
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
    ewc.end_task(trainer.get_train_dataloader())
    for name, fisher in ewc.fishers.items():
        torch.testing.assert_close(fisher, expected[name], rtol=1e-9, atol=1e-16)
