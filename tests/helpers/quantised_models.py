# SPDX-License-Identifier: Apache-2.0
"""Models with quantised layers of bitsandbytes and torchao, by the name of the kind."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import few_bits
import torch
import torchao.quantization as ao
from torch import Tensor, nn

import fused_ewclora as fe

D_IN, HIDDEN, CLASSES = 32, 64, 4
TARGETS = ["fc1", "fc2"]
Linear = Callable[..., nn.Module]


def _four(quant_type: str, nested: bool, **options) -> Linear:
    def make(d_in: int, d_out: int, bias: bool = True) -> nn.Module:
        settings = {"compress_statistics": nested, "quant_type": quant_type, **options}
        return bnb.nn.Linear4bit(d_in, d_out, bias=bias, **settings)

    return make


def _eight(threshold: float) -> Linear:
    def make(d_in: int, d_out: int, bias: bool = True) -> nn.Module:
        return bnb.nn.Linear8bitLt(d_in, d_out, bias=bias, has_fp16_weights=False, threshold=threshold)

    return make


BITSANDBYTES: dict[str, Linear] = {
    "nf4": _four("nf4", False),
    "nf4 nested": _four("nf4", True, compute_dtype=torch.float32),
    "fp4": _four("fp4", False, quant_storage=torch.float32),
    "fp4 nested": _four("fp4", True),
    "int8": _eight(0.0),
    "int8 outliers": _eight(6.0),
}
TORCHAO = {
    "Int8Tensor": lambda: ao.Int8WeightOnlyConfig(),
    "Int8Tensor in groups": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)),
    "Float8Tensor": lambda: ao.Float8WeightOnlyConfig(),
    "Float8Tensor whole": lambda: ao.Float8WeightOnlyConfig(granularity=ao.PerTensor()),
    "IntxUnpackedToInt8Tensor": lambda: ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=ao.PerGroup(16)
    ),
    "Intx asymmetric": lambda: ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int3, granularity=ao.PerGroup(32), mapping_type=ao.MappingType.ASYMMETRIC
    ),
}
KINDS = (*BITSANDBYTES, *TORCHAO)


class MLP(nn.Module):
    """Two hidden layers and a head, which stays in fp32."""

    def __init__(self, linear: Linear = nn.Linear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = linear(D_IN, HIDDEN)
        self.fc2 = linear(HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.to(dtype)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def model_of(kind: str) -> MLP:
    """With hidden layers of this kind, in train mode."""
    if kind in BITSANDBYTES:
        return MLP(BITSANDBYTES[kind]).to("cpu")
    model = MLP()
    ao.quantize_(model, TORCHAO[kind](), filter_fn=lambda module, name: name in TARGETS)
    return model


def adapted(kind: str, mode: str | None = "residual", seed: int = 3, **options) -> MLP:
    """The same with adapters that are not zero."""
    model = model_of(kind)
    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "quantised_merge": mode, **options}
    fe.inject(model, fe.LoRAConfig(**config))
    trained(model, seed)
    return model


@torch.no_grad()
def trained(model: nn.Module, seed: int, size: float = 0.05) -> None:
    """What training does to lora_B."""
    generator = torch.Generator().manual_seed(seed)
    for layer in fe.adapters(model).values():
        for _, _, b in layer.adapter_parameters():
            b.copy_(size * torch.randn(b.shape, generator=generator))


@torch.no_grad()
def dense(model: nn.Module) -> MLP:
    """An ordinary fp64 model with the weights W + s B A of dequantised W."""
    plain = MLP(dtype=torch.float64)
    plain.head.load_state_dict({k: v.double() for k, v in model.head.state_dict().items()})
    for name, layer in fe.adapters(model).items():
        target = plain.get_submodule(name)
        ((piece, a, b),) = layer.adapter_parameters()
        target.weight.copy_(layer.base_weight.double() + piece.scaling * b.double() @ a.double())
        if layer.bias is not None:
            target.bias.copy_(layer.bias)
    return plain


def batch(seed: int, samples: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(x, labels)."""
    return few_bits.batch(seed, samples, D_IN, dtype)
