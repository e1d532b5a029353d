"""Mistakes of new users, by the page that tells of them: each is answered by a message that names the fix."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fused_ewclora as fe

KV = fe.LoRAConfig(r=2, target_modules=["qkv"], slices=("k", "v"))


def vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_base_patch16_224", num_classes=2, **sizes)


def torchvision_vit() -> nn.Module:
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    return torchvision.models.VisionTransformer(16, 8, num_classes=2, **sizes)


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=16, **sizes))


def misspelt(model: nn.Module) -> None:
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["qvk"]))


def twice(model: nn.Module) -> None:
    fe.inject(model, KV)
    fe.inject(model, KV)


def not_injected(model: nn.Module) -> None:
    fe.EWC(model, ewc_lambda=1.0)


def early_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fe.inject(model, KV)
    ewc = fe.EWC(model, ewc_lambda=1.0)
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    ewc.end_task([(x, y)], F.cross_entropy)


def empty_loader(model: nn.Module) -> None:
    fe.inject(model, KV)
    fe.EWC(model, ewc_lambda=1.0).end_task([], F.cross_entropy)


def inner_layer(model: nn.Module) -> None:
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["qkv"]))


def resnet_all_linear(model: nn.Module) -> None:
    fe.inject(torchvision.models.resnet18(num_classes=2), fe.LoRAConfig(r=2, target_modules="all-linear"))


def sliced_query(model: nn.Module) -> None:
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["query"], slices=("q",)))


def not_an_ewc(model: nn.Module) -> None:
    fe.integrations.transformers.EWCCallback(model)  # type: ignore[arg-type]


def no_labels(model: nn.Module) -> None:
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["query"]))
    fe.EWC(model, ewc_lambda=1.0).end_task([{"input_ids": torch.ones(2, 4, dtype=torch.long)}])


MISTAKES: list[tuple[str, Callable[[], nn.Module], Callable[[nn.Module], None], str]] = [
    ("timm", vit, misspelt, "qkv"),
    ("timm", vit, twice, "eject"),
    ("timm", vit, not_injected, r"inject\(model, config\)"),
    ("timm", vit, early_optimizer, "after inject"),
    ("timm", vit, empty_loader, "loader"),
    ("torchvision", torchvision_vit, inner_layer, "self_attention"),
    ("torchvision", torchvision_vit, resnet_all_linear, "target_modules"),
    ("transformers", bert, misspelt, "query"),
    ("transformers", bert, sliced_query, "QKVLayout"),
    ("transformers", bert, not_an_ewc, "EWC"),
    ("transformers", bert, no_labels, "labels"),
]


@pytest.mark.parametrize(
    ("page", "model", "mistake", "fix"), MISTAKES, ids=[f"{page}-{m.__name__}" for page, _, m, _ in MISTAKES]
)
def test_fix_named(page: str, model: Callable[[], nn.Module], mistake: Callable[[nn.Module], None], fix: str):
    """The error or the warning names the fix."""
    with warnings.catch_warnings(), pytest.raises((fe.EWCLoRAError, fe.EWCLoRAWarning), match=fix):
        warnings.simplefilter("error", fe.EWCLoRAWarning)
        mistake(model())
