# SPDX-License-Identifier: Apache-2.0
"""Under autocast: outputs as of F.linear, sums in fp32, gradients in the dtype of their parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from strategies import BACKENDS, LINEAR_BACKENDS, Values, device_of
from torch import Tensor

from fused_ewclora import functional as FE

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_linear = pytest.mark.parametrize("backend", LINEAR_BACKENDS)


def autocast(backend: str, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast(device_of(backend), dtype=dtype)


def leaves(backend: str, x_dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, W, bias, A, B, s."""
    values = Values(0, backend)
    shapes = ((30, 33), (29, 33), (29,), (5, 33), (29, 5), (5,))
    tensors = [values.normal(*shape) for shape in shapes]
    tensors[0] = tensors[0].to(x_dtype)
    return [t.requires_grad_() for t in tensors]


@each_linear
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype, x_dtype):
    """Outputs have the dtype of autocast, gradients that of their parameters."""
    inputs = leaves(backend, x_dtype)
    with autocast(backend, dtype):
        y = FE.lora_linear(*inputs, backend=backend)
        assert y.dtype == F.linear(inputs[0].detach(), inputs[1].detach()).dtype == dtype
    for leaf, grad in zip(inputs, torch.autograd.grad(y.float().sum(), inputs), strict=True):
        assert grad.dtype == leaf.dtype


@each_linear
def test_layer_cast_inputs(backend):
    """Bitwise: autocast chooses dtypes and nothing else; A and B stay fp32."""
    x, w, bias, a, b, s = leaves(backend)
    half = [t.detach().bfloat16() for t in (x, w, bias)]
    expected = FE.lora_linear(*half, a, b, s, backend=backend)
    expected_grads = torch.autograd.grad(expected.float().sum(), [a, b, s])
    with autocast(backend):
        y = FE.lora_linear(x, w, bias, a, b, s, backend=backend)
        grads = torch.autograd.grad(y.float().sum(), [a, b, s])  # backward inside of autocast, too
    assert torch.equal(y, expected)
    assert all(map(torch.equal, grads, expected_grads))


@each_backend
def test_penalty_fp32(backend):
    """Bitwise those without autocast: lambda = 1e7 in bf16 products would be noise."""
    values = Values(1, backend)
    f, a, b = (
        values.fisher(29, 33),
        values.normal(5, 33).requires_grad_(),
        values.normal(29, 5).requires_grad_(),
    )
    plain = FE.ewc_penalty([f], [a], [b], ewc_lambda=1e7, backend=backend)
    plain_grads = torch.autograd.grad(plain, [a, b])
    with autocast(backend):
        value = FE.ewc_penalty([f], [a], [b], ewc_lambda=1e7, backend=backend)
        grads = torch.autograd.grad(value, [a, b])
        added = FE.ewc_penalty_grad_([f], [a], [b], ewc_lambda=1e7, backend=backend)
    assert torch.equal(value, plain) and all(map(torch.equal, grads, plain_grads))
    assert torch.equal(added, plain) and torch.equal(a.grad, plain_grads[0])


@each_backend
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_fisher_sums_stay_fp32(backend, mode):
    values = Values(2, backend)
    x, dy = values.normal(4, 5, 33), values.normal(4, 5, 29)
    plain = FE.fisher_accumulate_(values.zeros(29, 33), x, dy, mode=mode, backend=backend)
    with autocast(backend):
        fisher = FE.fisher_accumulate_(values.zeros(29, 33), x, dy, mode=mode, backend=backend)
    assert torch.equal(fisher, plain)


@each_backend
def test_merging_stays_fp32(backend):
    values = Values(3, backend)
    w, a, b = values.normal(29, 33), values.normal(5, 33), values.normal(29, 5)
    plain = FE.merge_(w.clone(), a, b, backend=backend)
    with autocast(backend):
        assert torch.equal(FE.merge_(w.clone(), a, b, backend=backend), plain)


def test_fp64_is_left_alone():
    inputs = [t.detach().double() for t in leaves("reference")]
    plain = FE.lora_linear(*inputs, backend="reference")
    with autocast("reference"):
        assert torch.equal(FE.lora_linear(*inputs, backend="reference"), plain)
