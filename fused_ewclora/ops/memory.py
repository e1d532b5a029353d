# SPDX-License-Identifier: Apache-2.0
"""Memory of tensors that operations change in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ArgumentError


def check_written(targets: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Tensors that an operation changes in place: every element has memory of its own, which is none of what
    the operation reads besides. Kernels would read elements that they have changed already."""
    if torch.compiler.is_compiling():
        return  # there is no memory yet; the compiled operation writes a copy, which PyTorch copies back
    by_storage: dict[int, list[str]] = defaultdict(list)
    for name, tensor in read.items():
        by_storage[tensor.untyped_storage()._cdata].append(name)
    for name, target in targets.items():
        if target.is_inference() and not torch.is_inference_mode_enabled():
            raise ArgumentError(
                f"{name}: expected a tensor that was made outside of torch.inference_mode(), got one that "
                "may be changed only inside of it"
            )
        if target.is_neg():
            raise ArgumentError(
                f"{name}: expected a tensor to be changed in place, got one whose memory holds the negative "
                "of its values; call resolve_neg() first"
            )
        if _overlaps_itself(target):
            raise ArgumentError(
                f"{name}: expected elements with memory of their own, to be changed in place, got shape "
                f"{list(target.shape)} with strides {target.stride()}; clone the tensor first"
            )
        for other in by_storage.get(target.untyped_storage()._cdata, ()):
            if _share_elements(target, read[other]):
                raise ArgumentError(
                    f"{name}: expected memory apart from that of {other}, which is read while {name} is "
                    f"changed, got tensors that share elements; clone {other} first"
                )


def span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.is_contiguous() or tensor.numel() < 2:
        return False
    reach = 0  # how far the dimensions of smaller strides go
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride == 0:
                return True
            if stride <= reach:  # dimensions interlock, as no operation of PyTorch makes them: look
                places = torch.zeros(span(tensor), dtype=torch.bool, device="cpu")
                places.as_strided(tensor.shape, tensor.stride()).fill_(True)
                return int(places.sum()) < tensor.numel()
            reach += stride * (size - 1)
    return False


def _share_elements(target: Tensor, other: Tensor) -> bool:
    """Of two tensors with one storage; `target` does not overlap itself."""
    (first, size), (other_first, other_size) = (
        (t.storage_offset() * t.element_size(), span(t) * t.element_size()) for t in (target, other)
    )
    if first + size <= other_first or other_first + other_size <= first or 0 in (size, other_size):
        return False
    if target.element_size() != other.element_size():
        return True  # views of one memory in two dtypes, whose elements nothing below could match
    base = min(target.storage_offset(), other.storage_offset())
    count = max(t.storage_offset() + span(t) for t in (target, other)) - base
    places = torch.zeros(count, dtype=torch.bool, device="cpu")
    places.as_strided(target.shape, target.stride(), target.storage_offset() - base).fill_(True)
    return bool(places.as_strided(other.shape, other.stride(), other.storage_offset() - base).any())
