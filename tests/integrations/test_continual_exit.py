# SPDX-License-Identifier: Apache-2.0
"""The early exit of CL-LoRA's protocol in transformers of timm, torchvision and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_ewclora as fe
from benchmarks import extras
from benchmarks.continual import backbones, minilm
from benchmarks.continual.cl_lora import EarlyExit
from benchmarks.continual.class_means import CosineHeads
from fused_ewclora.methods import CLLoRA

SHARED = 2  # blocks
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# The backbone, its blocks, adapted layers, what its blocks compute -> features, inputs
Network = tuple[Any, str, list[str], Callable[[Tensor], Tensor], Any]


def of_timm() -> Network:
    made = backbones.make(Path(), "test_vit", 32, False, 0)
    network = made.network
    return made, "network.blocks", ["qkv"], lambda x: network.forward_head(network.norm(x)), IMAGES


def of_torchvision() -> Network:
    extras.prepare_torchvision()
    from torchvision.models import VisionTransformer

    network = VisionTransformer(32, 16, 4, 2, 16, 32)
    network.heads = nn.Identity()
    made = backbones.Backbone(network, 16, {})
    return made, "network.encoder.layers", ["mlp.0"], lambda x: network.encoder.ln(x)[:, 0], IMAGES


def of_transformers() -> Network:
    extras.prepare_torchvision()
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    network = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16), add_pooling_layer=False)
    made = backbones.Backbone(network, 16, {}, backbones._class_token)
    blocks = next(n for n, m in made.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    value = next(n for n, m in made.named_modules() if isinstance(m, nn.Linear) and "attention" in n)
    return made, blocks, [value.rpartition(".")[2]], lambda x: network.layernorm(x)[:, 0], IMAGES


def of_language() -> Network:
    extras.prepare_torchvision()
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(**sizes, vocab_size=9), add_pooling_layer=False)
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def mean(x: Tensor) -> Tensor:
        return torch.stack([x[0].mean(0), x[1, 0]])

    inputs = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)), mask
    return minilm.Backbone(bert.encoder.layer, 16), "layer", ["key", "value"], mean, inputs


@pytest.mark.parametrize("made", [of_timm, of_torchvision, of_transformers, of_language])
def test_exit_of_libraries(made: Callable[[], Network]) -> None:
    """What the last shared block computes goes through what follows the last block, and nothing else runs."""
    torch.manual_seed(0)
    backbone, blocks, targets, tail, inputs = made()
    backbone.requires_grad_(False).eval()
    model = CosineHeads(backbone)
    config = fe.LoRAConfig(r=2, target_modules=targets)
    method = CLLoRA(model, config, shared=rf".*\.(encoder_layer_)?[0-{SHARED - 1}]\..*")
    found = EarlyExit(model, method)
    assert (".".join(found.path), found.count) == (f"backbone.{blocks}", SHARED)
    outputs: list[Tensor] = []
    for block in model.get_submodule(f"backbone.{blocks}"):  # type: ignore[union-attr]
        block.register_forward_hook(lambda _, __, y: outputs.append(y[0] if isinstance(y, tuple) else y))
    with torch.no_grad():
        with found.taken():
            early = backbone(inputs)
        assert len(outputs) == SHARED
        torch.testing.assert_close(early, tail(outputs[-1]), rtol=1e-6, atol=1e-6)
        whole = backbone(inputs)
    assert len(outputs) == SHARED + len(model.get_submodule(f"backbone.{blocks}"))  # type: ignore[arg-type]
    assert not torch.allclose(whole, early)
