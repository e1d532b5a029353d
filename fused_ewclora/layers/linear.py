# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear`: an `nn.Linear` whose adapters are parameters of the same module, so that base keys stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..config import QKVLayout, probability
from .adapted import AdaptedLinear
from .slices import AdapterSlice, fingerprint, fisher_key, plan_slices

__all__ = ["AdapterSlice", "LoRALinear", "fingerprint", "fisher_key"]


class LoRALinear(AdaptedLinear, nn.Linear):
    """`y = x W^T + bias + ((x A^T) s) B^T` on the rows of each adapter, W and bias frozen
    (docs/mathematics.md, section 1).

    x `[..., in_features]`, y `[..., out_features]`; lora_A `[r, in_features]` and lora_B `[rows, r]`, with
    slices lora_A_k, lora_B_k and so on. The adapters of an fp16 or bf16 weight are fp32; others have the
    dtype of the weight. If a parameter `lora_scale` (`lora_scale_k`), 0-d or `[r]`, is assigned later, it
    multiplies the scale.

    Args:
        in_features: of x.
        out_features: of y.
        r: the rank, >= 1.
        lora_alpha: None for scale 1, else the scale is lora_alpha / r.
        lora_dropout: the dropout probability on the x of the low-rank branch.
        bias: whether there is a bias.
        slices: the segments of the layout that get one adapter each; None adapts all rows by one.
        layout: of the rows, where there are slices.
        device: of all parameters.
        dtype: of weight and bias.

    Raises:
        ArgumentError: for a value that is out of range; the message names the argument.
        DtypeError: for a dtype that is not floating point.
        LayoutError: for slices without a layout that fits.

    Examples:
        >>> layout = fe.QKVLayout(("q", "k", "v"))
        >>> layer = fe.LoRALinear(8, 24, r=2, slices=("k", "v"), layout=layout)
        >>> layer.lora_B_k.shape
        torch.Size([8, 2])
    """

    plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        bias: bool = True,
        slices: Sequence[str] | None = None,
        layout: QKVLayout | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        adapters = plan_slices(out_features, r, lora_alpha, slices, layout)
        probability(lora_dropout, "lora_dropout")
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_adapters(adapters, lora_alpha, lora_dropout)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        slices: Sequence[str] | None = None,
        layout: QKVLayout | None = None,
    ) -> LoRALinear:
        """A new layer that shares weight and bias with `linear` and freezes them.

        Args:
            linear: the layer.
            r: as in the constructor, like all that follow.
            lora_alpha: as there.
            lora_dropout: as there.
            slices: as there.
            layout: as there.

        Returns:
            The new layer.

        Raises:
            ArgumentError: as the constructor.
            DtypeError: as the constructor.
            LayoutError: as the constructor.

        Examples:
            >>> layer = fe.LoRALinear.from_linear(nn.Linear(16, 16), r=4)
        """
        adapters = plan_slices(linear.out_features, r, lora_alpha, slices, layout)
        probability(lora_dropout, "lora_dropout")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias, layer.training = linear.weight, linear.bias, linear.training
        layer._add_adapters(adapters, lora_alpha, lora_dropout)
        return layer

    def reset_parameters(self) -> None:
        """Initialise weight and bias anew, as `nn.Linear` does, and the adapters."""
        super().reset_parameters()
        if "adapter_slices" in self.__dict__:  # nn.Linear.__init__ calls this before the adapters exist
            self.reset_adapters()
