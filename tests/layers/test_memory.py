# SPDX-License-Identifier: Apache-2.0
"""Weights that share memory with other tensors are found at injection and never merged."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import randomize_adapters_
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.layers import memory
from fused_ewclora.layers.memory import _place

CONFIG = fe.LoRAConfig(r=2, target_modules=["enc"])
X, Y = torch.linspace(-1, 1, 48).reshape(6, 8), torch.arange(6)


class Tied(nn.Module):
    """dec(tanh(enc(x))), whose weights a function ties."""

    def __init__(self, tie: Callable[[Tied], None] | None = None) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        if tie is not None:
            tie(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(torch.tanh(self.enc(x)))


def by_data(model: Tied) -> None:
    model.dec.weight.data = model.enc.weight.data


def transposed(model: Tied) -> None:
    model.dec.weight.data = model.enc.weight.data.t()


def overlapping(model: Tied) -> None:
    flat = torch.randn(100)
    model.enc.weight.data, model.dec.weight.data = flat[:64].view(8, 8), flat[36:].view(8, 8)


def buffer(model: Tied) -> None:
    model.dec.register_buffer("copy", model.enc.weight.data[2:4])


def neighbours(model: Tied) -> None:
    flat = torch.randn(128)
    model.enc.weight.data, model.dec.weight.data = flat[:64].view(8, 8), flat[64:].view(8, 8)


def columns(model: Tied) -> None:
    both = torch.randn(8, 16)
    model.enc.weight.data, model.dec.weight.data = both[:, :8], both[:, 8:]


@pytest.mark.parametrize("tie", [by_data, transposed, overlapping, buffer])
def test_shared_memory_refused(tie: Callable[[Tied], None]):
    """Injection warns, merging and consolidation raise, and nothing is changed."""
    torch.manual_seed(0)
    model = Tied(tie).eval()
    with pytest.warns(UserWarning, match=r"the weight of 'enc' shares its memory with dec\.(weight|copy)"):
        fe.inject(model, CONFIG)
    randomize_adapters_(model)
    y = model(X)
    for call in (
        lambda: fe.merge(model),
        lambda: fe.eject(model),
        lambda: fe.EWC(model).end_task([(X, Y)], F.cross_entropy),
    ):
        with pytest.raises(fe.TargetError, match=r"'enc' shares its memory with dec.*Nothing was changed"):
            call()
    assert torch.equal(model(X), y)
    fe.eject(model, merge=False)


@pytest.mark.parametrize("place", [neighbours, columns])
def test_disjoint_parts_merge(place: Callable[[Tied], None]):
    """Weights in disjoint parts of one storage are independent."""
    torch.manual_seed(0)
    model = Tied(place).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.inject(model, CONFIG)
    randomize_adapters_(model)
    y = model(X)
    fe.merge(model)
    torch.testing.assert_close(model(X), y)


BASE = torch.zeros(36)


@st.composite
def parts(draw: st.DrawFn) -> Tensor:
    """A range of 36 numbers, or a block of them as 6 rows, perhaps transposed."""
    if draw(st.booleans()):
        first = draw(st.integers(0, 35))
        return BASE[first : draw(st.integers(first + 1, 36))]
    top, left = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    block = BASE.view(6, 6)[top : draw(st.integers(top + 1, 6)), left : draw(st.integers(left + 1, 6))]
    return block.t() if draw(st.booleans()) else block


@given(parts(), parts())
def test_common_elements_found(a: Tensor, b: Tensor):
    """Tensors that have an element in common are always found."""
    a.fill_(1.0)
    common = bool(b.any())
    a.zero_()
    assert _place(a).meets(_place(b)) or not common


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_column_blocks(split: int, top: int, other: int, transpose: bool):
    """Blocks on both sides of a column have nothing in common."""
    a, b = BASE.view(6, 6)[top:, :split], BASE.view(6, 6)[other:, split:]
    places = [_place(t.t() if transpose else t) for t in (a, b)]
    one_row = 1 in (a.shape[0], b.shape[0])  # then the block does not tell how long a row is
    assert not places[0].meets(places[1]) or one_row


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """The garbage collector looks at nothing that exists already, of which a test process has much."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_two_models(quick_collections: None):
    """Two models with adapters on one frozen weight: neither is merged while the other exists."""
    torch.manual_seed(0)
    first = Tied()
    second = copy.deepcopy(first)
    second.enc.weight = first.enc.weight
    fe.inject(first, CONFIG)
    with pytest.warns(UserWarning, match="adapted layer of another model"):
        fe.inject(second, CONFIG)
    for model in (first, second):
        with pytest.raises(fe.TargetError, match="adapted layer of another model"):
            fe.merge(model)
    second.itself = [second]  # a cycle, which only the garbage collector ends
    del second, model
    fe.merge(first)
    assert first.enc.merged


def test_empty_shards(monkeypatch):
    """Shards without rows have no memory to share, although each is gone when the next is looked at."""
    monkeypatch.setattr(memory, "is_dtensor", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "to_local", lambda tensor: torch.empty(0, 4), raising=False)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["0", "1"]))
    assert memory.shared_weights(model, memory.weights_of(fe.adapters(model))) == {}
