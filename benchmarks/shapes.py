# SPDX-License-Identifier: Apache-2.0
"""Shapes of the benchmarks, as data: sizes of the models, their linears, samples and ranks."""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """A vision transformer: width, depth, tokens per sample, attention heads; `hidden` of its MLP is 4 x the
    width where it is None."""

    name: str
    width: int
    depth: int
    tokens: int
    heads: int
    hidden: int | None = None

    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the linears of a block."""
        d, h = self.width, self.mlp_width
        return {"qkv": (d, 3 * d), "proj": (d, d), "fc1": (d, h), "fc2": (h, d)}

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of the MLP."""
        return self.hidden or 4 * self.width


class TextModel(NamedTuple):
    """A language model: its linears and their (d_in, d_out), depth, tokens per sample."""

    name: str
    layers: dict[str, tuple[int, int]]
    depth: int
    tokens: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the linears of a block."""
        return self.layers


class Sizes(NamedTuple):
    """Sizes of one run on a GPU: `RELEASE` is measured, `REHEARSAL` only shows that everything runs."""

    base: Model
    large: Model
    huge: Model
    small: Model  # so small that a call finishes before the next one is launched
    samples: int
    rank: int  # of adapters on whole linears
    slice_rank: int  # of the published adapters on k and v
    scales: int  # in the large case of the soft threshold

    @property
    def models(self) -> tuple[Model, ...]:
        """In order of importance."""
        return self.large, self.base, self.huge


RELEASE = Sizes(
    base=Model("ViT-B/16", 768, 12, 197, 12),
    large=Model("ViT-L/16", 1024, 24, 197, 16),
    huge=Model("ViT-H/14", 1280, 32, 257, 16),
    small=Model("ViT-Ti/16", 192, 12, 197, 3),
    samples=64,
    rank=16,
    slice_rank=10,
    scales=1 << 16,
)
TINY = Model("tiny", 16, 1, 5, 2)  # for tests
REHEARSAL = Sizes(base=TINY, large=TINY, huge=TINY, small=TINY, samples=2, rank=4, slice_rank=3, scales=70)
SMALL_VIT = Model("ViT-S/16", 384, 12, 197, 6)
GIANT = Model("ViT-g/14", 1408, 40, 257, 16, hidden=6144)
LLAMA = TextModel(
    "Llama-3.2-1B",
    {"q": (2048, 2048), "k": (2048, 512), "v": (2048, 512), "o": (2048, 2048),
     "gate": (2048, 8192), "up": (2048, 8192), "down": (8192, 2048)},
    depth=16, tokens=512,
)  # fmt: skip
T5 = TextModel(
    "T5-large",
    {"q": (1024, 1024), "k": (1024, 1024), "v": (1024, 1024), "o": (1024, 1024),
     "wi": (1024, 4096), "wo": (4096, 1024)},
    depth=24, tokens=512,
)  # fmt: skip
PRECISIONS = ("highest", "high", "medium")
