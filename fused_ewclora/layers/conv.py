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

    # Attributes of PyTorch's classes.
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    @staticmethod
    def features(module: nn.Module) -> tuple[int, int]:
        """(in_features, out_features) of a convolution."""
        conv = cast(Any, module)
        return conv.in_channels // conv.groups * math.prod(conv.kernel_size), conv.out_channels

    @classmethod
    def unfit(cls, module: nn.Module) -> str | None:
        conv = cast(Any, module)
        if conv.groups != 1:
            kind = "depthwise" if conv.groups == conv.in_channels else "grouped"
            return f"it is a {kind} convolution (groups={conv.groups}, channels={conv.in_channels})"
        expected = (conv.out_channels, conv.in_channels, *conv.kernel_size)
        if tuple(conv.weight.shape) != expected:
            return f"its weight has shape {list(conv.weight.shape)}, not {list(expected)}"
        return None

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
        if self._windows()[0].disjoint:
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
        geometry, x = self._padded(x)
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
        geometry, x = self._padded(x)
        images = x.shape[0] if x.dim() == self.weight.dim() else 1
        return images * math.prod(geometry.counts(tuple(x.shape[2 - self.weight.dim() :])))

    def rows_of(self, x: Tensor) -> Iterator[Tensor]:
        geometry, x = self._padded(x)
        x = x if x.dim() == self.weight.dim() else x.unsqueeze(0)
        size = math.prod(geometry.counts(tuple(x.shape[2:]))) * self.in_features * x.element_size()
        for images in x.split(max(1, PIECE_BYTES // max(1, size))):
            yield Windows(geometry, [images.unsqueeze(1)]).rows().flatten(0, 1)

    def _windows(self) -> tuple[FE.Geometry, list[int]]:
        """The windows, and what `F.pad` adds to x beforehand, which is nothing where zeros on both sides are
        part of the windows."""
        kernel = tuple(self.weight.shape[2:])
        stride, dilation = (_sizes(value, len(kernel)) for value in (self.stride, self.dilation))
        if self.padding_mode == "zeros" and self.padding != "same":
            padding = (0,) * len(kernel) if self.padding == "valid" else _sizes(self.padding, len(kernel))
            return FE.Geometry(kernel, stride, padding, dilation), []
        around = list(self._reversed_padding_repeated_twice)
        if self.padding_mode == "zeros" and around[::2] == around[1::2]:
            return FE.Geometry(kernel, stride, tuple(reversed(around[::2])), dilation), []
        return FE.Geometry(kernel, stride, (0,) * len(kernel), dilation), around if any(around) else []

    def _padded(self, x: Tensor) -> tuple[FE.Geometry, Tensor]:
        """The windows, and x with the padding that is no part of them."""
        geometry, around = self._windows()
        dims = self.weight.dim()
        if not around or x.dim() not in (dims, dims - 1):  # other inputs are refused later
            return geometry, x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        if x.dim() == dims:
            return geometry, F.pad(x, around, mode=mode)
        return geometry, F.pad(x.unsqueeze(0), around, mode=mode).squeeze(0)


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
