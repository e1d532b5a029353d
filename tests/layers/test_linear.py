# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear` by itself: values, rows, dtypes, copies, checkpoints of the base model, compilation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import THIRDS, explicit_delta, randomize_adapters_, rounding_bound, weight_bound
from torch import nn

import fused_ewclora as fe
from fused_ewclora.layers.linear import fisher_key
from fused_ewclora.layers.slices import same_weights
from fused_ewclora.ops.capture import FisherCapture


@st.composite
def layers(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> fe.LoRALinear:
    """Any mix of slices, head interleaving, rank, scale and bias, with non-zero adapters."""
    heads = draw(st.none() | st.integers(1, 3))
    sizes = tuple(n * (heads or 1) for n in draw(st.lists(st.integers(1, 5), min_size=3, max_size=3)))
    slices = draw(st.none() | st.lists(st.sampled_from("qkv"), min_size=1, unique=True))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layer = fe.LoRALinear(
        draw(st.integers(1, 9)),
        sum(sizes),
        r=draw(st.integers(1, 6)),
        lora_alpha=draw(st.none() | st.sampled_from([0.5, 3, -2.0])),
        bias=draw(st.booleans()),
        slices=slices,
        layout=None if slices is None else fe.QKVLayout(("q", "k", "v"), sizes, heads),
        dtype=dtype,
    )
    randomize_adapters_(layer, seed=draw(st.integers(0, 99)), size=1.0)
    return layer


def trained_kv(dtype: torch.dtype = torch.float32) -> fe.LoRALinear:
    layer = fe.LoRALinear(8, 24, r=3, lora_alpha=6, slices=("k", "v"), layout=THIRDS, dtype=dtype)
    randomize_adapters_(layer)
    return layer


def bias_of(layer: fe.LoRALinear) -> torch.Tensor | None:
    return None if layer.bias is None else layer.bias.double()


@given(layers(), st.sampled_from([(), (4,), (2, 3), (0,)]))
def test_matches_explicit_weight(layer: fe.LoRALinear, leading: tuple[int, ...]):
    """The output is that of the explicit weight."""
    x = torch.randn(*leading, layer.in_features, dtype=torch.float64)
    expected = F.linear(x, layer.weight + explicit_delta(layer), bias_of(layer))
    error = (layer(x) - expected).abs()
    bound = 2 * rounding_bound(layer, x, torch.finfo(torch.float64).eps)
    assert (error <= bound).all(), f"{error.max()} > {bound.max()}"


@given(layers(torch.float32))
def test_fp32_rounding(layer: fe.LoRALinear):
    """The fp32 output is within rounding of the fp64 output."""
    x = torch.randn(5, layer.in_features)
    expected = F.linear(x.double(), layer.weight.double() + explicit_delta(layer), bias_of(layer))
    error = (layer(x).double() - expected).abs()
    assert (error <= rounding_bound(layer, x, torch.finfo(torch.float32).eps)).all(), error.max()


@given(layers())
def test_unsliced_rows_unchanged(layer: fe.LoRALinear):
    """Rows outside the slices never change."""
    outside = explicit_delta(layer).abs().sum(1) == 0
    owned = torch.zeros(layer.out_features, dtype=torch.bool)
    for adapter in layer.adapter_slices:
        for start, stop in adapter.rows:
            owned[start:stop] = True
    assert torch.equal(~owned, outside)
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    base = F.linear(x, layer.weight, layer.bias)[:, outside]
    error = (layer(x)[:, outside] - base).abs()
    assert (error <= 2 * rounding_bound(layer, x, torch.finfo(torch.float64).eps)[:, outside]).all()
    assert torch.equal(layer.consolidated_weight()[outside], layer.weight[outside])
    before = layer.weight[outside].clone()
    layer.merge()
    assert torch.equal(layer.weight[outside], before)


@given(layers())
def test_only_adapters_train(layer: fe.LoRALinear):
    """Training moves only the adapters."""
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(4, layer.in_features, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("lora_")}


@given(layers())
def test_consolidated_weight_sum(layer: fe.LoRALinear):
    """The consolidated weight is the explicit sum."""
    expected = layer.weight + explicit_delta(layer)
    error = (layer.consolidated_weight() - expected).abs()
    assert (error <= 2 * weight_bound(layer, torch.finfo(torch.float64).eps)).all(), error.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_consolidation_rounds_once(dtype: torch.dtype):
    """Consolidation in low precision rounds once."""
    layer = trained_kv(dtype)
    exact = layer.weight.double() + explicit_delta(layer)
    # Half a unit in the last place for the one rounding, after fp32 sums.
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 2 * weight_bound(layer, torch.finfo(torch.float32).eps)
    assert ((layer.consolidated_weight().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_fp32_masters(base: torch.dtype, adapter: torch.dtype):
    """Adapters are fp32 masters beside weights in low precision."""
    layer = trained_kv(base)
    assert {p.dtype for _, p in layer.named_lora_parameters()} == {adapter}
    y = layer(torch.randn(2, 8, dtype=base))
    assert y.dtype == base
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == adapter for _, p in layer.named_lora_parameters())


def test_module_cast():
    """Casting the module casts everything in it."""
    layer = trained_kv().to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_initial_parameters():
    """New parameters are as at the start of a task."""
    layer = fe.LoRALinear(400, 24, r=5, slices=("k",), layout=THIRDS)
    (adapter, lora_a, lora_b), *_ = layer.adapter_parameters()
    bound, lora_a = 400**-0.5, lora_a.detach()
    assert float(lora_a.abs().max()) <= bound
    assert abs(float(lora_a.std()) / (bound / 3**0.5) - 1) < 0.15  # 2000 draws: 10 standard errors
    assert not lora_b.any()
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A_k", "lora_B_k"]
    assert fisher_key("blocks.0.qkv", adapter) == "blocks.0.qkv.k"
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A_k", "lora_B_k"]


def test_reset_follows_its_generator():
    layers = [trained_kv() for _ in range(2)]
    for layer in layers:
        layer.reset_adapters(torch.Generator().manual_seed(7))
    assert torch.equal(layers[0].lora_A_k, layers[1].lora_A_k)
    assert not torch.equal(layers[0].lora_A_k, layers[0].lora_A_v)
    assert not layers[0].lora_B_k.any()


def test_from_linear():
    """`from_linear` shares and freezes the base."""
    linear = nn.Linear(6, 5).eval()
    layer = fe.LoRALinear.from_linear(linear, r=2, lora_alpha=8, lora_dropout=0.1)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not linear.weight.requires_grad and not layer.training
    assert layer.adapter_slices[0].scaling == 4.0
    x = torch.randn(3, 6)
    error = (layer(x) - linear(x)).abs()
    assert (error <= 2 * rounding_bound(layer, x, torch.finfo(torch.float32).eps)).all()


def test_scale_parameter_and_alpha():
    """A learned scale multiplies alpha / r, in the layer and where it is merged."""
    layer = fe.LoRALinear(6, 5, r=2, lora_alpha=8, dtype=torch.float64)
    randomize_adapters_(layer)
    layer.lora_scale = nn.Parameter(torch.tensor([0.5, -3.0], dtype=torch.float64))
    x = torch.randn(4, 6, dtype=torch.float64)
    weight = layer.weight + layer.lora_B @ torch.diag(torch.tensor([2.0, -12.0]).double()) @ layer.lora_A
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    torch.testing.assert_close(layer.consolidated_weight(), weight.detach())


def test_scale_parameter_learns():
    """The scale parameter multiplies the scale and learns."""
    layer = trained_kv(torch.float64)
    layer.lora_scale_k = nn.Parameter(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = F.linear(x, layer.weight + explicit_delta(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    assert layer.lora_scale_k.grad is not None and bool(layer.lora_scale_k.grad.abs().min() > 0)
    torch.testing.assert_close(layer.consolidated_weight(), (layer.weight + explicit_delta(layer)).detach())


def test_dropout_branch():
    """Dropout affects only the low-rank branch, and only in training."""
    layer = fe.LoRALinear(64, 24, r=3, lora_dropout=0.5, dtype=torch.float64)
    x = torch.randn(4, 64, dtype=torch.float64)
    base = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), base)  # B = 0
    randomize_adapters_(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_copies_independent():
    """Copies are independent and leave the Fisher pass behind."""
    layer = trained_kv()
    fishers = [torch.zeros(8, 8) for _ in range(2)]
    layer.fisher_capture = FisherCapture(fishers, [s.rows for s in layer.adapter_slices])
    x = torch.randn(2, 8)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is fe.LoRALinear
        assert other.fisher_capture is None
        assert torch.equal(other(x), layer(x))
        other.reset_adapters()
        assert layer.lora_B_k.any()
    assert layer.fisher_capture is not None


def test_plain_checkpoint_loads():
    """Checkpoints of the plain base load and are remembered."""
    layer, base = trained_kv(), nn.Linear(8, 24)
    before, layer.consolidated_tasks = layer.origin_fingerprint, 3
    result = layer.load_state_dict(base.state_dict(), strict=False)
    assert sorted(result.missing_keys) == ["lora_A_k", "lora_A_v", "lora_B_k", "lora_B_v"]
    assert not result.unexpected_keys
    assert layer.origin_fingerprint != before and layer.consolidated_tasks == 0
    assert layer.origin_fingerprint == fe.LoRALinear.from_linear(base, r=1).origin_fingerprint
    full = trained_kv()
    kept = layer.origin_fingerprint
    layer.load_state_dict(
        full.state_dict()
    )  # with adapters: weights that may hold earlier tasks, not base weights
    assert layer.origin_fingerprint == kept


def test_fingerprint_bf16_rounding():
    """Weights of two dtypes are compared after rounding to bf16, and other weights are detected."""
    layer = nn.Linear(8, 100)
    low = copy.deepcopy(layer).to(torch.bfloat16)
    other = nn.Linear(8, 100)
    prints = [fe.LoRALinear.from_linear(m, r=1).origin_fingerprint for m in (layer, low, other)]
    assert same_weights(prints[0], prints[1]) and not same_weights(prints[0], prints[2])
    assert not same_weights(prints[1], prints[2]) and not same_weights(prints[0], None)


def test_load_merged_refused():
    """Loading into a merged layer is refused."""
    layer = trained_kv()
    layer.merge()
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.load_state_dict(nn.Linear(8, 24).state_dict(), strict=False)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unmerge_restores_every_bit(dtype: torch.dtype):
    layer = trained_kv(dtype)
    before = layer.weight.clone()
    keys = list(layer.state_dict())
    layer.merge()
    assert not torch.equal(layer.weight, before)
    assert list(layer.state_dict()) == keys
    with pytest.raises(fe.TargetError, match="unmerge"):
        layer.consolidated_weight()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert not dict(layer.named_buffers())


def test_merged_plain_linear():
    """A merged layer computes the plain linear function with the summed weight."""
    layer = trained_kv(torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64)
    y = layer(x)
    layer.merge()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), y)


def test_merge_nonfinite_refused():
    """Merging refuses values that are not finite."""
    layer = trained_kv()
    with torch.no_grad():
        layer.lora_B_v[0, 0] = float("nan")
    before = layer.weight.clone()
    with pytest.raises(fe.ArgumentError, match="NaN"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged


def test_eager_calls_counted():
    """Eager calls are counted, and counting never causes recompilation."""
    layer = trained_kv()
    x = torch.randn(2, 8)
    layer(x)
    layer(x)
    assert layer.forward_calls == 2
    layer.forward_calls = 0
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for _ in range(4):
        compiled(x)
    assert layer.forward_calls == 0
    layer.forward_calls = 5
    compiled(x)
    assert len(graphs) == 1  # counting must not recompile


def test_reset_parameters():
    """`reset_parameters` resets the base and the adapters."""
    layer = trained_kv()
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert not layer.lora_B_k.any()


def test_meta_device():
    """A layer on the meta device costs nothing and can be materialised."""
    layer = fe.LoRALinear(8, 24, r=2, device="meta")
    assert layer.lora_A.is_meta and layer.origin_fingerprint == ""
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(1, 8))).all()


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"r": 0}, fe.ArgumentError, "r: "),
        ({"r": 2, "lora_alpha": float("inf")}, fe.ArgumentError, "lora_alpha"),
        ({"r": 2, "lora_dropout": -0.1}, fe.ArgumentError, "lora_dropout"),
        ({"r": 2, "slices": ("k",)}, fe.LayoutError, "(?s)layout=fe.QKVLayout.*or leave slices out"),
        ({"r": 2, "slices": ("k",), "layout": fe.QKVLayout(("q", "k"), (4, 4))}, fe.LayoutError, "8 rows"),
        ({"r": 2, "slices": ("x",), "layout": THIRDS}, fe.LayoutError, "'x'"),
        ({"r": 2, "slices": ("k", "k"), "layout": THIRDS}, fe.ArgumentError, "slices"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], word: str):
    """Bad arguments are named and change nothing."""
    with pytest.raises(error, match=word):
        fe.LoRALinear(8, 24, **arguments)
    linear = nn.Linear(8, 24)
    with pytest.raises(error, match=word):
        fe.LoRALinear.from_linear(linear, **arguments)
    assert linear.weight.requires_grad and linear.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_dtype(dtype: torch.dtype):
    """Under autocast the layer runs in the dtype of autocast."""
    layer = trained_kv()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(torch.randn(2, 8))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.lora_A_k.grad is not None and layer.lora_A_k.grad.dtype == torch.float32
