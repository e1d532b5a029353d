# SPDX-License-Identifier: Apache-2.0
"""An exact digest of the bits of a tensor, computed on the device that holds it."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Array = NDArray[np.int64]
BLOCK = 8192  # words of 8 bytes that share one pair of sums
CPU_STEP, DEVICE_STEP = 4, 512  # blocks at a time; on a CPU they stay in its cache


@torch.no_grad()
def digest(tensor: Tensor) -> str:
    """The dtype, a colon and a hash of shape and bits; `""` on the meta device.

    A block of words x_i of 64 bits becomes two sums modulo 2^64, sum_i a_i x_i and sum_i b_i (x_i >> 32),
    with fixed random odd a_i and b_i; the sums of all blocks are hashed by SHA-256. Any change within one
    word is found, because an odd factor is invertible. Any other change of given tensors goes unnoticed with
    a probability of at most 2^-32 over the factors: either upper halves change, by less than 2^32, or only
    lower halves do, and a sum of random multiples of such numbers is zero that rarely. Integer sums do not
    depend on their order, so that the digest is the same on all devices and for any number of threads; of a
    tensor on a GPU only the sums are copied to the host. It is no protection against an adversary.
    """
    if tensor.is_meta:
        return ""
    dtype = str(tensor.dtype).removeprefix("torch.")
    found = hashlib.sha256(repr((dtype, tuple(tensor.shape))).encode())
    if is_traceable_wrapper_subclass(tensor):  # quantised weights, for example
        names, context = tensor.__tensor_flatten__()
        found.update(repr((type(tensor).__name__, context)).encode())
        for name in names:
            found.update(digest(getattr(tensor, name)).encode())
    else:
        found.update(_sums(_bytes(tensor)))
    return f"{dtype}:{found.hexdigest()[:32]}"


def _bytes(tensor: Tensor) -> Tensor:
    """The elements as bytes in their logical order; the tensor's own memory where that is contiguous."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8 or flat.data_ptr() % 8:
        flat = flat.clone()  # words of 8 bytes must be aligned
    return flat.view(torch.uint8)


def _sums(content: Tensor) -> bytes:
    size = 8 * BLOCK
    end = content.numel() // size * size
    parts = [content[:end]] if end else []
    if end < content.numel():
        last = content.new_zeros(size)
        last[: content.numel() - end] = content[end:]
        parts.append(last)
    low, high = _weights(content.device)
    sums = [_block_sums(part.view(torch.int64).view(-1, BLOCK), low, high) for part in parts]
    return torch.cat(sums, 1).cpu().numpy().tobytes() if sums else b""


def _block_sums(words: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Both sums of each block, `[2, blocks]`."""
    if words.device.type != "cpu":
        return _device_sums(words, low, high)
    sums = words.new_empty(2, words.shape[0])
    _cpu_sums(words.numpy(), low.numpy(), high.numpy(), sums.numpy())
    return sums


def _device_sums(words: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """In PyTorch; devices have no product of an integer matrix and a vector."""
    sums = words.new_empty(2, words.shape[0])
    scratch = torch.empty_like(words[:DEVICE_STEP])
    for start in range(0, words.shape[0], DEVICE_STEP):
        piece, (first, second) = words[start : start + DEVICE_STEP], sums[:, start : start + DEVICE_STEP]
        work = scratch[: piece.shape[0]]
        torch.sum(torch.mul(piece, low, out=work), 1, out=first)
        torch.sum(torch.bitwise_right_shift(piece, 32, out=work).mul_(high), 1, out=second)
    return sums


def _cpu_sums(words: Array, low: Array, high: Array, sums: Array) -> None:
    """In NumPy, whose einsum of integers is twice as fast as PyTorch's product."""
    scratch = np.empty_like(words[:CPU_STEP])
    for start in range(0, len(words), CPU_STEP):
        piece, (first, second) = words[start : start + CPU_STEP], sums[:, start : start + CPU_STEP]
        work = scratch[: len(piece)]
        np.einsum("ij,j->i", piece, low, out=first)
        np.einsum("ij,j->i", np.right_shift(piece, 32, out=work), high, out=second)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    drawn = hashlib.shake_128(b"fused_ewclora").digest(2 * 8 * BLOCK)
    odd = np.frombuffer(drawn, dtype="<i8") | 1
    return torch.from_numpy(odd).view(2, BLOCK).to(device)
