# SPDX-License-Identifier: Apache-2.0
"""Injected models of timm and transformers under torch.compile: one graph, no graph per step or task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import fused_ewclora as fe

WIDTH, CLASSES, VOCABULARY = 32, 5, 23
K_AND_V = fe.LoRAConfig(
    r=3,
    lora_alpha=6,
    target_modules=["qkv"],
    slices=("k", "v"),
    layout=fe.QKVLayout(("q", "k", "v"), (WIDTH, WIDTH, WIDTH)),
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_vit(depth: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=depth, num_heads=2, num_classes=CLASSES
    )


def injected(model: nn.Module, *configs: fe.LoRAConfig) -> nn.Module:
    """With adapters as in the middle of a training: B is not zero."""
    for config in configs:
        fe.inject(model, config)
    for layer in fe.adapters(model).values():
        for _, _, lora_b in layer.adapter_parameters():
            nn.init.normal_(lora_b, 0.0, 0.1)
    return model


def vit(depth: int = 1) -> nn.Module:
    model = injected(plain_vit(depth), K_AND_V, fe.LoRAConfig(r=2, target_modules=["fc1"]))
    model.head.requires_grad_(True)
    return model


def images(samples: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, 16, 16, generator=generator)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=WIDTH, num_labels=CLASSES, max_position_embeddings=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    return injected(model, fe.LoRAConfig(r=3, target_modules=["query", "value", "dense"]))


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=WIDTH, max_position_embeddings=8, use_cache=False,
    )  # fmt: skip
    return injected(LlamaForCausalLM(config), fe.LoRAConfig(r=3, target_modules="all-linear"))


def tokens(samples: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, VOCABULARY, (samples, 6), generator=generator)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


def loss_of(output: Any, target: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits if logits.dim() == 2 else logits[:, -1], target)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """fp32 through some tens of operations in another order: a few hundred roundings of the largest value."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        bound = 256 * torch.finfo(torch.float32).eps * float(gradient.abs().max())
        torch.testing.assert_close(
            got[name], gradient, rtol=0.0, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


def ewc_after_a_task(model: nn.Module, data: Callable[..., tuple[Tensor, Tensor]]) -> fe.EWC:
    ewc = fe.EWC(model, ewc_lambda=1e3)
    ewc.end_task([data()], loss_of)
    injected(model)
    return ewc


@pytest.mark.parametrize(
    ("make", "data", "backend"),
    [(vit, images, "aot_eager_decomp_partition"), (bert, tokens, "eager"), (llama, tokens, "eager")],
)
def test_matches_eager(make, data, backend):
    """Forward, loss and penalty in one graph; the first of the backends partitions it as inductor does."""
    model = make()
    ewc = ewc_after_a_task(model, data)
    x, y = data()

    def step() -> Tensor:
        return loss_of(model(x), y) + ewc.penalty()

    expected = step()
    assert float(ewc.penalty().detach()) > 1e-3 * float(expected.detach())  # the penalty takes part
    eager = gradients(model, expected)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    got = compiled()
    torch.testing.assert_close(got, expected)
    assert_near(gradients(model, got), eager)


def test_shared_graph():
    """As many graphs as the plain model has; those for disabled and for merged adapters are kept."""
    counts = []
    for model in (plain_vit(), vit()):
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for mode in (True, False, True, False):
            model.train(mode)
            for seed in (1, 2):
                loss_of(compiled(images(seed=seed)[0]), images()[1]).backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]

    ewc = fe.EWC(compiled, ewc_lambda=1e3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for task in range(2):
        for rate in (0.1, 0.01):
            optimizer.param_groups[0]["lr"], ewc.ewc_lambda = rate, 1e5 * rate
            optimizer.zero_grad()
            x, y = images(seed=task)
            (loss_of(compiled(x), y) + ewc.penalty()).backward()
            optimizer.step()
        ewc.end_task([images(seed=task)], loss_of)  # a pass over the compiled model, which runs eagerly
    assert ewc.tasks == 2 and counter.frame_count == counts[1]

    x = images()[0]
    for _ in range(2):
        with fe.disabled(model):
            torch.testing.assert_close(compiled(x), model(x))
        assert counter.frame_count == counts[1] + 1
    for _ in range(2):
        fe.merge(model)
        torch.testing.assert_close(compiled(x), model(x))
        fe.unmerge(model)
        torch.testing.assert_close(compiled(x), model(x))
        assert counter.frame_count == counts[1] + 2


def test_penalty_in_graph():
    """A penalty in the graph compiles for the first task and once for all others."""
    model, counter = vit(), CompileCounterWithBackend("eager")
    ewc = fe.EWC(model, ewc_lambda=1e3)
    x, y = images()
    step = torch.compile(lambda: loss_of(model(x), y) + ewc.penalty(), backend=counter, fullgraph=True)
    for task, graphs in enumerate((1, 2, 2, 2)):
        injected(model)
        for _ in range(2):
            torch.testing.assert_close(step(), loss_of(model(x), y) + ewc.penalty())
        assert counter.frame_count == graphs, task
        ewc.end_task([(x, y)], loss_of)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    ewc.load_state_dict(copy.deepcopy(ewc.state_dict()))
    step()
    assert counter.frame_count == 2


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend, fullgraph=True)
    return model


def wrapped(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize(("how", "frozen"), [(in_place, False), (wrapped, True)])
def test_late_injection(how, frozen):
    """Also where injection changes nothing but classes, because all parameters were frozen before."""
    model, counter = plain_vit().requires_grad_(not frozen), CompileCounterWithBackend("eager")
    compiled, x = how(model, counter), images()[0]
    plain = compiled(x)
    injected(compiled, K_AND_V)
    expected = vit_forward_eagerly(model, x)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(compiled(x), expected)
    assert counter.frame_count == 2
    fe.eject(compiled, merge=False)
    torch.testing.assert_close(compiled(x), plain)


def vit_forward_eagerly(model: nn.Module, x: Tensor) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        return model(x)


def test_blocks_share_graph():
    """Two of them: the input of the first block needs no gradient, those of the others do."""
    model, counter = vit(depth=3), CompileCounterWithBackend("eager")
    x, y = images()
    eager = gradients(model, loss_of(model(x), y))
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        assert_near(gradients(model, loss_of(model(x), y)), eager)
    assert counter.frame_count == 2


def test_dynamic_batch():
    """Batches of any size share a graph once their size is dynamic."""
    model, counter = vit(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for samples in (4, 3, 7, 2):
        x, y = images(samples)
        eager = gradients(model, loss_of(model(x), y))
        torch._dynamo.mark_dynamic(x, 0)
        assert_near(gradients(model, loss_of(compiled(x), y)), eager)
    assert counter.frame_count == 1


def test_bypass_check_hint():
    """A model that only ran compiled is told how to check for bypassed layers."""
    model = vit()
    torch.compile(model, backend="eager")(images()[0])
    with pytest.raises(fe.TargetError, match="compiled calls are not counted, verify_forward"):
        fe.check_bypass(model)
    assert set(fe.verify_forward(model, images()[0]).values()) == {1}
    model(images()[0])
    fe.check_bypass(model)


def test_checkpointed_blocks():
    """Checkpointed blocks compile to one graph, with the gradients of eager ones."""
    model, counter = vit(), CompileCounterWithBackend("aot_eager")
    model.set_grad_checkpointing()
    ewc = fe.EWC(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x, y = images()
    eager = gradients(model, loss_of(vit_forward_eagerly(model, x), y))
    for _ in range(2):
        assert_near(gradients(model, loss_of(compiled(x), y)), eager)
        ewc.end_task([(x, y)], loss_of)
        injected(model)
        eager = gradients(model, loss_of(vit_forward_eagerly(model, x), y))
    assert counter.frame_count == 1
