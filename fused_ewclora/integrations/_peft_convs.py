# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA convolutions as adapted layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from .. import functional as FE
from ..layers import conv
from ._library import require
from ._peft_layers import FusedPeft

require("peft")

from peft.tuners.lora.layer import Conv1d as PeftConv1d  # noqa: E402  (after the version check)
from peft.tuners.lora.layer import Conv2d as PeftConv2d  # noqa: E402


class FusedPeftConv(FusedPeft):
    """What the two classes below share: x `[N, C, *S]`, y `[N, out_channels, *windows]`. lora_A and lora_B
    are convolutions of their own, with kernels `[r, C, *kernel]` and `[out_channels, r, 1, 1]`."""

    stores_matrices: ClassVar[bool] = False
    in_all = False

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """The number of entries of a window; PEFT's own attribute, of which this hides the value, is the
        number of channels."""
        return cast(int, self.base_layer.weight[0].numel())

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's own, which makes the modules of a new adapter."""
        fused = type(self)
        self.__class__ = self.plain
        try:
            self.update_layer(*args, **kwargs)
        finally:
            self.__class__ = fused

    @classmethod
    def kernel_of(cls, module: nn.Module) -> tuple[int, ...]:
        return tuple(cast(Any, module).base_layer.weight.shape[2:])

    @classmethod
    def unlike_peft(cls, module: nn.Module) -> str | None:
        return conv.unlike_peft(cast(Any, module).base_layer)

    @classmethod
    def base_unfit(cls, base: nn.Module) -> str | None:
        if why := super().base_unfit(base):
            return why
        return conv.unfit(base) or conv.unlike_peft(base)

    def matrix_of(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored_as(self, stored: Tensor, matrix: Tensor) -> Tensor:
        return matrix.reshape(stored.shape)

    def composed(self) -> list[FE.Adapter]:
        return [_as_matrices(adapter) for adapter in super().composed()]

    def row_count(self, x: Tensor) -> int:
        return conv.row_count(self.base_layer, x)

    def input_rows(self, x: Tensor) -> Iterator[Tensor]:
        return conv.input_rows(self.base_layer, x)

    def _fused_forward(self, x: Tensor, adapter: FE.Adapter, dropout_p: float, training: bool) -> Tensor:
        geometry, x = conv.padded(self.base_layer, x)
        return FE.lora_conv_adapters(
            x,
            self.base_layer.weight,
            self.base_layer.bias,
            [_as_matrices(adapter)],
            geometry,
            dropout_p=dropout_p,
            training=training,
            capture=self.fisher_capture,
        )


def _as_matrices(adapter: FE.Adapter) -> FE.Adapter:
    return adapter._replace(lora_a=adapter.lora_a.flatten(1), lora_b=adapter.lora_b.flatten(1))


class FusedPeftConv2d(FusedPeftConv, PeftConv2d):
    """`peft.tuners.lora.layer.Conv2d`."""

    plain = PeftConv2d
    bases = (nn.Conv2d,)
    factor = nn.Conv2d


class FusedPeftConv1d(FusedPeftConv, PeftConv1d):
    """`peft.tuners.lora.layer.Conv1d`."""

    plain = PeftConv1d
    bases = (nn.Conv1d,)
    factor = nn.Conv1d
