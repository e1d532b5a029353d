# SPDX-License-Identifier: Apache-2.0
"""`Conv1D`, whose weight is `[in_features, out_features]`: everything that acts on a layer, beside the
`nn.Linear` with the transposed weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import fused_ewclora as fe
from fused_ewclora.integrations.transformers import LoRAConv1D, LoRAFalconLinear

IN, OUT, CLASSES = 6, 12, 4
LAYOUT = fe.QKVLayout(("q", "k", "v"))
CONFIG = fe.LoRAConfig(r=2, lora_alpha=3, target_modules=["qkv"], slices=("k", "v"), layout=LAYOUT)


class Model(nn.Module):
    """Tokens `[N, T, 6]` through one packed projection, a Conv1D or the nn.Linear that computes the same."""

    def __init__(self, transposed: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = Conv1D(OUT, IN)
        conv.weight.data.normal_()
        conv.bias.data.normal_()
        linear = nn.Linear(IN, OUT)
        linear.weight.data = conv.weight.data.t().contiguous()
        linear.bias.data = conv.bias.data.clone()
        self.qkv: nn.Module = conv if transposed else linear
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (F.scaled_dot_product_attention(q, k, v) + torch.tanh(q)).mean(1)


def adapted(transposed: bool, dtype: torch.dtype = torch.float64, config: fe.LoRAConfig = CONFIG) -> Model:
    model = Model(transposed, dtype)
    fe.inject(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, lora_a, lora_b in model.qkv.adapter_parameters():
            lora_a.copy_(torch.randn(lora_a.shape, generator=generator, dtype=torch.float64))
            lora_b.copy_(torch.randn(lora_b.shape, generator=generator, dtype=torch.float64))
    return model


def data(seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 3, IN, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (10,), generator=generator)


def weight_of(model: Model) -> Tensor:
    """`[out_features, in_features]` in both forms."""
    weight = model.qkv.weight.detach()
    return weight.t() if isinstance(model.qkv, Conv1D) else weight


def close(a: Tensor, b: Tensor) -> None:
    """Two orders of summation of a few dozen fp64 terms of moderate size."""
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_layer_repr():
    """The layer has the class, the sizes and the text of a `Conv1D` with adapters."""
    layer = adapted(True).qkv
    assert type(layer) is LoRAConv1D and isinstance(layer, Conv1D)
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    text = "LoRAConv1D(nf=12, nx=6, k(r=2, scaling=1.5), v(r=2, scaling=1.5))"
    assert repr(layer) == text


def test_matches_explicit_weight():
    """Outputs and gradients are those of the explicit weight."""
    model = adapted(True)
    layer, x = model.qkv, data()[0].requires_grad_(True)
    own = [p for _, *pair in layer.adapter_parameters() for p in pair]
    dense, factors = x.detach().requires_grad_(True), [p.detach().requires_grad_(True) for p in own]
    a_k, b_k, a_v, b_v = factors
    columns = [torch.zeros(IN, OUT // 3, dtype=torch.float64), 1.5 * (b_k @ a_k).t(), 1.5 * (b_v @ a_v).t()]
    expected = dense @ (layer.weight.detach() + torch.cat(columns, dim=1)) + layer.bias
    close(layer(x), expected)
    dy = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad(layer(x), [x, *own], dy)
    for mine, other in zip(got, torch.autograd.grad(expected, [dense, *factors], dy), strict=True):
        close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_transposed_weight(dtype):
    """The kernels read the transposed weight as they read the contiguous one."""
    conv, linear = adapted(True, dtype), adapted(False, dtype)
    x = data()[0].to(dtype)
    y, expected = conv.qkv(x), linear.qkv(x)
    exact = adapted(False).qkv(data()[0])
    spread = (expected.double() - exact).abs().max()  # the rounding error of one of the two
    assert (y.double() - exact).abs().max() <= 2 * spread + torch.finfo(dtype).eps
    assert conv.qkv.lora_A_k.dtype == torch.float32
    gradients = [torch.autograd.grad(m.qkv(x).square().sum(), m.qkv.lora_A_k)[0] for m in (conv, linear)]
    scale = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= 8 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("merge_mode", ["delta", "factors"])
def test_tasks_match_linear(merge_mode):
    """Tasks end as they do with the linear layer."""
    states = []
    for transposed in (True, False):
        model = adapted(transposed)
        ewc = fe.EWC(model, 20.0, merge_mode=merge_mode, generator=torch.Generator().manual_seed(5),
                     fisher_dtype=torch.float64)  # fmt: skip
        storage = model.qkv.weight.data_ptr()
        for task in range(2):
            x, y = data(task)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
            for _ in range(2):
                optimizer.zero_grad()
                (F.cross_entropy(model(x), y) + ewc.penalty()).backward()
                optimizer.step()
            ewc.end_task([(x[:4], y[:4]), (x[4:], y[4:])], F.cross_entropy)
        assert model.qkv.weight.data_ptr() == storage
        states.append((weight_of(model), ewc.fishers, model(data()[0])))
    (weight, fishers, y), (expected_weight, expected_fishers, expected_y) = states
    assert not torch.equal(weight, weight_of(Model(True))), "two tasks have changed it"
    close(weight, expected_weight)
    close(y, expected_y)
    for key, fisher in expected_fishers.items():
        close(fishers[key], fisher)


def test_merge_unmerge_bitwise():
    """Merging adds the transposed product, and unmerging restores every bit."""
    model, x = adapted(True), data()[0]
    before, y = model.qkv.weight.detach().clone(), model(x)
    fe.merge(model)
    close(model(x), y)
    assert torch.equal(weight_of(model)[: OUT // 3], before.t()[: OUT // 3]), "q has no adapter"
    assert not torch.equal(weight_of(model)[OUT // 3 :], before.t()[OUT // 3 :])
    fe.unmerge(model)
    assert torch.equal(model.qkv.weight, before)


@pytest.mark.parametrize("merge", [True, False])
def test_eject_original_module(merge):
    """Ejecting gives back the very same module, with its class and keys."""
    model, x = adapted(True), data()[0]
    module, keys, y = model.qkv, set(Model(True).state_dict()), model(x)
    fe.eject(model, merge=merge)
    assert model.qkv is module and type(module) is Conv1D and set(model.state_dict()) == keys
    assert repr(module) == "Conv1D(nf=12, nx=6)" and module.weight.requires_grad
    close(model(x), y if merge else Model(True)(x))


def test_plain_checkpoint_base():
    """A plain checkpoint loads and becomes the base."""
    model, plain = adapted(True), Model(True)
    plain.qkv.weight.data.mul_(2.0)
    before = model.qkv.origin_fingerprint
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all("lora_" in key for key in missing)
    assert torch.equal(model.qkv.weight, plain.qkv.weight) and model.qkv.origin_fingerprint != before
    with fe.disabled(model):
        assert torch.equal(model(data()[0]), plain(data()[0]))


@pytest.mark.parametrize("tasks", [0, 1])
def test_resume_bitwise(tasks, tmp_path):
    """Training resumes from checkpoints bit for bit."""
    model = adapted(True)
    ewc = fe.EWC(model, 20.0, fisher_dtype=torch.float64)
    for task in range(tasks):
        ewc.end_task([data(task)], F.cross_entropy)
        with torch.no_grad():
            model.qkv.lora_B_k.normal_()
    fe.save_pretrained(tmp_path, model, ewc)
    other = Model(True)
    fe.inject(other, CONFIG)
    again = fe.EWC(other, 20.0, fisher_dtype=torch.float64)
    fe.load_pretrained(tmp_path, other, again)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert all(torch.equal(again.fishers[key], fisher) for key, fisher in ewc.fishers.items())
    assert torch.equal(other(data()[0]), model(data()[0]))


def test_other_base_refused(tmp_path):
    """A checkpoint of other base weights is refused."""
    fe.save_pretrained(tmp_path, adapted(True))
    other = Model(True)
    other.qkv.weight.data.mul_(1.5)
    fe.inject(other, CONFIG)
    with pytest.raises(fe.CheckpointError, match="other base weights"):
        fe.load_pretrained(tmp_path, other)


def test_copies_and_pickles():
    """Copies and pickles compute the same."""
    model, x = adapted(True), data()[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.qkv) is LoRAConv1D and torch.equal(other(x), model(x))


def test_bad_shape_refused():
    """A weight of another shape is refused before anything changes."""
    model = Model(True)
    model.qkv.nf = OUT + 1
    with pytest.raises(fe.TargetError, match=r"\[6, 12\], not \[in_features, out_features\]"):
        fe.inject(model, fe.LoRAConfig(target_modules=["qkv"]))
    assert type(model.qkv) is Conv1D


class Holder(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.proj = FalconLinear(IN, OUT, bias=bias, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@pytest.mark.parametrize("bias", [True, False])
def test_falcon_linear(bias):
    """Falcon's linear layer is adapted, and keeps its own forward without adapters."""
    # A transformers model brings its classes along; this one is not from there.
    torch.manual_seed(0)
    model, x = Holder(bias), data()[0]
    plain = model(x)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["proj"]))
    assert type(model.proj) is LoRAFalconLinear
    close(model(x), plain)  # B = 0
    with torch.no_grad():
        model.proj.lora_B.normal_()
    delta = model.proj.lora_B @ model.proj.lora_A
    close(model(x), plain + x @ delta.t())
    with fe.disabled(model):
        assert torch.equal(model(x), plain)
    fe.eject(model, merge=False)
    assert type(model.proj) is FalconLinear and torch.equal(model(x), plain)
