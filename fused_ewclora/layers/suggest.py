# SPDX-License-Identifier: Apache-2.0
"""What the layout of a packed projection may be, as far as its sizes tell, for the error that asks for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

# Orders that are common; those of gates and of queries that are fewer keep their order too.
_EQUAL = (("q", "k", "v"), ("k", "v"), ("q", "k"), ("gate", "up"))
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads")


def suggestion(parent: nn.Module, in_features: int, out_features: int, slices: Sequence[str]) -> str:
    """A sentence with the layouts that the sizes of an unknown projection allow; "" if none is likely."""
    layouts = _likely(in_features, out_features, set(slices))
    if not layouts:
        return ""
    kind = type(parent)
    heads = next((n for name in _HEADS if isinstance(n := getattr(parent, name, None), int)), None)
    by_head = "interleave=heads" if heads is None else f"interleave={heads}"
    return (
        f"\n  {kind.__module__}.{kind.__qualname__} is not known, and only its forward tells which rows are "
        f"which. From {in_features} features to {out_features} rows a guess is "
        + ", or ".join(layouts)
        + f", "
        f"with {by_head} if the rows of each head are together"
    )


def _likely(in_features: int, out_features: int, slices: set[str]) -> list[str]:
    found = [
        _text(segments, (out_features // len(segments),) * len(segments))
        for segments in _EQUAL
        if slices <= set(segments) and _divides(segments, in_features, out_features)
    ]
    few, rest = divmod(out_features - in_features, 2)
    if (
        not found
        and slices <= {"q", "k", "v"}
        and not rest
        and 0 < few < in_features
        and in_features % few == 0
    ):
        found.append(_text(("q", "k", "v"), (in_features, few, few)))
    return found


def _divides(segments: tuple[str, ...], in_features: int, out_features: int) -> bool:
    """An attention mostly projects to as many features as it has; a gate to any number."""
    if segments == ("gate", "up"):
        return out_features % 2 == 0
    return out_features == len(segments) * in_features


def _text(segments: tuple[str, ...], sizes: tuple[int, ...]) -> str:
    return f"layout=fe.QKVLayout({segments}, {sizes})"
