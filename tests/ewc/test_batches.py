# SPDX-License-Identifier: Apache-2.0
"""How many samples a batch has, and its parts."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from tiny_models import adapted, data

from fused_ewclora.errors import ArgumentError
from fused_ewclora.ewc.batches import batch_size_of, take_sample, take_samples, to_device
from fused_ewclora.ewc.controller import EWC

Pair = namedtuple("Pair", "image mask")


def t(*shape):
    return torch.zeros(shape)


def boxes(*counts):
    return [{"class_labels": torch.zeros(count).long(), "boxes": t(count, 4)} for count in counts]


COUNTED = {
    "tensor": (t(4, 3), 4),
    "x, y": ((t(4, 3), t(4)), 4),
    "x alone": ((t(4, 3),), 4),
    "no targets": ((t(4, 3), None), 4),
    "detection": ({"pixel_values": t(4, 3, 8, 8), "labels": boxes(1, 2, 2, 1)}, 4),
    "detection, first has three boxes": ({"pixel_values": t(2, 3, 8, 8), "labels": boxes(3, 1)}, 2),
    "lists of images and targets": (([t(3, 8, 8), t(3, 9, 8)], boxes(2, 2)), 2),
    "images of four channels": (([t(4, 8, 8), t(4, 8, 8)], boxes(1, 4)), 2),
    "four images, boxes as tensors": ((t(4, 3, 8, 8), [t(1, 4), t(2, 4), t(2, 4), t(1, 4)]), 4),
    "boxes as tensors, one each": ((t(4, 3, 8, 8), [t(1, 4)] * 4), 4),
    "two targets": ((t(4, 3), (t(4), t(4))), 4),
    "two inputs": (([t(4, 3), t(4, 2)], t(4)), 4),
    "two of two": (((t(2, 3), t(2, 3)), (t(2), t(2))), 2),
    "named tuple": ((Pair(t(4, 3, 8), t(4, 8)), t(4)), 4),
    "numbers": ((t(4, 3), [0, 1, 2, 0]), 4),
    "names": ((t(4, 3), ["a", "b", "c", "d"]), 4),
    "last is a number": ((t(4, 3), t(4), 7), 4),
    "last is 0-d": ((t(4, 3), t(4), torch.tensor(7)), 4),
    "last is meta data": ((t(4, 3), t(4), {"size": [224, 224], "source": "a"}), 4),
    "targets are meta data": ((t(4, 3), {"size": [224, 224], "epoch": 3}), 4),
    "last is per class": ((t(4, 3), t(4), t(10)), 4),
    "first is a number": ((7, t(4, 3), t(4)), 4),
    "text": ({"input_ids": t(4, 9), "attention_mask": t(4, 9), "labels": t(4)}, 4),
    "text without labels": ({"input_ids": t(4, 9), "attention_mask": t(4, 9), "n": 3}, 4),
    "question answering": ({"input_ids": t(4, 9), "start_positions": t(4), "end_positions": t(4)}, 4),
    "positions of three axes": ({"input_ids": t(4, 9), "position_ids": t(3, 4, 9), "labels": t(4, 9)}, 4),
    "patches of all images": ({"input_ids": t(4, 9), "pixel_values": t(64, 12), "labels": t(4, 9)}, 4),
    "prompts of classes": ({"input_ids": t(5, 9), "pixel_values": t(4, 3, 8, 8), "labels": t(4)}, 4),
    "inputs of a mapping": (({"input_ids": t(4, 9), "n": t(2)}, t(4)), 4),
    "own names": ({"x": t(4, 3), "labels": t(4), "weights": t(7)}, 4),
    "empty": ((t(0, 3), t(0)), 0),
    "no images": ({"pixel_values": t(0, 3, 8, 8), "labels": []}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_counted_samples(name):
    """A batch has the number of samples that its parts share."""
    batch, samples = COUNTED[name]
    assert batch_size_of(batch) == samples


REFUSED = {
    "x and y": ((t(4, 3), t(3)), r"x has 4, targets has 3.*batch_size_fn"),
    "labels": ({"input_ids": t(4, 9), "labels": t(3)}, r"labels has 3, input_ids has 4.*batch_size_fn"),
    "detection": ({"pixel_values": t(4, 3, 8, 8), "labels": boxes(1, 2)}, "labels has 2, pixel_values has 4"),
    "lists": (([t(3, 8, 8)] * 4, t(5)), "x has 3 or 4, targets has 5"),
    "images alone": (([t(3, 8, 8)] * 4,), "x has 3 or 4"),
    "own names": ({"x": t(4, 3), "mask": t(3, 3)}, "x has 4, mask has 3"),
    "three": ((t(4, 3), t(3), t(2)), "part 0 has 4, part 1 has 3, part 2 has 2"),
    "nothing": (("a", 3), "batch_size_fn"),
    "0-d": (torch.tensor(3.0), "batch_size_fn"),
    "objects": ({"x": object()}, "batch_size_fn"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_undecided_samples(name):
    """Parts that disagree, or tell nothing, are refused with their counts."""
    batch, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        batch_size_of(batch)


@pytest.mark.parametrize("value", [-1, 2.0, None, True, "4"])
def test_bad_batch_size(value):
    """A batch_size_fn must give an integer."""
    ewc = EWC(adapted())
    with pytest.raises(ArgumentError, match="batch_size_fn: expected an integer"):
        ewc.estimate_fisher([data(4)], batch_size_fn=lambda batch: value)


def test_integers_of_libraries():
    """A batch_size_fn may give an integer tensor."""
    ewc = EWC(adapted())
    ewc.estimate_fisher([data(4)], batch_size_fn=lambda batch: torch.ones(4).long().sum())
    ewc.consolidate()
    assert ewc.history[0].samples == 4


def test_several_samples():
    """Samples are cut from nested batches as one sample is."""
    batch = {"x": torch.arange(4.0), "labels": boxes(1, 2, 3, 4), "scale": torch.ones(2)}
    cut = take_samples(batch, slice(1, 3), 4)
    assert cut["x"].tolist() == [1.0, 2.0] and cut["scale"].shape == (2,)
    assert [len(entry["boxes"]) for entry in cut["labels"]] == [2, 3]
    assert take_sample((batch["x"], [4, 5, 6, 7]), 2, 4) == (torch.tensor([2.0]), [6])


def test_device_of_nested():
    """Tensors are moved within their nests, other values stay."""
    moved = to_device({"a": (Pair(t(2), None), ["b", t(1)])}, torch.device("meta"))
    assert moved["a"][0].image.is_meta and moved["a"][0].mask is None
    assert moved["a"][1][0] == "b" and moved["a"][1][1].is_meta
