# SPDX-License-Identifier: Apache-2.0
"""How torchao stores and multiplies quantised weights, which are subclasses of tensors in an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import require

require("torchao")

from torchao.quantization import (  # noqa: E402  (after the version check)
    Float8Tensor,
    Int8Tensor,
    IntxUnpackedToInt8Tensor,
    MappingType,
    PerBlock,
    PerRow,
    PerTensor,
)

KINDS: tuple[type[Tensor], ...] = (Int8Tensor, Float8Tensor, IntxUnpackedToInt8Tensor)
_PARTS = ("qdata", "scale", "zero_point")
# What torchao's own product does with inputs; each is None for a weight that is quantised alone.
_OF_INPUTS = ("act_quant_kwargs", "act_pre_scale", "act_quant_scale", "activation_quantization")


class _Product(torch.autograd.Function):
    """torchao's own x W^T + bias. Its backward dequantises the weight again, where torchao keeps the numbers
    of the forward, as many as the model had before it was quantised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, bias)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias = ctx.saved_tensors
        dx = dy @ weight.dequantize().to(dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0).to(bias.dtype) if ctx.needs_input_grad[2] else None
        return dx, None, db


class TorchAO:
    """Weights of the classes in `KINDS`, without quantised inputs."""

    def product(self, module: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, module.weight, module.bias)
        y: Tensor = _Product.apply(x, module.weight, module.bias)
        return y

    def stored(self, module: Any) -> dict[str, Tensor]:
        parts = {name: getattr(module.weight, name, None) for name in _PARTS}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def numbers(self, module: Any, dtype: torch.dtype, stored: Mapping[str, Tensor] | None = None) -> Tensor:
        names, context = module.weight.__tensor_flatten__()
        inner = {name: getattr(module.weight, name) for name in names} | dict(stored or {})
        shape, strides = module.weight.shape, module.weight.stride()
        weight: Any = type(module.weight).__tensor_unflatten__(inner, context, shape, strides)
        found: Tensor = weight.dequantize()
        return found.to(dtype)

    def quantised(self, module: Any, new: Tensor) -> dict[str, Tensor]:
        """With the default rule of torchao for scales; the tensor does not tell by which rule it was made."""
        weight = module.weight
        new = new.to(weight.dtype)
        if isinstance(weight, IntxUnpackedToInt8Tensor):
            fresh: Any = IntxUnpackedToInt8Tensor.from_hp(
                new, weight.block_size, weight.target_dtype, mapping_type=_mapping(weight)
            )
        elif isinstance(weight, Float8Tensor):
            fresh = Float8Tensor.from_hp(
                new,
                float8_dtype=weight.qdata.dtype,
                granularity=_granularity(weight),
                mm_config=weight.mm_config,
                kernel_preference=weight.kernel_preference,
            )
        else:
            fresh = Int8Tensor.from_hp(
                new,
                granularity=_granularity(weight),
                mapping_type=_mapping(weight),
                reduce_range=weight.reduce_range,
            )
        return {name: getattr(fresh, name) for name in self.stored(module)}

    def kind(self, module: Any) -> str:
        return type(module.weight).__name__

    def dtype(self, module: Any) -> torch.dtype:
        return torch.float64 if module.weight.dtype == torch.float64 else torch.float32


def _granularity(weight: Any) -> Any:
    """The granularity that gives the weight's size of blocks."""
    block, shape = tuple(weight.block_size), tuple(weight.shape)
    if block == (1, shape[1]):
        return PerRow()
    return PerTensor() if block == shape else PerBlock(list(block))


def _mapping(weight: Any) -> Any:
    """Symmetric unless there are zero points."""
    points = weight.zero_point
    return MappingType.ASYMMETRIC if points is not None and bool(points.any()) else MappingType.SYMMETRIC


def unfit(module: Any) -> str | None:
    """The reason why an `nn.Linear` with a weight of one of the `KINDS` cannot be adapted, or None."""
    weight = module.weight
    if any(getattr(weight, name, None) is not None for name in _OF_INPUTS):
        return (
            f"its {type(weight).__name__} quantises inputs as well, of which torchao computes no gradient; "
            "quantise weights alone, as with Int8WeightOnlyConfig"
        )
    expected = (module.out_features, module.in_features)
    if tuple(weight.shape) != expected:
        return f"its weight has shape {list(weight.shape)}, not {list(expected)}"
    return None
