# SPDX-License-Identifier: Apache-2.0
"""Experts that models of transformers store as parameters `[experts, ...]`."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from budgets import LONG
from experts import (
    EXPERTS,
    IDLE,
    KINDS,
    dense,
    end_task,
    gradients,
    language_model,
    log_likelihood,
    losses,
    matrix,
    sample_fisher,
    words,
)
from models import assert_same, fingerprint, randomize_adapters_
from torch import Tensor, nn

import fused_ewclora as fe

BOTH = fe.LoRAConfig(r=2, lora_alpha=3.0, target_modules=["gate_up_proj", "down_proj"])
MIXTURE = "model.layers.0.mlp"
SAMPLE = {"fisher_mode": "sample", "fisher_dtype": torch.float64}


def adapted(
    kind: str = "mixtral", config: fe.LoRAConfig = BOTH, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """(plain, adapted with random lora_B)."""
    plain = language_model(kind, **options)
    model = copy.deepcopy(plain)
    fe.inject(model, config)
    randomize_adapters_(model)
    return plain, model


def close(actual: Tensor | None, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual is not None
    error, scale = float((actual - expected).detach().norm()), float(expected.detach().norm())
    assert error <= tolerance * max(scale, 1e-12), (error, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str):
    """Outputs and the gradients of every adapter are those of the model with W + B diag(s) A."""
    plain, model = adapted(kind)
    ids = words(3)
    twin = dense(plain, model)
    close(model(ids).logits, twin(ids).logits)
    log_likelihood(model, ids).mean().backward()
    wanted = gradients(twin, model, lambda: log_likelihood(twin, ids).mean())
    for name, layer in fe.adapters(model).items():
        ((piece, a, b),) = layer.adapter_parameters()
        close(b.grad, piece.scaling * wanted[name] @ a.T)
        close(a.grad, piece.scaling * b.T @ wanted[name])


@pytest.mark.parametrize("kind", KINDS)
def test_exact_fisher(kind: str):
    """The Fisher per sample is that of autograd, whatever the batches; without tokens it is 0."""
    plain, first = adapted(kind, idle=True)
    ids = words(5)
    wanted = sample_fisher(dense(plain, first), first, ids)
    for sizes in ((2, 3), (5,), (1, 1, 3)):
        ewc = fe.EWC(copy.deepcopy(first), 1.0, **SAMPLE)
        end_task(ewc, ids.split(sizes))
        for name, fisher in ewc.fishers.items():
            close(fisher, wanted[name])
        idle = [name for name in ewc.fishers if f".experts.{IDLE}." in name]
        assert len(idle) == 4 and not any(ewc.fishers[name].any() for name in idle)


def test_batch_fisher():
    """The Fisher per batch is the square of the gradients of batches, times their sizes."""
    plain, model = adapted()
    ids, twin = words(5), dense(plain, model)
    wanted: dict[str, Tensor] = {}
    for part in ids.split((2, 3)):
        found = gradients(twin, model, lambda part=part: log_likelihood(twin, part).mean())
        for name, gradient in found.items():
            wanted[name] = wanted.get(name, 0.0) + gradient.square() * len(part) / len(ids)
    ewc = fe.EWC(model, 1.0, fisher_mode="batch", fisher_dtype=torch.float64)
    end_task(ewc, ids.split((2, 3)))
    for name, fisher in ewc.fishers.items():
        close(fisher, wanted[name])


@pytest.mark.parametrize("kind", KINDS)
def test_three_tasks(kind: str):
    """Over three tasks Fishers add up, the penalty and its gradients are those of the change since the last
    merge, and every merge leaves the outputs as they are."""
    plain, model = adapted(kind)
    ewc = fe.EWC(model, 7.0, **SAMPLE)
    wanted: dict[str, Tensor] = {}
    for task in range(3):
        randomize_adapters_(model, seed=task, size=0.1)
        penalty, total = ewc.penalty(), 0.0
        for name, layer in fe.adapters(model).items() if task else ():
            ((piece, a, b),) = layer.adapter_parameters()
            delta = piece.scaling * b @ a
            total = total + 3.5 * (wanted[name] * delta.square()).sum()
        if task:
            close(penalty, total)
            matrices = [p for layer in fe.adapters(model).values() for _, p in layer.named_lora_parameters()]
            for ours, exact in zip(
                torch.autograd.grad(penalty, matrices), torch.autograd.grad(total, matrices), strict=True
            ):
                close(ours, exact)
        twin = dense(plain, model)
        for name, fisher in sample_fisher(twin, model, words(4, task)).items():
            wanted[name] = wanted.get(name, 0.0) + fisher
        end_task(ewc, words(4, task).split(2))
        plain = twin
        close(model(words(3)).logits, plain(words(3)).logits)
        for name, layer in fe.adapters(model).items():
            close(ewc.fishers[name], wanted[name])
            close(layer.base_weight, matrix(plain, name, layer))
    assert_same(fingerprint(ejected(model)), fingerprint(model))


def ejected(model: nn.Module) -> nn.Module:
    fe.eject(model)
    return model


# A class of each kind: with and without a gate, transposed, with biases, a norm or a gate of its own.
KINDS_OF_EXPERTS = [
    "mixtral.MixtralExperts", "qwen2_moe.Qwen2MoeExperts", "gpt_oss.GptOssExperts", "aria.AriaExperts",
    "nemotron_h.NemotronHExperts", "muse_spark.MuseSparkExperts", "deepseek_v4.DeepseekV4Experts",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts",
]  # fmt: skip
IN_FP32 = ("OpenAIPrivacyFilterExperts", "Inkling2Experts")  # their loops, whatever the dtype


def classes() -> list[str]:
    """Those above, or in long tests every class of experts that transformers has."""
    if not LONG:
        return KINDS_OF_EXPERTS
    found = []
    for file in sorted(Path(next(iter(transformers.__path__))).glob("models/*/modeling_*.py")):
        names = re.findall(r"@use_experts_implementation.*\nclass (\w+)", file.read_text())
        found += [f"{file.parent.name}.{name}" for name in names]
    return found


class Config(SimpleNamespace):
    """What experts of any model may ask for."""

    def __getattr__(self, name: str) -> Any:
        values = {
            "limit": 1.3, "alpha": 1.7, "softcap": 1.1, "eps": 1e-6, "act": "silu", "hidden": 6, "latent": 6,
            "intermediate": 5, "expert": EXPERTS,
        }  # fmt: skip
        found = [value for part, value in values.items() if part in name and not name.startswith("__")]
        if not found:
            raise AttributeError(name)
        return found[0]


def experts_of(path: str) -> nn.Module:
    """A module of the class, in fp64, as the child "experts" of another."""
    folder, name = path.split(".")
    modeling = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
    config = Config(_experts_implementation="eager")
    torch.manual_seed(0)
    module = getattr(modeling, name)(config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return nn.ModuleDict({"experts": module})


@pytest.mark.parametrize("path", classes())
def test_every_kind(path: str):
    """Each kind of experts computes what it computes with W + B diag(s) A, with the same gradient of x."""
    plain = experts_of(path)
    model = copy.deepcopy(plain)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["experts"]))
    assert len(fe.adapters(model)) == 2 * EXPERTS
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, dtype=torch.float64)
    tolerance = 1e-6 if path.endswith(IN_FP32) else 1e-12
    close(model["experts"](x, index, weights), plain["experts"](x, index, weights), tolerance)
    randomize_adapters_(model)
    twin = dense(plain, model)
    outputs = [module["experts"](x, index, weights) for module in (model, twin)]
    close(*outputs, tolerance)
    close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in outputs), tolerance)


def test_names():
    """Targets name all experts, one of them, one of their maps or a parameter; exclude_modules as well."""

    def count(targets: Any, **options: Any) -> int:
        model = language_model("mixtral")
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=targets, **options))
        return len(fe.adapters(model))

    assert count(["experts"]) == 4 * EXPERTS
    assert count(["gate_up_proj"]) == count(["experts.gate_up_proj"]) == 2 * EXPERTS
    assert count(["experts.3"]) == 4 and count(["layers.1.mlp.experts.3.down_proj"]) == 1
    assert count(r".*layers\.0.*\.down_proj") == EXPERTS
    assert count(["experts"], exclude_modules=["experts.0", "down_proj"]) == 2 * (EXPERTS - 1)
    report = fe.inject(language_model("mixtral"), fe.LoRAConfig(target_modules=["experts.1", "experts.9"]))
    assert report.summary["unmatched"] == ["experts.9"]


def test_slices():
    """gate_up_proj has the slices gate and up; rows of the other one never change."""
    plain, model = adapted(config=fe.LoRAConfig(r=2, target_modules=["gate_up_proj"], slices=("up",)))
    twin = dense(plain, model)
    close(model(words(2)).logits, twin(words(2)).logits)
    half = plain.get_parameter(f"{MIXTURE}.experts.gate_up_proj").shape[1] // 2
    gate = f"{MIXTURE}.experts.gate_up_proj"
    assert torch.equal(twin.get_parameter(gate)[:, :half], plain.get_parameter(gate)[:, :half])
    assert not torch.equal(twin.get_parameter(gate), plain.get_parameter(gate))
    with pytest.raises(fe.LayoutError, match=r"experts\.0\.gate_up_proj.*layout"):
        fe.inject(language_model("gpt_oss"), fe.LoRAConfig(target_modules=["gate_up_proj"], slices=("up",)))


def test_some_experts():
    """Experts without an adapter compute what they did."""
    plain, model = adapted(
        "gpt_oss", fe.LoRAConfig(r=2, target_modules=["experts.1", "0.experts.2.down_proj"])
    )
    close(model(words(3)).logits, dense(plain, model)(words(3)).logits)


def test_keys():
    """The keys of the base state_dict stay, a plain checkpoint loads, and eject leaves nothing behind."""
    plain, model = adapted()
    before = fingerprint(plain)
    assert set(plain.state_dict()) == {key for key in model.state_dict() if "lora_" not in key}
    assert f"{MIXTURE}.experts.3.down_proj.lora_A" in model.state_dict()
    loaded = model.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys and all("lora_" in key for key in loaded.missing_keys)
    fe.eject(model, merge=False)
    assert_same(before, fingerprint(model))
    assert type(model.get_submodule(f"{MIXTURE}.experts")) is type(plain.get_submodule(f"{MIXTURE}.experts"))


@pytest.mark.parametrize("kind", KINDS)
def test_merge(kind: str):
    """merge and unmerge change the parameters of experts, and those alone, and restore them bit for bit."""
    plain, model = adapted(kind)
    y = model(words(2)).logits
    fe.merge(model)
    close(model(words(2)).logits, y)
    for name, parameter in dense(plain, model).named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)) != ("experts" in name and "bias" not in name)
    fe.unmerge(model)
    with fe.disabled(model):
        assert torch.equal(model(words(2)).logits, plain(words(2)).logits)
    fe.eject(model)
    close(model(words(2)).logits, y)


def test_copies():
    """Copies, pickled models and reloaded checkpoints of a model with experts compute the same."""
    _, model = adapted()
    y = model(words(2)).logits
    again = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (again, loaded):
        assert torch.equal(other(words(2)).logits, y)
        parts = fe.adapters(other).values()
        assert all(part.owner in set(other.modules()) for part in parts)
        randomize_adapters_(other, seed=5)
    assert torch.equal(model(words(2)).logits, y)


def test_checkpoint(tmp_path: Any):
    """A checkpoint after a task restores experts, adapters and Fishers on the plain model."""
    plain, model = adapted("gpt_oss")
    ewc = fe.EWC(model, 1.0, **SAMPLE)
    end_task(ewc, [words(3)])
    randomize_adapters_(model)
    fe.save_pretrained(tmp_path, model, ewc)
    fe.inject(plain, BOTH)
    other = fe.EWC(plain, 1.0, **SAMPLE)
    fe.load_pretrained(tmp_path, plain, other)
    assert torch.equal(plain(words(2)).logits, model(words(2)).logits)
    assert all(torch.equal(other.fishers[name], fisher) for name, fisher in ewc.fishers.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool):
    """Activation checkpointing changes neither gradients nor Fishers."""
    _, model = adapted()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again.enable_input_require_grads()
    again.train()
    for one in (model, again):
        log_likelihood(one, words(3)).mean().backward()
        end_task(fe.EWC(one, 1.0, **SAMPLE), [words(3)])
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        if ours.grad is not None:
            close(theirs.grad, ours.grad)


def test_compiled():
    """A compiled model runs its experts outside of the graph, with the same output and gradients."""
    _, model = adapted()
    again = copy.deepcopy(model)
    compiled = torch.compile(again, backend="aot_eager")
    for one in (model, compiled):
        log_likelihood(one, words(2)).mean().backward()
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        if ours.grad is not None:
            close(theirs.grad, ours.grad)


def test_bfloat16():
    """Beside bf16 weights adapters are fp32, and the error is that of the plain model in bf16."""
    plain, model = adapted()
    exact = dense(plain, model)(words(2)).logits
    low = copy.deepcopy(plain).bfloat16()
    fe.inject(low, BOTH)
    for ours, theirs in zip(fe.adapters(low).values(), fe.adapters(model).values(), strict=True):
        for (_, value), (_, wanted) in zip(
            ours.named_lora_parameters(), theirs.named_lora_parameters(), strict=True
        ):
            assert value.dtype == torch.float32
            value.data.copy_(wanted)
    wanted = float((dense(plain, model).bfloat16()(words(2)).logits - exact).detach().norm())
    assert float((low(words(2)).logits - exact).detach().norm()) <= 2.0 * wanted


def test_inference():
    """Without gradients experts without tokens are not run, but count as called; other implementations run
    while no adapter does."""
    _, model = adapted(idle=True)
    idle = model.get_submodule(f"{MIXTURE}.experts.{IDLE}.down_proj")
    calls = []
    idle.register_forward_pre_hook(lambda *_: calls.append(1))
    y = model(words(2)).logits
    assert len(calls) == 1  # with a graph: its adapters have gradients, which are 0
    y.sum().backward()
    assert all(not p.grad.any() for _, p in idle.named_lora_parameters())
    with torch.no_grad():
        assert torch.equal(model(words(2)).logits, y)
    assert len(calls) == 1 and fe.verify_forward(model, words(2))[f"{MIXTURE}.experts.{IDLE}.down_proj"] == 1
    assert fe.explain(model, words(2)).summary["bypassed"] == []


def test_all_linear():
    """ "all-linear" takes no experts, as in PEFT, and its report names each parameter that it leaves out."""
    model = language_model("gpt_oss")
    skipped = fe.inject(model, fe.LoRAConfig(r=2, target_modules="all-linear")).summary["skipped"]
    assert not any("experts" in name for name in fe.adapters(model))
    for layer in range(2):
        for leaf in ("gate_up_proj", "down_proj"):
            assert "target_modules can name them" in skipped[f"model.layers.{layer}.mlp.experts.{leaf}"]
        assert "no known layer" in skipped[f"model.layers.{layer}.mlp.router.weight"]
    report = fe.inject(model, BOTH)
    assert [row["name"] for row in report.rows][:2] == [
        f"{MIXTURE}.experts.0-3.gate_up_proj", f"{MIXTURE}.experts.0-3.down_proj"
    ]  # fmt: skip
    assert report.summary["layers"] == 4 * EXPERTS
    with pytest.raises(fe.TargetError, match="has adapters already"):
        fe.inject(model, BOTH)


def test_refused():
    """Experts of an unknown forward, divided over processes, or in a mixture with another forward."""

    def refuse(model: nn.Module, match: str) -> None:
        before = fingerprint(model)
        with pytest.raises(fe.TargetError, match=match):
            fe.inject(model, BOTH)
        assert_same(before, fingerprint(model))

    model = language_model("mixtral")
    experts = model.get_submodule(f"{MIXTURE}.experts")
    kind = type(experts)
    other = type("Other", (kind,), {"forward": lambda self, *args: kind.forward(self, *args)})
    for mixture in model.model.layers:
        mixture.mlp.experts.__class__ = other
    refuse(model, r"experts\.gate_up_proj.*parameters of Other, which is no known layer")
    model = language_model("mixtral")
    model.get_submodule(f"{MIXTURE}.experts")._is_expert_parallel = True
    refuse(model, r"experts\.0\.gate_up_proj: its experts are divided over several processes")
    model = language_model("mixtral")
    mixture = model.get_submodule(MIXTURE)
    mixture.forward = mixture.forward
    refuse(model, r"the forward of its MixtralSparseMoeBlock has been replaced")


def test_rows_to_samples():
    """A function for the experts as a whole tells the samples of their tokens."""
    _, model = adapted()
    ids, tokens = words(4), words(4).shape[1]
    function = lambda rows: torch.arange(len(rows)) // tokens  # noqa: E731
    names = {f"model.layers.{layer}.mlp.experts": function for layer in range(2)}
    found = []
    for options in ({}, {"rows_to_samples": names, "check_samples": False}):
        ewc = fe.EWC(copy.deepcopy(model), 1.0, **SAMPLE)
        ewc.estimate_fisher(
            ids.split(2),
            lambda logits, target: losses(logits, target).mean(),
            forward=lambda m, batch: (m(input_ids=batch).logits, batch),
            **options,
        )
        ewc.consolidate()
        found.append(ewc.fishers)
    for name, fisher in found[0].items():
        close(found[1][name], fisher)
    with pytest.raises(fe.ArgumentError, match=r"some of those of 'model\.layers\.0\.mlp\.experts'"):
        fe.EWC(model, 1.0, **SAMPLE).estimate_fisher(
            [ids], rows_to_samples={f"{MIXTURE}.experts.0.down_proj": function}
        )


class Logits(nn.Module):
    """A language model whose output is a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["SDLoRA", "CoDyRA", "FactorEWC", "InfLoRA", "KeepLoRA"])
def test_methods(name: str):
    """The other methods run two tasks on experts, one of them without tokens, and export what they train."""
    model = Logits(language_model("mixtral", idle=True))
    options = {"InfLoRA": {"total_tasks": 2}, "KeepLoRA": {}}.get(name, {"ewc_lambda": 5.0})
    config = fe.LoRAConfig(r=2, lora_alpha=None, target_modules=["experts"])
    method = getattr(fe.methods, name)(model, config, **options)
    for task in range(2):
        batch = (words(4, task), words(4, task))
        method.begin_task(task)
        method.prepare([batch])
        trained = [p for layer in method.layers.values() for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.05)
        for step in range(2):
            optimizer.zero_grad()
            (losses(model(batch[0]), batch[1]).mean() + method.penalty()).backward()
            optimizer.step()
            method.after_step(step, 2)
        method.end_task([batch], lambda logits, ids: losses(logits, ids).mean())
    close(method.export()(words(2)), model(words(2)))
