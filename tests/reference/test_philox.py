# SPDX-License-Identifier: Apache-2.0
"""The dropout generator is Philox4x32-10 bit by bit, with the documented map from seed, row and column."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DROPOUT_BACKENDS, device_of, property_test
from tolerance import assert_same_factors

from fused_ewclora import functional as FE
from fused_ewclora.reference import philox

WORDS = st.integers(0, 2**32 - 1)
ONES = 2**32 - 1
# Published with Random123 (kat_vectors, philox 4x32 10 rounds).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]


def kept_of(backend: str, seed: int, rows: int, columns: int, p: float) -> torch.Tensor:
    """The dropout factors that a backend applies: W = 0 and A = B = I let x = 1 through the mask alone."""
    device = device_of(backend)
    eye = torch.eye(columns, device=device)
    x, weight = torch.ones(rows, columns, device=device), torch.zeros(columns, columns, device=device)
    options = {"dropout_p": p, "training": True, "seed": seed, "backend": backend}
    return FE.lora_linear(x, weight, None, eye, eye, **options).cpu()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_oracle_published(counter, key, words):
    """The oracle gives the published answers."""
    assert oracles.philox4x32(counter, key) == words


def test_reference_published():
    """The reference gives the published answer for counter and key zero."""
    assert tuple(philox.philox_words(torch.tensor(0), 1, 1)[0].tolist()) == KNOWN_ANSWERS[0][2]


@given(seed=st.integers(-(2**63), 2**63 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 5))
def test_words(seed, rows, blocks):
    """Words equal integer arithmetic for every seed."""
    words = philox.philox_words(torch.tensor(seed), rows, blocks).tolist()
    key = (seed % 2**32, (seed >> 32) % 2**32)
    expected = [
        [w for b in range(blocks) for w in oracles.philox4x32((b, m, 0, 0), key)] for m in range(rows)
    ]
    assert words == expected


@pytest.mark.parametrize("backend", DROPOUT_BACKENDS)
@property_test(seed=st.integers(-(2**63), 2**63 - 1), shape=st.tuples(st.integers(1, 9), st.integers(1, 70)))
def test_masks(backend, seed, shape):
    """Masks of every backend equal integer arithmetic."""
    expected = oracles.dropout_mask(seed, *shape, 0.4)
    assert_same_factors(kept_of(backend, seed, *shape, 0.4), expected.float(), backend)


@pytest.mark.parametrize("backend", DROPOUT_BACKENDS)
def test_threshold_of_p(backend):
    """A word between p rounded to fp32 and p tells the two thresholds apart; this one was found by search."""
    seed, row, column, p = 2549570, 3, 4, 0.9
    word = oracles.dropout_word(seed, row, column)
    assert float(torch.tensor(p)) * 2**32 <= word < p * 2**32
    block = 4 * (column // 4 + 1)
    device = device_of(backend)
    # One output column that reads this element alone: rank 1, A selects the column.
    a = torch.zeros(1, block, device=device)
    a[0, column] = 1.0
    x, weight = torch.ones(row + 1, block, device=device), torch.zeros(1, block, device=device)
    one = torch.ones(1, 1, device=device)
    options = {"dropout_p": p, "training": True, "seed": seed, "backend": backend}
    y = FE.lora_linear(x, weight, None, a, one, **options)
    assert y[row, 0] == 0, f"word {word} < threshold {round(p * 2**32)}"


def test_rows_beyond_32_bits():
    """The counter holds the row's low and high half: 2^32 rows later the words differ."""
    assert oracles.dropout_word(5, 2**32 + 1, 0) == oracles.philox4x32((0, 1, 1, 0), (5, 0))[0]
    assert oracles.dropout_word(5, 2**32 + 1, 0) != oracles.dropout_word(5, 1, 0)


def test_threshold_in_word():
    """The threshold never exceeds a word."""
    assert philox.drop_threshold(1.0) == ONES and philox.inverse_keep(1.0) == 0.0
    assert philox.drop_threshold(0.0) == 0
