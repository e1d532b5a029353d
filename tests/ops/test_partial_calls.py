# SPDX-License-Identifier: Apache-2.0
"""Calls of one layer that compute different rows of its output, and what they give to its Fisher."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_ewclora.ops.capture import FisherCapture, RowsCapture

N, TOKENS, D_IN, D_OUT = 3, 2, 4, 9
ADAPTERS = (((0, 9),), ((3, 6),), ((0, 2), (4, 9)), ((6, 9),))


def fisher(calls: list[tuple[int, Tensor, Tensor]], rows: tuple[tuple[int, int], ...], mode: str) -> Tensor:
    """Of a sum over samples: the squares of the summed gradients, per sample or of the batch."""
    total = torch.zeros(N, D_OUT, D_IN, dtype=torch.float64)
    for start, x, dy in calls:
        total[:, start : start + dy.shape[-1]] += torch.einsum("nto,nti->noi", dy, x)
    squares = total.square().sum(0) if mode == "sample" else total.sum(0).square() / N
    return torch.cat([squares[a:b] for a, b in rows])


@given(
    st.lists(st.sampled_from([(0, 9), (0, 3), (3, 9), (3, 6), (6, 9)]), min_size=1, max_size=4),
    st.sampled_from(["sample", "batch"]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_partial_sums(calls: list[tuple[int, int]], mode: str, indexed: bool, seed: int):
    """The gradients of the calls are added up row by row before they are squared."""
    torch.manual_seed(seed)
    made = [
        (start, *(torch.randn(N, TOKENS, d, dtype=torch.float64) for d in (D_IN, stop - start)))
        for start, stop in calls
    ]
    buffers = [torch.zeros(sum(b - a for a, b in r), D_IN, dtype=torch.float64) for r in ADAPTERS]
    samples_of = (lambda rows: torch.arange(N).repeat_interleave(TOKENS)) if indexed else None
    capture = FisherCapture(buffers, list(ADAPTERS), mode, "sum", batch_size=N, rows_to_samples=samples_of)
    views = [capture if stop - start == D_OUT else RowsCapture(capture, start) for start, stop in calls]
    for _ in range(2):  # a second batch adds to the first
        notes = [view.note_forward(x) for view, (_, x, _) in zip(views, made, strict=True)]
        for view, (_, x, dy), note in zip(views, made, notes, strict=True):
            view.record(x, dy, note)
    assert (capture.samples, capture.batches) == (2 * N, 2)
    for buffer, rows in zip(buffers, ADAPTERS, strict=True):
        torch.testing.assert_close(buffer, 2 * fisher(made, rows, mode), rtol=1e-12, atol=1e-12)
