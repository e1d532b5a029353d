# SPDX-License-Identifier: Apache-2.0
"""What the error for an unknown packed projection suggests."""

from __future__ import annotations

import pytest
from torch import nn

import fused_ewclora as fe


class Unknown(nn.Module):
    """A packed projection in a class that no rule knows."""

    def __init__(self, rows: int, heads: int | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, rows)
        if heads is not None:
            self.num_heads = heads


@pytest.mark.parametrize(
    ("rows", "slices", "segments", "sizes"),
    [
        (24, ("k", "v"), ("q", "k", "v"), (8, 8, 8)),
        (16, ("k", "v"), ("k", "v"), (8, 8)),
        (16, ("q",), ("q", "k"), (8, 8)),
        (12, ("q", "v"), ("q", "k", "v"), (8, 2, 2)),
        (40, ("up",), ("gate", "up"), (20, 20)),
    ],
)
def test_suggested(rows, slices, segments, sizes):
    """The layout that the sizes allow is named, as a guess, and can be given as it stands."""
    model = nn.ModuleDict({"attn": Unknown(rows, heads=2)})
    with pytest.raises(fe.LayoutError) as error:
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["qkv"], slices=slices))
    text = str(error.value)
    assert text.startswith("attn.qkv: slices: expected a layout")
    assert f"From 8 features to {rows} rows a guess is layout=fe.QKVLayout({segments}, {sizes})" in text
    assert f"\n  {__name__}.Unknown is not known" in text and "only its forward tells" in text
    assert "interleave=2 if the rows of each head are together" in text
    assert not fe.adapters(model)
    layout = fe.QKVLayout(segments, sizes)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["qkv"], slices=slices, layout=layout))


@pytest.mark.parametrize(("rows", "slices"), [(25, ("q",)), (24, ("x",)), (15, ("gate",)), (100, ("v",))])
def test_nothing_likely(rows: int, slices: tuple[str, ...]):
    """Sizes that tell nothing give no guess."""
    with pytest.raises(fe.LayoutError) as error:
        fe.inject(Unknown(rows), fe.LoRAConfig(r=2, target_modules=["qkv"], slices=slices))
    assert "guess" not in str(error.value) and "Either declare it" in str(error.value)


def test_layer_alone():
    """A model that is the layer itself has a guess too."""
    with pytest.raises(fe.LayoutError, match=r"a guess is .*with interleave=heads if"):
        fe.inject(nn.Linear(8, 24), fe.LoRAConfig(r=2, target_modules=r".*", slices=("k",)))
