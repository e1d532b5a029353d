# SPDX-License-Identifier: Apache-2.0
"""Mistakes of new users, five for each page that tells of them: each is answered by a message that names the
fix."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fused_ewclora as fe
from fused_ewclora.integrations.avalanche import EWCLoRAPlugin
from fused_ewclora.integrations.peft import attach_ewc
from fused_ewclora.integrations.transformers import EWCCallback

KV = fe.LoRAConfig(r=2, target_modules=["qkv"], slices=("k", "v"))
IN_PROJECTION = fe.LoRAConfig(r=2, target_modules=["self_attention"], slices=("k", "v"))
QUERY = fe.LoRAConfig(r=2, target_modules=["query"])
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])
TEXTS = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.tensor([0, 1])}

PAGES = Path(__file__).resolve().parents[2] / "docs" / "integrations"

pytestmark = pytest.mark.usefixtures("cheap_collections")


@functools.cache
def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_base_patch16_224", num_classes=2, **sizes)


def torchvision_vit() -> nn.Module:
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    model = torchvision.models.VisionTransformer(16, 8, num_classes=2, **sizes)
    nn.init.normal_(model.heads.head.weight)  # torchvision makes zeros, which pass no gradient on
    return model


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=16, **sizes))


def fresh(build: Callable[[], nn.Module], config: fe.LoRAConfig | None = None) -> nn.Module:
    """A copy of a model that is made once, with adapters if there is a configuration."""
    model = copy.deepcopy(made(build))
    if config is not None:
        fe.inject(model, config)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ewc: fe.EWC) -> None:
    optimizer.zero_grad()
    (F.cross_entropy(model(IMAGES[0]), IMAGES[1]) + ewc.penalty()).backward()
    optimizer.step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def misspelt_target() -> None:
    fe.inject(fresh(vit), fe.LoRAConfig(r=2, target_modules=["qvk"]))


def injected_twice() -> None:
    fe.inject(fresh(vit, KV), KV)


def forgotten_head() -> str:
    return str(fe.inject(fresh(vit), KV))  # nothing else can know whether the head should train


def early_optimizer() -> None:
    model = fresh(vit)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fe.inject(model, KV)
    ewc = fe.EWC(model, ewc_lambda=1.0)
    step(model, optimizer, ewc)
    ewc.end_task([IMAGES], F.cross_entropy)


def ended_twice() -> None:
    model = fresh(vit, KV)
    ewc = fe.EWC(model, ewc_lambda=1.0)
    step(model, torch.optim.SGD(trainable(model), lr=0.1), ewc)
    loader = DataLoader(TensorDataset(*IMAGES), batch_size=4)
    ewc.end_task(loader, F.cross_entropy)
    ewc.end_task(loader, F.cross_entropy)


def layer_of_timm() -> None:
    fe.inject(fresh(torchvision_vit), fe.LoRAConfig(r=2, target_modules=["qkv"]))


def linears_of_resnet() -> None:
    resnet = torchvision.models.resnet18(num_classes=2)
    fe.inject(resnet, fe.LoRAConfig(r=2, target_modules="all-linear"))


def sliced_mlp() -> None:
    fe.inject(fresh(torchvision_vit), fe.LoRAConfig(r=2, target_modules=["mlp.0"], slices=("k", "v")))


def old_optimizer() -> None:
    model = fresh(torchvision_vit, IN_PROJECTION)
    ewc = fe.EWC(model, ewc_lambda=1.0)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    step(model, optimizer, ewc)
    ewc.end_task([IMAGES], F.cross_entropy)
    step(model, optimizer, ewc)


def lambda_of_batches() -> None:
    model = fresh(torchvision_vit, IN_PROJECTION)
    ewc = fe.EWC(model, ewc_lambda=1e7, fisher_mode="sample")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    step(model, optimizer, ewc)
    ewc.end_task([IMAGES], F.cross_entropy)
    for _ in range(30):
        step(model, optimizer, ewc)
    ewc.end_task([IMAGES], F.cross_entropy)


def sliced_query() -> None:
    fe.inject(fresh(bert), fe.LoRAConfig(r=2, target_modules=["query"], slices=("q",)))


def callback_of_model() -> None:
    EWCCallback(fresh(bert, QUERY))  # type: ignore[arg-type]


def no_labels() -> None:
    ewc = fe.EWC(fresh(bert, QUERY), ewc_lambda=1.0)
    ewc.end_task([{"input_ids": TEXTS["input_ids"]}])


def trained(model: nn.Module, ewc: fe.EWC) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    samples = [{name: values[i] for name, values in TEXTS.items()} for i in range(2)]
    arguments = TrainingArguments("run", disable_tqdm=True, **settings)
    Trainer(model, arguments, train_dataset=samples, callbacks=[EWCCallback(ewc)]).train()


def other_model() -> None:
    trained(fresh(bert, QUERY), fe.EWC(fresh(bert, QUERY), ewc_lambda=1.0))


def task_not_ended() -> None:
    model = fresh(bert, QUERY)
    ewc = fe.EWC(model, ewc_lambda=1.0)
    trained(model, ewc)
    trained(model, ewc)


def peft_model() -> nn.Module:
    return peft.get_peft_model(fresh(bert), peft.LoraConfig(r=2, target_modules=["query"]))


def injected_peft() -> None:
    fe.inject(fresh(peft_model), QUERY)


def attached_to_plain() -> None:
    attach_ewc(fresh(bert), ewc_lambda=1.0)


def later_adapter() -> None:
    model = fresh(peft_model)
    ewc = attach_ewc(model, ewc_lambda=1.0)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query"]))
    ewc.end_task([TEXTS])


def disabled_adapter() -> None:
    model = fresh(peft_model)
    ewc = attach_ewc(model, ewc_lambda=1.0)
    with model.disable_adapter():
        ewc.end_task([TEXTS])


def file_of_peft() -> None:
    model = fresh(peft_model)
    attach_ewc(model, ewc_lambda=1.0).end_task([TEXTS])
    fe.export_peft(model, "adapter")


class Classifier(nn.Module):
    """A body, and a head that grows with the first experience."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = IncrementalClassifier(4, 1, masking=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


BODY = fe.LoRAConfig(r=2, target_modules=["body"])


def strategy_trained(model: nn.Module, *plugins: Any) -> None:
    images = TensorDataset(torch.randn(8, 4), torch.arange(8) % 4)
    images.targets = [i % 4 for i in range(8)]
    data = as_classification_dataset(images)
    sets = {"train": data, "test": data}
    stream = class_incremental_benchmark(sets, num_experiences=2, class_order=range(4)).train_stream
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Naive(model=model, optimizer=optimizer, plugins=list(plugins), evaluator=evaluator).train(stream[0])


def no_adapters() -> None:
    strategy_trained(fresh(Classifier), EWCLoRAPlugin(ewc_lambda=1.0))


def two_plugins() -> None:
    strategy_trained(fresh(Classifier, BODY), EWCLoRAPlugin(ewc_lambda=1.0), EWCLoRAPlugin(ewc_lambda=1.0))


def plugin_of_avalanche() -> None:
    strategy_trained(fresh(Classifier, BODY), EWCPlugin(1.0), EWCLoRAPlugin(ewc_lambda=1.0))


def growing_head() -> None:
    model = fresh(Classifier, fe.LoRAConfig(r=2, target_modules="all-linear"))
    strategy_trained(model, EWCLoRAPlugin(fe.EWC(model, ewc_lambda=1.0)))


def ewc_of_copy() -> None:
    model = fresh(Classifier, BODY)
    strategy_trained(model, EWCLoRAPlugin(fe.EWC(copy.deepcopy(model), ewc_lambda=1.0)))


MISTAKES: dict[str, dict[Callable[[], str | None], str]] = {
    "timm": {
        misspelt_target: r"did you mean '[\w.]*qkv'",
        injected_twice: r"fe\.eject\(model\) removes them",
        forgotten_head: r"to train them: model\.head\.requires_grad_\(True\)",
        early_optimizer: "Make it after inject, from the parameters that require gradients",
        ended_twice: "call end_task once, at the end of each task",
    },
    "torchvision": {
        layer_of_timm: "layers of the model: .*self_attention",
        linears_of_resnet: r"target_modules=\['fc'\] adapts it.*target_modules can name them: conv1",
        sliced_mlp: "leave slices out, for one adapter on all rows",
        old_optimizer: r"make a new optimizer, or call fused_ewclora\.reset_optimizer_state_",
        lambda_of_batches: r"Set it with ewc\.ewc_lambda = .*convert_lambda\(1e7, 'batch', 'sample'",
    },
    "transformers": {
        sliced_query: "leave slices out, for one adapter on all rows",
        callback_of_model: r"make one with fe\.EWC\(model, ewc_lambda=\.\.\.\)",
        no_labels: 'give batches .*mappings with "labels"',
        other_model: r"give Trainer and fe\.EWC the same model",
        task_not_ended: r"ewc\.end_task\(dataloader\) was not called",
    },
    "peft": {
        injected_peft: r"peft\.attach_ewc\(peft_model, ewc_lambda=\.\.\.\) makes an EWC",
        attached_to_plain: r"make it with peft\.get_peft_model, or call fe\.inject",
        later_adapter: "delete_adapter the others first",
        disabled_adapter: r"leave the .*`disable_adapter`\) first",
        file_of_peft: r"use fe\.save_pretrained, or fe\.eject\(model\)",
    },
    "avalanche": {
        no_adapters: r"call fused_ewclora\.inject\(model, config\) first",
        two_plugins: "Give the strategy one of them",
        plugin_of_avalanche: "Remove EWCPlugin from plugins",
        growing_head: "leave it out with exclude_modules",
        ewc_of_copy: "make EWC and strategy of one model",
    },
}


@functools.cache
def answer(mistake: Callable[[], str | None]) -> str:
    """What a user is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", fe.EWCLoRAWarning)
        try:
            return mistake() or "nothing"
        except (fe.EWCLoRAError, fe.EWCLoRAWarning) as told:
            return str(told)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("mistake", [mistake for mistakes in MISTAKES.values() for mistake in mistakes])
def test_fix_named(mistake: Callable[[], str | None]):
    """The error, the warning or the report names the fix."""
    (fix,) = [mistakes[mistake] for mistakes in MISTAKES.values() if mistake in mistakes]
    assert re.search(fix, answer(mistake), re.DOTALL), answer(mistake)


@pytest.mark.parametrize("page", MISTAKES)
def test_page_quotes(page: str):
    """The page ends with a table of its five mistakes, which quotes what users are told."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    rows = text.partition("## Typical mistakes")[2].strip().splitlines()[-len(MISTAKES[page]) :]
    assert len(rows) == 5
    for row, mistake in zip(rows, MISTAKES[page], strict=True):
        told = row.split(" | ")[1]
        quote = re.findall("`([^`]+)`", told)[-1]
        assert quote in answer(mistake), answer(mistake)
