# SPDX-License-Identifier: Apache-2.0
"""LoRA linear: output and gradients against fp64, whatever the shapes, strides, dtypes and rows."""

from __future__ import annotations

import itertools
import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from linear_cases import Case, assert_gradients, assert_output, cases, parameter, plain
from strategies import (
    LAYOUTS,
    LINEAR_BACKENDS,
    LOW_PRECISION,
    Values,
    dtypes_of,
    interpreted,
    property_test,
    refused_linear,
)
from tolerance import (
    EPS,
    TF32X3,
    assert_as_good,
    on_matrix_units,
    relative_error,
    rounding_bound,
    rounds_operands,
    sum_bound,
)

from fused_ewclora import functional as FE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.parametrize("backend", LINEAR_BACKENDS),
]
threads = st.sampled_from((1, 2, 3))


@property_test(50, data=st.data(), count=threads)
def test_equals_fp64(backend, data, count):
    """Output and gradients equal fp64 for any shape, rank, dtype and stride."""
    torch.set_num_threads(count)
    case = data.draw(cases(backend))
    y, grads = case.gradients()
    assert_output(case, y)
    assert_gradients(case, grads)


@property_test(15, data=st.data(), count=threads)
def test_dropout(backend, data, count):
    """Dropped elements count neither in the output nor in any gradient."""
    if refused_linear(backend, 1, dropout=True) is not None:
        pytest.skip("no dropout, as tested among the refusals")
    torch.set_num_threads(count)
    case = data.draw(cases(backend, dropout=True))
    y, grads = case.gradients()
    assert_output(case, y)
    assert_gradients(case, grads)


def simple(backend, dtype=torch.float32, rows=37, d_in=33, d_out=29, rank=5, master=None, **layout) -> Case:
    values, master = Values(0, backend), master or dtype
    adapter = FE.Adapter(
        parameter(values.normal(rank, d_in, dtype=master)),
        parameter(values.normal(d_out, rank, dtype=master)),
        parameter(values.normal(rank, dtype=master)),
        ((0, d_out),),
    )
    x = parameter(values.normal(rows, d_in, dtype=dtype, layout=layout.get("x", "contiguous")))
    weight, bias = values.normal(d_out, d_in, dtype=dtype), values.normal(d_out, dtype=dtype)
    dy = values.normal(rows, d_out, dtype=dtype, layout=layout.get("dy", "contiguous"))
    return Case(backend, x, parameter(weight), parameter(bias), [adapter], dy)


@pytest.mark.parametrize("rank", [1, 10, 30, 64, 70])
def test_real_widths(backend, rank):
    """1408 (ViT-g) is a multiple of no block size; rank 70 exceeds d_out = 40."""
    if (reason := refused_linear(backend, rank)) is not None:
        pytest.skip(reason)
    # One wide case is enough where Triton interprets.
    d_in = 152 if interpreted(backend) and rank != 10 else 1408
    case = simple(backend, rows=9, d_in=d_in, d_out=40, rank=rank)
    y, grads = case.gradients()
    assert_output(case, y)
    assert_gradients(case, grads)


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0, 2)])
def test_empty_batch(backend, shape):
    """An empty batch gives an empty output and zero gradients."""
    case = simple(backend)
    case.x = parameter(torch.empty(*shape, 33, device=case.x.device))
    case.dy = torch.empty(*shape, 29, device=case.x.device)
    y, grads = case.gradients()
    assert y.shape == (*shape, 29)
    assert grads.pop("x").shape == case.x.shape
    assert all(bool((grad == 0).all()) for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS[1:4])
def test_strides_change_no_value(backend, layout, dtype):
    """Not bitwise: BLAS may take another path for other strides."""
    dense, strided = simple(backend, dtype), simple(backend, dtype, x=layout, dy=layout)
    (y, grads), (y2, grads2) = dense.gradients(), strided.gradients()
    tolerance = 4 * EPS[dtype]
    assert relative_error(y2, y.detach().double().cpu()) <= tolerance
    for name, grad in grads.items():
        assert relative_error(grads2[name], grad.double().cpu()) <= tolerance, name


def test_public_forms(backend):
    """The three public forms are one function."""
    case = simple(backend)
    (a, b, s, _), x, w, bias = case.adapters[0], case.x, case.weight, case.bias
    whole = FE.lora_linear(x, w, bias, a, b, s, backend=backend)
    assert torch.equal(whole, case.run())
    assert torch.equal(whole, FE.lora_linear_slices(x, w, bias, [(0, 29, a, b, s)], backend=backend))
    slices = [(20, 29, a, b[:9], s), (3, 8, a, b[9:14], 0.5)]
    sliced = FE.lora_linear_slices(x, w, bias, slices, backend=backend)
    adapters = [FE.Adapter(a, b[:9], s, ((20, 29),)), FE.Adapter(a, b[9:14], 0.5, ((3, 8),))]
    assert torch.equal(sliced, FE.lora_linear_adapters(x, w, bias, adapters, backend=backend))


def test_row_ranges(backend):
    """Rows of one adapter in several ranges are taken in their order."""
    case = simple(backend)
    a, b, s, _ = case.adapters[0]
    ranges = ((17, 29), (0, 6), (9, 12))
    y = FE.lora_linear_adapters(
        case.x, case.weight, case.bias, [FE.Adapter(a, b[:21], s, ranges)], backend=backend
    )
    low_rank = y.detach() - F.linear(case.x, case.weight, case.bias)
    expected = (oracles.exact(case.x) @ oracles.exact(a).T * oracles.exact(s)) @ oracles.exact(b[:21]).T
    joined = torch.cat([low_rank[:, start:stop] for start, stop in ranges], dim=1)
    # y is a few times larger than the low-rank term, whose error grows by that much in the difference
    roundoff = TF32X3 if on_matrix_units(backend) else EPS[torch.float32]
    assert relative_error(joined, expected) <= 16 * roundoff


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_outside_slices(backend, dtype):
    """They are bitwise those of the same call with B = 0, and as good as those of `F.linear`."""
    values = Values(3, backend)
    x, w = values.normal(50, 61, dtype=dtype), values.normal(97, 61, dtype=dtype)
    a, b = values.normal(7, 61), values.normal(31, 7) * 100
    rows = ((64, 80), (5, 20))
    outside = [i for i in range(97) if not any(start <= i < stop for start, stop in rows)]
    y = FE.lora_linear_adapters(x, w, None, [FE.Adapter(a, b, 1.0, rows)], backend=backend)
    base = FE.lora_linear_adapters(x, w, None, [FE.Adapter(a, 0 * b, 1.0, rows)], backend=backend)
    assert torch.equal(y[:, outside], base[:, outside])
    assert not torch.equal(y, base)
    exact = oracles.exact(x) @ oracles.exact(w).T
    bound = sum_bound(oracles.magnitude(x) @ oracles.magnitude(w).T, 61, dtype, backend) + rounding_bound(
        exact, dtype
    )
    assert_as_good(base, F.linear(x, w), exact, bound, "output of the base")


def test_requires_grad_subsets(backend):
    """Every subset of `requires_grad` gives exactly the gradients asked for."""
    full = simple(backend)
    leaves = list(full.leaves().items())
    _, expected = full.gradients()
    assert_gradients(full, expected)
    subsets = list(itertools.product((False, True), repeat=len(leaves)))
    if interpreted(backend):  # none, one, all but one, all
        subsets = [subset for subset in subsets if sum(subset) not in range(2, len(leaves) - 1)]
    for subset in subsets:
        for (_, leaf), wanted in zip(leaves, subset, strict=True):
            leaf.requires_grad_(wanted)
            leaf.grad = None
        y = full.run()
        assert y.requires_grad == any(subset)
        if not any(subset):
            continue
        y.backward(full.dy)
        asked = {name: leaf.grad for name, leaf in leaves if leaf.requires_grad}
        missing = {name for (name, leaf) in leaves if (leaf.grad is not None) != leaf.requires_grad}
        assert not missing, f"with gradients asked for {list(asked)}: wrong for {missing}"
        for name, grad in asked.items():
            assert relative_error(grad, expected[name].double().cpu()) <= 4 * EPS[torch.float32], name


def saved_tensors(case: Case) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.run()
    return kept


def test_saved_tensors(backend):
    """x is saved without a copy and z beside it."""
    case = simple(backend)
    kept = saved_tensors(case)
    known = {leaf.untyped_storage().data_ptr() for leaf in case.leaves().values()}
    assert case.x.data_ptr() in {t.data_ptr() for t in kept}
    extra = [t for t in kept if t.untyped_storage().data_ptr() not in known]
    shapes = [tuple(t.shape) for t in extra]
    assert shapes == [(37, 5)], f"saved besides the inputs: {shapes}, expected z alone"


@pytest.mark.parametrize("frozen", ["A and weight", "all but x"])
def test_x_not_saved(backend, frozen):
    """x is not saved when nothing needs it."""
    case = simple(backend)
    a, b, s, _ = case.adapters[0]
    for tensor in [a, case.weight] + ([b, s, case.bias] if frozen == "all but x" else []):
        tensor.requires_grad_(False)
    kept = saved_tensors(case)
    assert case.x.data_ptr() not in {t.data_ptr() for t in kept}
    assert ((37, 5) in {tuple(t.shape) for t in kept}) == (frozen != "all but x")  # z, for dB and ds
    case.gradients()


def test_no_graph(backend):
    """No graph is built without gradients."""
    case = simple(backend)
    with_graph = case.run()
    with torch.no_grad():
        without = case.run()
    assert with_graph.requires_grad and not without.requires_grad
    assert torch.equal(with_graph, without)


def test_bf16_small_terms(backend):
    """At |dW| / |W| = 1e-3, bf16: share of x dW^T found in the output, by projection of y - x W^T on it.

    The output's own rounding adds noise of about eps |y| / sqrt(12) per element, that is
    eps / (sqrt(12) 1e-3 sqrt(n)) on a projection over n elements; five of those are allowed.
    """
    if torch.bfloat16 not in dtypes_of(backend, "lora_linear"):
        pytest.skip("no bf16")
    values, d, rows = Values(5, backend), 256, 64 if interpreted(backend) else 256
    x = values.normal(rows, d, dtype=torch.bfloat16)
    weight = values.normal(d, d, dtype=torch.bfloat16, std=d**-0.5)
    a, b = values.normal(8, d), values.normal(d, 8)
    ratio = (b @ a).norm() / weight.float().norm()
    scale = float(1e-3 / ratio)
    base = oracles.exact(x) @ oracles.exact(weight).T
    term = oracles.exact(x) @ (oracles.exact(b) @ oracles.exact(a) * scale).T

    def share(y: torch.Tensor) -> float:
        return float(((oracles.exact(y) - base) * term).sum() / term.square().sum())

    fused = share(FE.lora_linear(x, weight, None, a, b, scale, backend=backend))
    merged_weight = (weight.float() + scale * b @ a).bfloat16()
    merged = share(oracles.exact(x) @ oracles.exact(merged_weight).T)
    noise = EPS[torch.bfloat16] / (12**0.5 * 1e-3 * (rows * d) ** 0.5)
    print(f"share of the adapter in y: fused {fused:.4f} +- {noise:.4f}, merged into bf16 {merged:.4f}")
    assert abs(fused - 1.0) <= 5 * noise
    change = oracles.exact(merged_weight) - oracles.exact(weight)
    lost = relative_error(change, oracles.exact(b) @ oracles.exact(a) * scale)
    print(f"error of the merged change of W: {lost:.2f} of its norm")
    assert merged <= 0.75 and lost >= 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_masters(backend, dtype):
    """Gradients of fp32 masters are more exact than the plain low-precision composition."""
    # Of a rank that leaves enough numbers in the gradient of the scale for its error to be one of many.
    case = simple(backend, dtype, rows=70, d_in=67, d_out=61, rank=61, master=torch.float32)
    _, grads = case.gradients()
    _, own = plain(case)
    exact = oracles.lora_linear_gradients(case.dy, case.x, case.weight, case.adapters).adapters[0]
    # Operands that are rounded once leave less error than results that are rounded in between, too.
    limit, factor = (EPS[dtype], 1) if rounds_operands(backend, dtype) else (16 * EPS[torch.float32], 10)
    for name, truth in zip(("A0", "B0", "s0"), exact, strict=True):
        mine, theirs = relative_error(grads[name], truth), relative_error(own[name], truth)
        assert mine <= limit, f"{name}: error {mine:.2e}"
        assert mine < theirs / factor, f"{name}: error {mine:.2e}, plain composition {theirs:.2e}"


def test_deterministic(backend):
    """Repeated runs give the same bits."""
    case = simple(backend, rows=200)
    first, again = case.gradients(), case.gradients()
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(grad, again[1][name]) for name, grad in first[1].items())


def test_kept_graph(backend):
    """Gradients are computed afresh when the graph is kept."""
    case = simple(backend)
    y, leaves = case.run(), list(case.leaves().values())
    once = torch.autograd.grad(y, leaves, case.dy, retain_graph=True)
    twice = torch.autograd.grad(y, leaves, 2 * case.dy)
    for one, two in zip(once, twice, strict=True):
        assert torch.equal(2 * one, two)


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_output_in_place(backend, shape):
    """As that of nn.Linear: biases added by `y += b` (timm's BEiT), nn.ReLU(inplace=True)."""
    values = Values(0, backend)
    x, weight, lora_a, lora_b = (values.normal(*s) for s in (shape, (8, 12), (2, 12), (8, 2)))
    for tensor in (x, lora_a, lora_b):
        tensor.requires_grad_()
    gradients = []
    for relu in (F.relu_, F.relu):
        y = FE.lora_linear(x, weight, None, lora_a, lora_b, backend=backend)
        gradients.append(torch.autograd.grad(relu(y).square().sum(), [x, lora_a, lora_b]))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_gaps_not_read(backend, dtype):
    """What lies between rows takes no part, whatever it is: PyTorch's 16-bit products read it on processors
    with AMX."""
    if interpreted(backend):
        pytest.skip("the base product of GPU kernels on the CPU is PyTorch's own")
    values = Values(3, backend)
    leaves = []
    for rows, columns in ((24, 29), (33, 29), (24, 33)):
        buffer = values.full((rows, columns + 13), math.nan, dtype)
        leaves.append(buffer[:, 3 : 3 + columns].copy_(values.normal(rows, columns)))
    x, weight, dy = leaves
    x.requires_grad_(), weight.requires_grad_()
    y = FE.lora_linear(x, weight, None, values.normal(2, 29), values.normal(33, 2), backend=backend)
    assert y.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(y, [x, weight], dy))
