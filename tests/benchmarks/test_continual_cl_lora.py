# SPDX-License-Identifier: Apache-2.0
"""CL-LoRA in runs: the early exit, the distillation, cosine heads, class means, resumption."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from continual_clusters import CPU, Interrupted, examples, interrupted
from torch import Tensor, nn

import fused_ewclora as fe
from benchmarks.continual import protocols
from benchmarks.continual.cl_lora import EarlyExit, SharedDistillation
from benchmarks.continual.class_means import CosineHead, CosineHeads, class_means
from benchmarks.continual.configuration import Run, Training
from benchmarks.continual.learner import Heads
from benchmarks.continual.run import State, execute, learn, make_optimizer
from benchmarks.continual.stream import Arrays, Problem, Stream, Task
from fused_ewclora.demo.formats import DataError
from fused_ewclora.demo.vit import VisionTransformer
from fused_ewclora.methods import CLLoRA

SHARED = r".*blocks\.[01]\..*"


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


class Backbone(nn.Module):
    """Four blocks between a projection of a pair of inputs and a norm."""

    dim = 10

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, self.dim)
        self.blocks = nn.ModuleList(Block(self.dim) for _ in range(4))
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x = self.embed(inputs[0] + inputs[1])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def problem(sizes: tuple[int, ...] = (2, 3, 2), backbone: nn.Module | None = None) -> Problem:
    tasks = []
    for number, classes in enumerate(sizes):
        names = tuple(f"{number}.{k}" for k in range(classes))
        data = examples(classes, 9 + number, number)
        tasks.append(Task(names, data, data))
    torch.manual_seed(1)
    return Problem(Stream("clusters", tuple(tasks)), backbone or Backbone())


def a_run(**changes: Any) -> Run:
    settings: dict[str, Any] = {
        "training": Training(
            lr=0.05, head_lr=0.05, epochs=2, batch_size=8, optimizer="sgd", momentum=0.9, weight_decay=1e-3
        ),
        "problem": {"kind": "clusters"},
        "adapters": {"r": 3, "target_modules": ["fc"]},
        "options": {"shared": SHARED, "orthogonality": 0.1},
        "protocol": {"kind": "cl-lora"},
    }
    return Run("clusters", "CL-LoRA", "CLLoRA", 5, **{**settings, **changes})


def made(run: Run | None = None, found: Problem | None = None) -> tuple[State, SharedDistillation]:
    state = State(run or a_run(), found or problem(), CPU)
    assert isinstance(state.protocol, SharedDistillation)
    return state, state.protocol


def test_cosine_head() -> None:
    torch.manual_seed(0)
    head = CosineHead(7, 3)
    assert head.weight.abs().max() <= 7**-0.5 and head.sigma == 1.0
    with torch.no_grad():
        head.sigma.fill_(2.5)
    x = torch.randn(4, 7)
    expected = [[2.5 * F.cosine_similarity(row, w, dim=0).item() for w in head.weight] for row in x]
    torch.testing.assert_close(head(x), torch.tensor(expected))
    sum(head(x)[:, 0]).backward()
    assert head.weight.grad is not None and head.sigma.grad is not None  # both are trained


def test_heads_one_at_a_time() -> None:
    """A new head is trained, with sigma; earlier ones are frozen."""
    model = CosineHeads(Backbone())  # type: ignore[arg-type]
    first, second, _ = problem().stream.tasks
    model.begin_task(first)
    model.begin_task(second)
    assert [len(head.weight) for head in model.heads] == [2, 3]
    assert model.trained() == list(model.heads[1].parameters()) and len(model.trained()) == 2
    assert [p.requires_grad for head in model.heads for p in head.parameters()] == [False, False, True, True]


def test_exit_behind_the_shared_blocks() -> None:
    """The exit has the first blocks and what comes after the last; the model is whole again afterwards."""
    state, protocol = made()
    model, backbone = state.model, state.model.backbone
    model.begin_task(state.tasks[0])
    pair, _ = state.tasks[0].train[:]
    x = backbone.embed(pair[0])
    for block in list(backbone.blocks)[:2]:
        x = block(x)
    names = list(model.state_dict())
    whole = model(pair)
    with pytest.raises(Interrupted), protocol.exit.taken():
        torch.testing.assert_close(model(pair), model.heads[0](backbone.norm(x)), rtol=0, atol=0)
        raise Interrupted
    assert torch.equal(model(pair), whole) and list(model.state_dict()) == names
    assert not torch.allclose(whole, model.heads[0](backbone.norm(x)))


def test_exit_of_the_demo() -> None:
    """In the vision transformer of the demo it gives the normalised class token."""
    torch.manual_seed(0)
    found = problem(backbone=VisionTransformer(8, 4, 1, 16, 3, 2))
    run = a_run(
        adapters={"r": 2, "target_modules": ["qkv"], "slices": ["k", "v"], "segments": ["q", "k", "v"]}
    )
    state, protocol = made(run, found)
    backbone = state.model.backbone
    images = torch.rand(2, 1, 8, 8)
    x = backbone.patch_embed(images).flatten(2).transpose(1, 2)
    x = torch.cat([backbone.cls_token.expand(2, -1, -1), x], dim=1) + backbone.pos_embed
    x = backbone.blocks[1](backbone.blocks[0](x))
    with protocol.exit.taken():
        torch.testing.assert_close(backbone(images), backbone.norm(x[:, 0]), rtol=0, atol=0)


@pytest.mark.parametrize("separate_step", [False, True])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_step_against_a_literal_one(separate_step: bool, variant: str) -> None:
    """Both passes of a step of the second task, and its update, are those of the published loop, written out
    with autograd and SGD in place."""
    options = {"shared": SHARED, "orthogonality": 0.1, "variant": variant}
    run = a_run(options=options, protocol={"kind": "cl-lora", "separate_step": separate_step})
    state, protocol = made(run)
    learn(state, 0)
    model, method = state.model, state.method
    assert isinstance(method, CLLoRA)
    earlier = torch.stack(list(method.block_weights().values())).detach().clone()
    model.begin_task(state.tasks[1])
    method.begin_task(1)
    optimizer = make_optimizer(model, replace(run.training, momentum=0.0, weight_decay=0.0))
    protocol.before_steps(optimizer, [])
    old = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if "blocks.0" in name or "blocks.1" in name
    }
    with torch.no_grad():  # as after some steps, so that student and teacher differ
        for name in old:
            if name.endswith("lora_B"):
                model.get_parameter(name).add_(0.1 * torch.randn(old[name].shape))
    x, y = state.tasks[1].train[:5]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = {name: p.detach().clone() for name, p in parameters.items()}

    def logits(changes: dict[str, Tensor], last: int) -> Tensor:
        """Of the network with these parameters, through its first blocks."""
        whole = {**dict(model.named_parameters()), **changes}
        backbone = "backbone."
        h = (x[0] + x[1]) @ whole[backbone + "embed.weight"].T + whole[backbone + "embed.bias"]
        for k in range(last):
            fc, norm = f"{backbone}blocks.{k}.fc.", f"{backbone}blocks.{k}.norm."
            n = F.layer_norm(h, (10,), whole[norm + "weight"], whole[norm + "bias"])
            delta = whole[fc + "lora_B"] @ whole[fc + "lora_A"]
            if k >= 2:
                delta = delta * whole[fc + "lora_scale"]
            h = h + torch.tanh(n @ (whole[fc + "weight"] + delta).T + whole[fc + "bias"])
        h = F.layer_norm(h, (10,), whole[backbone + "norm.weight"], whole[backbone + "norm.bias"])
        weight, sigma = whole["heads.1.weight"], whole["heads.1.sigma"]
        return sigma * (h / h.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T

    def moved(at: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - 0.05 * gradients.get(name, 0.0) for name, value in at.items()}

    def gradients_of(loss_of: Any, at: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        found = torch.autograd.grad(loss_of(leaves), list(leaves.values()), allow_unused=True)
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    def distilled(at: dict[str, Tensor]) -> Tensor:
        teacher = logits({**at, **old}, 2)
        teacher = (teacher if variant == "official" else teacher.detach()) / 2.0
        return -5.0 * (teacher.softmax(1) * (logits(at, 2) / 2.0).log_softmax(1)).sum() / len(y)

    def loss(at: dict[str, Tensor]) -> Tensor:
        now = torch.stack([at[f"backbone.blocks.{k}.fc.lora_scale"] for k in (2, 3)])
        return F.cross_entropy(logits(at, 4), y) + 0.1 * F.cosine_similarity(now, earlier, dim=0).abs()

    of_kd = gradients_of(distilled, values)
    for name in of_kd:
        if name.endswith("lora_B"):
            norms = old[name].norm(dim=1)
            of_kd[name] = of_kd[name] * (norms * len(norms) / norms.sum())[:, None]
    if separate_step:
        values = moved(values, of_kd)
        expected = moved(values, gradients_of(loss, values))
    else:
        of_loss = gradients_of(loss, values)
        expected = moved(moved(values, of_kd), of_loss)

    optimizer.zero_grad()
    model.train()
    protocol.backward(x, y, 1.0)
    optimizer.step()
    for name, p in parameters.items():
        torch.testing.assert_close(
            p.detach(), expected[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert {name for name in of_kd if "lora_B" in name} == {name for name in old if name.endswith("lora_B")}


def test_first_task_and_weight_zero_have_one_pass() -> None:
    """Neither the first task nor a kd_weight of 0 takes the exit."""
    passes: list[str] = []

    def count(state: State, protocol: SharedDistillation) -> list[str]:
        passes.clear()
        state.model.backbone.norm.register_forward_hook(lambda *_: passes.append("forward"))
        protocol.exit.model.get_submodule("backbone.blocks.3").register_forward_hook(
            lambda *_: passes.append("whole")
        )
        x, y = state.tasks[0].train[:4]
        protocol.backward(x, y, 1.0)
        return passes

    first, second, without = (
        made(a_run(options={"shared": SHARED, "kd_weight": w})) for w in (5.0, 5.0, 0.0)
    )
    for state, _ in (second, without):
        learn(state, 0)
    for state, number in ((first[0], 0), (second[0], 1), (without[0], 1)):
        state.model.begin_task(state.tasks[0])
        state.method.begin_task(number)
    assert count(*first) == ["whole", "forward"]
    assert count(*second) == ["forward", "forward", "whole", "forward"]  # student, teacher, loss
    assert count(*without) == ["whole", "forward"]


def test_class_means() -> None:
    """The head of a task that ends has the means of its own features, which nothing changes later."""
    state, _ = made()
    learn(state, 0)
    learn(state, 1)
    head = state.model.heads[1]
    (x, shift), labels = state.tasks[1].train[:]
    with torch.no_grad(), state.method.task(1):  # type: ignore[attr-defined]
        features = state.model.backbone((x, shift))
    for k in range(3):
        torch.testing.assert_close(head.weight[k], features[labels == k].mean(0))
    assert head.sigma == 1.0
    before = copy.deepcopy(head.state_dict())
    learn(state, 2)
    assert not head.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    with torch.no_grad():
        logits = state.model.all_logits((x, shift))
    column = 0
    for number, head in enumerate(state.model.heads):
        with torch.no_grad(), state.method.task(number):  # type: ignore[attr-defined]
            features = state.model.backbone((x, shift))
        for row in head.weight:
            torch.testing.assert_close(logits[:, column], F.cosine_similarity(features, row[None], dim=1))
            column += 1
    assert column == logits.shape[1] == 7


def test_class_means_of_other_methods() -> None:
    """With a method that merges, the head of a task has the means of features of the merged model."""
    run = replace(a_run(protocol={"kind": "class-means"}), kind="LoRA", options={})
    state = State(run, problem(), CPU)
    learn(state, 0)
    first = state.model.heads[0].weight.detach().clone()
    learn(state, 1)
    (x, shift), labels = state.tasks[1].train[:]
    with torch.no_grad():
        features = state.model.backbone((x, shift))
        logits = state.model.all_logits((x, shift))
    expected = torch.stack([features[labels == k].mean(0) for k in range(3)])
    torch.testing.assert_close(state.model.heads[1].weight.detach(), expected)
    assert torch.equal(state.model.heads[0].weight, first)
    rows = torch.cat([first, expected])
    torch.testing.assert_close(logits, F.normalize(features, dim=1) @ F.normalize(rows, dim=1).T)


def test_class_means_of_images_as_tested() -> None:
    """Where training examples are drawn anew, means are of the examples as they are tested."""
    found = problem((2,))
    task = found.stream.tasks[0]
    (x, shift), labels = task.train[:]
    shown = Arrays((torch.flip(x, (1,)), shift), labels)
    found = replace(found, stream=Stream("clusters", (replace(task, train_as_test=shown),)))
    state, _ = made(found=found)
    learn(state, 0)
    with torch.no_grad():
        features = state.model.backbone((torch.flip(x, (1,)), shift))
    expected = torch.stack([features[labels == k].mean(0) for k in range(2)])
    torch.testing.assert_close(state.model.heads[0].weight.detach(), expected)


def test_absent_class_refused() -> None:
    with pytest.raises(DataError, match=r"class means: expected .* 3 classes, got \[2.0, 0.0, 1.0\]"):
        class_means([(torch.randn(3, 4), torch.tensor([0, 2, 0]))], 3)


@pytest.mark.parametrize("separate_step", [False, True])
def test_resume_identical(separate_step: bool, tmp_path: Path) -> None:
    """An interrupted run ends with the accuracies, losses and state of one that was not."""
    run, file = a_run(protocol={"kind": "cl-lora", "separate_step": separate_step}), tmp_path / "state.pt"
    whole = execute(run, problem(), CPU)
    interrupted(run, problem(), file)
    resumed = execute(run, problem(), CPU, file)
    assert resumed["matrices"] == whole["matrices"] and resumed["report"] == whole["report"]
    for name in ("loss", "penalty", "state_bytes", "trained_parameters"):
        assert [t[name] for t in resumed["tasks"]] == [t[name] for t in whole["tasks"]], name
    assert (
        min(whole["matrices"]["task_aware"][-1]) > 80.0
    )  # clusters far apart: a loop that trains learns them


def test_other_models_and_methods_refused() -> None:
    lora = replace(a_run(), kind="LoRA", options={})
    with pytest.raises(fe.ArgumentError, match="protocol: expected the method CLLoRA, got LoRA"):
        State(lora, problem(), CPU)
    with pytest.raises(fe.ArgumentError, match="without a learner of its own, for cosine heads, got Heads"):
        State(a_run(), replace(problem(), learner=Heads), CPU)  # type: ignore[arg-type]
    with pytest.raises(fe.ArgumentError, match="separate_step: expected true or false, got 1"):
        protocols.make("CLLoRA", {"kind": "cl-lora", "separate_step": 1})


@pytest.mark.parametrize(
    ("targets", "shared", "message"),
    [
        (
            ["fc"],
            r".*blocks\.[13]\..*",
            r"backbone\.blocks and no others, got .*blocks\.1\.fc.* without .*blocks\.0\.fc",
        ),
        (["fc", "embed"], SHARED, r"blocks of one nn\.ModuleList or nn\.Sequential.*got backbone\.embed"),
    ],
)
def test_no_exit_refused(targets: list[str], shared: str, message: str) -> None:
    run = a_run(adapters={"r": 3, "target_modules": targets}, options={"shared": shared})
    with pytest.raises(fe.ArgumentError, match=message):
        State(run, problem(), CPU)


def test_exit_of_a_single_adapted_block() -> None:
    """Blocks are found where one of them alone has adapters, and all may be shared."""
    model = CosineHeads(Backbone())  # type: ignore[arg-type]
    method = CLLoRA(model, fe.LoRAConfig(r=2, target_modules=["blocks.1.fc"]), shared=["fc"])
    found = EarlyExit(model, method)
    assert (found.path, found.count) == (["backbone", "blocks"], 2)
