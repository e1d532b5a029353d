# SPDX-License-Identifier: Apache-2.0
"""Tiny models with experts, and what is right for them: the same model without adapters whose parameters hold
W + B diag(s) A, one sample at a time under plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import fused_ewclora as fe

WORDS, TOKENS, EXPERTS = 17, 5, 4
SIZES = {
    "vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 6, "moe_intermediate_size": 6, "num_experts": EXPERTS,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"head_dim": 4},
    "gpt_oss": {"head_dim": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}
IDLE = 3  # the expert that no token reaches in `language_model(idle=True)`
Batch = dict[str, Tensor]


class Router(nn.Module):
    """The router of a mixture in the dtype of its weight `[experts, d]`, where those of transformers round to
    fp32. With `idle` it sends no token to the expert IDLE."""

    def __init__(self, weight: nn.Parameter, idle: bool) -> None:
        super().__init__()
        self.weight, self.idle = weight, idle

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.flatten(0, -2), self.weight)
        if self.idle:
            logits[:, IDLE] = -torch.inf
        values, index = logits.topk(2, dim=-1)
        return logits, values.softmax(-1), index


def language_model(kind: str, idle: bool = False, **options: Any) -> nn.Module:
    """A causal language model with experts in fp64 in eval mode, whose weights are large enough to matter."""
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], **options})
    config._experts_implementation = "eager"
    model: nn.Module = hf.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(std=0.5)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, nn.RMSNorm(child.weight.shape[0], 1e-6, dtype=torch.float64))
            elif type(child).__name__.endswith("TopKRouter"):
                setattr(module, name, Router(child.weight, idle))
    return model


def words(samples: int, seed: int = 1) -> Tensor:
    return torch.randint(3, WORDS, (samples, TOKENS), generator=torch.Generator().manual_seed(seed))


def log_likelihood(model: nn.Module, ids: Tensor) -> Tensor:
    """-log p of each sample, summed over its tokens `[N]`."""
    return losses(model(input_ids=ids).logits, ids)


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p of the next tokens of each sample, summed over them `[N]`."""
    every = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return every.view(len(ids), -1).sum(1)


def end_task(ewc: fe.EWC, batches: Iterable[Tensor]) -> None:
    """With the loss of `log_likelihood`; that of transformers is computed in fp32."""
    ewc.end_task(
        batches,
        lambda logits, ids: losses(logits, ids).mean(),
        forward=lambda model, ids: (model(input_ids=ids).logits, ids),
    )


def matrix(model: nn.Module, name: str, layer: Any) -> Tensor:
    """The part of the parameter of `model` that is the weight of the layer called `name`, `[out, in]`."""
    whole = model.get_parameter(layer.weight_name(name))
    stored = whole[layer.part.index]
    return stored.T if layer.transposed else stored


@torch.no_grad()
def dense(plain: nn.Module, adapted: nn.Module) -> nn.Module:
    """A copy of `plain` whose parameters hold B diag(s) A of `adapted` as well."""
    twin = copy.deepcopy(plain)
    for name, layer in fe.adapters(adapted).items():
        for piece, a, b in layer.adapter_parameters():
            delta, done = piece.scaling * b @ a, 0
            for start, stop in piece.rows:
                matrix(twin, name, layer)[start:stop] += delta[done : done + stop - start]
                done += stop - start
    return twin


def gradients(model: nn.Module, adapted: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """d loss / d weight `[out, in]` of every adapted layer in the dense `model`."""
    layers = fe.adapters(adapted)
    names = dict.fromkeys(layer.weight_name(name) for name, layer in layers.items())
    parameters = [model.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    found = dict(zip(names, torch.autograd.grad(loss(), parameters, allow_unused=True), strict=True))
    result = {}
    for name, layer in layers.items():
        whole = found[layer.weight_name(name)]
        if whole is None:
            result[name] = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        else:
            stored = whole[layer.part.index]
            result[name] = stored.T if layer.transposed else stored
    return result


def sample_fisher(model: nn.Module, adapted: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The mean over samples of (d -log p_n / dW)^2, each sample run alone."""
    totals: dict[str, Tensor] = {}
    for sample in ids:
        of_one = gradients(model, adapted, lambda sample=sample: log_likelihood(model, sample[None]).sum())
        for name, gradient in of_one.items():
            totals[name] = totals.get(name, torch.zeros_like(gradient)) + gradient.square() / len(ids)
    return totals
