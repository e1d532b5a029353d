# SPDX-License-Identifier: Apache-2.0
"""SD-LoRA: every step against dense matrices and loops, and what a sequence of tasks promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_literal import OFFICIAL, Literal, directions, optimizer_of, run, train
from strategies import seeds
from tiny_models import KEYS, WIDTH, adapted, batches, data
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.methods import SDLoRA
from fused_ewclora.methods._directions import Directions, inverse_norm
from fused_ewclora.methods._freezing import freeze, measure

ROWS = ((0, WIDTH),)


def dense(adapter: FE.Adapter) -> Tensor:
    return adapter.lora_b @ torch.diag(adapter.scale.expand(adapter.lora_a.shape[0])) @ adapter.lora_a


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ranks": (2, 3, 1)},
        {"ranks": lambda task: 4 - task, "kd_threshold": 0.97},
        {"normalization": "factors", "alpha_init": 0.8, "reset_alphas": True},
        {"normalization": "factors", "ranks": 3, "kd_threshold": 0.95, "alpha_init": 1.5},
        {"ewc_lambda": 40.0, "gamma": 0.7, "kd_threshold": 0.95, "fisher_dtype": torch.float64},
        {"ewc_lambda": 40.0, "reset_alphas": True, "ranks": (2, 4), "fisher_dtype": torch.float64},
        OFFICIAL | {"magnitudes": "per_adapter", "ranks": (3, 2, 1)},
        {"magnitudes": "shared"},
        {"magnitudes": "shared", "ranks": (2, 3, 1), "kd_threshold": 0.998},
        OFFICIAL,
        OFFICIAL | {"ranks": (3, 2, 1)},
        OFFICIAL | {"ewc_lambda": 40.0, "fisher_dtype": torch.float64},
        {"magnitudes": "shared", "ewc_lambda": 40.0, "gamma": 0.7, "fisher_dtype": torch.float64},
    ],
    ids=[
        "paper", "ranks", "distilled", "official", "all", "ewc", "ewc that starts off its anchor",
        "official ranks", "shared", "shared and distilled", "shared as official",
        "shared as official ranks", "shared as official, with ewc", "shared with ewc",
    ],
)  # fmt: skip
def test_matches_dense_steps(options):
    """Every step is that of dense matrices."""
    model = adapted()
    method = SDLoRA(model, **options)
    literal = Literal(model, **{k: v for k, v in options.items() if k not in ("ranks", "fisher_dtype")})
    dropped = 0
    for task in range(3):
        method.begin_task(task)
        literal.begin(task, directions(model))
        ours, theirs = optimizer_of(model), torch.optim.SGD(literal.parameters(), lr=0.05, momentum=0.5)
        for step in range(3):
            x, y = data(8, seed=10 * task + step)
            losses = []
            for optimizer, forward, penalty in (
                (ours, model, method.penalty),
                (theirs, literal.forward, literal.penalty),
            ):
                optimizer.zero_grad()
                losses.append(F.cross_entropy(forward(x), y) + penalty())
                losses[-1].backward()
                optimizer.step()
            torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
            for key, now in directions(model).items():
                expected = (literal.a[key], literal.b[key], torch.stack(literal.alphas[key]))
                for found, value in zip((now.lora_A, now.lora_B, now.lora_magnitudes), expected, strict=True):
                    torch.testing.assert_close(found.detach(), value.detach(), rtol=1e-9, atol=1e-9)
        loader = batches(*data(9, seed=task), 4)
        method.end_task(loader, F.cross_entropy)
        literal.end(loader)
        x, _ = data(4, seed=77)
        torch.testing.assert_close(model(x), literal.forward(x), rtol=1e-9, atol=1e-9)
        for row, key in zip(method.report().rows, KEYS, strict=True):
            torch.testing.assert_close(row["residuals"][-1], literal.residuals[key][-1], rtol=1e-9, atol=1e-9)
            dropped += len(row["residuals"]) - len(row["tasks"])
    assert ("kd_threshold" in options) == (dropped > 0)  # else the case shows nothing


past_ranks = st.lists(st.integers(1, 4), max_size=4)


def random_directions(seed: int, ranks: list[int], r: int, rows: int, columns: int) -> Directions:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scale = torch.block_diag(*(randn(rank, 1) for rank in ranks)) if ranks else randn(0, 0)
    tensors = (randn(r, columns), randn(rows, r), randn(len(ranks) + 1))
    past = (randn(sum(ranks), columns), randn(rows, sum(ranks)), scale, randn(len(ranks)))
    return Directions(*(t.requires_grad_() for t in tensors), *past)


@given(seeds, past_ranks, st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=15)
def test_normalisation_gradients(seed, ranks, r, rows, columns):
    """Gradients through the normalisation are exact."""
    now = random_directions(seed, ranks, r, rows, columns)
    x = torch.randn(3, columns).double().requires_grad_()
    weight = torch.randn(rows, columns).double()

    def layer(x: Tensor, lora_a: Tensor, lora_b: Tensor, alphas: Tensor) -> Tensor:
        moved = Directions(lora_a, lora_b, alphas, *(getattr(now, n) for n in list(vars(now))[3:]))
        adapter = moved.stacked(alphas, "product", ((0, rows),))
        return FE.lora_linear_adapters(x, weight, None, [adapter])

    inputs = (x, now.lora_A, now.lora_B, now.lora_magnitudes)
    torch.autograd.gradcheck(layer, inputs, fast_mode=True, atol=1e-5, rtol=1e-4)


@given(seeds, past_ranks, st.integers(1, 5), st.sampled_from(["product", "factors"]))
def test_stacked_directions_sum(seed, ranks, r, normalization):
    """Stacked directions are the sum of the directions taken one by one."""
    now = random_directions(seed, ranks, r, 6, 7)
    expected = now.lora_B @ now.lora_A
    if normalization == "product":
        expected = expected / torch.linalg.matrix_norm(expected)
    expected = now.lora_magnitudes[-1] * expected
    first = 0
    for k, rank in enumerate(ranks):
        part = slice(first, first + rank)
        for j in range(first, first + rank):
            assert (now.lora_past_scale[j] != 0).nonzero().tolist() == [[k]]
        scales = torch.diag(now.lora_past_scale[part, k])
        product = now.lora_past_B[:, part] @ scales @ now.lora_past_A[part]
        expected = expected + now.lora_magnitudes[k] * product
        first += rank
    found = now.stacked(now.lora_magnitudes, normalization, ROWS)
    torch.testing.assert_close(dense(found), expected, rtol=1e-9, atol=1e-9)


def test_zero_direction():
    """A direction that is zero runs as it is."""
    model = adapted()
    method = SDLoRA(model, alpha_init=0.7)
    with torch.no_grad():
        for now in directions(model).values():
            now.lora_B.zero_()
    x, y = data(8)
    method.begin_task(0)
    F.cross_entropy(model(x), y).backward()
    plain = adapted(lora_alpha=1.4)  # scale 0.7 at rank 2
    with torch.no_grad():
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    F.cross_entropy(plain(x), y).backward()
    for name, expected in plain.named_parameters():
        if expected.requires_grad:
            torch.testing.assert_close(model.get_parameter(name).grad, expected.grad, rtol=1e-12, atol=1e-15)
    assert all(not now.lora_magnitudes.grad.any() for now in directions(model).values())
    method.end_task([])
    assert all(not now.lora_anchor.numel() for now in directions(model).values())
    assert method.report().summary == {"directions": 0, "dropped": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_directions_finite(dtype):
    """Directions too small for a norm give finite values."""
    for a, b in ((1.0, 1e-21), (1.0, 1e-30), (1e-30, 1.0), (1e-12, 1e-12), (0.0, 1.0), (1.0, 1e-3)):
        lora_a = torch.full((2, 5), a, dtype=dtype).requires_grad_()
        lora_b = torch.full((4, 2), b, dtype=dtype).requires_grad_()
        norm = a * b * math.sqrt(4 * 4 * 5)
        found = inverse_norm(lora_a, lora_b)
        gradients = torch.autograd.grad(found, (lora_a, lora_b))
        assert all(g.isfinite().all() for g in gradients)
        if found.item() == 1.0:
            assert norm < 1e-15 and not any(g.any() for g in gradients)
        else:
            torch.testing.assert_close(found.item(), 1 / norm, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("size", [1e-3, 1e-12, 1e-20, 1e-30, 1e-44])
@pytest.mark.parametrize("normalization", ["product", "factors"])
def test_freezing_any_size(size, normalization):
    """Freezing keeps what a direction of any size adds."""
    lora_a, lora_b = torch.ones(2, 5), torch.full((4, 2), size)
    now = Directions.first(lora_a, lora_b, 0.5)
    before = dense(now.stacked(now.lora_magnitudes, normalization, ROWS))
    frozen = freeze(now, measure(now, normalization), None, 1.0).directions
    frozen = replace(frozen, lora_B=torch.zeros(4, 2))  # the next one
    after = dense(frozen.stacked(frozen.lora_magnitudes, normalization, ROWS))
    # 1 / n is finite only above the smallest normal number; what is below is lost.
    torch.testing.assert_close(after, before, rtol=1e-6, atol=torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cancelling_parts(dtype):
    """Parts that cancel count as zero, not as their rounding errors."""
    for _ in range(20):
        first, second, column = (torch.randn(n, dtype=dtype) for n in (9, 9, 5))
        lora_a = torch.stack([first, second, first + second])
        lora_b = column[:, None] * torch.tensor([1.0, 1.0, -1.0], dtype=dtype)
        assert inverse_norm(lora_a, lora_b).item() == 1.0


def test_task_end_unchanged():
    """The end of a task changes no output and no weight."""
    for normalization in ("product", "factors"):
        model = adapted()
        weights = [layer.weight.clone() for layer in fe.adapters(model).values()]
        method = SDLoRA(model, normalization=normalization)
        x, _ = data(4)
        for task in range(3):
            method.begin_task(task)
            train(method, task)
            expected = model(x)
            method.end_task([])
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        for layer, weight in zip(fe.adapters(model).values(), weights, strict=True):
            assert torch.equal(layer.weight, weight) and not layer.weight.requires_grad


def test_old_directions_fixed():
    """Directions of earlier tasks never change, and all magnitudes train."""
    model = adapted()
    method = SDLoRA(model)
    run(method, range(2))
    before = {key: [t.clone() for t in vars(now).values()] for key, now in directions(model).items()}
    method.begin_task(2)
    train(method, 2)
    for key, now in directions(model).items():
        changed = [not torch.equal(t, old) for t, old in zip(vars(now).values(), before[key], strict=True)]
        assert changed == [True, True, True, False, False, False, False]
        assert (now.lora_magnitudes != before[key][2]).all()
        assert [t.requires_grad for t in vars(now).values()] == changed


class Counting(TorchDispatchMode):
    """How often each operation of the dispatcher runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] = self.calls.get(str(function), 0) + 1
        return function(*args, **(kwargs or {}))


def test_one_call_per_layer():
    """A step is one call per layer, whatever the number of tasks."""
    model = adapted()
    method = SDLoRA(model)
    counts = []
    for task in range(6):
        run(method, range(task, task + 1), steps=1)
        x, y = data(4)
        with Counting() as counting:
            F.cross_entropy(model(x), y).backward()
        counts.append(counting.calls)
    assert counts[0] == counts[1] == counts[5]
    linear = {name: n for name, n in counts[5].items() if "fused_ewclora" in name}
    assert linear == {"fused_ewclora.lora_linear.default": 2, "fused_ewclora.lora_linear_backward.default": 2}


def outside_of(matrices: list[Tensor], share: float) -> Tensor:
    """A matrix of which this share of the squared norm lies outside of the span of two others."""
    inside = 0.3 * matrices[0] - 2.0 * matrices[1]
    flat = torch.stack([m.flatten() for m in matrices], 1)
    other = (torch.randn(WIDTH, 1) @ torch.randn(1, WIDTH)).double().reshape(-1, 1)
    other = (other - flat @ torch.linalg.lstsq(flat, other).solution).view(WIDTH, WIDTH)
    ratio = torch.linalg.matrix_norm(inside) / torch.linalg.matrix_norm(other)
    return inside + math.sqrt(share / (1 - share)) * ratio * other


@pytest.mark.parametrize("normalization", ["product", "factors"])
@pytest.mark.parametrize("share", [0.0, 8.9e-4, 9.1e-4])
def test_dependent_direction_dropped(normalization, share):
    """A direction within the span of earlier ones is dropped."""
    model = adapted()
    method = SDLoRA(model, normalization=normalization, kd_threshold=9e-4, ranks=(2, 2, 5))
    run(method, range(2))
    method.begin_task(2)
    before = {}
    for key, now in directions(model).items():
        kept = [now.lora_past_B[:, p] @ now.lora_past_A[p] for p in (slice(0, 2), slice(2, 4))]
        direction = outside_of(kept, share)
        left, values, right = torch.linalg.svd(direction)
        with torch.no_grad():
            now.lora_B.copy_((left * values)[:, :5])  # rank 5: two and two, and one outside
            now.lora_A.copy_(right[:5])
        added = torch.linalg.matrix_norm(direction) if normalization == "factors" else 1.0
        before[key] = dense(now.stacked(now.lora_magnitudes, normalization, ROWS)), added
    method.end_task([])
    dropped = share < 9e-4
    for row, (key, now) in zip(method.report().rows, directions(model).items(), strict=True):
        # The residual is a difference of numbers near 1.
        torch.testing.assert_close(row["residuals"][2], share, rtol=1e-9, atol=1e-13)
        assert row["tasks"] == ((0, 1) if dropped else (0, 1, 2))
        assert row["ranks"] == ((2, 2) if dropped else (2, 2, 5))
        delta, added = before[key]
        moved = dense(now.stacked(now.lora_magnitudes, normalization, ROWS)) - delta
        lost = moved.square().sum().item() / float(added) ** 2
        torch.testing.assert_close(lost, share if dropped else 0.0, rtol=1e-9, atol=1e-13)
