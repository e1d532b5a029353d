# SPDX-License-Identifier: Apache-2.0
"""What operations allocate besides their results: nothing as large as a weight, little per thread."""

from __future__ import annotations

import pytest
import torch
from allocations import MIB, nbytes, peak_and_largest
from strategies import BACKENDS

from fused_ewclora import functional as FE
from fused_ewclora.ops import windows

# The reference is plain PyTorch and materialises what its formulas say; Triton's interpreter is NumPy.
LEAN = [name for name in BACKENDS if name == "cpu"]
pytestmark = pytest.mark.parametrize("backend", LEAN)
PER_THREAD = 2 * MIB


def test_the_profiler_sees_allocations(backend):
    """4 MiB and 8 MiB at once, 4 MiB after: the measurement itself can fail."""

    def run() -> torch.Tensor:
        small = torch.empty(MIB)
        large = torch.empty(2 * MIB)
        del large
        return small

    assert peak_and_largest(run) == (12 * MIB, 8 * MIB)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("fisher_dtype", [torch.float32, torch.bfloat16])
def test_penalty_vit_l(backend, threads, fisher_dtype):
    """8 of the 48 matrices (k and v of 24 layers), 1024 x 1024, r = 10, with gradients."""
    torch.set_num_threads(threads)
    a = [torch.randn(10, 1024).requires_grad_() for _ in range(8)]
    b = [torch.randn(1024, 10).requires_grad_() for _ in range(8)]
    fishers = [torch.rand(1024, 1024).to(fisher_dtype) for _ in range(8)]
    FE.ewc_penalty(fishers, a, b, backend=backend)  # one-time costs
    peak, largest = peak_and_largest(lambda: FE.ewc_penalty(fishers, a, b, ewc_lambda=1e7, backend=backend))
    extra = peak - nbytes(*a, *b)
    assert extra <= threads * PER_THREAD, f"{extra / MIB:.2f} MiB besides the gradients"
    assert largest < 1024 * 1024 * 2, f"one allocation of {largest / MIB:.2f} MiB"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_fisher_vit_l(backend, mode, dtype, threads):
    """fc1, 4096 x 1024, T = 197: one dense gradient would be 16 MiB, one per sample N times that."""
    torch.set_num_threads(threads)
    x, dy = torch.randn(2, 197, 1024).to(dtype), torch.randn(2, 197, 4096).to(dtype)
    fisher = torch.zeros(4096, 1024)

    def run() -> torch.Tensor:
        return FE.fisher_accumulate_(fisher, x, dy, mode=mode, check_finite=False, backend=backend)

    peak, largest = peak_and_largest(run)
    assert peak <= threads * PER_THREAD, f"{peak / MIB:.2f} MiB"
    assert largest < nbytes(fisher) // 2, f"one allocation of {largest / MIB:.2f} MiB"


def test_finite_check_no_mask(backend):
    """The check for bad values needs no mask of its input."""
    torch.set_num_threads(1)
    x, dy = torch.randn(2, 197, 64), torch.randn(2, 197, 4096)
    fisher = torch.zeros(4096, 64)
    FE.fisher_accumulate_(fisher, x, dy, backend=backend)
    peak, _ = peak_and_largest(lambda: FE.fisher_accumulate_(fisher, x, dy, backend=backend))
    assert peak <= PER_THREAD, f"{peak / MIB:.2f} MiB beside a dy of {nbytes(dy) / MIB:.2f} MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_no_copy(backend, dtype):
    """Merging makes no copy of the weight."""
    torch.set_num_threads(1)
    weight = torch.randn(1024, 1024).to(dtype)
    a, b = torch.randn(10, 1024), torch.randn(1024, 10)
    peak, largest = peak_and_largest(lambda: FE.merge_(weight, a, b, 2.0, backend=backend))
    assert peak <= PER_THREAD and largest < nbytes(weight), f"{peak / MIB:.2f} MiB, {largest / MIB:.2f} MiB"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_linear_keeps_intermediates(backend, dropout_p, threads):
    """197 tokens of ViT-L's fc1: forward makes y and z, backward dx, dA and dB."""
    torch.set_num_threads(threads)
    x = torch.randn(1, 197, 1024, requires_grad=True)
    weight = torch.randn(4096, 1024)
    a, b = torch.randn(10, 1024, requires_grad=True), torch.randn(4096, 10, requires_grad=True)
    options = {"dropout_p": dropout_p, "training": True, "seed": 1, "backend": backend}
    y, z_bytes = FE.lora_linear(x, weight, None, a, b, **options), 197 * 10 * 4
    peak, largest = peak_and_largest(lambda: FE.lora_linear(x, weight, None, a, b, **options))
    assert peak - nbytes(y) - z_bytes <= (1 + threads) * PER_THREAD, f"{(peak - nbytes(y)) / MIB:.2f} MiB"
    assert largest <= nbytes(y)
    dy = torch.randn_like(y)
    peak, largest = peak_and_largest(lambda: torch.autograd.grad(y, [x, a, b], dy))
    extra = peak - nbytes(x, a, b)
    assert extra <= (1 + threads) * PER_THREAD, f"{extra / MIB:.2f} MiB besides the gradients"
    assert largest < nbytes(weight) // 4, f"one allocation of {largest / MIB:.2f} MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pointwise_convolution(backend, dtype):
    """With the channels last a 1 x 1 convolution copies neither its input nor its output."""
    torch.set_num_threads(1)
    x = torch.randn(4, 64, 64, 64).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(64, 64, 1, 1).to(dtype), torch.randn(64).to(dtype)
    a, b = torch.randn(8, 64).requires_grad_(), torch.randn(64, 8).requires_grad_()
    geometry = FE.Geometry((1, 1), (1, 1), (0, 0), (1, 1))
    z = 4 * 64 * 64 * 8 * 4

    def run() -> torch.Tensor:
        adapters = [FE.Adapter(a, b, 1.0, ((0, 64),))]
        return FE.lora_conv_adapters(x, weight, bias, adapters, geometry, backend=backend)

    y = run()
    assert y.is_contiguous(memory_format=torch.channels_last)
    peak, _ = peak_and_largest(run)
    assert peak - nbytes(y) - z <= PER_THREAD, f"{(peak - nbytes(y) - z) / MIB:.2f} MiB besides y and z"
    dy = torch.randn_like(y)
    peak, _ = peak_and_largest(lambda: torch.autograd.grad(y, (x, a, b), dy))
    extra = peak - nbytes(x, a, b) - z
    assert extra <= PER_THREAD, f"{extra / MIB:.2f} MiB besides the gradients"


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_fisher_of_windows(backend, mode, monkeypatch):
    """Windows of 3 x 3 are never made as a whole, which would be 9 times the input."""
    torch.set_num_threads(1)
    monkeypatch.setattr(windows, "PIECE_BYTES", MIB)
    x, dy = torch.randn(8, 1, 32, 32, 32), torch.randn(8, 32 * 32, 16)
    if mode == "batch":
        x, dy = x.movedim(1, 0), dy.flatten(0, 1)[None]
    geometry = FE.Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    fisher = torch.zeros(16, 9 * 32)

    def run() -> None:
        windows.Windows(geometry, [x]).accumulate_into_(fisher, dy, mode, 1.0)

    run()
    peak, _ = peak_and_largest(run)
    padded = nbytes(x) * 34**2 // 32**2 if mode == "batch" else 2 * MIB
    assert peak <= padded + 2 * MIB + PER_THREAD, f"{peak / MIB:.2f} MiB"
