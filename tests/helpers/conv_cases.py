# SPDX-License-Identifier: Apache-2.0
"""Convolutions to compare with: windows of every kind, and PyTorch's convolution of them."""

from __future__ import annotations

import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fused_ewclora.functional import Geometry

THREE = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
ODD = Geometry((3, 2), (2, 1), (1, 0), (1, 2))
POINT = Geometry((1, 1), (1, 1), (0, 0), (1, 1))
PATCH = Geometry((2, 2), (2, 2), (0, 0), (1, 1))
LINE = Geometry((3,), (2,), (1,), (1,))


@st.composite
def geometries(draw) -> tuple[Geometry, tuple[int, ...]]:
    """Windows of one or two dimensions, disjoint ones among them, and the size of an input."""
    dims = draw(st.sampled_from((1, 2)))
    sides = []
    for _ in range(dims):
        kernel = draw(st.integers(1, 3))
        if draw(st.booleans()):
            sides.append((kernel, draw(st.sampled_from((kernel, 1))), 0, 1))
        else:
            sides.append((kernel, draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.integers(1, 2))))
    geometry = Geometry(*zip(*sides, strict=True))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, _, p, d in sides]
    return geometry, tuple(draw(st.integers(size, size + 5)) for size in least)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    function = F.conv2d if weight.dim() == 4 else F.conv1d
    return function(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation)
