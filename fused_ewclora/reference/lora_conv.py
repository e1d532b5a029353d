# SPDX-License-Identifier: Apache-2.0
"""LoRA convolution in plain PyTorch: y = conv(x, W) + bias + conv1x1(conv(x, A), B), where A and B are those
of a linear layer on the windows of x (docs/mathematics.md, section 1.1). Differentiable any number of times,
and under the transforms of `torch.func`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .lora_linear import accumulate_dtype
from .philox import inverse_keep


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    keep: Tensor | None,
    dropout_p: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """y `[N, d_out, *T]` of x `[N, C, *S]`, weight `[d_out, C, *K]`, lora_a `[r, C * K]`, lora_b `[d_out, r]`
    and `keep`, the mask of dropout on the x of the low-rank branch; sums are fp32 (fp64 for fp64)."""
    acc = accumulate_dtype(x.dtype)
    conv = F.conv2d if x.dim() == 4 else F.conv1d
    stride, padding, dilation = list(stride), list(padding), list(dilation)
    wide = x.to(acc)
    branch = wide if keep is None else wide * keep * inverse_keep(dropout_p)
    y = conv(wide, weight.to(acc), None if bias is None else bias.to(acc), stride, padding, dilation)
    kernel = lora_a.to(acc).reshape(lora_a.shape[0], *weight.shape[1:])
    z = conv(branch, kernel, None, stride, padding, dilation)
    point = lora_b.to(acc).reshape(*lora_b.shape, *(1 for _ in stride))
    return (y + conv(z, point)).to(x.dtype)
