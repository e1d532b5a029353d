# SPDX-License-Identifier: Apache-2.0
"""`LoRAConv2d` and `LoRAConv1d`: convolutions as linear maps of their windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FE
from ..ops.windows import PIECE_BYTES, Windows
from .adapted import AdaptedLinear
from .matching import register_adapted_class


class AdaptedConv(AdaptedLinear):
    """What `LoRAConv2d` and `LoRAConv1d` share: y = conv(x, W) + bias + conv1x1(conv(x, A) s, B), W and bias
    frozen (docs/mathematics.md, section 1.1).

    x `[N, C, *S]` or `[C, *S]`. in_features is C times the size of the kernel, lora_A `[r, in_features]` and
    the Fisher `[out_channels, in_features]` have the order of `weight.flatten(1)`, whatever the memory format
    is. The rest is as in `LoRALinear`.
    """

    in_all = False

    out_channels: int

    @staticmethod
    def features(module: nn.Module) -> tuple[int, int]:
        """(in_features, out_features) of a convolution."""
        conv = cast(Any, module)
        return conv.in_channels // conv.groups * math.prod(conv.kernel_size), conv.out_channels

    @classmethod
    def unfit_shape(cls, module: nn.Module) -> str | None:
        return unfit(module)

    @classmethod
    def kernel_of(cls, module: nn.Module) -> tuple[int, ...]:
        return tuple(cast(Tensor, module.weight).shape[2:])

    @classmethod
    def unlike_peft(cls, module: nn.Module) -> str | None:
        return unlike_peft(module)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """The number of entries of a window."""
        return self.features(self)[0]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """The number of output channels."""
        return self.out_channels

    def matrix_of(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored_as(self, stored: Tensor, matrix: Tensor) -> Tensor:
        return matrix.reshape(stored.shape)

    def not_fused(self) -> str | None:
        """The reason why calls of this layer do not run on the fused op, or None."""
        if windows_of(self)[0].disjoint:
            return None
        return "its windows overlap or are padded, so PyTorch's convolutions compute it"

    def base_forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(x, self.weight, self.bias))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, C, *S]` -> y `[N, out_channels, *windows]`, both with or without N; the plain output while
        merged or disabled."""
        adapters = self.active()
        if adapters is None:
            return self.base_forward(x)
        geometry, x = padded(self, x)
        return FE.lora_conv_adapters(
            x,
            self.weight,
            self.bias,
            adapters,
            geometry,
            dropout_p=self.dropout_p,
            training=self.training,
            capture=self.fisher_capture,
        )

    def reset_parameters(self) -> None:
        """Initialise weight and bias anew, as PyTorch does, and the adapters."""
        super().reset_parameters()  # type: ignore[misc]
        if "adapter_slices" in self.__dict__:  # PyTorch's constructor calls this before the adapters exist
            self.reset_adapters()

    def row_count(self, x: Tensor) -> int:
        return row_count(self, x)

    def input_rows(self, x: Tensor) -> Iterator[Tensor]:
        return input_rows(self, x)


def unfit(module: nn.Module) -> str | None:
    """The reason why a convolution cannot be adapted, or None."""
    conv = cast(Any, module)
    if conv.groups != 1:
        kind = "depthwise" if conv.groups == conv.in_channels else "grouped"
        return f"it is a {kind} convolution (groups={conv.groups}, channels={conv.in_channels})"
    expected = (conv.out_channels, conv.in_channels, *conv.kernel_size)
    if tuple(conv.weight.shape) != expected:
        return f"its weight has shape {list(conv.weight.shape)}, not {list(expected)}"
    return None


def windows_of(module: nn.Module) -> tuple[FE.Geometry, list[int]]:
    """The windows of a convolution, and what `F.pad` adds to x beforehand, which is nothing where zeros, as
    many on both sides, are part of the windows."""
    conv = cast(Any, module)
    kernel = tuple(conv.weight.shape[2:])
    stride, dilation = (_sizes(value, len(kernel)) for value in (conv.stride, conv.dilation))
    none = (0,) * len(kernel)
    if conv.padding_mode == "zeros" and conv.padding != "same":
        padding = none if conv.padding == "valid" else _sizes(conv.padding, len(kernel))
        return FE.Geometry(kernel, stride, padding, dilation), []
    around = list(conv._reversed_padding_repeated_twice)
    if conv.padding_mode == "zeros" and around[::2] == around[1::2]:
        return FE.Geometry(kernel, stride, tuple(reversed(around[::2])), dilation), []
    return FE.Geometry(kernel, stride, none, dilation), around if any(around) else []


def padded(module: nn.Module, x: Tensor) -> tuple[FE.Geometry, Tensor]:
    """The windows of a convolution, and x with the padding that is no part of them."""
    conv = cast(Any, module)
    geometry, around = windows_of(conv)
    dims = conv.weight.dim()
    if not around or x.dim() not in (dims, dims - 1):  # other inputs are refused later
        return geometry, x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if x.dim() == dims:
        return geometry, F.pad(x, around, mode=mode)
    return geometry, F.pad(x.unsqueeze(0), around, mode=mode).squeeze(0)


def row_count(module: nn.Module, x: Tensor) -> int:
    """The number of windows of a convolution in a call with x."""
    geometry, x = padded(module, x)
    dims = len(geometry.kernel)
    return math.prod(x.shape[: -dims - 1]) * math.prod(geometry.counts(tuple(x.shape[-dims:])))


def input_rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """These windows `[rows, columns]`, in pieces of limited size."""
    geometry, x = padded(module, x)
    x = x if x.dim() == len(geometry.kernel) + 2 else x.unsqueeze(0)
    window = x.shape[1] * math.prod(geometry.kernel) * x.element_size()
    size = math.prod(geometry.counts(tuple(x.shape[2:]))) * window
    for images in x.split(max(1, PIECE_BYTES // max(1, size))):
        yield Windows(geometry, [images.unsqueeze(1)]).rows().flatten(0, 1)


def unlike_peft(module: nn.Module) -> str | None:
    """The reason why PEFT's LoRA of a convolution does not add B A to its weight, or None: the convolutions
    that it adds have the stride and the padding of the module, but neither its dilation nor its padding
    mode."""
    conv = cast(Any, module)
    kernel = tuple(conv.weight.shape[2:])
    if any(k > 1 and d > 1 for k, d in zip(kernel, _sizes(conv.dilation, len(kernel)), strict=True)):
        return f"PEFT's LoRA ignores its dilation {conv.dilation}"
    if conv.padding_mode != "zeros" and any(conv._reversed_padding_repeated_twice):
        return f"PEFT's LoRA ignores its padding_mode {conv.padding_mode!r}"
    return None


def _sizes(value: Any, count: int) -> tuple[int, ...]:
    """One number per dimension; models that change the stride of a convolution may set a single one."""
    return (value,) * count if isinstance(value, int) else tuple(value)


class LoRAConv2d(AdaptedConv, nn.Conv2d):
    """An `nn.Conv2d` with adapters; `fused_ewclora.inject` makes them in place of convolutions that
    `target_modules` names."""

    plain = nn.Conv2d


class LoRAConv1d(AdaptedConv, nn.Conv1d):
    """An `nn.Conv1d` with adapters; `fused_ewclora.inject` makes them in place of convolutions that
    `target_modules` names."""

    plain = nn.Conv1d


register_adapted_class(LoRAConv2d)
register_adapted_class(LoRAConv1d)
