# SPDX-License-Identifier: Apache-2.0
"""Row layouts of packed projections, and what a configuration accepts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_ewclora import ArgumentError, DtypeError, LayoutError, LoRAConfig, QKVLayout
from fused_ewclora.config import matches

NAMES = ("q", "k", "v", "gate")


def indices(layout: QKVLayout, segment: str, out_features: int) -> list[int]:
    return [row for start, stop in layout.rows(segment, out_features) for row in range(start, stop)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.none() | st.integers(1, 5))
def test_segments_partition_the_rows(parts: list[int], heads: int | None):
    sizes = [part * (heads or 1) for part in parts]
    layout = QKVLayout(NAMES[: len(parts)], tuple(sizes), interleave=heads)
    owned = [indices(layout, name, sum(sizes)) for name in layout.segments]
    assert [len(rows) for rows in owned] == sizes
    assert sorted(row for rows in owned for row in rows) == list(range(sum(sizes)))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 5))
def test_interleaved_rows(parts: list[int], heads: int):
    """Interleaved rows are those that a reshape by heads selects."""
    total = sum(parts) * heads
    layout = QKVLayout(NAMES[: len(parts)], tuple(part * heads for part in parts), interleave=heads)
    by_head = torch.arange(total).view(heads, sum(parts)).split(parts, dim=1)
    for name, selected in zip(layout.segments, by_head, strict=True):
        assert indices(layout, name, total) == selected.flatten().tolist()
        assert len(layout.rows(name, total)) == heads


@given(st.integers(1, 40), st.integers(1, 4))
def test_equal_segments(share: int, count: int):
    """Without sizes, segments share a layer of any size equally."""
    layout = QKVLayout(NAMES[:count])
    assert layout.sizes_of(share * count) == (share,) * count
    assert layout.rows(NAMES[count - 1], share * count) == ((share * (count - 1), share * count),)


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: QKVLayout("qkv"), DtypeError, "segments"),
        (lambda: QKVLayout(()), ArgumentError, "segments"),
        (lambda: QKVLayout(("q", "q")), ArgumentError, "distinct"),
        (lambda: QKVLayout(("q.k",)), ArgumentError, "letters"),
        (lambda: QKVLayout(("q", "k"), (4,)), ArgumentError, "sizes: expected 2"),
        (lambda: QKVLayout(("q", "k"), (4, 0)), ArgumentError, r"sizes\[1\]"),
        (lambda: QKVLayout(("q", "k"), (4, 1.5)), DtypeError, r"sizes\[1\]"),
        (lambda: QKVLayout(("q", "k"), (4, 3), interleave=2), LayoutError, "3 rows of 'k'"),
        (lambda: QKVLayout(("q",), (4,), interleave=0), ArgumentError, "interleave"),
        (lambda: QKVLayout(("q", "k"), (4, 4)).rows("q", 9), LayoutError, "8 rows, the layer has 9"),
        (lambda: QKVLayout(("q", "k")).rows("q", 9), LayoutError, "2 segments"),
        (lambda: QKVLayout(("q", "k"), interleave=3).rows("q", 8), LayoutError, "3 heads"),
        (lambda: QKVLayout(("q", "k")).rows("v", 8), LayoutError, "'v'"),
        (lambda: LoRAConfig(r=0), ArgumentError, "r: expected an integer >= 1, got 0"),
        (lambda: LoRAConfig(r=2.0), DtypeError, "r: "),
        (lambda: LoRAConfig(r=True), DtypeError, "r: "),
        (lambda: LoRAConfig(lora_alpha=float("nan")), ArgumentError, "lora_alpha"),
        (lambda: LoRAConfig(lora_alpha="8"), DtypeError, "lora_alpha"),
        (lambda: LoRAConfig(lora_dropout=1.5), ArgumentError, "lora_dropout"),
        (lambda: LoRAConfig(target_modules=[]), ArgumentError, "target_modules"),
        (lambda: LoRAConfig(target_modules="("), ArgumentError, "regular expression"),
        (lambda: LoRAConfig(target_modules=3), DtypeError, "target_modules"),
        (lambda: LoRAConfig(exclude_modules=[""]), ArgumentError, "exclude_modules"),
        (lambda: LoRAConfig(slices="kv"), DtypeError, "slices"),
        (lambda: LoRAConfig(slices=["k", "k"]), ArgumentError, "slices"),
        (lambda: LoRAConfig(layout=("q", "k", "v")), DtypeError, "layout"),
        (lambda: LoRAConfig(slices=["x"], layout=QKVLayout(("q", "k"))), LayoutError, "'x'"),
        (lambda: LoRAConfig(rank_pattern={"fc1": 0}), ArgumentError, "rank_pattern"),
        (lambda: LoRAConfig(rank_pattern=["fc1"]), DtypeError, "rank_pattern"),
        (lambda: LoRAConfig(alpha_pattern={"[": 1}), ArgumentError, "alpha_pattern"),
    ],
)
def test_bad_fields_are_named(call: Any, error: type[Exception], word: str):
    with pytest.raises(error, match=word):
        call()


def test_pattern_suffix_match():
    """Patterns match the end of the dotted name."""
    config = LoRAConfig(
        r=8, lora_alpha=16, rank_pattern={r"blocks\.1\.fc1": 2, "fc1": 4}, alpha_pattern={"attn.qkv": 1}
    )
    assert config.rank_of("blocks.1.fc1") == 2  # the first pattern that matches wins
    assert config.rank_of("model.blocks.1.fc1") == 2
    assert config.rank_of("blocks.0.fc1") == 4
    assert config.rank_of("fc1") == 4
    assert config.rank_of("blocks.0.myfc1") == 8  # fc1 must start at a dot
    assert config.rank_of("fc1.inner") == 8
    assert config.alpha_of("blocks.0.attn.qkv") == 1
    assert config.alpha_of("blocks.0.attn.proj") == 16


def test_pattern_alternatives():
    """Alternatives in a pattern stay together."""
    config = LoRAConfig(r=8, rank_pattern={"fc1|fc2": 3})
    assert [config.rank_of(name) for name in ("a.fc1", "a.fc2", "fc2", "fc1.x", "x.yfc2")] == [3, 3, 3, 8, 8]


@pytest.mark.parametrize(
    ("targets", "name", "expected"),
    [
        (["qkv"], "blocks.0.attn.qkv", True),
        (["qkv"], "qkv", True),
        (["qkv"], "blocks.0.attn.my_qkv", False),
        (["attn.qkv"], "blocks.0.attn.qkv", True),
        (["q.v"], "qxv", False),  # names are no expressions
        (r".*\.qkv", "blocks.0.attn.qkv", True),
        ("qkv", "blocks.0.attn.qkv", False),  # an expression matches the whole name
        (r"blocks\.[01]\..*fc1", "blocks.1.mlp.fc1", True),
    ],
)
def test_target_rules(targets: Any, name: str, expected: bool):
    assert matches(targets, name) is expected


def test_frozen_no_alias():
    """A configuration is frozen and does not alias its arguments."""
    names, ranks = ["qkv"], {"fc1": 2}
    config = LoRAConfig(target_modules=names, rank_pattern=ranks)
    names.append("fc1")
    ranks["fc1"] = 99
    assert config.target_modules == ("qkv",)
    assert config.rank_of("fc1") == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]
