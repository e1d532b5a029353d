"""Shapes of the GPU benchmarks, as data: sizes of the models, their linears, samples and ranks."""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """A vision transformer: width, depth, tokens per sample, attention heads."""

    name: str
    width: int
    depth: int
    tokens: int
    heads: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the linears of a block."""
        d = self.width
        return {"qkv": (d, 3 * d), "proj": (d, d), "fc1": (d, 4 * d), "fc2": (4 * d, d)}


class Sizes(NamedTuple):
    """What one run of the suites uses; `RELEASE` is measured, `REHEARSAL` only shows that everything runs."""

    base: Model
    large: Model
    huge: Model
    small: Model  # whose calls are over before the next one is launched
    samples: int
    rank: int  # of adapters on whole linears
    slice_rank: int  # of the published adapters on k and v

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
)
_TINY = Model("tiny", 16, 1, 3, 2)
REHEARSAL = Sizes(base=_TINY, large=_TINY, huge=_TINY, small=_TINY, samples=2, rank=4, slice_rank=3)
PRECISIONS = ("highest", "high", "medium")
