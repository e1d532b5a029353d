# SPDX-License-Identifier: Apache-2.0
"""Models of transformers whose layers do not have the samples first."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fused_ewclora as fe

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 60, "pad_token_id": 0,
}  # fmt: skip
SMALL = {**TEXT, "max_position_embeddings": 64, "num_labels": 3, "hidden_dropout_prob": 0.0}


def adapted(plain: nn.Module, targets: list[str], mode: str = "sample") -> tuple[nn.Module, fe.EWC]:
    model = copy.deepcopy(plain)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=targets))
    return model, fe.EWC(model, fisher_mode=mode, fisher_dtype=torch.float64)


def gradients(plain: nn.Module, names: list[str], loss: Tensor) -> dict[str, Tensor]:
    weights = [plain.get_submodule(name).weight for name in names]
    return dict(zip(names, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True))


def initialised(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p.data, std=0.2)
    return model.double().eval()


def longformer() -> nn.Module:
    config = transformers.LongformerConfig(**SMALL, attention_probs_dropout_prob=0.0, attention_window=8)
    return transformers.LongformerForSequenceClassification(config)


def deberta() -> nn.Module:
    options = {
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True,
        "position_buckets": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    }  # fmt: skip
    return transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**SMALL, **options))


def batch(samples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 55, (samples, 16), generator=generator)
    labels = torch.arange(samples) % 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_longformer():
    """Longformer projects `[T, N, d]`, and its Fisher is that of single samples."""
    torch.manual_seed(0)
    plain = initialised(longformer())
    _, ewc = adapted(plain, ["query", "value"])
    samples = 4  # which divides the 16 tokens
    names, data = list(ewc.layers), batch(samples)
    ewc.end_task([data])
    want = {name: torch.zeros(()) for name in names}
    for n in range(samples):
        loss = plain(**{key: value[n : n + 1] for key, value in data.items()}).loss
        for name, gradient in gradients(plain, names, loss).items():
            want[name] = want[name] + gradient.square() / samples
    for name in names:  # its softmax is in fp32, with a relative error of about eps per probability
        bound = 100 * torch.finfo(torch.float32).eps
        scale = float(want[name].max())
        torch.testing.assert_close(ewc.fishers[name], want[name], rtol=bound, atol=bound * scale)


def test_deberta():
    """DeBERTa projects relative positions, which no sample has: refused, and right in mode "batch"."""
    torch.manual_seed(0)
    plain, data = initialised(deberta()), batch(4)
    targets = ["query_proj", "value_proj"]
    _, ewc = adapted(plain, targets)
    with pytest.raises(fe.FisherError, match=r"query_proj: .*\[1, 16, 16\] for 4 samples"):
        ewc.end_task([data])
    _, ewc = adapted(plain, targets, "batch")
    ewc.end_task([data])
    logits = plain(data["input_ids"], data["attention_mask"]).logits
    want = gradients(plain, list(ewc.layers), F.cross_entropy(logits, data["labels"]))
    for name, gradient in want.items():
        torch.testing.assert_close(ewc.fishers[name], gradient.square(), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(("classes", "samples"), [(8, 4), (4, 4)])
def test_clip_prompts(classes: int, samples: int):
    """The text tower of CLIP has no rows of a sample when it embeds class prompts; the vision tower has."""
    torch.manual_seed(0)
    text = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**{k: TEXT[k] for k in list(TEXT)[:4]}, "image_size": 16, "patch_size": 8}
    plain = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    )
    plain, prompts = initialised(plain), torch.randint(5, 55, (classes, 6))
    x, y = torch.randn(samples, 3, 16, 16, dtype=torch.float64), torch.arange(samples) % classes

    def forward(model: nn.Module, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return model(input_ids=prompts, pixel_values=pair[0]).logits_per_image, pair[1]

    _, ewc = adapted(plain, ["q_proj"])
    with pytest.raises(fe.FisherError, match=r"text_model.*q_proj: .* no share of it"):
        ewc.end_task([(x, y)], F.cross_entropy, forward=forward)
    vision_only = [name for name in ewc.layers if "vision_model" in name]
    _, ewc = adapted(plain, vision_only)
    ewc.end_task([(x, y)], F.cross_entropy, forward=forward)
    want = {name: torch.zeros(()) for name in vision_only}
    for n in range(samples):
        loss = F.cross_entropy(*forward(plain, (x[n : n + 1], y[n : n + 1])))
        for name, gradient in gradients(plain, vision_only, loss).items():
            want[name] = want[name] + gradient.square() / samples
    for name in vision_only:
        torch.testing.assert_close(ewc.fishers[name], want[name], rtol=1e-8, atol=1e-14)
