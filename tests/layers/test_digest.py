# SPDX-License-Identifier: Apache-2.0
"""The digest of a tensor depends on every bit, on nothing else, and on neither device nor layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fused_ewclora.layers import digest as module
from fused_ewclora.layers.digest import BLOCK, digest
from fused_ewclora.layers.slices import exact_part, fingerprint, same_weights

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64]
# Below, at and above the sizes at which words and blocks end, in elements of 4 bytes.
SIZES = [1, 2, 3, 17, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * 2 * BLOCK + 5]


def drawn(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random bits, NaN among them."""
    content = np.random.default_rng(seed).bytes(size * torch.empty((), dtype=dtype).element_size())
    return torch.frombuffer(bytearray(content), dtype=dtype)


@given(st.sampled_from(DTYPES), st.sampled_from(SIZES), st.integers(0, 2**32), st.integers(0, 63))
def test_single_bits(dtype, size, at, bit):
    """Every single changed bit changes the digest."""
    tensor = drawn(size, dtype)
    content = tensor.clone().view(torch.uint8).numpy()
    content[at % len(content)] ^= 1 << (bit % 8)
    assert digest(tensor) != digest(torch.from_numpy(content).view(dtype))


@given(st.sampled_from(SIZES[3:]), st.lists(st.integers(0, 2**32), min_size=2, max_size=4, unique=True))
def test_signs_and_swaps(size, places):
    """Negated elements, exchanged elements, rotations and copies of elements change the digest."""
    tensor = torch.arange(1.0, size + 1)
    at = sorted({place % size for place in places})
    negated, rotated, copied = tensor.clone(), tensor.clone(), tensor.clone()
    negated[at] = -negated[at]
    rotated[at] = rotated[at[1:] + at[:1]]
    copied[at] = copied[at[0]].clone()
    found = [digest(t) for t in (tensor, negated, rotated, copied)]
    assert len(set(found)) == (4 if len(at) > 2 else 4 if len(at) == 2 else 2)


def test_shapes_and_dtypes():
    """Shape and dtype are part of it."""
    zeros = [torch.zeros(shape) for shape in ((), (1,), (0,), (2, 3), (3, 2), (6,), (0, 2))]
    dtypes = (torch.float64, torch.int32, torch.bool, torch.complex64)
    zeros += [torch.zeros(6, dtype=dtype) for dtype in dtypes]
    assert len({digest(tensor) for tensor in zeros}) == len(zeros)
    assert digest(torch.zeros(2, device="meta")) == ""
    assert digest(torch.zeros(2)) != digest(-torch.zeros(2))


@pytest.mark.parametrize("shape", [(7, 5), (300, 200)])
def test_layouts(shape):
    """Transposed, strided, offset and differentiable tensors have the digest of their contiguous copies."""
    wide = drawn((shape[0] + 1) * (shape[1] + 1)).view(shape[0] + 1, shape[1] + 1)
    view = wide[1:, 1:]
    copy = view.contiguous()
    assert digest(view) == digest(copy) == digest(copy.t().contiguous().t()) == digest(nn.Parameter(copy))
    odd = drawn(copy.numel() + 1)[1:]  # not on a boundary of 8 bytes
    assert digest(odd) == digest(odd.clone())
    z = torch.complex(copy, copy)
    assert digest(z.conj()) == digest(z.conj().resolve_conj()) != digest(z)


@settings(max_examples=10)
@given(st.sampled_from([1, 2, 5]), st.integers(0, 100))
def test_oracle(blocks, seed):
    """Both ways to add are sums of integers modulo 2^64."""
    words = drawn(blocks * BLOCK, torch.int64, seed).view(blocks, BLOCK)
    weights = module._weights(torch.device("cpu"))
    expected = []
    for table, shift in zip(weights.tolist(), (0, 32), strict=True):
        products = [[a * (x >> shift) for a, x in zip(table, row, strict=True)] for row in words.tolist()]
        expected.append([sum(row) % 2**64 for row in products])
    for sums in (module._block_sums, module._device_sums):
        found = sums(words, *weights)
        assert [[x % 2**64 for x in row] for row in found.tolist()] == expected
    assert (weights % 2 == 1).all()


def test_threads():
    """The number of threads does not matter."""
    tensor, threads, found = drawn(200 * BLOCK + 3), torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(digest(tensor))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_earlier_fingerprints():
    """Fingerprints of earlier versions, of 64 rows, are compared by those rows."""
    weight = torch.randn(200, 8)
    other = weight.clone()
    other[1, 3] += 1.0  # not among the 64
    new, changed = fingerprint(weight), fingerprint(other)
    old = new.partition(":")[0]
    assert len(old) == 16 and exact_part(old) == "" and exact_part(new) == digest(weight)
    assert same_weights(old, new) and same_weights(new, old) and same_weights(old, changed)
    assert same_weights(new, new) and not same_weights(new, changed)
    assert not same_weights(old, "0" * 16) and not same_weights(new, 3) and not same_weights("", new)
