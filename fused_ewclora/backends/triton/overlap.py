# SPDX-License-Identifier: Apache-2.0
"""Which of the tensors that a call writes may go to one launch: programs of a launch run in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

GROUP = 4  # tensors per launch: each number of them is a kernel of its own


def groups(outputs: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of the tensors that have elements, in order, up to GROUP at a time. Tensors that may share
    elements go to different launches."""
    group: list[int] = []
    held: list[tuple[int, int]] = []
    for i, tensor in enumerate(outputs):
        if tensor.numel() == 0:
            continue
        start, stop = _extent(tensor)
        overlaps = start != 0 and any(start < other and first < stop for first, other in held)  # 0: meta
        if overlaps or len(group) == GROUP:
            yield group
            group, held = [], []
        group.append(i)
        held.append((start, stop))
    if group:
        yield group


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first element to behind the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
