# SPDX-License-Identifier: Apache-2.0
"""The mean gradient of the weights against plain autograd of the weights themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KEYS, Tiny, adapted, assert_same, batches, data, snapshot, weight_gradients
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.ewc.gradients import gradient_sums
from fused_ewclora.ops.capture import FisherCapture
from fused_ewclora.ops.sums import GradientSums

EPS = torch.finfo(torch.float64).eps


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], eps: float = EPS) -> None:
    """Sums of a few hundred products whose gradients passed through about 10 layers: 1e3 roundings of the
    largest entry."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        error = float((found[key].double() - value.double()).abs().max())
        assert error <= 1e3 * eps * float(value.abs().max()), f"{key}: error {error:.3e}"


def found_in(model: Tiny, loader, loss_fn=F.cross_entropy, **options) -> tuple[dict[str, Tensor], int]:
    return gradient_sums(model, fe.adapters(model), loader, loss_fn, **options)


@given(
    samples=st.integers(1, 7),
    size=st.integers(1, 7),
    calls=st.integers(1, 3),
    alpha=st.sampled_from([None, 6.0]),
    seed=st.integers(0, 2**20),
)
def test_any_batching(samples, size, calls, alpha, seed):
    """The sum of gradients of samples, for any batches, slices of qkv and layers that run several times."""
    model, (x, y) = adapted(seed, calls=calls, lora_alpha=alpha), data(samples, seed + 1)
    found, count = found_in(model, batches(x, y, size))
    assert count == samples and list(found) == list(KEYS)
    expected = weight_gradients(model, lambda m: F.cross_entropy(m(x), y, reduction="sum"))
    assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """Recomputed forward passes count once."""
    model, (x, y) = adapted(reentrant=reentrant), data(5)
    expected = weight_gradients(model, lambda m: F.cross_entropy(m(x), y, reduction="sum"))
    assert_close(found_in(model, batches(x, y, 2))[0], expected)


def squared(output: Tensor, y: Tensor) -> Tensor:
    return (output - y[:, None]).square().sum(1).mean()


LOSSES = [
    (None, lambda output, y: F.cross_entropy(output, y, reduction="sum")),
    (nn.CrossEntropyLoss(reduction="sum"), lambda output, y: F.cross_entropy(output, y, reduction="sum")),
    (squared, lambda output, y: len(y) * squared(output, y)),
]


@pytest.mark.parametrize(("loss_fn", "total"), LOSSES, ids=["none", "sum", "own"])
def test_losses(loss_fn, total):
    """Losses that are means or sums over samples."""
    model, (x, y) = adapted(), data(7)
    expected = weight_gradients(model, lambda m: total(m(x), y))
    assert_close(found_in(model, batches(x, y, 3), loss_fn)[0], expected)


def test_ignored_targets():
    """A target that is ignored has no gradient, and its sample counts."""
    model, (x, y) = adapted(), data(6)
    masked = torch.where(torch.arange(6) % 3 == 0, -100, y)
    kept = masked != -100
    expected = weight_gradients(model, lambda m: F.cross_entropy(m(x[kept]), y[kept], reduction="sum"))
    found, count = found_in(model, batches(x, masked, 3))
    assert count == 6
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """Sums are fp32; x and dy carry the rounding of the model."""
    model, (x, y) = adapted(dtype=dtype), data(6, dtype=dtype)
    expected = weight_gradients(model, lambda m: F.cross_entropy(m(x), y, reduction="sum"))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, _ = found_in(model, batches(x, y, 4))
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    coarse = (
        0.02 if dtype == torch.float32 else 0.1
    )  # a few roundings in a row, relative to the largest entry
    assert_close(found, expected, torch.finfo(dtype).eps * coarse)


def test_convolution():
    """Overlapping windows of images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
    model.double()
    x, y = torch.randn(5, 3, 6, 6).double(), torch.randint(3, (5,))
    loss = F.cross_entropy(model(x), y, reduction="sum")
    (expected,) = torch.autograd.grad(loss, [model[0].weight])
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["0"]))
    found, _ = found_in(model, batches(x, y, 2))
    assert_close(found, {"0": expected.flatten(1)})


def test_leaves_model():
    """Gradients, modes and values are as before; forward passes run in eval mode."""
    model, (x, y) = adapted(), data(4)
    model.train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    modes, before = [], snapshot(model)
    model.head.register_forward_pre_hook(lambda module, _args: modes.append(module.training))
    found_in(model, batches(x, y, 2))
    assert modes and not any(modes) and model.training and model.head.weight.grad.all()
    assert_same(before, snapshot(model))
    assert all(layer.fisher_capture is None for layer in fe.adapters(model).values())


def test_refused():
    """Data and losses that have no mean gradient are refused, as by a Fisher pass."""
    model, (x, y) = adapted(), data(6)
    for loader, loss_fn, message in (
        ([], F.cross_entropy, "loader is empty"),
        ([(x * torch.nan, y)], F.cross_entropy, "finite"),
        ([(x, y)], lambda output, y: F.cross_entropy(output, y) ** 2, "mean"),
    ):
        with pytest.raises(fe.FisherError, match=message):
            found_in(model, loader, loss_fn)
    assert found_in(model, [], allow_empty=True)[1] == 0


def test_no_temporary():
    """One product adds to the sum itself: nothing of the size of the weight is allocated."""
    total = torch.zeros(512, 512)
    capture = FisherCapture([GradientSums(total)], [((0, 512),)], "gradient")
    x, dy = torch.randn(4, 8, 512), torch.randn(4, 8, 512)
    capture.note_forward(x)
    with torch.profiler.profile(profile_memory=True) as profiler:
        capture.record(x, dy)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max((event.nbytes() for event in events), default=0) < total.nbytes / 8
    expected = 4.0 * dy.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    torch.testing.assert_close(
        total.double(), expected, rtol=0, atol=32 * 2**-23 * float(expected.abs().max())
    )
